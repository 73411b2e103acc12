//! Why a model cannot be loaded.

use pi_actors::ActorError;
use pi_topology::TopologyError;
use thiserror::Error;

use super::gpu::GpuModelError;
use crate::gguf::GgufError;

/// A model file that cannot be run, or a machine that cannot hold it.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The model does not go to the GPU.
    #[error(transparent)]
    Gpu(#[from] GpuModelError),
    /// A key or tensor that is missing, or not what it has to be.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// An architecture that nothing here computes.
    #[error(
        "architecture \"{name}\" is not supported (supported: {supported}): use a model of one of these"
    )]
    UnsupportedArchitecture {
        /// `general.architecture`
        name: String,
        /// What is supported.
        supported: String,
    },
    /// A metadata key with a value that cannot be.
    #[error(
        "metadata key {key} is {value}, but {needed}: the file is damaged or of an unsupported kind"
    )]
    BadKey {
        /// Its full name.
        key: String,
        /// What it is.
        value: String,
        /// What it should be.
        needed: String,
    },
    /// A feature that would change the output and is not implemented.
    #[error("the model needs {feature} ({key} = {value}), which is not supported: {cure}")]
    UnsupportedFeature {
        /// What is missing.
        feature: &'static str,
        /// Key that asks for it.
        key: String,
        /// Its value.
        value: String,
        /// What to do.
        cure: &'static str,
    },
    /// A tensor that would have to take part and doesn't.
    #[error(
        "tensor {name} is in the file, but models of this architecture are computed without it: convert the model again"
    )]
    UnexpectedTensor {
        /// Its name.
        name: String,
    },
    /// A value in a tensor that cannot be.
    #[error("tensor {name} holds {value}, but {needed}: the file is damaged")]
    BadValue {
        /// The tensor.
        name: String,
        /// The value.
        value: f32,
        /// What values can be.
        needed: &'static str,
    },
    /// `exact` on a model whose gates never close.
    #[error(
        "--sparsity {mode} needs gates that close (ReLU), but this model's gates are {activation}: use --sparsity off"
    )]
    GatesNeverClose {
        /// What was asked for.
        mode: &'static str,
        /// The model's activation.
        activation: &'static str,
    },
    /// `threshold` on a model whose gates close.
    #[error(
        "--sparsity threshold is for gates that never close, but this model's are relu: use --sparsity exact, which \
         leaves out more and loses nothing, or predicted"
    )]
    GatesClose,
    /// `threshold` without thresholds.
    #[error("--sparsity threshold needs thresholds: make them with `pi-runtime prepare`")]
    NoThresholds,
    /// Packing a model whose gates never close.
    #[error(
        "the model's gates are {activation}, which never close: packing would gain nothing; use the file as it is"
    )]
    NothingToSkip {
        /// The model's activation.
        activation: &'static str,
    },
    /// A model that is neuron-major already.
    #[error("{name} is in the file already: the model needs no packing")]
    AlreadyPacked {
        /// The neuron-major tensor.
        name: String,
    },
    /// A type that `pack` cannot write.
    #[error(
        "cannot write down rows of type \"{name}\" (possible: {possible}): choose one of these with --type"
    )]
    UnwritableType {
        /// As asked for.
        name: String,
        /// What can be written.
        possible: String,
    },
    /// A width that does not divide into blocks of the type.
    #[error(
        "rows of {n_values} values do not divide into {quant} blocks of {block_values}: choose another type with --type, or --sparsity off"
    )]
    PartialBlock {
        /// Values in a row.
        n_values: usize,
        /// The type.
        quant: &'static str,
        /// Values in a block.
        block_values: usize,
    },
    /// More context than the model or the machine allows.
    #[error("a context of {asked} tokens is more than the model's {limit}: use -c {limit} or less")]
    ContextTooLong {
        /// As asked for.
        asked: usize,
        /// The model's.
        limit: usize,
    },
    /// Memory that the machine does not give.
    #[error("cannot place the weights: {0}")]
    Memory(#[source] TopologyError),
    /// A thread that failed while it copied weights.
    #[error("cannot load the weights: {0}")]
    Threads(#[from] ActorError),
}

impl ModelError {
    /// Whether the machine is at fault rather than the file or a flag.
    pub fn is_environment(&self) -> bool {
        match self {
            ModelError::Gguf(error) => error.is_environment(),
            ModelError::Memory(error) => error.is_environment(),
            ModelError::Threads(_) => true,
            _ => false,
        }
    }
}
