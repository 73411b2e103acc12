//! Sign sums by table lookup, and gates from planes, with AVX2.
//!
//! Four activations have 16 sums with signs. A byte shuffle looks up one of them for 16 rows at
//! once; sums take 16 bits, so there is a table of low and one of high bytes. Looked up and added, a
//! weight costs less than a twelfth of an instruction.

use std::arch::x86_64::*;
use std::ops::Range;

use super::planes::{GatePlanes, HIGH_BYTES, LOW_BYTES, SCALE_BYTES, TABLE_BYTES, TOP_BYTES, UNIT};
use crate::activations::ActRef;
use crate::matrix::ROW_GROUP;
use crate::quant::BLOCK;

/// The order of a block's eight tables of low bytes, and behind them of high bytes: the lanes of a
/// register hold bits 8j … and 8(j+1) …, so their low and high nibbles need tables side by side.
const TABLE_ORDER: [usize; 8] = [0, 2, 1, 3, 4, 6, 5, 7];

/// Asks for what comes so far ahead.
const AHEAD_BYTES: usize = 4096;

/// # Safety
/// The machine has AVX2; lengths fit as [`super::planes::fill_tables`] asserts.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn fill_tables(x: ActRef<'_>, blocks: Range<usize>, tables: &mut [u8]) {
    // lane e has the sign of bit i of e
    let signs = [
        _mm256_setr_epi16(-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1),
        _mm256_setr_epi16(-1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1),
        _mm256_setr_epi16(-1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1),
        _mm256_setr_epi16(-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1),
    ];
    let bytes = _mm256_set1_epi16(0xFF);
    for (block, tables) in blocks.zip(tables.chunks_exact_mut(TABLE_BYTES)) {
        let (low, high) = tables.split_at_mut(TABLE_BYTES / 2);
        for (place, quad) in TABLE_ORDER.into_iter().enumerate() {
            let q = &x.q[block * BLOCK + 4 * quad..][..4];
            let signed = |i: usize| _mm256_sign_epi16(_mm256_set1_epi16(i16::from(q[i])), signs[i]);
            let sums = _mm256_add_epi16(
                _mm256_add_epi16(signed(0), signed(1)),
                _mm256_add_epi16(signed(2), signed(3)),
            );
            let (low_bytes, high_bytes) =
                (_mm256_and_si256(sums, bytes), _mm256_srli_epi16(sums, 8));
            // packing works within lanes: low 0-7, high 0-7, low 8-15, high 8-15
            let packed = _mm256_packus_epi16(low_bytes, high_bytes);
            let packed = _mm256_permute4x64_epi64(packed, 0b11_01_10_00);
            // SAFETY: both have 16 bytes from here on.
            unsafe {
                let to = low[16 * place..][..16].as_mut_ptr();
                _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
                let to = high[16 * place..][..16].as_mut_ptr();
                _mm_storeu_si128(to.cast(), _mm256_extracti128_si256(packed, 1));
            }
        }
    }
}

/// The sums of a block of 16 rows, 8 rows each.
///
/// # Safety
/// AVX2 is there; `top` is a block of the top plane, `table` its tables.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn block_sums(top: *const u8, table: *const u8) -> (__m128i, __m128i) {
    let nibbles = _mm256_set1_epi8(15);
    // rows 0-7 and 8-15 of both lanes
    let (mut first, mut second) = (_mm256_setzero_si256(), _mm256_setzero_si256());
    // SAFETY: 64 bytes of bits, 256 of tables.
    unsafe {
        for half in 0..2 {
            let bits = _mm256_loadu_si256(top.add(32 * half).cast());
            let parts = [
                _mm256_and_si256(bits, nibbles),
                _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibbles),
            ];
            for (n, index) in parts.into_iter().enumerate() {
                let at = table.add(64 * half + 32 * n);
                let low = _mm256_shuffle_epi8(_mm256_loadu_si256(at.cast()), index);
                let at = at.add(TABLE_BYTES / 2);
                let high = _mm256_shuffle_epi8(_mm256_loadu_si256(at.cast()), index);
                first = _mm256_add_epi16(first, _mm256_unpacklo_epi8(low, high));
                second = _mm256_add_epi16(second, _mm256_unpackhi_epi8(low, high));
            }
        }
    }
    let both =
        |v: __m256i| _mm_add_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    (both(first), both(second))
}

/// Eight blocks' sums of eight rows, turned: eight rows' sums of eight blocks.
///
/// # Safety
/// AVX2 is there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn turned(v: &[__m128i; 8]) -> [__m128i; 8] {
    let low = |a: usize, b: usize| _mm_unpacklo_epi16(v[a], v[b]);
    let high = |a: usize, b: usize| _mm_unpackhi_epi16(v[a], v[b]);
    let halves = [
        [low(0, 1), low(2, 3), low(4, 5), low(6, 7)],
        [high(0, 1), high(2, 3), high(4, 5), high(6, 7)],
    ];
    let mut out = *v;
    for (n, pairs) in halves.into_iter().enumerate() {
        let fours = [
            _mm_unpacklo_epi32(pairs[0], pairs[1]),
            _mm_unpackhi_epi32(pairs[0], pairs[1]),
            _mm_unpacklo_epi32(pairs[2], pairs[3]),
            _mm_unpackhi_epi32(pairs[2], pairs[3]),
        ];
        for m in 0..2 {
            out[4 * n + 2 * m] = _mm_unpacklo_epi64(fours[m], fours[m + 2]);
            out[4 * n + 2 * m + 1] = _mm_unpackhi_epi64(fours[m], fours[m + 2]);
        }
    }
    out
}

/// # Safety
/// The machine has AVX2 and FMA; lengths fit as [`super::planes::sign_scores`] asserts.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn sign_scores(
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    tables: &[u8],
    rows: Range<usize>,
    scores: &mut [f32],
    sums: &mut [i16],
) {
    let (n_blocks, stride) = (planes.shape.n_blocks(), planes.shape.sums_stride());
    let first_group = rows.start / ROW_GROUP;
    let groups = scores
        .chunks_mut(ROW_GROUP)
        .zip(sums.chunks_exact_mut(ROW_GROUP * stride));
    for (group, (scores, sums)) in groups.enumerate() {
        let mut acc = [_mm256_setzero_ps(); 2];
        // SAFETY: the groups' blocks lie in the planes, the tables, and the sums.
        unsafe {
            let mut top = (planes.top.as_ptr()).add((first_group + group) * n_blocks * TOP_BYTES);
            for first in (0..n_blocks).step_by(UNIT) {
                let mut of_blocks = [[_mm_setzero_si128(); UNIT]; 2];
                for block in first..(first + UNIT).min(n_blocks) {
                    _mm_prefetch::<_MM_HINT_T0>(top.wrapping_add(AHEAD_BYTES).cast());
                    let halves = block_sums(top, tables.as_ptr().add(block * TABLE_BYTES));
                    let x_scale = _mm256_set1_ps(*x.scales.get_unchecked(block));
                    for (n, half) in [halves.0, halves.1].into_iter().enumerate() {
                        of_blocks[n][block - first] = half;
                        let sum = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
                        acc[n] = _mm256_fmadd_ps(sum, x_scale, acc[n]);
                    }
                    top = top.add(TOP_BYTES);
                }
                for (n, half) in of_blocks.iter().enumerate() {
                    for (row, of_row) in turned(half).into_iter().enumerate() {
                        let to = sums.as_mut_ptr().add((8 * n + row) * stride + first);
                        _mm_storeu_si128(to.cast(), of_row);
                    }
                }
            }
            let mut all = [0.0f32; ROW_GROUP];
            _mm256_storeu_ps(all.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(all.as_mut_ptr().add(8), acc[1]);
            scores.copy_from_slice(&all[..scores.len()]);
        }
    }
}

/// Bits 2 of a unit of 8 blocks, block after block.
///
/// # Safety
/// AVX2 is there; `from` points to the 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn high_of_blocks(from: *const u8) -> [u32; UNIT] {
    // SAFETY: this function's contract.
    unsafe {
        let columns = |n: usize| _mm_loadl_epi64(from.add(8 * n).cast());
        let front = _mm_unpacklo_epi8(columns(0), columns(1));
        let back = _mm_unpacklo_epi8(columns(2), columns(3));
        let mut out = [0u32; UNIT];
        _mm_storeu_si128(out.as_mut_ptr().cast(), _mm_unpacklo_epi16(front, back));
        let to = out.as_mut_ptr().add(4);
        _mm_storeu_si128(to.cast(), _mm_unpackhi_epi16(front, back));
        out
    }
}

/// # Safety
/// AVX2 is there; `low` and `high` are a block's remaining bits, `x` its 32 activations.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn rest_product(low: *const u8, high: u32, x: *const i8) -> __m256i {
    // SAFETY: 8 and 32 bytes.
    unsafe {
        let two = _mm256_set1_epi64x(low.cast::<i64>().read_unaligned());
        let two = _mm256_srlv_epi64(two, _mm256_setr_epi64x(0, 2, 4, 6));
        let two = _mm256_and_si256(two, _mm256_set1_epi8(3));
        let bits = _mm256_set1_epi32(high as i32);
        let spread = _mm256_shuffle_epi8(
            bits,
            _mm256_setr_epi64x(
                0,
                0x0101_0101_0101_0101,
                0x0202_0202_0202_0202,
                0x0303_0303_0303_0303,
            ),
        );
        let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each);
        let rest = _mm256_or_si256(two, _mm256_and_si256(set, _mm256_set1_epi8(4)));
        let sums = _mm256_maddubs_epi16(rest, _mm256_loadu_si256(x.cast()));
        _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
    }
}

/// The exact gate of one row; `sums` are its own.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; the row exists, `x` has its columns, `sums` its blocks, to
/// whole units.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn plane_gate(
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    row: usize,
    sums: &[i16],
) -> f32 {
    let n_blocks = planes.shape.n_blocks();
    let rest = planes.rest_row(row);
    let mut acc = 0.0f32;
    // SAFETY: all blocks lie in the row, its sums, and the activations; what is behind the row's end
    // is taken from copies.
    unsafe {
        for first in (0..n_blocks).step_by(UNIT) {
            let count = (n_blocks - first).min(UNIT);
            let mut products = [_mm256_setzero_si256(); UNIT];
            let high = rest.high.as_ptr().add(first * HIGH_BYTES);
            let scales = rest.scales.as_ptr().add(first * SCALE_BYTES);
            let (high, scales, x_scales, offsets) = if count == UNIT {
                (
                    high_of_blocks(high),
                    _mm_loadu_si128(scales.cast()),
                    _mm256_loadu_ps(x.scales.as_ptr().add(first)),
                    _mm256_loadu_si256(x.block_sums.as_ptr().add(first).cast()),
                )
            } else {
                let mut unit = [0u8; UNIT * HIGH_BYTES];
                for j in 0..HIGH_BYTES {
                    let from = &rest.high[first * HIGH_BYTES + j * count..][..count];
                    unit[j * UNIT..][..count].copy_from_slice(from);
                }
                let (mut halves, mut x_scales, mut offsets) = ([0u8; 16], [0.0; 8], [0; 8]);
                let bytes = count * SCALE_BYTES;
                halves[..bytes].copy_from_slice(&rest.scales[first * SCALE_BYTES..][..bytes]);
                x_scales[..count].copy_from_slice(&x.scales[first..][..count]);
                offsets[..count].copy_from_slice(&x.block_sums[first..][..count]);
                (
                    high_of_blocks(unit.as_ptr()),
                    _mm_loadu_si128(halves.as_ptr().cast()),
                    _mm256_loadu_ps(x_scales.as_ptr()),
                    _mm256_loadu_si256(offsets.as_ptr().cast()),
                )
            };
            for n in 0..count {
                products[n] = rest_product(
                    rest.low.as_ptr().add((first + n) * LOW_BYTES),
                    high[n],
                    x.q.as_ptr().add((first + n) * BLOCK),
                );
            }
            let signs = _mm256_cvtepi16_epi32(_mm_loadu_si128(sums.as_ptr().add(first).cast()));
            // minus where the scale is negative
            let negative = _mm256_srai_epi32::<31>(_mm256_cvtepi16_epi32(scales));
            let signs = _mm256_sub_epi32(_mm256_xor_si256(signs, negative), negative);
            let total = _mm256_add_epi32(
                crate::dot::row::sums_of_eight(products),
                _mm256_slli_epi32::<2>(_mm256_sub_epi32(signs, offsets)),
            );
            let both = _mm256_mul_ps(_mm256_cvtph_ps(scales), x_scales);
            let (mut totals, mut factors) = ([0.0f32; 8], [0.0f32; 8]);
            _mm256_storeu_ps(totals.as_mut_ptr(), _mm256_cvtepi32_ps(total));
            _mm256_storeu_ps(factors.as_mut_ptr(), both);
            for n in 0..count {
                acc = totals[n].mul_add(factors[n], acc);
            }
        }
    }
    acc
}
