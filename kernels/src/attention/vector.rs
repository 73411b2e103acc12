//! Attention over vectors of 16 lanes, equal to `scalar` bit by bit.
//!
//! *Rows* are query heads of tokens, token after token. A tile of up to 6 rows (3 where registers
//! are few) reads each key and value once, in registers, for all its rows. Positions that not all
//! rows of a tile see (the triangle below the diagonal, the edge of a window) are done row by row,
//! in the same ascending order.

use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr::addr_of_mut;

use super::scalar::join_factors;
use super::{CHUNK_POSITIONS, HEAD_DIM_MAX, KvHead, KvType, Queries, state_len};
use crate::elementwise::vector::{exp, store_up_to};
use crate::simd::{F32x16, LANES};

/// Most rows of a tile.
const ROWS_MAX: usize = 6;
/// Positions whose scores are finished together.
const SCORES: usize = 8;
/// Positions after which weighted sums go back to memory, so that the values of these positions
/// stay in the first cache for the next dimensions.
const VALUES: usize = 64;

/// How far ahead of their use rows are asked for.
const AHEAD_BYTES: usize = 2048;

/// Scratch of a tile. All of it is written before it is read.
#[repr(C, align(64))]
struct Tile {
    /// `[rows, HEAD_DIM_MAX]` scaled queries, padded with zeros to whole vectors.
    queries: [f32; ROWS_MAX * HEAD_DIM_MAX],
    /// `[rows, CHUNK_POSITIONS]` scores, then weights; 0 around the visible positions.
    weights: [f32; ROWS_MAX * CHUNK_POSITIONS],
    /// `[rows, HEAD_DIM_MAX + LANES]` states of rows that hold earlier chunks.
    states: [f32; ROWS_MAX * (HEAD_DIM_MAX + LANES)],
}

/// Rows of keys or of values, from the chunk's first position on.
#[derive(Clone, Copy)]
struct Cached<const F16: bool> {
    start: *const u8,
    head_dim: usize,
}

impl<const F16: bool> Cached<F16> {
    /// The row of position `p`.
    ///
    /// # Safety
    /// The position is cached.
    #[inline(always)]
    unsafe fn row(self, p: usize) -> *const u8 {
        let value_bytes = if F16 { 2 } else { 4 };
        // SAFETY: the row lies within the cache, by the contract.
        unsafe { self.start.add(p * self.head_dim * value_bytes) }
    }

    /// Asks for a row that comes some time after `row`.
    #[inline(always)]
    fn prefetch<V: F32x16>(self, row: *const u8) {
        let row_bytes = self.head_dim * if F16 { 2 } else { 4 };
        for line in (0..row_bytes).step_by(64) {
            V::prefetch(row.wrapping_add(AHEAD_BYTES + line));
        }
    }
}

/// Values `d` … `d + 15` of a row.
///
/// # Safety
/// The machine has V's instructions; the row has that many values.
#[inline(always)]
unsafe fn load<V: F32x16, const F16: bool>(row: *const u8, d: usize) -> V {
    // SAFETY: the values are readable, by the contract.
    unsafe {
        if F16 {
            V::load_f16(row.cast::<u16>().add(d))
        } else {
            V::load(row.cast::<f32>().add(d))
        }
    }
}

/// Values `d` … `d + n − 1` of a row, n < 16, then zeros.
///
/// # Safety
/// The machine has V's instructions; the row has that many values.
#[inline(always)]
unsafe fn load_first<V: F32x16, const F16: bool>(row: *const u8, d: usize, n: usize) -> V {
    // SAFETY: the values are readable, by the contract.
    unsafe {
        if F16 {
            V::load_f16_first(row.cast::<u16>().add(d), n)
        } else {
            V::load_first(row.cast::<f32>().add(d), n)
        }
    }
}

/// See [`super::attend_chunk`].
///
/// # Safety
/// The machine has V's instructions; lengths fit, all visible positions are cached.
#[inline(always)]
pub(super) unsafe fn attend_chunk<V: F32x16>(
    kv: KvHead<'_>,
    queries: Queries<'_>,
    chunk: usize,
    scale: f32,
    states: &mut [f32],
) {
    // SAFETY: the contract is the same.
    unsafe {
        match kv.kv_type {
            KvType::F16 => all_rows::<V, true>(kv, queries, chunk, scale, states),
            KvType::F32 => all_rows::<V, false>(kv, queries, chunk, scale, states),
        }
    }
}

/// Divides the rows into tiles of about equal size.
///
/// # Safety
/// As [`attend_chunk`]; `F16` is the type of the cache.
#[inline(always)]
unsafe fn all_rows<V: F32x16, const F16: bool>(
    kv: KvHead<'_>,
    queries: Queries<'_>,
    chunk: usize,
    scale: f32,
    states: &mut [f32],
) {
    let row_bytes = kv.kv_type.row_bytes(kv.head_dim);
    let start = chunk * CHUNK_POSITIONS * row_bytes;
    let work = Work::<F16> {
        k: Cached {
            start: kv.k.as_ptr().wrapping_add(start),
            head_dim: kv.head_dim,
        },
        v: Cached {
            start: kv.v.as_ptr().wrapping_add(start),
            head_dim: kv.head_dim,
        },
        queries,
        chunk,
        scale,
    };
    let mut scratch = MaybeUninit::<Tile>::uninit();
    let tile = scratch.as_mut_ptr();
    let n_rows = queries.n_tokens * queries.n_heads;
    let rows_max = if V::WIDE { ROWS_MAX } else { ROWS_MAX / 2 };
    let mut row = 0;
    while row < n_rows {
        let left = n_rows - row;
        let rows = left.div_ceil(left.div_ceil(rows_max));
        let states = states[row * state_len(kv.head_dim)..].as_mut_ptr();
        // SAFETY: the contract is the same; `rows` states lie behind the pointer.
        unsafe {
            match rows {
                1 => work.tile::<V, 1>(row, states, tile),
                2 => work.tile::<V, 2>(row, states, tile),
                3 => work.tile::<V, 3>(row, states, tile),
                4 => work.tile::<V, 4>(row, states, tile),
                5 => work.tile::<V, 5>(row, states, tile),
                _ => work.tile::<V, 6>(row, states, tile),
            }
        }
        row += rows;
    }
}

/// One call's arguments.
#[derive(Clone, Copy)]
struct Work<'a, const F16: bool> {
    k: Cached<F16>,
    v: Cached<F16>,
    queries: Queries<'a>,
    chunk: usize,
    scale: f32,
}

impl<const F16: bool> Work<'_, F16> {
    /// Rows `row` … `row + R − 1`, whose states lie behind `states`.
    ///
    /// # Safety
    /// As [`attend_chunk`]; the rows and their states exist.
    #[inline(always)]
    unsafe fn tile<V: F32x16, const R: usize>(
        &self,
        row: usize,
        states: *mut f32,
        tile: *mut Tile,
    ) {
        let (head_dim, n_heads) = (self.k.head_dim, self.queries.n_heads);
        let len = state_len(head_dim);
        let mut spans: [Range<usize>; R] = [const { 0..0 }; R];
        for i in 0..R {
            spans[i] = self.queries.visible_in(self.chunk, (row + i) / n_heads);
        }
        let common = common_span(&spans);
        // SAFETY: all pointers stay within the tile's arrays, the rows' states and the visible
        // positions; what is read of the tile was written before.
        unsafe {
            let weights = addr_of_mut!((*tile).weights).cast::<f32>();
            let queries = addr_of_mut!((*tile).queries).cast::<f32>();
            let spare = addr_of_mut!((*tile).states).cast::<f32>();
            self.scale_queries::<V>(row, R, queries);
            scores::<V, F16, R>(self.k, queries, common.clone(), weights);
            let mut parts = [spare; R];
            for i in 0..R {
                let weights = weights.add(i * CHUNK_POSITIONS);
                let query = queries.add(i * HEAD_DIM_MAX);
                let span = spans[i].clone();
                let (before, after) = around(&span, &common);
                scores::<V, F16, 1>(self.k, query, before.clone(), weights);
                scores::<V, F16, 1>(self.k, query, after, weights);
                let state = states.add(i * len);
                let empty = state.add(len - LANES + 1).read() == 0.0;
                parts[i] = if empty && !span.is_empty() {
                    state
                } else {
                    spare.add(i * len)
                };
                softmax::<V>(span, weights, parts[i].add(len - LANES));
                std::slice::from_raw_parts_mut(parts[i], len - LANES).fill(0.0);
                weigh::<V, F16, 1>(self.v, weights, before, [parts[i]]);
            }
            weigh::<V, F16, R>(self.v, weights, common.clone(), parts);
            for i in 0..R {
                let (_, after) = around(&spans[i], &common);
                weigh::<V, F16, 1>(self.v, weights.add(i * CHUNK_POSITIONS), after, [parts[i]]);
                let state = states.add(i * len);
                if parts[i] != state && !spans[i].is_empty() {
                    join_one::<V>(len, state, parts[i]);
                }
            }
        }
    }

    /// Writes the queries of the rows times the scale, padded with zeros.
    ///
    /// # Safety
    /// The machine has V's instructions; the rows exist; `to` has room for them.
    #[inline(always)]
    unsafe fn scale_queries<V: F32x16>(&self, row: usize, n_rows: usize, to: *mut f32) {
        let (head_dim, n_heads) = (self.k.head_dim, self.queries.n_heads);
        for i in 0..n_rows {
            let (token, head) = ((row + i) / n_heads, (row + i) % n_heads);
            let query = &self.queries.values[token * self.queries.stride + head * head_dim..];
            for d in (0..head_dim).step_by(LANES) {
                // SAFETY: a query has head_dim values, its place HEAD_DIM_MAX.
                unsafe {
                    let v: V =
                        crate::elementwise::vector::load_up_to(query.as_ptr().add(d), head_dim - d);
                    v.mul(V::splat(self.scale))
                        .store(to.add(i * HEAD_DIM_MAX + d));
                }
            }
        }
    }
}

/// Positions that all rows see; empty where it is not worth a tile.
#[inline(always)]
fn common_span<const R: usize>(spans: &[Range<usize>; R]) -> Range<usize> {
    let mut common = spans[0].clone();
    for span in &spans[1..] {
        common = common.start.max(span.start)..common.end.min(span.end);
    }
    if common.is_empty() {
        spans[0].start..spans[0].start
    } else {
        common
    }
}

/// What a row sees before and after the common span, which it contains or which is empty.
#[inline(always)]
fn around(span: &Range<usize>, common: &Range<usize>) -> (Range<usize>, Range<usize>) {
    if common.is_empty() {
        (0..0, span.clone())
    } else {
        (span.start..common.start, common.end..span.end)
    }
}

/// Writes the dot products of R rows with the keys of `span` to `to`, `[R, CHUNK_POSITIONS]`.
///
/// # Safety
/// The machine has V's instructions; `queries` is `[R, HEAD_DIM_MAX]`; the positions are cached.
#[inline(always)]
unsafe fn scores<V: F32x16, const F16: bool, const R: usize>(
    k: Cached<F16>,
    queries: *const f32,
    span: Range<usize>,
    to: *mut f32,
) {
    let mut p = span.start;
    while p < span.end {
        let n = SCORES.min(span.end - p);
        // SAFETY: rows of positions in the span; where fewer than 8 are left the last one is read
        // again, and the results go through a buffer.
        unsafe {
            let mut rows = [k.start; SCORES];
            for i in 0..SCORES {
                rows[i] = k.row(p + i.min(n - 1));
                k.prefetch::<V>(rows[i]);
            }
            let halves = if V::WIDE {
                dots::<V, F16, R, 4>(rows, k.head_dim, queries)
            } else {
                dots::<V, F16, R, 2>(rows, k.head_dim, queries)
            };
            for r in 0..R {
                let to = to.add(r * CHUNK_POSITIONS + p);
                if n == SCORES {
                    V::store_sums(halves[r], to);
                } else {
                    let mut sums = [0.0; SCORES];
                    V::store_sums(halves[r], sums.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(sums.as_ptr(), to, n);
                }
            }
        }
        p += n;
    }
}

/// Folded products of R queries with 8 keys, P keys at a time.
///
/// # Safety
/// The machine has V's instructions; `rows` are keys of `head_dim` values, `queries` is
/// `[R, HEAD_DIM_MAX]`.
#[inline(always)]
unsafe fn dots<V: F32x16, const F16: bool, const R: usize, const P: usize>(
    rows: [*const u8; SCORES],
    head_dim: usize,
    queries: *const f32,
) -> [[V::Half; SCORES]; R] {
    // SAFETY: d + 16 ≤ head_dim in the loop, then a tail of fewer values.
    unsafe {
        let zero = V::splat(0.0);
        let mut halves = [[zero.fold(); SCORES]; R];
        let whole = head_dim - head_dim % LANES;
        for first in (0..SCORES).step_by(P) {
            let mut lanes = [[zero; P]; R];
            let mut d = 0;
            while d < whole {
                let mut keys = [zero; P];
                for i in 0..P {
                    keys[i] = load::<V, F16>(rows[first + i], d);
                }
                add_products(&mut lanes, keys, queries.add(d));
                d += LANES;
            }
            if whole < head_dim {
                let mut keys = [zero; P];
                for i in 0..P {
                    keys[i] = load_first::<V, F16>(rows[first + i], d, head_dim - whole);
                }
                add_products(&mut lanes, keys, queries.add(d));
            }
            for r in 0..R {
                for i in 0..P {
                    halves[r][first + i] = lanes[r][i].fold();
                }
            }
        }
        halves
    }
}

/// lanes\[r\]\[i\] += query r · keys\[i\].
///
/// # Safety
/// The machine has V's instructions; 16 values can be read from `queries` at each of R rows.
#[inline(always)]
unsafe fn add_products<V: F32x16, const R: usize, const P: usize>(
    lanes: &mut [[V; P]; R],
    keys: [V; P],
    queries: *const f32,
) {
    for r in 0..R {
        // SAFETY: the row is readable, by the contract.
        let query = unsafe { V::load(queries.add(r * HEAD_DIM_MAX)) };
        for i in 0..P {
            lanes[r][i] = query.fma(keys[i], lanes[r][i]);
        }
    }
}

/// Turns the scores of `span` into weights; writes maximum and sum to `max_sum`.
///
/// # Safety
/// The machine has V's instructions; `weights` is `[CHUNK_POSITIONS]`, `max_sum` `[2]`.
#[inline(always)]
unsafe fn softmax<V: F32x16>(span: Range<usize>, weights: *mut f32, max_sum: *mut f32) {
    let (start, end) = (
        span.start - span.start % LANES,
        span.end.next_multiple_of(LANES),
    );
    // SAFETY: start and end are multiples of 16 up to CHUNK_POSITIONS.
    unsafe {
        // −∞ around the span changes no maximum, and its weight 0 no sum
        for p in (start..span.start).chain(span.end..end) {
            weights.add(p).write(f32::NEG_INFINITY);
        }
        let mut lanes = V::splat(f32::NEG_INFINITY);
        for p in (start..end).step_by(LANES) {
            lanes = V::load(weights.add(p)).max(lanes);
        }
        let max = lanes.max_lane();
        let mut sum = V::splat(0.0);
        for p in (start..end).step_by(LANES) {
            let e = exp(V::load(weights.add(p)).sub(V::splat(max)));
            e.store(weights.add(p));
            sum = sum.add(e);
        }
        max_sum.write(max);
        max_sum.add(1).write(sum.sum());
    }
}

/// Adds weight · value over the positions of `span` to R sums, `[head_dim]` padded to 16.
///
/// # Safety
/// The machine has V's instructions; `weights` is `[R, CHUNK_POSITIONS]`; the positions are cached.
#[inline(always)]
unsafe fn weigh<V: F32x16, const F16: bool, const R: usize>(
    v: Cached<F16>,
    weights: *const f32,
    span: Range<usize>,
    sums: [*mut f32; R],
) {
    let whole = v.head_dim - v.head_dim % LANES;
    let mut from = span.start;
    while from < span.end {
        let part = from..span.end.min(from + VALUES);
        from = part.end;
        let mut d = 0;
        // SAFETY: dimensions and positions are in bounds, by the contract.
        unsafe {
            if V::WIDE {
                while d + 4 * LANES <= whole {
                    weigh_dims::<V, F16, R, 4>(v, weights, part.clone(), sums, d, LANES);
                    d += 4 * LANES;
                }
            }
            while d + 2 * LANES <= whole {
                weigh_dims::<V, F16, R, 2>(v, weights, part.clone(), sums, d, LANES);
                d += 2 * LANES;
            }
            if d < whole {
                weigh_dims::<V, F16, R, 1>(v, weights, part.clone(), sums, d, LANES);
                d += LANES;
            }
            if d < v.head_dim {
                weigh_dims::<V, F16, R, 1>(v, weights, part, sums, d, v.head_dim - d);
            }
        }
    }
}

/// [`weigh`] for D vectors of dimensions from `d` on; only `n` of the last vector are cached.
///
/// # Safety
/// As [`weigh`]; the dimensions exist.
#[inline(always)]
unsafe fn weigh_dims<V: F32x16, const F16: bool, const R: usize, const D: usize>(
    v: Cached<F16>,
    weights: *const f32,
    span: Range<usize>,
    sums: [*mut f32; R],
    d: usize,
    n: usize,
) {
    // SAFETY: the sums are padded to whole vectors; the rest is the contract.
    unsafe {
        let zero = V::splat(0.0);
        let mut acc = [[zero; D]; R];
        for r in 0..R {
            for j in 0..D {
                acc[r][j] = V::load(sums[r].add(d + j * LANES));
            }
        }
        for p in span {
            let row = v.row(p);
            if d == 0 {
                v.prefetch::<V>(row);
            }
            let mut values = [zero; D];
            for j in 0..D {
                values[j] = if n == LANES {
                    load::<V, F16>(row, d + j * LANES)
                } else {
                    load_first::<V, F16>(row, d, n)
                };
            }
            for r in 0..R {
                let weight = V::splat(weights.add(r * CHUNK_POSITIONS + p).read());
                for j in 0..D {
                    acc[r][j] = values[j].fma(weight, acc[r][j]);
                }
            }
        }
        for r in 0..R {
            for j in 0..D {
                acc[r][j].store(sums[r].add(d + j * LANES));
            }
        }
    }
}

/// Joins the state `part` of a later chunk into `state`, both of `len` values.
///
/// # Safety
/// The machine has V's instructions; neither is empty.
#[inline(always)]
unsafe fn join_one<V: F32x16>(len: usize, state: *mut f32, part: *const f32) {
    let at = len - LANES;
    // SAFETY: both have `len` values.
    unsafe {
        let (old, new, max) = join_factors(state.add(at).read(), part.add(at).read());
        for d in (0..at).step_by(LANES) {
            let kept = V::load(state.add(d)).mul(V::splat(old));
            V::load(part.add(d))
                .fma(V::splat(new), kept)
                .store(state.add(d));
        }
        let (sum, part_sum) = (state.add(at + 1).read(), part.add(at + 1).read());
        state.add(at).write(max);
        state.add(at + 1).write(part_sum.mul_add(new, sum * old));
    }
}

/// See `scalar::join`.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn join<V: F32x16>(head_dim: usize, states: &mut [f32], chunk: &[f32]) {
    let (len, at) = (state_len(head_dim), head_dim.next_multiple_of(LANES));
    for (state, part) in states.chunks_exact_mut(len).zip(chunk.chunks_exact(len)) {
        if state[at + 1] == 0.0 {
            state.copy_from_slice(part);
        } else if part[at + 1] != 0.0 {
            // SAFETY: both have `len` values and are not empty.
            unsafe { join_one::<V>(len, state.as_mut_ptr(), part.as_ptr()) }
        }
    }
}

/// See [`super::finish`].
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn finish<V: F32x16>(head_dim: usize, states: &[f32], out: &mut [f32]) {
    let (len, at) = (state_len(head_dim), head_dim.next_multiple_of(LANES));
    for (state, out) in states.chunks_exact(len).zip(out.chunks_exact_mut(head_dim)) {
        for d in (0..head_dim).step_by(LANES) {
            // SAFETY: a state is padded to whole vectors; `head_dim - d` values are left of `out`.
            unsafe {
                let sum = V::splat(state[at + 1]);
                let v = V::load(state.as_ptr().add(d)).div(sum);
                store_up_to(v, out.as_mut_ptr().add(d), head_dim - d);
            }
        }
    }
}
