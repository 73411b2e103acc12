//! Several single rows of `Q4_0` times one x with AVX2, 8 rows at a time, as [`super::rows512`] with 16: of each row the integer
//! totals of 8 blocks come first; turned, every lane adds one row's blocks in the order of the specification. One row alone would
//! wait for its sum at every block.

use std::arch::x86_64::*;
use std::ops::Range;

use super::row::{self, RowPlanes};
use crate::activations::ActRef;
use crate::ffn_sparse::NeuronRows;
use crate::quant::{BLOCK, QuantType};

/// Rows of a tile, and blocks.
const TILE: usize = 8;

/// Rows from which on a tile is faster than one after the other.
pub(crate) const ROWS_MIN: usize = 3;

#[repr(C, align(32))]
struct Tile([[f32; TILE]; TILE]);

/// Activations of up to 8 blocks.
struct Activations {
    /// The first halves of two blocks each, and the second ones.
    low: [__m256i; 4],
    high: [__m256i; 4],
    /// Eight times the blocks' sums.
    offsets: __m256i,
    scales: __m256,
}

/// Writes the products of rows `ids`, which are `Q4_0` and there, to `out`. Those of the next tile are asked for meanwhile, and
/// `beside` is called with each index once, when its row is.
///
/// # Safety
/// AVX2, FMA and F16C are there, all ids have rows, there is an output for each, and `x` has 8-bit blocks of the rows' columns.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn products(
    rows: NeuronRows<'_>,
    x: ActRef<'_>,
    ids: &[u32],
    out: &mut [f32],
    beside: &mut impl FnMut(usize),
) {
    let n_blocks = rows.n_embd / BLOCK;
    let planes = |id: u32| {
        let at = id as usize * rows.stride_bytes + rows.offset_bytes;
        let row = rows.bytes.as_ptr().wrapping_add(at);
        // SAFETY: the row is there (this function's contract).
        unsafe { RowPlanes::new(QuantType::Q4_0, row, n_blocks) }
    };
    for (j, &id) in ids.iter().enumerate().take(TILE) {
        planes(id).prefetch(QuantType::Q4_0, 0..n_blocks);
        beside(j);
    }
    let mut tiles = [const { Tile([[0.0; TILE]; TILE]) }; 2];
    for at in (0..ids.len()).step_by(TILE) {
        let (these, next) = ids[at..].split_at((ids.len() - at).min(TILE));
        let mut of_rows = [RowPlanes::none(); TILE];
        for (of_row, &id) in of_rows.iter_mut().zip(these) {
            *of_row = planes(id);
        }
        let mut acc = _mm256_setzero_ps();
        for first in (0..n_blocks).step_by(TILE) {
            let count = (n_blocks - first).min(TILE);
            let mut ask = |r: usize| {
                if let Some(&id) = next.get(r) {
                    planes(id).prefetch(QuantType::Q4_0, first..first + count);
                    if first == 0 {
                        beside(at + TILE + r);
                    }
                }
            };
            let of_rows = &of_rows[..these.len()];
            // SAFETY: this function's contract; so many blocks are left.
            acc = unsafe {
                if count == TILE {
                    add_chunk::<true>(of_rows, x, first..n_blocks, &mut tiles, acc, &mut ask)
                } else {
                    add_chunk::<false>(of_rows, x, first..n_blocks, &mut tiles, acc, &mut ask)
                }
            };
        }
        let mut sums = [0.0; TILE];
        // SAFETY: eight values.
        unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), acc) };
        out[at..at + these.len()].copy_from_slice(&sums[..these.len()]);
    }
}

/// `acc`, a row's sum in each lane, and the rows' products with the first eight of `blocks`, which reach to the rows' ends: not fewer
/// where `FULL`. `ask` is called beside each row.
///
/// # Safety
/// As [`products`]; rows and `x` have these blocks.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_chunk<const FULL: bool>(
    rows: &[RowPlanes],
    x: ActRef<'_>,
    blocks: Range<usize>,
    tiles: &mut [Tile; 2],
    acc: __m256,
    ask: &mut impl FnMut(usize),
) -> __m256 {
    let (first, n_blocks) = (blocks.start, blocks.end);
    let count = if FULL { TILE } else { blocks.len().min(TILE) };
    let [totals, factors] = tiles;
    // SAFETY: this function's contract.
    unsafe {
        let x = activations(x, first, count);
        for (r, row) in rows.iter().enumerate() {
            ask(r);
            let scales = row::scales_of_eight::<row::Q4_0>(row, first, n_blocks);
            let total = _mm256_cvtepi32_ps(row_totals(row, first, count, &x));
            _mm256_store_ps(totals.0[r].as_mut_ptr(), total);
            _mm256_store_ps(factors.0[r].as_mut_ptr(), _mm256_mul_ps(scales, x.scales));
        }
        let (totals, factors) = (columns(totals), columns(factors));
        let mut acc = acc;
        for block in 0..count {
            acc = _mm256_fmadd_ps(totals[block], factors[block], acc);
        }
        acc
    }
}

/// # Safety
/// As [`add_chunk`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn activations(x: ActRef<'_>, first: usize, count: usize) -> Activations {
    let zero = _mm256_setzero_si256();
    let mut out = Activations {
        low: [zero; 4],
        high: [zero; 4],
        offsets: zero,
        scales: _mm256_setzero_ps(),
    };
    // SAFETY: this function's contract.
    unsafe {
        let q = x.q.as_ptr().add(first * BLOCK);
        for pair in 0..count.div_ceil(2) {
            let one = _mm256_loadu_si256(q.add(2 * pair * BLOCK).cast());
            let two = if 2 * pair + 1 < count {
                _mm256_loadu_si256(q.add((2 * pair + 1) * BLOCK).cast())
            } else {
                zero
            };
            out.low[pair] = _mm256_permute2x128_si256::<0x20>(one, two);
            out.high[pair] = _mm256_permute2x128_si256::<0x31>(one, two);
        }
        let sums = row::first_of_eight(x.block_sums.as_ptr().add(first), count);
        out.offsets = _mm256_slli_epi32::<3>(sums);
        let scales = row::first_of_eight(x.scales.as_ptr().add(first).cast(), count);
        out.scales = _mm256_castsi256_ps(scales);
    }
    out
}

/// What each block of the row adds to, in integers; 0 behind the last.
///
/// # Safety
/// As [`add_chunk`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn row_totals(row: &RowPlanes, first: usize, count: usize, x: &Activations) -> __m256i {
    let (mask, ones) = (_mm256_set1_epi8(0xF), _mm256_set1_epi16(1));
    let mut pairs = [_mm256_setzero_si256(); 4];
    for pair in 0..count.div_ceil(2) {
        // SAFETY: this function's contract.
        let w = unsafe {
            let at = row.block16(first + 2 * pair);
            if 2 * pair + 1 < count {
                _mm256_loadu_si256(at.cast())
            } else {
                _mm256_zextsi128_si256(_mm_loadu_si128(at.cast()))
            }
        };
        let low = _mm256_maddubs_epi16(_mm256_and_si256(w, mask), x.low[pair]);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(w), mask);
        // at most 4 · 15 · 127
        let both = _mm256_add_epi16(low, _mm256_maddubs_epi16(high, x.high[pair]));
        pairs[pair] = _mm256_madd_epi16(both, ones);
    }
    let front = _mm256_hadd_epi32(pairs[0], pairs[1]);
    let back = _mm256_hadd_epi32(pairs[2], pairs[3]);
    // even blocks, then odd ones
    let totals = _mm256_hadd_epi32(front, back);
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    let totals = _mm256_permutevar8x32_epi32(totals, order);
    _mm256_sub_epi32(totals, x.offsets)
}

/// The columns of a tile.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn columns(tile: &Tile) -> [__m256; TILE] {
    let mut out = [_mm256_setzero_ps(); TILE];
    for half in 0..2 {
        let four = |row: usize| {
            // SAFETY: four values of two rows.
            unsafe {
                let low = _mm_load_ps(tile.0[row].as_ptr().add(4 * half));
                let high = _mm_load_ps(tile.0[row + 4].as_ptr().add(4 * half));
                _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(low), high)
            }
        };
        let (a, b, c, d) = (four(0), four(1), four(2), four(3));
        let (ab, ab_high) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let (cd, cd_high) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        out[4 * half] = _mm256_shuffle_ps::<0x44>(ab, cd);
        out[4 * half + 1] = _mm256_shuffle_ps::<0xEE>(ab, cd);
        out[4 * half + 2] = _mm256_shuffle_ps::<0x44>(ab_high, cd_high);
        out[4 * half + 3] = _mm256_shuffle_ps::<0xEE>(ab_high, cd_high);
    }
    out
}
