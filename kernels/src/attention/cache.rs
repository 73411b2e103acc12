//! Rows of the cache of keys and values.

use std::fmt;

use crate::cpu::Cpu;
use crate::simd::by_tier;

/// Format of cached keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvType {
    /// 2 bytes a value.
    F16,
    /// 4 bytes a value.
    F32,
}

impl KvType {
    /// Bytes of one value.
    pub const fn value_bytes(self) -> usize {
        match self {
            KvType::F16 => 2,
            KvType::F32 => 4,
        }
    }

    /// Bytes of one row of `head_dim` values.
    pub const fn row_bytes(self, head_dim: usize) -> usize {
        self.value_bytes() * head_dim
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KvType::F16 => "f16",
            KvType::F32 => "f32",
        })
    }
}

/// The cache of one key/value head of one layer.
#[derive(Debug, Clone, Copy)]
pub struct KvHead<'a> {
    /// Format of the values.
    pub kv_type: KvType,
    /// Values of a row.
    pub head_dim: usize,
    /// Keys, `[n_ctx, head_dim]` of `kv_type`, little-endian.
    pub k: &'a [u8],
    /// Values, `[n_ctx, head_dim]` of `kv_type`, little-endian.
    pub v: &'a [u8],
}

impl KvHead<'_> {
    /// Asserts that positions up to `end` are there.
    pub(super) fn check(&self, end: usize) {
        assert!(
            (1..=super::HEAD_DIM_MAX).contains(&self.head_dim),
            "head_dim {} is in 1 … {}",
            self.head_dim,
            super::HEAD_DIM_MAX
        );
        let needed = end * self.kv_type.row_bytes(self.head_dim);
        assert!(
            self.k.len() >= needed && self.v.len() >= needed,
            "{end} positions are cached"
        );
    }
}

/// Writes values as they are cached, `src` `[n]` f32 to `dst` `[n]` of `kv_type`. Overwrites `dst`.
///
/// f16 is rounded to nearest, ties to even; beyond its range lies ±∞.
///
/// # Panics
/// When the lengths do not fit.
pub fn append(cpu: Cpu, kv_type: KvType, src: &[f32], dst: &mut [u8]) {
    assert_eq!(
        dst.len(),
        kv_type.row_bytes(src.len()),
        "bytes of the cached values"
    );
    match kv_type {
        KvType::F16 => {
            by_tier!(cpu, scalar::store_f16, vector::store_f16, (src: &[f32], dst: &mut [u8]))
        }
        KvType::F32 => {
            for (value, bytes) in src.iter().zip(dst.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }
    }
}

mod scalar {
    use half::f16;

    pub(super) fn store_f16(src: &[f32], dst: &mut [u8]) {
        for (value, bytes) in src.iter().zip(dst.as_chunks_mut().0) {
            *bytes = f16::from_f32(*value).to_le_bytes();
        }
    }
}

mod vector {
    use crate::elementwise::vector::load_up_to;
    use crate::simd::{F32x16, LANES};

    /// # Safety
    /// The machine has V's instructions; `dst` has two bytes for each value of `src`.
    #[inline(always)]
    pub(super) unsafe fn store_f16<V: F32x16>(src: &[f32], dst: &mut [u8]) {
        for i in (0..src.len()).step_by(LANES) {
            let n = src.len() - i;
            // SAFETY: `n` values lie behind i in both.
            unsafe {
                let v: V = load_up_to(src.as_ptr().add(i), n);
                let to = dst.as_mut_ptr().add(2 * i).cast();
                if n >= LANES {
                    v.store_f16(to)
                } else {
                    v.store_f16_first(to, n)
                }
            }
        }
    }
}
