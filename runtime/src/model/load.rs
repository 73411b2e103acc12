//! From a file to weights in memory: divided over nodes, packed for the mode, copied by each node's own threads.
//!
//! Each node has one arena. Its threads fill it, so that the pages of it come from their node's memory (first touch),
//! and the file's pages are given back as they are copied: the process holds about the size of the file at any time.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use pi_actors::gpu::weights::GpuLayer;
use pi_actors::weights::{
    AheadWeights, Embedding, EmbeddingRows, FfnShare, GateActivation, HeadShare, HeadSketch,
    HeadSketchShare, LayerShare, LayerWeights, Matrix, ModelShape, ModelWeights, NeuronStore,
    PlanesStore, SketchKind, SketchShare, UpRows,
};
use pi_kernels::attention::KvType;
use pi_topology::ArenaWriter;

use super::copy_task::{CopyTask, PageDrop, copy_tasks};
use super::error::ModelError;
use super::gpu::HotLayer;
use super::hyperparameters::{GateKind, Hyperparameters};
use super::layout::{
    FfnLayout, LayerLayout, MatrixPart, ModelLayout, Placed, RecordsPart, SketchLayout,
};
use super::moves::{LayerMoves, NeuronMoves};
use super::node_memory::{Arena, NodeMemory, NodeThreads};
use super::shares::{Division, NodeShare};
use super::sparsity::SparsityPlan;
use super::tensors::{ModelTensors, QkvBias};
use super::threshold::Thresholds;
use crate::gguf::GgufFile;
use crate::mapped_file::Access;
use crate::sidecar::{LayerPredictors, SketchKind as FileSketchKind};

/// Sizes and constants of a model with a context of `n_ctx` tokens, as the actors take them.
///
/// # Errors
/// [`ModelError::ContextTooLong`] for more than the model knows, and rotations that are not supported.
pub fn model_shape(
    hyper: &Hyperparameters,
    tensors: &ModelTensors,
    n_ctx: usize,
) -> Result<ModelShape, ModelError> {
    if n_ctx > hyper.n_ctx_max {
        return Err(ModelError::ContextTooLong {
            asked: n_ctx,
            limit: hyper.n_ctx_max,
        });
    }
    Ok(ModelShape {
        n_layer: hyper.n_layer,
        n_embd: hyper.n_embd,
        n_ff: hyper.n_ff,
        n_head: hyper.n_head,
        n_head_kv: hyper.n_head_kv,
        head_dim: hyper.head_dim,
        n_vocab: hyper.n_vocab,
        n_ctx,
        rms_eps: hyper.rms_eps,
        gate_activation: match hyper.gate {
            GateKind::Silu => GateActivation::Silu,
            GateKind::Gelu => GateActivation::Gelu,
            GateKind::Relu => GateActivation::Relu,
        },
        embedding_scale: hyper.embedding_scale,
        rope: hyper.rope.spec(tensors.rope_freqs.clone())?,
        attn_scale: 1.0 / (hyper.head_dim as f32).sqrt(),
        window: hyper.window,
    })
}

/// A model that is about to be loaded: what goes where is decided, nothing is copied yet.
#[derive(Debug)]
pub struct Loader<'a> {
    file: &'a GgufFile,
    tensors: &'a ModelTensors,
    shape: ModelShape,
    layout: ModelLayout<'a>,
    /// Bytes of transposed copies.
    transposed_bytes: u64,
    thresholds: Option<Arc<Thresholds>>,
    predictors: Option<&'a [LayerPredictors]>,
    /// Whether a GPU has all but cold neurons.
    on_gpu: bool,
}

impl<'a> Loader<'a> {
    /// Divides a model over nodes with this many threads each, for a context of `n_ctx` tokens.
    ///
    /// # Errors
    /// As [`model_shape`].
    ///
    /// # Panics
    /// Without nodes, or with a node without threads.
    pub fn new(
        file: &'a GgufFile,
        hyper: &Hyperparameters,
        tensors: &'a ModelTensors,
        plan: &SparsityPlan,
        threads: &[usize],
        n_ctx: usize,
    ) -> Result<Self, ModelError> {
        let division = &Division::by_threads(threads);
        Self::predicted(file, hyper, tensors, plan, None, division, None, n_ctx)
    }

    /// The same for any division, with those predictors that shall work, and of cold neurons alone where `hot` says which
    /// are a GPU's.
    ///
    /// # Errors
    /// As [`model_shape`].
    ///
    /// # Panics
    /// As [`Loader::new`].
    pub fn predicted(
        file: &'a GgufFile,
        hyper: &Hyperparameters,
        tensors: &'a ModelTensors,
        plan: &SparsityPlan,
        predictors: Option<&'a [LayerPredictors]>,
        division: &Division,
        hot: Option<&'a [HotLayer]>,
        n_ctx: usize,
    ) -> Result<Self, ModelError> {
        let parts = &division.parts;
        assert!(
            !parts.is_empty() && !parts.contains(&0),
            "every node has threads: {parts:?}"
        );
        Ok(Self {
            file,
            tensors,
            shape: model_shape(hyper, tensors, n_ctx)?,
            layout: ModelLayout::new(
                hyper,
                tensors,
                plan,
                predictors,
                division,
                hot,
                hot.is_some(),
            ),
            on_gpu: hot.is_some(),
            transposed_bytes: plan.transposed_bytes(hyper.n_embd, hyper.n_ff),
            thresholds: plan.thresholds.clone(),
            predictors,
        })
    }

    /// Bytes of each node's arena.
    pub fn node_bytes(&self) -> Vec<usize> {
        self.layout.nodes.iter().map(|node| node.bytes).collect()
    }

    /// Bytes of each node's keys and values of a full context, in the format `kv_type`.
    pub fn cache_bytes(&self, kv_type: KvType) -> Vec<u64> {
        let shape = &self.shape;
        let head_bytes = 2 * shape.n_ctx * shape.n_layer * kv_type.row_bytes(shape.head_dim);
        let shares = self.shares().into_iter();
        shares
            .map(|share| (head_bytes * share.kv_heads.len()) as u64)
            .collect()
    }

    /// Each node's part of every layer.
    pub fn shares(&self) -> Vec<&NodeShare> {
        self.layout.nodes.iter().map(|node| &node.share).collect()
    }

    /// Boundaries of the neuron groups of a layer.
    pub fn neuron_groups(&self) -> &[usize] {
        &self.layout.neuron_groups
    }

    /// Each node's own neurons of a layer, ids of the file.
    pub fn neuron_ids(&self, layer: usize) -> Vec<Vec<u32>> {
        let nodes = self.layout.nodes.iter();
        let layers = nodes.map(|node| &node.layers[layer]);
        layers
            .map(|layer| match layer.order {
                Some(order) => order[layer.neurons.clone()].to_vec(),
                None => (layer.neurons.clone()).map(|id| id as u32).collect(),
            })
            .collect()
    }

    /// Bytes of the nodes' own neurons of some layers, as a GPU streams them for a prompt.
    pub fn streamed_bytes(&self, layers: Range<usize>) -> u64 {
        let nodes = self.layout.nodes.iter();
        let layers = nodes.flat_map(|node| &node.layers[layers.clone()]);
        layers.map(LayerLayout::streamed_bytes).sum()
    }

    /// What lets neurons change places with those that GPUs have, as `gpus` has all layers.
    ///
    /// # Panics
    /// When these are not as many.
    pub fn moves<'g>(&self, gpus: impl IntoIterator<Item = &'g GpuLayer>) -> NeuronMoves {
        let gpus: Vec<&GpuLayer> = gpus.into_iter().collect();
        assert_eq!(gpus.len(), self.tensors.layers.len(), "all layers");
        NeuronMoves::new(gpus.into_iter().enumerate().map(|(index, gpu)| {
            let nodes: Vec<&LayerLayout<'_>> = (self.layout.nodes.iter())
                .map(|node| &node.layers[index])
                .collect();
            let predictors = self.predictors.map(|all| &all[index]);
            LayerMoves::new(&self.tensors.layers[index], &nodes, predictors, gpu)
        }))
    }

    /// Bytes of all arenas but the gaps between matrices: what the progress counts up to.
    pub fn copied_bytes(&self) -> u64 {
        let nodes = self.layout.nodes.iter();
        nodes.map(|node| node.filled_bytes as u64).sum()
    }

    /// Bytes in the arenas that are transposed copies of plain down projections.
    pub fn transposed_bytes(&self) -> u64 {
        self.transposed_bytes
    }

    /// Copies the weights into `memory` with `threads`, whose numbers must be those of [`Loader::new`].
    ///
    /// `progress` is called from all threads with the bytes copied so far.
    ///
    /// # Errors
    /// Memory that the machine does not give, or a thread that failed.
    pub fn load(
        self,
        threads: &dyn NodeThreads,
        memory: &dyn NodeMemory,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<ModelWeights, ModelError> {
        Ok(self.load_with_writers(threads, memory, progress)?.0)
    }

    /// The same, and what writes again to each node's arena; none where the memory cannot be had so.
    ///
    /// # Errors
    /// As [`Loader::load`].
    pub fn load_with_writers(
        self,
        threads: &dyn NodeThreads,
        memory: &dyn NodeMemory,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(ModelWeights, Option<Vec<ArenaWriter>>), ModelError> {
        let nodes = &self.layout.nodes;
        assert_eq!(threads.n_threads().len(), nodes.len(), "a team per node");
        if self.transposed_bytes > 0 {
            // what `off` runs is not written in another type: `pack` is for gates that close
            let cure = match self.shape.gate_activation {
                GateActivation::Relu => "`pi-runtime pack` does it once and for all",
                GateActivation::Silu | GateActivation::Gelu => "each start does",
            };
            tracing::warn!(
                "transposing the down projections into {} MB; {cure}",
                self.transposed_bytes.div_ceil(1_000_000)
            );
        }
        let mut arenas: Vec<Box<dyn Arena>> = (nodes.iter().enumerate())
            .map(|(node, layout)| memory.allocate(node, layout.bytes))
            .collect::<Result<_, _>>()?;
        self.fill(&mut arenas, threads, progress)?;
        let frozen = arenas.into_iter().map(|arena| arena.freeze_with_writer());
        let (arenas, writers): (Vec<Bytes>, Vec<Option<ArenaWriter>>) = frozen.unzip();
        memory.filled(&arenas)?;
        Ok((self.weights(&arenas), writers.into_iter().collect()))
    }

    fn fill(
        &self,
        arenas: &mut [Box<dyn Arena>],
        threads: &dyn NodeThreads,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), ModelError> {
        let tasks: Vec<Vec<CopyTask<'_, '_>>> = (self.layout.nodes.iter().zip(arenas))
            .map(|(node, arena)| copy_tasks(node, arena.as_mut_slice()))
            .collect();
        let pages = PageDrop::new(self.file, tasks.iter().flatten());
        let queues: Vec<_> = (tasks.into_iter())
            .map(|tasks| Mutex::new(tasks.into_iter()))
            .collect();
        let copied = AtomicU64::new(0);
        self.file.advise(Access::Sequential);
        threads.run(&|thread| {
            let next = || {
                let mut queue = queues[thread.node].lock().expect("no task panics in here");
                queue.next()
            };
            while let Some(mut task) = next() {
                let bytes = task.run() as u64;
                pages.finished(&task);
                progress(copied.fetch_add(bytes, Ordering::Relaxed) + bytes);
            }
        })?;
        self.file.advise(Access::Normal);
        Ok(())
    }

    fn weights(&self, arenas: &[Bytes]) -> ModelWeights {
        let nodes = || self.layout.nodes.iter().zip(arenas);
        let layers = (self.tensors.layers.iter().enumerate())
            .map(|(index, layer)| LayerWeights {
                attn_norm: layer.attn_norm.clone(),
                ffn_norm: layer.ffn_norm.clone(),
                shares: nodes()
                    .map(|(node, arena)| {
                        let bias = layer.qkv_bias.as_ref();
                        let layer = &node.layers[index];
                        let thresholds = self.layer_thresholds(index, layer);
                        LayerShare {
                            thresholds,
                            ..self.layer_share(&node.share, layer, bias, index, arena)
                        }
                    })
                    .collect(),
                ahead: self.ahead(index, &arenas[0]),
            })
            .collect();
        let token_embd = &self.tensors.token_embd;
        ModelWeights {
            shape: self.shape.clone(),
            neuron_groups: self.layout.neuron_groups,
            layers,
            output_norm: self.tensors.output_norm.clone(),
            head: nodes()
                .map(|(node, arena)| HeadShare {
                    rows: node.share.head_rows.clone(),
                    matrix: matrix(&node.head, arena),
                })
                .collect(),
            head_sketch: self.tensors.head_sketch.as_ref().map(|sketch| HeadSketch {
                n_groups: sketch.n_groups,
                shares: nodes()
                    .filter_map(|(node, arena)| node.sketch.as_ref().zip(Some(arena)))
                    .map(|([project, scores], arena)| HeadSketchShare {
                        project: matrix(project, arena),
                        scores: matrix(scores, arena),
                    })
                    .collect(),
            }),
            embedding: match self.tensors.output {
                None if !self.on_gpu => Embedding::Tied,
                _ => Embedding::Rows(EmbeddingRows {
                    quant: token_embd.quant,
                    n_embd: token_embd.n_cols(),
                    bytes: token_embd.bytes.clone(),
                }),
            },
        }
    }

    fn layer_thresholds(&self, layer: usize, layout: &LayerLayout<'_>) -> Option<Vec<f32>> {
        let layer = self.thresholds.as_ref()?.layers[layer].as_ref()?;
        Some(of_neurons(&layer.values, layout))
    }

    fn layer_share(
        &self,
        share: &NodeShare,
        layer: &LayerLayout<'_>,
        bias: Option<&QkvBias>,
        index: usize,
        arena: &Bytes,
    ) -> LayerShare {
        let part =
            |values: &[f32], rows: &Placed<MatrixPart<'_>>| values[rows.part.rows.clone()].to_vec();
        LayerShare {
            kv_heads: share.kv_heads.clone(),
            wq: matrix(&layer.wq, arena),
            wk: matrix(&layer.wk, arena),
            wv: matrix(&layer.wv, arena),
            bq: bias.map(|bias| part(&bias.q, &layer.wq)),
            bk: bias.map(|bias| part(&bias.k, &layer.wk)),
            bv: bias.map(|bias| part(&bias.v, &layer.wv)),
            output_rows: share.output_rows.clone(),
            wo: matrix(&layer.wo, arena),
            groups: layer.groups.clone(),
            neurons: layer.neurons.clone(),
            gate: matrix(&layer.cold.gate, arena),
            thresholds: None,
            sketch: self.sketch(layer, index, arena),
            ffn: match &layer.cold.ffn {
                FfnLayout::Paired(placed) => FfnShare::Neurons {
                    up: UpRows::Paired,
                    rows: records(placed, arena),
                },
                FfnLayout::Apart { up, down } => FfnShare::Neurons {
                    up: UpRows::Interleaved(matrix(up, arena)),
                    rows: records(down, arena),
                },
                FfnLayout::Dense { up, down } => FfnShare::Dense {
                    up: matrix(up, arena),
                    down: matrix(down, arena),
                },
            },
        }
    }
}

impl Loader<'_> {
    fn sketch(&self, layer: &LayerLayout<'_>, index: usize, arena: &Bytes) -> Option<SketchShare> {
        if let Some(SketchLayout::Nothing) = layer.cold.sketch {
            return Some(SketchShare {
                kind: SketchKind::Nothing,
                bias: Vec::new().into(),
                floor: None,
            });
        }
        let sketch = self.predictors?[index].sketch.as_ref()?;
        let mine = |values: &Vec<f32>| of_neurons(values, layer);
        let kind = match layer.cold.sketch.as_ref()? {
            SketchLayout::Nothing => SketchKind::Nothing,
            SketchLayout::LowRank { a, b } => SketchKind::LowRank {
                a: matrix(a, arena),
                b: matrix(b, arena),
            },
            SketchLayout::Bits(placed) => {
                let shape = placed.part.shape();
                let both = arena.slice(placed.at.clone());
                let planes = PlanesStore {
                    shape,
                    top: both.slice(..shape.top_bytes()),
                    rest: both.slice(shape.top_bytes()..),
                };
                let two_bit_bias = match &sketch.kind {
                    FileSketchKind::Bits { two_bit_bias } => two_bit_bias.as_ref(),
                    FileSketchKind::LowRank { .. } => None,
                };
                SketchKind::Bits {
                    planes,
                    two_bit_bias: two_bit_bias.map(|values| mine(values).into()),
                }
            }
        };
        Some(SketchShare {
            kind,
            bias: mine(&sketch.bias).into(),
            floor: sketch.floor.as_ref().map(|floors| mine(floors).into()),
        })
    }

    fn ahead(&self, index: usize, arena: &Bytes) -> Option<AheadWeights> {
        let ahead = self.predictors?[index].ahead.as_ref()?;
        let [a, b] = self.layout.nodes[0].layers[index].ahead.as_ref()?;
        Some(AheadWeights {
            a: matrix(a, arena),
            a_bias: ahead.a_bias.clone(),
            b: matrix(b, arena),
            b_bias: ahead.b_bias.clone(),
            prefetch: ahead.prefetch,
            alone: ahead.alone,
        })
    }
}

/// Values of a node's neurons of a layer, out of those of all in the file's order.
fn of_neurons(values: &[f32], layer: &LayerLayout<'_>) -> Vec<f32> {
    match layer.order {
        None => values[layer.neurons.clone()].to_vec(),
        Some(order) => {
            let mine = order[layer.neurons.clone()].iter();
            mine.map(|&id| values[id as usize]).collect()
        }
    }
}

fn matrix(placed: &Placed<MatrixPart<'_>>, arena: &Bytes) -> Matrix {
    Matrix {
        shape: placed.part.shape(),
        bytes: arena.slice(placed.at.clone()),
    }
}

fn records(placed: &Placed<RecordsPart<'_>>, arena: &Bytes) -> NeuronStore {
    let part = &placed.part;
    NeuronStore {
        up: part.up.map(|up| up.quant),
        down: part.down_quant,
        n_embd: part.n_embd,
        n_neurons: part.neurons.len(),
        bytes: arena.slice(placed.at.clone()),
    }
}
