//! The sparse head: a sketch of the output matrix picks the tokens whose logits are worth computing.
//!
//! The head multiplies the normed hidden state h with a row for each token; in a small model that is a third of all
//! bytes. The sketch is a low-rank copy, `W·h ≈ B·(A·h)` up to a constant that is the same for all tokens, fitted so that
//! the error is small for hidden states as they occur, and rounded to 4 bits. Tokens whose score B·(A·h) is among the
//! best are candidates: their logits are computed from their real rows, and nobody else's are.
//!
//! [`fit()`] makes it from samples of hidden states, which [`HeadTap`] collects while a model reads a text
//! ([`prepare_head`] does both); [`agreement()`] says how well it does on another text. The sidecar keeps it.
//!
//! For `prepare`: open the model with a [`HeadTap`] as its tap (or call [`HeadTap::head_input`](pi_actors::LayerTap) from
//! its own), call [`prepare_head`] with the calibration text's tokens, then [`HeadSketch::declare`] on the sidecar's
//! header and [`HeadSketch::write`] on its stream. For the report, open the model again with [`Head::Sparse`] and call
//! [`agreement()`].

mod agreement;
mod blocks;
mod collect;
mod error;
mod fit;
mod quality;
mod section;

use std::fmt;

pub use agreement::{Agreement, agreement};
pub use collect::{HeadSamples, HeadTap, prepare_head};
pub use error::HeadSketchError;
pub use fit::{FitOptions, fit};
pub use section::SketchTensors;

use pi_kernels::QuantType;

/// Which head computes logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Head {
    /// All tokens' logits
    #[default]
    Full,
    /// The logits of tokens that a sketch of the head picks; all others have none
    Sparse,
}

impl Head {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Head::Full => "full",
            Head::Sparse => "sparse",
        }
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Type of the projection A, `[rank, n_embd]`.
pub const PROJECT_TYPE: QuantType = QuantType::Q8_0;
/// Type of the tokens' rows B, `[n_vocab, rank]`.
pub const SCORES_TYPE: QuantType = QuantType::Q4_0;

/// A sketch of a model's head.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadSketch {
    /// Columns of the head.
    pub n_embd: usize,
    /// Its rows.
    pub n_vocab: usize,
    /// Numbers that the hidden state is projected to.
    pub rank: usize,
    /// Groups of 16 tokens whose best scores set the threshold that makes a candidate.
    pub n_groups: usize,
    /// Candidates of a token, in the mean over the text that `n_groups` was chosen on.
    pub mean_candidates: f32,
    /// A, `[rank, n_embd]` in [`PROJECT_TYPE`], in file order.
    pub project: Vec<u8>,
    /// B, `[n_vocab, rank]` in [`SCORES_TYPE`], in file order.
    pub scores: Vec<u8>,
}
