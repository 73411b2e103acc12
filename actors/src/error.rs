//! Why a step or an engine fails.

use thiserror::Error;

/// What can go wrong between actors.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum ActorError {
    /// The context has no room for the tokens.
    #[error(
        "the context of {n_ctx} tokens is full: {n_tokens} more at position {position} do not fit"
    )]
    ContextFull {
        /// Positions of the cache.
        n_ctx: usize,
        /// Position of the first token.
        position: usize,
        /// Tokens to be fed.
        n_tokens: usize,
    },
}
