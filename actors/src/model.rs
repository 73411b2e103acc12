//! What all actors of an engine share and never change.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use pi_kernels::Cpu;
use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::{FFN_GROUPS, subtrees};
use pi_kernels::rope::RopeTable;

use crate::gpu::{GpuError, GpuModel};
use crate::replan::ColdCounts;
use crate::slots::{SlotSizes, Slots};
use crate::tap::LayerTap;
use crate::weights::{
    AheadWeights, FfnShare, GateActivation, LayerShare, ModelShape, ModelWeights, SketchKind,
};

/// Tokens whose logits are computed together.
pub(crate) const HEAD_TOKENS: usize = 16;

/// Tokens that sketches pick neurons for, from which products of all rows take less time than picked rows one token after the
/// other: what several tokens pick is nearly all.
const SKETCHED_TOKENS_MIN: usize = 12;

/// Weights, constants and slots.
#[derive(Debug)]
pub(crate) struct Model {
    pub weights: ModelWeights,
    pub rope: RopeTable,
    pub cpu: Cpu,
    pub kv_type: KvType,
    pub n_ubatch: usize,
    pub slots: Slots,
    pub tap: Option<Arc<dyn LayerTap>>,
    /// Where GPUs are the device: their layers one after the other.
    pub gpus: Vec<GpuModel>,
    /// Why the last token on it has no result.
    gpu_failure: Mutex<Option<GpuError>>,
    /// How often the host's neurons fired, where a GPU re-plans.
    pub cold_counts: Option<ColdCounts>,
}

impl Model {
    /// Puts the parts together.
    pub fn new(weights: ModelWeights, cpu: Cpu, kv_type: KvType, n_ubatch: usize) -> Self {
        check_thresholds(&weights);
        let rope = RopeTable::new(weights.shape.rope.clone());
        let sizes = SlotSizes {
            mode: cpu.mode(),
            n_ubatch,
            n_embd: weights.shape.n_embd,
            n_attn: weights.shape.n_attn(),
            n_vocab: weights.shape.n_vocab,
            rope_len: rope.row_len(),
            n_head_tokens: HEAD_TOKENS.min(n_ubatch),
            head_sketch: weights.head_sketch.is_some(),
            ahead: weights.layers.iter().any(|layer| layer.ahead.is_some()),
        };
        let nodes = 0..weights.head.len();
        let n_neurons = |node: usize| {
            let shares = weights.layers.iter().map(|layer| &layer.shares[node]);
            shares.map(|share| share.neurons.len()).max().unwrap_or(0)
        };
        let n_neurons: Vec<usize> = nodes.clone().map(n_neurons).collect();
        let n_sums = |node: usize| {
            let shares = weights.layers.iter().map(|layer| &layer.shares[node]);
            shares.map(|share| sums_of(share).len()).max().unwrap_or(0)
        };
        let n_sums: Vec<usize> = nodes.map(n_sums).collect();
        let slots = Slots::new(sizes, &n_sums, &n_neurons);
        Self {
            weights,
            rope,
            cpu,
            kv_type,
            n_ubatch,
            slots,
            tap: None,
            gpus: vec![],
            gpu_failure: Mutex::default(),
            cold_counts: None,
        }
    }

    /// Lets GPUs be the device, where there are some.
    pub fn with_gpus(self, gpus: Vec<GpuModel>) -> Self {
        let replans = gpus.iter().any(GpuModel::replans);
        let cold_counts = replans.then(|| ColdCounts::new(&self.weights.layers));
        Self {
            gpus,
            cold_counts,
            ..self
        }
    }

    /// The GPU of a layer, where GPUs are the device.
    pub fn gpu(&self, layer: usize) -> Option<&GpuModel> {
        self.gpus.iter().find(|gpu| gpu.layers().contains(&layer))
    }

    /// Notes why a token on the GPU has no result.
    pub fn note_gpu_failure(&self, error: GpuError) {
        let mut noted = self
            .gpu_failure
            .lock()
            .unwrap_or_else(|broken| broken.into_inner());
        *noted = Some(error);
    }

    /// Takes what was noted.
    pub fn take_gpu_failure(&self) -> Option<GpuError> {
        let mut noted = self
            .gpu_failure
            .lock()
            .unwrap_or_else(|broken| broken.into_inner());
        noted.take()
    }

    /// Lets `tap` look at the hidden states.
    pub fn with_tap(self, tap: Option<Arc<dyn LayerTap>>) -> Self {
        Self { tap, ..self }
    }

    /// Sizes and constants.
    pub fn shape(&self) -> &ModelShape {
        &self.weights.shape
    }

    /// Nodes.
    pub fn n_nodes(&self) -> usize {
        self.weights.head.len()
    }

    /// A node's share of a layer.
    pub fn share(&self, layer: usize, node: usize) -> &LayerShare {
        &self.weights.layers[layer].shares[node]
    }

    /// What predicts the layer's neurons from the layer before, in a step of `n_tokens`: only decoding
    /// is predicted ahead, and the first layer never.
    pub fn ahead(&self, index: usize, n_tokens: usize) -> Option<&AheadWeights> {
        let layer = self.weights.layers.get(index)?;
        layer.ahead.as_ref().filter(|_| n_tokens == 1 && index > 0)
    }

    /// Whether the layer's predicted bundles are pulled towards the cache.
    pub fn prefetches(&self, layer: usize) -> bool {
        if let Some(gpu) = self.gpu(layer) {
            return gpu.prefetches(layer);
        }
        let ahead = self.weights.layers[layer].ahead.as_ref();
        ahead.is_some_and(|ahead| ahead.prefetch)
    }

    /// Tokens of the next step, where `n_left` are to be computed. Few that sketches pick neurons for go one by one. A GPU
    /// computes a prompt's together, but for those whose logits
    /// shall be those of tokens that are predicted one by one.
    pub fn step_tokens(&self, n_left: usize, logits_of_all: bool) -> usize {
        let n = n_left.min(self.n_ubatch);
        let few = n > 1 && n_left < SKETCHED_TOKENS_MIN;
        if self.gpus.is_empty() && few && self.looks_for_candidates() {
            return 1;
        }
        let together = |gpu: &GpuModel| gpu.prefill_from().is_some_and(|from| n >= from);
        let is_one = !self.gpus.iter().all(together)
            || !self.gpus.is_empty() && logits_of_all && self.leaves_out();
        if is_one { 1 } else { n }
    }

    /// Whether a step of `n_tokens` on GPUs is launched part by part, and not as a token's graph.
    pub fn is_batch(&self, n_tokens: usize) -> bool {
        n_tokens > 1 || self.tap.is_some()
    }

    /// Whether the host's own sketches pick neurons.
    fn looks_for_candidates(&self) -> bool {
        let mut shares = self.weights.layers.iter().flat_map(|layer| &layer.shares);
        shares.any(|share| {
            let kind = share.sketch.as_ref().map(|sketch| &sketch.kind);
            !matches!(kind, None | Some(SketchKind::Nothing))
        })
    }

    /// Whether some neurons are not computed although their gates might be open.
    fn leaves_out(&self) -> bool {
        let mut shares = self.weights.layers.iter().flat_map(|layer| &layer.shares);
        let ahead = |layer| {
            self.gpu(layer)
                .is_some_and(|gpu| gpu.ahead_alone(layer).is_some())
        };
        (0..self.shape().n_layer).any(ahead) || shares.any(|share| share.sketch.is_some())
    }

    /// The GPU, where the layer's only node writes its sum where the GPU reads it.
    pub fn answers_in_place(&self, layer: usize) -> Option<&GpuModel> {
        let share = &self.weights.layers[layer].shares[0];
        let alone = self.n_nodes() == 1 && share.ffn.paired().is_some();
        self.gpu(layer)
            .filter(|_| alone && !share.neurons.is_empty())
    }

    /// The GPU, where the layer's only node makes its activations of the hidden state itself, before it computes what was named.
    pub fn takes_in_place(&self, layer: usize) -> Option<&GpuModel> {
        let gpu = self.answers_in_place(layer)?;
        let named = gpu.ahead_alone(layer) == Some(true);
        (named && self.share(layer, 0).sketch.is_some()).then_some(gpu)
    }

    /// Where node `node`'s partial sum `sum` starts in its slot.
    pub fn partial_offset(&self, sum: usize) -> usize {
        sum * self.n_ubatch * self.shape().n_embd
    }
}

/// # Panics
/// When thresholds are given where gates close, or are not as many as neurons.
fn check_thresholds(weights: &ModelWeights) {
    for share in weights.layers.iter().flat_map(|layer| &layer.shares) {
        let Some(thresholds) = &share.thresholds else {
            continue;
        };
        assert_ne!(
            weights.shape.gate_activation,
            GateActivation::Relu,
            "thresholds are for gates that never close"
        );
        assert_eq!(thresholds.len(), share.neurons.len(), "one per neuron");
        let rows = matches!(share.ffn, FfnShare::Neurons { .. });
        assert!(rows, "neurons are skipped by rows of down");
    }
}

/// The partial sums that a node sends for a layer, each named by the groups it covers. A plain
/// `ffn_down` gives one sum over all of the node's neurons.
pub(crate) fn sums_of(share: &LayerShare) -> Vec<Range<usize>> {
    match share.ffn {
        FfnShare::Neurons { .. } => subtrees(share.groups.clone()),
        FfnShare::Dense { .. } if share.neurons.is_empty() => vec![],
        FfnShare::Dense { .. } => vec![share.groups.clone()],
    }
}

/// The neurons of each group of a share, counted from the share's first one.
pub(crate) fn group_neurons(
    boundaries: &[usize; FFN_GROUPS + 1],
    share: &LayerShare,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    let first = share.neurons.start;
    share.groups.clone().map(move |group| {
        (
            group,
            boundaries[group] - first..boundaries[group + 1] - first,
        )
    })
}
