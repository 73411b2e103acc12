//! Dot products of quantised rows with activations: the arithmetic under every matrix product.
//!
//! The order of each sum is part of the specification ([`scalar`]):
//! * 8-bit activations: integers are summed exactly over 32 values, and blocks are added in
//!   ascending order with one fused multiply-add each;
//! * f32 activations: 8 partial sums per block by k mod 8 (for float weights: per row), joined by
//!   one tree.
//!
//! So a row gives the same bits in every tier, layout, tile and thread.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod isa;
pub(crate) mod row;
#[cfg(target_arch = "x86_64")]
pub(crate) mod rows256;
#[cfg(target_arch = "x86_64")]
pub(crate) mod rows512;
pub(crate) mod scalar;
pub(crate) mod tile;
pub(crate) mod unpack;

/// Asks for `bytes` bytes at `from`, into the second cache: rows that are read later must not push out the first's.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn prefetch_bytes(from: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // from a line's start, so that the last line is asked for too
    let skew = from.addr() % 64;
    let mut at = 0;
    while at < skew + bytes {
        // SAFETY: a hint, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(from.wrapping_sub(skew).wrapping_add(at).cast()) };
        at += 64;
    }
}
