//! Why a synthetic model cannot be made.

use thiserror::Error;

use crate::gguf::GgufError;
use crate::model::ModelError;
use crate::sidecar::SidecarError;

/// Why a synthetic model cannot be made.
#[derive(Debug, Error)]
pub enum SynthError {
    /// A size or share that cannot be.
    #[error("{flag} {value}: {problem}")]
    Shape {
        /// The flag that states it.
        flag: &'static str,
        /// Its value.
        value: String,
        /// What is wrong, and what would do.
        problem: String,
    },
    /// A file that cannot be written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The finished model cannot be read back.
    #[error("the model that was written cannot be read back: {0}")]
    Model(#[from] ModelError),
    /// The sidecar cannot be written.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
}

impl SynthError {
    /// Whether the machine is at fault, and not a flag.
    pub fn is_environment(&self) -> bool {
        match self {
            Self::Shape { .. } => false,
            Self::Gguf(source) => source.is_environment(),
            Self::Model(source) => source.is_environment(),
            Self::Sidecar(source) => source.is_environment(),
        }
    }
}
