//! What a placement costs, and where the time goes.

use std::fmt;

use super::{
    ColdShare, FIXED_LAUNCHES, HEAD_LAUNCHES, HOT_LAUNCHES, LayerLoad, LayerPlacement, MachineSpeed,
};

/// A layer's part of a token, seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerTime {
    /// Attention and norms.
    pub fixed_s: f64,
    /// Fork and join; none where a device has all neurons.
    pub hand_off_s: f64,
    /// Each device's hot neurons.
    pub hot_s: Vec<f64>,
    /// Each node's cold neurons.
    pub cold_s: Vec<f64>,
}

impl LayerTime {
    /// The time of `layer` under `placement`.
    pub fn of(
        layer: &LayerLoad,
        placement: &LayerPlacement,
        machine: &MachineSpeed,
        group_ends: &[usize],
    ) -> Self {
        let bytes = |ids: &[u32]| -> f64 {
            ids.iter()
                .map(|&id| layer.expected_bytes(id as usize))
                .sum()
        };
        let hot = machine.devices.iter().zip(&placement.hot_ids);
        let cold = machine.nodes.iter().zip(&placement.cold);
        let shares = placement.cold.iter();
        let n_cold = shares.map(|share| share.n_neurons(group_ends)).sum();
        Self {
            fixed_s: machine.fixed_s(layer.fixed_bytes, FIXED_LAUNCHES) + machine.norms_of(n_cold),
            hand_off_s: machine.hand_off_of(n_cold),
            hot_s: hot
                .map(|(device, ids)| match ids.is_empty() {
                    true => 0.0,
                    false => bytes(ids) / device.bytes_per_s + HOT_LAUNCHES * device.launch_s,
                })
                .collect(),
            cold_s: cold
                .map(|(node, share)| {
                    let bytes = match share {
                        ColdShare::Ids(ids) => bytes(ids),
                        ColdShare::Groups(groups) => (group_ends[groups.start]
                            ..group_ends[groups.end])
                            .map(|neuron| layer.expected_bytes(neuron))
                            .sum(),
                    };
                    bytes / node.bytes_per_s
                })
                .collect(),
        }
    }

    /// The slowest of devices and nodes, seconds.
    pub fn neurons_s(&self) -> f64 {
        self.hot_s
            .iter()
            .chain(&self.cold_s)
            .copied()
            .fold(0.0, f64::max)
    }

    /// All of it, seconds.
    pub fn total_s(&self) -> f64 {
        self.fixed_s + self.hand_off_s + self.neurons_s()
    }

    /// What is waited for while neurons are computed.
    fn slowest(&self) -> Part {
        let slowest = |times: &[f64]| {
            let best = times.iter().copied().enumerate();
            best.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0))
        };
        let (device, hot_s) = slowest(&self.hot_s);
        let (node, cold_s) = slowest(&self.cold_s);
        if hot_s > cold_s {
            Part::Hot { device }
        } else {
            Part::Cold { node }
        }
    }
}

/// A part of a token's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Attention and norms of all layers.
    Fixed,
    /// The output head.
    Head,
    /// Forks and joins.
    HandOff,
    /// Hot neurons of a device, where the others wait for it.
    Hot {
        /// Counted from 0.
        device: usize,
    },
    /// Cold neurons of a node, where the others wait for it.
    Cold {
        /// Counted from 0.
        node: usize,
    },
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Fixed => f.write_str("attention"),
            Part::Head => f.write_str("head"),
            Part::HandOff => f.write_str("hand-off"),
            Part::Hot { device } => write!(f, "hot neurons on device {device}"),
            Part::Cold { node } => write!(f, "cold neurons on node {node}"),
        }
    }
}

/// A token's modelled time.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenTime {
    /// Layer by layer.
    pub layers: Vec<LayerTime>,
    /// The output head, seconds.
    pub head_s: f64,
}

impl TokenTime {
    /// The time of all layers under `placements`, and of a head of `head_bytes`.
    pub fn of(
        layers: &[LayerLoad],
        placements: &[LayerPlacement],
        machine: &MachineSpeed,
        group_ends: &[usize],
        head_bytes: u64,
    ) -> Self {
        let pairs = layers.iter().zip(placements);
        Self {
            layers: pairs
                .map(|(layer, placement)| LayerTime::of(layer, placement, machine, group_ends))
                .collect(),
            head_s: match head_bytes {
                0 => 0.0,
                bytes => machine.fixed_s(bytes, HEAD_LAUNCHES),
            },
        }
    }

    /// All of it, seconds.
    pub fn total_s(&self) -> f64 {
        self.head_s + self.layers.iter().map(LayerTime::total_s).sum::<f64>()
    }

    /// Its parts with their seconds, which add up to the whole; the longest, the bottleneck, first.
    pub fn parts(&self) -> Vec<(Part, f64)> {
        let mut parts = vec![(Part::Head, self.head_s)];
        let mut add =
            |part: Part, seconds: f64| match parts.iter_mut().find(|(known, _)| *known == part) {
                Some((_, sum)) => *sum += seconds,
                None => parts.push((part, seconds)),
            };
        for layer in &self.layers {
            add(Part::Fixed, layer.fixed_s);
            add(Part::HandOff, layer.hand_off_s);
            add(layer.slowest(), layer.neurons_s());
        }
        parts.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        parts
    }
}
