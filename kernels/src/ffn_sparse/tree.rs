//! The fixed order in which the contributions of an FFN's neurons are added.
//!
//! The neurons of a layer form [`FFN_GROUPS`] groups of consecutive ids. A group is summed in
//! ascending order; group sums are joined along one pairwise tree. Whoever owns some consecutive
//! groups sends one sum per complete subtree of them, so the result does not depend on how groups
//! are shared out.

use std::ops::Range;

/// Leaves of the tree.
pub const FFN_GROUPS: usize = 16;

/// Subtrees that consecutive groups can make at most.
pub const SUBTREES_MAX: usize = 8;

/// Values that are joined at a time: enough to make little of finding out what is joined with what.
const JOINED_VALUES: usize = 128;

/// Whether two neighbouring runs of groups are the halves of a subtree.
fn are_halves(left: &Range<usize>, right: &Range<usize>) -> bool {
    left.len() == right.len() && left.start.is_multiple_of(2 * left.len())
}

/// The complete subtrees that `groups` is made of, in ascending order.
///
/// # Panics
/// When `groups` is not within the [`FFN_GROUPS`] groups.
pub fn subtrees(groups: Range<usize>) -> Vec<Range<usize>> {
    assert!(
        groups.end <= FFN_GROUPS,
        "groups {groups:?} of {FFN_GROUPS}"
    );
    let mut stack = TreeStack::new();
    let mut trees: Vec<Range<usize>> = Vec::with_capacity(SUBTREES_MAX);
    for group in groups {
        trees.push(group..group + 1);
        for _ in 0..stack.push(group..group + 1) {
            let right = trees.pop().expect("a right half");
            trees.last_mut().expect("a left half").end = right.end;
        }
    }
    trees
}

/// How many subtrees [`subtrees`] gives, without allocating.
///
/// # Panics
/// As [`subtrees`].
pub fn n_subtrees(groups: Range<usize>) -> usize {
    assert!(
        groups.end <= FFN_GROUPS,
        "groups {groups:?} of {FFN_GROUPS}"
    );
    let mut stack = TreeStack::new();
    for group in groups {
        stack.push(group..group + 1);
    }
    stack.len
}

/// Which sums wait for their other half, while sums arrive in ascending order.
///
/// The caller keeps the values of the same stack: after a push, it joins its two topmost values
/// as often as [`TreeStack::push`] says.
#[derive(Debug, Clone)]
pub(crate) struct TreeStack {
    runs: [(usize, usize); SUBTREES_MAX + 1],
    len: usize,
}

impl TreeStack {
    pub(crate) fn new() -> Self {
        Self {
            runs: [(0, 0); SUBTREES_MAX + 1],
            len: 0,
        }
    }

    /// Adds a sum over `groups`; returns how many joins of the two topmost sums follow.
    pub(crate) fn push(&mut self, groups: Range<usize>) -> usize {
        self.runs[self.len] = (groups.start, groups.end);
        self.len += 1;
        let mut joins = 0;
        while self.len >= 2 {
            let (left, right) = (self.runs[self.len - 2], self.runs[self.len - 1]);
            if !are_halves(&(left.0..left.1), &(right.0..right.1)) {
                break;
            }
            self.len -= 1;
            self.runs[self.len - 1] = (left.0, right.1);
            joins += 1;
        }
        joins
    }
}

/// Joins the sums of all subtrees (`[out.len()]` f32 each, ascending) into `out` (overwritten).
///
/// # Panics
/// When the subtrees are not all groups in ascending order, or a sum is shorter than `out`.
pub fn join_subtrees<'a>(
    subtrees: &[Range<usize>],
    sum: impl Fn(usize) -> &'a [f32],
    out: &mut [f32],
) {
    assert!(
        subtrees.first().is_some_and(|first| first.start == 0),
        "subtrees start at group 0"
    );
    assert!(
        subtrees.last().is_some_and(|last| last.end == FFN_GROUPS),
        "all groups are there"
    );
    let mut values = [[0.0f32; JOINED_VALUES]; SUBTREES_MAX + 1];
    for (chunk, out) in out.chunks_mut(JOINED_VALUES).enumerate() {
        let mut stack = TreeStack::new();
        let mut len = 0;
        for (n, groups) in subtrees.iter().enumerate() {
            let top = &mut values[len][..out.len()];
            top.copy_from_slice(&sum(n)[chunk * JOINED_VALUES..][..out.len()]);
            len += 1;
            for _ in 0..stack.push(groups.clone()) {
                len -= 1;
                let (left, right) = values.split_at_mut(len);
                for (left, right) in left[len - 1][..out.len()].iter_mut().zip(&right[0]) {
                    *left += right;
                }
            }
        }
        out.copy_from_slice(&values[0][..out.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_shares_are_one_subtree_each_and_odd_ones_a_few() {
        for nodes in [1, 2, 4, 8, 16] {
            let share = FFN_GROUPS / nodes;
            for node in 0..nodes {
                let groups = node * share..(node + 1) * share;
                assert_eq!(subtrees(groups.clone()), [groups]);
            }
        }
        assert_eq!(subtrees(0..5), [0..4, 4..5]);
        assert_eq!(subtrees(5..11), [5..6, 6..8, 8..10, 10..11]);
        assert_eq!(subtrees(1..15).len(), 6);
        assert_eq!(subtrees(3..3), []);
        for first in 0..=FFN_GROUPS {
            for end in first..=FFN_GROUPS {
                assert_eq!(n_subtrees(first..end), subtrees(first..end).len());
            }
        }
    }

    #[test]
    fn any_split_gives_the_same_bits() {
        let leaves: Vec<f32> = (0..FFN_GROUPS).map(|g| 1.0 / (3.0 + g as f32)).collect();
        fn tree(leaves: &[f32]) -> f32 {
            match leaves {
                [leaf] => *leaf,
                _ => {
                    let (left, right) = leaves.split_at(leaves.len() / 2);
                    tree(left) + tree(right)
                }
            }
        }
        for cut in 0..=FFN_GROUPS {
            let parts = [subtrees(0..cut), subtrees(cut..FFN_GROUPS)].concat();
            let sums: Vec<f32> = parts
                .iter()
                .map(|part| tree(&leaves[part.clone()]))
                .collect();
            // a row over whole chunks and some of another, each value a share of the sum that is exact
            const N: usize = 2 * JOINED_VALUES + 19;
            let scale = |n: usize| 0.5f32.powi((n % 7) as i32);
            let rows: Vec<Vec<f32>> = (sums.iter())
                .map(|sum| (0..N).map(|n| sum * scale(n)).collect())
                .collect();
            let mut out = [f32::NAN; N];
            join_subtrees(&parts, |n| &rows[n], &mut out);
            for (n, joined) in out.iter().enumerate() {
                let whole = tree(&leaves) * scale(n);
                assert_eq!(joined.to_bits(), whole.to_bits(), "cut at {cut}, value {n}");
            }
        }
    }
}
