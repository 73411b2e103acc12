//! ffn_sparse
