//! Hot sets: the best step again and again, until no device has room or no step helps.
//!
//! A step is some more of a layer's most frequent neurons, or all that are left, which saves the
//! layer's hand-off too. [`hot_prefixes`] takes whole groups of neurons, as a loader has them.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{DeviceSpeed, LayerLoad, MachineSpeed, NodeSpeed};

/// Fewest neurons that are moved together.
const STEP_NEURONS_MIN: usize = 16;

/// The hot neurons of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HotSet {
    by_device: Vec<Vec<u32>>,
}

impl HotSet {
    /// Ids of each device's neurons, ascending.
    pub fn into_ids(mut self) -> Vec<Vec<u32>> {
        for ids in &mut self.by_device {
            ids.sort_unstable();
        }
        self.by_device
    }

    /// The other neurons of `n_neurons`, ascending.
    pub fn cold_ids(&self, n_neurons: usize) -> Vec<u32> {
        let mut is_hot = vec![false; n_neurons];
        for &id in self.by_device.iter().flatten() {
            is_hot[id as usize] = true;
        }
        (0..n_neurons as u32)
            .filter(|&id| !is_hot[id as usize])
            .collect()
    }
}

/// Which neurons of a layer may be hot together.
#[derive(Debug, Clone, Copy)]
pub struct HotRule<'a> {
    /// Hot neurons are the first ones of this order of all, `[n_ff]`; none: of the ids.
    pub order: Option<&'a [u32]>,
    /// How many of them there may be, ascending; 0 needs not be named.
    pub ends: &'a [usize],
    /// Whether the layer's neurons come before those of all layers where it is not set.
    pub first: bool,
}

/// How many neurons of each layer are hot on a device with room for `budget_bytes`: of what `rules` allow the step with
/// most saved for its bytes, again and again, while there is room.
///
/// The device counts as so fast that more on it is never worse. What is saved is what the nodes, who read
/// `nodes_bytes_per_s` together, need not read, and `hand_off_s` where none of a layer's neurons is left to them.
///
/// # Panics
/// When there are not as many rules as layers, or an order or end is beyond a layer's neurons.
pub fn hot_prefixes(
    layers: &[LayerLoad],
    rules: &[HotRule<'_>],
    budget_bytes: u64,
    (nodes_bytes_per_s, hand_off_s): (f64, f64),
) -> Vec<usize> {
    assert_eq!(layers.len(), rules.len(), "a rule for each layer");
    let machine = MachineSpeed {
        devices: vec![DeviceSpeed {
            bytes_per_s: f64::INFINITY,
            budget_bytes,
            granule_bytes: 1,
            launch_s: 0.0,
        }],
        nodes: vec![NodeSpeed {
            bytes_per_s: nodes_bytes_per_s,
            budget_bytes: u64::MAX,
            granule_bytes: 1,
        }],
        hand_off_s,
    };
    let growing = layers.iter().zip(rules).map(|(load, rule)| {
        let n_neurons = load.frequencies.len();
        let order = match rule.order {
            Some(order) => order.to_vec(),
            None => (0..n_neurons as u32).collect(),
        };
        assert_eq!(order.len(), n_neurons, "an order of all neurons");
        Growing::new(load, 1, order, Sizes::Ends(*rule))
    });
    let grown = grow(growing.collect(), &machine).into_iter();
    grown.map(|layer| layer.n_hot).collect()
}

/// How large steps are.
#[derive(Debug, Clone, Copy)]
enum Sizes<'a> {
    /// At least so many neurons where there are as many, and no more than are worth it.
    AtLeast(usize),
    /// To the ends of a rule, also where nothing is saved.
    Ends(HotRule<'a>),
}

/// A layer while its hot set grows.
struct Growing<'a> {
    load: &'a LayerLoad,
    sizes: Sizes<'a>,
    /// Neurons, those first that are hot first.
    order: Vec<u32>,
    n_hot: usize,
    hot_ids: Vec<Vec<u32>>,
    /// Expected bytes of each device's hot neurons, and of all cold ones.
    hot_bytes: Vec<f64>,
    cold_bytes: f64,
}

/// Some more neurons of a layer for one device.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Step {
    /// Whether it comes before all that are not.
    first: bool,
    layer: usize,
    device: usize,
    n_neurons: usize,
    /// What they take of the budget.
    budget_bytes: u64,
    /// Seconds saved for a byte of the budget.
    gain_per_byte: f64,
}

impl Eq for Step {}

impl PartialOrd for Step {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Step {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_gain = self.gain_per_byte.total_cmp(&other.gain_per_byte);
        let by_class = self.first.cmp(&other.first);
        // of equal steps the first layer's
        by_class.then(by_gain).then(other.layer.cmp(&self.layer))
    }
}

/// Chooses each layer's hot neurons.
pub(super) fn choose(layers: &[LayerLoad], machine: &MachineSpeed) -> Vec<HotSet> {
    choose_by(layers, machine, STEP_NEURONS_MIN)
}

/// As [`choose`], with at least so many neurons a step where there are as many and room for them.
pub(super) fn choose_by(
    layers: &[LayerLoad],
    machine: &MachineSpeed,
    step_neurons: usize,
) -> Vec<HotSet> {
    let n_devices = machine.devices.len();
    let growing = layers.iter().map(|load| {
        let order = most_frequent_first(&load.frequencies);
        Growing::new(load, n_devices, order, Sizes::AtLeast(step_neurons))
    });
    let grown = grow(growing.collect(), machine).into_iter();
    grown
        .map(|layer| HotSet {
            by_device: layer.hot_ids,
        })
        .collect()
}

/// Neurons, the most frequent first; equal ones by id.
fn most_frequent_first(frequencies: &[f32]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..frequencies.len() as u32).collect();
    order.sort_by(|&a, &b| {
        let frequency = |id: u32| frequencies[id as usize];
        frequency(b).total_cmp(&frequency(a)).then(a.cmp(&b))
    });
    order
}

/// Takes the best step of all layers until there is none.
fn grow<'a>(mut growing: Vec<Growing<'a>>, machine: &MachineSpeed) -> Vec<Growing<'a>> {
    let mut left_bytes: Vec<u64> = machine
        .devices
        .iter()
        .map(|device| device.budget_bytes)
        .collect();
    let mut steps: BinaryHeap<Step> = growing
        .iter()
        .enumerate()
        .filter_map(|(layer, growing)| growing.best_step(layer, machine, &left_bytes))
        .collect();
    while let Some(step) = steps.pop() {
        let layer = &mut growing[step.layer];
        // the budget may have shrunk since the step was found
        if step.budget_bytes <= left_bytes[step.device] {
            left_bytes[step.device] -= step.budget_bytes;
            layer.take(step);
        }
        steps.extend(layer.best_step(step.layer, machine, &left_bytes));
    }
    growing
}

impl<'a> Growing<'a> {
    fn new(load: &'a LayerLoad, n_devices: usize, order: Vec<u32>, sizes: Sizes<'a>) -> Self {
        let n_neurons = load.frequencies.len();
        Self {
            load,
            sizes,
            order,
            n_hot: 0,
            hot_ids: vec![Vec::new(); n_devices],
            hot_bytes: vec![0.0; n_devices],
            cold_bytes: (0..n_neurons)
                .map(|neuron| load.expected_bytes(neuron))
                .sum(),
        }
    }

    /// The layer's time but for what no placement changes, seconds, with `n` more neurons of
    /// `bytes` on `device`.
    fn seconds(&self, machine: &MachineSpeed, device: usize, n: usize, bytes: f64) -> f64 {
        let devices = machine.devices.iter().enumerate();
        let hot = devices.map(|(n, speed)| {
            let more = if n == device { bytes } else { 0.0 };
            (self.hot_bytes[n] + more) / speed.bytes_per_s
        });
        let n_cold = self.order.len() - self.n_hot - n;
        let cold_bytes = if n_cold > 0 {
            self.cold_bytes - bytes
        } else {
            0.0
        };
        machine.hand_off_of(n_cold)
            + machine.norms_of(n_cold)
            + hot.fold(cold_bytes / machine.nodes_bytes_per_s(), f64::max)
    }

    /// The step that saves most for its bytes; none where none saves anything or fits.
    fn best_step(&self, layer: usize, machine: &MachineSpeed, left_bytes: &[u64]) -> Option<Step> {
        let devices = 0..machine.devices.len();
        let steps = devices.flat_map(|device| {
            let left_bytes = left_bytes[device];
            let (next, all) = match self.sizes {
                Sizes::AtLeast(least) => (
                    self.step(layer, device, machine, (least, left_bytes)),
                    self.order.len(),
                ),
                Sizes::Ends(rule) => {
                    let mut ends = rule.ends.iter();
                    let next = ends.find(|&&end| end > self.n_hot).copied();
                    let step = |end| self.step_to(layer, device, machine, (end, left_bytes));
                    let all = rule.ends.last().copied().unwrap_or(0);
                    (next.and_then(step), all)
                }
            };
            [
                next,
                self.step_to(layer, device, machine, (all, left_bytes)),
            ]
        });
        steps.flatten().max()
    }

    /// The first `end` neurons, all hot at once; none where they are, do not fit or save nothing.
    fn step_to(
        &self,
        layer: usize,
        device: usize,
        machine: &MachineSpeed,
        (end, left_bytes): (usize, u64),
    ) -> Option<Step> {
        let n_neurons = end.checked_sub(self.n_hot).filter(|n| *n > 0)?;
        if self.budget_bytes(device, n_neurons, machine) > left_bytes {
            return None;
        }
        let moved = match end == self.order.len() {
            true => self.cold_bytes,
            false => self.expected_bytes(n_neurons),
        };
        let after = self.seconds(machine, device, n_neurons, moved);
        self.worth_taking(layer, device, machine, n_neurons, after)
    }

    /// Bytes that a token is expected to read of the next `n` neurons.
    fn expected_bytes(&self, n: usize) -> f64 {
        let ids = self.order[self.n_hot..][..n].iter();
        ids.map(|&id| self.load.expected_bytes(id as usize)).sum()
    }

    /// The step to `n_neurons` more on a device; none where it takes the layer's time `after` to no less.
    fn worth_taking(
        &self,
        layer: usize,
        device: usize,
        machine: &MachineSpeed,
        n_neurons: usize,
        after: f64,
    ) -> Option<Step> {
        let before = self.seconds(machine, device, 0, 0.0);
        let budget_bytes = self.budget_bytes(device, n_neurons, machine);
        let (first, is_worth) = match self.sizes {
            Sizes::AtLeast(_) => (false, after < before),
            Sizes::Ends(rule) => (rule.first, after <= before),
        };
        is_worth.then(|| Step {
            first,
            layer,
            device,
            n_neurons,
            budget_bytes,
            gain_per_byte: (before - after) / budget_bytes.max(1) as f64,
        })
    }

    /// What `n_neurons` more take of a device's budget.
    fn budget_bytes(&self, device: usize, n_neurons: usize, machine: &MachineSpeed) -> u64 {
        let taken = self.hot_ids[device].len();
        let rounded = |n: usize| self.rounded(device, n, machine);
        rounded(taken + n_neurons) - rounded(taken)
    }

    /// Bytes of `n` of the layer's neurons, in whole granules of the device.
    fn rounded(&self, device: usize, n: usize, machine: &MachineSpeed) -> u64 {
        let granule = machine.devices[device].granule_bytes.max(1);
        (n as u64 * self.load.bundle_bytes).next_multiple_of(granule)
    }

    fn step(
        &self,
        layer: usize,
        device: usize,
        machine: &MachineSpeed,
        (step_neurons, left_bytes): (usize, u64),
    ) -> Option<Step> {
        let granule = machine.devices[device].granule_bytes.max(1);
        let taken = self.hot_ids[device].len();
        let rounded = |n: usize| self.rounded(device, n, machine);
        let cold = self.order.len() - self.n_hot;
        // as many as fill the last granule that the fewest reach
        let least = step_neurons.min(cold);
        if least == 0 {
            return None;
        }
        let room = rounded(taken) + left_bytes;
        let fill =
            |bytes: u64| ((bytes / self.load.bundle_bytes.max(1)) as usize).saturating_sub(taken);
        let n_neurons = fill(rounded(taken + least))
            .min(fill(room / granule * granule))
            .min(cold);
        if n_neurons == 0 {
            return None;
        }
        // no more than the device can read while the others read the rest
        let mut moved = 0.0;
        let mut best = (self.seconds(machine, device, 0, 0.0), 0);
        for (n, &id) in self.order[self.n_hot..][..n_neurons].iter().enumerate() {
            moved += self.load.expected_bytes(id as usize);
            let after = self.seconds(machine, device, n + 1, moved);
            if after < best.0 {
                best = (after, n + 1);
            }
        }
        let (after, n_neurons) = best;
        self.worth_taking(layer, device, machine, n_neurons, after)
    }

    fn take(&mut self, step: Step) {
        let ids = &self.order[self.n_hot..][..step.n_neurons];
        let moved = self.expected_bytes(step.n_neurons);
        self.hot_ids[step.device].extend_from_slice(ids);
        self.hot_bytes[step.device] += moved;
        self.cold_bytes -= moved;
        self.n_hot += step.n_neurons;
    }
}
