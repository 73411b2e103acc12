//! Sign sums by table lookup, and gates from planes, with AVX2.
//!
//! Four activations have 16 sums with signs. A byte shuffle looks up one of them for 16 rows at
//! once; sums take 16 bits, so there is a table of low and one of high bytes. Looked up and added, a
//! weight costs less than a twelfth of an instruction.

use std::arch::x86_64::*;
use std::ops::Range;

use super::planes::{GatePlanes, HIGH_BYTES, LOW_BYTES, SCALES_AT, TABLE_BYTES, TOP_BYTES};
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

/// # Safety
/// The machine has AVX2, FMA and F16C; lengths fit as [`super::planes::sign_scores`] asserts.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn sign_scores(
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    tables: &[u8],
    rows: Range<usize>,
    scores: &mut [f32],
    sums: &mut [i16],
) {
    let n_blocks = planes.shape.n_blocks();
    let first_group = rows.start / ROW_GROUP;
    for (group, scores) in scores.chunks_mut(ROW_GROUP).enumerate() {
        let mut acc = [_mm256_setzero_ps(); 2];
        // SAFETY: the groups' blocks lie in the planes, the tables, and the sums.
        unsafe {
            let mut top = (planes.top.as_ptr()).add((first_group + group) * n_blocks * TOP_BYTES);
            let mut out = sums[group * n_blocks * ROW_GROUP..].as_mut_ptr();
            for block in 0..n_blocks {
                for line in [0, 64] {
                    let ahead = top.wrapping_add(AHEAD_BYTES + line);
                    _mm_prefetch::<_MM_HINT_T0>(ahead.cast());
                }
                let halves = block_sums(top, tables.as_ptr().add(block * TABLE_BYTES));
                let x_scale = _mm256_set1_ps(*x.scales.get_unchecked(block));
                for (n, half) in [halves.0, halves.1].into_iter().enumerate() {
                    _mm_storeu_si128(out.add(8 * n).cast(), half);
                    let scales = top.add(SCALES_AT + 16 * n).cast();
                    let scale = _mm256_cvtph_ps(_mm_loadu_si128(scales));
                    let sum = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(half));
                    acc[n] = _mm256_fmadd_ps(sum, _mm256_mul_ps(scale, x_scale), acc[n]);
                }
                top = top.add(TOP_BYTES);
                out = out.add(ROW_GROUP);
            }
            let mut all = [0.0f32; ROW_GROUP];
            _mm256_storeu_ps(all.as_mut_ptr(), acc[0]);
            _mm256_storeu_ps(all.as_mut_ptr().add(8), acc[1]);
            scores.copy_from_slice(&all[..scores.len()]);
        }
    }
}

/// # Safety
/// AVX2 is there; `low` and `high` are a block's remaining bits, `x` its 32 activations.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn rest_product(low: *const u8, high: *const u8, x: *const i8) -> __m256i {
    // SAFETY: 8, 4 and 32 bytes.
    unsafe {
        let two = _mm256_set1_epi64x(low.cast::<i64>().read_unaligned());
        let two = _mm256_srlv_epi64(two, _mm256_setr_epi64x(0, 2, 4, 6));
        let two = _mm256_and_si256(two, _mm256_set1_epi8(3));
        let bits = _mm256_set1_epi32(high.cast::<i32>().read_unaligned());
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

/// The exact gate of one row; `sums` are those of its group.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; the row exists, `x` has its columns, `sums` its blocks.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn plane_gate(
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    row: usize,
    sums: &[i16],
) -> f32 {
    let n_blocks = planes.shape.n_blocks();
    let lane = row % ROW_GROUP;
    let (low, high) = planes.rest_row(row);
    let top = planes.top[row / ROW_GROUP * n_blocks * TOP_BYTES..].as_ptr();
    let mut acc = 0.0f32;
    let mut first = 0;
    // SAFETY: all blocks lie in the row, the group's sums and scales, and the activations.
    unsafe {
        while first < n_blocks {
            let count = (n_blocks - first).min(8);
            let mut products = [_mm256_setzero_si256(); 8];
            // sums of signs and scales, and the activations' own
            let mut sign_sums = [0i32; 8];
            let mut halves = [0u16; 8];
            let mut x_scales = [0.0f32; 8];
            let mut offsets = [0i32; 8];
            for n in 0..count {
                let block = first + n;
                products[n] = rest_product(
                    low.as_ptr().add(block * LOW_BYTES),
                    high.as_ptr().add(block * HIGH_BYTES),
                    x.q.as_ptr().add(block * BLOCK),
                );
                sign_sums[n] = i32::from(*sums.get_unchecked(block * ROW_GROUP + lane));
                let scale = top.add(block * TOP_BYTES + SCALES_AT + 2 * lane);
                halves[n] = scale.cast::<u16>().read_unaligned();
                x_scales[n] = *x.scales.get_unchecked(block);
                offsets[n] = *x.block_sums.get_unchecked(block);
            }
            let difference = _mm256_sub_epi32(
                _mm256_loadu_si256(sign_sums.as_ptr().cast()),
                _mm256_loadu_si256(offsets.as_ptr().cast()),
            );
            let total = _mm256_add_epi32(
                crate::dot::row::sums_of_eight(products),
                _mm256_slli_epi32(difference, 2),
            );
            let scales = _mm256_cvtph_ps(_mm_loadu_si128(halves.as_ptr().cast()));
            let both = _mm256_mul_ps(scales, _mm256_loadu_ps(x_scales.as_ptr()));
            let (mut totals, mut factors) = ([0.0f32; 8], [0.0f32; 8]);
            _mm256_storeu_ps(totals.as_mut_ptr(), _mm256_cvtepi32_ps(total));
            _mm256_storeu_ps(factors.as_mut_ptr(), both);
            for n in 0..count {
                acc = totals[n].mul_add(factors[n], acc);
            }
            first += count;
        }
    }
    acc
}
