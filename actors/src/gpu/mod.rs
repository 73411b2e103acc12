//! The GPU as the device: attention, hot neurons, predictors and head of all layers in its memory.
//!
//! A token is one CUDA graph. What passes between GPU and host within it goes through pinned memory with flags
//! (`exchange`); `CudaLayer` turns these into the messages that a layer's other actors know. See `docs/gpu.md`.

mod buffers;
mod cuda_layer;
mod error;
mod exchange;
mod gpu_model;
mod times;
pub mod weights;

pub(crate) use cuda_layer::CudaLayer;
pub use error::GpuError;
pub(crate) use gpu_model::GpuModel;
pub use gpu_model::working_bytes;
pub use times::{GpuTimes, LayerTimes};
