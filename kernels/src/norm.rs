//! RMS normalisation.

use crate::cpu::Cpu;
use crate::simd::by_tier;

/// out\[i\] = x\[i\] / √(mean(x²) + eps) · weight\[i\], all `[n_embd]` f32. Overwrites `out`.
///
/// The sum of squares runs in the fixed 16-lane order. Zhang and Sennrich, "Root Mean Square Layer
/// Normalization" (2019).
///
/// # Panics
/// When the lengths differ or are 0.
pub fn rms_norm(cpu: Cpu, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert!(
        x.len() == weight.len() && x.len() == out.len(),
        "lengths of a norm"
    );
    assert!(!x.is_empty(), "a norm of nothing");
    by_tier!(
        cpu,
        scalar::rms_norm,
        vector::rms_norm,
        (x: &[f32], weight: &[f32], eps: f32, out: &mut [f32])
    )
}

/// Whether [`rms_norm`] of `x` (`[n_embd]` f32) is what it should be: Σx² is finite.
///
/// It is not where a value is NaN or infinite, nor where the squares overflow: the scale would then
/// be 0, and the norm zeros that hide what went wrong.
pub fn can_be_normed(cpu: Cpu, x: &[f32]) -> bool {
    by_tier!(cpu, scalar::can_be_normed, vector::can_be_normed, (x: &[f32]) -> bool)
}

mod scalar {
    use crate::elementwise::scalar::dot;

    pub(super) fn can_be_normed(x: &[f32]) -> bool {
        dot(x, x).is_finite()
    }

    pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mean = dot(x, x) / x.len() as f32;
        let scale = 1.0 / (mean + eps).sqrt();
        for i in 0..x.len() {
            out[i] = x[i] * scale * weight[i];
        }
    }
}

mod vector {
    use crate::elementwise::vector::{load_up_to, store_up_to};
    use crate::simd::{F32x16, LANES};

    /// # Safety
    /// The machine has V's instructions.
    #[inline(always)]
    pub(super) unsafe fn can_be_normed<V: F32x16>(x: &[f32]) -> bool {
        // SAFETY: `x.len() - i` values lie behind i.
        unsafe {
            let mut lanes = V::splat(0.0);
            for i in (0..x.len()).step_by(LANES) {
                let v: V = load_up_to(x.as_ptr().add(i), x.len() - i);
                lanes = v.fma(v, lanes);
            }
            lanes.sum().is_finite()
        }
    }

    /// # Safety
    /// The machine has V's instructions; the lengths are equal.
    #[inline(always)]
    pub(super) unsafe fn rms_norm<V: F32x16>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        // SAFETY: `x.len() - i` values lie behind i in all three.
        unsafe {
            let mut lanes = V::splat(0.0);
            for i in (0..x.len()).step_by(LANES) {
                let v: V = load_up_to(x.as_ptr().add(i), x.len() - i);
                lanes = v.fma(v, lanes);
            }
            let mean = lanes.sum() / x.len() as f32;
            let scale = V::splat(1.0 / (mean + eps).sqrt());
            for i in (0..x.len()).step_by(LANES) {
                let n = x.len() - i;
                let v: V = load_up_to(x.as_ptr().add(i), n);
                let weight = load_up_to(weight.as_ptr().add(i), n);
                store_up_to(v.mul(scale).mul(weight), out.as_mut_ptr().add(i), n);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{can_be_normed, rms_norm};
    use crate::simd::tests::{assert_same, cpus, extremes, scalar};
    use crate::testing::Random;

    #[test]
    fn tiers_equal_the_specification() {
        let mut random = Random(5);
        for n in (1..70).chain([576, 4096]) {
            for extreme in [false, true] {
                let x = if extreme {
                    extremes(&mut random, n)
                } else {
                    random.activations(n)
                };
                let weight = random.floats(n);
                let mut want = vec![7.0; n];
                rms_norm(scalar(), &x, &weight, 1e-5, &mut want);
                for cpu in cpus() {
                    let mut got = vec![f32::NAN; n];
                    rms_norm(cpu, &x, &weight, 1e-5, &mut got);
                    assert_same(&got, &want, &format!("{} × {n}", cpu.tier()));
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_normed_is_found_wherever_it_is() {
        let mut random = Random(7);
        for n in (1..70).chain([576]) {
            for cpu in cpus() {
                let mut x = random.activations(n);
                assert!(can_be_normed(cpu, &x), "{} × {n}", cpu.tier());
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e19, -3e38] {
                    let at = (random.next() % n as u64) as usize;
                    let good = std::mem::replace(&mut x[at], bad);
                    assert!(!can_be_normed(cpu, &x), "{} × {n}: {bad}", cpu.tier());
                    x[at] = good;
                }
            }
        }
    }

    #[test]
    fn result_is_near_that_of_f64() {
        let mut random = Random(6);
        let (x, weight) = (random.activations(576), random.floats(576));
        let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / 576.0;
        let mut got = vec![7.0; 576];
        rms_norm(scalar(), &x, &weight, 1e-5, &mut got);
        for i in 0..576 {
            let want = f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i]);
            assert!(
                (f64::from(got[i]) - want).abs() <= 1e-6 * want.abs(),
                "value {i}"
            );
        }
    }
}
