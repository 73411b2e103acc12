//! 16 lanes in one AVX-512 register, with or without VNNI.

use std::arch::x86_64::*;

use super::isa::Isa;

/// AVX-512 F, BW, DQ, VL; `VNNI`: with 8-bit dot products.
pub(crate) struct Avx512<const VNNI: bool>;

#[inline(always)]
unsafe fn broadcast(x: *const i8) -> __m512i {
    // SAFETY: the caller's pointer is valid for 4 bytes.
    unsafe { _mm512_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

// SAFETY (whole impl): the trait's contract: AVX-512 is there, pointers are valid for the bytes read.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<const VNNI: bool> Isa for Avx512<VNNI> {
    type I = __m512i;
    type F = __m512;
    const AHEAD_BYTES: usize = 2048;
    const SIGNED_SHIFT: Option<u32> = if VNNI { Some(7) } else { None };

    #[inline(always)]
    unsafe fn load(p: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn splat_i(v: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(v) }
    }
    #[inline(always)]
    unsafe fn and(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_and_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn add_i(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub_i(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_sub_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul_i(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_mullo_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn shr(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_srl_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn shl(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn sar(a: __m512i, bits: u32) -> __m512i {
        unsafe { _mm512_sra_epi32(a, _mm_cvtsi32_si128(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn or_fifth_bit(w: __m512i, h: __m512i, nibble: usize) -> __m512i {
        unsafe {
            // byte nibble/2 of each lane into all four bytes of the lane
            let byte = (nibble / 2) as i32 * 0x0101_0101;
            let lanes = _mm_setr_epi32(
                byte,
                byte + 0x0404_0404,
                byte + 0x0808_0808,
                byte + 0x0c0c_0c0c,
            );
            let spread = _mm512_shuffle_epi8(h, _mm512_broadcast_i32x4(lanes));
            let bits = if nibble.is_multiple_of(2) {
                0x0804_0201
            } else {
                0x8040_2010_u32 as i32
            };
            let set = _mm512_test_epi8_mask(spread, _mm512_set1_epi32(bits));
            _mm512_mask_add_epi8(w, set, w, _mm512_set1_epi8(16))
        }
    }
    #[inline(always)]
    unsafe fn to_f(a: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(a) }
    }
    #[inline(always)]
    unsafe fn splat(v: f32) -> __m512 {
        unsafe { _mm512_set1_ps(v) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn load_f32(p: *const u8) -> __m512 {
        unsafe { _mm512_loadu_ps(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> __m512 {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn dot_unsigned<const N: usize>(
        total: __m512i,
        w: [__m512i; N],
        x: [*const i8; N],
    ) -> __m512i {
        unsafe {
            if VNNI {
                let mut total = total;
                for n in 0..N {
                    total = _mm512_dpbusd_epi32(total, w[n], broadcast(x[n]));
                }
                total
            } else {
                let mut sums = _mm512_maddubs_epi16(w[0], broadcast(x[0]));
                for n in 1..N {
                    sums = _mm512_add_epi16(sums, _mm512_maddubs_epi16(w[n], broadcast(x[n])));
                }
                _mm512_add_epi32(total, _mm512_madd_epi16(sums, _mm512_set1_epi16(1)))
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_signed(total: __m512i, w: __m512i, x: *const i8) -> __m512i {
        unsafe {
            if VNNI {
                let unsigned = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
                _mm512_dpbusd_epi32(total, unsigned, broadcast(x))
            } else {
                let x = broadcast(x);
                let negative = _mm512_movepi8_mask(w);
                let x = _mm512_mask_sub_epi8(x, negative, _mm512_setzero_si512(), x);
                let sums = _mm512_maddubs_epi16(_mm512_abs_epi8(w), x);
                _mm512_add_epi32(total, _mm512_madd_epi16(sums, _mm512_set1_epi16(1)))
            }
        }
    }
}
