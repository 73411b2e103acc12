//! The rotation of one head.

use super::RopePairs;
use crate::simd::{F32x16, LANES};

/// One pair, from its values and each one's cosine and signed sine.
fn rotate(x: [f32; 2], cos: [f32; 2], sin: [f32; 2]) -> [f32; 2] {
    [
        x[0].mul_add(cos[0], x[1] * sin[0]),
        x[1].mul_add(cos[1], x[0] * sin[1]),
    ]
}

/// The specification: pair by pair. All slices are `[n_dims]` f32.
pub(super) fn scalar(pairs: RopePairs, cos: &[f32], sin: &[f32], head: &mut [f32]) {
    pairs_from(pairs, 0, cos, sin, head);
}

/// Rotates pairs `start` to the last one.
#[inline(always)]
fn pairs_from(pairs: RopePairs, start: usize, cos: &[f32], sin: &[f32], head: &mut [f32]) {
    let n_pairs = head.len() / 2;
    for pair in start..n_pairs {
        let (i, j) = match pairs {
            RopePairs::Adjacent => (2 * pair, 2 * pair + 1),
            RopePairs::Halves => (pair, pair + n_pairs),
        };
        let rotated = rotate([head[i], head[j]], [cos[i], cos[j]], [sin[i], sin[j]]);
        [head[i], head[j]] = rotated;
    }
}

/// Sixteen dimensions, or sixteen pairs, at a time.
///
/// # Safety
/// The machine has V's instructions; `cos` and `sin` are as long as `head`.
#[inline(always)]
pub(super) unsafe fn vector<V: F32x16>(
    pairs: RopePairs,
    cos: &[f32],
    sin: &[f32],
    head: &mut [f32],
) {
    let n_pairs = head.len() / 2;
    let (cos_at, sin_at, head_at) = (cos.as_ptr(), sin.as_ptr(), head.as_mut_ptr());
    let done = match pairs {
        RopePairs::Adjacent => {
            let whole = head.len() - head.len() % LANES;
            for i in (0..whole).step_by(LANES) {
                // SAFETY: 16 values lie behind i in all three.
                unsafe {
                    let x = V::load(head_at.add(i));
                    let turned = x.swap_pairs().mul(V::load(sin_at.add(i)));
                    x.fma(V::load(cos_at.add(i)), turned).store(head_at.add(i));
                }
            }
            whole / 2
        }
        RopePairs::Halves => {
            let whole = n_pairs - n_pairs % LANES;
            for i in (0..whole).step_by(LANES) {
                let j = i + n_pairs;
                // SAFETY: 16 values lie behind i, and behind j, in all three.
                unsafe {
                    let (x, y) = (V::load(head_at.add(i)), V::load(head_at.add(j)));
                    let turned = y.mul(V::load(sin_at.add(i)));
                    x.fma(V::load(cos_at.add(i)), turned).store(head_at.add(i));
                    let turned = x.mul(V::load(sin_at.add(j)));
                    y.fma(V::load(cos_at.add(j)), turned).store(head_at.add(j));
                }
            }
            whole
        }
    };
    pairs_from(pairs, done, cos, sin, head);
}
