//! gemv
