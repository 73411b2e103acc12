//! Product of a matrix and one activation row.
