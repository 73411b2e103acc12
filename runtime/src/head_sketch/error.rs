//! Why a sketch of a head cannot be made.

use thiserror::Error;

/// Why a sketch of a head cannot be made.
#[derive(Debug, Error, PartialEq)]
pub enum HeadSketchError {
    /// Too little text.
    #[error(
        "the text gives {n_tokens} hidden states, but a sketch of the head needs at least {needed}: give a longer text"
    )]
    TooFewTokens {
        /// Hidden states.
        n_tokens: usize,
        /// Needed at least.
        needed: usize,
    },
    /// A width that blocks of 32 do not divide.
    #[error(
        "a sketch of the head needs a width of whole blocks of 32, 64 at least, but the model's is {n_embd}: run it with --head full"
    )]
    Width {
        /// Of the hidden state.
        n_embd: usize,
    },
    /// Weights or hidden states that are not finite, or all the same.
    #[error(
        "the head's weights or the text's hidden states are no basis for a sketch: the model file is damaged"
    )]
    Degenerate,
    /// The tap saw nothing.
    #[error("the model was opened without a tap for its head: open it with one")]
    NoTap,
}
