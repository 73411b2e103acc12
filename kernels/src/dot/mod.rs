//! Dot products of quantised rows with activations: the arithmetic under every matrix product.
//!
//! The order of each sum is part of the specification ([`scalar`]):
//! * 8-bit activations: integers are summed exactly over 32 values, and blocks are added in
//!   ascending order with one fused multiply-add each;
//! * f32 activations: 8 partial sums per block by k mod 8 (for float weights: per row), joined by
//!   one tree.
//!
//! So a row gives the same bits in every tier, layout, tile and thread.

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod isa;
pub(crate) mod row;
pub(crate) mod scalar;
pub(crate) mod tile;
pub(crate) mod unpack;
