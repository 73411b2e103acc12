//! Hot sets: the best step again and again, until no device has room or no step helps.
//!
//! A step is some more of a layer's most frequent neurons, or all that are left, which saves the
//! layer's hand-off too.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

use super::{LayerLoad, MachineSpeed};

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

/// A layer while its hot set grows.
struct Growing<'a> {
    load: &'a LayerLoad,
    step_neurons: usize,
    /// Neurons, the most frequent first; equal ones by id.
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
        // of equal steps the first layer's
        by_gain.then(other.layer.cmp(&self.layer))
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
    let mut growing: Vec<Growing<'_>> = layers
        .iter()
        .map(|load| Growing::new(load, n_devices, step_neurons))
        .collect();
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
        .into_iter()
        .map(|layer| HotSet {
            by_device: layer.hot_ids,
        })
        .collect()
}

impl<'a> Growing<'a> {
    fn new(load: &'a LayerLoad, n_devices: usize, step_neurons: usize) -> Self {
        let n_neurons = load.frequencies.len();
        let mut order: Vec<u32> = (0..n_neurons as u32).collect();
        order.sort_by(|&a, &b| {
            let frequency = |id: u32| load.frequencies[id as usize];
            frequency(b).total_cmp(&frequency(a)).then(a.cmp(&b))
        });
        Self {
            load,
            step_neurons,
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
        machine.hand_off_of(n_cold) + hot.fold(cold_bytes / machine.nodes_bytes_per_s(), f64::max)
    }

    /// The step that saves most for its bytes; none where none saves anything or fits.
    fn best_step(&self, layer: usize, machine: &MachineSpeed, left_bytes: &[u64]) -> Option<Step> {
        let devices = 0..machine.devices.len();
        let steps = devices.flat_map(|device| {
            let left_bytes = left_bytes[device];
            [
                self.step(layer, device, machine, left_bytes),
                self.last_step(layer, device, machine, left_bytes),
            ]
        });
        steps.flatten().max()
    }

    /// All cold neurons at once; none where they do not fit or save nothing.
    fn last_step(
        &self,
        layer: usize,
        device: usize,
        machine: &MachineSpeed,
        left_bytes: u64,
    ) -> Option<Step> {
        let n_neurons = self.order.len() - self.n_hot;
        let fits = self.budget_bytes(device, n_neurons, machine) <= left_bytes;
        if n_neurons == 0 || !fits {
            return None;
        }
        let after = self.seconds(machine, device, n_neurons, self.cold_bytes);
        self.worth_taking(layer, device, machine, n_neurons, after)
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
        (after < before).then(|| Step {
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
        left_bytes: u64,
    ) -> Option<Step> {
        let granule = machine.devices[device].granule_bytes.max(1);
        let taken = self.hot_ids[device].len();
        let rounded = |n: usize| self.rounded(device, n, machine);
        let cold = self.order.len() - self.n_hot;
        // as many as fill the last granule that the fewest reach
        let least = self.step_neurons.min(cold);
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
        let moved: f64 = ids
            .iter()
            .map(|&id| self.load.expected_bytes(id as usize))
            .sum();
        self.hot_ids[step.device].extend_from_slice(ids);
        self.hot_bytes[step.device] += moved;
        self.cold_bytes -= moved;
        self.n_hot += step.n_neurons;
    }
}
