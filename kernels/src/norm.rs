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

mod scalar {
    use crate::elementwise::scalar::dot;

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
