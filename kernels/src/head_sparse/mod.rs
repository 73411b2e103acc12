//! The output head over some tokens only: a cheap score of every token picks candidates, whose logits are then exact.
//!
//! 1. A sketch of the head gives every token a score ([`crate::gemm::gemv`]).
//! 2. [`group_maxima`] keeps the best score of each 16 tokens, and [`kth_largest`] of these is the threshold: so at least
//!    k tokens reach it, and no score is sorted.
//! 3. [`collect`] lists the tokens that reach it.
//! 4. [`candidate_logits`] multiplies their real rows.
//!
//! Groups are of ids 16·g … 16·g+15, so that neither the threshold nor the candidates depend on how the rows are
//! divided.

mod scalar;
#[cfg(test)]
mod tests;
mod vector;

use std::ops::Range;

use crate::activations::{ActBatch, ActRef};
use crate::cpu::Cpu;
use crate::ffn_sparse::{NeuronRows, row_products};
use crate::matrix::{Layout, MatrixRef, ROW_GROUP, StridedOut};
use crate::simd::by_tier;

/// Writes the largest of each 16 of `scores` (`[n]` f32) to `out` (`[⌈n / 16⌉]` f32, overwritten); NaN is left out, and
/// −∞ is the largest of nothing.
///
/// # Panics
/// When `out` has another length.
pub fn group_maxima(cpu: Cpu, scores: &[f32], out: &mut [f32]) {
    assert_eq!(
        out.len(),
        scores.len().div_ceil(ROW_GROUP),
        "a maximum for each group"
    );
    by_tier!(
        cpu,
        scalar::group_maxima,
        vector::group_maxima,
        (scores: &[f32], out: &mut [f32])
    )
}

/// The `k`-th largest of `values` (`[n]` f32, none of them NaN): the largest number that at least `k` of them reach.
/// −∞ where there are fewer.
pub fn kth_largest(cpu: Cpu, values: &[f32], k: usize) -> f32 {
    by_tier!(
        cpu,
        scalar::kth_largest,
        vector::kth_largest,
        (values: &[f32], k: usize) -> f32
    )
}

/// Appends to `ids` the numbers, counted from `first`, of those of `scores` (`[n]` f32) that are at least `threshold`,
/// ascending; `maxima` (`[⌈n / 16⌉]` f32) are the scores' as [`group_maxima`] gives them. NaN reaches no threshold.
/// Allocates nothing where `ids` has room.
///
/// # Panics
/// When `maxima` has another length.
pub fn collect(scores: &[f32], maxima: &[f32], threshold: f32, first: usize, ids: &mut Vec<u32>) {
    assert_eq!(
        maxima.len(),
        scores.len().div_ceil(ROW_GROUP),
        "a maximum for each group"
    );
    for (group, (scores, &most)) in scores.chunks(ROW_GROUP).zip(maxima).enumerate() {
        if most >= threshold {
            let first = first + group * ROW_GROUP;
            let reached = |(lane, &score): (usize, &f32)| {
                (score >= threshold).then_some((first + lane) as u32)
            };
            ids.extend(scores.iter().enumerate().filter_map(reached));
        }
    }
}

/// Writes row `ids[j]` of `m` (`[n_rows, n_cols]`, [`Layout::Rows`]) times `x` (`[n_cols]`) to `out[j]` (overwritten).
/// The bits are those of [`crate::gemm::gemv`] over the same rows interleaved.
///
/// # Panics
/// When `m` is interleaved, an id has no row, or lengths differ.
pub fn candidate_logits(cpu: Cpu, m: MatrixRef<'_>, x: ActRef<'_>, ids: &[u32], out: &mut [f32]) {
    assert_eq!(ids.len(), out.len(), "one output for each id");
    row_products(cpu, rows_of(&m), x, ids, out);
}

/// Writes rows `rows` of `m` ([`Layout::Rows`]) times rows `0..n_tokens` of `x` to `out` (`[n_tokens, rows.len()]`,
/// overwritten): as [`candidate_logits`] of all of them, each row read once.
///
/// # Panics
/// As [`candidate_logits`].
pub fn all_logits(
    cpu: Cpu,
    m: MatrixRef<'_>,
    x: &ActBatch,
    n_tokens: usize,
    rows: Range<usize>,
    mut out: StridedOut<'_>,
) {
    assert!(
        out.n_tokens() == n_tokens && out.n_rows() == rows.len(),
        "output fits"
    );
    let matrix = rows_of(&m);
    let mut ids = [0u32; ROW_GROUP];
    for first in rows.clone().step_by(ROW_GROUP) {
        let n = ROW_GROUP.min(rows.end - first);
        for (lane, id) in ids[..n].iter_mut().enumerate() {
            *id = (first + lane) as u32;
        }
        let columns = first - rows.start..first - rows.start + n;
        for token in 0..n_tokens {
            let out = &mut out.row(token)[columns.clone()];
            row_products(cpu, matrix, x.token(token), &ids[..n], out);
        }
    }
}

fn rows_of<'a>(m: &MatrixRef<'a>) -> NeuronRows<'a> {
    assert_eq!(m.shape.layout, Layout::Rows, "rows lie one by one");
    NeuronRows {
        quant: m.shape.quant,
        n_embd: m.shape.n_cols,
        n_neurons: m.shape.n_rows,
        stride_bytes: m.shape.row_bytes(),
        offset_bytes: 0,
        bytes: m.bytes,
    }
}
