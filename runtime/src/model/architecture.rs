//! The model architectures that can be run, as data.

use pi_kernels::rope::RopePairs;

use super::error::ModelError;
use super::hyperparameters::GateKind;

/// What tells one llama-like architecture from another.
#[derive(Debug, PartialEq, Eq)]
pub struct Architecture {
    /// `general.architecture`, and the prefix of its keys.
    pub name: &'static str,
    /// Pairing of its rotary embedding.
    pub rope: RopePairs,
    /// Whether query, key and value have biases.
    pub qkv_bias: bool,
    /// Whether a sliding window holds in all layers (Mistral). Qwen2's files don't say in which.
    pub window: bool,
    /// Activation of the FFN gate where the file names none.
    pub gate: GateKind,
    /// Whether embeddings are multiplied by the root of their width.
    pub scaled_embeddings: bool,
}

/// Everything that can be run. Mistral's files call themselves `llama`.
pub const ARCHITECTURES: [Architecture; 3] = [
    Architecture {
        name: "llama",
        rope: RopePairs::Adjacent,
        qkv_bias: false,
        window: true,
        gate: GateKind::Silu,
        scaled_embeddings: false,
    },
    Architecture {
        name: "qwen2",
        rope: RopePairs::Halves,
        qkv_bias: true,
        window: false,
        gate: GateKind::Silu,
        scaled_embeddings: false,
    },
    Architecture {
        name: "gemma",
        rope: RopePairs::Halves,
        qkv_bias: false,
        window: false,
        gate: GateKind::Gelu,
        scaled_embeddings: true,
    },
];

impl Architecture {
    /// The architecture called `name`.
    ///
    /// # Errors
    /// [`ModelError::UnsupportedArchitecture`] with what is supported.
    pub fn find(name: &str) -> Result<&'static Architecture, ModelError> {
        ARCHITECTURES
            .iter()
            .find(|architecture| architecture.name == name)
            .ok_or_else(|| ModelError::UnsupportedArchitecture {
                name: name.to_owned(),
                supported: ARCHITECTURES
                    .map(|architecture| architecture.name)
                    .join(", "),
            })
    }
}
