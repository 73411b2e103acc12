//! Sixteen lanes in one AVX-512 register.

use std::arch::x86_64::*;

use super::F32x16;
use super::avx2::{store_sums8, sum8};

/// Needs AVX-512 F, BW, DQ, VL, and AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

/// Lanes 0 … n−1.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    ((1u32 << n) - 1) as __mmask16
}

impl F32x16 for Avx512 {
    type Half = __m256;

    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: the machine has the tier, by the contract.
        Self(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the machine has the tier and 16 values are readable, by the contract.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        // SAFETY: the machine has the tier; a masked load touches only the n readable values.
        Self(unsafe { _mm512_maskz_loadu_ps(first(n), from) })
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the machine has the tier and 32 bytes are readable, by the contract.
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 values are writable, by the contract; the tier is there since `self` is.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        // SAFETY: a masked store touches only the n writable values.
        unsafe { _mm512_mask_storeu_ps(to, first(n), self.0) }
    }

    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        // SAFETY: 32 bytes are writable, by the contract; the tier is there since `self` is.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            _mm256_storeu_si256(to.cast(), half);
        }
    }

    #[inline(always)]
    fn add(self, b: Self) -> Self {
        // SAFETY: `self` exists only where the tier does; so in all functions below.
        Self(unsafe { _mm512_add_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn sub(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_sub_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn mul(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_mul_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn div(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_div_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn fma(self, b: Self, c: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }

    #[inline(always)]
    fn max(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_max_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn min(self, b: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_min_ps(self.0, b.0) })
    }

    #[inline(always)]
    fn round(self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_roundscale_ps::<_MM_FROUND_TO_NEAREST_INT>(self.0) })
    }

    #[inline(always)]
    fn mul_pow2(self, n: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }

    #[inline(always)]
    fn zero_unless_positive(self, value: Self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe {
            let open = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(self.0, _mm512_setzero_ps());
            _mm512_maskz_mov_ps(open, value.0)
        })
    }

    #[inline(always)]
    fn swap_pairs(self) -> Self {
        // SAFETY: as in `add`.
        Self(unsafe { _mm512_permute_ps::<0b10_11_00_01>(self.0) })
    }

    #[inline(always)]
    fn fold(self) -> __m256 {
        // SAFETY: as in `add`.
        unsafe {
            _mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            )
        }
    }

    #[inline(always)]
    fn sum(self) -> f32 {
        // SAFETY: as in `add`.
        unsafe { sum8(self.fold()) }
    }

    #[inline(always)]
    fn max_lane(self) -> f32 {
        // SAFETY: as in `add`.
        unsafe {
            let (low, high) = (
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            );
            super::avx2::max8(_mm256_max_ps(low, high))
        }
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
