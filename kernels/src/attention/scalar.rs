//! The specification: one query head, one position, one value at a time.

use half::f16;

use super::{CHUNK_POSITIONS, HEAD_DIM_MAX, KvHead, KvType, Queries, state_len};
use crate::elementwise::scalar::{dot, exp, join_lanes, larger};
use crate::simd::LANES;

/// Value `index` of cached values.
fn read(kv_type: KvType, bytes: &[u8], index: usize) -> f32 {
    let at = index * kv_type.value_bytes();
    match kv_type {
        KvType::F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
        KvType::F32 => f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap_or_default()),
    }
}

/// Maximum score, sum of weights and weighted sum of one query head in one chunk.
struct Partial {
    max: f32,
    sum: f32,
    acc: [f32; HEAD_DIM_MAX],
}

/// See [`super::attend_chunk`].
pub(super) fn attend_chunk(
    kv: KvHead<'_>,
    queries: Queries<'_>,
    chunk: usize,
    scale: f32,
    states: &mut [f32],
) {
    let head_dim = kv.head_dim;
    for (i, state) in states.chunks_exact_mut(state_len(head_dim)).enumerate() {
        let (token, head) = (i / queries.n_heads, i % queries.n_heads);
        let visible = queries.visible_in(chunk, token);
        if visible.is_empty() {
            continue;
        }
        let query = &queries.values[token * queries.stride + head * head_dim..][..head_dim];
        let partial = attend_one(kv, query, scale, chunk * CHUNK_POSITIONS, visible);
        let at = head_dim.next_multiple_of(LANES);
        if state[at + 1] == 0.0 {
            state[..head_dim].copy_from_slice(&partial.acc[..head_dim]);
            [state[at], state[at + 1]] = [partial.max, partial.sum];
        } else {
            join_one(state, &partial.acc[..head_dim], partial.max, partial.sum);
        }
    }
}

/// One query head over positions `start + visible`.
fn attend_one(
    kv: KvHead<'_>,
    query: &[f32],
    scale: f32,
    start: usize,
    visible: std::ops::Range<usize>,
) -> Partial {
    let head_dim = kv.head_dim;
    let mut scaled = [0.0; HEAD_DIM_MAX];
    for d in 0..head_dim {
        scaled[d] = query[d] * scale;
    }
    let mut key = [0.0; HEAD_DIM_MAX];
    let mut weights = [0.0; CHUNK_POSITIONS];
    let mut max_lanes = [f32::NEG_INFINITY; LANES];
    for p in visible.clone() {
        for d in 0..head_dim {
            key[d] = read(kv.kv_type, kv.k, (start + p) * head_dim + d);
        }
        weights[p] = dot(&scaled[..head_dim], &key[..head_dim]);
        max_lanes[p % LANES] = larger(weights[p], max_lanes[p % LANES]);
    }
    let max = join_lanes(max_lanes, larger);
    let mut sum_lanes = [0.0; LANES];
    for p in visible.clone() {
        weights[p] = exp(weights[p] - max);
        sum_lanes[p % LANES] += weights[p];
    }
    let sum = join_lanes(sum_lanes, |a, b| a + b);
    let mut acc = [0.0f32; HEAD_DIM_MAX];
    for p in visible {
        for d in 0..head_dim {
            let value = read(kv.kv_type, kv.v, (start + p) * head_dim + d);
            acc[d] = value.mul_add(weights[p], acc[d]);
        }
    }
    Partial { max, sum, acc }
}

/// Factors of two parts with maxima `a` and `b` when they are joined, and the joint maximum.
pub(super) fn join_factors(a: f32, b: f32) -> (f32, f32, f32) {
    let max = larger(a, b);
    (exp(a - max), exp(b - max), max)
}

/// Joins a later part into a state; neither is empty.
fn join_one(state: &mut [f32], acc: &[f32], part_max: f32, part_sum: f32) {
    let at = state.len() - LANES;
    let (old, new, max) = join_factors(state[at], part_max);
    for d in 0..acc.len() {
        state[d] = acc[d].mul_add(new, state[d] * old);
    }
    state[at] = max;
    state[at + 1] = part_sum.mul_add(new, state[at + 1] * old);
}

/// Joins the states of a later chunk, `[n, state_len(head_dim)]`, into `states`. A state whose sum
/// of weights is 0 is empty.
pub(super) fn join(head_dim: usize, states: &mut [f32], chunk: &[f32]) {
    let (len, at) = (state_len(head_dim), head_dim.next_multiple_of(LANES));
    for (state, part) in states.chunks_exact_mut(len).zip(chunk.chunks_exact(len)) {
        if state[at + 1] == 0.0 {
            state.copy_from_slice(part);
        } else if part[at + 1] != 0.0 {
            join_one(state, &part[..head_dim], part[at], part[at + 1]);
        }
    }
}

/// See [`super::finish`].
pub(super) fn finish(head_dim: usize, states: &[f32], out: &mut [f32]) {
    let (len, at) = (state_len(head_dim), head_dim.next_multiple_of(LANES));
    for (state, out) in states.chunks_exact(len).zip(out.chunks_exact_mut(head_dim)) {
        for d in 0..head_dim {
            out[d] = state[d] / state[at + 1];
        }
    }
}
