//! What can go wrong between host and GPU.

use pi_kernels::KernelError;
use thiserror::Error;

/// Why a token on the GPU has no result.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum GpuError {
    /// The driver's words: out of memory, or a kernel that failed, after which the GPU's memory is lost.
    #[error(transparent)]
    Driver(#[from] KernelError),
    /// The GPU waited too long for the host's neurons, and gave the token up.
    #[error("the GPU waited {seconds} s for the host's part of a layer and gave the token up")]
    HostLate {
        /// How long.
        seconds: f64,
    },
    /// A layer's output is not finite.
    #[error("the output of layer {layer} is not finite")]
    NotFinite {
        /// The layer.
        layer: usize,
    },
    /// Re-planning ended in the middle.
    #[error(
        "moving neurons between GPU and host was broken off: start the program again, or leave --replan out"
    )]
    HalfMoved,
    /// Nothing came from the GPU.
    #[error("nothing came from the GPU within {seconds} s, and its driver reports no error")]
    GpuLate {
        /// How long was waited.
        seconds: f64,
    },
}
