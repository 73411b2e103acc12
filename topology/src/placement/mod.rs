//! Placement: which neurons live on which device and which node, chosen so that the modelled time
//! of a token is least.
//!
//! Pure functions of numbers: how often neurons fire, how many bytes they are, what memory there
//! is, and what was measured of the machine. [`solve`] places, [`TokenTime`] says what a placement
//! costs and where the time goes.
//!
//! The model of a layer, in seconds:
//!
//! ```text
//! fixed / device bandwidth + hand-off + max(hot bytes / device bandwidth of each device,
//!                                           cold bytes / node bandwidth of each node)
//! ```
//!
//! where the hand-off is paid by a layer that has neurons on both sides of it: with a device, by each
//! that has cold ones; and where bytes are those that a token is expected to read: of a neuron that fires with probability
//! f, what is always scanned and f times the rest of its bundle.
//!
//! Source: the neuron placement of PowerInfer (SOSP'24, section 6.3), which solves a linear program
//! over impact and capacity; here the order of a layer's neurons by frequency makes each layer's
//! time convex in the number of hot ones, so that taking the best step again and again is enough.

mod hot;
mod nodes;
mod time;

#[cfg(test)]
mod tests;

pub use hot::{HotRule, HotSet, hot_prefixes};
pub use nodes::{divide_groups, divide_neurons};
pub use time::{LayerTime, Part, TokenTime};

use std::ops::Range;

/// A layer as placement sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerLoad {
    /// Bytes that every token reads of what is not a neuron: attention, norms.
    pub fixed_bytes: u64,
    /// Bytes of a neuron's bundle that every token reads, where the neuron is hot or cold: its gate
    /// row, or what a sketch of it takes.
    pub scanned_bytes: u64,
    /// Bytes of a bundle that are read when the neuron fires.
    pub active_bytes: u64,
    /// Bytes that a bundle takes in memory.
    pub bundle_bytes: u64,
    /// Share of tokens for which each neuron fires, `[n_ff]`.
    pub frequencies: Vec<f32>,
}

impl LayerLoad {
    /// Bytes that a token is expected to read of a neuron.
    fn expected_bytes(&self, neuron: usize) -> f64 {
        self.scanned_bytes as f64 + f64::from(self.frequencies[neuron]) * self.active_bytes as f64
    }
}

/// A device with memory of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceSpeed {
    /// Bytes of weights that kernels read from its memory in a second.
    pub bytes_per_s: f64,
    /// Bytes that hot bundles may take.
    pub budget_bytes: u64,
    /// Allocations are rounded up to a multiple of this.
    pub granule_bytes: u64,
    /// What each of its kernels takes beside the time for its bytes, seconds.
    pub launch_s: f64,
}

/// Kernels of a layer without neurons: projections, attention, output projection.
const FIXED_LAUNCHES: f64 = 3.0;
/// Both norms, where nodes take part in the layer; else they are mostly made by the kernels before them.
const NORM_LAUNCHES: f64 = 2.0;
/// Kernels of a layer's hot neurons: gates and ups, downs.
const HOT_LAUNCHES: f64 = 2.0;
/// Kernels of the head: norm, product, hand-over.
const HEAD_LAUNCHES: f64 = 3.0;

/// A node.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSpeed {
    /// Bytes of weights that the node's team reads in a second.
    pub bytes_per_s: f64,
    /// Bytes that cold bundles may take.
    pub budget_bytes: u64,
    /// Allocations are rounded up to a multiple of this.
    pub granule_bytes: u64,
}

impl NodeSpeed {
    /// What `n_neurons` of a layer take of the budget.
    fn rounded_bytes(&self, layer: &LayerLoad, n_neurons: usize) -> u64 {
        let bytes = n_neurons as u64 * layer.bundle_bytes;
        bytes.next_multiple_of(self.granule_bytes.max(1))
    }
}

/// What was measured of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct MachineSpeed {
    /// Devices; none where the host is the device, and no neuron is hot.
    pub devices: Vec<DeviceSpeed>,
    /// Nodes, at least one.
    pub nodes: Vec<NodeSpeed>,
    /// One fork and one join of a layer, seconds. With a device only layers with cold neurons have them.
    pub hand_off_s: f64,
}

impl MachineSpeed {
    /// A layer's fork and join, seconds, where `n_cold` of its neurons are not on a device.
    fn hand_off_of(&self, n_cold: usize) -> f64 {
        match self.devices.is_empty() || n_cold > 0 {
            true => self.hand_off_s,
            false => 0.0,
        }
    }

    /// What the norms of such a layer take, seconds, which then are kernels of the device.
    fn norms_of(&self, n_cold: usize) -> f64 {
        match self.devices.first() {
            Some(device) if n_cold > 0 => NORM_LAUNCHES * device.launch_s,
            _ => 0.0,
        }
    }

    /// Bytes that all nodes read in a second.
    fn nodes_bytes_per_s(&self) -> f64 {
        self.nodes.iter().map(|node| node.bytes_per_s).sum()
    }

    /// What is not a neuron takes, seconds: on the first device, in `launches` kernels, or on all nodes.
    fn fixed_s(&self, bytes: u64, launches: f64) -> f64 {
        match self.devices.first() {
            Some(device) => bytes as f64 / device.bytes_per_s + launches * device.launch_s,
            None => bytes as f64 / self.nodes_bytes_per_s(),
        }
    }
}

/// Where the neurons of a layer live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlacement {
    /// Ids of each device's hot neurons, ascending.
    pub hot_ids: Vec<Vec<u32>>,
    /// Each node's cold neurons.
    pub cold: Vec<ColdShare>,
}

/// A node's cold neurons of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColdShare {
    /// Whole groups of consecutive neurons.
    Groups(Range<usize>),
    /// These neurons, ascending.
    Ids(Vec<u32>),
}

/// Why there is no placement.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlacementError {
    /// Cold bundles do not fit into the nodes' memory.
    #[error(
        "the cold neurons of layer {layer} take {needed_bytes} bytes on node {node}, where {left_bytes} of {budget_bytes} are \
         left: use more nodes, a smaller model or type, or a device with more memory"
    )]
    NodeFull {
        /// Counted from 0.
        node: usize,
        /// The layer that does not fit any more.
        layer: usize,
        /// After rounding to the allocator's granule.
        needed_bytes: u64,
        /// What the layers before it leave.
        left_bytes: u64,
        /// What there is for all layers.
        budget_bytes: u64,
    },
    /// A number that cannot be.
    #[error("{what} is {value}: {needed}")]
    Impossible {
        /// Of what.
        what: String,
        /// The number.
        value: f64,
        /// What it would have to be.
        needed: &'static str,
    },
}

/// Places every layer's neurons.
///
/// `group_ends` are the boundaries of the groups of consecutive neurons of a layer, `[n_groups + 1]`
/// from 0 to `n_ff`: without a device, nodes own whole groups.
///
/// # Errors
/// [`PlacementError::NodeFull`], or [`PlacementError::Impossible`] for a bandwidth, time or
/// frequency that is none.
///
/// # Panics
/// When `group_ends` are not ascending from 0 to a layer's neurons, or there is no node.
pub fn solve(
    layers: &[LayerLoad],
    machine: &MachineSpeed,
    group_ends: &[usize],
) -> Result<Vec<LayerPlacement>, PlacementError> {
    check(layers, machine)?;
    let mut left_bytes: Vec<u64> = machine.nodes.iter().map(|n| n.budget_bytes).collect();
    let mut placements = Vec::with_capacity(layers.len());
    let hot = hot::choose(layers, machine);
    for (index, (layer, hot)) in layers.iter().zip(hot).enumerate() {
        let divide = |room_bytes: &[u64]| {
            let cold = cold_shares(layer, &hot, machine, group_ends, room_bytes);
            let nodes = machine.nodes.iter().zip(&cold);
            let needed: Vec<u64> = nodes
                .map(|(node, share)| node.rounded_bytes(layer, share.n_neurons(group_ends)))
                .collect();
            (cold, needed)
        };
        // each layer its part of what is left, so that the last ones find room where the first did;
        // all that is left, where whole groups do not fit into a part
        let n_layers = (layers.len() - index) as u64;
        let part: Vec<u64> = left_bytes.iter().map(|left| left / n_layers).collect();
        let (mut cold, mut needed) = divide(&part);
        if over(&needed, &part).is_some() {
            (cold, needed) = divide(&left_bytes);
        }
        if let Some(node) = over(&needed, &left_bytes) {
            return Err(PlacementError::NodeFull {
                node,
                layer: index,
                needed_bytes: needed[node],
                left_bytes: left_bytes[node],
                budget_bytes: machine.nodes[node].budget_bytes,
            });
        }
        for (left, needed) in left_bytes.iter_mut().zip(needed) {
            *left -= needed;
        }
        placements.push(LayerPlacement {
            hot_ids: hot.into_ids(),
            cold,
        });
    }
    Ok(placements)
}

/// The first node that needs more than it has.
fn over(needed: &[u64], room: &[u64]) -> Option<usize> {
    needed
        .iter()
        .zip(room)
        .position(|(needed, room)| needed > room)
}

/// The nodes' shares of a layer's cold neurons.
fn cold_shares(
    layer: &LayerLoad,
    hot: &HotSet,
    machine: &MachineSpeed,
    group_ends: &[usize],
    room_bytes: &[u64],
) -> Vec<ColdShare> {
    let n_neurons = layer.frequencies.len();
    if machine.devices.is_empty() {
        assert_eq!(group_ends.last(), Some(&n_neurons), "groups cover a layer");
        return divide_groups(layer, &machine.nodes, group_ends, room_bytes)
            .into_iter()
            .map(ColdShare::Groups)
            .collect();
    }
    let ids = hot.cold_ids(n_neurons);
    divide_neurons(layer, &machine.nodes, &ids, room_bytes)
        .into_iter()
        .map(ColdShare::Ids)
        .collect()
}

impl ColdShare {
    /// Neurons.
    pub fn n_neurons(&self, group_ends: &[usize]) -> usize {
        match self {
            Self::Groups(groups) => group_ends[groups.end] - group_ends[groups.start],
            Self::Ids(ids) => ids.len(),
        }
    }
}

fn check(layers: &[LayerLoad], machine: &MachineSpeed) -> Result<(), PlacementError> {
    assert!(!machine.nodes.is_empty(), "there is a node");
    let positive = |what: String, value: f64| {
        if value > 0.0 && value.is_finite() {
            return Ok(());
        }
        Err(PlacementError::Impossible {
            what,
            value,
            needed: "it has to be positive",
        })
    };
    for (n, device) in machine.devices.iter().enumerate() {
        positive(format!("the bandwidth of device {n}"), device.bytes_per_s)?;
    }
    for (n, node) in machine.nodes.iter().enumerate() {
        positive(format!("the bandwidth of node {n}"), node.bytes_per_s)?;
    }
    if !(machine.hand_off_s >= 0.0 && machine.hand_off_s.is_finite()) {
        return Err(PlacementError::Impossible {
            what: "the hand-off of a layer in seconds".into(),
            value: machine.hand_off_s,
            needed: "it has to be 0 or more",
        });
    }
    for (l, layer) in layers.iter().enumerate() {
        let bad = |f: &&f32| !(0.0..=1.0).contains(*f);
        if let Some(frequency) = layer.frequencies.iter().find(bad) {
            return Err(PlacementError::Impossible {
                what: format!("a frequency of layer {l}"),
                value: f64::from(*frequency),
                needed: "it has to be from 0 to 1",
            });
        }
    }
    Ok(())
}
