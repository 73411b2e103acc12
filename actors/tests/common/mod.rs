//! A small random model for tests of actors, the same model computed by plain loops, and a feeder
//! that collects logits.
#![allow(dead_code)]

pub mod naive;
pub mod sketches;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pi_actors::faults::Faults;
use pi_actors::trace::TraceBounds;
use pi_actors::weights::{
    Embedding, EmbeddingRows, FfnShare, GateActivation, HeadShare, HeadSketch, HeadSketchShare,
    LayerShare, LayerWeights, Matrix, ModelShape, ModelWeights, NeuronStore, SparsityMode, UpRows,
};
use pi_actors::{
    ActorError, Engine, EngineOptions, Feed, Feeder, LayerTap, LogitsWanted, Next, Run, Teams,
};
use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_kernels::rope::{RopePairs, RopeScaling, RopeSpec};
use pi_kernels::{ActivationMode, Cpu, Layout, MatrixShape, QuantType};
use pi_topology::{HugePages, NodePlan, Plan};

pub const N_EMBD: usize = 64;
pub const N_FF: usize = 512;
pub const N_VOCAB: usize = 112;
pub const N_LAYER: usize = 3;
pub const N_HEAD: usize = 4;
pub const N_HEAD_KV: usize = 2;
pub const HEAD_DIM: usize = 16;
pub const N_CTX: usize = 700;

/// Values in −1 … 1, the same in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    pub fn matrix(&mut self, n_rows: usize, n_cols: usize) -> Vec<f32> {
        let scale = 1.5 / (n_cols as f32).sqrt();
        (0..n_rows * n_cols).map(|_| scale * self.next()).collect()
    }
}

/// One layer's weights as plain rows.
pub struct PlainLayer {
    pub attn_norm: Vec<f32>,
    pub wq: Vec<f32>,
    pub wk: Vec<f32>,
    pub wv: Vec<f32>,
    pub bq: Vec<f32>,
    pub bk: Vec<f32>,
    pub bv: Vec<f32>,
    pub wo: Vec<f32>,
    pub ffn_norm: Vec<f32>,
    /// `[N_FF, N_EMBD]`, and so are the next two.
    pub gate: Vec<f32>,
    pub up: Vec<f32>,
    pub down_t: Vec<f32>,
    pub predictors: PlainPredictors,
}

/// A model's weights as plain rows.
pub struct PlainModel {
    pub activation: GateActivation,
    pub embedding_scale: f32,
    /// Positions that a token sees, where it does not see all before it.
    pub window: Option<usize>,
    pub embedding: Vec<f32>,
    pub head: Vec<f32>,
    pub output_norm: Vec<f32>,
    pub layers: Vec<PlainLayer>,
}

impl PlainModel {
    pub fn random(seed: u64, activation: GateActivation) -> Self {
        let mut random = Random(seed);
        let norm = |random: &mut Random| (0..N_EMBD).map(|_| 1.0 + 0.2 * random.next()).collect();
        let layer = |random: &mut Random| PlainLayer {
            attn_norm: norm(random),
            wq: random.matrix(N_HEAD * HEAD_DIM, N_EMBD),
            wk: random.matrix(N_HEAD_KV * HEAD_DIM, N_EMBD),
            wv: random.matrix(N_HEAD_KV * HEAD_DIM, N_EMBD),
            bq: random.matrix(N_HEAD * HEAD_DIM, 1),
            bk: random.matrix(N_HEAD_KV * HEAD_DIM, 1),
            bv: random.matrix(N_HEAD_KV * HEAD_DIM, 1),
            wo: random.matrix(N_EMBD, N_HEAD * HEAD_DIM),
            ffn_norm: norm(random),
            gate: random.matrix(N_FF, N_EMBD),
            up: random.matrix(N_FF, N_EMBD),
            down_t: random.matrix(N_FF, N_EMBD),
            predictors: PlainPredictors::default(),
        };
        Self {
            activation,
            embedding_scale: 1.0,
            window: None,
            embedding: random.matrix(N_VOCAB, N_EMBD),
            head: random.matrix(N_VOCAB, N_EMBD),
            output_norm: norm(&mut random),
            layers: (0..N_LAYER).map(|_| layer(&mut random)).collect(),
        }
        .with_predictors(seed)
    }

    fn with_predictors(mut self, seed: u64) -> Self {
        let mut random = Random(seed ^ 0x5EED);
        for layer in &mut self.layers {
            layer.predictors = PlainPredictors::random(&mut random);
        }
        self
    }
}

/// How a model is put into memory.
#[derive(Debug, Clone, Copy)]
pub enum Form {
    /// Neuron by neuron, for this mode.
    Neurons(SparsityMode),
    /// With a plain `ffn_down`.
    Dense,
    /// Neuron by neuron, without those that contribute little.
    Threshold(Skip),
    /// Predicted: by these predictors.
    Predicted(Predictors),
}

/// Neurons are left out whose |act(gate)| · ‖down row‖, or |act(gate) · up| · ‖down row‖, is not above `tau`.
#[derive(Debug, Clone, Copy)]
pub struct Skip {
    pub by_gate: bool,
    pub tau: f32,
}

impl Skip {
    /// Threshold of the neuron with this row of down.
    pub fn threshold(self, down: &[f32]) -> f32 {
        self.tau / down.iter().map(|w| w * w).sum::<f32>().sqrt()
    }
}

#[allow(unused_imports)]
pub use sketches::{PlainPredictors, Predictors, SketchForm};

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn interleaved(rows: &[f32], n_cols: usize) -> Matrix {
    let n_rows = rows.len() / n_cols;
    let shape = MatrixShape {
        quant: QuantType::F32,
        n_rows,
        n_cols,
        layout: Layout::Interleaved,
    };
    let mut bytes = vec![0; shape.packed_bytes()];
    shape.pack(&bytes_of(rows), 0, &mut bytes);
    Matrix {
        shape,
        bytes: Bytes::from(bytes),
    }
}

/// Values of rows `rows` of a matrix.
fn rows(matrix: &[f32], n_cols: usize, rows: std::ops::Range<usize>) -> &[f32] {
    &matrix[rows.start * n_cols..rows.end * n_cols]
}

/// Divides `count` over `n` in multiples of `multiple`.
fn part(count: usize, n: usize, node: usize, multiple: usize) -> std::ops::Range<usize> {
    let units = count / multiple;
    units * node / n * multiple..units * (node + 1) / n * multiple
}

pub fn weights(model: &PlainModel, n_nodes: usize, form: Form) -> ModelWeights {
    let shape = ModelShape {
        n_layer: N_LAYER,
        n_embd: N_EMBD,
        n_ff: N_FF,
        n_head: N_HEAD,
        n_head_kv: N_HEAD_KV,
        head_dim: HEAD_DIM,
        n_vocab: N_VOCAB,
        n_ctx: N_CTX,
        rms_eps: 1e-5,
        gate_activation: model.activation,
        embedding_scale: model.embedding_scale,
        rope: RopeSpec {
            pairs: RopePairs::Adjacent,
            n_dims: HEAD_DIM,
            freq_base: 10_000.0,
            scaling: RopeScaling::None,
        },
        attn_scale: 1.0 / (HEAD_DIM as f32).sqrt(),
        window: model.window,
    };
    let layers = model.layers.iter().map(|layer| LayerWeights {
        attn_norm: layer.attn_norm.clone(),
        ffn_norm: layer.ffn_norm.clone(),
        shares: (0..n_nodes)
            .map(|node| share(layer, n_nodes, node, form))
            .collect(),
        ahead: sketches::ahead(layer, form),
    });
    let head = (0..n_nodes).map(|node| {
        let rows_of = part(N_VOCAB, n_nodes, node, 16);
        let matrix = interleaved(rows(&model.head, N_EMBD, rows_of.clone()), N_EMBD);
        HeadShare {
            rows: rows_of,
            matrix,
        }
    });
    let head = head.collect();
    ModelWeights {
        shape,
        neuron_groups: std::array::from_fn(|group| group * N_FF / FFN_GROUPS),
        layers: layers.collect(),
        output_norm: model.output_norm.clone(),
        head,
        head_sketch: None,
        embedding: Embedding::Rows(EmbeddingRows {
            quant: QuantType::F32,
            n_embd: N_EMBD,
            bytes: Bytes::from(bytes_of(&model.embedding)),
        }),
    }
}

fn share(layer: &PlainLayer, n_nodes: usize, node: usize, form: Form) -> LayerShare {
    let kv_heads = part(N_HEAD_KV, n_nodes, node, 1);
    let q_rows = kv_heads.start * 2 * HEAD_DIM..kv_heads.end * 2 * HEAD_DIM;
    let kv_rows = kv_heads.start * HEAD_DIM..kv_heads.end * HEAD_DIM;
    let groups = part(FFN_GROUPS, n_nodes, node, 1);
    let neurons = groups.start * N_FF / FFN_GROUPS..groups.end * N_FF / FFN_GROUPS;
    let output_rows = part(N_EMBD, n_nodes, node, 16);
    let matrix =
        |m: &[f32], range: std::ops::Range<usize>| interleaved(rows(m, N_EMBD, range), N_EMBD);
    LayerShare {
        kv_heads,
        wq: matrix(&layer.wq, q_rows.clone()),
        wk: matrix(&layer.wk, kv_rows.clone()),
        wv: matrix(&layer.wv, kv_rows.clone()),
        bq: Some(layer.bq[q_rows].to_vec()),
        bk: Some(layer.bk[kv_rows.clone()].to_vec()),
        bv: Some(layer.bv[kv_rows].to_vec()),
        output_rows: output_rows.clone(),
        wo: interleaved(
            rows(&layer.wo, N_HEAD * HEAD_DIM, output_rows),
            N_HEAD * HEAD_DIM,
        ),
        groups,
        gate: sketches::gate(layer, neurons.clone(), form),
        sketch: sketches::sketch(layer, neurons.clone(), form),
        ffn: ffn(layer, neurons.clone(), form),
        thresholds: match form {
            Form::Threshold(skip) => {
                let down = rows(&layer.down_t, N_EMBD, neurons.clone());
                let thresholds = down.chunks_exact(N_EMBD).map(|row| skip.threshold(row));
                Some(thresholds.collect())
            }
            Form::Neurons(_) | Form::Dense | Form::Predicted(_) => None,
        },
        neurons,
    }
}

fn ffn(layer: &PlainLayer, neurons: std::ops::Range<usize>, form: Form) -> FfnShare {
    let up = || interleaved(rows(&layer.up, N_EMBD, neurons.clone()), N_EMBD);
    let down = rows(&layer.down_t, N_EMBD, neurons.clone());
    let records = |paired: bool| {
        let mut bytes = Vec::new();
        for neuron in neurons.clone() {
            if paired {
                bytes.extend(bytes_of(rows(&layer.up, N_EMBD, neuron..neuron + 1)));
            }
            bytes.extend(bytes_of(rows(&layer.down_t, N_EMBD, neuron..neuron + 1)));
        }
        NeuronStore {
            up: paired.then_some(QuantType::F32),
            down: QuantType::F32,
            n_embd: N_EMBD,
            n_neurons: neurons.len(),
            bytes: Bytes::from(bytes),
        }
    };
    match form {
        Form::Neurons(SparsityMode::Off) | Form::Threshold(Skip { by_gate: false, .. }) => {
            FfnShare::Neurons {
                up: UpRows::Interleaved(up()),
                rows: records(false),
            }
        }
        Form::Neurons(_) | Form::Predicted(_) | Form::Threshold(_) => FfnShare::Neurons {
            up: UpRows::Paired,
            rows: records(true),
        },
        Form::Dense => {
            let n = neurons.len();
            let plain: Vec<f32> = (0..N_EMBD * n)
                .map(|i| down[i % n * N_EMBD + i / n])
                .collect();
            FfnShare::Dense {
                up: up(),
                down: interleaved(&plain, n),
            }
        }
    }
}

/// `n_nodes` teams of `n_threads` on the CPUs that the process may use, shared if there are few.
pub fn plan(n_nodes: usize, n_threads: usize) -> Plan {
    let cpus: Vec<usize> = pi_topology::Machine::discover()
        .unwrap()
        .nodes
        .iter()
        .flat_map(|node| node.cores.iter().flat_map(|core| core.cpus.clone()))
        .collect();
    let cpu = |thread: usize| cpus[thread % cpus.len()];
    let nodes = (0..n_nodes).map(|node| NodePlan {
        numa: None,
        cpus: (0..n_threads)
            .map(|thread| cpu(node * n_threads + thread))
            .collect(),
    });
    Plan::of_nodes(nodes.collect(), HugePages::Off)
}

pub struct Setup {
    pub n_nodes: usize,
    pub n_threads: usize,
    pub form: Form,
    pub activations: ActivationMode,
    pub n_ubatch: usize,
    pub faults: Faults,
    pub wait_limit: Duration,
    pub trace: Option<TraceBounds>,
    pub tap: Option<Arc<dyn LayerTap>>,
    /// Groups of the head's sketch, where there is to be one.
    pub sketch_groups: Option<usize>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            n_nodes: 1,
            n_threads: 2,
            form: Form::Neurons(SparsityMode::Exact),
            activations: ActivationMode::F32,
            n_ubatch: 64,
            faults: Faults::default(),
            wait_limit: Duration::from_secs(60),
            trace: None,
            tap: None,
            sketch_groups: None,
        }
    }
}

pub fn engine(model: &PlainModel, setup: Setup) -> Engine {
    let teams = Teams::start(&plan(setup.n_nodes, setup.n_threads)).unwrap();
    let options = EngineOptions {
        cpu: Cpu::detect(setup.activations),
        kv_type: KvType::F32,
        n_ubatch: setup.n_ubatch,
        wait_limit: setup.wait_limit,
        faults: setup.faults,
        trace: setup.trace,
        tap: setup.tap,
    };
    let mut weights = weights(model, setup.n_nodes, setup.form);
    if let Some(n_groups) = setup.sketch_groups {
        add_sketch(&mut weights, model, n_groups);
    }
    Engine::start(teams, weights, options).unwrap()
}

/// Numbers of the sketch that [`add_sketch`] adds.
pub const SKETCH_RANK: usize = 32;

/// A sketch of the head that sees every other number of the hidden state, and the head row by row.
pub fn add_sketch(weights: &mut ModelWeights, model: &PlainModel, n_groups: usize) {
    let project: Vec<f32> = (0..SKETCH_RANK * N_EMBD)
        .map(|i| f32::from(i % N_EMBD == i / N_EMBD * 2))
        .collect();
    let scores: Vec<f32> = model.head.iter().step_by(2).copied().collect();
    let share = |head: &HeadShare| HeadSketchShare {
        project: interleaved(&project, N_EMBD),
        scores: interleaved(rows(&scores, SKETCH_RANK, head.rows.clone()), SKETCH_RANK),
    };
    weights.head_sketch = Some(HeadSketch {
        n_groups,
        shares: weights.head.iter().map(share).collect(),
    });
    for head in &mut weights.head {
        head.matrix.shape.layout = Layout::Rows;
        // float rows lie in memory as they are
        let bytes = bytes_of(rows(&model.head, N_EMBD, head.rows.clone()));
        head.matrix.bytes = Bytes::from(bytes);
    }
}

/// Feeds tokens in pieces of given lengths and keeps all logits.
pub struct Collector {
    pub tokens: Vec<u32>,
    pub pieces: Vec<usize>,
    pub position: usize,
    pub wanted: LogitsWanted,
    /// `[fed tokens, N_VOCAB]`, with the positions.
    pub logits: Vec<(usize, Vec<f32>)>,
}

impl Collector {
    /// All tokens one by one, or in one piece; logits of all.
    pub fn new(tokens: &[u32], one_by_one: bool) -> Self {
        let pieces = if one_by_one {
            vec![1; tokens.len()]
        } else {
            vec![tokens.len()]
        };
        Self::in_pieces(tokens, pieces)
    }

    pub fn in_pieces(tokens: &[u32], mut pieces: Vec<usize>) -> Self {
        pieces.reverse();
        let tokens = tokens.to_vec();
        Self {
            tokens,
            pieces,
            position: 0,
            wanted: LogitsWanted::From(0),
            logits: vec![],
        }
    }

    pub fn bits(&self) -> Vec<u32> {
        self.logits
            .iter()
            .flat_map(|(_, logits)| logits.iter().map(|v| v.to_bits()))
            .collect()
    }
}

impl Feeder for Collector {
    fn next(&mut self) -> Next<'_> {
        let Some(len) = self.pieces.pop() else {
            return Next::Done;
        };
        let position = self.position;
        self.position += len;
        let tokens = &self.tokens[position..position + len];
        Next::Feed(Feed {
            tokens,
            position,
            logits: self.wanted,
        })
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        self.logits.push((position, logits.to_vec()));
    }
}

pub fn run(engine: &Engine, collector: Collector) -> Run<Collector> {
    engine.run(collector).unwrap()
}

/// Some tokens.
pub fn tokens(n: usize) -> Vec<u32> {
    let mut random = Random(77);
    (0..n)
        .map(|_| ((random.next() + 1.0) * 0.499 * N_VOCAB as f32) as u32)
        .collect()
}

pub fn error_text(run: &Run<Collector>) -> String {
    match &run.outcome {
        Ok(()) => "no error".to_owned(),
        Err(error) => ActorError::to_string(error),
    }
}
