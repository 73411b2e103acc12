//! The GPU as the device: attention, hot neurons, predictors and head of all layers in its memory.
//!
//! A token is one CUDA graph; a prompt's tokens are launched together (`prefill`). What passes between GPU and host within it goes through pinned memory with flags
//! (`exchange`); `CudaLayer` turns these into the messages that a layer's other actors know. See `docs/gpu.md`.

mod buffers;
mod clock;
mod cuda_layer;
mod error;
mod exchange;
mod gpu_model;
mod hot_counts;
mod moving;
mod prefill;
mod reads;
mod times;
pub mod weights;

use pi_kernels::Cpu;
use pi_kernels::elementwise::add_assign;

pub(crate) use cuda_layer::{CudaLayer, take_hidden_part};
pub use error::GpuError;
pub use gpu_model::working_bytes;
pub(crate) use gpu_model::{GpuModel, GpuOptions};
pub use moving::replan_bytes;
pub use prefill::{PrefillSizes, streamed_tokens_min};
pub use times::{GpuTimes, LayerTimes};

/// Writes the sum of `sums`, added in their order, to `to`; zeros without any.
pub(crate) fn sum_into<'a>(cpu: Cpu, to: &mut [f32], mut sums: impl Iterator<Item = &'a [f32]>) {
    match sums.next() {
        None => to.fill(0.0),
        Some(first) => to.copy_from_slice(first),
    }
    for sum in sums {
        add_assign(cpu, to, sum);
    }
}
