//! A model to rehearse with: some layers of the real one's shapes and types, filled with random bytes, whose gates open
//! as often as the profile says.
//!
//! Embeddings are random and no layer changes the residual stream (the output projections and `ffn_down` are zero), so
//! that each token's input of every layer is known, and gate rows can be chosen to be open or closed for it.

use bytes::Bytes;

use super::rows::{GateRows, N_TOKENS, Pattern, Random, random_row, zero_row};
use crate::model::Hyperparameters;
use crate::model::ModelTensors;
use crate::model::sparsity::SparsityPlan;
use crate::model::tensors::{FileDown, FileMatrix, LayerTensors};

use pi_kernels::QuantType;

/// Of the profile's frequencies, what each token's gates open with: half of the tokens with half, so that the cost of a
/// neuron can be told from that of a layer.
const SHARES: [f64; N_TOKENS] = [1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5];

/// Random rows that a matrix is made of.
const N_ROWS: usize = 61;

/// Most rows of the head in bytes: it is measured row by row.
const HEAD_BYTES_MAX: usize = 256 << 20;

/// What a rehearsal is made of.
#[derive(Debug)]
pub(super) struct Rehearsal {
    pub hyper: Hyperparameters,
    pub tensors: ModelTensors,
    pub sparsity: SparsityPlan,
    /// Rows of the real head for each that is rehearsed.
    pub head_scale: f64,
}

/// What distinguishes layers that cost alike: the types of their matrices.
pub(super) fn class_of(layer: &LayerTensors) -> Vec<QuantType> {
    let LayerTensors {
        wq,
        wk,
        wv,
        wo,
        gate,
        up,
        down,
        ..
    } = layer;
    [wq, wk, wv, wo, gate, up, down.matrix()]
        .map(|matrix| matrix.quant)
        .into()
}

/// Layers spread evenly, at least one of each class, of about `bytes` together.
pub(super) fn choose_layers(layers: &[LayerTensors], bytes: usize) -> Vec<usize> {
    let total: usize = layers.iter().map(layer_bytes).sum();
    let each = (total / layers.len().max(1)).max(1);
    // one layer's costs would be those of a cache that holds all of it
    let n = bytes
        .div_ceil(each)
        .clamp(2.min(layers.len()), layers.len());
    let mut chosen: Vec<usize> = (0..n)
        .map(|i| (2 * i + 1) * layers.len() / (2 * n))
        .collect();
    for (index, layer) in layers.iter().enumerate() {
        let class = class_of(layer);
        if !chosen
            .iter()
            .any(|&known| class_of(&layers[known]) == class)
        {
            chosen.push(index);
        }
    }
    chosen.sort_unstable();
    chosen
}

fn layer_bytes(layer: &LayerTensors) -> usize {
    [
        &layer.wq,
        &layer.wk,
        &layer.wv,
        &layer.wo,
        &layer.gate,
        &layer.up,
        layer.down.matrix(),
    ]
    .iter()
    .map(|matrix| matrix.bytes.len())
    .sum()
}

impl Rehearsal {
    /// Rehearses `layers` of a model; `frequencies` `[n_layer][n_ff]` are the shares of tokens that open each gate.
    pub fn new(
        hyper: &Hyperparameters,
        tensors: &ModelTensors,
        sparsity: &SparsityPlan,
        layers: Vec<usize>,
        frequencies: &[Vec<f32>],
    ) -> Self {
        let mut random = Random(1);
        let embeddings: [Vec<f32>; N_TOKENS] = std::array::from_fn(|_| random.values(hyper.n_embd));
        let mut maker = Maker {
            random,
            gates: Vec::new(),
            alike: Vec::new(),
        };
        let made = layers
            .iter()
            .map(|&layer| maker.layer(&tensors.layers[layer], &embeddings, &frequencies[layer]))
            .collect();
        let head = tensors.output.as_ref().unwrap_or(&tensors.token_embd);
        let n_vocab = (HEAD_BYTES_MAX / head.row_bytes() / 16 * 16)
            .max(16)
            .min(hyper.n_vocab);
        let output = maker.matrix(head, n_vocab, random_row);
        let embedding_bytes = embeddings
            .iter()
            .flatten()
            .flat_map(|value| value.to_le_bytes());
        let token_embd = FileMatrix {
            quant: QuantType::F32,
            bytes: embedding_bytes.collect(),
            ..tensors.token_embd.clone()
        };
        Self {
            hyper: Hyperparameters {
                n_layer: layers.len(),
                n_vocab,
                ..hyper.clone()
            },
            tensors: ModelTensors {
                layers: made,
                token_embd,
                output_norm: vec![1.0; hyper.n_embd],
                output: Some(output),
                rope_freqs: tensors.rope_freqs.clone(),
                head_sketch: None,
            },
            sparsity: SparsityPlan {
                mode: sparsity.mode,
                down: layers.iter().map(|&layer| sparsity.down[layer]).collect(),
                hint: None,
                thresholds: None,
            },
            head_scale: hyper.n_vocab as f64 / n_vocab as f64,
        }
    }
}

/// Makes matrices; those that are alike in all layers once.
struct Maker {
    random: Random,
    gates: Vec<(QuantType, GateRows)>,
    /// Type, columns, rows, whether zero, bytes.
    alike: Vec<(QuantType, usize, usize, bool, Bytes)>,
}

type MakeRow = fn(QuantType, usize, &mut Random) -> Vec<u8>;

impl Maker {
    fn layer(
        &mut self,
        like: &LayerTensors,
        inputs: &[Vec<f32>; N_TOKENS],
        frequencies: &[f32],
    ) -> LayerTensors {
        let n_embd = inputs[0].len();
        let down = like.down.matrix();
        let zero_down = self.alike(down, true);
        LayerTensors {
            attn_norm: vec![1.0; n_embd],
            wq: self.alike(&like.wq, false),
            wk: self.alike(&like.wk, false),
            wv: self.alike(&like.wv, false),
            qkv_bias: like.qkv_bias.clone(),
            wo: self.alike(&like.wo, true),
            ffn_norm: vec![1.0; n_embd],
            gate: self.gate(&like.gate, inputs, frequencies),
            up: self.alike(&like.up, false),
            down: match like.down {
                FileDown::NeuronMajor(_) => FileDown::NeuronMajor(zero_down),
                FileDown::Plain(_) => FileDown::Plain(zero_down),
            },
        }
    }

    /// A matrix of the shape, type and place of `like`; the same bytes for all that are alike.
    fn alike(&mut self, like: &FileMatrix, zero: bool) -> FileMatrix {
        let (quant, n_cols, n_rows) = (like.quant, like.n_cols(), like.n_rows());
        let known = self
            .alike
            .iter()
            .find(|known| (known.0, known.1, known.2, known.3) == (quant, n_cols, n_rows, zero));
        if let Some((.., bytes)) = known {
            return FileMatrix {
                bytes: bytes.clone(),
                ..like.clone()
            };
        }
        let made = self.matrix(like, n_rows, if zero { zero_row } else { random_row });
        let bytes = made.bytes.clone();
        self.alike.push((quant, n_cols, n_rows, zero, bytes));
        made
    }

    fn matrix(&mut self, like: &FileMatrix, n_rows: usize, make: MakeRow) -> FileMatrix {
        let rows: Vec<Vec<u8>> = (0..N_ROWS.min(n_rows))
            .map(|_| make(like.quant, like.n_cols(), &mut self.random))
            .collect();
        let mut bytes = Vec::with_capacity(n_rows * like.row_bytes());
        for row in 0..n_rows {
            bytes.extend_from_slice(&rows[row % rows.len()]);
        }
        FileMatrix {
            bytes: bytes.into(),
            ..like.clone()
        }
    }

    fn gate(
        &mut self,
        like: &FileMatrix,
        inputs: &[Vec<f32>; N_TOKENS],
        frequencies: &[f32],
    ) -> FileMatrix {
        let (quant, random) = (like.quant, &mut self.random);
        let known = self.gates.iter().position(|(known, _)| *known == quant);
        let index = known.unwrap_or_else(|| {
            let rows = GateRows::new(quant, like.n_cols(), inputs, random);
            self.gates.push((quant, rows));
            self.gates.len() - 1
        });
        let rows = &self.gates[index].1;
        let mut bytes = Vec::with_capacity(like.bytes.len());
        for &frequency in frequencies {
            let open =
                |share: f64, random: &mut Random| random.unit() < f64::from(frequency) * share;
            let pattern = SHARES
                .iter()
                .enumerate()
                .fold(0, |pattern, (token, &share)| {
                    pattern | Pattern::from(open(share, &mut self.random)) << token
                });
            bytes.extend_from_slice(rows.row(pattern));
        }
        FileMatrix {
            bytes: bytes.into(),
            ..like.clone()
        }
    }
}
