//! The selection over vectors of 16 lanes, each equal to its specification in `scalar`.

use super::scalar;
use crate::matrix::ROW_GROUP;
use crate::simd::F32x16;

/// # Safety
/// The machine has V's instructions; `out` has a value for each 16 of `scores`.
#[inline(always)]
pub(super) unsafe fn group_maxima<V: F32x16>(scores: &[f32], out: &mut [f32]) {
    let (groups, tail) = scores.as_chunks::<ROW_GROUP>();
    for (group, out) in groups.iter().zip(out.iter_mut()) {
        // SAFETY: the group has 16 values; a NaN becomes −∞.
        unsafe {
            let lanes = V::load(group.as_ptr()).max(V::splat(f32::NEG_INFINITY));
            *out = lanes.max_lane();
        }
    }
    scalar::group_maxima(tail, &mut out[groups.len()..]);
}

/// # Safety
/// The machine has V's instructions.
#[inline(always)]
pub(super) unsafe fn kth_largest<V: F32x16>(values: &[f32], k: usize) -> f32 {
    // compiled for the tier, the count runs in its vectors
    scalar::search(|threshold| scalar::count_at_least(values, threshold) >= k)
}
