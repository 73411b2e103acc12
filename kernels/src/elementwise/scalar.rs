//! The specification: plain loops, one element at a time.

use crate::simd::LANES;

/// Below it exp is 0 in f32, above it infinite.
pub(crate) const EXP_RANGE: [f32; 2] = [-105.0, 90.0];
/// ln 2 = `LN_2_HIGH` + `LN_2_LOW`; n · `LN_2_HIGH` is exact for the n in use.
pub(crate) const LN_2_HIGH: f32 = 355.0 / 512.0;
/// See [`LN_2_HIGH`].
pub(crate) const LN_2_LOW: f32 = -2.121_944_4e-4;
/// exp(r) ≈ 1 + r + r² · (c₀ r⁴ + c₁ r³ + … + c₅) for |r| ≤ ln 2 / 2, highest power first.
/// Source: Cephes, `expf`.
pub(crate) const EXP_COEFFICIENTS: [f32; 6] = [
    1.987_569_1e-4,
    1.398_199_9e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    0.166_666_66,
    0.5,
];

/// −2u of GELU is x · (c₀ + c₁ x²), with −2√(2/π) and that times 0.044715.
pub(super) const GELU_COEFFICIENTS: [f32; 2] = [-1.595_769_2, -0.071_354_814];

/// exp(x) within 2 ulp: x = n ln 2 + r, a polynomial in r, times 2ⁿ.
pub(crate) fn exp(x: f32) -> f32 {
    // comparisons that are false for NaN, which thus goes through
    let x = if EXP_RANGE[0] > x { EXP_RANGE[0] } else { x };
    let x = if EXP_RANGE[1] < x { EXP_RANGE[1] } else { x };
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN_2_HIGH, x);
    let r = n.mul_add(-LN_2_LOW, r);
    let mut p = EXP_COEFFICIENTS[0];
    for c in &EXP_COEFFICIENTS[1..] {
        p = p.mul_add(r, *c);
    }
    let p = p.mul_add(r * r, r) + 1.0;
    // in two steps, so that neither factor leaves f32's range; only the last one can round
    let n = n as i32;
    let half = n >> 1;
    p * pow2(half) * pow2(n - half)
}

/// 2ⁿ for n in −126 … 127.
fn pow2(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// Joins 16 lanes by the fixed tree.
pub(crate) fn join_lanes(mut lanes: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    for width in [8, 4, 2, 1] {
        for j in 0..width {
            lanes[j] = join(lanes[j], lanes[j + width]);
        }
    }
    lanes[0]
}

/// The larger one; b where either is NaN.
pub(crate) fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Sum of products in the fixed order; both are padded with zeros to a multiple of 16.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    for k in 0..a.len().next_multiple_of(LANES) {
        let (a, b) = if k < a.len() {
            (a[k], b[k])
        } else {
            (0.0, 0.0)
        };
        lanes[k % LANES] = a.mul_add(b, lanes[k % LANES]);
    }
    join_lanes(lanes, |a, b| a + b)
}

pub(super) fn add_assign(x: &mut [f32], y: &[f32]) {
    for i in 0..x.len() {
        x[i] += y[i];
    }
}

pub(super) fn mul(a: &[f32], b: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = a[i] * b[i];
    }
}

pub(super) fn silu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = gate[i] / (1.0 + exp(-gate[i])) * up[i];
    }
}

pub(super) fn silu_in_place(x: &mut [f32]) {
    for value in x {
        *value /= 1.0 + exp(-*value);
    }
}

fn gelu(x: f32) -> f32 {
    let [c0, c1] = GELU_COEFFICIENTS;
    x / (1.0 + exp((x * x).mul_add(c1, c0) * x))
}

pub(super) fn gelu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = gelu(gate[i]) * up[i];
    }
}

pub(super) fn gelu_in_place(x: &mut [f32]) {
    for value in x {
        *value = gelu(*value);
    }
}

pub(super) fn relu_mul(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for i in 0..out.len() {
        out[i] = if gate[i] <= 0.0 { 0.0 } else { gate[i] * up[i] };
    }
}

pub(super) fn div_assign(x: &mut [f32], divisor: f32) {
    for value in x {
        *value /= divisor;
    }
}

pub(super) fn exp_in_place(x: &mut [f32]) {
    for value in x {
        *value = exp(*value);
    }
}

pub(super) fn max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for (k, &value) in x.iter().enumerate() {
        lanes[k % LANES] = larger(value, lanes[k % LANES]);
    }
    join_lanes(lanes, larger)
}

pub(super) fn sum(x: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    for (k, &value) in x.iter().enumerate() {
        lanes[k % LANES] += value;
    }
    join_lanes(lanes, |a, b| a + b)
}

pub(super) fn exp_sum_in_place(x: &mut [f32], max: f32) -> f32 {
    for value in x.iter_mut() {
        *value = exp(*value - max);
    }
    sum(x)
}

pub(super) fn all_finite(x: &[f32]) -> bool {
    x.iter().all(|value| value.is_finite())
}
