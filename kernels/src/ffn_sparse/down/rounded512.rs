//! [`super::rounded`] with AVX-512: of a neuron that is alone a block of columns at a time, of several four.
//!
//! The loop of [`strip`] is [`super::rounded::x86`]'s around other products.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::NeuronRows;
use super::super::tree::SUBTREES_MAX;
use super::DownScratch;
use super::rounded::{ROUNDED, runs, to_ask, whole_runs};
use super::strips::{self, strips, sum_groups};
use super::x86::{Active, Batch, TOKENS_ROUNDED};
use crate::dot::prefetch_bytes;
use crate::dot::rows512::{Chunk, vnni_fn};
use crate::matrix::StridedOut;
use crate::quant::BLOCK;

const PAIRS: usize = ROUNDED / 2;
/// Blocks of columns that are taken through all neurons together, at most: the more, the fewer and
/// longer the pieces that are read of a row.
const STRIP: usize = 32;
/// Blocks that are taken together.
const UNIT: usize = 4;
const _: () = assert!(
    STRIP.is_multiple_of(UNIT) && strips::STRIP.is_multiple_of(UNIT) && strips::STRIP <= STRIP,
    "sums of subtrees do not meet"
);
/// Neurons that are added together, of those that are rounded alone: sums stay in registers meanwhile.
const TOGETHER: usize = 4;
/// Blocks that are rounded together.
const LANES: usize = 16;
/// Blocks of a strip, to whole registers of lanes.
const ROOM: usize = STRIP.next_multiple_of(LANES);

/// Rounded activations of up to [`ROUNDED`] neurons for a strip of columns, as in
/// [`super::rounded::x86`].
struct Rounded {
    pairs: [[u32; ROOM]; PAIRS],
    offsets: [u32; ROOM],
    scales: [f32; ROOM],
}

/// Blocks `first` … `first + width - 1` of rows of `n_blocks`.
#[derive(Clone, Copy)]
struct Columns {
    n_blocks: usize,
    first: usize,
    width: usize,
}

impl Columns {
    /// Where the scales of a row's first block are.
    #[inline(always)]
    fn scales(&self, row: *const u8) -> *const u8 {
        row.wrapping_add(self.n_blocks * 16)
    }

    /// Nibbles of a row from the `n`th block on.
    #[inline(always)]
    fn nibbles(&self, row: *const u8, n: usize) -> *const u8 {
        row.wrapping_add(16 * (self.first + n))
    }

    #[inline(always)]
    fn prefetch(&self, row: *const u8) {
        prefetch_bytes(self.nibbles(row, 0), 16 * self.width);
        prefetch_bytes(
            self.scales(row).wrapping_add(2 * self.first),
            2 * self.width,
        );
    }
}

vnni_fn! {
    /// The list's neurons, columns in strips of nearly equal size.
    ///
    /// # Safety
    /// The machine has AVX-512; shapes were checked by the caller; rows are `Q4_0`.
    pub(super) fn active(list: Active<'_>, cols: Range<usize>, sums: &mut [&mut [f32]]) {
        for blocks in strips(&cols, STRIP) {
            let at = blocks.start * BLOCK - cols.start;
            strip(list, blocks, at, sums);
        }
    }
}

vnni_fn! {
    /// # Safety
    /// As [`active`]; the blocks (at most [`STRIP`]) are in the rows.
    fn strip(list: Active<'_>, blocks: Range<usize>, at: usize, sums: &mut [&mut [f32]]) {
        let down: &NeuronRows<'_> = &list.down;
        let columns = Columns {
            n_blocks: down.n_embd / BLOCK,
            first: blocks.start,
            width: blocks.len(),
        };
        let row = |j: usize| down.row(list.ids[j] as usize).as_ptr();
        let width = blocks.len().next_multiple_of(UNIT) * BLOCK;
        let mut rounded = MaybeUninit::<Rounded>::uninit();
        let mut done = [[0.0f32; STRIP * BLOCK]; SUBTREES_MAX + 1];
        let flat = done.as_flattened_mut();
        let mut asked = 0;
        let mut alone = Alone { rows: [std::ptr::null(); TOGETHER], a: [0.0; TOGETHER], n: 0 };
        sum_groups(list.groups, flat, STRIP * BLOCK, width, |span, y| {
            for run in runs(list.ids, span.clone()) {
                for j in to_ask(&run, &mut asked, list.ids.len()) {
                    columns.prefetch(row(j));
                }
                if run.len() == 1 {
                    alone.rows[alone.n] = row(run.start);
                    alone.a[alone.n] = list.a[run.start];
                    alone.n += 1;
                    if alone.n == TOGETHER {
                        // SAFETY: this function's contract; `y` holds the columns.
                        unsafe { alone.add(columns, y) };
                    }
                    continue;
                }
                let mut rows = [std::ptr::null(); ROUNDED];
                for (to, j) in rows.iter_mut().zip(run.clone()) {
                    *to = row(j);
                }
                let rows = &rows[..run.len()];
                // SAFETY: this function's contract; `y` holds whole units.
                unsafe {
                    alone.add(columns, y);
                    add_run(rows, &list.a[run], columns, &mut rounded, y);
                }
            }
            // SAFETY: as above.
            unsafe { alone.add(columns, y) };
        });
        for (sum, y) in sums.iter_mut().zip(&done) {
            sum[at..][..columns.width * BLOCK].copy_from_slice(&y[..columns.width * BLOCK]);
        }
    }
}

vnni_fn! {
    /// Up to [`TOKENS_ROUNDED`] tokens, all columns.
    ///
    /// # Safety
    /// As [`active`].
    pub(super) fn tokens(
        batch: &Batch<'_>,
        cols: Range<usize>,
        scratch: &mut DownScratch,
        sums: &mut [StridedOut<'_>],
    ) {
        let down = &batch.down;
        let n_tokens = batch.tokens.len();
        let size = TOKENS_ROUNDED * strips::STRIP * BLOCK;
        let mut rounded = MaybeUninit::<Rounded>::uninit();
        for blocks in strips::strips(&cols, strips::STRIP) {
            let columns = Columns {
                n_blocks: down.n_embd / BLOCK,
                first: blocks.start,
                width: blocks.len(),
            };
            let width = blocks.len().next_multiple_of(UNIT) * BLOCK;
            let done = &mut scratch.sums;
            sum_groups(batch.groups, done, size, n_tokens * width, |span, y| {
                for run in whole_runs(span.clone()) {
                    let first = down.row(run.start).as_ptr();
                    // those between are there too
                    let _ = down.row(run.end - 1);
                    for (t, y) in y.chunks_exact_mut(width).enumerate() {
                        let a = &batch.act[t * batch.stride..][run.clone()];
                        let there = (0xFFFF_u32 >> (ROUNDED - a.len())) as u16;
                        let all = _mm512_maskz_loadu_ps(there, a.as_ptr());
                        let mut open = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(all, _mm512_setzero_ps());
                        let mut rows = [std::ptr::null(); ROUNDED];
                        let mut of_rows = [0.0f32; ROUNDED];
                        let mut n_open = 0;
                        while open != 0 {
                            let n = open.trailing_zeros() as usize;
                            rows[n_open] = first.wrapping_add(n * down.stride_bytes);
                            of_rows[n_open] = a[n];
                            n_open += 1;
                            open &= open - 1;
                        }
                        if n_open == 0 {
                            continue;
                        }
                        let (rows, a) = (&rows[..n_open], &of_rows[..n_open]);
                        // SAFETY: this function's contract; `y` holds whole units.
                        unsafe { add_run(rows, a, columns, &mut rounded, y) };
                    }
                }
            });
            let at = blocks.start * BLOCK - cols.start;
            for (n, sum) in sums.iter_mut().enumerate() {
                let y = &scratch.sums[n * size..][..n_tokens * width];
                for (t, y) in batch.tokens.clone().zip(y.chunks_exact(width)) {
                    let y = &y[..columns.width * BLOCK];
                    sum.row(t)[at..][..y.len()].copy_from_slice(y);
                }
            }
        }
    }
}

vnni_fn! {
    /// Adds neurons that are rounded together to a strip.
    ///
    /// # Safety
    /// As [`round`]; `y` holds whole units.
    fn add_run(rows: &[*const u8], a: &[f32], columns: Columns, rounded: &mut MaybeUninit<Rounded>, y: &mut [f32]) {
        if let (&[row], &[a]) = (rows, a) {
            return add_alone([row], [a], columns, y.as_mut_ptr());
        }
        round(rows, a, columns, rounded.as_mut_ptr());
        for n in (0..columns.width).step_by(UNIT) {
            add_unit(rows, rounded.as_ptr(), n, columns, y.as_mut_ptr().add(n * BLOCK));
        }
    }
}

/// Neurons that are rounded alone and will be added next.
struct Alone {
    rows: [*const u8; TOGETHER],
    a: [f32; TOGETHER],
    n: usize,
}

impl Alone {
    vnni_fn! {
        /// Adds them, and forgets them.
        ///
        /// # Safety
        /// As [`add_alone`].
        fn add(&mut self, columns: Columns, y: &mut [f32]) {
            let (y, [r0, r1, r2, r3], [a0, a1, a2, a3]) = (y.as_mut_ptr(), self.rows, self.a);
            match self.n {
                0 => {}
                1 => add_alone([r0], [a0], columns, y),
                2 => add_alone([r0, r1], [a0, a1], columns, y),
                3 => add_alone([r0, r1, r2], [a0, a1, a2], columns, y),
                _ => add_alone([r0, r1, r2, r3], [a0, a1, a2, a3], columns, y),
            }
            self.n = 0;
        }
    }
}

vnni_fn! {
    /// Adds neurons each of which is rounded alone, in their order: each block's `S` is 127 or −127, whose sign its scale gets, which
    /// changes no bit (no sum is ever −0); where it would be 0, the scale is 0, or NaN.
    ///
    /// # Safety
    /// As [`active`]; the rows are whole, `y` has room for the columns.
    fn add_alone[const N: usize](rows: [*const u8; N], a: [f32; N], columns: Columns, y: *mut f32) {
        let table = _mm512_setr_ps(
            -1016.0, -889.0, -762.0, -635.0, -508.0, -381.0, -254.0, -127.0, 0.0, 127.0, 254.0, 381.0,
            508.0, 635.0, 762.0, 889.0,
        );
        for first in (0..columns.width).step_by(LANES) {
            let chunk = Chunk {
                first: columns.first + first,
                count: (columns.width - first).min(LANES),
                n_blocks: columns.n_blocks,
            };
            let mut scales = [[0.0f32; LANES]; N];
            for n in 0..N {
                let d = chunk.scales(columns.scales(rows[n]));
                let v = _mm512_mul_ps(_mm512_set1_ps(a[n]), _mm512_cvtph_ps(d));
                let amax = _mm512_max_ps(_mm512_abs_ps(v), _mm512_setzero_ps());
                let Scales { scale, usable, .. } = scales_of(amax, v);
                let sign = _mm512_and_ps(v, _mm512_set1_ps(-0.0));
                let unusable = _mm512_mul_ps(scale, _mm512_setzero_ps());
                let scale = _mm512_mask_or_ps(unusable, usable, scale, sign);
                _mm512_storeu_ps(scales[n].as_mut_ptr(), scale);
            }
            for block in 0..chunk.count {
                let to = y.add((first + block) * BLOCK);
                let (mut low, mut high) = (_mm512_loadu_ps(to), _mm512_loadu_ps(to.add(16)));
                for n in 0..N {
                    let nibbles = columns.nibbles(rows[n], first + block);
                    let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(nibbles.cast()));
                    let scale = _mm512_set1_ps(scales[n][block]);
                    // lanes of a permutation use their low 4 bits only
                    low = _mm512_fmadd_ps(_mm512_permutexvar_ps(both, table), scale, low);
                    let both = _mm512_srli_epi32::<4>(both);
                    high = _mm512_fmadd_ps(_mm512_permutexvar_ps(both, table), scale, high);
                }
                _mm512_storeu_ps(to, low);
                _mm512_storeu_ps(to.add(16), high);
            }
        }
    }
}

/// Of blocks that are rounded together: what rounded values are multiplied by, and 127 over the largest magnitude, 0 where that
/// is not `usable`.
struct Scales {
    scale: __m512,
    inverse: __m512,
    usable: __mmask16,
}

vnni_fn! {
    /// `amax`: the largest magnitudes; `bad`: not finite where any value is.
    fn scales_of(amax: __m512, bad: __m512) -> Scales {
        let of_127 = _mm512_set1_ps(127.0);
        let bad = _mm512_mul_ps(bad, _mm512_setzero_ps());
        let scale = _mm512_add_ps(_mm512_div_ps(amax, of_127), bad);
        let inverse = _mm512_div_ps(of_127, amax);
        let usable = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(inverse, _mm512_set1_ps(f32::INFINITY));
        Scales {
            scale,
            inverse: _mm512_maskz_mov_ps(usable, inverse),
            usable,
        }
    }
}

vnni_fn! {
    /// # Safety
    /// As [`active`]; as many whole rows as activations, 1 to [`ROUNDED`]. All of `out` that belongs
    /// to the rows and columns is set.
    fn round(rows: &[*const u8], a: &[f32], columns: Columns, out: *mut Rounded) {
        let mut s = [_mm512_setzero_ps(); ROUNDED + 1];
        for first in (0..columns.width).step_by(LANES) {
            let chunk = Chunk {
                first: columns.first + first,
                count: (columns.width - first).min(LANES),
                n_blocks: columns.n_blocks,
            };
            let (mut amax, mut bad) = (_mm512_setzero_ps(), _mm512_setzero_ps());
            for (n, (&row, &a)) in rows.iter().zip(a).enumerate() {
                let d = chunk.scales(columns.scales(row));
                let v = _mm512_mul_ps(_mm512_set1_ps(a), _mm512_cvtph_ps(d));
                amax = _mm512_max_ps(_mm512_abs_ps(v), amax);
                bad = _mm512_fmadd_ps(v, _mm512_setzero_ps(), bad);
                s[n] = v;
            }
            s[rows.len()] = _mm512_setzero_ps();
            let Scales { scale, inverse, .. } = scales_of(amax, bad);
            _mm512_storeu_ps((&raw mut (*out).scales).cast::<f32>().add(first), scale);
            let (mut total, byte) = (_mm512_setzero_si512(), _mm512_set1_epi32(0xFF));
            for pair in 0..rows.len().div_ceil(2) {
                let rounded = |n: usize| _mm512_cvtps_epi32(_mm512_mul_ps(s[n], inverse));
                let (one, two) = (rounded(2 * pair), rounded(2 * pair + 1));
                total = _mm512_add_epi32(total, _mm512_add_epi32(one, two));
                let two = _mm512_slli_epi32::<8>(_mm512_and_si512(two, byte));
                let both = _mm512_or_si512(_mm512_and_si512(one, byte), two);
                let both = _mm512_or_si512(both, _mm512_slli_epi32::<16>(both));
                let to = (&raw mut (*out).pairs[pair]).cast::<u32>().add(first);
                _mm512_storeu_si512(to.cast(), both);
            }
            let offset = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32::<3>(total));
            let word = _mm512_and_si512(offset, _mm512_set1_epi32(0xFFFF));
            let both = _mm512_or_si512(word, _mm512_slli_epi32::<16>(word));
            let to = (&raw mut (*out).offsets).cast::<u32>().add(first);
            _mm512_storeu_si512(to.cast(), both);
        }
    }
}

vnni_fn! {
    /// Adds the rows' blocks from the strip's `n`th on, up to four, to 128 values at `y`.
    ///
    /// # Safety
    /// As [`round`], which has set `rounded`; `y` has room.
    fn add_unit(rows: &[*const u8], rounded: *const Rounded, n: usize, columns: Columns, y: *mut f32) {
        let four = |from: *const u32| {
            let each = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let four = _mm512_castsi128_si512(_mm_loadu_si128(from.add(n).cast()));
            _mm512_permutexvar_epi32(each, four)
        };
        // sums of 16 bits wrap, but the whole does not: |Σ S · (q − 8)| ≤ 16 · 127 · 8
        let mut sums = [four((&raw const (*rounded).offsets).cast()); 4];
        let nibble = _mm512_set1_epi8(0xF);
        let n_there = columns.width - n;
        for (pair, rows) in rows.chunks(2).enumerate() {
            // what is not there would be waited for
            let load = |row: *const u8| {
                let at = columns.nibbles(row, n);
                let two = || _mm512_zextsi256_si512(_mm256_loadu_si256(at.cast()));
                match n_there {
                    1 => _mm512_zextsi128_si512(_mm_loadu_si128(at.cast())),
                    2 => two(),
                    3 => _mm512_inserti32x4::<2>(two(), _mm_loadu_si128(at.wrapping_add(32).cast())),
                    _ => _mm512_loadu_si512(at.cast()),
                }
            };
            let (one, two) = (load(rows[0]), load(rows[rows.len() - 1]));
            let s = four((&raw const (*rounded).pairs[pair]).cast());
            for (half, both) in [_mm512_unpacklo_epi8(one, two), _mm512_unpackhi_epi8(one, two)]
                .into_iter()
                .enumerate()
            {
                let low = _mm512_and_si512(both, nibble);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble);
                // columns 0 … 7 and 8 … 15 of each block, and the 16 behind
                sums[half] = _mm512_add_epi16(sums[half], _mm512_maddubs_epi16(low, s));
                sums[2 + half] = _mm512_add_epi16(sums[2 + half], _mm512_maddubs_epi16(high, s));
            }
        }
        for half in 0..2 {
            // a block's 16 columns of the half, of four blocks, of which two come together
            let (front, back) = (sums[2 * half], sums[2 * half + 1]);
            for (two, order) in [(0, [0, 1, 8, 9, 2, 3, 10, 11]), (2, [4, 5, 12, 13, 6, 7, 14, 15])] {
                let [a, b, c, d, e, f, g, h] = order;
                let order = _mm512_setr_epi64(a, b, c, d, e, f, g, h);
                let both = _mm512_permutex2var_epi64(front, order, back);
                for (other, of_block) in [_mm512_castsi512_si256(both), _mm512_extracti64x4_epi64::<1>(both)].into_iter().enumerate() {
                    let block = two + other;
                    let to = y.add(block * BLOCK + 16 * half);
                    let scale = _mm512_set1_ps(*(&raw const (*rounded).scales).cast::<f32>().add(n + block));
                    let value = _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(of_block));
                    _mm512_storeu_ps(to, _mm512_fmadd_ps(value, scale, _mm512_loadu_ps(to)));
                }
            }
        }
    }
}
