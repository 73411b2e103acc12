//! 16 lanes in two AVX2 registers.

use std::arch::x86_64::*;

use super::isa::Isa;

/// AVX2, FMA and F16C.
pub(crate) struct Avx2;

type I = (__m256i, __m256i);
type F = (__m256, __m256);

#[inline(always)]
unsafe fn broadcast(x: *const i8) -> __m256i {
    // SAFETY: the caller's pointer is valid for 4 bytes.
    unsafe { _mm256_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

/// Both registers by the same intrinsic.
macro_rules! both {
    ($op:ident, $($arg:expr),+) => {
        ($op($($arg.0),+), $op($($arg.1),+))
    };
}

// SAFETY (whole impl): the trait's contract: AVX2, FMA, F16C are there, pointers are valid.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Isa for Avx2 {
    type I = I;
    const AHEAD_BYTES: usize = 8192;
    type F = F;
    const SIGNED_SHIFT: Option<u32> = None;

    #[inline(always)]
    unsafe fn load(p: *const u8) -> I {
        unsafe {
            (
                _mm256_loadu_si256(p.cast()),
                _mm256_loadu_si256(p.add(32).cast()),
            )
        }
    }
    #[inline(always)]
    unsafe fn splat_i(v: i32) -> I {
        unsafe { (_mm256_set1_epi32(v), _mm256_set1_epi32(v)) }
    }
    #[inline(always)]
    unsafe fn and(a: I, b: I) -> I {
        unsafe { both!(_mm256_and_si256, a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: I, b: I) -> I {
        unsafe { both!(_mm256_or_si256, a, b) }
    }
    #[inline(always)]
    unsafe fn add_i(a: I, b: I) -> I {
        unsafe { both!(_mm256_add_epi32, a, b) }
    }
    #[inline(always)]
    unsafe fn sub_i(a: I, b: I) -> I {
        unsafe { both!(_mm256_sub_epi32, a, b) }
    }
    #[inline(always)]
    unsafe fn mul_i(a: I, b: I) -> I {
        unsafe { both!(_mm256_mullo_epi32, a, b) }
    }
    #[inline(always)]
    unsafe fn shr(a: I, bits: u32) -> I {
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            (_mm256_srl_epi32(a.0, bits), _mm256_srl_epi32(a.1, bits))
        }
    }
    #[inline(always)]
    unsafe fn shl(a: I, bits: u32) -> I {
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            (_mm256_sll_epi32(a.0, bits), _mm256_sll_epi32(a.1, bits))
        }
    }
    #[inline(always)]
    unsafe fn sar(a: I, bits: u32) -> I {
        unsafe {
            let bits = _mm_cvtsi32_si128(bits as i32);
            (_mm256_sra_epi32(a.0, bits), _mm256_sra_epi32(a.1, bits))
        }
    }
    #[inline(always)]
    unsafe fn or_fifth_bit(w: I, h: I, nibble: usize) -> I {
        unsafe {
            // byte nibble/2 of each lane into all four bytes of the lane
            let byte = (nibble / 2) as i32 * 0x0101_0101;
            let lanes = _mm_setr_epi32(
                byte,
                byte + 0x0404_0404,
                byte + 0x0808_0808,
                byte + 0x0c0c_0c0c,
            );
            let lanes = _mm256_broadcastsi128_si256(lanes);
            let bits = if nibble.is_multiple_of(2) {
                0x0804_0201
            } else {
                0x8040_2010_u32 as i32
            };
            let bits = _mm256_set1_epi32(bits);
            let fifth = |h: __m256i| {
                let spread = _mm256_and_si256(_mm256_shuffle_epi8(h, lanes), bits);
                _mm256_and_si256(_mm256_cmpeq_epi8(spread, bits), _mm256_set1_epi8(16))
            };
            (
                _mm256_or_si256(w.0, fifth(h.0)),
                _mm256_or_si256(w.1, fifth(h.1)),
            )
        }
    }
    #[inline(always)]
    unsafe fn to_f(a: I) -> F {
        unsafe { both!(_mm256_cvtepi32_ps, a) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> F {
        unsafe { (_mm256_set1_ps(v), _mm256_set1_ps(v)) }
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        unsafe { both!(_mm256_mul_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        unsafe { both!(_mm256_add_ps, a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        unsafe { both!(_mm256_fmadd_ps, a, b, c) }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> F {
        unsafe { (_mm256_loadu_ps(p.cast()), _mm256_loadu_ps(p.add(32).cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> F {
        unsafe {
            let half = |p: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
            (half(p), half(p.add(16)))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> F {
        unsafe {
            let half = |p: *const u8| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))
            };
            (half(p), half(p.add(16)))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: F) {
        unsafe {
            _mm256_storeu_ps(p, v.0);
            _mm256_storeu_ps(p.add(8), v.1);
        }
    }
    #[inline(always)]
    unsafe fn dot_unsigned<const N: usize>(total: I, w: [I; N], x: [*const i8; N]) -> I {
        unsafe {
            let first = broadcast(x[0]);
            let mut low = _mm256_maddubs_epi16(w[0].0, first);
            let mut high = _mm256_maddubs_epi16(w[0].1, first);
            for n in 1..N {
                let x = broadcast(x[n]);
                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w[n].0, x));
                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(w[n].1, x));
            }
            let ones = _mm256_set1_epi16(1);
            (
                _mm256_add_epi32(total.0, _mm256_madd_epi16(low, ones)),
                _mm256_add_epi32(total.1, _mm256_madd_epi16(high, ones)),
            )
        }
    }
    #[inline(always)]
    unsafe fn dot_signed(total: I, w: I, x: *const i8) -> I {
        unsafe {
            let (x, ones) = (broadcast(x), _mm256_set1_epi16(1));
            let dot = |total: __m256i, w: __m256i| {
                let sums = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
                _mm256_add_epi32(total, _mm256_madd_epi16(sums, ones))
            };
            (dot(total.0, w.0), dot(total.1, w.1))
        }
    }
}
