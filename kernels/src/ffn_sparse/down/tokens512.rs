//! [`super::rounded`] with AVX-512 and VNNI for many tokens of which many neurons are open: lanes are 16 tokens.
//!
//! Of a run of 16 neurons, open or not, each token's activations are rounded in its lane, four neurons to a register. The nibbles are
//! turned, so that a column's of four neurons are a dword, which all lanes are multiplied with. That takes as long as it takes for any
//! activations, where [`super::rounded512`] takes the longer the more are open.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::NeuronRows;
use super::rounded::{ROUNDED, whole_runs};
use super::strips::{strips, sum_groups};
use super::x86::Batch;
use super::{DownScratch, SUMS};
use crate::dot::prefetch_bytes;
use crate::dot::rows512::vnni_fn;
use crate::matrix::StridedOut;
use crate::quant::BLOCK;

/// Tokens of a tile.
const TILE: usize = 16;
/// Tokens that are taken together.
pub(super) const TOKENS: usize = 64;
/// Blocks of columns that a register holds of a row.
const UNIT: usize = 4;
/// Blocks of columns of a strip, at most.
const STRIP: usize = 16;
/// Runs of neurons that are unpacked together: as many as the first cache holds of a block.
const RUNS: usize = 8;
/// Columns whose sums are in registers together.
const HALF: usize = BLOCK / 2;
/// Four neurons' bytes.
const QUADS: usize = ROUNDED / 4;

/// Nibbles of [`RUNS`] runs of neurons for a strip, a column after the other; and the blocks' scales.
#[repr(C, align(64))]
struct Weights {
    q: [[[[u8; ROUNDED]; BLOCK]; RUNS]; STRIP],
    d: [[[f32; ROUNDED]; RUNS]; STRIP],
}

/// Activations of a tile's tokens.
#[repr(C, align(64))]
struct Activations([[[f32; TILE]; ROUNDED]; RUNS]);

/// Rounded activations for a block of columns, −8 times their sums, and what they are scaled with.
#[repr(C, align(64))]
struct Rounded {
    s: [[[i32; TILE]; QUADS]; RUNS],
    offsets: [[i32; TILE]; RUNS],
    scales: [[f32; TILE]; RUNS],
}

/// All that [`tokens`] works in beside sums.
struct Room {
    weights: Weights,
    activations: Activations,
    rounded: Rounded,
}

const _: () = assert!(
    TOKENS * STRIP * BLOCK <= SUMS,
    "sums of subtrees do not meet"
);

vnni_fn! {
    /// Whether so many neurons are open that [`tokens`] is faster than [`super::rounded512::tokens`].
    ///
    /// # Safety
    /// As [`tokens`].
    pub(super) fn pays(batch: &Batch<'_>) -> bool {
        /// Where one neuron of so many is open, both take the same time (2048 columns, Xeon with AMX: 4.6 %).
        const OPEN_ONE_IN: usize = 20;
        let n_neurons = batch.down.n_neurons;
        let mut n_open = 0;
        for t in 0..batch.tokens.len() {
            for of_token in batch.act[t * batch.stride..][..n_neurons].chunks(TILE) {
                let there = (0xFFFF_u32 >> (TILE - of_token.len())) as u16;
                let values = _mm512_maskz_loadu_ps(there, of_token.as_ptr());
                let open = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(values, _mm512_setzero_ps());
                n_open += open.count_ones() as usize;
            }
        }
        n_open * OPEN_ONE_IN >= batch.tokens.len().next_multiple_of(TILE) * n_neurons
    }
}

vnni_fn! {
    /// Up to [`TOKENS`] tokens, all columns.
    ///
    /// # Safety
    /// The machine has AVX-512 with VNNI; shapes were checked by the caller; rows are `Q4_0`.
    pub(super) fn tokens(
        batch: &Batch<'_>,
        cols: Range<usize>,
        scratch: &mut DownScratch,
        sums: &mut [StridedOut<'_>],
    ) {
        let n_tokens = batch.tokens.len();
        let n_tiles = n_tokens.div_ceil(TILE);
        let size = SUMS;
        let mut room = MaybeUninit::<Room>::uninit();
        for blocks in strips(&cols, STRIP) {
            let strip = Strip { down: batch.down, first: blocks.start, width: blocks.len() };
            let width = blocks.len() * BLOCK * TILE;
            let done = &mut scratch.sums;
            sum_groups(batch.groups, done, size, n_tiles * width, |span, y| {
                let mut runs = whole_runs(span.clone());
                loop {
                    let mut these: [Range<usize>; RUNS] = std::array::from_fn(|_| 0..0);
                    let mut n_runs = 0;
                    for (to, run) in these.iter_mut().zip(&mut runs) {
                        *to = run;
                        n_runs += 1;
                    }
                    if n_runs == 0 {
                        break;
                    }
                    // SAFETY: this function's contract; `y` holds a strip of each tile.
                    unsafe { add_runs(batch, strip, &these[..n_runs], room.as_mut_ptr(), y) };
                }
            });
            let at = blocks.start * BLOCK - cols.start;
            for (n, sum) in sums.iter_mut().enumerate() {
                let y = &scratch.sums[n * size..][..n_tiles * width];
                for (tile, y) in y.chunks_exact(width).enumerate() {
                    let first = batch.tokens.start + tile * TILE;
                    for (half, y) in y.as_chunks::<{ HALF * TILE }>().0.iter().enumerate() {
                        let lanes = |c: usize| _mm512_loadu_ps(y.as_ptr().add(c * TILE));
                        let rows = turned(lanes);
                        let there = first..(first + TILE).min(batch.tokens.end);
                        for (t, row) in there.zip(rows) {
                            let to = &mut sum.row(t)[at + half * HALF..][..HALF];
                            _mm512_storeu_ps(to.as_mut_ptr(), row);
                        }
                    }
                }
            }
        }
    }
}

/// Blocks `first` … `first + width - 1` of all rows.
#[derive(Clone, Copy)]
struct Strip<'a> {
    down: NeuronRows<'a>,
    first: usize,
    width: usize,
}

impl Strip<'_> {
    fn nibbles(&self, neuron: usize) -> &[u8] {
        &self.down.row(neuron)[16 * self.first..][..16 * self.width]
    }

    fn scales(&self, neuron: usize) -> &[u8] {
        let n_blocks = self.down.n_embd / BLOCK;
        &self.down.row(neuron)[16 * n_blocks + 2 * self.first..][..2 * self.width]
    }

    fn prefetch(&self, neuron: usize) {
        let (nibbles, scales) = (self.nibbles(neuron), self.scales(neuron));
        prefetch_bytes(nibbles.as_ptr(), nibbles.len());
        prefetch_bytes(scales.as_ptr(), scales.len());
    }
}

/// A matrix of 16 × 16 lanes, turned: row `i` is `row(i)`.
///
/// # Safety
/// The machine has AVX-512.
#[inline(always)]
unsafe fn turned(row: impl Fn(usize) -> __m512) -> [__m512; 16] {
    // SAFETY: this function's contract.
    unsafe {
        let mut a = [_mm512_setzero_ps(); 16];
        let mut i = 0;
        while i < 16 {
            a[i] = row(i);
            i += 1;
        }
        // pairs of rows i and i + 1, of lanes; then of pairs; then of quarters
        let mut b = a;
        let mut i = 0;
        while i < 16 {
            b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
            i += 2;
        }
        let pd = |v| _mm512_castps_pd(v);
        let mut i = 0;
        while i < 16 {
            a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(b[i]), pd(b[i + 2])));
            a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(b[i]), pd(b[i + 2])));
            a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(b[i + 1]), pd(b[i + 3])));
            a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(b[i + 1]), pd(b[i + 3])));
            i += 4;
        }
        // a[4q + j]: columns j, 4 + j, 8 + j, 12 + j of rows 4q …
        let mut j = 0;
        while j < 4 {
            let even = _mm512_shuffle_f32x4::<0b10_00_10_00>(a[j], a[4 + j]);
            let odd = _mm512_shuffle_f32x4::<0b11_01_11_01>(a[j], a[4 + j]);
            let even2 = _mm512_shuffle_f32x4::<0b10_00_10_00>(a[8 + j], a[12 + j]);
            let odd2 = _mm512_shuffle_f32x4::<0b11_01_11_01>(a[8 + j], a[12 + j]);
            b[j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(even, even2);
            b[8 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(even, even2);
            b[4 + j] = _mm512_shuffle_f32x4::<0b10_00_10_00>(odd, odd2);
            b[12 + j] = _mm512_shuffle_f32x4::<0b11_01_11_01>(odd, odd2);
            j += 1;
        }
        b
    }
}

vnni_fn! {
    /// Adds runs of neurons, at most [`RUNS`], to the strip's sums of all tiles of tokens (`[tile][column][token]`).
    ///
    /// # Safety
    /// As [`tokens`].
    fn add_runs(batch: &Batch<'_>, strip: Strip<'_>, runs: &[Range<usize>], room: *mut Room, y: &mut [f32]) {
        let mut odd = false;
        for (r, run) in runs.iter().enumerate() {
            odd |= unpack(strip, run.clone(), r, &raw mut (*room).weights);
        }
        let width = strip.width * BLOCK * TILE;
        let mut asked = runs.last().map_or(0, |run| run.end);
        let to_ask = (asked + RUNS * ROUNDED).min(strip.down.n_neurons);
        let at_once = (to_ask - asked).div_ceil(runs.len() * batch.tokens.len().div_ceil(TILE));
        for (tile, y) in y.chunks_exact_mut(width).enumerate() {
            let first = tile * TILE;
            let n_tokens = (batch.tokens.len() - first).min(TILE);
            let act = batch.act[first * batch.stride..].as_ptr();
            let mut open = [0; RUNS];
            let mut n_open = 0;
            let mut odd = odd;
            for (r, run) in runs.iter().enumerate() {
                // rows of the neurons behind these, which are unpacked next
                let until = (asked + at_once).min(to_ask);
                (asked..until).for_each(|neuron| strip.prefetch(neuron));
                asked = until;
                let there = (0xFFFF_u32 >> (ROUNDED - run.len())) as u16;
                let row = |t: usize| match t < n_tokens {
                    true => _mm512_maskz_loadu_ps(there, act.add(t * batch.stride + run.start)),
                    false => _mm512_setzero_ps(),
                };
                let lanes = turned(row);
                let (mut any, mut bad) = (_mm512_setzero_si512(), _mm512_setzero_ps());
                for (n, lanes) in lanes.into_iter().enumerate() {
                    any = _mm512_or_si512(any, _mm512_castps_si512(lanes));
                    bad = _mm512_fmadd_ps(lanes, _mm512_setzero_ps(), bad);
                    _mm512_store_ps((&raw mut (*room).activations.0[r][n]).cast(), lanes);
                }
                odd |= _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(bad, bad) != 0;
                open[n_open] = r;
                n_open += usize::from(_mm512_test_epi32_mask(any, any) != 0);
            }
            let open = &open[..n_open];
            if open.is_empty() {
                continue;
            }
            for (block, y) in y.as_chunks_mut::<{ BLOCK * TILE }>().0.iter_mut().enumerate() {
                for &r in open {
                    let whole = !odd && round::<false>(room, r, block);
                    if !whole {
                        round::<true>(room, r, block);
                    }
                }
                let (first, second) = y.split_at_mut(HALF * TILE);
                add_half(room, open, block, 0, first);
                add_half(room, open, block, 1, second);
            }
        }
    }
}

vnni_fn! {
    /// Unpacks a run of neurons as number `r`; whether a scale is not finite.
    ///
    /// # Safety
    /// As [`tokens`]; `out` is valid for writes.
    fn unpack(strip: Strip<'_>, run: Range<usize>, r: usize, out: *mut Weights) -> bool {
        let mut scales = [[0u16; ROUNDED]; STRIP];
        for n in 0..run.len() {
            for (scales, scale) in scales.iter_mut().zip(strip.scales(run.start + n).as_chunks().0) {
                scales[n] = u16::from_le_bytes(*scale);
            }
        }
        let mask = _mm512_set1_epi8(0xF);
        for unit in (0..strip.width).step_by(UNIT) {
            let there = u64::MAX >> (64 - 16 * (strip.width - unit).min(UNIT));
            let mut rows = [_mm512_setzero_si512(); ROUNDED];
            for (n, row) in rows.iter_mut().enumerate() {
                // what is not there is multiplied by zeros
                let neuron = (run.start + n).min(run.end - 1);
                let nibbles = strip.nibbles(neuron).as_ptr().add(16 * unit);
                *row = _mm512_maskz_loadu_epi8(there, nibbles.cast());
            }
            // each round moves the highest bit of a row's number to be the lowest of a byte's, and a byte's highest to a row's lowest
            for _ in 0..4 {
                let from = rows;
                for i in 0..8 {
                    rows[2 * i] = _mm512_unpacklo_epi8(from[i], from[i + 8]);
                    rows[2 * i + 1] = _mm512_unpackhi_epi8(from[i], from[i + 8]);
                }
            }
            for (c, both) in rows.into_iter().enumerate() {
                let low = _mm512_and_si512(both, mask);
                let high = _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask);
                for (c, column) in [(c, low), (HALF + c, high)] {
                    let of_block = [
                        _mm512_castsi512_si128(column),
                        _mm512_extracti32x4_epi32::<1>(column),
                        _mm512_extracti32x4_epi32::<2>(column),
                        _mm512_extracti32x4_epi32::<3>(column),
                    ];
                    for (block, column) in of_block.into_iter().enumerate() {
                        let to = (&raw mut (*out).q[unit + block][r][c]).cast();
                        _mm_store_si128(to, column);
                    }
                }
            }
        }
        /// NaN and infinities.
        const NOT_FINITE: i32 = 0x99;
        let mut odd = 0;
        for (block, scales) in scales[..strip.width].iter().enumerate() {
            let d = _mm512_cvtph_ps(_mm256_loadu_si256(scales.as_ptr().cast()));
            odd |= _mm512_fpclass_ps_mask::<NOT_FINITE>(d);
            _mm512_store_ps((&raw mut (*out).d[block][r]).cast(), d);
        }
        odd != 0
    }
}

vnni_fn! {
    /// Rounds the activations of run `r` for a block of the strip's columns. Unless it is to `CHECK`, it takes all values for finite;
    /// `false` where a product is not, which has to be checked then.
    ///
    /// # Safety
    /// As [`tokens`]; the run and its activations are set.
    fn round[const CHECK: bool](room: *mut Room, r: usize, block: usize) -> bool {
        /// The operand of the larger magnitude, without its sign.
        const LARGER: i32 = 0b1011;
        let d = (&raw const (*room).weights.d[block][r]).cast::<f32>();
        let a = (&raw const (*room).activations.0[r]).cast::<f32>();
        let zero = _mm512_setzero_ps();
        let (mut v, mut bad) = ([zero; ROUNDED], zero);
        let mut larger = [zero; 2];
        let mut n = 0;
        while n < ROUNDED {
            let a = _mm512_load_ps(a.add(n * TILE));
            let d = _mm512_set1_ps(*d.add(n));
            v[n] = if CHECK {
                // a closed neuron changes nothing, whatever its scale
                let open = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(a, zero);
                _mm512_maskz_mul_ps(open, a, d)
            } else {
                _mm512_mul_ps(a, d)
            };
            if CHECK {
                bad = _mm512_fmadd_ps(v[n], zero, bad);
            }
            larger[n % 2] = _mm512_range_ps::<LARGER>(v[n], larger[n % 2]);
            n += 1;
        }
        let of_127 = _mm512_set1_ps(127.0);
        let amax = _mm512_range_ps::<LARGER>(larger[0], larger[1]);
        let finite = if CHECK {
            _mm512_cmp_ps_mask::<_CMP_ORD_Q>(bad, bad)
        } else {
            _mm512_cmp_ps_mask::<_CMP_LT_OQ>(amax, _mm512_set1_ps(f32::INFINITY))
        };
        if !CHECK && finite != 0xFFFF {
            return false;
        }
        let inverse = _mm512_div_ps(of_127, amax);
        let usable = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(inverse, _mm512_set1_ps(f32::INFINITY));
        let inverse = _mm512_maskz_mov_ps(usable & finite, inverse);
        let scale = _mm512_div_ps(amax, of_127);
        let scale = _mm512_mask_mov_ps(_mm512_set1_ps(f32::NAN), finite, scale);
        _mm512_store_ps((&raw mut (*room).rounded.scales[r]).cast(), scale);
        // four neurons' bytes of each token, from four tokens' bytes of each neuron
        let order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        let to = (&raw mut (*room).rounded.s[r]).cast::<u8>();
        let mut offset = _mm512_setzero_si512();
        let mut quad = 0;
        while quad < QUADS {
            let mut whole = [_mm512_setzero_si512(); 4];
            let mut n = 0;
            while n < 4 {
                let v = v[4 * quad + n];
                let v = if CHECK { _mm512_maskz_mov_ps(finite, v) } else { v };
                whole[n] = _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse));
                n += 1;
            }
            let (front, back) = (
                _mm512_packs_epi32(whole[0], whole[1]),
                _mm512_packs_epi32(whole[2], whole[3]),
            );
            let bytes = _mm512_shuffle_epi8(_mm512_packs_epi16(front, back), order);
            _mm512_store_si512(to.add(64 * quad).cast(), bytes);
            offset = _mm512_dpbusd_epi32(offset, _mm512_set1_epi8(8), bytes);
            quad += 1;
        }
        let offset = _mm512_sub_epi32(_mm512_setzero_si512(), offset);
        _mm512_store_si512((&raw mut (*room).rounded.offsets[r]).cast(), offset);
        true
    }
}

vnni_fn! {
    /// Adds runs `open` to half a block's columns (`[column][token]`).
    ///
    /// # Safety
    /// As [`tokens`]; the runs are unpacked and their activations rounded for the block.
    fn add_half(room: *const Room, open: &[usize], block: usize, half: usize, y: &mut [f32]) {
        assert_eq!(y.len(), HALF * TILE, "16 columns");
        let mut acc = [_mm512_setzero_ps(); HALF];
        for (c, acc) in acc.iter_mut().enumerate() {
            *acc = _mm512_loadu_ps(y.as_ptr().add(c * TILE));
        }
        for &r in open {
            let rounded = &raw const (*room).rounded;
            let s = |quad: usize| _mm512_load_si512((&raw const (*rounded).s[r][quad]).cast());
            let s = [s(0), s(1), s(2), s(3)];
            let offset = _mm512_load_si512((&raw const (*rounded).offsets[r]).cast());
            let scale = _mm512_load_ps((&raw const (*rounded).scales[r]).cast());
            let q = (&raw const (*room).weights.q[block][r][half * HALF]).cast::<i32>();
            // written out, so that sums stay in registers
            macro_rules! add {
                ($($c:literal)*) => {$(
                    let four = |quad: usize| _mm512_set1_epi32(*q.add($c * QUADS + quad));
                    let mut sum = offset;
                    sum = _mm512_dpbusd_epi32(sum, four(0), s[0]);
                    sum = _mm512_dpbusd_epi32(sum, four(1), s[1]);
                    sum = _mm512_dpbusd_epi32(sum, four(2), s[2]);
                    sum = _mm512_dpbusd_epi32(sum, four(3), s[3]);
                    acc[$c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, acc[$c]);
                )*};
            }
            add!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
        }
        for (c, acc) in acc.into_iter().enumerate() {
            _mm512_storeu_ps(y.as_mut_ptr().add(c * TILE), acc);
        }
    }
}
