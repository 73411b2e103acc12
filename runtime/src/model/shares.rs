//! Which node owns which part of a model.

use std::ops::Range;

use pi_kernels::ROW_GROUP;
use pi_kernels::ffn_sparse::FFN_GROUPS;

use super::hyperparameters::Hyperparameters;

/// One node's part of every layer, and of the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeShare {
    /// Key-value heads, each with the query heads that read it.
    pub kv_heads: Range<usize>,
    /// Rows of the attention's output projection; multiples of 16.
    pub output_rows: Range<usize>,
    /// Neurons: whole groups of consecutive ids.
    pub neurons: Range<usize>,
    /// Rows of the head; multiples of 16.
    pub head_rows: Range<usize>,
}

/// Divides a model over nodes in proportion to `threads` (of each node).
///
/// `neuron_multiple`: neurons that cannot be parted, a divisor of every group boundary (the block of a plain
/// `ffn_down`, at least 16).
pub fn divide(
    hyper: &Hyperparameters,
    threads: &[usize],
    neuron_multiple: usize,
) -> Vec<NodeShare> {
    let bounds = |count: usize, multiple: usize| {
        let parts = cumulative(threads)
            .into_iter()
            .map(|share| nearest(share, count, multiple));
        parts.collect::<Vec<usize>>()
    };
    let kv_heads = bounds(hyper.n_head_kv, 1);
    let output_rows = bounds(hyper.n_embd, ROW_GROUP);
    let head_rows = bounds(hyper.n_vocab, ROW_GROUP);
    let groups = bounds(FFN_GROUPS, 1);
    let group_ends = neuron_groups(hyper.n_ff, neuron_multiple);
    (0..threads.len())
        .map(|node| NodeShare {
            kv_heads: kv_heads[node]..kv_heads[node + 1],
            output_rows: output_rows[node]..output_rows[node + 1],
            neurons: group_ends[groups[node]]..group_ends[groups[node + 1]],
            head_rows: head_rows[node]..head_rows[node + 1],
        })
        .collect()
}

/// Boundaries of the 16 neuron groups, from 0 to `n_ff`: the nearest multiples of `multiple`.
pub fn neuron_groups(n_ff: usize, multiple: usize) -> [usize; FFN_GROUPS + 1] {
    std::array::from_fn(|group| nearest((group, FFN_GROUPS), n_ff, multiple))
}

/// Sums of `threads` before each node, over their total.
fn cumulative(threads: &[usize]) -> Vec<(usize, usize)> {
    let total: usize = threads.iter().sum();
    let mut before = 0;
    let mut shares = vec![(0, total)];
    for n in threads {
        before += n;
        shares.push((before, total));
    }
    shares
}

/// `count` times a fraction, rounded to the nearest multiple; the whole is always `count` itself.
fn nearest((numerator, denominator): (usize, usize), count: usize, multiple: usize) -> usize {
    if numerator == denominator {
        return count;
    }
    let step = denominator * multiple;
    ((numerator * count + step / 2) / step * multiple).min(count)
}
