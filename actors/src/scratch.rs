//! Memory that a node's team works in; all layers of the node use it one after the other.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use pi_kernels::attention::{CHUNK_POSITIONS, state_len};
use pi_kernels::ffn_sparse::sketch::input::SketchInput;
use pi_kernels::ffn_sparse::{DownScratch, FFN_GROUPS, GroupSpan, UpScratch};
use pi_kernels::quant::BLOCK;
use pi_kernels::{ActBatch, QuantType, ROW_GROUP};

use crate::model::Model;
use crate::pieces::{Claims, Found};
use crate::slots::{RankRows, Shared, SharedF32, SharedSlice};
use crate::trace::Scores;
use crate::weights::{FfnShare, HeadSketch, LayerShare, SketchKind};

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
    /// Where in these lists those of each piece of the neurons are.
    pub found: Found,
    /// Pieces of a token's gates that are taken.
    pub gates: Claims,
    /// Pieces of a token's ups that are taken.
    pub ups: Claims,
    /// Each thread's own.
    pub threads: Vec<Shared<ThreadScratch>>,
    /// The hidden state projected for the sketch of the head, `[rank]`.
    pub head_sketch: SharedF32,
    /// Tokens that each thread found to be candidates, counted from the node's first one.
    pub head_candidates: Vec<Shared<Vec<u32>>>,
    /// Next piece of work that is not taken.
    pub next: AtomicUsize,
    /// Active neurons counted in a job.
    pub active: AtomicU64,
    /// Neurons whose rows were read in a job.
    pub rows_read: AtomicU64,
    /// Candidates counted in a job.
    pub candidates: AtomicU64,
    /// Middle of a low-rank sketch, `[n_ubatch, rank]`.
    pub hidden: SharedF32,
    /// The same as activations.
    pub hidden_rows: RankRows,
    /// Tokens as sketches of bits take them.
    pub sketch_inputs: Vec<Shared<SketchInput>>,
    /// Sums of signs, `[n_neurons]`.
    pub sums: SharedSlice<i32>,
    /// Neurons that signs named in a job, before the next bit was looked at.
    pub named: AtomicU64,
    /// The predictor's, on node 0.
    pub ahead: Option<AheadScratch>,
    /// Where it is summed up what scores take.
    pub scores: Scores,
}

/// What the predictor works in.
#[derive(Debug)]
pub(crate) struct AheadScratch {
    /// `[n_embd]` ones: the residual stream is normed without weights.
    pub ones: Vec<f32>,
    /// The normed residual stream.
    pub residual: Shared<ActBatch>,
    /// Middle of the predictor, `[rank]`.
    pub hidden: SharedF32,
    /// `[n_ff]`
    pub scores: SharedF32,
    /// The middle as activations, for each thread.
    pub activations: Vec<Shared<RankRows>>,
    /// Neurons that each thread predicts.
    pub lists: Vec<Shared<Vec<u32>>>,
}

impl AheadScratch {
    fn new(model: &Model, n_threads: usize) -> Option<Self> {
        let ahead = || model.weights.layers.iter().filter_map(|l| l.ahead.as_ref());
        let ranks: BTreeSet<usize> = ahead().map(|ahead| ahead.a.shape.n_rows).collect();
        let rank_max = *ranks.last()?;
        let (mode, shape) = (model.cpu.mode(), model.shape());
        let rows = |_| Shared::new(RankRows::new(mode, &ranks, 1));
        let list = |_| Shared::new(Vec::with_capacity(shape.n_ff));
        Some(Self {
            ones: vec![1.0; shape.n_embd],
            residual: Shared::new(ActBatch::new(mode, shape.n_embd, 1)),
            hidden: SharedF32::new(rank_max),
            scores: SharedF32::new(shape.n_ff),
            activations: (0..n_threads).map(rows).collect(),
            lists: (0..n_threads).map(list).collect(),
        })
    }
}

impl AheadScratch {
    fn bytes(&mut self) -> usize {
        let floats = self.ones.len() * size_of::<f32>() + self.hidden.bytes() + self.scores.bytes();
        let rows = self.activations.iter_mut().map(|rows| rows.own().bytes());
        let ids = |list: &mut Shared<Vec<u32>>| list.own().capacity() * size_of::<u32>();
        let lists = self.lists.iter_mut().map(ids);
        floats + self.residual.own().bytes() + rows.sum::<usize>() + lists.sum::<usize>()
    }
}

/// What the sketches of a node's layers need.
struct SketchSizes {
    ranks: BTreeSet<usize>,
    /// Most blocks of a row in planes, and most rows; 0 without.
    n_blocks: usize,
    n_rows: usize,
}

impl SketchSizes {
    fn of(model: &Model, node: usize) -> Self {
        let mut sizes = Self {
            ranks: BTreeSet::new(),
            n_blocks: 0,
            n_rows: 0,
        };
        for layer in &model.weights.layers {
            match layer.shares[node]
                .sketch
                .as_ref()
                .map(|sketch| &sketch.kind)
            {
                None | Some(SketchKind::Nothing) => {}
                Some(SketchKind::LowRank { a, .. }) => {
                    sizes.ranks.insert(a.shape.n_rows);
                }
                Some(SketchKind::Bits { planes, .. }) => {
                    sizes.n_blocks = sizes.n_blocks.max(planes.shape.n_blocks());
                    sizes.n_rows = sizes.n_rows.max(planes.shape.n_rows);
                }
            }
        }
        sizes
    }
}

/// Active neurons of one token, ascending.
#[derive(Debug, Default)]
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
    /// Those of a piece.
    pub piece: ActiveList,
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
    pub head_sketch: Option<ActBatch>,
    /// Middle of a low-rank sketch of one token, as activations.
    pub hidden: RankRows,
    /// Candidates of two kinds together.
    pub merged: Vec<u32>,
    /// Sums by two bits of neurons that signs named.
    pub two_bit_sums: Vec<i32>,
    /// 16 rows of planes put together, in file order, and interleaved.
    pub row: Vec<u8>,
    pub image: Vec<u8>,
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
        let head_sketch = model.weights.head_sketch.as_ref();
        let n_tokens = head_sketch.map_or(0, |_| {
            let groups = model.weights.head[node].rows.len().div_ceil(ROW_GROUP);
            groups.div_ceil(n_threads) * ROW_GROUP
        });
        let sketch = SketchSizes::of(model, node);
        let thread = || Shared::new(ThreadScratch::new(model, node, n_neurons, &sketch));
        let rank_max = sketch.ranks.last().copied().unwrap_or(0);
        let sketch_cols = sketch.n_blocks * BLOCK;
        let sketch_tokens = if sketch_cols > 0 { n } else { 0 };
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
            found: Found::new(n_threads),
            gates: Claims::new(n_threads),
            ups: Claims::new(n_threads),
            threads: (0..n_threads).map(|_| thread()).collect(),
            head_sketch: SharedF32::new(head_sketch.map_or(0, HeadSketch::rank)),
            head_candidates: (0..n_threads)
                .map(|_| Shared::new(Vec::with_capacity(n_tokens)))
                .collect(),
            next: AtomicUsize::new(0),
            active: AtomicU64::new(0),
            rows_read: AtomicU64::new(0),
            candidates: AtomicU64::new(0),
            hidden: SharedF32::new(n * rank_max),
            hidden_rows: RankRows::new(model.cpu.mode(), &sketch.ranks, n),
            sketch_inputs: (0..sketch_tokens)
                .map(|_| Shared::new(SketchInput::new(sketch_cols)))
                .collect(),
            sums: SharedSlice::new(sketch.n_rows),
            named: AtomicU64::new(0),
            ahead: (node == 0)
                .then(|| AheadScratch::new(model, n_threads))
                .flatten(),
            scores: Scores::default(),
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
        let lists = self.lists.iter_mut().map(|list| list.own().bytes());
        let lists: usize = lists.sum();
        let threads = self.threads.iter_mut().map(|own| own.own().bytes());
        let threads: usize = threads.sum();
        let inputs = self.sketch_inputs.iter_mut();
        let inputs: usize = inputs.map(|input| input.own().bytes()).sum();
        let sketch = self.hidden.bytes() + self.hidden_rows.bytes() + inputs + self.sums.bytes();
        let ahead = self.ahead.as_mut().map_or(0, AheadScratch::bytes);
        floats + self.act_rows.own().bytes() + lists + threads + sketch + ahead
    }
}

impl ThreadScratch {
    fn bytes(&mut self) -> usize {
        let floats = [
            &self.queries,
            &self.states,
            &self.gate_chunk,
            &self.up_chunk,
        ];
        let floats: usize = floats.iter().map(|values| size_of_val(&***values)).sum();
        let up = self.up.as_ref().map_or(0, UpScratch::bytes);
        let ids = self.merged.capacity() * size_of::<u32>()
            + self.two_bit_sums.capacity() * size_of::<i32>();
        let planes = self.row.len() + self.image.len();
        let sketch = self.hidden.bytes() + ids + planes;
        self.all.bytes() + self.piece.bytes() + floats + up + self.down.bytes() + sketch
    }

    fn new(model: &Model, node: usize, n_neurons: usize, sketch: &SketchSizes) -> Self {
        let shape = model.shape();
        let group_bytes = ROW_GROUP * QuantType::Q4_0.row_bytes(sketch.n_blocks * BLOCK);
        let heads = shape.heads_per_kv();
        let n = model.n_ubatch;
        let row_bytes = |share: &LayerShare| {
            let up = share.ffn.paired()?.up_row_bytes();
            let gate = share
                .sketch
                .as_ref()
                .map_or(0, |_| share.gate.shape.row_bytes());
            Some(up.max(gate))
        };
        let shares = model.weights.layers.iter().map(|layer| &layer.shares[node]);
        let paired = shares.filter_map(row_bytes);
        let up = paired
            .max()
            .map(|bytes| UpScratch::new(n, NEURON_CHUNK, bytes));
        Self {
            all: ActiveList::new(n_neurons),
            piece: ActiveList::new(n_neurons),
            spans: Vec::with_capacity(FFN_GROUPS),
            queries: vec![0.0; heads * shape.head_dim],
            states: vec![0.0; QUERY_BLOCK.min(n) * heads * state_len(shape.head_dim)],
            gate_chunk: vec![0.0; n * NEURON_CHUNK],
            up_chunk: vec![0.0; n * NEURON_CHUNK],
            up,
            down: DownScratch::default(),
            head_sketch: (model.weights.head_sketch.as_ref())
                .map(|sketch| ActBatch::new(model.cpu.mode(), sketch.rank(), 1)),
            hidden: RankRows::new(model.cpu.mode(), &sketch.ranks, 1),
            merged: Vec::with_capacity(n_neurons),
            two_bit_sums: Vec::with_capacity(sketch.n_rows),
            row: vec![0; group_bytes],
            image: vec![0; group_bytes],
        }
    }
}
