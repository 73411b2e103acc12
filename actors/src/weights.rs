//! A model's weights as the actors hold them: one share of every layer and of the head per node.
//!
//! The loader fills these; each share's bytes lie in its node's arena. Everything here is read-only
//! while a step is under way, so shares are cheap to hand out and actors can be restarted from
//! them. Between steps re-planning may have neurons of a layer change places ([`crate::replan`]).

use std::ops::Range;

use bytes::Bytes;
use pi_kernels::ffn_sparse::sketch::planes::{GatePlanes, PlanesShape};
use pi_kernels::ffn_sparse::{FFN_GROUPS, NeuronRows};
use pi_kernels::rope::RopeSpec;
use pi_kernels::{MatrixRef, MatrixShape, QuantType};

use crate::replan::NeuronValues;

/// The activation of the FFN's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GateActivation {
    /// x · sigmoid(x): no neuron is ever exactly off.
    Silu,
    /// GELU in its tanh form: no neuron is ever exactly off.
    Gelu,
    /// max(x, 0): a neuron with a gate of 0 or less is off.
    Relu,
}

/// Which neurons are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SparsityMode {
    /// All.
    Off,
    /// All gates, then up and down of the neurons whose ReLU gate is open: equals `Off`.
    Exact,
    /// Gates of neurons that a predictor picks, then up and down of those that are open.
    Predicted,
}

/// Sizes and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelShape {
    /// Layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Neurons of a layer's FFN.
    pub n_ff: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key/value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub n_vocab: usize,
    /// Positions of the context (of the key/value cache).
    pub n_ctx: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Activation of the FFN's gate.
    pub gate_activation: GateActivation,
    /// Factor of the embeddings, commonly 1.
    pub embedding_scale: f32,
    /// Rotation of queries and keys.
    pub rope: RopeSpec,
    /// Factor of the attention scores, commonly 1/√head_dim.
    pub attn_scale: f32,
    /// Sliding window: a token sees the last so many positions, its own included; none: all.
    pub window: Option<usize>,
}

impl ModelShape {
    /// Query heads that share one key/value head.
    pub fn heads_per_kv(&self) -> usize {
        self.n_head / self.n_head_kv
    }

    /// The first position that the token at `position` sees: not 0 with a sliding window.
    pub fn first_seen(&self, position: usize) -> usize {
        let window = self.window;
        window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Values of all query heads of a token: the columns of `attn_output`.
    pub fn n_attn(&self) -> usize {
        self.n_head * self.head_dim
    }
}

/// A packed matrix with its bytes.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Format, size and order in memory.
    pub shape: MatrixShape,
    /// `[shape.packed_bytes()]`.
    pub bytes: Bytes,
}

impl Matrix {
    /// The matrix as the kernels take it.
    pub fn view(&self) -> MatrixRef<'_> {
        MatrixRef::new(self.shape, &self.bytes)
    }

    /// The rows of a matrix in `Layout::Rows`, to be read one by one.
    pub fn neuron_rows(&self) -> NeuronRows<'_> {
        NeuronRows {
            quant: self.shape.quant,
            n_embd: self.shape.n_cols,
            n_neurons: self.shape.n_rows,
            stride_bytes: self.shape.row_bytes(),
            offset_bytes: 0,
            bytes: &self.bytes,
        }
    }
}

/// One layer.
#[derive(Debug, Clone)]
pub struct LayerWeights {
    /// Weight of the norm before attention, `[n_embd]` f32.
    pub attn_norm: Vec<f32>,
    /// Weight of the norm before the FFN, `[n_embd]` f32.
    pub ffn_norm: Vec<f32>,
    /// Each node's share, by node.
    pub shares: Vec<LayerShare>,
    /// What predicts the layer's neurons from the layer before.
    pub ahead: Option<AheadWeights>,
}

/// A predictor one layer ahead: `b · h + b_bias` above zero, with `h = a · r`, or
/// `h = relu(a · r + a_bias)`, and r the residual stream after attention of the layer before, over
/// its root mean square.
#[derive(Debug, Clone)]
pub struct AheadWeights {
    /// `[rank, n_embd]`, interleaved.
    pub a: Matrix,
    /// `[rank]` f32, where h is rectified.
    pub a_bias: Option<Vec<f32>>,
    /// `[n_ff, rank]`, interleaved.
    pub b: Matrix,
    /// `[n_ff]` f32.
    pub b_bias: Vec<f32>,
    /// Whether the bundles are pulled towards the cache.
    pub prefetch: bool,
    /// Whether what it does not name is not looked for: no `Correct` names more.
    pub alone: bool,
}

/// How a node finds the candidates of a layer when the hidden state is there.
#[derive(Debug, Clone)]
pub struct SketchShare {
    /// What scores neurons.
    pub kind: SketchKind,
    /// `[neurons.len()]`: a neuron is a candidate when score and bias are together above zero. Empty without scores.
    pub bias: NeuronValues,
    /// `[neurons.len()]`: a candidate is active when its gate is above that and above zero.
    pub floor: Option<NeuronValues>,
}

impl SketchShare {
    /// Bytes that are read of every neuron of a layer whose gate rows have `gate_bytes`.
    pub(crate) fn row_bytes(&self, gate_bytes: usize) -> usize {
        match &self.kind {
            SketchKind::LowRank { b, .. } => b.shape.row_bytes(),
            SketchKind::Nothing => gate_bytes,
            SketchKind::Bits { planes, .. } => planes.shape.sign_row_bytes(),
        }
    }
}

/// What scores neurons.
#[derive(Debug, Clone)]
pub enum SketchKind {
    /// `b · (a · x)`; the share's gate has the order `Layout::Rows`.
    LowRank {
        /// `[rank, n_embd]`, interleaved; the same on every node.
        a: Matrix,
        /// `[neurons.len(), rank]`, interleaved.
        b: Matrix,
    },
    /// Nothing: candidates are those that were predicted ahead, else all; the share's gate has the order `Layout::Rows`.
    Nothing,
    /// The first bits of the gates' own weights; the gates are in these planes, and the share's gate is empty.
    Bits {
        /// The gates.
        planes: PlanesStore,
        /// `[neurons.len()]`: of the neurons that their signs name, those stay candidates whose score by two bits
        /// and this are together above zero. All without.
        two_bit_bias: Option<NeuronValues>,
    },
}

/// Gates in planes.
#[derive(Debug, Clone)]
pub struct PlanesStore {
    /// `[neurons.len(), n_embd]`
    pub shape: PlanesShape,
    /// `[shape.top_bytes()]`
    pub top: Bytes,
    /// `[shape.rest_bytes()]`
    pub rest: Bytes,
}

impl PlanesStore {
    /// The planes as the kernels take them.
    pub fn view(&self) -> GatePlanes<'_> {
        GatePlanes::new(self.shape, &self.top, &self.rest)
    }
}

/// One node's share of a layer.
#[derive(Debug, Clone)]
pub struct LayerShare {
    /// Key/value heads of the node, with the query heads that read them. May be empty.
    pub kv_heads: Range<usize>,
    /// Query rows of its heads, `[kv_heads.len() · heads_per_kv · head_dim, n_embd]`, interleaved.
    pub wq: Matrix,
    /// Key rows of its heads, `[kv_heads.len() · head_dim, n_embd]`, interleaved.
    pub wk: Matrix,
    /// Value rows of its heads, as `wk`.
    pub wv: Matrix,
    /// Bias of the queries, `[wq.n_rows]` f32.
    pub bq: Option<Vec<f32>>,
    /// Bias of the keys, `[wk.n_rows]` f32.
    pub bk: Option<Vec<f32>>,
    /// Bias of the values, `[wv.n_rows]` f32.
    pub bv: Option<Vec<f32>>,
    /// Rows of `attn_output` that the node computes; multiples of 16 (but for the last).
    pub output_rows: Range<usize>,
    /// These rows, `[output_rows.len(), n_head · head_dim]`, interleaved.
    pub wo: Matrix,
    /// Neuron groups of the node, of the [`FFN_GROUPS`] of the layer. May be empty.
    pub groups: Range<usize>,
    /// Neurons of these groups: `neuron_groups[groups.start]..neuron_groups[groups.end]`.
    pub neurons: Range<usize>,
    /// Their gate rows, `[neurons.len(), n_embd]`: interleaved, or as [`SketchKind`] says.
    pub gate: Matrix,
    /// How candidates are found, where not all gates are computed.
    pub sketch: Option<SketchShare>,
    /// Their up and down weights.
    pub ffn: FfnShare,
    /// `[neurons.len()]` f32: a neuron is left out while its value is not above its threshold. The
    /// value is |act(gate)| where up lies beside down ([`UpRows::Paired`]), so that neither is read,
    /// else |act(gate) · up|, so that down is not. None: as [`SparsityMode`] has it.
    pub thresholds: Option<Vec<f32>>,
}

/// Up and down weights of a node's neurons.
#[derive(Debug, Clone)]
pub enum FfnShare {
    /// Down neuron by neuron: `ffn_down_t` of the file, or a transposed copy.
    Neurons {
        /// Where the up rows are.
        up: UpRows,
        /// Records of the neurons.
        rows: NeuronStore,
    },
    /// Plain `ffn_down`, read whole ([`SparsityMode::Off`] only).
    Dense {
        /// Up rows, `[neurons.len(), n_embd]`, interleaved.
        up: Matrix,
        /// All rows of `ffn_down`, the node's columns: `[n_embd, neurons.len()]`, interleaved.
        down: Matrix,
    },
}

impl FfnShare {
    /// The records, where up and down rows of active neurons are read one by one.
    pub fn paired(&self) -> Option<&NeuronStore> {
        match self {
            FfnShare::Neurons {
                up: UpRows::Paired,
                rows,
            } => Some(rows),
            _ => None,
        }
    }
}

/// Where the up rows of [`FfnShare::Neurons`] are.
#[derive(Debug, Clone)]
pub enum UpRows {
    /// A matrix of their own, `[neurons.len(), n_embd]`, interleaved: [`SparsityMode::Off`].
    Interleaved(Matrix),
    /// Beside the down rows in the neurons' records: [`SparsityMode::Exact`] and `Predicted`.
    Paired,
}

/// Records of neurons one after another: `[up row][down row]`, or `[down row]`.
#[derive(Debug, Clone)]
pub struct NeuronStore {
    /// Format of the up rows, if they are in the records.
    pub up: Option<QuantType>,
    /// Format of the down rows.
    pub down: QuantType,
    /// Columns of a row.
    pub n_embd: usize,
    /// Records.
    pub n_neurons: usize,
    /// `[n_neurons · record_bytes()]`, each row packed as `Layout::Rows`.
    pub bytes: Bytes,
}

impl NeuronStore {
    /// Bytes of a neuron's record.
    pub fn record_bytes(&self) -> usize {
        self.up_row_bytes() + self.down.row_bytes(self.n_embd)
    }

    /// Bytes of the up row in a record; 0 where it is not there.
    pub fn up_row_bytes(&self) -> usize {
        self.up.map_or(0, |up| up.row_bytes(self.n_embd))
    }

    /// The up rows, if they are in the records.
    pub fn up_rows(&self) -> Option<NeuronRows<'_>> {
        self.up.map(|quant| self.rows(quant, 0))
    }

    /// The down rows.
    pub fn down_rows(&self) -> NeuronRows<'_> {
        self.rows(self.down, self.up_row_bytes())
    }

    fn rows(&self, quant: QuantType, offset_bytes: usize) -> NeuronRows<'_> {
        NeuronRows {
            quant,
            n_embd: self.n_embd,
            n_neurons: self.n_neurons,
            stride_bytes: self.record_bytes(),
            offset_bytes,
            bytes: &self.bytes,
        }
    }
}

/// One node's rows of the output head.
#[derive(Debug, Clone)]
pub struct HeadShare {
    /// Rows (token ids); multiples of 16 (but for the last). May be empty.
    pub rows: Range<usize>,
    /// `[rows.len(), n_embd]`: interleaved; row by row where there is a sketch, which picks single rows.
    pub matrix: Matrix,
}

/// A low-rank sketch of the head: it says which tokens' logits are worth computing.
#[derive(Debug, Clone)]
pub struct HeadSketch {
    /// Groups of 16 tokens whose best scores set the threshold: at least so many tokens are candidates.
    pub n_groups: usize,
    /// Each node's share, by node.
    pub shares: Vec<HeadSketchShare>,
}

/// One node's share of a [`HeadSketch`].
#[derive(Debug, Clone)]
pub struct HeadSketchShare {
    /// `[rank, n_embd]`, interleaved; every node has all of it.
    pub project: Matrix,
    /// Rows of the node's tokens, `[rows.len(), rank]`, interleaved.
    pub scores: Matrix,
}

impl HeadSketch {
    /// Numbers that the hidden state is projected to.
    pub fn rank(&self) -> usize {
        self.shares
            .first()
            .map_or(0, |share| share.project.shape.n_rows)
    }
}

/// Where the embedding of a token is.
#[derive(Debug, Clone)]
pub enum Embedding {
    /// Row r is row r of the head.
    Tied,
    /// A matrix of its own, `[n_vocab, n_embd]`; may be the mapped file.
    Rows(EmbeddingRows),
}

/// Embedding rows as the file has them: read one row at a time, so they need no copy.
#[derive(Debug, Clone)]
pub struct EmbeddingRows {
    /// Format of the rows.
    pub quant: QuantType,
    /// Columns.
    pub n_embd: usize,
    /// `[n_vocab]` rows in file order.
    pub bytes: Bytes,
}

/// A model's weights, divided over the nodes.
#[derive(Debug, Clone)]
pub struct ModelWeights {
    /// Sizes and constants.
    pub shape: ModelShape,
    /// Where the groups of neurons begin, and at last `n_ff`: multiples of 16 (or of the block of a
    /// plain `ffn_down`). The same for every layer.
    pub neuron_groups: [usize; FFN_GROUPS + 1],
    /// The layers.
    pub layers: Vec<LayerWeights>,
    /// Weight of the norm before the head, `[n_embd]` f32.
    pub output_norm: Vec<f32>,
    /// The head, by node.
    pub head: Vec<HeadShare>,
    /// The head's sketch, where the sparse head may be asked for.
    pub head_sketch: Option<HeadSketch>,
    /// The embedding.
    pub embedding: Embedding,
}
