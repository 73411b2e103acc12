//! Cold neurons over nodes, so that the slowest node is as fast as can be.

use std::ops::Range;

use super::{LayerLoad, NodeSpeed};

/// Divides a layer's groups of consecutive neurons over `nodes`, in their order: of all such
/// divisions one with the least time of the slowest node.
///
/// `group_ends`: boundaries of the groups, from 0 to the layer's neurons.
pub fn divide_groups(
    layer: &LayerLoad,
    nodes: &[NodeSpeed],
    group_ends: &[usize],
) -> Vec<Range<usize>> {
    let n_groups = group_ends.len() - 1;
    let mut before = vec![0.0];
    for group in group_ends.windows(2) {
        let bytes: f64 = (group[0]..group[1])
            .map(|neuron| layer.expected_bytes(neuron))
            .sum();
        before.push(before[before.len() - 1] + bytes);
    }
    // slowest[end]: time of the slowest of the nodes so far, which own the groups below `end`
    let mut slowest: Vec<f64> = before
        .iter()
        .map(|&bytes| bytes / nodes[0].bytes_per_s)
        .collect();
    let mut starts = vec![vec![0; n_groups + 1]];
    for node in &nodes[1..] {
        let mut start_of = vec![0; n_groups + 1];
        let next: Vec<f64> = (0..=n_groups)
            .map(|end| {
                let time = |start: usize| {
                    let own = (before[end] - before[start]) / node.bytes_per_s;
                    slowest[start].max(own)
                };
                let best = (0..=end).min_by(|&a, &b| time(a).total_cmp(&time(b)));
                start_of[end] = best.unwrap_or(0);
                time(start_of[end])
            })
            .collect();
        slowest = next;
        starts.push(start_of);
    }
    let mut end = n_groups;
    let mut shares: Vec<Range<usize>> = starts
        .iter()
        .rev()
        .map(|start_of| {
            let share = start_of[end]..end;
            end = share.start;
            share
        })
        .collect();
    shares.reverse();
    shares
}

/// Divides the neurons `ids` over `nodes`: the one with most expected bytes first, each to the node
/// that is done first with it. Ids come back ascending.
pub fn divide_neurons(layer: &LayerLoad, nodes: &[NodeSpeed], ids: &[u32]) -> Vec<Vec<u32>> {
    let mut order = ids.to_vec();
    order.sort_by(|&a, &b| {
        let bytes = |id: u32| layer.expected_bytes(id as usize);
        bytes(b).total_cmp(&bytes(a)).then(a.cmp(&b))
    });
    let mut shares = vec![Vec::new(); nodes.len()];
    let mut bytes = vec![0.0; nodes.len()];
    for id in order {
        let more = layer.expected_bytes(id as usize);
        let time = |node: usize| (bytes[node] + more) / nodes[node].bytes_per_s;
        let node = (0..nodes.len())
            .min_by(|&a, &b| time(a).total_cmp(&time(b)))
            .expect("there is a node");
        bytes[node] += more;
        shares[node].push(id);
    }
    for share in &mut shares {
        share.sort_unstable();
    }
    shares
}
