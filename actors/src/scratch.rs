//! Memory that a node's team works in; all layers of the node use it one after the other.

use std::sync::atomic::{AtomicU64, AtomicUsize};

use pi_kernels::attention::{CHUNK_POSITIONS, state_len};
use pi_kernels::ffn_sparse::{DownScratch, FFN_GROUPS, GroupSpan, UpScratch};
use pi_kernels::{ActBatch, ROW_GROUP};

use crate::model::Model;
use crate::slots::{Shared, SharedF32};
use crate::weights::{FfnShare, HeadSketch, LayerShare, UpRows};

/// Neurons whose gate and up are computed together when there are many tokens; also what a thread
/// takes at a time.
pub(crate) const NEURON_CHUNK: usize = 64;

/// Tokens whose queries read the cache together in prefill.
pub(crate) const QUERY_BLOCK: usize = 32;

/// One node's scratch.
#[derive(Debug)]
pub(crate) struct NodeScratch {
    /// `[n_ubatch, n_heads · head_dim]` of the node's query heads.
    pub q: SharedF32,
    /// `[n_ubatch, n_kv_heads · head_dim]`
    pub k: SharedF32,
    /// As `k`.
    pub v: SharedF32,
    /// States of attention for one token, `[kv_heads, chunks, heads_per_kv, state_len]`.
    pub states: SharedF32,
    /// Gates before the activation for one token, `[n_neurons]`.
    pub gate: SharedF32,
    /// Up for one token, `[n_neurons]`.
    pub up: SharedF32,
    /// Activations: of the active neurons of one token, or `[n_ubatch, n_neurons]`.
    pub act: SharedF32,
    /// The same as activations of a plain `ffn_down`.
    pub act_rows: Shared<ActBatch>,
    /// Active neurons that each thread found for one token.
    pub lists: Vec<Shared<ActiveList>>,
    /// Each thread's own.
    pub threads: Vec<Shared<ThreadScratch>>,
    /// The hidden state projected for the sketch of the head, `[rank]`.
    pub sketch: SharedF32,
    /// Tokens that each thread found to be candidates, counted from the node's first one.
    pub candidates: Vec<Shared<Vec<u32>>>,
    /// Next piece of work that is not taken.
    pub next: AtomicUsize,
    /// Active neurons counted in a job.
    pub active: AtomicU64,
    /// Neurons whose rows were read in a job.
    pub rows_read: AtomicU64,
}

/// Active neurons of one token, ascending.
#[derive(Debug)]
pub(crate) struct ActiveList {
    /// Counted from the node's first one.
    pub ids: Vec<u32>,
    /// Their gates.
    pub gates: Vec<f32>,
}

impl ActiveList {
    fn new(n_neurons: usize) -> Self {
        Self {
            ids: Vec::with_capacity(n_neurons),
            gates: Vec::with_capacity(n_neurons),
        }
    }

    /// Empties the list.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.gates.clear();
    }
}

/// One thread's scratch.
#[derive(Debug)]
pub(crate) struct ThreadScratch {
    /// Active neurons of all threads.
    pub all: ActiveList,
    /// Where groups lie in a list of neurons.
    pub spans: Vec<GroupSpan>,
    /// One token's heads of one key/value head, rotated.
    pub queries: Vec<f32>,
    /// States of [`QUERY_BLOCK`] tokens.
    pub states: Vec<f32>,
    /// Gate of a chunk of neurons, `[n_ubatch, NEURON_CHUNK]`.
    pub gate_chunk: Vec<f32>,
    /// Up of a chunk of neurons.
    pub up_chunk: Vec<f32>,
    pub up: Option<UpScratch>,
    pub down: DownScratch,
    /// The hidden state projected for the sketch of the head, as an activation.
    pub sketch: Option<ActBatch>,
}

impl NodeScratch {
    /// For all layers of `node`.
    pub fn new(model: &Model, node: usize, n_threads: usize) -> Self {
        let shape = model.shape();
        let shares = || model.weights.layers.iter().map(|layer| &layer.shares[node]);
        let max = |size: &dyn Fn(&LayerShare) -> usize| shares().map(size).max().unwrap_or(0);
        let n_kv_heads = max(&|share| share.kv_heads.len());
        let n_neurons = max(&|share| share.neurons.len());
        let n_dense = max(&|share| match share.ffn {
            FfnShare::Dense { .. } => share.neurons.len(),
            FfnShare::Neurons { .. } => 0,
        });
        let heads = shape.heads_per_kv();
        let states = n_kv_heads * shape.n_ctx.div_ceil(CHUNK_POSITIONS) * heads;
        let n_kv = n_kv_heads * shape.head_dim;
        let n = model.n_ubatch;
        let thread = || Shared::new(ThreadScratch::new(model, node, n_neurons));
        let sketch = model.weights.head_sketch.as_ref();
        let n_candidates = sketch.map_or(0, |_| {
            let groups = model.weights.head[node].rows.len().div_ceil(ROW_GROUP);
            groups.div_ceil(n_threads) * ROW_GROUP
        });
        Self {
            q: SharedF32::new(n * n_kv * heads),
            k: SharedF32::new(n * n_kv),
            v: SharedF32::new(n * n_kv),
            states: SharedF32::new(states * state_len(shape.head_dim)),
            gate: SharedF32::new(n_neurons),
            up: SharedF32::new(n_neurons),
            act: SharedF32::new(n * n_neurons),
            act_rows: Shared::new(ActBatch::new(model.cpu.mode(), n_dense, n)),
            lists: (0..n_threads)
                .map(|_| Shared::new(ActiveList::new(n_neurons)))
                .collect(),
            threads: (0..n_threads).map(|_| thread()).collect(),
            sketch: SharedF32::new(sketch.map_or(0, HeadSketch::rank)),
            candidates: (0..n_threads)
                .map(|_| Shared::new(Vec::with_capacity(n_candidates)))
                .collect(),
            next: AtomicUsize::new(0),
            active: AtomicU64::new(0),
            rows_read: AtomicU64::new(0),
        }
    }
}

impl ThreadScratch {
    fn new(model: &Model, node: usize, n_neurons: usize) -> Self {
        let shape = model.shape();
        let heads = shape.heads_per_kv();
        let n = model.n_ubatch;
        let paired =
            model
                .weights
                .layers
                .iter()
                .filter_map(|layer| match &layer.shares[node].ffn {
                    FfnShare::Neurons {
                        up: UpRows::Paired,
                        rows,
                    } => Some(rows.up_row_bytes()),
                    _ => None,
                });
        let up = paired
            .max()
            .map(|bytes| UpScratch::new(n, NEURON_CHUNK, bytes));
        Self {
            all: ActiveList::new(n_neurons),
            spans: Vec::with_capacity(FFN_GROUPS),
            queries: vec![0.0; heads * shape.head_dim],
            states: vec![0.0; QUERY_BLOCK.min(n) * heads * state_len(shape.head_dim)],
            gate_chunk: vec![0.0; n * NEURON_CHUNK],
            up_chunk: vec![0.0; n * NEURON_CHUNK],
            up,
            down: DownScratch::default(),
            sketch: (model.weights.head_sketch.as_ref())
                .map(|sketch| ActBatch::new(model.cpu.mode(), sketch.rank(), 1)),
        }
    }
}
