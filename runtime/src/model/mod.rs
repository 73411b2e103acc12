//! Llama-like models: what is in the file, what it becomes in memory, and how it gets there.

pub mod architecture;
pub mod error;
pub mod footprint;
pub mod hyperparameters;
pub mod quantize;
pub mod shares;
pub mod sparsity;
pub mod tensors;
pub mod transpose;

pub use error::ModelError;
pub use hyperparameters::{GateKind, Hyperparameters};
pub use sparsity::Sparsity;
pub use tensors::ModelTensors;
