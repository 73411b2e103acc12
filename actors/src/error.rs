//! Why an engine cannot start, or a run ends early.

use std::fmt;

use pi_topology::TopologyError;
use thiserror::Error;

use crate::gpu::GpuError;
use crate::messages::ActorId;

/// A part of a model that has an output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelPart {
    /// The rows of the token embedding.
    Embedding,
    /// A layer.
    Layer {
        /// Counted from 0.
        layer: usize,
    },
    /// The last norm and the output matrix.
    Head,
    /// The sketch that picks rows of the output matrix.
    HeadSketch,
}

impl fmt::Display for ModelPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelPart::Embedding => f.write_str("the token embedding"),
            ModelPart::Layer { layer } => write!(f, "layer {layer}"),
            ModelPart::Head => f.write_str("the head (output_norm, output)"),
            ModelPart::HeadSketch => f.write_str("the sketch of the head"),
        }
    }
}

/// What can go wrong between actors.
#[derive(Debug, Error)]
pub enum ActorError {
    /// The context has no room for the tokens.
    #[error(
        "the context of {n_ctx} tokens is full: {n_tokens} more at position {position} do not fit; raise -c"
    )]
    ContextFull {
        /// Positions of the cache.
        n_ctx: usize,
        /// Position of the first token.
        position: usize,
        /// Tokens to be fed.
        n_tokens: usize,
    },
    /// A feed without tokens.
    #[error("a feed has no tokens: the feeder has to give at least one, or end")]
    EmptyFeed,
    /// A feed that leaves positions out.
    #[error(
        "a feed starts at position {position}, but the cache ends at {cached}: feed what lies between"
    )]
    Gap {
        /// Position of the feed.
        position: usize,
        /// Positions in the cache.
        cached: usize,
    },
    /// A token that the model does not know.
    #[error(
        "token {token} is not in the model's vocabulary of {n_vocab}: the text was tokenised for another model"
    )]
    UnknownToken {
        /// Its id.
        token: u32,
        /// Size of the vocabulary.
        n_vocab: usize,
    },
    /// Numbers that are not finite, or too large for a norm.
    #[error(
        "the output of {part} is not finite at position {position}: the model file is damaged, or its numbers overflow; compare its checksum with its source's and get it again"
    )]
    NotFinite {
        /// The first part whose output is not.
        part: ModelPart,
        /// The first position where it is not.
        position: usize,
    },
    /// The sparse head is asked for without a sketch.
    #[error("the sparse head is asked for, but the model was loaded without a sketch of its head")]
    NoHeadSketch,
    /// The feeder panicked.
    #[error("what feeds the pipeline failed: {reason}")]
    Feeder {
        /// The panic's words.
        reason: String,
    },
    /// An actor that was stopped is needed.
    #[error("{actor} is stopped, and the token needs it: start the engine again")]
    Stopped {
        /// Which.
        actor: ActorId,
    },
    /// An actor that fails again after every restart.
    #[error("{actor} failed {attempts} times in one step, the last time with: {reason}")]
    KeepsFailing {
        /// Which.
        actor: ActorId,
        /// Attempts at the step.
        attempts: u32,
        /// The last panic's words.
        reason: String,
    },
    /// Somebody did not answer in time.
    #[error(
        "no answer within {seconds} s from {late}: the machine is overloaded, or an actor hangs"
    )]
    Late {
        /// Who, in words.
        late: String,
        /// The limit.
        seconds: f64,
    },
    /// There is no such actor.
    #[error("there is no {actor} in this engine")]
    NoSuchActor {
        /// Which.
        actor: ActorId,
    },
    /// A thread cannot be started.
    #[error("cannot start a thread of node {node}: {source}")]
    Thread {
        /// The node.
        node: usize,
        /// Why.
        source: std::io::Error,
    },
    /// The control plane cannot be started.
    #[error("cannot start the control plane's thread: {source}")]
    Control {
        /// Why.
        source: std::io::Error,
    },
    /// A job on the teams panicked.
    #[error("work on the team of node {node} failed: {reason}")]
    Job {
        /// The node.
        node: usize,
        /// The panic's words.
        reason: String,
    },
    /// The GPU failed.
    #[error(
        "the GPU has no result for position {position}: {source}; start again, or run on the host (without --topology)"
    )]
    Gpu {
        /// Position of the token.
        position: usize,
        /// Why.
        source: GpuError,
    },
    /// The GPU's part of an engine cannot be made.
    #[error("the GPU cannot be prepared: {source}")]
    GpuStart {
        /// Why.
        source: GpuError,
    },
    /// The engine's threads are gone.
    #[error("the engine has ended")]
    Gone,
    /// The machine refuses a thread's place or memory.
    #[error(transparent)]
    Topology(#[from] TopologyError),
}

impl ActorError {
    /// Whether the machine is at fault rather than what was asked of it.
    pub fn is_environment(&self) -> bool {
        match self {
            ActorError::Topology(error) => error.is_environment(),
            ActorError::ContextFull { .. }
            | ActorError::EmptyFeed
            | ActorError::Gap { .. }
            | ActorError::UnknownToken { .. }
            | ActorError::NotFinite { .. }
            | ActorError::NoHeadSketch
            | ActorError::NoSuchActor { .. } => false,
            _ => true,
        }
    }
}
