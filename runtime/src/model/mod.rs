//! Llama-like models: what is in the file, what it becomes in memory, and how it gets there.

pub mod architecture;
mod copy_task;
pub mod description;
pub mod error;
pub mod footprint;
pub mod gpu;
pub mod hyperparameters;
mod layout;
pub mod load;
pub mod moves;
pub mod node_memory;
pub mod predicting;
pub mod quantize;
pub mod requantize;
pub mod room;
pub mod rope;
pub mod shares;
pub mod sparsity;
pub mod tensors;
pub mod threshold;
pub mod transpose;

pub use error::ModelError;
pub use hyperparameters::{GateKind, Hyperparameters};
pub use load::Loader;
pub use sparsity::Sparsity;
pub use tensors::ModelTensors;
