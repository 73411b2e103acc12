//! `down` of `Q4_0` rows with 8-bit activations: some neurons' products summed as integers.
//!
//! Within a group, neurons whose ids have the same `id / 16` are taken together. For each block b of
//! 32 columns, with d the rows' scales and q their nibbles: `s[n] = a[n] · d[n, b]`, `amax` the
//! largest of their magnitudes, `S[n] = round_half_even(s[n] · 127 / amax)`, and
//! `y[c] += Σ S[n] · (q[n, c] − 8) · (amax / 127)`, the sum as an integer, the last product by one
//! `fma`. A closed neuron changes none of these.

use std::ops::Range;

use super::super::NeuronRows;
use super::GroupSpan;
use crate::matrix::ROW_GROUP;
use crate::quant::{BLOCK, DecodedBlock};

/// Neurons whose scaled activations are rounded together.
pub(super) const ROUNDED: usize = ROW_GROUP;

/// The runs of a list of ascending ids that are rounded together.
pub(super) fn runs(ids: &[u32], span: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut next = span.start;
    std::iter::from_fn(move || {
        if next == span.end {
            return None;
        }
        let (start, run) = (next, ids[next] as usize / ROUNDED);
        while next < span.end && ids[next] as usize / ROUNDED == run {
            next += 1;
        }
        Some(start..next)
    })
}

/// The runs of all neurons of `span`.
#[cfg(target_arch = "x86_64")]
pub(super) fn whole_runs(span: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let mut next = span.start;
    std::iter::from_fn(move || {
        let start = next;
        next = (start / ROUNDED * ROUNDED + ROUNDED).min(span.end);
        (start < span.end).then_some(start..next)
    })
}

/// Neurons whose rows are asked for ahead, at least: where few are active, a run has one or two.
const AHEAD: usize = 12;

/// Places of a list of `n` whose rows to ask for before `run` is added, where the first `asked` have been.
pub(super) fn to_ask(run: &Range<usize>, asked: &mut usize, n: usize) -> Range<usize> {
    let from = (*asked).max(run.start);
    *asked = (run.end + run.len().max(AHEAD)).min(n);
    from..*asked
}

/// The specification: adds the neurons of `span` to `y`, columns `cols`.
pub(super) fn add_group(
    down: &NeuronRows<'_>,
    ids: &[u32],
    a: &[f32],
    span: &GroupSpan,
    cols: Range<usize>,
    y: &mut [f32],
) {
    for run in runs(ids, span.span.clone()) {
        for (block, y) in (cols.start / BLOCK..).zip(y.chunks_exact_mut(BLOCK)) {
            let decoded: Vec<DecodedBlock> = run
                .clone()
                .map(|j| decoded_block(down, ids[j] as usize, block))
                .collect();
            let s: Vec<f32> = (run.clone().zip(&decoded))
                .map(|(j, w)| a[j] * w.d)
                .collect();
            let amax = s.iter().fold(0.0f32, |max, s| s.abs().max(max));
            let finite = s.iter().all(|s| s.is_finite());
            let scale = if finite { amax / 127.0 } else { f32::NAN };
            let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
            let inverse = if finite && inverse.is_finite() {
                inverse
            } else {
                0.0
            };
            for (c, y) in y.iter_mut().enumerate() {
                let product = |(s, w): (&f32, &DecodedBlock)| {
                    let rounded = if finite {
                        (s * inverse).round_ties_even() as i32
                    } else {
                        0
                    };
                    rounded * w.q[c]
                };
                let total: i32 = s.iter().zip(&decoded).map(product).sum();
                *y = (total as f32).mul_add(scale, *y);
            }
        }
    }
}

fn decoded_block(down: &NeuronRows<'_>, neuron: usize, block: usize) -> DecodedBlock {
    let mut decoded = None;
    down.matrix(neuron).each_block(0, |at, bytes| {
        if at == block {
            decoded = Some(DecodedBlock::read(down.quant, bytes));
        }
    });
    decoded.expect("the block is in the row")
}

#[cfg(target_arch = "x86_64")]
pub(super) mod x86 {
    use std::arch::x86_64::*;
    use std::mem::MaybeUninit;
    use std::ops::Range;

    use super::super::super::tree::SUBTREES_MAX;
    use super::super::DownScratch;
    use super::super::strips::{STRIP, strips, sum_groups};
    use super::super::x86::{Active, Batch, TOKENS_ROUNDED};
    use super::{ROUNDED, runs, to_ask, whole_runs};
    use crate::dot::row::{self, RowPlanes};
    use crate::matrix::StridedOut;
    use crate::quant::{BLOCK, QuantType};

    const PAIRS: usize = ROUNDED / 2;

    /// Rounded activations of up to [`ROUNDED`] neurons for a strip of columns.
    #[derive(Default)]
    struct Rounded {
        /// Pairs of 8-bit values of two neurons, twice in a dword, `[pair][block]`.
        pairs: [[u32; STRIP]; PAIRS],
        /// −8 · Σ S in 16 bits, twice in a dword.
        offsets: [u32; STRIP],
        scales: [f32; STRIP],
    }

    /// The list's neurons, columns in strips of nearly equal size.
    ///
    /// # Safety
    /// The machine has AVX2, FMA and F16C; shapes were checked by the caller; rows are `Q4_0`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) unsafe fn active(
        list: Active<'_>,
        cols: Range<usize>,
        sums: &mut [&mut [f32]],
    ) {
        for blocks in strips(&cols, STRIP) {
            let at = blocks.start * BLOCK - cols.start;
            // SAFETY: this function's contract; the strip's blocks are in the row.
            unsafe { strip(list, blocks, at, sums) };
        }
    }

    /// # Safety
    /// As [`active`]; the blocks (at most [`STRIP`]) are in the rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn strip(list: Active<'_>, blocks: Range<usize>, at: usize, sums: &mut [&mut [f32]]) {
        let down = &list.down;
        let n_blocks = down.n_embd / BLOCK;
        let planes = |j: usize| {
            let row = down.row(list.ids[j] as usize).as_ptr();
            // SAFETY: the row is whole.
            unsafe { RowPlanes::new(QuantType::Q4_0, row, n_blocks) }
        };
        let width = blocks.len() * BLOCK;
        let mut rounded = Rounded::default();
        let mut done = [[0.0f32; STRIP * BLOCK]; SUBTREES_MAX + 1];
        let flat = done.as_flattened_mut();
        let mut asked = 0;
        sum_groups(list.groups, flat, STRIP * BLOCK, width, |span, y| {
            for run in runs(list.ids, span.clone()) {
                for j in to_ask(&run, &mut asked, list.ids.len()) {
                    planes(j).prefetch(QuantType::Q4_0, blocks.clone());
                }
                let mut rows = [RowPlanes::none(); ROUNDED];
                for (row, j) in rows.iter_mut().zip(run.clone()) {
                    *row = planes(j);
                }
                let rows = &rows[..run.len()];
                // SAFETY: this function's contract.
                unsafe {
                    add_run(
                        rows,
                        &list.a[run],
                        n_blocks,
                        blocks.clone(),
                        &mut rounded,
                        y,
                    );
                };
            }
        });
        for (sum, y) in sums.iter_mut().zip(&done) {
            sum[at..at + width].copy_from_slice(&y[..width]);
        }
    }

    /// Up to [`TOKENS_ROUNDED`] tokens, all columns.
    ///
    /// # Safety
    /// As [`active`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in super::super) unsafe fn tokens(
        batch: &Batch<'_>,
        cols: Range<usize>,
        scratch: &mut DownScratch,
        sums: &mut [StridedOut<'_>],
    ) {
        let down = &batch.down;
        let n_blocks = down.n_embd / BLOCK;
        let n_tokens = batch.tokens.len();
        let size = TOKENS_ROUNDED * STRIP * BLOCK;
        let mut rounded = Rounded::default();
        for blocks in strips(&cols, STRIP) {
            let width = blocks.len() * BLOCK;
            let done = &mut scratch.sums;
            sum_groups(batch.groups, done, size, n_tokens * width, |span, y| {
                for run in whole_runs(span.clone()) {
                    for (t, y) in y.chunks_exact_mut(width).enumerate() {
                        let a = &batch.act[t * batch.stride..][run.clone()];
                        let mut rows = [RowPlanes::none(); ROUNDED];
                        let mut open = [0.0f32; ROUNDED];
                        let mut n_open = 0;
                        for (neuron, &a) in run.clone().zip(a) {
                            if a != 0.0 {
                                let row = down.row(neuron).as_ptr();
                                // SAFETY: the row is whole.
                                rows[n_open] =
                                    unsafe { RowPlanes::new(QuantType::Q4_0, row, n_blocks) };
                                open[n_open] = a;
                                n_open += 1;
                            }
                        }
                        let rows = &rows[..n_open];
                        // SAFETY: this function's contract.
                        unsafe {
                            let a = &open[..n_open];
                            add_run(rows, a, n_blocks, blocks.clone(), &mut rounded, y);
                        };
                    }
                }
            });
            let at = blocks.start * BLOCK - cols.start;
            for (n, sum) in sums.iter_mut().enumerate() {
                let y = &scratch.sums[n * size..][..n_tokens * width];
                for (t, y) in batch.tokens.clone().zip(y.chunks_exact(width)) {
                    sum.row(t)[at..at + width].copy_from_slice(y);
                }
            }
        }
    }

    /// Adds neurons that are rounded together to a strip, `y` `[blocks.len() · 32]`.
    ///
    /// # Safety
    /// As [`active`]; as many whole rows of `n_blocks` blocks as activations, at most [`ROUNDED`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_run(
        rows: &[RowPlanes],
        a: &[f32],
        n_blocks: usize,
        blocks: Range<usize>,
        rounded: &mut Rounded,
        y: &mut [f32],
    ) {
        if rows.is_empty() {
            return;
        }
        // SAFETY: this function's contract; `y` holds the blocks.
        unsafe {
            if let ([row], [a]) = (rows, a) {
                return add_row(row, *a, n_blocks, blocks, y);
            }
            round(rows, a, n_blocks, blocks.start, blocks.len(), rounded);
            for (n, block) in blocks.enumerate() {
                let y = y.as_mut_ptr().add(n * BLOCK);
                add_block(rows, rounded, n, block, y);
            }
        }
    }

    /// Adds a neuron that is rounded alone: each block's `S` is 127 or −127, whose sign its scale gets, which changes no bit
    /// (no sum is ever −0); where it would be 0, the scale is 0, or NaN.
    ///
    /// # Safety
    /// As [`add_run`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_row(
        row: &RowPlanes,
        a: f32,
        n_blocks: usize,
        blocks: Range<usize>,
        y: &mut [f32],
    ) {
        let (zero, sign) = (_mm256_setzero_ps(), _mm256_set1_ps(-0.0));
        let (by, less) = (_mm256_set1_ps(127.0), _mm256_set1_ps(-1016.0));
        for first in blocks.clone().step_by(8) {
            let mut scales = [0.0f32; 8];
            // SAFETY: the row is whole.
            let v = unsafe {
                let d = row::scales_of_eight::<row::Q4_0>(row, first, n_blocks);
                _mm256_mul_ps(_mm256_set1_ps(a), d)
            };
            let amax = _mm256_max_ps(_mm256_andnot_ps(sign, v), zero);
            let Scales { scale, usable, .. } = scales_of(amax, v);
            let signed = _mm256_or_ps(scale, _mm256_and_ps(v, sign));
            let scale = _mm256_blendv_ps(_mm256_mul_ps(scale, zero), signed, usable);
            // SAFETY: eight values.
            unsafe { _mm256_storeu_ps(scales.as_mut_ptr(), scale) };
            for (block, scale) in (first..blocks.end).zip(scales) {
                let scale = _mm256_set1_ps(scale);
                let y = &mut y[(block - blocks.start) * BLOCK..][..BLOCK];
                for half in 0..2 {
                    // SAFETY: the block is in the row, and `y` holds it.
                    unsafe {
                        let eight = row.block16(block).add(8 * half);
                        let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(eight.cast()));
                        let low = _mm256_and_si256(both, _mm256_set1_epi32(0xF));
                        for (at, q) in [(0, low), (16, _mm256_srli_epi32::<4>(both))] {
                            let to = y.as_mut_ptr().add(at + 8 * half);
                            let value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(q), by, less);
                            let sum = _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(to));
                            _mm256_storeu_ps(to, sum);
                        }
                    }
                }
            }
        }
    }

    /// Of blocks that are rounded together: what rounded values are multiplied by, and 127 over the largest magnitude, 0 where
    /// that is not `usable`.
    struct Scales {
        scale: __m256,
        inverse: __m256,
        usable: __m256,
    }

    /// `amax`: the largest magnitudes; `bad`: not finite where any value is.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn scales_of(amax: __m256, bad: __m256) -> Scales {
        let of_127 = _mm256_set1_ps(127.0);
        let bad = _mm256_mul_ps(bad, _mm256_setzero_ps());
        let inverse = _mm256_div_ps(of_127, amax);
        let usable = _mm256_cmp_ps::<_CMP_LT_OQ>(inverse, _mm256_set1_ps(f32::INFINITY));
        Scales {
            scale: _mm256_add_ps(_mm256_div_ps(amax, of_127), bad),
            inverse: _mm256_and_ps(inverse, usable),
            usable,
        }
    }

    /// # Safety
    /// As [`add_run`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn round(
        rows: &[RowPlanes],
        a: &[f32],
        n_blocks: usize,
        first: usize,
        width: usize,
        out: &mut Rounded,
    ) {
        let mut s = [MaybeUninit::<[f32; STRIP]>::uninit(); ROUNDED + 1];
        for half in (0..width).step_by(8) {
            let (mut amax, mut bad) = (_mm256_setzero_ps(), _mm256_setzero_ps());
            let sign = _mm256_set1_ps(-0.0);
            for (n, (row, &a)) in rows.iter().zip(a).enumerate() {
                // SAFETY: the row is whole; `s` has 16 values a row.
                unsafe {
                    let d = row::scales_of_eight::<row::Q4_0>(row, first + half, n_blocks);
                    let v = _mm256_mul_ps(_mm256_set1_ps(a), d);
                    amax = _mm256_max_ps(_mm256_andnot_ps(sign, v), amax);
                    bad = _mm256_fmadd_ps(v, _mm256_setzero_ps(), bad);
                    _mm256_storeu_ps(s[n].as_mut_ptr().cast::<f32>().add(half), v);
                }
            }
            let Scales { scale, inverse, .. } = scales_of(amax, bad);
            let mut total = _mm256_setzero_si256();
            // SAFETY: all arrays have 16 values a row; those of the rows, and zeros behind, are set.
            unsafe {
                let behind = s[rows.len()].as_mut_ptr().cast::<f32>();
                _mm256_storeu_ps(behind.add(half), _mm256_setzero_ps());
                _mm256_storeu_ps(out.scales.as_mut_ptr().add(half), scale);
                for pair in 0..rows.len().div_ceil(2) {
                    let rounded = |n: usize| {
                        let v = _mm256_loadu_ps(s[n].as_ptr().cast::<f32>().add(half));
                        _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse))
                    };
                    let (one, two) = (rounded(2 * pair), rounded(2 * pair + 1));
                    total = _mm256_add_epi32(total, _mm256_add_epi32(one, two));
                    let byte = _mm256_set1_epi32(0xFF);
                    let two = _mm256_slli_epi32::<8>(_mm256_and_si256(two, byte));
                    let both = _mm256_or_si256(_mm256_and_si256(one, byte), two);
                    let both = _mm256_or_si256(both, _mm256_slli_epi32::<16>(both));
                    _mm256_storeu_si256(out.pairs[pair].as_mut_ptr().add(half).cast(), both);
                }
                let offset =
                    _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32::<3>(total));
                let word = _mm256_and_si256(offset, _mm256_set1_epi32(0xFFFF));
                let both = _mm256_or_si256(word, _mm256_slli_epi32::<16>(word));
                _mm256_storeu_si256(out.offsets.as_mut_ptr().add(half).cast(), both);
            }
        }
    }

    /// Adds block `block` of the rows, the `n`th of the strip, to 32 values at `y`.
    ///
    /// # Safety
    /// As [`add_run`].
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn add_block(
        rows: &[RowPlanes],
        rounded: &Rounded,
        n: usize,
        block: usize,
        y: *mut f32,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            // sums of 16 bits wrap, but the whole does not: |Σ S · (q − 8)| ≤ 16 · 127 · 8
            let offset = _mm256_set1_epi32(*rounded.offsets.get_unchecked(n) as i32);
            let (mut low, mut high) = (offset, offset);
            let nibble = _mm256_set1_epi8(0xF);
            for (pair, s) in rows.chunks(2).zip(&rounded.pairs) {
                let one = _mm_loadu_si128(pair[0].block16(block).cast());
                let two = _mm_loadu_si128(pair[pair.len() - 1].block16(block).cast());
                let both =
                    _mm256_set_m128i(_mm_unpackhi_epi8(one, two), _mm_unpacklo_epi8(one, two));
                let s = _mm256_set1_epi32(*s.get_unchecked(n) as i32);
                let first = _mm256_and_si256(both, nibble);
                let second = _mm256_and_si256(_mm256_srli_epi16::<4>(both), nibble);
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(first, s));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(second, s));
            }
            let scale = _mm256_set1_ps(*rounded.scales.get_unchecked(n));
            for (at, total) in [(0, low), (16, high)] {
                let parts = [
                    _mm256_castsi256_si128(total),
                    _mm256_extracti128_si256::<1>(total),
                ];
                for (half, part) in parts.into_iter().enumerate() {
                    let to = y.add(at + 8 * half);
                    let value = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(part));
                    _mm256_storeu_ps(to, _mm256_fmadd_ps(value, scale, _mm256_loadu_ps(to)));
                }
            }
        }
    }
}
