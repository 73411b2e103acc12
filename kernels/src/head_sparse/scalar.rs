//! What the selection means.

use crate::matrix::ROW_GROUP;

pub(super) fn group_maxima(scores: &[f32], out: &mut [f32]) {
    for (group, out) in scores.chunks(ROW_GROUP).zip(out) {
        let larger = |most: f32, &score: &f32| if score > most { score } else { most };
        *out = group.iter().fold(f32::NEG_INFINITY, larger);
    }
}

pub(super) fn kth_largest(values: &[f32], k: usize) -> f32 {
    search(|threshold| count_at_least(values, threshold) >= k)
}

#[inline(always)]
pub(super) fn count_at_least(values: &[f32], threshold: f32) -> usize {
    let reached = values.iter().map(|&value| u32::from(value >= threshold));
    reached.sum::<u32>() as usize
}

/// The largest number for which `holds`, which no larger one does; −∞ where it holds for none.
#[inline(always)]
pub(super) fn search(mut holds: impl FnMut(f32) -> bool) -> f32 {
    let (mut low, mut high) = (key(f32::NEG_INFINITY), key(f32::INFINITY));
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if holds(value(middle)) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    value(low)
}

/// Numbers in the order of the values, without gaps.
fn key(value: f32) -> u32 {
    let bits = value.to_bits();
    if bits >> 31 == 0 {
        bits | 1 << 31
    } else {
        !bits
    }
}

fn value(key: u32) -> f32 {
    f32::from_bits(if key >> 31 == 0 {
        !key
    } else {
        key & !(1 << 31)
    })
}
