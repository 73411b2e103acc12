//! How each format gives 16 interleaved rows, 32 values at a time.

use super::isa::Isa;
use crate::quant::QuantType;

/// Where the planes of a group of 16 interleaved rows start.
#[derive(Clone, Copy)]
pub(crate) struct Planes {
    at: [*const u8; 5],
}

impl Planes {
    /// # Safety
    /// `group` points to a packed group of 16 rows of `n_blocks` blocks.
    #[inline(always)]
    pub(crate) unsafe fn new(quant: QuantType, group: *const u8, n_blocks: usize) -> Self {
        let mut at = [group; 5];
        let mut bytes = 0;
        for (p, plane) in quant.planes().iter().enumerate() {
            // SAFETY: the planes fill the group.
            at[p] = unsafe { group.add(bytes) };
            bytes += n_blocks * plane.units * plane.unit_bytes * 16;
        }
        Self { at }
    }

    /// Vector `index` of a plane of 4-byte units (64 bytes).
    #[inline(always)]
    unsafe fn dwords<S: Isa>(&self, plane: usize, index: usize) -> S::I {
        // SAFETY: the caller's index is in the plane.
        unsafe { S::load(self.at[plane].add(index * 64)) }
    }

    /// Vector `index` of a plane of half-precision scales (32 bytes).
    #[inline(always)]
    unsafe fn halves<S: Isa>(&self, plane: usize, index: usize) -> S::F {
        // SAFETY: the caller's index is in the plane.
        unsafe { S::load_f16(self.at[plane].add(index * 32)) }
    }
}

/// A format of blocks: values of sub-block `sub` (32 columns) of 16 rows, and their scales.
///
/// # Safety
/// `planes` belongs to the format and holds sub-block `sub`; the tier's instructions exist.
pub(crate) trait Unpack {
    const QUANT: QuantType;
    /// log2 of what unsigned values have to be lowered by (Q4_0: 3); `None`: nothing.
    const OFFSET_SHIFT: Option<u32>;
    /// Vectors whose 16-bit sums cannot overflow: 8 for 4 bits, 4 for 5, 2 for 6.
    const DOTS: usize;
    /// Values are signed bytes (`Q8_0`).
    const SIGNED: bool = false;
    /// Two integer scales in a block of 32 (`Q2_K`, `Q3_K`, `Q6_K`), and two integer minima if it has minima.
    const HALVES: bool = false;
    const HAS_MIN: bool = false;

    /// Vector j holds columns 4j … 4j+3 of the sub-block.
    unsafe fn values<S: Isa>(planes: &Planes, sub: usize) -> [S::I; 8];
    unsafe fn scale<S: Isa>(planes: &Planes, sub: usize) -> S::F;
    /// What is added to each value (with two minima: the scale of both).
    unsafe fn min<S: Isa>(_planes: &Planes, _sub: usize) -> S::F {
        unreachable!("format has no minimum")
    }
    /// Integer scales of the first and second 16 columns.
    unsafe fn half_scales<S: Isa>(_planes: &Planes, _sub: usize) -> (S::I, S::I) {
        unreachable!("format has no halves")
    }
    /// Integer minima of the first and second 16 columns.
    unsafe fn half_mins<S: Isa>(_planes: &Planes, _sub: usize) -> (S::I, S::I) {
        unreachable!("format has no halves with minima")
    }
}

/// An array of vectors, by index. No closure: one that is not inlined would be compiled without the tier's instructions, and call
/// each of them.
macro_rules! lanes {
    ($n:literal, |$j:ident| $vector:expr) => {{
        let mut all = [S::splat_i(0); $n];
        let mut $j = 0;
        while $j < $n {
            all[$j] = $vector;
            $j += 1;
        }
        all
    }};
}

/// Low nibbles of 4 vectors, then high ones: 32 columns of the small formats.
#[inline(always)]
unsafe fn nibbles<S: Isa>(planes: &Planes, sub: usize) -> [S::I; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let mask = S::splat_i(0x0F0F_0F0F);
        let p = lanes!(4, |j| planes.dwords::<S>(0, 4 * sub + j));
        lanes!(8, |j| {
            if j < 4 {
                S::and(p[j], mask)
            } else {
                S::and(S::shr(p[j - 4], 4), mask)
            }
        })
    }
}

/// As [`nibbles`], with the fifth bits of plane 1.
#[inline(always)]
unsafe fn five_bits<S: Isa>(planes: &Planes, sub: usize) -> [S::I; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let (w, high) = (nibbles::<S>(planes, sub), planes.dwords::<S>(1, sub));
        lanes!(8, |j| S::or_fifth_bit(w[j], high, j))
    }
}

/// 32 columns of a K format: chunks of 64, low nibbles first.
#[inline(always)]
unsafe fn k_nibbles<S: Isa>(planes: &Planes, sub: usize) -> [S::I; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let mask = S::splat_i(0x0F0F_0F0F);
        let shift = 4 * (sub % 2) as u32;
        lanes!(8, |j| S::and(
            S::shr(planes.dwords::<S>(0, sub / 2 * 8 + j), shift),
            mask
        ))
    }
}

/// 6-bit scale or minimum (`which` 0 or 1) of a sub-block as integers; `plane` holds 12 bytes a row.
#[inline(always)]
unsafe fn k_scale<S: Isa>(planes: &Planes, plane: usize, sub: usize, which: usize) -> S::I {
    // SAFETY: the caller's contract.
    unsafe {
        let (block, s) = (sub / 8, (sub % 8) as u32);
        let dword = |index: usize| planes.dwords::<S>(plane, 3 * block + index);
        if s < 4 {
            S::and(S::shr(dword(which), 8 * s), S::splat_i(63))
        } else {
            let at = 8 * (s - 4);
            let low = S::and(S::shr(dword(2), at + 4 * which as u32), S::splat_i(0xF));
            let high = S::and(S::shr(dword(which), at + 6), S::splat_i(3));
            S::or(low, S::shl(high, 4))
        }
    }
}

/// `−(dmin · m)` of a K format whose scales are in `plane` and d, dmin in the two behind it.
#[inline(always)]
unsafe fn k_min<S: Isa>(planes: &Planes, plane: usize, sub: usize) -> S::F {
    // SAFETY: the caller's contract.
    unsafe {
        let min = S::to_f(k_scale::<S>(planes, plane, sub, 1));
        let product = S::mul(planes.halves::<S>(plane + 2, sub / 8), min);
        S::mul(product, S::splat(-1.0))
    }
}

/// 2 bits of 32 columns of `Q2_K` and `Q3_K`: 128 columns in 32 bytes.
#[inline(always)]
unsafe fn two_bits<S: Isa>(planes: &Planes, sub: usize) -> [S::I; 8] {
    // SAFETY: the caller's contract.
    unsafe {
        let mask = S::splat_i(0x0303_0303);
        let shift = 2 * (sub % 4) as u32;
        lanes!(8, |j| S::and(
            S::shr(planes.dwords::<S>(0, sub / 4 * 8 + j), shift),
            mask
        ))
    }
}

/// Nibble `which` (0 low, 1 high) of the bytes that `Q2_K` has for the halves of sub-block `sub`.
#[inline(always)]
unsafe fn q2_k_nibbles<S: Isa>(planes: &Planes, sub: usize, which: u32) -> (S::I, S::I) {
    // SAFETY: the caller's contract.
    unsafe {
        let dword = planes.dwords::<S>(1, sub / 2);
        let at = 16 * (sub % 2) as u32 + 4 * which;
        let nibble = |at: u32| S::and(S::shr(dword, at), S::splat_i(0xF));
        (nibble(at), nibble(at + 8))
    }
}

/// 6-bit scale of 16 columns, number `half` of the row, of `Q3_K`.
#[inline(always)]
unsafe fn q3_k_scale<S: Isa>(planes: &Planes, half: usize) -> S::I {
    // SAFETY: the caller's contract.
    unsafe {
        let (block, n) = (half / 16, half % 16);
        let byte = 8 * (n % 4) as u32;
        let low = planes.dwords::<S>(2, 3 * block + n % 8 / 4);
        let low = S::and(S::shr(low, byte + 4 * (n / 8) as u32), S::splat_i(0xF));
        let high = planes.dwords::<S>(2, 3 * block + 2);
        let high = S::and(S::shr(high, byte + 2 * (n / 4) as u32), S::splat_i(3));
        S::sub_i(S::or(low, S::shl(high, 4)), S::splat_i(32))
    }
}

/// Implements [`Unpack`]: every function body sees `$p` (planes) and `$s` (sub-block).
macro_rules! unpack {
    ($name:ident, offset $offset:expr, dots $dots:expr, { $($item:tt)* }) => {
        pub(crate) struct $name;
        // SAFETY (whole impl): the trait's contract.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Unpack for $name {
            const QUANT: QuantType = QuantType::$name;
            const OFFSET_SHIFT: Option<u32> = $offset;
            const DOTS: usize = $dots;
            $($item)*
        }
    };
}

macro_rules! part {
    ($name:ident -> $type:ty, |$p:ident, $s:ident| $body:expr) => {
        #[inline(always)]
        unsafe fn $name<S: Isa>($p: &Planes, $s: usize) -> $type {
            unsafe { $body }
        }
    };
}

#[allow(non_camel_case_types)]
mod formats {
    use super::*;

    unpack!(Q4_0, offset Some(3), dots 8, {
        part!(values -> [S::I; 8], |p, s| nibbles::<S>(p, s));
        part!(scale -> S::F, |p, s| p.halves::<S>(1, s));
    });
    unpack!(Q4_1, offset None, dots 8, {
        const HAS_MIN: bool = true;
        part!(values -> [S::I; 8], |p, s| nibbles::<S>(p, s));
        part!(scale -> S::F, |p, s| p.halves::<S>(1, s));
        part!(min -> S::F, |p, s| p.halves::<S>(2, s));
    });
    unpack!(Q5_0, offset Some(4), dots 4, {
        part!(values -> [S::I; 8], |p, s| five_bits::<S>(p, s));
        part!(scale -> S::F, |p, s| p.halves::<S>(2, s));
    });
    unpack!(Q5_1, offset None, dots 4, {
        const HAS_MIN: bool = true;
        part!(values -> [S::I; 8], |p, s| five_bits::<S>(p, s));
        part!(scale -> S::F, |p, s| p.halves::<S>(2, s));
        part!(min -> S::F, |p, s| p.halves::<S>(3, s));
    });
    unpack!(Q8_0, offset None, dots 1, {
        const SIGNED: bool = true;
        part!(values -> [S::I; 8], |p, s| lanes!(8, |j| p.dwords::<S>(0, 8 * s + j)));
        part!(scale -> S::F, |p, s| p.halves::<S>(1, s));
    });
    unpack!(Q2_K, offset None, dots 8, {
        const HAS_MIN: bool = true;
        const HALVES: bool = true;
        part!(values -> [S::I; 8], |p, s| two_bits::<S>(p, s));
        part!(scale -> S::F, |p, s| p.halves::<S>(2, s / 8));
        part!(min -> S::F, |p, s| S::mul(p.halves::<S>(3, s / 8), S::splat(-1.0)));
        part!(half_scales -> (S::I, S::I), |p, s| q2_k_nibbles::<S>(p, s, 0));
        part!(half_mins -> (S::I, S::I), |p, s| q2_k_nibbles::<S>(p, s, 1));
    });
    unpack!(Q3_K, offset Some(2), dots 8, {
        const HALVES: bool = true;
        part!(values -> [S::I; 8], |p, s| {
            let w = two_bits::<S>(p, s);
            lanes!(8, |j| {
                let high = S::shr(p.dwords::<S>(1, s / 8 * 8 + j), (s % 8) as u32);
                S::or(w[j], S::shl(S::and(high, S::splat_i(0x0101_0101)), 2))
            })
        });
        part!(scale -> S::F, |p, s| p.halves::<S>(3, s / 8));
        part!(half_scales -> (S::I, S::I), |p, s| {
            (q3_k_scale::<S>(p, 2 * s), q3_k_scale::<S>(p, 2 * s + 1))
        });
    });
    unpack!(Q4_K, offset None, dots 8, {
        const HAS_MIN: bool = true;
        part!(values -> [S::I; 8], |p, s| k_nibbles::<S>(p, s));
        part!(scale -> S::F, |p, s| {
            S::mul(p.halves::<S>(2, s / 8), S::to_f(k_scale::<S>(p, 1, s, 0)))
        });
        part!(min -> S::F, |p, s| k_min::<S>(p, 1, s));
    });
    unpack!(Q5_K, offset None, dots 4, {
        const HAS_MIN: bool = true;
        part!(values -> [S::I; 8], |p, s| {
            let w = k_nibbles::<S>(p, s);
            lanes!(8, |j| {
                let high = S::shr(p.dwords::<S>(1, s / 8 * 8 + j), (s % 8) as u32);
                S::or(w[j], S::shl(S::and(high, S::splat_i(0x0101_0101)), 4))
            })
        });
        part!(scale -> S::F, |p, s| {
            S::mul(p.halves::<S>(3, s / 8), S::to_f(k_scale::<S>(p, 2, s, 0)))
        });
        part!(min -> S::F, |p, s| k_min::<S>(p, 2, s));
    });
    unpack!(Q6_K, offset Some(5), dots 2, {
        const HALVES: bool = true;
        part!(values -> [S::I; 8], |p, s| {
            let (block, big, quarter) = (s / 8, s % 8 / 4, s % 4);
            lanes!(8, |j| {
                let low = p.dwords::<S>(0, 32 * block + 16 * big + quarter % 2 * 8 + j);
                let high = p.dwords::<S>(1, 16 * block + 8 * big + j);
                let low = S::and(S::shr(low, 4 * (quarter / 2) as u32), S::splat_i(0x0F0F_0F0F));
                let high = S::and(S::shr(high, 2 * quarter as u32), S::splat_i(0x0303_0303));
                S::or(low, S::shl(high, 4))
            })
        });
        part!(scale -> S::F, |p, s| p.halves::<S>(3, s / 8));
        part!(half_scales -> (S::I, S::I), |p, s| {
            // scales 2s and 2s+1 of the 16 signed bytes of a row
            let dword = p.dwords::<S>(2, s / 8 * 4 + s % 8 / 2);
            let at = 16 * (s % 2) as u32;
            let byte = |at: u32| S::sar(S::shl(dword, 24 - at), 24);
            (byte(at), byte(at + 8))
        });
    });
}

pub(crate) use formats::{Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};
