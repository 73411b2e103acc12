//! Memory that a node's team works in; all layers of the node use it one after the other.

use std::sync::atomic::{AtomicU64, AtomicUsize};

use pi_kernels::ActBatch;
use pi_kernels::attention::{CHUNK_POSITIONS, state_len};
use pi_kernels::ffn_sparse::{DownScratch, FFN_GROUPS, GroupSpan, UpScratch};

use crate::model::Model;
use crate::slots::{Shared, SharedF32};
use crate::weights::{FfnShare, LayerShare, UpRows};

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

    fn bytes(&self) -> usize {
        self.ids.capacity() * size_of::<u32>() + self.gates.capacity() * size_of::<f32>()
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
            next: AtomicUsize::new(0),
            active: AtomicU64::new(0),
            rows_read: AtomicU64::new(0),
        }
    }

    /// Bytes of memory.
    pub fn bytes(&mut self) -> usize {
        let floats = [
            &self.q,
            &self.k,
            &self.v,
            &self.states,
            &self.gate,
            &self.up,
            &self.act,
        ];
        let floats: usize = floats.iter().map(|values| values.bytes()).sum();
        let lists = self
            .lists
            .iter_mut()
            .map(|list| list.get_unshared().bytes());
        let lists: usize = lists.sum();
        let threads = self
            .threads
            .iter_mut()
            .map(|own| own.get_unshared().bytes());
        let threads: usize = threads.sum();
        floats + self.act_rows.get_unshared().bytes() + lists + threads
    }
}

impl ThreadScratch {
    fn bytes(&self) -> usize {
        let floats = [
            &self.queries,
            &self.states,
            &self.gate_chunk,
            &self.up_chunk,
        ];
        let floats: usize = floats.iter().map(|values| size_of_val(&***values)).sum();
        let up = self.up.as_ref().map_or(0, UpScratch::bytes);
        self.all.bytes() + floats + up + self.down.bytes()
    }

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
        }
    }
}
