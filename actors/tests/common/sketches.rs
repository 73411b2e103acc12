//! Random predictors for the random model, and how they are put into memory.

use std::ops::Range;

use bytes::Bytes;
use pi_actors::weights::{AheadWeights, Matrix, PlanesStore, SketchKind, SketchShare};
use pi_kernels::ffn_sparse::sketch::planes::PlanesShape;
use pi_kernels::{Layout, MatrixShape, QuantType};

use super::{Form, N_EMBD, N_FF, PlainLayer, Random, bytes_of, interleaved, rows};

pub const RANK: usize = 32;

/// A layer's predictors as plain rows.
#[derive(Default)]
pub struct PlainPredictors {
    /// `[RANK, N_EMBD]`
    pub sketch_a: Vec<f32>,
    /// `[N_FF, RANK]`
    pub sketch_b: Vec<f32>,
    /// `[N_FF]`, and so is the next.
    pub bias: Vec<f32>,
    pub floor: Vec<f32>,
    pub two_bit_bias: Vec<f32>,
    /// `[RANK, N_EMBD]`
    pub ahead_a: Vec<f32>,
    /// `[RANK]`
    pub ahead_a_bias: Vec<f32>,
    /// `[N_FF, RANK]`
    pub ahead_b: Vec<f32>,
    /// `[N_FF]`
    pub ahead_b_bias: Vec<f32>,
}

impl PlainPredictors {
    pub fn random(random: &mut Random) -> Self {
        let mut values = |n: usize, from: f32, to: f32| -> Vec<f32> {
            let unit = |random: &mut Random| (random.next() + 1.0) / 2.0;
            (0..n).map(|_| from + (to - from) * unit(random)).collect()
        };
        let bias = values(N_FF, -0.5, 0.5);
        let floor = values(N_FF, -0.2, 0.3);
        let two_bit_bias = values(N_FF, -1.0, 0.0);
        let ahead_a_bias = values(RANK, -0.3, 0.3);
        let ahead_b_bias = values(N_FF, -0.6, 0.4);
        Self {
            sketch_a: random.matrix(RANK, N_EMBD),
            sketch_b: random.matrix(N_FF, RANK),
            bias,
            floor,
            two_bit_bias,
            ahead_a: random.matrix(RANK, N_EMBD),
            ahead_a_bias,
            ahead_b: random.matrix(N_FF, RANK),
            ahead_b_bias,
        }
    }
}

/// Who predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Predictors {
    /// What the layer's own sketch is.
    pub sketch: SketchForm,
    /// Whether layers are predicted from the one before.
    pub ahead: bool,
    /// Whether only by that.
    pub alone: bool,
}

/// What a layer's own sketch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SketchForm {
    LowRank,
    /// Of gates rounded to `Q4_0`.
    Signs,
    /// The same, and by the next bit.
    TwoBits,
    /// The same with biases that make all neurons candidates, and no floor.
    TwoBitsOfAll,
    /// None: all gates, rounded to `Q4_0`.
    RoundedGates,
}

pub fn ahead(layer: &PlainLayer, form: Form) -> Option<AheadWeights> {
    let Form::Predicted(predictors) = form else {
        return None;
    };
    predictors.ahead.then(|| AheadWeights {
        a: interleaved(&layer.predictors.ahead_a, N_EMBD),
        a_bias: Some(layer.predictors.ahead_a_bias.clone()),
        b: interleaved(&layer.predictors.ahead_b, RANK),
        b_bias: layer.predictors.ahead_b_bias.clone(),
        prefetch: true,
        alone: predictors.alone,
    })
}

/// The gate as the form wants it.
pub fn gate(layer: &PlainLayer, neurons: Range<usize>, form: Form) -> Matrix {
    let values = rows(&layer.gate, N_EMBD, neurons);
    let kind = match form {
        Form::Predicted(Predictors { sketch, .. }) => Some(sketch),
        _ => None,
    };
    match kind {
        None => interleaved(values, N_EMBD),
        Some(SketchForm::LowRank) => packed(QuantType::F32, Layout::Rows, &bytes_of(values)),
        Some(SketchForm::RoundedGates) => {
            packed(QuantType::Q4_0, Layout::Interleaved, &rounded(values))
        }
        Some(SketchForm::Signs | SketchForm::TwoBits | SketchForm::TwoBitsOfAll) => {
            packed(QuantType::Q4_0, Layout::Interleaved, &[])
        }
    }
}

pub fn sketch(layer: &PlainLayer, neurons: Range<usize>, form: Form) -> Option<SketchShare> {
    let Form::Predicted(Predictors { sketch, .. }) = form else {
        return None;
    };
    let plain = &layer.predictors;
    let (bias, floor) = (
        plain.bias[neurons.clone()].to_vec(),
        plain.floor[neurons.clone()].to_vec(),
    );
    match sketch {
        SketchForm::RoundedGates => None,
        SketchForm::LowRank => Some(SketchShare {
            kind: SketchKind::LowRank {
                a: interleaved(&plain.sketch_a, N_EMBD),
                b: interleaved(rows(&plain.sketch_b, RANK, neurons), RANK),
            },
            bias: bias.into(),
            floor: Some(floor.into()),
        }),
        SketchForm::Signs | SketchForm::TwoBits | SketchForm::TwoBitsOfAll => {
            let all = sketch == SketchForm::TwoBitsOfAll;
            let or_all = |bias: Vec<f32>| if all { vec![1e9; bias.len()] } else { bias };
            let two = plain.two_bit_bias[neurons.clone()].to_vec();
            Some(SketchShare {
                kind: SketchKind::Bits {
                    planes: planes(rows(&layer.gate, N_EMBD, neurons)),
                    two_bit_bias: (sketch != SketchForm::Signs).then(|| or_all(two).into()),
                },
                bias: or_all(bias).into(),
                floor: (!all).then(|| floor.into()),
            })
        }
    }
}

fn planes(values: &[f32]) -> PlanesStore {
    let shape = PlanesShape {
        n_rows: values.len() / N_EMBD,
        n_cols: N_EMBD,
    };
    let (mut top, mut rest) = (vec![0; shape.top_bytes()], vec![0; shape.rest_bytes()]);
    shape.pack(&rounded(values), 0, &mut top, &mut rest);
    PlanesStore {
        shape,
        top: Bytes::from(top),
        rest: Bytes::from(rest),
    }
}

fn packed(quant: QuantType, layout: Layout, file_rows: &[u8]) -> Matrix {
    let shape = MatrixShape {
        quant,
        n_rows: file_rows.len() / quant.row_bytes(N_EMBD),
        n_cols: N_EMBD,
        layout,
    };
    let mut bytes = vec![0; shape.packed_bytes()];
    shape.pack(file_rows, 0, &mut bytes);
    Matrix {
        shape,
        bytes: Bytes::from(bytes),
    }
}

/// Blocks of `Q4_0` in file order.
fn rounded(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for block in values.chunks_exact(32) {
        let max = block.iter().fold(0.0f32, |max, v| max.max(v.abs()));
        // a power of two, which half precision holds
        let scale = (max / 7.0).log2().ceil().exp2();
        bytes.extend(half::f16::from_f32(scale).to_le_bytes());
        let q = |k: usize| (block[k] / scale).round() as i32 + 8;
        bytes.extend((0..16).map(|k| (q(k) | q(k + 16) << 4) as u8));
    }
    bytes
}
