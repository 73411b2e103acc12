//! A model to rehearse with: some layers of the real one's shapes and types, filled with random bytes, whose gates open
//! as often as the profile says.
//!
//! Embeddings are random and no layer changes the residual stream (the output projections and `ffn_down` are zero), so
//! that each token's input of every layer is known, and gate rows can be chosen to be open or closed for it.

use bytes::Bytes;

use super::loads::{CandidateShares, Expected};
use super::rows::{GateRows, N_TOKENS, Pattern, Random, random_row, zero_row};
use super::sketches::{ChosenGates, predictor_kind, rehearsed};
use crate::model::Hyperparameters;
use crate::model::ModelTensors;
use crate::model::sparsity::SparsityPlan;
use crate::model::tensors::{FileDown, FileMatrix, LayerTensors};
use crate::sidecar::LayerPredictors;

use pi_kernels::QuantType;

/// Of the profile's frequencies, what each token's gates open with: half of the tokens with half, so that the cost of a
/// neuron can be told from that of a layer.
const SHARES: [f64; N_TOKENS] = [1.0, 0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5];

/// The tokens whose gates open as often as the profile says.
pub(super) fn usual_tokens() -> Pattern {
    let shares = SHARES.iter().enumerate();
    shares.fold(0, |tokens, (token, &share)| {
        tokens | Pattern::from(share == 1.0) << token
    })
}

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
    pub predictors: Option<Vec<LayerPredictors>>,
    /// Neurons that each layer's predictors name; none where nothing predicts, `[n_layer]`.
    pub candidates: Vec<f64>,
    /// Rows of the real head for each that is rehearsed.
    pub head_scale: f64,
}

/// What layers that cost alike have in common: the types of their matrices, and what predicts them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Class {
    /// Of the projections, the gate, up and down.
    pub types: Vec<QuantType>,
    /// In words; empty where nothing predicts.
    pub predictor: String,
}

impl Class {
    pub(super) fn of(layer: &LayerTensors, predictors: Option<&LayerPredictors>) -> Self {
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
        let matrices = [wq, wk, wv, wo, gate, up, down.matrix()];
        Self {
            types: matrices.map(|matrix| matrix.quant).into(),
            predictor: predictors.map(predictor_kind).unwrap_or_default(),
        }
    }

    /// Of all layers.
    pub(super) fn all(
        layers: &[LayerTensors],
        predictors: Option<&[LayerPredictors]>,
    ) -> Vec<Self> {
        let of = |(index, layer)| Self::of(layer, predictors.map(|all| &all[index]));
        layers.iter().enumerate().map(of).collect()
    }

    /// Whether not all gates are computed.
    pub(super) fn is_predicted(&self) -> bool {
        !self.predictor.is_empty()
    }

    /// In words.
    pub fn name(&self) -> String {
        let mut names: Vec<&str> = self.types.iter().map(|quant| quant.name()).collect();
        names.sort_unstable();
        names.dedup();
        let types = names.join("+");
        match self.predictor.as_str() {
            "" => types,
            predictor => format!("{types}, {predictor}"),
        }
    }
}

/// Layers spread evenly, at least one of each class, of about `bytes` together; the first one among them, which nothing
/// predicts ahead.
pub(super) fn choose_layers(
    layers: &[LayerTensors],
    classes: &[Class],
    bytes: usize,
) -> Vec<usize> {
    let total: usize = layers.iter().map(layer_bytes).sum();
    let each = (total / layers.len().max(1)).max(1);
    // one layer's costs would be those of a cache that holds all of it
    let n = bytes
        .div_ceil(each)
        .clamp(2.min(layers.len()), layers.len());
    let mut chosen: Vec<usize> = (0..n).map(|i| i * layers.len() / n).collect();
    for (index, class) in classes.iter().enumerate() {
        if !chosen.iter().any(|&known| classes[known] == *class) {
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
    /// Rehearses `layers` of a model, ascending from 0, whose gates open and whose predictors name candidates as
    /// `expected`.
    pub fn new(
        hyper: &Hyperparameters,
        tensors: &ModelTensors,
        sparsity: &SparsityPlan,
        predictors: Option<&[LayerPredictors]>,
        layers: &[usize],
        expected: &Expected<'_>,
    ) -> Self {
        let mut random = Random(1);
        let embeddings: [Vec<f32>; N_TOKENS] =
            std::array::from_fn(|_| normed(random.values(hyper.n_embd)));
        let mut maker = Maker {
            random,
            gates: Vec::new(),
            alike: Vec::new(),
        };
        let mut made = Vec::with_capacity(layers.len());
        let mut made_predictors = Vec::with_capacity(layers.len());
        for &layer in layers {
            let shares = expected.shares[layer];
            let like = predictors.map(|all| (&all[layer], shares));
            let frequencies = &expected.frequencies.by_layer[layer];
            let (tensors, own) =
                maker.layer(&tensors.layers[layer], like, &embeddings, frequencies);
            made.push(tensors);
            made_predictors.extend(own);
        }
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
                predicts: sparsity.predicts,
                hint: None,
                thresholds: None,
            },
            candidates: layers
                .iter()
                .map(|&layer| match predictors {
                    Some(_) => expected.candidates(layer),
                    None => 0.0,
                })
                .collect(),
            predictors: predictors.map(|_| made_predictors),
            head_scale: hyper.n_vocab as f64 / n_vocab as f64,
        }
    }
}

/// The values over their root mean square: what a norm without weights makes of them.
fn normed(mut values: Vec<f32>) -> Vec<f32> {
    let square: f32 = values.iter().map(|x| x * x).sum();
    let size = (square / values.len() as f32).sqrt();
    values.iter_mut().for_each(|x| *x /= size);
    values
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
        predictors: Option<(&LayerPredictors, CandidateShares)>,
        inputs: &[Vec<f32>; N_TOKENS],
        frequencies: &[f32],
    ) -> (LayerTensors, Option<LayerPredictors>) {
        let n_embd = inputs[0].len();
        let down = like.down.matrix();
        let zero_down = self.alike(down, true);
        let (gate, predictors) = self.gate(&like.gate, predictors, inputs, frequencies);
        let tensors = LayerTensors {
            attn_norm: vec![1.0; n_embd],
            wq: self.alike(&like.wq, false),
            wk: self.alike(&like.wk, false),
            wv: self.alike(&like.wv, false),
            qkv_bias: like.qkv_bias.clone(),
            wo: self.alike(&like.wo, true),
            ffn_norm: vec![1.0; n_embd],
            gate,
            up: self.alike(&like.up, false),
            down: match like.down {
                FileDown::NeuronMajor(_) => FileDown::NeuronMajor(zero_down),
                FileDown::Plain(_) => FileDown::Plain(zero_down),
            },
        };
        (tensors, predictors)
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
        predictors: Option<(&LayerPredictors, CandidateShares)>,
        inputs: &[Vec<f32>; N_TOKENS],
        frequencies: &[f32],
    ) -> (FileMatrix, Option<LayerPredictors>) {
        let (quant, random) = (like.quant, &mut self.random);
        let known = self.gates.iter().position(|(known, _)| *known == quant);
        let index = known.unwrap_or_else(|| {
            let rows = GateRows::new(quant, like.n_cols(), inputs, random);
            self.gates.push((quant, rows));
            self.gates.len() - 1
        });
        let rows = &self.gates[index].1;
        let mut pattern = |frequency: f64| {
            SHARES
                .iter()
                .enumerate()
                .fold(0, |pattern, (token, share)| {
                    pattern | Pattern::from(random.unit() < frequency * share) << token
                })
        };
        let patterns: Vec<Pattern> = frequencies
            .iter()
            .map(|&frequency| pattern(f64::from(frequency)))
            .collect();
        let bytes: Vec<u8> = patterns
            .iter()
            .flat_map(|&pattern| rows.row(pattern).iter().copied())
            .collect();
        let gates = ChosenGates {
            inputs,
            patterns: &patterns,
            rows,
        };
        let predictors = predictors.map(|(like, shares)| rehearsed(like, &gates, shares, random));
        let gate = FileMatrix {
            bytes: bytes.into(),
            ..like.clone()
        };
        (gate, predictors)
    }
}
