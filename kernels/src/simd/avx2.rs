//! Sixteen lanes in two AVX2 registers.

use std::arch::x86_64::*;

use super::F32x16;

/// Lanes 0 … 7 and 8 … 15. Needs AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256, __m256);

/// Eight lanes of −1 (all bits) before eight of 0, twice as wide: the masks of [`masks`].
static MASKS: [i32; 32] = {
    let mut masks = [0; 32];
    let mut i = 0;
    while i < 16 {
        masks[i] = -1;
        i += 1;
    }
    masks
};

/// Masks of lanes 0 … n−1 of 16.
///
/// # Safety
/// The machine has AVX2; n ≤ 16.
#[inline(always)]
unsafe fn masks(n: usize) -> (__m256i, __m256i) {
    // SAFETY: 16 − n + 16 ≤ 32 values lie in the table.
    unsafe {
        let at = MASKS.as_ptr().add(16 - n);
        (
            _mm256_loadu_si256(at.cast()),
            _mm256_loadu_si256(at.add(8).cast()),
        )
    }
}

/// Lanes j and j + 4, then j and j + 2, then j and j + 1 summed.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn sum8(v: __m256) -> f32 {
    // SAFETY: the machine has AVX, by the contract.
    unsafe {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }
}

/// The maximum along the same tree.
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
pub(super) unsafe fn max8(v: __m256) -> f32 {
    // SAFETY: the machine has AVX, by the contract.
    unsafe {
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
    }
}

/// Sums of lanes j and j + 4 of `a` (into the low half) and of `b` (into the high half).
///
/// # Safety
/// The machine has AVX.
#[inline(always)]
unsafe fn join_fours(a: __m256, b: __m256) -> __m256 {
    // SAFETY: the machine has AVX, by the contract.
    unsafe {
        let low = _mm256_permute2f128_ps::<0x20>(a, b);
        _mm256_add_ps(low, _mm256_permute2f128_ps::<0x31>(a, b))
    }
}

/// Writes [`sum8`] of each of eight vectors, sharing the shuffles.
///
/// # Safety
/// The machine has AVX; 8 values can be written to `to`.
#[inline(always)]
pub(super) unsafe fn store_sums8(v: [__m256; 8], to: *mut f32) {
    // SAFETY: the machine has AVX and 8 values are writable, by the contract.
    unsafe {
        let fours = [
            join_fours(v[0], v[4]),
            join_fours(v[1], v[5]),
            join_fours(v[2], v[6]),
            join_fours(v[3], v[7]),
        ];
        let twos = [
            _mm256_add_ps(
                _mm256_shuffle_ps::<0b01_00_01_00>(fours[0], fours[1]),
                _mm256_shuffle_ps::<0b11_10_11_10>(fours[0], fours[1]),
            ),
            _mm256_add_ps(
                _mm256_shuffle_ps::<0b01_00_01_00>(fours[2], fours[3]),
                _mm256_shuffle_ps::<0b11_10_11_10>(fours[2], fours[3]),
            ),
        ];
        let even = _mm256_shuffle_ps::<0b10_00_10_00>(twos[0], twos[1]);
        let odd = _mm256_shuffle_ps::<0b11_01_11_01>(twos[0], twos[1]);
        _mm256_storeu_ps(to, _mm256_add_ps(even, odd));
    }
}

/// self · 2ⁿ in two steps, so that neither factor leaves f32's range.
///
/// # Safety
/// The machine has AVX2.
#[inline(always)]
unsafe fn mul_pow2(v: __m256, n: __m256) -> __m256 {
    // SAFETY: the machine has AVX2, by the contract.
    unsafe {
        let n = _mm256_cvtps_epi32(n);
        let first = _mm256_srai_epi32::<1>(n);
        let second = _mm256_sub_epi32(n, first);
        let bias = _mm256_set1_epi32(127);
        let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(first, bias));
        let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(second, bias));
        let v = _mm256_mul_ps(v, _mm256_castsi256_ps(first));
        _mm256_mul_ps(v, _mm256_castsi256_ps(second))
    }
}

impl F32x16 for Avx2 {
    type Half = __m256;

    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the machine has the tier, by the contract.
        let v = unsafe { _mm256_set1_ps(value) };
        Self(v, v)
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the machine has the tier and 16 values are readable, by the contract.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        // SAFETY: the machine has the tier; masked loads touch only the n readable values.
        unsafe {
            let (low, high) = masks(n);
            Self(
                _mm256_maskload_ps(from, low),
                _mm256_maskload_ps(from.wrapping_add(8), high),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the machine has the tier and 32 bytes are readable, by the contract.
        unsafe {
            Self(
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
            )
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 values are writable, by the contract; the tier is there since `self` is.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        // SAFETY: masked stores touch only the n writable values.
        unsafe {
            let (low, high) = masks(n);
            _mm256_maskstore_ps(to, low, self.0);
            _mm256_maskstore_ps(to.wrapping_add(8), high, self.1);
        }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: 32 bytes are writable, by the contract; the tier is there since `self` is.
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1);
            _mm_storeu_si128(to.cast(), low);
            _mm_storeu_si128(to.add(8).cast(), high);
        }
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: `self` exists only where the tier does; so in all functions below.
        unsafe { Self(_mm256_add_ps(self.0, b.0), _mm256_add_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe { Self(_mm256_sub_ps(self.0, b.0), _mm256_sub_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe { Self(_mm256_mul_ps(self.0, b.0), _mm256_mul_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe { Self(_mm256_div_ps(self.0, b.0), _mm256_div_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe {
            Self(
                _mm256_fmadd_ps(self.0, b.0, c.0),
                _mm256_fmadd_ps(self.1, b.1, c.1),
            )
        }
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe { Self(_mm256_max_ps(self.0, b.0), _mm256_max_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe { Self(_mm256_min_ps(self.0, b.0), _mm256_min_ps(self.1, b.1)) }
    }

    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: as in `add`.
        unsafe {
            Self(
                _mm256_round_ps::<NEAREST>(self.0),
                _mm256_round_ps::<NEAREST>(self.1),
            )
        }
    }

    #[inline(always)]
    fn mul_pow2(self, n: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe { Self(mul_pow2(self.0, n.0), mul_pow2(self.1, n.1)) }
    }

    #[inline(always)]
    fn zero_unless_positive(self, value: Self) -> Self {
        // SAFETY: as in `add`.
        unsafe {
            let zero = _mm256_setzero_ps();
            let low = _mm256_cmp_ps::<_CMP_NLE_UQ>(self.0, zero);
            let high = _mm256_cmp_ps::<_CMP_NLE_UQ>(self.1, zero);
            Self(_mm256_and_ps(low, value.0), _mm256_and_ps(high, value.1))
        }
    }

    #[inline(always)]
    fn swap_pairs(self) -> Self {
        const PAIRS: i32 = 0b10_11_00_01;
        // SAFETY: as in `add`.
        unsafe {
            Self(
                _mm256_permute_ps::<PAIRS>(self.0),
                _mm256_permute_ps::<PAIRS>(self.1),
            )
        }
    }

    #[inline(always)]
    fn fold(self) -> __m256 {
        // SAFETY: as in `add`.
        unsafe { _mm256_add_ps(self.0, self.1) }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as in `add`.
        unsafe { sum8(self.fold()) }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: as in `add`.
        unsafe { max8(_mm256_max_ps(self.0, self.1)) }
    }

    #[inline(always)]
    unsafe fn store_sums(halves: [__m256; 8], to: *mut f32) {
        // SAFETY: 8 values are writable, by the contract; the vectors exist, so AVX2 does.
        unsafe { store_sums8(halves, to) }
    }

    #[inline(always)]
    fn prefetch(from: *const u8) {
        // SAFETY: every x86-64 has SSE, and a prefetch of any address does nothing but that.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) }
    }
}
