//! The algorithms over vectors of 16 lanes, each equal to its specification in `scalar`.

use super::scalar::{EXP_COEFFICIENTS, EXP_RANGE, GELU_COEFFICIENTS, LN_2_HIGH, LN_2_LOW};
use crate::simd::{F32x16, LANES};

/// 16 or, at the end, `n` < 16 values (the others 0).
///
/// # Safety
/// The machine has V's instructions; `n` values can be read from `from`.
#[inline(always)]
pub(crate) unsafe fn load_up_to<V: F32x16>(from: *const f32, n: usize) -> V {
    // SAFETY: `n` values are readable, by the contract.
    unsafe {
        if n >= LANES {
            V::load(from)
        } else {
            V::load_first(from, n)
        }
    }
}

/// Writes 16 or, at the end, `n` < 16 values.
///
/// # Safety
/// `n` values can be written to `to`.
#[inline(always)]
pub(crate) unsafe fn store_up_to<V: F32x16>(v: V, to: *mut f32, n: usize) {
    // SAFETY: `n` values are writable, by the contract.
    unsafe {
        if n >= LANES {
            v.store(to)
        } else {
            v.store_first(to, n)
        }
    }
}

/// exp(x), operation for operation as `scalar::exp`.
///
/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(crate) unsafe fn exp<V: F32x16>(x: V) -> V {
    // SAFETY: the machine has V's instructions, by the contract.
    unsafe {
        let x = V::splat(EXP_RANGE[0]).max(x);
        let x = V::splat(EXP_RANGE[1]).min(x);
        let n = x.mul(V::splat(std::f32::consts::LOG2_E)).round();
        let r = n.fma(V::splat(-LN_2_HIGH), x);
        let r = n.fma(V::splat(-LN_2_LOW), r);
        let mut p = V::splat(EXP_COEFFICIENTS[0]);
        for c in &EXP_COEFFICIENTS[1..] {
            p = p.fma(r, V::splat(*c));
        }
        let p = p.fma(r.mul(r), r).add(V::splat(1.0));
        p.mul_pow2(n)
    }
}

/// # Safety
/// The machine has V's instructions; the lengths are equal. So in all functions below.
#[inline(always)]
pub(super) unsafe fn add_assign<V: F32x16>(x: &mut [f32], y: &[f32]) {
    for i in (0..x.len()).step_by(LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values lie behind i in both.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            let sum = load_up_to::<V>(to, n).add(load_up_to(y.as_ptr().add(i), n));
            store_up_to(sum, to, n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn mul<V: F32x16>(a: &[f32], b: &[f32], out: &mut [f32]) {
    for i in (0..out.len()).step_by(LANES) {
        let n = out.len() - i;
        // SAFETY: `n` values lie behind i in all three.
        unsafe {
            let a: V = load_up_to(a.as_ptr().add(i), n);
            let b: V = load_up_to(b.as_ptr().add(i), n);
            store_up_to(a.mul(b), out.as_mut_ptr().add(i), n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn silu_mul<V: F32x16>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in (0..out.len()).step_by(LANES) {
        let n = out.len() - i;
        // SAFETY: `n` values lie behind i in all three.
        unsafe {
            let gate: V = load_up_to(gate.as_ptr().add(i), n);
            let up: V = load_up_to(up.as_ptr().add(i), n);
            let divisor = V::splat(1.0).add(exp(gate.mul(V::splat(-1.0))));
            store_up_to(gate.div(divisor).mul(up), out.as_mut_ptr().add(i), n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn silu_in_place<V: F32x16>(x: &mut [f32]) {
    for i in (0..x.len()).step_by(LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values lie behind i.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            let gate: V = load_up_to(to, n);
            let divisor = V::splat(1.0).add(exp(gate.mul(V::splat(-1.0))));
            store_up_to(gate.div(divisor), to, n);
        }
    }
}

/// # Safety
/// The machine has V's instructions.
#[inline(always)]
unsafe fn gelu<V: F32x16>(x: V) -> V {
    // SAFETY: the machine has V's instructions, by the contract.
    unsafe {
        let [c0, c1] = GELU_COEFFICIENTS;
        let factor = x.mul(x).fma(V::splat(c1), V::splat(c0));
        x.div(V::splat(1.0).add(exp(factor.mul(x))))
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn gelu_mul<V: F32x16>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in (0..out.len()).step_by(LANES) {
        let n = out.len() - i;
        // SAFETY: `n` values lie behind i in all three.
        unsafe {
            let gate: V = load_up_to(gate.as_ptr().add(i), n);
            let up: V = load_up_to(up.as_ptr().add(i), n);
            store_up_to(gelu(gate).mul(up), out.as_mut_ptr().add(i), n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn gelu_in_place<V: F32x16>(x: &mut [f32]) {
    for i in (0..x.len()).step_by(LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values lie behind i.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            store_up_to(gelu(load_up_to::<V>(to, n)), to, n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn relu_mul<V: F32x16>(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in (0..out.len()).step_by(LANES) {
        let n = out.len() - i;
        // SAFETY: `n` values lie behind i in all three.
        unsafe {
            let gate: V = load_up_to(gate.as_ptr().add(i), n);
            let up: V = load_up_to(up.as_ptr().add(i), n);
            let product = gate.zero_unless_positive(gate.mul(up));
            store_up_to(product, out.as_mut_ptr().add(i), n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn div_assign<V: F32x16>(x: &mut [f32], divisor: f32) {
    for i in (0..x.len()).step_by(LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values lie behind i.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            store_up_to(load_up_to::<V>(to, n).div(V::splat(divisor)), to, n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn exp_in_place<V: F32x16>(x: &mut [f32]) {
    for i in (0..x.len()).step_by(LANES) {
        let n = x.len() - i;
        // SAFETY: `n` values lie behind i.
        unsafe {
            let to = x.as_mut_ptr().add(i);
            store_up_to(exp(load_up_to::<V>(to, n)), to, n);
        }
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn max<V: F32x16>(x: &[f32]) -> f32 {
    // SAFETY: whole vectors lie within `x`; the tail is copied into a padded buffer.
    unsafe {
        let mut lanes = V::splat(f32::NEG_INFINITY);
        let (vectors, tail) = x.as_chunks::<LANES>();
        for vector in vectors {
            lanes = V::load(vector.as_ptr()).max(lanes);
        }
        let mut padded = [f32::NEG_INFINITY; LANES];
        padded[..tail.len()].copy_from_slice(tail);
        V::load(padded.as_ptr()).max(lanes).max_lane()
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn sum<V: F32x16>(x: &[f32]) -> f32 {
    // SAFETY: `x.len() - i` values lie behind i.
    unsafe {
        // a lane that starts at +0 never becomes −0, so the zeros of the tail change nothing
        let mut lanes = V::splat(0.0);
        for i in (0..x.len()).step_by(LANES) {
            lanes = lanes.add(load_up_to(x.as_ptr().add(i), x.len() - i));
        }
        lanes.sum()
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn exp_sum_in_place<V: F32x16>(x: &mut [f32], max: f32) -> f32 {
    // SAFETY: `n` values lie behind i.
    unsafe {
        let mut lanes = V::splat(0.0);
        for i in (0..x.len()).step_by(LANES) {
            let n = x.len() - i;
            let to = x.as_mut_ptr().add(i);
            let e = exp(load_up_to::<V>(to, n).sub(V::splat(max)));
            if n >= LANES {
                e.store(to);
                lanes = lanes.add(e);
            } else {
                e.store_first(to, n);
                lanes = lanes.add(V::load_first(to, n));
            }
        }
        lanes.sum()
    }
}

/// # Safety
/// As [`add_assign`].
#[inline(always)]
pub(super) unsafe fn all_finite<V: F32x16>(x: &[f32]) -> bool {
    // SAFETY: `n` values lie behind i.
    unsafe {
        // 0 · x is NaN for NaN and infinities, else ±0
        let mut zero = V::splat(0.0);
        for i in (0..x.len()).step_by(LANES) {
            let v: V = load_up_to(x.as_ptr().add(i), x.len() - i);
            zero = v.fma(V::splat(0.0), zero);
        }
        !zero.sum().is_nan()
    }
}
