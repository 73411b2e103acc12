//! Expectations over normal variables: z is standard normal, φ its density, Φ its distribution.

use std::f64::consts::{FRAC_1_SQRT_2, PI};

/// Points of [`expect`].
const N_POINTS: usize = 281;
/// Where [`expect`] cuts the density off.
const END: f64 = 7.0;

/// φ(v)
pub(super) fn density(v: f64) -> f64 {
    (-0.5 * v * v).exp() / (2.0 * PI).sqrt()
}

/// Φ(v)
pub(super) fn below(v: f64) -> f64 {
    0.5 * libm::erfc(-v * FRAC_1_SQRT_2)
}

/// The v with Φ(v) = `share`, which is above 0 and below 1.
pub(super) fn quantile(share: f64) -> f64 {
    increasing_root(-9.0, 9.0, |v| below(v) - share)
}

/// E[max(z + v, 0)]
pub(super) fn excess(v: f64) -> f64 {
    density(v) + v * below(v)
}

/// E[max(z + v, 0)²]
pub(super) fn excess_square(v: f64) -> f64 {
    (1.0 + v * v) * below(v) + v * density(v)
}

/// From one of [`points`] to the next.
pub(super) const STEP: f64 = 2.0 * END / (N_POINTS - 1) as f64;

/// Values that stand for all in sums over z.
pub(super) fn points() -> impl Iterator<Item = f64> {
    (0..N_POINTS).map(|i| -END + STEP * i as f64)
}

/// E[f(z)], by the trapezoid rule.
pub(super) fn expect(f: impl Fn(f64) -> f64) -> f64 {
    points().map(|z| density(z) * f(z)).sum::<f64>() * STEP
}

/// Where the increasing `f` crosses 0 between `low` and `high`; one of the two where it doesn't.
pub(super) fn increasing_root(mut low: f64, mut high: f64, f: impl Fn(f64) -> f64) -> f64 {
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if f(middle) < 0.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        assert!((below(1.0) - 0.841_344_746).abs() < 1e-8);
        assert!((quantile(0.975) - 1.959_963_985).abs() < 1e-8);
        assert!((expect(|z| z * z) - 1.0).abs() < 1e-9);
        for v in [-2.0, -0.3, 1.0] {
            assert!((expect(|z| (z + v).max(0.0)) - excess(v)).abs() < 1e-3);
            assert!((expect(|z| (z + v).max(0.0).powi(2)) - excess_square(v)).abs() < 1e-3);
        }
    }
}
