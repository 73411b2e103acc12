//! Single rows in [`crate::Layout::Rows`] with AVX2: 32 values at a time.
//!
//! Rows that are read one by one (neurons that fire) are short, so all SIMD tiers share these; several rows of `Q4_0` are
//! [`super::rows256`]'s and [`super::rows512`]'s.

#![cfg(target_arch = "x86_64")]

use std::arch::x86_64::*;

use half::f16;

use crate::activations::ActRef;
use crate::quant::{BLOCK, QuantType};

/// Features of every function here.
macro_rules! avx2_fn {
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$($g:ident : $b:path),*>)? ($($arg:ident : $t:ty),* $(,)?) $(-> $r:ty)? $body:block) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        $vis unsafe fn $name $(<$($g: $b),*>)? ($($arg: $t),*) $(-> $r)? {
            // SAFETY: the features are enabled; pointers are valid by the function's contract.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    };
}

/// Where the planes of one row start.
#[derive(Clone, Copy)]
pub(crate) struct RowPlanes {
    at: [*const u8; 5],
}

impl RowPlanes {
    /// Of no row: to be replaced.
    pub(crate) const fn none() -> Self {
        Self {
            at: [std::ptr::null(); 5],
        }
    }

    /// # Safety
    /// `row` points to a packed row of `n_blocks` blocks of the format.
    #[inline(always)]
    pub(crate) unsafe fn new(quant: QuantType, row: *const u8, n_blocks: usize) -> Self {
        let mut at = [row; 5];
        let mut bytes = 0;
        for (p, plane) in quant.planes().iter().enumerate() {
            // SAFETY: the planes fill the row.
            at[p] = unsafe { row.add(bytes) };
            bytes += n_blocks * plane.units * plane.unit_bytes;
        }
        Self { at }
    }

    /// Asks for what the sub-blocks `subs` need, as [`super::prefetch_bytes`].
    #[inline(always)]
    pub(crate) fn prefetch(&self, quant: QuantType, subs: std::ops::Range<usize>) {
        let per_block = quant.block_values();
        let blocks = subs.start * BLOCK / per_block..(subs.end * BLOCK).div_ceil(per_block);
        for (p, plane) in quant.planes().iter().enumerate() {
            let bytes = plane.units * plane.unit_bytes;
            let from = self.at[p].wrapping_add(blocks.start * bytes);
            super::prefetch_bytes(from, blocks.len() * bytes);
        }
    }

    /// First byte of the row.
    #[inline(always)]
    pub(crate) fn start(&self) -> *const u8 {
        self.at[0]
    }

    /// The 16 bytes of nibbles of block `block` of a 4-bit format.
    ///
    /// # Safety
    /// The block is in the row.
    #[inline(always)]
    pub(crate) unsafe fn block16(&self, block: usize) -> *const u8 {
        // SAFETY: this function's contract.
        unsafe { self.at[0].add(16 * block) }
    }

    /// Half-precision value `index` of plane `plane`.
    #[inline(always)]
    unsafe fn half(&self, plane: usize, index: usize) -> f16 {
        // SAFETY: the caller's index is in the plane.
        f16::from_bits(unsafe { self.at[plane].cast::<u16>().add(index).read_unaligned() })
    }
}

/// A block format, a row at a time.
///
/// # Safety
/// As the functions of [`super::unpack::Unpack`], for single rows.
pub(crate) trait RowUnpack {
    const QUANT: QuantType;
    const HAS_MIN: bool = false;
    const HALVES: bool = false;
    /// 32 signed bytes: columns 32·sub … 32·sub+31, offset taken off.
    unsafe fn values(planes: &RowPlanes, sub: usize) -> __m256i;
    /// Shift of the offset, where products are cheaper of unsigned values with the offset on.
    const OFFSET_SHIFT: Option<i32> = None;
    /// 32 unsigned bytes with the offset on (with [`Self::OFFSET_SHIFT`]).
    unsafe fn unsigned_values(planes: &RowPlanes, sub: usize) -> __m256i {
        // SAFETY: the trait's contract.
        unsafe { Self::values(planes, sub) }
    }
    /// Plane of half-precision scales, one per sub-block, where the format has such a plane.
    const SCALE_PLANE: Option<usize> = None;
    /// Scale of the sub-block (with [`Self::HALVES`]: without the integer scales).
    unsafe fn scale(planes: &RowPlanes, sub: usize) -> f32;
    /// What is added to each value (with [`Self::HALVES`]: the scale of both integer minima).
    unsafe fn min(_planes: &RowPlanes, _sub: usize) -> f32 {
        0.0
    }
    /// Integer scales of the two halves of the sub-block.
    unsafe fn half_scales(_planes: &RowPlanes, _sub: usize) -> [i32; 2] {
        [1; 2]
    }
    /// Integer minima of the two halves of the sub-block.
    unsafe fn half_mins(_planes: &RowPlanes, _sub: usize) -> [i32; 2] {
        [1; 2]
    }
}

avx2_fn! {
    /// Half precision to single.
    fn to_f32(half: f16) -> f32 {
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(half.to_bits()))))
    }
}

avx2_fn! {
    /// 16 bytes of nibbles: low ones, then high ones.
    fn nibbles(p: *const u8) -> __m256i {
        let both = _mm_loadu_si128(p.cast());
        let wide = _mm256_set_m128i(_mm_srli_epi16(both, 4), both);
        _mm256_and_si256(wide, _mm256_set1_epi8(0xF))
    }
}

avx2_fn! {
    /// 0x10 in byte k where bit k of the dword at `p` is set.
    fn fifth_bits(p: *const u8) -> __m256i {
        let bits = _mm256_set1_epi32(p.cast::<i32>().read_unaligned());
        let bytes = _mm256_setr_epi64x(0, 0x0101_0101_0101_0101, 0x0202_0202_0202_0202, 0x0303_0303_0303_0303);
        let spread = _mm256_shuffle_epi8(bits, bytes);
        let each = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, each), each);
        _mm256_and_si256(set, _mm256_set1_epi8(16))
    }
}

avx2_fn! {
    /// Nibbles of sub-block `sub` of a K format, from 32 bytes that hold two sub-blocks.
    fn k_nibbles(p: *const u8, sub: usize) -> __m256i {
        let both = _mm256_loadu_si256(p.add(sub / 2 * 32).cast());
        let shift = _mm_cvtsi32_si128(4 * (sub % 2) as i32);
        _mm256_and_si256(_mm256_srl_epi16(both, shift), _mm256_set1_epi8(0xF))
    }
}

avx2_fn! {
    /// 2 bits of 32 columns of `Q2_K` and `Q3_K`: 128 columns in 32 bytes.
    fn two_bits(p: *const u8, sub: usize) -> __m256i {
        let four = _mm256_loadu_si256(p.add(sub / 4 * 32).cast());
        let shift = _mm_cvtsi32_si128(2 * (sub % 4) as i32);
        _mm256_and_si256(_mm256_srl_epi16(four, shift), _mm256_set1_epi8(3))
    }
}

/// 6-bit scale and minimum of sub-block `sub` of a row; `p` holds 12 bytes a block.
///
/// # Safety
/// `p` is the plane of packed scales, with block `sub / 8` in it.
#[inline(always)]
unsafe fn k_scale_min(p: *const u8, sub: usize) -> (u8, u8) {
    // SAFETY: this function's contract.
    let packed = unsafe { std::slice::from_raw_parts(p.add(sub / 8 * 12), 12) };
    crate::quant::scale_min_k4(packed, sub % 8)
}

macro_rules! row_unpack {
    ($name:ident { $($item:tt)* }) => {
        pub(crate) struct $name;
        // SAFETY (whole impl): the trait's contract.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl RowUnpack for $name {
            const QUANT: QuantType = QuantType::$name;
            $($item)*
        }
    };
}

macro_rules! part {
    ($name:ident -> $type:ty, |$p:ident, $s:ident| $body:expr) => {
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn $name($p: &RowPlanes, $s: usize) -> $type {
            unsafe { $body }
        }
    };
}

#[allow(non_camel_case_types)]
mod formats {
    use super::*;

    row_unpack!(Q4_0 {
        const SCALE_PLANE: Option<usize> = Some(1);
        const OFFSET_SHIFT: Option<i32> = Some(3);
        part!(unsigned_values -> __m256i, |p, s| nibbles(p.at[0].add(16 * s)));
        part!(values -> __m256i, |p, s| {
            _mm256_sub_epi8(nibbles(p.at[0].add(16 * s)), _mm256_set1_epi8(8))
        });
        part!(scale -> f32, |p, s| to_f32(p.half(1, s)));
    });
    row_unpack!(Q4_1 {
        const SCALE_PLANE: Option<usize> = Some(1);
        const HAS_MIN: bool = true;
        part!(values -> __m256i, |p, s| nibbles(p.at[0].add(16 * s)));
        part!(scale -> f32, |p, s| to_f32(p.half(1, s)));
        part!(min -> f32, |p, s| to_f32(p.half(2, s)));
    });
    row_unpack!(Q5_0 {
        const SCALE_PLANE: Option<usize> = Some(2);
        part!(values -> __m256i, |p, s| {
            let five = _mm256_or_si256(nibbles(p.at[0].add(16 * s)), fifth_bits(p.at[1].add(4 * s)));
            _mm256_sub_epi8(five, _mm256_set1_epi8(16))
        });
        part!(scale -> f32, |p, s| to_f32(p.half(2, s)));
    });
    row_unpack!(Q5_1 {
        const SCALE_PLANE: Option<usize> = Some(2);
        const HAS_MIN: bool = true;
        part!(values -> __m256i, |p, s| {
            _mm256_or_si256(nibbles(p.at[0].add(16 * s)), fifth_bits(p.at[1].add(4 * s)))
        });
        part!(scale -> f32, |p, s| to_f32(p.half(2, s)));
        part!(min -> f32, |p, s| to_f32(p.half(3, s)));
    });
    row_unpack!(Q8_0 {
        const SCALE_PLANE: Option<usize> = Some(1);
        part!(values -> __m256i, |p, s| _mm256_loadu_si256(p.at[0].add(32 * s).cast()));
        part!(scale -> f32, |p, s| to_f32(p.half(1, s)));
    });
    row_unpack!(Q2_K {
        const HAS_MIN: bool = true;
        const HALVES: bool = true;
        part!(values -> __m256i, |p, s| two_bits(p.at[0], s));
        part!(scale -> f32, |p, s| to_f32(p.half(2, s / 8)));
        part!(min -> f32, |p, s| -to_f32(p.half(3, s / 8)));
        part!(half_scales -> [i32; 2], |p, s| {
            [0, 1].map(|n| i32::from(*p.at[1].add(2 * s + n) & 0xF))
        });
        part!(half_mins -> [i32; 2], |p, s| [0, 1].map(|n| i32::from(*p.at[1].add(2 * s + n) >> 4)));
    });
    row_unpack!(Q3_K {
        const HALVES: bool = true;
        part!(values -> __m256i, |p, s| {
            let high = _mm256_loadu_si256(p.at[1].add(s / 8 * 32).cast());
            let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128((s % 8) as i32));
            let high = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(1)), 2);
            _mm256_sub_epi8(_mm256_or_si256(two_bits(p.at[0], s), high), _mm256_set1_epi8(4))
        });
        part!(scale -> f32, |p, s| to_f32(p.half(3, s / 8)));
        part!(half_scales -> [i32; 2], |p, s| {
            let packed = std::slice::from_raw_parts(p.at[2].add(s / 8 * 12), 12);
            [0, 1].map(|n| crate::quant::scale_q3_k(packed, 2 * (s % 8) + n))
        });
    });
    row_unpack!(Q4_K {
        const HAS_MIN: bool = true;
        part!(values -> __m256i, |p, s| k_nibbles(p.at[0].add(s / 8 * 128), s % 8));
        part!(scale -> f32, |p, s| {
            to_f32(p.half(2, s / 8)) * f32::from(k_scale_min(p.at[1], s).0)
        });
        part!(min -> f32, |p, s| {
            -(to_f32(p.half(3, s / 8)) * f32::from(k_scale_min(p.at[1], s).1))
        });
    });
    row_unpack!(Q5_K {
        const HAS_MIN: bool = true;
        part!(values -> __m256i, |p, s| {
            let high = _mm256_loadu_si256(p.at[1].add(s / 8 * 32).cast());
            let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128((s % 8) as i32));
            let high = _mm256_and_si256(high, _mm256_set1_epi8(1));
            _mm256_or_si256(k_nibbles(p.at[0].add(s / 8 * 128), s % 8), _mm256_slli_epi16(high, 4))
        });
        part!(scale -> f32, |p, s| {
            to_f32(p.half(3, s / 8)) * f32::from(k_scale_min(p.at[2], s).0)
        });
        part!(min -> f32, |p, s| {
            -(to_f32(p.half(4, s / 8)) * f32::from(k_scale_min(p.at[2], s).1))
        });
    });
    row_unpack!(Q6_K {
        const HALVES: bool = true;
        part!(values -> __m256i, |p, s| {
            let (block, big, quarter) = (s / 8, s % 8 / 4, s % 4);
            let low = _mm256_loadu_si256(p.at[0].add(block * 128 + big * 64 + quarter % 2 * 32).cast());
            let high = _mm256_loadu_si256(p.at[1].add(block * 64 + big * 32).cast());
            let low = _mm256_srl_epi16(low, _mm_cvtsi32_si128(4 * (quarter / 2) as i32));
            let high = _mm256_srl_epi16(high, _mm_cvtsi32_si128(2 * quarter as i32));
            let low = _mm256_and_si256(low, _mm256_set1_epi8(0xF));
            let high = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4);
            _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32))
        });
        part!(scale -> f32, |p, s| to_f32(p.half(3, s / 8)));
        part!(half_scales -> [i32; 2], |p, s| {
            let scales = p.at[2].add(s / 8 * 16 + s % 8 * 2);
            [i32::from(*scales as i8), i32::from(*scales.add(1) as i8)]
        });
    });
}

pub(crate) use formats::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

avx2_fn! {
    /// Sums of eight vectors of 8 × i32, in order.
    pub(crate) fn sums_of_eight(v: [__m256i; 8]) -> __m256i {
        let (a, b) = (_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
        let (c, d) = (_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
        let (low, high) = (_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
        _mm256_add_epi32(
            _mm256_permute2x128_si256(low, high, 0x20),
            _mm256_permute2x128_si256(low, high, 0x31),
        )
    }
}

avx2_fn! {
    /// 8 integer sums whose total is sub-block `sub` · x (with `OFFSET_SHIFT`: with the offset on).
    fn product<U: RowUnpack>(planes: &RowPlanes, sub: usize, x: ActRef<'_>) -> __m256i {
        let xq = _mm256_loadu_si256(x.q.as_ptr().add(sub * BLOCK).cast());
        if U::OFFSET_SHIFT.is_some() {
            let sums = _mm256_maddubs_epi16(U::unsigned_values(planes, sub), xq);
            return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        }
        let w = U::values(planes, sub);
        let sums = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(xq, w));
        let product = _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
        if U::HALVES {
            let [a, b] = U::half_scales(planes, sub);
            return _mm256_mullo_epi32(product, _mm256_setr_epi32(a, a, a, a, b, b, b, b));
        }
        product
    }
}

avx2_fn! {
    /// Scales of eight sub-blocks from `first` on; a row that ends before gives zeros behind.
    pub(crate) fn scales_of_eight<U: RowUnpack>(planes: &RowPlanes, first: usize, n_subs: usize) -> __m256 {
        if let (Some(plane), true) = (U::SCALE_PLANE, first + 8 <= n_subs) {
            return _mm256_cvtph_ps(_mm_loadu_si128(planes.at[plane].add(2 * first).cast()));
        }
        if let (Some(plane), true) = (U::SCALE_PLANE, n_subs >= 8) {
            // the row's last eight, those before `first` shifted out
            let missing = first + 8 - n_subs;
            let last = planes.at[plane].add(2 * (n_subs - 8)).cast::<u128>().read_unaligned();
            let last = if missing < 8 { last >> (16 * missing) } else { 0 };
            return _mm256_cvtph_ps(std::mem::transmute::<u128, __m128i>(last));
        }
        let mut scales = [0.0f32; 8];
        for n in 0..n_subs.saturating_sub(first).min(8) {
            scales[n] = U::scale(planes, first + n);
        }
        _mm256_loadu_ps(scales.as_ptr())
    }
}

avx2_fn! {
    /// The first `count` of eight integers; zeros behind.
    pub(crate) fn first_of_eight(p: *const i32, count: usize) -> __m256i {
        if count == 8 {
            return _mm256_loadu_si256(p.cast());
        }
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count as i32), lanes);
        _mm256_maskload_epi32(p, mask)
    }
}

avx2_fn! {
    /// Row · x with 8-bit activations, in the order of the specification.
    pub(crate) fn dot_q8<U: RowUnpack>(planes: &RowPlanes, n_cols: usize, x: ActRef<'_>) -> f32 {
        let n_subs = n_cols / BLOCK;
        let mut acc = 0.0f32;
        let mut first = 0;
        while first < n_subs {
            let count = (n_subs - first).min(8);
            let mut products = [_mm256_setzero_si256(); 8];
            if count == 8 {
                for n in 0..8 {
                    products[n] = product::<U>(planes, first + n, x);
                }
            } else {
                for n in 0..count {
                    products[n] = product::<U>(planes, first + n, x);
                }
            }
            let mut sums = sums_of_eight(products);
            if let Some(shift) = U::OFFSET_SHIFT {
                let offsets = first_of_eight(x.block_sums.as_ptr().add(first), count);
                sums = _mm256_sub_epi32(sums, _mm256_sll_epi32(offsets, _mm_cvtsi32_si128(shift)));
            }
            let sums = _mm256_cvtepi32_ps(sums);
            let mut x_scales = [0.0f32; 8];
            std::ptr::copy_nonoverlapping(x.scales.as_ptr().add(first), x_scales.as_mut_ptr(), count);
            let scales = scales_of_eight::<U>(planes, first, n_subs);
            let scales = _mm256_mul_ps(scales, _mm256_loadu_ps(x_scales.as_ptr()));
            let (mut totals, mut both) = ([0.0f32; 8], [0.0f32; 8]);
            _mm256_storeu_ps(totals.as_mut_ptr(), sums);
            _mm256_storeu_ps(both.as_mut_ptr(), scales);
            for n in 0..count {
                acc = totals[n].mul_add(both[n], acc);
                if U::HALVES && U::HAS_MIN {
                    let sub = first + n;
                    let (mins, sums) = (U::half_mins(planes, sub), x.half_sums.as_ptr().add(2 * sub));
                    let total = mins[0] * *sums + mins[1] * *sums.add(1);
                    acc = (total as f32).mul_add(U::min(planes, sub) * *x.scales.as_ptr().add(sub), acc);
                } else if U::HAS_MIN {
                    let sub = first + n;
                    acc = U::min(planes, sub).mul_add(*x.sums.as_ptr().add(sub), acc);
                }
            }
            first += count;
        }
        acc
    }
}

avx2_fn! {
    /// The fixed tree over 8 lanes.
    fn join(l: __m256) -> f32 {
        let quads = _mm_add_ps(_mm256_castps256_ps128(l), _mm256_extractf128_ps(l, 1));
        let pairs = _mm_add_ps(quads, _mm_movehl_ps(quads, quads));
        _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)))
    }
}

avx2_fn! {
    /// 32 signed bytes as 4 × 8 f32.
    fn to_floats(v: __m256i) -> [__m256; 4] {
        let (low, high) = (_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        [
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(low, 8))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(high, 8))),
        ]
    }
}

avx2_fn! {
    /// Row · x with f32 activations, in the order of the specification.
    pub(crate) fn dot_f32<U: RowUnpack>(planes: &RowPlanes, n_cols: usize, x: ActRef<'_>) -> f32 {
        let mut acc = 0.0f32;
        for sub in 0..n_cols / BLOCK {
            let q = to_floats(U::values(planes, sub));
            let at = x.values.as_ptr().add(sub * BLOCK);
            let scale = U::scale(planes, sub);
            let scales = U::half_scales(planes, sub);
            let parts = if U::HALVES { 2 } else { 1 };
            for part in 0..parts {
                let mut lanes = _mm256_setzero_ps();
                for n in part * 4 / parts..(part + 1) * 4 / parts {
                    lanes = _mm256_fmadd_ps(q[n], _mm256_loadu_ps(at.add(8 * n)), lanes);
                }
                let scale = if U::HALVES { scale * scales[part] as f32 } else { scale };
                acc = join(lanes).mul_add(scale, acc);
            }
            if U::HALVES && U::HAS_MIN {
                let (mins, totals) = (U::half_mins(planes, sub), x.half_totals.as_ptr().add(2 * sub));
                for (n, min) in mins.into_iter().enumerate() {
                    acc = (U::min(planes, sub) * min as f32).mul_add(*totals.add(n), acc);
                }
            } else if U::HAS_MIN {
                acc = U::min(planes, sub).mul_add(*x.sums.as_ptr().add(sub), acc);
            }
        }
        acc
    }
}

avx2_fn! {
    /// Real values of 32 columns whose scale is `scale`, as [`crate::quant::DecodedBlock::value`]
    /// gives them.
    pub(crate) fn reals<U: RowUnpack>(planes: &RowPlanes, sub: usize, scale: f32) -> [__m256; 4] {
        if matches!(U::QUANT, QuantType::Q4_0) {
            return reals_q4_0(planes.block16(sub), scale);
        }
        let q = to_floats(U::values(planes, sub));
        let [min, second_min] = U::half_mins(planes, sub)
            .map(|half| _mm256_set1_ps(U::min(planes, sub) * half as f32));
        let [first, second] = if U::HALVES {
            U::half_scales(planes, sub).map(|half| _mm256_set1_ps(scale * half as f32))
        } else {
            [_mm256_set1_ps(scale); 2]
        };
        [
            _mm256_fmadd_ps(q[0], first, min),
            _mm256_fmadd_ps(q[1], first, min),
            _mm256_fmadd_ps(q[2], second, second_min),
            _mm256_fmadd_ps(q[3], second, second_min),
        ]
    }
}

avx2_fn! {
    /// `nibble · d − 8·d`: exact, as (nibble − 8)·d has at most 15 bits.
    fn reals_q4_0(p: *const u8, d: f32) -> [__m256; 4] {
        let (scale, offset) = (_mm256_set1_ps(d), _mm256_set1_ps(-8.0 * d));
        let mask = _mm256_set1_epi32(0xF);
        let a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.cast()));
        let b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8).cast()));
        let mut out = [_mm256_setzero_ps(); 4];
        let q = [
            _mm256_and_si256(a, mask),
            _mm256_and_si256(b, mask),
            _mm256_srli_epi32(a, 4),
            _mm256_srli_epi32(b, 4),
        ];
        for n in 0..4 {
            out[n] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(q[n]), scale, offset);
        }
        out
    }
}

avx2_fn! {
    /// Up to 8 float weights from column `k`; columns behind `count` give zero.
    pub(crate) fn floats(quant: QuantType, row: *const u8, k: usize, count: usize) -> __m256 {
        let mut edge = [0u8; 32];
        let bytes = quant.block_bytes();
        let mut p = row.add(k * bytes);
        if count < 8 {
            std::ptr::copy_nonoverlapping(p, edge.as_mut_ptr(), count * bytes);
            p = edge.as_ptr();
        }
        match quant {
            QuantType::F32 => _mm256_loadu_ps(p.cast()),
            QuantType::F16 => _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
            _ => {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))
            }
        }
    }
}

/// Float rows · x: 8 lanes over the whole row, each. `x` is zero-padded to 32 values. Meanwhile the rows `next` are asked for, line
/// by line, so that the memory is never asked for more at a time than it takes.
///
/// # Safety
/// AVX2, FMA and F16C are there; rows and `x` have `n_cols` values.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) unsafe fn dot_floats<const N: usize>(
    quant: QuantType,
    rows: [*const u8; N],
    next: [*const u8; N],
    n_cols: usize,
    x: ActRef<'_>,
) -> [f32; N] {
    // SAFETY: this function's contract.
    unsafe {
        match quant {
            QuantType::F32 => dot_floats_of(QuantType::F32, rows, next, n_cols, x),
            QuantType::F16 => dot_floats_of(QuantType::F16, rows, next, n_cols, x),
            _ => dot_floats_of(QuantType::BF16, rows, next, n_cols, x),
        }
    }
}

/// The same, for a format that is known where this is inlined.
///
/// # Safety
/// As [`dot_floats`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_floats_of<const N: usize>(
    quant: QuantType,
    rows: [*const u8; N],
    next: [*const u8; N],
    n_cols: usize,
    x: ActRef<'_>,
) -> [f32; N] {
    /// Bytes of a cache line.
    const LINE: usize = 64;
    let values_of_line = LINE / quant.block_bytes();
    let mut lanes = [_mm256_setzero_ps(); N];
    for k in (0..n_cols).step_by(8) {
        // SAFETY: this function's contract.
        unsafe {
            let x = _mm256_loadu_ps(x.values.as_ptr().add(k));
            if k % values_of_line == 0 {
                for next in next {
                    // asking is no access
                    _mm_prefetch::<_MM_HINT_T1>(next.wrapping_add(k * quant.block_bytes()).cast());
                }
            }
            for (lanes, row) in lanes.iter_mut().zip(rows) {
                let w = floats(quant, row, k, (n_cols - k).min(8));
                *lanes = _mm256_fmadd_ps(w, x, *lanes);
            }
        }
    }
    // SAFETY: this function's contract.
    lanes.map(|lanes| unsafe { join(lanes) })
}
