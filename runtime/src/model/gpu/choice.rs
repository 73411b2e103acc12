//! Which neurons are hot: pure functions over sizes and frequencies.

use std::fmt;
use std::ops::Range;

use pi_actors::gpu::PrefillSizes;
use pi_actors::weights::ModelShape;
use pi_kernels::ActivationMode;
use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::placement::{HotRule, LayerLoad, hot_prefixes};

use super::error::GpuModelError;
use super::layout::{GpuLayout, check_formats};
use crate::model::ModelTensors;
use crate::model::shares::neuron_groups;
use crate::model::sparsity::{DownPlan, Sparsity, SparsityPlan};
use crate::sidecar::{Ahead, LayerPredictors, Profile};

/// What hot neurons save: bytes that the host need not read, of so many a second, and a layer's hand-off, seconds.
///
/// These are no measurements, so that one configuration has the same neurons on the GPU whatever was measured when: what a
/// host's memory gives, and a flag there and back.
pub const HOT_SAVES: (f64, f64) = (50e9, 5e-6);

/// One layer's division between a GPU and the host.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HotLayer {
    /// The file's neuron of each neuron of the layer, `[n_ff]`, most active ones first; none where the order is the file's.
    pub order: Option<Vec<u32>>,
    /// Groups of neurons in that order that are hot: the first ones.
    pub groups: usize,
}

/// What is asked of a GPU.
#[derive(Debug, Clone)]
pub struct GpuRequest<'a> {
    /// Sizes of the model, its context included.
    pub shape: &'a ModelShape,
    /// Its tensors.
    pub tensors: &'a ModelTensors,
    /// The mode.
    pub sparsity: &'a SparsityPlan,
    /// What predicts neurons: those predictors that shall work.
    pub predictors: Option<&'a [LayerPredictors]>,
    /// How often neurons fire.
    pub profile: Option<&'a Profile>,
    /// Format of the key-value cache.
    pub kv_type: KvType,
    /// Most tokens of a prompt that are computed together.
    pub n_ubatch: usize,
    /// The arithmetic.
    pub mode: ActivationMode,
    /// Most groups of a layer that may be hot.
    pub groups_max: usize,
    /// The GPU's layers; the last one's has the head.
    pub layers: Range<usize>,
    /// Whether neurons change places while the model runs.
    pub replans: bool,
}

impl<'a> GpuRequest<'a> {
    /// What predicts a layer ahead: nothing where the layer before is on another GPU.
    pub(super) fn ahead(&self, index: usize) -> Option<&'a Ahead> {
        let predictors = self.predictors.filter(|_| index > self.layers.start)?;
        predictors[index].ahead.as_ref()
    }
}

/// What takes how much of a GPU's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GpuMemory {
    /// What may be used.
    pub budget: usize,
    /// The driver's own: context and kernels, and whatever other programs have.
    pub overhead: usize,
    /// Norms, projections of attention, and the head.
    pub dense: usize,
    /// Predictors.
    pub predictors: usize,
    /// Key-value cache, activations, scratch.
    pub working: usize,
    /// Hot neurons.
    pub hot: usize,
    /// Neurons of all layers, if all were hot.
    pub neurons: usize,
}

impl GpuMemory {
    /// What has to be there.
    fn fixed(&self) -> usize {
        self.overhead + self.dense + self.predictors + self.working
    }

    /// All of it.
    pub fn total(&self) -> usize {
        self.fixed() + self.hot
    }

    /// What hot neurons may take.
    pub fn room(&self) -> usize {
        self.budget.saturating_sub(self.fixed())
    }
}

impl fmt::Display for GpuMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: usize| bytes.div_ceil(1 << 20);
        let rows = [
            ("driver, kernels, others", self.overhead),
            ("attention, norms, head", self.dense),
            ("predictors", self.predictors),
            ("cache, activations", self.working),
            ("hot neurons", self.hot),
        ];
        for (name, bytes) in rows {
            writeln!(f, "  {name:<24}{:>9} MiB", mib(bytes))?;
        }
        let (total, budget) = (mib(self.total()), self.budget >> 20);
        write!(f, "  {:<24}{total:>9} MiB of {budget} MiB", "together")
    }
}

/// What a GPU has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuRoom {
    /// Bytes of its memory that may be used.
    pub budget: usize,
    /// Bytes of it that the driver and other programs have.
    pub overhead: usize,
    /// Most groups of a layer that may be hot.
    pub groups_max: usize,
}

/// What a GPU gets of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuPart {
    /// Its layers.
    pub layers: Range<usize>,
    /// Their hot neurons.
    pub hot: Vec<HotLayer>,
    /// What takes how much of its memory.
    pub memory: GpuMemory,
}

/// Divides a model over as few of these GPUs as hold all neurons that may be hot, else over all of them.
///
/// # Errors
/// What has to be on the GPUs does not fit there, or is in a format that they do not compute.
///
/// # Panics
/// Without a GPU.
pub fn choose_on(
    rooms: &[GpuRoom],
    request: &GpuRequest<'_>,
) -> Result<Vec<GpuPart>, GpuModelError> {
    let n_max = rooms.len().min(request.shape.n_layer);
    let mut chosen = divide(&rooms[..1], request);
    for n in 2..=n_max {
        if chosen.as_ref().is_ok_and(|parts| has_all(parts)) {
            break;
        }
        chosen = divide(&rooms[..n], request);
    }
    chosen
}

/// Whether all neurons are hot.
fn has_all(parts: &[GpuPart]) -> bool {
    let hot = parts.iter().flat_map(|part| &part.hot);
    hot.map(|layer| layer.groups).min() == Some(FFN_GROUPS)
}

/// Chooses for exactly these GPUs.
fn divide(rooms: &[GpuRoom], request: &GpuRequest<'_>) -> Result<Vec<GpuPart>, GpuModelError> {
    let free = (rooms.iter()).map(|room| room.budget.saturating_sub(room.overhead));
    let ranges = split(request.shape.n_layer, &free.collect::<Vec<_>>());
    let parts = rooms.iter().zip(ranges).map(|(room, layers)| {
        let request = GpuRequest {
            groups_max: room.groups_max,
            layers: layers.clone(),
            ..request.clone()
        };
        let (hot, memory) = choose(&request, room.budget, room.overhead)?;
        Ok(GpuPart {
            layers,
            hot,
            memory,
        })
    });
    parts.collect()
}

/// Chooses hot neurons that fit into `budget` bytes, of which the driver has `overhead`: whole groups, as the placement's
/// solver has them ([`hot_prefixes`]).
///
/// Layers whose down projection is plain are hot as a whole or not at all, in the file's order. Layers without a predictor
/// ahead have all their gates computed, wherever they are, and come first.
///
/// # Errors
/// The rest alone does not fit.
fn choose(
    request: &GpuRequest<'_>,
    budget: usize,
    overhead: usize,
) -> Result<(Vec<HotLayer>, GpuMemory), GpuModelError> {
    let shape = request.shape;
    check_formats(request.tensors, &request.sparsity.down)?;
    if !shape.n_embd.is_multiple_of(2) {
        // what the host hands over is taken in pairs
        return Err(GpuModelError::Mode {
            what: "a hidden state of odd width",
            cure: "set required = false for its [[gpu]]",
        });
    }
    let layers = orders(request);
    let layout = GpuLayout::new(request, &layers);
    // what streaming takes is not taken where nothing is left to be streamed
    let memories =
        [false, true].map(|streams| memory_beside(request, &layout, (budget, overhead), streams));
    let bundle_bytes = layout.bundle_bytes;
    let [alone, beside_streams] = memories;
    if alone.fixed() <= budget && alone.neurons <= alone.room() {
        let all = with_hot(request, &bundle_bytes, layers.clone(), alone);
        if all.0.iter().all(|layer| layer.groups == FFN_GROUPS) {
            return Ok(all);
        }
    }
    if beside_streams.fixed() <= budget {
        return Ok(with_hot(request, &bundle_bytes, layers, beside_streams));
    }
    // the budget that would do
    let all_hot = GpuMemory {
        hot: alone.neurons,
        ..alone
    };
    let can_be = request.groups_max == FFN_GROUPS;
    let memory = match can_be && all_hot.total() < beside_streams.total() {
        true => all_hot,
        false => beside_streams,
    };
    Err(GpuModelError::OverBudget { memory })
}

/// What takes memory beside hot neurons, if neurons of the host are streamed for prompts or not.
fn memory_beside(
    request: &GpuRequest<'_>,
    layout: &GpuLayout<'_>,
    (budget, overhead): (usize, usize),
    streams: bool,
) -> GpuMemory {
    let shape = request.shape;
    let prefill = PrefillSizes {
        n_tokens: request.n_ubatch.min(shape.n_ctx),
        mode: request.mode,
        bundle_bytes: layout.largest_bytes.iter().sum(),
        streams,
        plain: request.sparsity.down.iter().any(|down| whole(*down)),
    };
    let replan_bytes = match request.replans {
        true => pi_actors::gpu::replan_bytes(request.layers.len(), shape.n_ff),
        false => 0,
    };
    GpuMemory {
        budget,
        overhead,
        dense: layout.dense_bytes,
        predictors: layout.predictor_bytes,
        working: pi_actors::gpu::working_bytes(
            shape,
            request.layers.len(),
            request.kv_type,
            prefill,
        ) + replan_bytes,
        hot: 0,
        neurons: layout.bundle_bytes.iter().sum::<usize>() * shape.n_ff,
    }
}

/// The layers with as many hot neurons as there is room for.
fn with_hot(
    request: &GpuRequest<'_>,
    bundle_bytes: &[usize],
    mut layers: Vec<HotLayer>,
    mut memory: GpuMemory,
) -> (Vec<HotLayer>, GpuMemory) {
    let ends = neuron_groups(request.shape.n_ff, multiple(request.sparsity));
    let (loads, may_be) = (loads(request, bundle_bytes), may_be_hot(request, &ends));
    let rules = layers
        .iter()
        .zip(&may_be)
        .enumerate()
        .map(|(own, (layer, ends))| HotRule {
            order: layer.order.as_deref(),
            ends,
            first: request.predictors.is_some()
                && request.ahead(request.layers.start + own).is_none(),
        });
    let rules: Vec<HotRule<'_>> = rules.collect();
    let n_hot = hot_prefixes(&loads, &rules, memory.room() as u64, HOT_SAVES);
    for ((layer, n_hot), bundle_bytes) in layers.iter_mut().zip(n_hot).zip(bundle_bytes) {
        // of groups without neurons those behind the hot ones are hot too
        let groups = ends.iter().rposition(|&end| end == n_hot);
        layer.groups = groups.filter(|_| n_hot > 0).unwrap_or(0);
        memory.hot += n_hot * bundle_bytes;
    }
    (layers, memory)
}

/// The GPU's layers as the solver sees them.
fn loads(request: &GpuRequest<'_>, bundle_bytes: &[usize]) -> Vec<LayerLoad> {
    let layers = request.layers.clone().zip(bundle_bytes);
    layers
        .map(|(index, &bundle)| {
            let gate = &request.tensors.layers[index].gate;
            let named = request.predictors.is_some_and(|predictors| {
                let layer = &predictors[index];
                let alone = layer.ahead.as_ref().is_some_and(|ahead| ahead.alone);
                request.ahead(index).is_some() || layer.sketch.is_some() && !alone
            });
            let bundle_bytes = bundle as u64;
            let scanned_bytes = match request.sparsity.mode {
                Sparsity::Off | Sparsity::Threshold => bundle_bytes,
                Sparsity::Predicted if named => 0,
                Sparsity::Exact | Sparsity::Predicted => {
                    (gate.row_bytes() as u64).min(bundle_bytes)
                }
            };
            let n_ff = request.shape.n_ff;
            let frequencies = match request.profile {
                None => vec![1.0; n_ff],
                Some(profile) => {
                    let n_tokens = profile.n_tokens.max(1) as f32;
                    let counts = profile.layers[index].counts.iter();
                    counts.map(|&count| count as f32 / n_tokens).collect()
                }
            };
            LayerLoad {
                fixed_bytes: 0,
                scanned_bytes,
                active_bytes: bundle_bytes - scanned_bytes,
                bundle_bytes,
                frequencies,
            }
        })
        .collect()
}

/// Numbers of neurons that may be hot in each of the GPU's layers, of groups that end at `ends`.
fn may_be_hot(request: &GpuRequest<'_>, ends: &[usize; FFN_GROUPS + 1]) -> Vec<Vec<usize>> {
    let groups_max = request.groups_max.min(FFN_GROUPS);
    let of_layer = |index: usize| match whole(request.sparsity.down[index]) {
        true if groups_max == FFN_GROUPS => vec![ends[FFN_GROUPS]],
        true => vec![],
        false => ends[1..=groups_max].to_vec(),
    };
    request.layers.clone().map(of_layer).collect()
}

/// Consecutive layers for each of some GPUs, in proportion to their `rooms` (bytes); at least one each where there are as many.
fn split(n_layer: usize, rooms: &[usize]) -> Vec<Range<usize>> {
    let all: f64 = rooms.iter().map(|room| *room as f64).sum();
    let (mut ranges, mut start, mut sum) = (Vec::new(), 0, 0.0);
    for (n, room) in rooms.iter().enumerate() {
        sum += *room as f64;
        let behind = rooms.len() - 1 - n;
        let share = if all > 0.0 {
            sum / all
        } else {
            (n + 1) as f64 / rooms.len() as f64
        };
        let least = (start + 1).min(n_layer);
        let most = n_layer.saturating_sub(behind).max(least);
        let end = ((n_layer as f64 * share).round() as usize).clamp(least, most);
        ranges.push(start..end);
        start = end;
    }
    ranges
}

/// Whether a layer's neurons cannot be parted.
fn whole(down: DownPlan) -> bool {
    matches!(down, DownPlan::Dense(_))
}

/// Neurons between which no boundary of groups lies.
fn multiple(sparsity: &SparsityPlan) -> usize {
    crate::model::layout::neuron_multiple(sparsity)
}

/// The neurons of each of the GPU's layers, those first that fired most.
fn orders(request: &GpuRequest<'_>) -> Vec<HotLayer> {
    let order = |index: usize| {
        let counts = &request.profile?.layers[index].counts;
        if !matches!(request.sparsity.down[index], DownPlan::NeuronRows(_)) {
            return None;
        }
        let mut order: Vec<u32> = (0..counts.len() as u32).collect();
        order.sort_by_key(|&id| std::cmp::Reverse(counts[id as usize]));
        Some(order)
    };
    (request.layers.clone())
        .map(|index| HotLayer {
            order: order(index),
            groups: 0,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_split_by_room_and_nobody_is_left_without() {
        assert_eq!(split(80, &[24]), vec![0..80; 1]);
        assert_eq!(split(80, &[24, 24]), [0..40, 40..80]);
        assert_eq!(split(80, &[24, 8]), [0..60, 60..80]);
        assert_eq!(split(3, &[100, 1, 1]), [0..1, 1..2, 2..3]);
        assert_eq!(split(3, &[0, 0]), [0..2, 2..3]);
        for n_layer in 1..40 {
            for rooms in [&[1, 2, 3][..], &[0, 5], &[7, 7, 7, 7, 7]] {
                let ranges = split(n_layer, rooms);
                assert_eq!(ranges.len(), rooms.len());
                let mut next = 0;
                for range in &ranges {
                    assert_eq!(range.start, next);
                    next = range.end;
                    assert!(n_layer < rooms.len() || !range.is_empty(), "{ranges:?}");
                }
                assert_eq!(next, n_layer, "{ranges:?}");
            }
        }
    }
}
