//! Errors of the kernels crate.

use crate::cpu::Tier;
use crate::cuda::Capability;

/// What callers can get wrong with data from outside; wrong shapes between kernels are assertions.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum KernelError {
    /// The name is no instruction-set tier.
    #[error(
        "unknown instruction-set tier '{name}': use scalar, avx2, avx512, avx512-vnni or avx512-amx"
    )]
    UnknownTier {
        /// What was given.
        name: String,
    },
    /// The machine lacks the tier.
    #[error("this machine cannot run tier {tier}: its best is {best}; ask for that or a lower one")]
    TierMissing {
        /// What was asked for.
        tier: Tier,
        /// The fastest tier that the machine has.
        best: Tier,
    },
    /// The name is no activation mode.
    #[error("unknown activation arithmetic '{name}': use f32 or q8")]
    UnknownActivationMode {
        /// What was given.
        name: String,
    },
    /// The machine has no CUDA driver.
    #[error(
        "no CUDA driver: the library libcuda is missing; install NVIDIA's driver, or run on the host"
    )]
    CudaNoDriver,
    /// The driver is older than the kernels.
    #[error(
        "the CUDA driver is too old: it supports CUDA {}.{}, the kernels need {}.{} (driver 525 or newer)",
        found / 1000, found % 1000 / 10, needed / 1000, needed % 1000 / 10
    )]
    CudaDriverTooOld {
        /// What the driver supports: 1000 · major + 10 · minor.
        found: u32,
        /// What is needed, likewise.
        needed: u32,
    },
    /// The driver has no such GPU.
    #[error("there is no CUDA device {ordinal}: the driver has {count}")]
    CudaNoDevice {
        /// What was asked for.
        ordinal: usize,
        /// What there is.
        count: usize,
    },
    /// No kernels were compiled for the GPU's architecture.
    #[error(
        "no kernels for {name}: its compute capability is {capability}, the kernels are for 7.5, 8.x, 9.0, 12.x and newer"
    )]
    CudaNoImage {
        /// The GPU.
        name: String,
        /// Its architecture.
        capability: Capability,
    },
    /// The GPU's memory is full.
    #[error("out of GPU memory: {bytes} bytes asked for, {free_bytes} are free")]
    CudaOutOfMemory {
        /// What was asked for.
        bytes: usize,
        /// What the driver says is free, in whatever pieces.
        free_bytes: usize,
    },
    /// The driver refused, or an earlier launch failed.
    #[error("CUDA: cannot {operation}: {text} (error {code})")]
    Cuda {
        /// What was tried.
        operation: &'static str,
        /// The driver's number.
        code: u32,
        /// The driver's words.
        text: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_driver_name_cause_and_numbers() {
        let old = KernelError::CudaDriverTooOld {
            found: 11_040,
            needed: 12_000,
        };
        assert_eq!(
            old.to_string(),
            "the CUDA driver is too old: it supports CUDA 11.4, the kernels need 12.0 (driver 525 or newer)"
        );
        let none = KernelError::CudaNoImage {
            name: "Tesla V100".to_owned(),
            capability: Capability { major: 7, minor: 0 },
        };
        assert!(
            none.to_string()
                .contains("Tesla V100: its compute capability is 7.0")
        );
    }
}
