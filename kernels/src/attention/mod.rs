//! Attention of query heads over a cache of keys and values.
//!
//! The cache of one layer and one key/value head is two arrays of rows, `[n_ctx, head_dim]` each.
//! Positions are taken in chunks of [`CHUNK_POSITIONS`], bounded by absolute positions; each chunk
//! gives a *state* (maximum score, sum of weights, weighted sum of values) and states are joined in
//! ascending order of chunks. Within a chunk the order of every sum is fixed. So a query's result
//! has the same bits whoever computes which chunk, and however many tokens are taken together:
//! decoding, prefill and any number of threads agree.
//!
//! Decode: [`reset_states`] and [`attend_chunk`] for each chunk into states of their own (on any
//! thread), then [`join_chunks`]. Prefill: [`attend`] for blocks of tokens.

mod cache;
mod scalar;
#[cfg(test)]
mod tests;
mod vector;

use std::ops::Range;

use crate::cpu::Cpu;
use crate::matrix::StridedOut;
use crate::simd::{LANES, by_tier};

pub use cache::{KvHead, KvType, append};

/// Positions of a chunk: chunk c holds positions 256 c … 256 c + 255.
pub const CHUNK_POSITIONS: usize = 256;

/// Largest `head_dim`.
pub const HEAD_DIM_MAX: usize = 512;

/// Query heads that share one key/value head, for consecutive tokens.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a> {
    /// `[n_tokens, stride]` f32; the first `n_heads · head_dim` values of a row are the heads.
    pub values: &'a [f32],
    /// Distance between tokens in `values`.
    pub stride: usize,
    /// Tokens.
    pub n_tokens: usize,
    /// Query heads per token.
    pub n_heads: usize,
    /// Position of the first token; token t is at `first_position + t`, and sees positions up to
    /// its own.
    pub first_position: usize,
    /// Sliding window: a token sees the last so many positions only, its own included.
    pub window: Option<usize>,
}

impl Queries<'_> {
    /// Positions that token `token` sees.
    pub fn visible(&self, token: usize) -> Range<usize> {
        let end = self.first_position + token + 1;
        self.window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Chunks in which any token sees anything.
    pub fn chunks(&self) -> Range<usize> {
        if self.n_tokens == 0 {
            return 0..0;
        }
        let (first, last) = (self.visible(0), self.visible(self.n_tokens - 1));
        first.start / CHUNK_POSITIONS..last.end.div_ceil(CHUNK_POSITIONS)
    }

    /// Positions of `chunk`, counted from its start, that token `token` sees.
    fn visible_in(&self, chunk: usize, token: usize) -> Range<usize> {
        let (visible, start) = (self.visible(token), chunk * CHUNK_POSITIONS);
        let end = visible.end.saturating_sub(start).min(CHUNK_POSITIONS);
        visible.start.saturating_sub(start).min(end)..end
    }

    /// The queries of `n_tokens` tokens from `token` on.
    pub fn block(&self, token: usize, n_tokens: usize) -> Self {
        assert!(token + n_tokens <= self.n_tokens, "tokens of the block");
        Self {
            values: &self.values[token * self.stride..],
            n_tokens,
            first_position: self.first_position + token,
            ..*self
        }
    }

    fn check(&self, head_dim: usize) {
        assert!(
            self.n_heads > 0 && self.n_heads * head_dim <= self.stride,
            "heads of a token"
        );
        let needed = match self.n_tokens {
            0 => 0,
            n => (n - 1) * self.stride + self.n_heads * head_dim,
        };
        assert!(
            self.values.len() >= needed,
            "queries of {} tokens",
            self.n_tokens
        );
        assert!(
            self.window != Some(0),
            "a window sees at least the token itself"
        );
    }
}

/// Length in f32 of the state of one query head: its weighted sum, padded to whole vectors, then
/// the maximum score and the sum of weights, padded likewise.
pub const fn state_len(head_dim: usize) -> usize {
    head_dim.next_multiple_of(LANES) + LANES
}

/// Makes states empty, `[n, state_len(head_dim)]` f32. Overwrites `states`.
///
/// # Panics
/// When `states` does not hold whole states.
pub fn reset_states(states: &mut [f32], head_dim: usize) {
    assert_eq!(states.len() % state_len(head_dim), 0, "whole states");
    for state in states.chunks_exact_mut(state_len(head_dim)) {
        state[state_len(head_dim) - LANES] = f32::NEG_INFINITY;
        state[state_len(head_dim) - LANES + 1] = 0.0;
    }
}

/// Adds what the queries see in one chunk to their states.
///
/// `states` is `[n_tokens, n_heads, state_len(head_dim)]` f32, reset or holding chunks before this
/// one. Accumulates into `states`; the state of a token that sees nothing of the chunk is left
/// alone. `scale` multiplies the queries, commonly 1/√head_dim.
///
/// # Panics
/// When lengths do not fit, the cache ends before the last visible position, or `head_dim` is over
/// [`HEAD_DIM_MAX`].
pub fn attend_chunk(
    cpu: Cpu,
    kv: KvHead<'_>,
    queries: Queries<'_>,
    chunk: usize,
    scale: f32,
    states: &mut [f32],
) {
    queries.check(kv.head_dim);
    let n_states = queries.n_tokens * queries.n_heads;
    assert_eq!(
        states.len(),
        n_states * state_len(kv.head_dim),
        "states of the queries"
    );
    if n_states == 0 {
        return;
    }
    let last = queries.visible_in(chunk, queries.n_tokens - 1);
    kv.check(chunk * CHUNK_POSITIONS + last.end);
    by_tier!(
        cpu,
        scalar::attend_chunk,
        vector::attend_chunk,
        (kv: KvHead<'_>, queries: Queries<'_>, chunk: usize, scale: f32, states: &mut [f32])
    )
}

/// Joins the states of chunks in ascending order and writes the heads' results.
///
/// `states` is `[n_chunks, n_heads, state_len(head_dim)]` f32; those of the first chunk are
/// overwritten. `out` is `[n_heads, head_dim]` f32. Overwrites `out`.
///
/// # Panics
/// When the lengths do not fit.
pub fn join_chunks(cpu: Cpu, head_dim: usize, states: &mut [f32], out: &mut [f32]) {
    assert!(
        head_dim > 0 && out.len().is_multiple_of(head_dim),
        "whole heads"
    );
    let chunk_len = out.len() / head_dim * state_len(head_dim);
    assert!(
        chunk_len > 0 && !states.is_empty(),
        "states of at least one chunk and head"
    );
    assert_eq!(states.len() % chunk_len, 0, "states of whole chunks");
    let (first, others) = states.split_at_mut(chunk_len);
    for chunk in others.chunks_exact(chunk_len) {
        by_tier!(
            cpu,
            scalar::join,
            vector::join,
            (head_dim: usize, first: &mut [f32], chunk: &[f32])
        );
    }
    finish(cpu, head_dim, first, out);
}

/// Writes the results of states that hold all chunks: weighted sum / sum of weights.
///
/// `states` is `[n_heads, state_len(head_dim)]`, `out` `[n_heads, head_dim]` f32. Overwrites `out`.
fn finish(cpu: Cpu, head_dim: usize, states: &[f32], out: &mut [f32]) {
    by_tier!(
        cpu,
        scalar::finish,
        vector::finish,
        (head_dim: usize, states: &[f32], out: &mut [f32])
    )
}

/// Attention of consecutive tokens over all they see.
///
/// `states` is scratch for `[block, n_heads, state_len(head_dim)]` f32, where `block` says how many
/// tokens read the cache together (32 is a good number); it may hold anything. `out` is
/// `[n_tokens, n_heads · head_dim]` f32. Overwrites `out`.
///
/// # Panics
/// When lengths do not fit, or `states` has no room for one token.
pub fn attend(
    cpu: Cpu,
    kv: KvHead<'_>,
    queries: Queries<'_>,
    scale: f32,
    states: &mut [f32],
    out: &mut StridedOut<'_>,
) {
    queries.check(kv.head_dim);
    assert_eq!(out.n_tokens(), queries.n_tokens, "tokens of the output");
    assert_eq!(
        out.n_rows(),
        queries.n_heads * kv.head_dim,
        "heads of the output"
    );
    let token_len = queries.n_heads * state_len(kv.head_dim);
    let block = states.len() / token_len;
    assert!(block > 0, "scratch for the states of at least one token");
    for token in (0..queries.n_tokens).step_by(block) {
        let n_tokens = block.min(queries.n_tokens - token);
        let part = queries.block(token, n_tokens);
        let states = &mut states[..n_tokens * token_len];
        reset_states(states, kv.head_dim);
        for chunk in part.chunks() {
            attend_chunk(cpu, kv, part, chunk, scale, states);
        }
        for (t, states) in states.chunks_exact(token_len).enumerate() {
            finish(cpu, kv.head_dim, states, out.row(token + t));
        }
    }
}
