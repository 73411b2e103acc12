//! perplexity
