//! Sums of sketches, and gates from planes, with AVX2.
//!
//! Bit i of 32 bytes, left where it is or four places lower, is a factor of 0 or 2^(i mod 4): with it each byte's
//! activation is multiplied and added. There is a sum of 16 bits for each factor, which is joined before it is full.

use std::arch::x86_64::*;
use std::ops::Range;

use super::input::SketchInput;
use super::planes::{
    AHEAD, GatePlanes, HIGH_BYTES, LOW_BYTES, RUN, SCALE_BYTES, SIGN_BYTES, TOP_BYTES, UNIT, run_of,
};
use crate::activations::ActRef;
use crate::matrix::ROW_GROUP;
use crate::quant::BLOCK;

/// Factors: of two bits each.
const FACTORS: usize = 4;
/// Products of bytes that a sum of 16 bits takes: four of 8 · 127 each.
const SUM_PRODUCTS: usize = 8;

/// Asks for what comes so far ahead.
const AHEAD_BYTES: usize = 4096;

/// Sums of 16 bits, for each factor.
type FactorSums = [__m256i; FACTORS];

/// Adds the products of 32 bytes of bits with activations; `x(i)` are those of bits i.
///
/// # Safety
/// AVX2 is there; `sums` have room for one more product.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn add_products(sums: &mut FactorSums, bits: __m256i, x: impl Fn(usize) -> __m256i) {
    let upper = _mm256_srli_epi16(bits, FACTORS as i32);
    for (i, sum) in sums.iter_mut().enumerate() {
        let mask = _mm256_set1_epi8(1 << i);
        let low = _mm256_maddubs_epi16(_mm256_and_si256(bits, mask), x(i));
        let high = _mm256_maddubs_epi16(_mm256_and_si256(upper, mask), x(i + FACTORS));
        *sum = _mm256_add_epi16(*sum, _mm256_add_epi16(low, high));
    }
}

/// Σ over factors of the sums, as eight sums of 32 bits, which are then 0.
///
/// # Safety
/// AVX2 is there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn joined(sums: &mut FactorSums) -> __m256i {
    let ones = _mm256_set1_epi16(1);
    let mut all = _mm256_setzero_si256();
    for sum in sums.iter_mut().rev() {
        let wide = _mm256_madd_epi16(*sum, ones);
        all = _mm256_add_epi32(_mm256_srai_epi32::<1>(all), wide);
        *sum = _mm256_setzero_si256();
    }
    all
}

/// Rows that are summed together.
const ROWS: usize = 4;

/// Σ of activations whose weight is positive, of four rows: quarter `quarter` of the group whose signs start at `top`.
///
/// # Safety
/// AVX2 is there; all blocks of the group lie in the plane, and in the activations.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn positive_sums(
    top: *const u8,
    quarter: usize,
    n_blocks: usize,
    x: *const i8,
) -> [i32; ROWS] {
    let whole = n_blocks / RUN * RUN;
    let mut of_rows = [0i32; ROWS];
    // SAFETY: this function's contract; runs end with the last block.
    unsafe {
        // two rows of four blocks, twice
        let mut positive = [_mm256_setzero_si256(); 2];
        for first in (0..whole).step_by(SUM_PRODUCTS * RUN) {
            let mut of_factors = [[_mm256_setzero_si256(); FACTORS]; 2];
            for block in (first..(first + SUM_PRODUCTS * RUN).min(whole)).step_by(RUN) {
                let at = top.add(block * TOP_BYTES + quarter * ROWS * RUN * SIGN_BYTES);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD_BYTES).cast());
                let x = x.add(block * BLOCK);
                let x = |i: usize| {
                    let x = _mm_loadu_si128(x.add(i * RUN * SIGN_BYTES).cast());
                    _mm256_broadcastsi128_si256(x)
                };
                for (n, sums) in of_factors.iter_mut().enumerate() {
                    let signs = _mm256_loadu_si256(at.add(32 * n).cast());
                    add_products(sums, signs, x);
                }
            }
            for (sum, of_factors) in positive.iter_mut().zip(&mut of_factors) {
                *sum = _mm256_add_epi32(*sum, joined(of_factors));
            }
        }
        for (n, sums) in positive.into_iter().enumerate() {
            let mut lanes = [0i32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums);
            of_rows[2 * n] = lanes[..4].iter().sum();
            of_rows[2 * n + 1] = lanes[4..].iter().sum();
        }
        let mut block = whole;
        while block < n_blocks {
            let (_, width) = run_of(block, n_blocks);
            let at = top.add(block * TOP_BYTES + quarter * ROWS * width * SIGN_BYTES);
            let x = x.add(block * BLOCK);
            let mut of_factors = [_mm256_setzero_si256(); FACTORS];
            if width == 2 {
                let x = |i: usize| _mm256_set1_epi64x(x.add(8 * i).cast::<i64>().read_unaligned());
                add_products(&mut of_factors, _mm256_loadu_si256(at.cast()), x);
            } else {
                let x = |i: usize| _mm256_set1_epi32(x.add(4 * i).cast::<i32>().read_unaligned());
                let signs = _mm256_zextsi128_si256(_mm_loadu_si128(at.cast()));
                add_products(&mut of_factors, signs, x);
            }
            let mut lanes = [0i32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), joined(&mut of_factors));
            for (sum, lanes) in of_rows.iter_mut().zip(lanes.chunks_exact(width)) {
                *sum += lanes.iter().sum::<i32>();
            }
            block += width;
        }
    }
    of_rows
}

/// # Safety
/// The machine has AVX2; lengths fit as [`super::planes::sign_sums`] asserts.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn sign_sums(
    planes: GatePlanes<'_>,
    x: &SketchInput,
    rows: Range<usize>,
    sums: &mut [i32],
) {
    let n_blocks = planes.shape.n_blocks();
    let first_group = rows.start / ROW_GROUP;
    for (n, sums) in sums.chunks_mut(ROWS).enumerate() {
        let (group, quarter) = (first_group + n / 4, n % 4);
        // SAFETY: the group's blocks lie in the plane, and all blocks in the activations.
        let positive = unsafe {
            let top = planes.top.as_ptr().add(group * n_blocks * TOP_BYTES);
            positive_sums(top, quarter, n_blocks, x.top().as_ptr())
        };
        for (sum, positive) in sums.iter_mut().zip(positive) {
            *sum = 2 * positive - x.sum();
        }
    }
}

/// Products of 32 activations with 0 or 2^i, in eight sums of 32 bits: `masks` leave bit i of each byte of `bits`, another i in each lane.
///
/// # Safety
/// AVX2 is there.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn of_bits(bits: __m256i, masks: __m256i, x: __m256i) -> __m256i {
    // at most twice 128 · 127: it fits in 16 bits
    let products = _mm256_maddubs_epi16(_mm256_and_si256(bits, masks), x);
    _mm256_madd_epi16(products, _mm256_set1_epi16(1))
}

/// # Safety
/// The machine has AVX2; all rows are there, and `x` has their columns.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn sign_sums_of(
    planes: GatePlanes<'_>,
    x: &SketchInput,
    ids: &[u32],
    out: &mut [i32],
) {
    let n_blocks = planes.shape.n_blocks();
    let n_whole = n_blocks / RUN * RUN;
    let bytes_of = |shifts| _mm256_sllv_epi32(_mm256_set1_epi32(0x0101_0101), shifts);
    let add = |a, b| _mm256_add_epi32(a, b);
    let more = |shifts, n| add(shifts, _mm256_set1_epi32(n));
    // lane l of two: bits l, 2 + l, 4 + l and 6 + l of 16 bytes
    let lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
    let shifts = [lanes, more(lanes, 2), more(lanes, 4), more(lanes, 6)];
    let masks = shifts.map(bytes_of);
    // of two blocks, lane l of four: bits l and 4 + l of 8 bytes; of one, lane l of eight: bit l of 4
    let pairs = _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
    let pair_shifts = [pairs, more(pairs, 4)];
    let pair_masks = pair_shifts.map(bytes_of);
    let one_shifts = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    let one_masks = bytes_of(one_shifts);
    for (&id, out) in ids.iter().zip(out) {
        let row = id as usize;
        // SAFETY: this function's contract; runs end with the last block.
        unsafe {
            let at = |block: usize| planes.top.as_ptr().add(planes.shape.signs_at(row, block));
            let first = at(0);
            let mut sums = [_mm256_setzero_si256(); 4];
            for block in (0..n_whole).step_by(RUN) {
                let signs = _mm_loadu_si128(first.add(block * TOP_BYTES).cast());
                let signs = _mm256_broadcastsi128_si256(signs);
                let x = x.top().as_ptr().add(block * BLOCK);
                for n in 0..4 {
                    let x = _mm256_loadu_si256(x.add(32 * n).cast());
                    sums[n] = add(sums[n], of_bits(signs, masks[n], x));
                }
            }
            let mut sum = _mm256_setzero_si256();
            for n in 0..4 {
                sum = add(sum, _mm256_srav_epi32(sums[n], shifts[n]));
            }
            let mut block = n_whole;
            while block < n_blocks {
                let (_, width) = run_of(block, n_blocks);
                let x = x.top().as_ptr().add(block * BLOCK);
                let x = |n: usize| _mm256_loadu_si256(x.add(32 * n).cast());
                if width == 2 {
                    let signs = _mm256_set1_epi64x(at(block).cast::<i64>().read_unaligned());
                    for n in 0..2 {
                        let sums = of_bits(signs, pair_masks[n], x(n));
                        sum = add(sum, _mm256_srav_epi32(sums, pair_shifts[n]));
                    }
                } else {
                    let signs = _mm256_set1_epi32(at(block).cast::<i32>().read_unaligned());
                    let sums = of_bits(signs, one_masks, x(0));
                    sum = add(sum, _mm256_srav_epi32(sums, one_shifts));
                }
                block += width;
            }
            let mut lanes = [0i32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum);
            // those set less those not
            *out = 2 * lanes.iter().sum::<i32>() - x.sum();
        }
    }
}

/// Writes Σ of activations whose bit 2 is set to `out`, for rows `ids`.
///
/// # Safety
/// The machine has AVX2; all rows are there, and `x` has their columns.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn high_sums(
    planes: GatePlanes<'_>,
    x: &SketchInput,
    ids: &[u32],
    out: &mut [i32],
) {
    let bytes = planes.shape.high_row_bytes();
    for &id in &ids[..ids.len().min(AHEAD)] {
        planes.prefetch_high(id as usize);
    }
    for (n, (&id, out)) in ids.iter().zip(out).enumerate() {
        if let Some(&later) = ids.get(n + AHEAD) {
            planes.prefetch_high(later as usize);
        }
        let high = planes.rest_row(id as usize).high;
        let (mut sums, mut room) = ([_mm256_setzero_si256(); FACTORS], SUM_PRODUCTS);
        let mut all = _mm256_setzero_si256();
        let mut chunks = high.chunks_exact(32);
        // SAFETY: chunks have 32 bytes, and so have the activations there; what is behind the last is taken from
        // copies.
        unsafe {
            for (c, chunk) in chunks.by_ref().enumerate() {
                let x = |i: usize| {
                    let x = x.high().as_ptr().add(i * bytes + 32 * c);
                    _mm256_loadu_si256(x.cast())
                };
                add_products(&mut sums, _mm256_loadu_si256(chunk.as_ptr().cast()), x);
                room -= 1;
                if room == 0 {
                    all = _mm256_add_epi32(all, joined(&mut sums));
                    room = SUM_PRODUCTS;
                }
            }
            let rest = chunks.remainder();
            if !rest.is_empty() {
                let mut bits = [0u8; 32];
                bits[..rest.len()].copy_from_slice(rest);
                let at = bytes - rest.len();
                let x = |i: usize| {
                    let mut values = [0i8; 32];
                    values[..rest.len()].copy_from_slice(&x.high()[i * bytes + at..][..rest.len()]);
                    _mm256_loadu_si256(values.as_ptr().cast())
                };
                add_products(&mut sums, _mm256_loadu_si256(bits.as_ptr().cast()), x);
            }
            all = _mm256_add_epi32(all, joined(&mut sums));
            let mut lanes = [0i32; 8];
            _mm256_storeu_si256(lanes.as_mut_ptr().cast(), all);
            *out = lanes.iter().sum();
        }
    }
}

/// Bits 2 of a unit of 8 blocks, block after block.
///
/// # Safety
/// AVX2 is there; `from` points to the 32 bytes.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) unsafe fn high_of_blocks(from: *const u8) -> [u32; UNIT] {
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
/// AVX2 is there; `low`, `high` and `signs` are a block's bits, `x` its 32 activations.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn block_product(low: *const u8, high: u32, signs: u32, x: *const i8) -> __m256i {
    // SAFETY: 8 and 32 bytes.
    unsafe {
        let two = _mm256_set1_epi64x(low.cast::<i64>().read_unaligned());
        let two = _mm256_srlv_epi64(two, _mm256_setr_epi64x(0, 2, 4, 6));
        let two = _mm256_and_si256(two, _mm256_set1_epi8(3));
        let set = |bits: u32, value: i8| {
            let spread = _mm256_shuffle_epi8(
                _mm256_set1_epi32(bits as i32),
                _mm256_setr_epi64x(
                    0,
                    0x0101_0101_0101_0101,
                    0x0202_0202_0202_0202,
                    0x0303_0303_0303_0303,
                ),
            );
            let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each);
            _mm256_and_si256(set, _mm256_set1_epi8(value))
        };
        let q = _mm256_or_si256(_mm256_or_si256(two, set(high, 4)), set(signs, 8));
        let sums = _mm256_maddubs_epi16(q, _mm256_loadu_si256(x.cast()));
        _mm256_madd_epi16(sums, _mm256_set1_epi16(1))
    }
}

/// The exact gate of one row.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; the row exists, and `x` has its columns.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn plane_gate(planes: GatePlanes<'_>, x: ActRef<'_>, row: usize) -> f32 {
    let n_blocks = planes.shape.n_blocks();
    let rest = planes.rest_row(row);
    let mut acc = 0.0f32;
    // SAFETY: all blocks lie in the row, the top plane, and the activations; what is behind the row's end is taken
    // from copies.
    unsafe {
        let top = planes.top.as_ptr();
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
                let signs = top.add(planes.shape.signs_at(row, first + n)).cast::<u32>();
                products[n] = block_product(
                    rest.low.as_ptr().add((first + n) * LOW_BYTES),
                    high[n],
                    signs.read_unaligned(),
                    x.q.as_ptr().add((first + n) * BLOCK),
                );
            }
            // eight, and one less where the scale is negative
            let negative = _mm256_srai_epi32::<31>(_mm256_cvtepi16_epi32(scales));
            let one = _mm256_and_si256(offsets, negative);
            let offsets = _mm256_sub_epi32(_mm256_slli_epi32::<3>(offsets), one);
            let total = _mm256_sub_epi32(crate::dot::row::sums_of_eight(products), offsets);
            let lengths = _mm_and_si128(scales, _mm_set1_epi16(0x7FFF));
            let both = _mm256_mul_ps(_mm256_cvtph_ps(lengths), x_scales);
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
