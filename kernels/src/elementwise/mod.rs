//! Elementwise f32 kernels, and the reductions and the exponential that others build on.
//!
//! Sums run in 16 lanes: element k belongs to lane k mod 16, a lane adds its elements in ascending
//! order, and lanes are joined by the tree (j, j+8), (j, j+4), (j, j+2), (j, j+1). Every tier gives
//! the bits of [`scalar`](self), NaN payloads excepted.

pub(crate) mod scalar;
#[cfg(test)]
mod tests;
pub(crate) mod vector;

use crate::cpu::Cpu;
use crate::simd::by_tier;

/// x\[i\] += y\[i\], both `[n]` f32. Accumulates into `x`.
///
/// # Panics
/// When the lengths differ.
pub fn add_assign(cpu: Cpu, x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len(), "lengths of a sum");
    by_tier!(cpu, scalar::add_assign, vector::add_assign, (x: &mut [f32], y: &[f32]))
}

/// out\[i\] = a\[i\] · b\[i\], all `[n]` f32. Overwrites `out`.
///
/// # Panics
/// When the lengths differ.
pub fn mul(cpu: Cpu, a: &[f32], b: &[f32], out: &mut [f32]) {
    assert!(
        a.len() == b.len() && a.len() == out.len(),
        "lengths of a product"
    );
    by_tier!(cpu, scalar::mul, vector::mul, (a: &[f32], b: &[f32], out: &mut [f32]))
}

/// out\[i\] = silu(gate\[i\]) · up\[i\] with silu(x) = x / (1 + exp(−x)), all `[n]` f32.
/// Overwrites `out`.
///
/// silu(−∞) is NaN, so that an overflow surfaces; below −88.7, where exp(−x) exceeds f32, it is −0.
///
/// # Panics
/// When the lengths differ.
pub fn silu_mul(cpu: Cpu, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && gate.len() == out.len(),
        "lengths of a gated product"
    );
    by_tier!(
        cpu,
        scalar::silu_mul,
        vector::silu_mul,
        (gate: &[f32], up: &[f32], out: &mut [f32])
    )
}

/// x\[i\] = silu(x\[i\]), `[n]` f32, as [`silu_mul`] has it: times up it gives that one's bits.
/// Overwrites `x`.
pub fn silu_in_place(cpu: Cpu, x: &mut [f32]) {
    by_tier!(cpu, scalar::silu_in_place, vector::silu_in_place, (x: &mut [f32]))
}

/// out\[i\] = gelu(gate\[i\]) · up\[i\], all `[n]` f32, with the tanh form of GELU: gelu(x) = x/2 · (1 + tanh(u)) for
/// u = √(2/π) · (x + 0.044715 x³). Overwrites `out`.
///
/// Computed as x / (1 + exp(−2u)), which is the same number and keeps its digits where tanh is near −1. gelu(−∞) is NaN,
/// as of [`silu_mul`]; below about −10, where exp(−2u) exceeds f32, it is −0.
///
/// Source: Hendrycks and Gimpel, *Gaussian Error Linear Units*, section 2.
///
/// # Panics
/// When the lengths differ.
pub fn gelu_mul(cpu: Cpu, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && gate.len() == out.len(),
        "lengths of a gated product"
    );
    by_tier!(
        cpu,
        scalar::gelu_mul,
        vector::gelu_mul,
        (gate: &[f32], up: &[f32], out: &mut [f32])
    )
}

/// x\[i\] = gelu(x\[i\]), `[n]` f32, as [`gelu_mul`] has it: times up it gives that one's bits.
/// Overwrites `x`.
pub fn gelu_in_place(cpu: Cpu, x: &mut [f32]) {
    by_tier!(cpu, scalar::gelu_in_place, vector::gelu_in_place, (x: &mut [f32]))
}

/// out\[i\] = max(gate\[i\], 0) · up\[i\], all `[n]` f32. Overwrites `out`.
///
/// A closed gate (≤ 0) gives +0 whatever `up` holds, as if the neuron had been skipped; a NaN gate
/// gives NaN.
///
/// # Panics
/// When the lengths differ.
pub fn relu_mul(cpu: Cpu, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(
        gate.len() == up.len() && gate.len() == out.len(),
        "lengths of a gated product"
    );
    by_tier!(
        cpu,
        scalar::relu_mul,
        vector::relu_mul,
        (gate: &[f32], up: &[f32], out: &mut [f32])
    )
}

/// x\[i\] = exp(x\[i\]), `[n]` f32. Overwrites `x`.
///
/// Within 2 ulp; exp(−∞) = 0, overflow gives +∞, NaN stays NaN.
pub fn exp_in_place(cpu: Cpu, x: &mut [f32]) {
    by_tier!(cpu, scalar::exp_in_place, vector::exp_in_place, (x: &mut [f32]))
}

/// Largest value of `x` (`[n]` f32), NaN left out; −∞ where there is none.
pub fn max(cpu: Cpu, x: &[f32]) -> f32 {
    by_tier!(cpu, scalar::max, vector::max, (x: &[f32]) -> f32)
}

/// Sum of `x` (`[n]` f32) in the fixed 16-lane order.
pub fn sum(cpu: Cpu, x: &[f32]) -> f32 {
    by_tier!(cpu, scalar::sum, vector::sum, (x: &[f32]) -> f32)
}

/// x\[i\] = exp(x\[i\] − max), `[n]` f32; returns the sum of the results. Overwrites `x`.
pub fn exp_sum_in_place(cpu: Cpu, x: &mut [f32], max: f32) -> f32 {
    by_tier!(
        cpu,
        scalar::exp_sum_in_place,
        vector::exp_sum_in_place,
        (x: &mut [f32], max: f32) -> f32
    )
}

/// x\[i\] = exp(x\[i\] − max x) / Σ exp(x\[j\] − max x), `[n]` f32. Overwrites `x`.
///
/// Within (⌈n / 16⌉ + 14) · 2⁻²⁴ of the value where that is no subnormal. A NaN or +∞ anywhere makes
/// all of it NaN.
pub fn softmax_in_place(cpu: Cpu, x: &mut [f32]) {
    let max = max(cpu, x);
    let sum = exp_sum_in_place(cpu, x, max);
    by_tier!(cpu, scalar::div_assign, vector::div_assign, (x: &mut [f32], sum: f32))
}

/// Index of the largest value of `x` (`[n]` f32): the lowest one where several are equal.
///
/// NaN is never chosen; `None` where there is nothing but NaN.
pub fn argmax(cpu: Cpu, x: &[f32]) -> Option<usize> {
    let largest = max(cpu, x);
    x.iter().position(|&value| value == largest)
}

/// Whether no value of `x` (`[n]` f32) is NaN or infinite.
pub fn all_finite(cpu: Cpu, x: &[f32]) -> bool {
    by_tier!(cpu, scalar::all_finite, vector::all_finite, (x: &[f32]) -> bool)
}
