//! Cold neurons over nodes, so that the slowest node is as fast as can be within the nodes' room.

use std::ops::Range;

use super::{LayerLoad, NodeSpeed};

/// Divides a layer's groups of consecutive neurons over `nodes`, in their order: of all such
/// divisions one with the least time of the slowest node.
///
/// `group_ends`: boundaries of the groups, from 0 to the layer's neurons. `room_bytes`: what each
/// node's share may take after rounding; where no division fits, one that does not.
pub fn divide_groups(
    layer: &LayerLoad,
    nodes: &[NodeSpeed],
    group_ends: &[usize],
    room_bytes: &[u64],
) -> Vec<Range<usize>> {
    let n_groups = group_ends.len() - 1;
    let mut before = vec![0.0];
    for group in group_ends.windows(2) {
        let bytes: f64 = (group[0]..group[1])
            .map(|neuron| layer.expected_bytes(neuron))
            .sum();
        before.push(before[before.len() - 1] + bytes);
    }
    let own_s = |node: usize, start: usize, end: usize| {
        let neurons = group_ends[end] - group_ends[start];
        if nodes[node].rounded_bytes(layer, neurons) > room_bytes[node] {
            return f64::INFINITY;
        }
        (before[end] - before[start]) / nodes[node].bytes_per_s
    };
    // slowest[end]: time of the slowest of the nodes so far, which own the groups below `end`
    let mut slowest: Vec<f64> = (0..=n_groups).map(|end| own_s(0, 0, end)).collect();
    let mut starts = vec![vec![0; n_groups + 1]];
    for node in 1..nodes.len() {
        let mut start_of = vec![0; n_groups + 1];
        let next: Vec<f64> = (0..=n_groups)
            .map(|end| {
                let time = |start: usize| slowest[start].max(own_s(node, start, end));
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
/// that is done first with it and has room for it (`room_bytes`, after rounding); to the first where
/// none has. Ids come back ascending.
pub fn divide_neurons(
    layer: &LayerLoad,
    nodes: &[NodeSpeed],
    ids: &[u32],
    room_bytes: &[u64],
) -> Vec<Vec<u32>> {
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
        let fits = |node: &usize| {
            let needed = nodes[*node].rounded_bytes(layer, shares[*node].len() + 1);
            needed <= room_bytes[*node]
        };
        let node = (0..nodes.len())
            .filter(fits)
            .min_by(|&a, &b| time(a).total_cmp(&time(b)))
            .unwrap_or(0);
        bytes[node] += more;
        shares[node].push(id);
    }
    for share in &mut shares {
        share.sort_unstable();
    }
    shares
}
