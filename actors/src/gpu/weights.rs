//! A model's weights on a GPU: one arena, and what lies where in it.

use std::ops::Range;

use pi_kernels::cuda::{Device, DeviceBuffer, DeviceRows, RowsView, View};

use crate::replan::Replan;

/// Rows in the arena, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuRows {
    /// Format and size.
    pub rows: DeviceRows,
    /// Byte of the arena at which they start: a multiple of 16.
    pub at: usize,
}

impl GpuRows {
    /// The rows as the kernels take them.
    pub fn view<'a>(&self, arena: &'a DeviceBuffer<u8>) -> RowsView<'a> {
        RowsView::dense(self.rows, arena.view(self.at..self.at + self.rows.bytes()))
    }
}

/// f32 values in the arena, by bytes.
pub type GpuValues = Range<usize>;

/// The values as the kernels take them.
pub(crate) fn values<'a>(arena: &'a DeviceBuffer<u8>, at: &GpuValues) -> View<'a, f32> {
    arena.view(at.clone()).as_f32()
}

/// How host and GPU tell each other within a token what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuSync {
    /// By flags in the host's memory, at which both look all the time: a token is one graph.
    #[default]
    Flags,
    /// By events, where a GPU cannot see what the host writes while a kernel runs: a token is launched part by part.
    Events,
}

/// What a GPU has of a model: some consecutive layers. Hot neurons are the first ones in the order in which the layer's neurons lie, on the GPU and
/// in the nodes' shares: those of its first groups.
#[derive(Debug)]
pub struct GpuWeights {
    /// Where.
    pub device: Device,
    /// All weights.
    pub arena: DeviceBuffer<u8>,
    /// The layers.
    pub layers: Vec<GpuLayer>,
    /// Which layer the first of them is.
    pub first_layer: usize,
    /// The head, behind the last layer.
    pub head: Option<GpuHead>,
    /// How it is run.
    pub sync: GpuSync,
    /// Whether neurons are computed whether or not they fire.
    pub dense: bool,
    /// How neurons change places with the host's; none: never.
    pub replan: Option<Replan>,
    /// Whether there are graphs that count what a token reads, see [`crate::Engine::count_on_gpus`].
    pub counts: bool,
}

impl GpuWeights {
    /// The layers, counted from the model's first.
    pub fn range(&self) -> Range<usize> {
        self.first_layer..self.first_layer + self.layers.len()
    }
}

/// The head.
#[derive(Debug, Clone)]
pub struct GpuHead {
    /// Weight of the norm before it, `[n_embd]` f32.
    pub norm: GpuValues,
    /// `[n_vocab, n_embd]`
    pub rows: GpuRows,
}

/// One layer.
#[derive(Debug, Clone)]
pub struct GpuLayer {
    /// Weight of the norm before attention, `[n_embd]` f32.
    pub attn_norm: GpuValues,
    /// Weight of the norm before the FFN, `[n_embd]` f32.
    pub ffn_norm: GpuValues,
    /// Rows of queries, then keys, then values: together `[(n_head + 2 · n_head_kv) · head_dim, n_embd]`, in as many pieces
    /// as there are formats.
    pub qkv: Vec<GpuRows>,
    /// Their biases, `[(n_head + 2 · n_head_kv) · head_dim]` f32.
    pub qkv_bias: Option<GpuValues>,
    /// `[n_embd, n_head · head_dim]`
    pub wo: GpuRows,
    /// Hot neurons.
    pub ffn: Option<GpuFfn>,
    /// Whether the layer has cold ones, on the host.
    pub has_cold: bool,
    /// What predicts the layer's neurons, hot and cold, from the layer before.
    pub ahead: Option<GpuAhead>,
}

/// Hot neurons of a layer.
#[derive(Debug, Clone, Copy)]
pub struct GpuFfn {
    /// `[n_hot, n_embd]`
    pub gate: GpuRows,
    /// `[n_hot, n_embd]`
    pub up: GpuRows,
    /// Down weights.
    pub down: GpuDown,
}

impl GpuFfn {
    /// Hot neurons.
    pub fn n_hot(&self) -> usize {
        self.gate.rows.n_rows
    }
}

/// Down weights of hot neurons.
#[derive(Debug, Clone, Copy)]
pub enum GpuDown {
    /// `[n_hot, n_embd]`: only those of active neurons are read.
    Neurons(GpuRows),
    /// Plain `ffn_down`, `[n_embd, n_ff]`, where all neurons are hot.
    Plain(GpuRows),
}

/// A predictor one layer ahead, as [`crate::weights::AheadWeights`].
#[derive(Debug, Clone)]
pub struct GpuAhead {
    /// `[rank, n_embd]`
    pub a: GpuRows,
    /// `[rank]` f32, where h is rectified.
    pub a_bias: Option<GpuValues>,
    /// `[n_ff, rank]`, in the layer's order: hot ones first.
    pub b: GpuRows,
    /// `[n_ff]` f32, likewise.
    pub b_bias: GpuValues,
    /// Whether cold neurons that it does not name are left out; else the nodes' own sketches add some.
    pub alone: bool,
    /// Whether cold bundles are pulled towards the host's caches as soon as they are named.
    pub prefetch: bool,
}
