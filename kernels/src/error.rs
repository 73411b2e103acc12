//! Errors of the kernels crate.

use crate::cpu::Tier;

/// What callers can get wrong with data from outside; wrong shapes between kernels are assertions.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum KernelError {
    /// The name is no instruction-set tier.
    #[error("unknown instruction-set tier '{name}': use scalar, avx2, avx512 or avx512-vnni")]
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
}
