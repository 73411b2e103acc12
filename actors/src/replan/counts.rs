//! How often the host's neurons fired: counted by the leader of the node that computed them.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::weights::LayerWeights;

/// Counts since the last re-planning, and how many tokens have ended.
///
/// A step that is repeated after a failure has the same neurons again, which count once: a layer notes for each node of which token
/// its neurons are counted. So the counts depend on tokens alone.
#[derive(Debug)]
pub(crate) struct ColdCounts {
    layers: Vec<Layer>,
    /// Number of the token under way, from 1.
    token: AtomicU64,
}

#[derive(Debug)]
struct Layer {
    /// The first neuron that is the host's; as many as `fired` follow.
    first: usize,
    fired: Vec<AtomicU32>,
    /// By node: the last token that is counted.
    counted: Vec<AtomicU64>,
}

impl ColdCounts {
    /// For all neurons that nodes have.
    pub fn new(layers: &[LayerWeights]) -> Self {
        let of_layer = |layer: &LayerWeights| {
            let neurons = || layer.shares.iter().map(|share| &share.neurons);
            let owned = || neurons().filter(|neurons| !neurons.is_empty());
            let first = owned().map(|neurons| neurons.start).min().unwrap_or(0);
            let end = owned().map(|neurons| neurons.end).max().unwrap_or(0);
            Layer {
                first,
                fired: (first..end).map(|_| AtomicU32::new(0)).collect(),
                counted: neurons().map(|_| AtomicU64::new(0)).collect(),
            }
        };
        Self {
            layers: layers.iter().map(of_layer).collect(),
            token: AtomicU64::new(1),
        }
    }

    /// Counts neurons of a node that fired, by their numbers in its share, whose first neuron is `first`. The node's leader alone
    /// does, so that nothing is lost.
    pub fn note(&self, layer: usize, node: usize, first: usize, ids: &[u32]) {
        let layer = &self.layers[layer];
        let token = self.token.load(Ordering::Relaxed);
        if layer.counted[node].swap(token, Ordering::Relaxed) == token {
            return;
        }
        let own = &layer.fired[first - layer.first..];
        for id in ids {
            let count = &own[*id as usize];
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }

    /// The token under way is complete: it will not be repeated.
    pub fn end_token(&self) {
        self.token.fetch_add(1, Ordering::Relaxed);
    }

    /// The counts of a layer, which start anew.
    pub fn take(&self, layer: usize) -> Vec<u32> {
        let fired = self.layers[layer].fired.iter();
        fired
            .map(|count| count.swap(0, Ordering::Relaxed))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_model::{self, Form, PlainModel};
    use crate::weights::{GateActivation, SparsityMode};

    #[test]
    fn what_is_repeated_counts_once_and_nodes_count_apart() {
        let plain = PlainModel::random(5, GateActivation::Relu);
        let form = Form::Neurons(SparsityMode::Exact);
        let weights = test_model::weights(&plain, 2, form);
        let counts = ColdCounts::new(&weights.layers);
        let shares = &weights.layers[0].shares;
        let (own, other) = (&shares[0].neurons, &shares[1].neurons);
        assert!(own.len() > 3 && other.len() > 3);
        counts.note(0, 0, own.start, &[0, 3]);
        counts.note(0, 0, own.start, &[0, 3]);
        counts.note(0, 1, other.start, &[1]);
        counts.end_token();
        counts.note(0, 0, own.start, &[3]);
        let taken = counts.take(0);
        let mut want = vec![0; weights.shape.n_ff];
        (want[own.start], want[own.start + 3], want[other.start + 1]) = (1, 2, 1);
        assert_eq!(taken, want);
        // taken in the middle of a token: what was counted is counted still
        counts.note(0, 0, own.start, &[3]);
        assert!(counts.take(0).iter().all(|count| *count == 0));
    }
}
