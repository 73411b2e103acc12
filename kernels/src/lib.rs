//! Quantised block formats and the arithmetic on them.
//!
//! Every kernel has a scalar version that is its specification; the SIMD versions give the same
//! bits, because every reduction has one fixed order. See `ARCHITECTURE.md`, "Arithmetic".

pub mod activations;
pub mod attention;
pub mod cpu;
pub mod cuda;
mod dot;
pub mod elementwise;
pub mod error;
pub mod ffn_sparse;
pub mod gemm;
pub mod head_sparse;
pub mod matrix;
pub mod norm;
pub mod quant;
pub mod rope;
mod simd;
#[cfg(test)]
mod testing;

pub use activations::{ActBatch, ActRef, ActWriter, ActivationMode};
pub use cpu::{Cpu, Tier};
pub use error::KernelError;
pub use matrix::{Layout, MatrixRef, MatrixShape, ROW_GROUP, StridedOut};
pub use quant::QuantType;
