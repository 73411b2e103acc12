//! Which node owns which part of a model.

use std::ops::Range;

use pi_kernels::ROW_GROUP;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::{ColdPolicy, Plan, Proportion};

use super::hyperparameters::Hyperparameters;
use super::sparsity::SparsityPlan;

/// One node's part of every layer, and of the head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeShare {
    /// Key-value heads, each with the query heads that read it.
    pub kv_heads: Range<usize>,
    /// Rows of the attention's output projection; multiples of 16.
    pub output_rows: Range<usize>,
    /// Groups of neurons, of the [`FFN_GROUPS`] of a layer.
    pub groups: Range<usize>,
    /// Neurons of these groups.
    pub neurons: Range<usize>,
    /// Rows of the head; multiples of 16.
    pub head_rows: Range<usize>,
}

impl NodeShare {
    /// Leaves out what a GPU has where it is the device: all but neurons.
    pub(super) fn keep_nothing_but_neurons(&mut self) {
        self.kv_heads = 0..0;
        self.output_rows = 0..0;
        self.head_rows = 0..0;
    }
}

/// How a model is divided over nodes.
#[derive(Debug, Clone)]
pub struct Division {
    /// To which each node's heads and rows are in proportion.
    pub parts: Vec<usize>,
    /// To which its cold neurons are, where they are not on one node.
    pub neuron_parts: Vec<usize>,
    /// Where cold neurons are.
    pub cold: ColdPolicy,
}

impl Division {
    /// As `plan` has it, for layers as `sparsity` has them.
    pub fn new(plan: &Plan, sparsity: &SparsityPlan) -> Self {
        Self {
            parts: plan.parts(),
            neuron_parts: match neurons_by_threads(plan, sparsity) {
                true => plan.team_sizes(),
                false => plan.parts(),
            },
            cold: plan.cold,
        }
    }

    /// Everything in proportion to `threads`.
    pub fn by_threads(threads: &[usize]) -> Self {
        Self {
            parts: threads.to_vec(),
            neuron_parts: threads.to_vec(),
            cold: ColdPolicy::Shard,
        }
    }
}

/// Whether neurons stay divided by threads where all else is by measured bandwidth: a plain `ffn_down` gives one sum a
/// node, whose bits depend on the neurons in it, and no measurement may change a result.
pub fn neurons_by_threads(plan: &Plan, sparsity: &SparsityPlan) -> bool {
    plan.proportion != Proportion::Threads && sparsity.has_plain_down()
}

/// Divides a model over nodes.
///
/// `neuron_multiple`: neurons that cannot be parted, a divisor of every group boundary (the block of a plain
/// `ffn_down`, at least 16).
pub fn divide(
    hyper: &Hyperparameters,
    division: &Division,
    neuron_multiple: usize,
) -> Vec<NodeShare> {
    let n_nodes = division.parts.len();
    let bounds = |count: usize, multiple: usize| {
        let parts = cumulative(&division.parts)
            .into_iter()
            .map(|share| nearest(share, count, multiple));
        parts.collect::<Vec<usize>>()
    };
    let kv_heads = bounds(hyper.n_head_kv, 1);
    let output_rows = bounds(hyper.n_embd, ROW_GROUP);
    let head_rows = bounds(hyper.n_vocab, ROW_GROUP);
    let groups: Vec<Range<usize>> = (0..n_nodes)
        .map(|node| cold_groups(division, 0, node))
        .collect();
    let group_ends = neuron_groups(hyper.n_ff, neuron_multiple);
    (0..n_nodes)
        .map(|node| NodeShare {
            kv_heads: kv_heads[node]..kv_heads[node + 1],
            output_rows: output_rows[node]..output_rows[node + 1],
            groups: groups[node].clone(),
            neurons: group_ends[groups[node].start]..group_ends[groups[node].end],
            head_rows: head_rows[node]..head_rows[node + 1],
        })
        .collect()
}

/// Groups of cold neurons of node `node`, where the first `n_hot` groups are a GPU's.
pub(super) fn cold_groups(division: &Division, n_hot: usize, node: usize) -> Range<usize> {
    let n_cold = FFN_GROUPS - n_hot;
    match division.cold {
        ColdPolicy::Shard | ColdPolicy::Replicate | ColdPolicy::Interleave => {
            let shares = cumulative(&division.neuron_parts);
            let bound = |node: usize| n_hot + nearest(shares[node], n_cold, 1);
            bound(node)..bound(node + 1)
        }
        ColdPolicy::Single(one) if one == node => n_hot..FFN_GROUPS,
        ColdPolicy::Single(one) if one < node => FFN_GROUPS..FFN_GROUPS,
        ColdPolicy::Single(_) => n_hot..n_hot,
    }
}

/// Boundaries of the 16 neuron groups, from 0 to `n_ff`: each the multiple of `multiple` nearest to equal groups, or
/// `n_ff` itself. Groups of a small layer may be empty.
pub fn neuron_groups(n_ff: usize, multiple: usize) -> [usize; FFN_GROUPS + 1] {
    std::array::from_fn(|group| nearest((group, FFN_GROUPS), n_ff, multiple))
}

/// Sums of `parts` before each node, over their total.
fn cumulative(parts: &[usize]) -> Vec<(usize, usize)> {
    let total: usize = parts.iter().sum();
    let mut before = 0;
    let mut shares = vec![(0, total)];
    for n in parts {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_end_at_multiples_and_cover_every_neuron() {
        for multiple in [16, 32, 256] {
            for n_ff in [1, 15, 16, 17, 31, 48, 100, 512, 1536, 1537, 11_008, 28_672] {
                let ends = neuron_groups(n_ff, multiple);
                assert_eq!((ends[0], ends[FFN_GROUPS]), (0, n_ff));
                assert!(ends.is_sorted(), "{n_ff} by {multiple}: {ends:?}");
                let whole = |end: &usize| end.is_multiple_of(multiple) || *end == n_ff;
                assert!(ends.iter().all(whole), "{n_ff} by {multiple}: {ends:?}");
            }
        }
        assert_eq!(neuron_groups(1536, 16)[1..3], [96, 192]);
    }

    fn groups(neuron_parts: &[usize], cold: ColdPolicy, n_hot: usize) -> Vec<Range<usize>> {
        let division = Division {
            cold,
            ..Division::by_threads(neuron_parts)
        };
        (0..neuron_parts.len())
            .map(|node| cold_groups(&division, n_hot, node))
            .collect()
    }

    #[test]
    fn whole_groups_follow_the_nodes_parts() {
        let shard = |parts: &[usize]| groups(parts, ColdPolicy::Shard, 0);
        assert_eq!(shard(&[30_000, 10_000]), [0..12, 12..16]);
        // noise of a few percent moves none
        assert_eq!(shard(&[29_100, 28_300]), [0..8, 8..16]);
        assert_eq!(shard(&[20_000, 0, 20_000]), [0..8, 8..8, 8..16]);
        assert_eq!(shard(&[0, 9]), [0..0, 0..16]);
        assert_eq!(shard(&[1, 1_000_000]), [0..0, 0..16]);
        // 16 nodes of terabytes per second
        let many = shard(&[5_000_000; 16]);
        assert!(many.iter().all(|groups| groups.len() == 1), "{many:?}");
        let with_gpu = groups(&[30_000, 10_000], ColdPolicy::Replicate, 8);
        assert_eq!(with_gpu, [8..14, 14..16]);
        let single = |one| groups(&[3, 1], ColdPolicy::Single(one), 4);
        assert_eq!(single(0), [4..16, 16..16]);
        assert_eq!(single(1), [4..4, 4..16]);
    }
}
