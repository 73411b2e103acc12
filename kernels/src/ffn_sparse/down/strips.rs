//! What every fast `down` shares: strips of columns, and the sums of groups joined along the tree.

use std::ops::Range;

use super::super::tree::TreeStack;
use super::GroupSpan;
use crate::quant::BLOCK;

/// Blocks of columns that are taken through all neurons together, at most.
pub(super) const STRIP: usize = 24;

/// Divides columns `cols` into strips of nearly equal size, at most `most` blocks: ranges of blocks.
#[inline(always)]
pub(super) fn strips(
    cols: &Range<usize>,
    most: usize,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let (first, n_blocks) = (cols.start / BLOCK, cols.len() / BLOCK);
    let n_strips = n_blocks.div_ceil(most);
    (0..n_strips).map(move |n| {
        let bound = |n: usize| first + n_blocks * n / n_strips;
        bound(n)..bound(n + 1)
    })
}

/// Sums each group with `add`, which accumulates into `width` zeros, and joins the sums along the
/// tree: that of the `n`th complete subtree ends in `sums[n * size..][..width]` (overwritten).
///
/// # Panics
/// When `sums` has less than `size` values for each subtree and one group more.
#[inline(always)]
pub(super) fn sum_groups(
    groups: &[GroupSpan],
    sums: &mut [f32],
    size: usize,
    width: usize,
    mut add: impl FnMut(&Range<usize>, &mut [f32]),
) {
    let mut stack = TreeStack::new();
    let mut len = 0;
    for GroupSpan { group, span } in groups {
        let y = &mut sums[len * size..][..width];
        y.fill(0.0);
        add(span, y);
        len += 1;
        for _ in 0..stack.push(*group..group + 1) {
            len -= 1;
            let (left, right) = sums.split_at_mut(len * size);
            let left = &mut left[(len - 1) * size..][..width];
            for (left, right) in left.iter_mut().zip(&right[..width]) {
                *left += right;
            }
        }
    }
}
