//! Sixteen lanes in an array: the vector algorithms on any machine, for tests.

use half::f16;

use super::{F32x16, LANES};

/// Sixteen lanes without any instruction set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Array([f32; LANES]);

impl Array {
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|j| f(self.0[j], b.0[j])))
    }
}

impl F32x16 for Array {
    type Half = [f32; 8];

    const WIDE: bool = false;

    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: 16 values are readable, by the contract.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        let mut lanes = [0.0; LANES];
        // SAFETY: n values are readable, by the contract.
        lanes[..n].copy_from_slice(unsafe { std::slice::from_raw_parts(from, n) });
        Self(lanes)
    }

    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: 16 values are readable, by the contract.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|b| f16::from_bits(b).to_f32()))
    }

    unsafe fn store(self, to: *mut f32) {
        // SAFETY: 16 values are writable, by the contract.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    unsafe fn store_first(self, to: *mut f32, n: usize) {
        // SAFETY: n values are writable, by the contract.
        unsafe { std::slice::from_raw_parts_mut(to, n) }.copy_from_slice(&self.0[..n]);
    }

    unsafe fn store_f16(self, to: *mut u16) {
        let bits = self.0.map(|x| f16::from_f32(x).to_bits());
        // SAFETY: 16 values are writable, by the contract.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }

    fn add(self, b: Self) -> Self {
        self.zip(b, |a, b| a + b)
    }

    fn sub(self, b: Self) -> Self {
        self.zip(b, |a, b| a - b)
    }

    fn mul(self, b: Self) -> Self {
        self.zip(b, |a, b| a * b)
    }

    fn div(self, b: Self) -> Self {
        self.zip(b, |a, b| a / b)
    }

    fn fma(self, b: Self, c: Self) -> Self {
        Self(std::array::from_fn(|j| self.0[j].mul_add(b.0[j], c.0[j])))
    }

    fn max(self, b: Self) -> Self {
        self.zip(b, |a, b| if a > b { a } else { b })
    }

    fn min(self, b: Self) -> Self {
        self.zip(b, |a, b| if a < b { a } else { b })
    }

    fn round(self) -> Self {
        Self(self.0.map(f32::round_ties_even))
    }

    fn mul_pow2(self, n: Self) -> Self {
        self.zip(n, |x, n| (f64::from(x) * f64::from(n).exp2()) as f32)
    }

    fn zero_unless_positive(self, value: Self) -> Self {
        self.zip(value, |x, value| if x <= 0.0 { 0.0 } else { value })
    }

    fn swap_pairs(self) -> Self {
        Self(std::array::from_fn(|j| self.0[j ^ 1]))
    }

    fn fold(self) -> [f32; 8] {
        std::array::from_fn(|j| self.0[j] + self.0[j + 8])
    }

    fn sum(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for j in 0..width {
                lanes[j] += lanes[j + width];
            }
        }
        lanes[0]
    }

    fn max_lane(self) -> f32 {
        let mut lanes = self.0;
        for width in [8, 4, 2, 1] {
            for j in 0..width {
                lanes[j] = if lanes[j] > lanes[j + width] {
                    lanes[j]
                } else {
                    lanes[j + width]
                };
            }
        }
        lanes[0]
    }

    unsafe fn store_sums(halves: [[f32; 8]; 8], to: *mut f32) {
        for (i, half) in halves.into_iter().enumerate() {
            let mut lanes = [0.0; LANES];
            lanes[..8].copy_from_slice(&half);
            // SAFETY: 8 values are writable, by the contract.
            unsafe { to.add(i).write(Self(lanes).sum()) }
        }
    }

    fn prefetch(_from: *const u8) {}
}
