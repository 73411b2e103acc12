//! Which instruction set and which activation arithmetic the kernels use.

use std::fmt;
use std::str::FromStr;

use crate::activations::ActivationMode;
use crate::error::KernelError;

/// Instruction-set tier of the CPU kernels, in ascending order of speed.
///
/// All tiers give the same bits; a lower one can be forced to test it on a machine that has more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Plain Rust: the specification.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with VNNI (8-bit dot products).
    Avx512Vnni,
    /// The same with AMX (products of 8-bit tiles) for many tokens.
    Avx512Amx,
}

impl Tier {
    /// All tiers, slowest first.
    pub const ALL: [Tier; 5] = [
        Tier::Scalar,
        Tier::Avx2,
        Tier::Avx512,
        Tier::Avx512Vnni,
        Tier::Avx512Amx,
    ];

    /// The fastest tier that this machine can run.
    pub fn detect() -> Tier {
        *Self::available().last().unwrap_or(&Tier::Scalar)
    }

    /// Every tier that this machine can run, slowest first.
    pub fn available() -> Vec<Tier> {
        Self::ALL
            .into_iter()
            .filter(|tier| tier.is_available())
            .collect()
    }

    /// Whether this machine can run the tier.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        let avx2 = || {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        };
        let avx512 = || {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
        };
        let vnni = || avx512() && is_x86_feature_detected!("avx512vnni");
        match self {
            Tier::Scalar => true,
            Tier::Avx2 => avx2(),
            Tier::Avx512 => avx512(),
            Tier::Avx512Vnni => vnni(),
            #[cfg(target_os = "linux")]
            Tier::Avx512Amx => vnni() && crate::dot::amx::is_available(),
            #[cfg(not(target_os = "linux"))]
            Tier::Avx512Amx => false,
        }
    }

    /// Whether this machine can run the tier.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Tier::Scalar
    }

    /// Name as the command line and the logs give it.
    pub fn name(self) -> &'static str {
        match self {
            Tier::Scalar => "scalar",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
            Tier::Avx512Vnni => "avx512-vnni",
            Tier::Avx512Amx => "avx512-amx",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Tier {
    type Err = KernelError;

    fn from_str(text: &str) -> Result<Self, KernelError> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.name() == text)
            .ok_or_else(|| KernelError::UnknownTier {
                name: text.to_owned(),
            })
    }
}

/// How kernels compute: the first argument of each of them.
///
/// It can only be made for a tier that the machine has, so kernels need not check again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpu {
    tier: Tier,
    mode: ActivationMode,
}

impl Cpu {
    /// The given tier and activation arithmetic.
    ///
    /// # Errors
    /// [`KernelError::TierMissing`] when this machine lacks the tier's instructions.
    pub fn new(tier: Tier, mode: ActivationMode) -> Result<Self, KernelError> {
        if tier.is_available() {
            Ok(Self { tier, mode })
        } else {
            Err(KernelError::TierMissing {
                tier,
                best: Tier::detect(),
            })
        }
    }

    /// The fastest tier of this machine.
    pub fn detect(mode: ActivationMode) -> Self {
        Self {
            tier: Tier::detect(),
            mode,
        }
    }

    /// The instruction set in use.
    pub fn tier(self) -> Tier {
        self.tier
    }

    /// The activation arithmetic in use.
    pub fn mode(self) -> ActivationMode {
        self.mode
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_bad_ones_list_the_choice() {
        for tier in Tier::ALL {
            assert_eq!(tier.name().parse::<Tier>().unwrap(), tier);
        }
        let message = "avx1024".parse::<Tier>().unwrap_err().to_string();
        assert!(
            message.contains("avx1024") && message.contains("avx512-amx"),
            "{message}"
        );
    }

    #[test]
    fn scalar_is_always_there_and_detect_is_the_best() {
        let available = Tier::available();
        assert_eq!(available[0], Tier::Scalar);
        assert_eq!(Tier::detect(), *available.last().unwrap());
    }
}
