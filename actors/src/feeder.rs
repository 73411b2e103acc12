//! What the pipeline computes for: something that gives tokens and takes logits, between steps.

use std::any::Any;

/// Gives the pipeline its work and takes the results, on the pipeline's own thread, so that no token
/// waits for a change of threads.
///
/// It may do anything between two steps (sample, print, allocate); while a step runs, it is not
/// called.
pub trait Feeder: Any + Send {
    /// What to compute next. Called after the logits of the step before have been given.
    fn next(&mut self) -> Next<'_>;

    /// The logits `[n_vocab]` f32 after the token at `position`: once for each position that was
    /// asked for, in ascending order.
    fn logits(&mut self, position: usize, logits: &[f32]);

    /// Which head computes the logits of the feed that [`Feeder::next`] gave last.
    fn head(&self) -> HeadWanted<'_> {
        HeadWanted::Full
    }

    /// In place of [`Feeder::logits`], where [`HeadWanted::Sparse`] was asked for; who asks for it has to take them.
    fn candidates(&mut self, position: usize, candidates: Candidates<'_>) {
        let _ = (position, candidates);
    }
}

/// Which head computes logits.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum HeadWanted<'a> {
    /// Every token's.
    #[default]
    Full,
    /// Those of candidates that a sketch of the head picks, one position at a time.
    Sparse {
        /// What will be added to tokens' logits: they are picked by their sum, so that a token that is forbidden takes no
        /// other's place, and are candidates whatever it is.
        biases: &'a [(u32, f32)],
    },
}

/// Tokens that a sketch of the head picked, with their logits from the head itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidates<'a> {
    /// Ascending.
    pub ids: &'a [u32],
    /// Their logits, the bits of the full head's.
    pub logits: &'a [f32],
}

/// What to compute next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next<'a> {
    /// Some tokens.
    Feed(Feed<'a>),
    /// Nothing more.
    Done,
}

/// Consecutive tokens to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feed<'a> {
    /// Ids, at least one.
    pub tokens: &'a [u32],
    /// Position of the first one. What the cache holds from here on is forgotten, what it holds
    /// before is kept: 0 starts anew, and the number of tokens fed so far goes on.
    pub position: usize,
    /// For which of them logits are wanted.
    pub logits: LogitsWanted,
}

/// For which tokens of a [`Feed`] logits are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsWanted {
    /// For none.
    None,
    /// For the last.
    Last,
    /// For this token of the feed (counted from 0) and all behind it.
    From(usize),
}

impl LogitsWanted {
    /// The tokens of a feed of `n_tokens` whose logits are wanted.
    pub fn range(self, n_tokens: usize) -> std::ops::Range<usize> {
        match self {
            LogitsWanted::None => n_tokens..n_tokens,
            LogitsWanted::Last => n_tokens.saturating_sub(1)..n_tokens,
            LogitsWanted::From(first) => first.min(n_tokens)..n_tokens,
        }
    }
}
