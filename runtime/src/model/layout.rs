//! What lies where in each node's arena, decided before anything is copied.

use std::ops::Range;

use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_kernels::ffn_sparse::sketch::planes::PlanesShape;
use pi_kernels::{Layout, MatrixShape, QuantType, ROW_GROUP};
use pi_topology::ColdPolicy;

use super::gpu::HotLayer;
use super::hyperparameters::Hyperparameters;
use super::shares::{Division, NodeShare, cold_groups, divide, neuron_groups};
use super::sparsity::{DownPlan, Skipping, SparsityPlan};
use super::tensors::{FileMatrix, LayerTensors, ModelTensors};
use crate::sidecar::{LayerPredictors, SketchKind};

/// Every matrix starts at a multiple of this: a cache line, and a vector of the widest kernels.
pub(super) const ALIGNMENT_BYTES: usize = 64;
/// Where layers start whose neurons a GPU streams: it locks memory by pages, and the next layer may be another GPU's.
const PAGE_BYTES: usize = 4096;

/// A stretch of a node's arena, and what it is made from.
#[derive(Debug, Clone)]
pub(super) struct Placed<T> {
    /// In the node's arena.
    pub at: Range<usize>,
    /// What lies there.
    pub part: T,
}

/// Some rows, and some columns of them, of a matrix in a file.
#[derive(Debug, Clone)]
pub(super) struct MatrixPart<'a> {
    pub source: &'a FileMatrix,
    pub rows: Range<usize>,
    pub cols: Range<usize>,
    /// Order in memory.
    pub layout: Layout,
    /// Whether the file is the model's, whose pages are given back.
    pub of_model: bool,
    /// The file's row of each row, where they are in another order.
    pub order: Option<&'a [u32]>,
}

impl<'a> MatrixPart<'a> {
    fn rows(source: &'a FileMatrix, rows: Range<usize>) -> Self {
        let cols = 0..source.n_cols();
        Self {
            source,
            rows,
            cols,
            layout: Layout::Interleaved,
            of_model: true,
            order: None,
        }
    }

    /// Rows of neurons.
    fn neurons(source: &'a FileMatrix, neurons: &Neurons<'a>) -> Self {
        Self {
            order: neurons.order,
            ..Self::rows(source, neurons.range.clone())
        }
    }

    /// Rows of a matrix of the sidecar.
    fn of_sidecar(source: &'a FileMatrix, rows: Range<usize>) -> Self {
        Self {
            of_model: false,
            ..Self::rows(source, rows)
        }
    }

    /// The packed matrix.
    pub fn shape(&self) -> MatrixShape {
        MatrixShape {
            quant: self.source.quant,
            n_rows: self.rows.len(),
            n_cols: self.cols.len(),
            layout: self.layout,
        }
    }
}

/// Gates in two planes.
#[derive(Debug, Clone)]
pub(super) struct PlanesPart<'a> {
    pub source: &'a FileMatrix,
    pub neurons: Range<usize>,
    /// As in [`MatrixPart`].
    pub order: Option<&'a [u32]>,
}

impl PlanesPart<'_> {
    /// Their size.
    pub fn shape(&self) -> PlanesShape {
        PlanesShape {
            n_rows: self.neurons.len(),
            n_cols: self.source.n_cols(),
        }
    }
}

/// A node's part of a layer's sketch.
#[derive(Debug, Clone)]
pub(super) enum SketchLayout<'a> {
    LowRank {
        a: Placed<MatrixPart<'a>>,
        b: Placed<MatrixPart<'a>>,
    },
    /// None: what was predicted ahead decides alone.
    Nothing,
    /// The top plane, and behind it the rest.
    Bits(Placed<PlanesPart<'a>>),
}

/// Neurons' records: `[up row][down row]`, or `[down row]`.
#[derive(Debug, Clone)]
pub(super) struct RecordsPart<'a> {
    /// Up rows, if they are in the records.
    pub up: Option<&'a FileMatrix>,
    pub down: &'a FileMatrix,
    /// Type of the down rows in memory.
    pub down_quant: QuantType,
    /// Whether `down` is a plain matrix, which has to be transposed.
    pub transposed: bool,
    pub n_embd: usize,
    pub neurons: Range<usize>,
    /// As in [`MatrixPart`]; none where `transposed`.
    pub order: Option<&'a [u32]>,
}

/// Neurons of a layer.
#[derive(Debug, Clone)]
struct Neurons<'a> {
    /// In the layer's order.
    range: Range<usize>,
    /// The file's neuron of each; none where the order is the file's.
    order: Option<&'a [u32]>,
}

impl RecordsPart<'_> {
    pub fn up_row_bytes(&self) -> usize {
        self.up.map_or(0, FileMatrix::row_bytes)
    }

    pub fn record_bytes(&self) -> usize {
        self.up_row_bytes() + self.down_quant.row_bytes(self.n_embd)
    }
}

/// Up and down weights of a node's neurons.
#[derive(Debug, Clone)]
pub(super) enum FfnLayout<'a> {
    /// Up and down rows side by side.
    Paired(Placed<RecordsPart<'a>>),
    /// Up rows as a matrix, down rows one by one.
    Apart {
        up: Placed<MatrixPart<'a>>,
        down: Placed<RecordsPart<'a>>,
    },
    /// Up rows and plain `ffn_down` as matrices.
    Dense {
        up: Placed<MatrixPart<'a>>,
        down: Placed<MatrixPart<'a>>,
    },
}

/// Some neurons of a layer.
#[derive(Debug, Clone)]
pub(super) struct ColdLayout<'a> {
    pub gate: Placed<MatrixPart<'a>>,
    pub ffn: FfnLayout<'a>,
    pub sketch: Option<SketchLayout<'a>>,
}

/// One node's part of a layer.
#[derive(Debug, Clone)]
pub(super) struct LayerLayout<'a> {
    /// Groups of neurons, and these neurons in the layer's order.
    pub groups: Range<usize>,
    pub neurons: Range<usize>,
    /// The file's neuron of each neuron of the layer; none where the order is the file's.
    pub order: Option<&'a [u32]>,
    pub wq: Placed<MatrixPart<'a>>,
    pub wk: Placed<MatrixPart<'a>>,
    pub wv: Placed<MatrixPart<'a>>,
    pub wo: Placed<MatrixPart<'a>>,
    /// The node's own neurons.
    pub cold: ColdLayout<'a>,
    /// Those of other nodes, where each has all; nothing reads them while the division is what it is.
    pub copies: Vec<ColdLayout<'a>>,
    /// The two matrices that predict the layer from the one before; on node 0.
    pub ahead: Option<[Placed<MatrixPart<'a>>; 2]>,
}

impl LayerLayout<'_> {
    /// Bytes of the node's own neurons, which a GPU takes as they lie.
    pub fn streamed_bytes(&self) -> u64 {
        if self.neurons.is_empty() {
            return 0;
        }
        let gate = match &self.cold.sketch {
            Some(SketchLayout::Bits(planes)) => planes.at.len(),
            _ => self.cold.gate.at.len(),
        };
        let ffn = match &self.cold.ffn {
            FfnLayout::Paired(records) => records.at.len(),
            FfnLayout::Apart { up, down } => up.at.len() + down.at.len(),
            FfnLayout::Dense { up, down } => up.at.len() + down.at.len(),
        };
        (gate + ffn) as u64
    }
}

/// One node's arena.
#[derive(Debug, Clone)]
pub(super) struct NodeLayout<'a> {
    pub share: NodeShare,
    pub layers: Vec<LayerLayout<'a>>,
    pub head: Placed<MatrixPart<'a>>,
    /// Projection and rows of the head's sketch, where there is one.
    pub sketch: Option<[Placed<MatrixPart<'a>>; 2]>,
    /// Bytes of the arena.
    pub bytes: usize,
    /// Bytes of the arena that are filled: all but the gaps before aligned starts.
    pub filled_bytes: usize,
}

/// The arenas of all nodes.
#[derive(Debug, Clone)]
pub(super) struct ModelLayout<'a> {
    pub neuron_groups: [usize; FFN_GROUPS + 1],
    pub nodes: Vec<NodeLayout<'a>>,
}

impl<'a> ModelLayout<'a> {
    /// Divides a model over nodes.
    pub fn new(
        hyper: &Hyperparameters,
        tensors: &'a ModelTensors,
        plan: &SparsityPlan,
        predictors: Option<&'a [LayerPredictors]>,
        division: &Division,
        hot: Option<&'a [HotLayer]>,
        on_gpu: bool,
    ) -> Self {
        let multiple = neuron_multiple(plan);
        let neuron_groups = neuron_groups(hyper.n_ff, multiple);
        let shares = divide(hyper, division, multiple);
        // what a node computes of a layer, and what it has a copy of
        let of_node = |node: usize, layer: usize| {
            let hot = hot.map(|hot| &hot[layer]);
            let groups = |node: usize| match hot {
                Some(hot) => cold_groups(division, hot.groups, node),
                None => shares[node].groups.clone(),
            };
            let neurons = |groups: Range<usize>| Neurons {
                range: neuron_groups[groups.start]..neuron_groups[groups.end],
                order: hot.and_then(|hot| hot.order.as_deref()),
            };
            let others = (0..shares.len()).filter(|other| *other != node);
            LayerNeurons {
                own: neurons(groups(node)),
                copies: match division.cold {
                    ColdPolicy::Replicate => others.map(|other| neurons(groups(other))).collect(),
                    ColdPolicy::Shard | ColdPolicy::Interleave | ColdPolicy::Single(_) => vec![],
                },
                groups: groups(node),
            }
        };
        let nodes = shares.iter().enumerate();
        Self {
            neuron_groups,
            nodes: nodes
                .map(|(node, share)| {
                    let mut share = share.clone();
                    if hot.is_some() {
                        share.keep_nothing_but_neurons();
                    }
                    let owned = Owned {
                        // a GPU predicts, and has all but cold neurons
                        is_device: node == 0 && hot.is_none(),
                        on_gpu,
                        share,
                        layers: (0..hyper.n_layer)
                            .map(|layer| of_node(node, layer))
                            .collect(),
                    };
                    NodeLayout::new(hyper, tensors, plan, predictors, owned)
                })
                .collect(),
        }
    }
}

/// Neurons that no boundary may part: a group of gate rows, or a block of a plain down projection.
pub(super) fn neuron_multiple(plan: &SparsityPlan) -> usize {
    let multiple = |down: &DownPlan| match down {
        DownPlan::Dense(quant) => quant.block_values().max(ROW_GROUP),
        DownPlan::NeuronRows(_) | DownPlan::Transposed { .. } => ROW_GROUP,
    };
    plan.down.iter().map(multiple).max().unwrap_or(ROW_GROUP)
}

/// What a node is to have.
struct Owned<'a> {
    /// Whether it is the device's, which predicts ahead.
    is_device: bool,
    /// Whether a GPU has all but cold neurons, and predicts ahead.
    on_gpu: bool,
    share: NodeShare,
    /// Neurons of each layer.
    layers: Vec<LayerNeurons<'a>>,
}

/// Neurons of a layer that a node is to have.
struct LayerNeurons<'a> {
    /// Groups of its own.
    groups: Range<usize>,
    /// The neurons of these.
    own: Neurons<'a>,
    /// Neurons of other nodes that it has too.
    copies: Vec<Neurons<'a>>,
}

impl<'a> NodeLayout<'a> {
    fn new(
        hyper: &Hyperparameters,
        tensors: &'a ModelTensors,
        plan: &SparsityPlan,
        predictors: Option<&'a [LayerPredictors]>,
        owned: Owned<'a>,
    ) -> Self {
        let mut placing = Placing {
            on_gpu: owned.on_gpu,
            ..Placing::default()
        };
        let of_layer = |index: usize| predictors.map(|all| &all[index]);
        let layers = tensors
            .layers
            .iter()
            .zip(&plan.down)
            .zip(&owned.layers)
            .enumerate();
        let layers = layers
            .map(|(index, ((layer, down), neurons))| {
                let skipping = plan.skipping(index);
                let predictors = of_layer(index);
                placing.layer(hyper, layer, skipping, *down, predictors, &owned, neurons)
            })
            .collect();
        let share = owned.share;
        let mut head = MatrixPart::rows(tensors.head(), share.head_rows.clone());
        if tensors.head_sketch.is_some() {
            head.layout = Layout::Rows;
        }
        let head = placing.matrix(head);
        let sketch = tensors.head_sketch.as_ref().map(|sketch| {
            let project = MatrixPart::of_sidecar(&sketch.project, 0..sketch.project.n_rows());
            let scores = MatrixPart::of_sidecar(&sketch.scores, share.head_rows.clone());
            [project, scores].map(|part| placing.matrix(part))
        });
        Self {
            share,
            layers,
            head,
            sketch,
            bytes: placing.end,
            filled_bytes: placing.filled,
        }
    }
}

/// Hands out an arena from its start to its end.
#[derive(Default)]
struct Placing {
    end: usize,
    filled: usize,
    /// Whether a GPU has all but cold neurons, and predicts ahead.
    on_gpu: bool,
}

impl Placing {
    fn place<T>(&mut self, part: T, bytes: usize) -> Placed<T> {
        let start = self.end;
        self.filled += bytes;
        self.end = (start + bytes).next_multiple_of(ALIGNMENT_BYTES);
        Placed {
            at: start..start + bytes,
            part,
        }
    }

    fn matrix<'a>(&mut self, part: MatrixPart<'a>) -> Placed<MatrixPart<'a>> {
        let bytes = part.shape().packed_bytes();
        self.place(part, bytes)
    }

    fn records<'a>(&mut self, part: RecordsPart<'a>) -> Placed<RecordsPart<'a>> {
        let bytes = part.neurons.len() * part.record_bytes();
        self.place(part, bytes)
    }

    fn layer<'a>(
        &mut self,
        hyper: &Hyperparameters,
        layer: &'a LayerTensors,
        skipping: Skipping,
        down: DownPlan,
        predictors: Option<&'a LayerPredictors>,
        owned: &Owned<'_>,
        neurons: &LayerNeurons<'a>,
    ) -> LayerLayout<'a> {
        let share = &owned.share;
        let rows = |heads: &Range<usize>, heads_per_kv: usize| {
            let rows_per_head = heads_per_kv * hyper.head_dim;
            heads.start * rows_per_head..heads.end * rows_per_head
        };
        let q_rows = rows(&share.kv_heads, hyper.n_head / hyper.n_head_kv);
        let kv_rows = rows(&share.kv_heads, 1);
        if self.on_gpu {
            self.end = self.end.next_multiple_of(PAGE_BYTES);
        }
        LayerLayout {
            groups: neurons.groups.clone(),
            neurons: neurons.own.range.clone(),
            order: neurons.own.order,
            wq: self.matrix(MatrixPart::rows(&layer.wq, q_rows)),
            wk: self.matrix(MatrixPart::rows(&layer.wk, kv_rows.clone())),
            wv: self.matrix(MatrixPart::rows(&layer.wv, kv_rows)),
            wo: self.matrix(MatrixPart::rows(&layer.wo, share.output_rows.clone())),
            cold: ColdLayout {
                gate: self.gate(layer, predictors, &neurons.own),
                ffn: self.ffn(hyper.n_embd, layer, skipping, down, &neurons.own),
                sketch: self.sketch(layer, predictors, &neurons.own, true),
            },
            copies: (neurons.copies.iter())
                .map(|neurons| ColdLayout {
                    gate: self.gate(layer, predictors, neurons),
                    ffn: self.ffn(hyper.n_embd, layer, skipping, down, neurons),
                    sketch: self.sketch(layer, predictors, neurons, false),
                })
                .collect(),
            ahead: match owned.is_device {
                true => self.ahead(predictors),
                false => None,
            },
        }
    }

    /// Whether a predictor ahead, on a GPU, names all that is looked at.
    fn decides_alone(&self, predictors: Option<&LayerPredictors>) -> bool {
        let ahead = predictors.and_then(|layer| layer.ahead.as_ref());
        self.on_gpu && ahead.is_some_and(|ahead| ahead.alone)
    }

    /// The gate as its sketch wants it: in planes there is nothing left of it here.
    fn gate<'a>(
        &mut self,
        layer: &'a LayerTensors,
        predictors: Option<&LayerPredictors>,
        neurons: &Neurons<'a>,
    ) -> Placed<MatrixPart<'a>> {
        let sketch = predictors.and_then(|layer| layer.sketch.as_ref());
        let whole = MatrixPart::neurons(&layer.gate, neurons);
        if self.decides_alone(predictors) {
            return self.matrix(MatrixPart {
                layout: Layout::Rows,
                ..whole
            });
        }
        self.matrix(match sketch.map(|sketch| &sketch.kind) {
            None => whole,
            Some(SketchKind::LowRank { .. }) => MatrixPart {
                layout: Layout::Rows,
                ..whole
            },
            Some(SketchKind::Bits { .. }) => MatrixPart {
                rows: neurons.range.start..neurons.range.start,
                ..whole
            },
        })
    }

    /// `is_own`: whether what all neurons' scores have in common is needed, of which one is enough.
    fn sketch<'a>(
        &mut self,
        layer: &'a LayerTensors,
        predictors: Option<&'a LayerPredictors>,
        neurons: &Neurons<'a>,
        is_own: bool,
    ) -> Option<SketchLayout<'a>> {
        if self.decides_alone(predictors) {
            return Some(SketchLayout::Nothing);
        }
        Some(match &predictors?.sketch.as_ref()?.kind {
            SketchKind::LowRank { a, b } => SketchLayout::LowRank {
                a: self.matrix(MatrixPart::of_sidecar(
                    a,
                    0..if is_own { a.n_rows() } else { 0 },
                )),
                b: self.matrix(MatrixPart {
                    of_model: false,
                    ..MatrixPart::neurons(b, neurons)
                }),
            },
            SketchKind::Bits { .. } => {
                let source = &layer.gate;
                let part = PlanesPart {
                    source,
                    neurons: neurons.range.clone(),
                    order: neurons.order,
                };
                let bytes = part.shape().top_bytes() + part.shape().rest_bytes();
                SketchLayout::Bits(self.place(part, bytes))
            }
        })
    }

    fn ahead<'a>(
        &mut self,
        predictors: Option<&'a LayerPredictors>,
    ) -> Option<[Placed<MatrixPart<'a>>; 2]> {
        let ahead = predictors?.ahead.as_ref()?;
        Some([&ahead.a, &ahead.b].map(|matrix| {
            let rows = 0..matrix.n_rows();
            self.matrix(MatrixPart::of_sidecar(matrix, rows))
        }))
    }

    fn ffn<'a>(
        &mut self,
        n_embd: usize,
        layer: &'a LayerTensors,
        skipping: Skipping,
        down: DownPlan,
        neurons: &Neurons<'a>,
    ) -> FfnLayout<'a> {
        let (down_quant, transposed) = match down {
            DownPlan::NeuronRows(quant) => (quant, false),
            DownPlan::Transposed { to, .. } => (to, true),
            DownPlan::Dense(_) => {
                let source = layer.down.matrix();
                // the order of a plain down projection is the file's
                let (rows, cols) = (0..source.n_rows(), neurons.range.clone());
                return FfnLayout::Dense {
                    up: self.matrix(MatrixPart::neurons(&layer.up, neurons)),
                    down: self.matrix(MatrixPart {
                        cols,
                        ..MatrixPart::rows(source, rows)
                    }),
                };
            }
        };
        let records = RecordsPart {
            up: (skipping == Skipping::UpAndDown).then_some(&layer.up),
            down: layer.down.matrix(),
            down_quant,
            transposed,
            n_embd,
            neurons: neurons.range.clone(),
            order: neurons.order,
        };
        match skipping {
            Skipping::UpAndDown => FfnLayout::Paired(self.records(records)),
            Skipping::Nothing | Skipping::Down => FfnLayout::Apart {
                up: self.matrix(MatrixPart::neurons(&layer.up, neurons)),
                down: self.records(records),
            },
        }
    }
}
