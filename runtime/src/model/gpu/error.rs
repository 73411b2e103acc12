//! Why a model does not go to a GPU.

use pi_kernels::KernelError;
use thiserror::Error;

use super::choice::GpuMemory;

/// What stands in the way.
#[derive(Debug, Error)]
pub enum GpuModelError {
    /// What has to be on the GPU is more than its budget.
    #[error(
        "the model does not fit into the GPU's budget:\n{memory}\nraise vram_budget, shorten the context (-c), or leave [[gpu]] out"
    )]
    OverBudget {
        /// What takes how much.
        memory: GpuMemory,
    },
    /// A format that the CUDA kernels do not run.
    #[error(
        "{tensor} is {quant}, which does not run on a GPU: convert the model to one of {supported}, or leave [[gpu]] out"
    )]
    Format {
        /// The tensor.
        tensor: String,
        /// Its format.
        quant: &'static str,
        /// What runs.
        supported: String,
    },
    /// Something that the GPU does not compute.
    #[error("{what} does not run on a GPU: {cure}, or leave [[gpu]] out")]
    Mode {
        /// What.
        what: &'static str,
        /// What to do instead.
        cure: &'static str,
    },
    /// The driver refuses, or there is none.
    #[error(transparent)]
    Driver(#[from] KernelError),
}
