//! mapped_file
