//! Vectors of 16 f32 lanes, one type per instruction-set tier, and the choice between them.
//!
//! An algorithm is written once over [`F32x16`]. Each operation is exact or rounds once, as its
//! scalar counterpart does, and sums over lanes follow one fixed tree; so every tier gives the same
//! bits as the scalar specification (NaN stays NaN; its payload is not specified).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(test)]
pub(crate) mod f32x16_scalar;
#[cfg(test)]
pub(crate) mod tests;

/// Lanes of a vector: element k of a sum belongs to lane k mod 16.
pub(crate) const LANES: usize = 16;

/// 16 lanes of f32.
///
/// A value of an implementing type exists only where its instructions do: the constructors are
/// unsafe, so the operations on values need not be.
pub(crate) trait F32x16: Copy {
    /// Eight lanes, what is left of a vector after the first step of the tree.
    type Half: Copy;

    /// Whether there are registers for tiles of 6 rows × 4 vectors; else for 3 rows × 2 vectors.
    const WIDE: bool;

    /// The same value in each lane.
    ///
    /// # Safety
    /// The machine has the tier.
    unsafe fn splat(value: f32) -> Self;

    /// Lanes from 16 values.
    ///
    /// # Safety
    /// The machine has the tier; 16 values can be read from `from`, of any alignment.
    unsafe fn load(from: *const f32) -> Self;

    /// Lanes from the first `n` < 16 values, the others 0.
    ///
    /// # Safety
    /// The machine has the tier; `n` values can be read from `from`.
    unsafe fn load_first(from: *const f32, n: usize) -> Self;

    /// Lanes from 16 values of f16.
    ///
    /// # Safety
    /// The machine has the tier; 16 values can be read from `from`, of any alignment.
    unsafe fn load_f16(from: *const u16) -> Self;

    /// Writes 16 values.
    ///
    /// # Safety
    /// 16 values can be written to `to`, of any alignment.
    unsafe fn store(self, to: *mut f32);

    /// Writes the first `n` < 16 values.
    ///
    /// # Safety
    /// `n` values can be written to `to`.
    unsafe fn store_first(self, to: *mut f32, n: usize);

    /// Writes 16 values rounded to f16, ties to even.
    ///
    /// # Safety
    /// 16 values can be written to `to`, of any alignment.
    unsafe fn store_f16(self, to: *mut u16);

    /// self + b
    fn add(self, b: Self) -> Self;
    /// self − b
    fn sub(self, b: Self) -> Self;
    /// self · b
    fn mul(self, b: Self) -> Self;
    /// self / b
    fn div(self, b: Self) -> Self;
    /// self · b + c, rounded once
    fn fma(self, b: Self, c: Self) -> Self;
    /// `if self > b { self } else { b }`: b where either is NaN
    fn max(self, b: Self) -> Self;
    /// `if self < b { self } else { b }`: b where either is NaN
    fn min(self, b: Self) -> Self;
    /// To the nearest integer, ties to even
    fn round(self) -> Self;
    /// self · 2ⁿ for |self| in 0.5 … 2 and integral n in −160 … 160, rounded once; NaN stays NaN
    fn mul_pow2(self, n: Self) -> Self;
    /// 0 where self ≤ 0, else `value` (also where self is NaN)
    fn zero_unless_positive(self, value: Self) -> Self;
    /// Lanes 2i and 2i + 1 exchanged
    fn swap_pairs(self) -> Self;
    /// Lane j + lane j + 8
    fn fold(self) -> Self::Half;
    /// Sum of all lanes by the tree (j, j+8), (j, j+4), (j, j+2), (j, j+1)
    fn sum(self) -> f32;
    /// Maximum of all lanes by the same tree; lanes are not NaN
    fn max_lane(self) -> f32;

    /// Finishes the sums of eight folded vectors by the same tree.
    ///
    /// # Safety
    /// 8 values can be written to `to`.
    unsafe fn store_sums(halves: [Self::Half; 8], to: *mut f32);

    /// Asks for the cache line at `from`, which need not exist.
    fn prefetch(from: *const u8);

    /// Lanes from the first `n` < 16 values of f16, the others 0.
    ///
    /// # Safety
    /// The machine has the tier; `n` values can be read from `from`, of any alignment.
    #[inline(always)]
    unsafe fn load_f16_first(from: *const u16, n: usize) -> Self {
        let mut values = [0u16; LANES];
        // SAFETY: `n` < 16 values can be read, by the contract; the buffer has 16.
        unsafe {
            std::ptr::copy_nonoverlapping(from.cast::<u8>(), values.as_mut_ptr().cast(), 2 * n);
            Self::load_f16(values.as_ptr())
        }
    }

    /// Writes the first `n` < 16 values rounded to f16.
    ///
    /// # Safety
    /// `n` values can be written to `to`, of any alignment.
    #[inline(always)]
    unsafe fn store_f16_first(self, to: *mut u16, n: usize) {
        let mut values = [0u16; LANES];
        // SAFETY: `n` < 16 values can be written, by the contract; the buffer has 16.
        unsafe {
            self.store_f16(values.as_mut_ptr());
            std::ptr::copy_nonoverlapping(values.as_ptr().cast::<u8>(), to.cast(), 2 * n);
        }
    }
}

/// Calls the specification or the vector algorithm, compiled for the tier of `$cpu`.
///
/// The vector algorithm is an `#[inline(always)] unsafe fn f<V: F32x16>(…)` whose only demand is
/// that the machine has V's instructions.
macro_rules! by_tier {
    ($cpu:expr, $spec:path, $($vector:ident)::+, ($($arg:ident: $type:ty),* $(,)?) $(-> $out:ty)?) => {{
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2($($arg: $type),*) $(-> $out)? {
                // SAFETY: this function is called only where its features are.
                unsafe { $($vector)::+::<$crate::simd::avx2::Avx2>($($arg),*) }
            }
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512($($arg: $type),*) $(-> $out)? {
                // SAFETY: this function is called only where its features are.
                unsafe { $($vector)::+::<$crate::simd::avx512::Avx512>($($arg),*) }
            }
            match $cpu.tier() {
                $crate::cpu::Tier::Scalar => $spec($($arg),*),
                // SAFETY: a `Cpu` exists only for tiers that the machine has.
                $crate::cpu::Tier::Avx2 => unsafe { avx2($($arg),*) },
                $crate::cpu::Tier::Avx512 | $crate::cpu::Tier::Avx512Vnni | $crate::cpu::Tier::Avx512Amx => {
                    // SAFETY: as above.
                    unsafe { avx512($($arg),*) }
                }
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = $cpu;
            $spec($($arg),*)
        }
    }};
}
pub(crate) use by_tier;
