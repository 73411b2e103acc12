//! The sidecar of a synthetic model: what `prepare` would measure is known from the construction.

use std::sync::Arc;

use pi_kernels::QuantType;

use super::error::SynthError;
use super::gates::{CHOICE_TYPE, ChoiceRows, PatternRows};
use super::gaussian::below;
use super::plan::{Plan, PlannedLayer, SynthTensor};
use crate::gguf::GgufWriter;
use crate::sidecar::{AHEAD_KIND_KEY, SKETCH_KIND_KEY, TWO_BIT_BIAS};

/// Least cost of the predictors ahead, as a share of the FFN's bytes.
const PREDICTOR_COST: f64 = 0.04;
/// Squared correlation of a score ahead with the gate; real predictors of this size see about as much.
pub(super) const KNOWN_AHEAD: f64 = 0.66;
/// Share of the activation mass that the predictors ahead are to find.
const MASS_AHEAD: f64 = 0.955;
/// Share that the in-layer sketches are to find.
const MASS_SKETCH: f64 = 0.995;
/// Tokens that the planted frequencies are counted for.
const N_TOKENS: u32 = 100_000;
/// The same for sketches of bits, of which each look may lose some: what signs keep, and of that two bits.
const MASS_BITS: f64 = 0.9975;
/// Mean square of the codes of Q4_0.
const CODES_SQUARE: f64 = 21.5;

/// What the first bits of a Q4_0 weight say of it.
struct BitSketch {
    /// In units of the scale, what a one stands for in the sketch.
    one: f64,
    /// Mean square of the sketch.
    square: f64,
    /// The sketch of the weights in constant channels, which are all as large as can be.
    largest: f64,
}

/// ±1 for codes of ±4 in the mean.
const SIGNS: BitSketch = BitSketch {
    one: 4.0,
    square: 1.0,
    largest: 1.0,
};
/// ±1 and ±3 for codes of ±2 and ±6 in the mean.
const TWO_BITS: BitSketch = BitSketch {
    one: 2.0,
    square: 5.0,
    largest: 3.0,
};

/// The smallest rank with which the predictors cost [`PREDICTOR_COST`].
pub(super) fn predictor_rank(quant: QuantType, n_embd: usize, n_ff: usize) -> usize {
    let ffn_bytes = 3 * n_ff * quant.row_bytes(n_embd);
    let block_bytes = 32 * quant.row_bytes(n_embd) + n_ff * CHOICE_TYPE.block_bytes();
    let n_blocks = (PREDICTOR_COST * ffn_bytes as f64 / block_bytes as f64).ceil();
    32 * (n_blocks as usize).max(1)
}

/// What finds neurons in the layer itself.
#[derive(Debug, Clone, Copy, PartialEq)]
enum SketchKind {
    Bits,
    LowRank,
}

impl Plan {
    fn sketch_kind(&self) -> SketchKind {
        match self.options.quant {
            QuantType::Q4_0 => SketchKind::Bits,
            _ => SketchKind::LowRank,
        }
    }

    /// Adds the sections' keys and all tensors to `header`, and gives the tensors.
    pub fn sidecar(&self, header: &mut GgufWriter) -> Result<Vec<SynthTensor>, SynthError> {
        header.put("sparse.profile.n_tokens", N_TOKENS)?;
        header.put(AHEAD_KIND_KEY, "svd")?;
        let kind = match self.sketch_kind() {
            SketchKind::Bits => "two_bits",
            SketchKind::LowRank => "low_rank",
        };
        let kinds = vec![kind.to_owned(); self.options.shape.n_layer];
        header.put(SKETCH_KIND_KEY, kinds)?;
        let mut tensors = vec![];
        for (layer, planned) in self.layers.iter().enumerate() {
            self.profile(layer, planned, &mut tensors);
            if layer > 0 {
                self.ahead(layer, planned, &mut tensors);
            }
            self.sketch(layer, planned, &mut tensors);
        }
        for tensor in &tensors {
            header.add_tensor(&tensor.name, tensor.quant.into(), &tensor.shape())?;
        }
        Ok(tensors)
    }

    fn profile(&self, layer: usize, planned: &PlannedLayer, tensors: &mut Vec<SynthTensor>) {
        let count = |offset: &f64| (below(*offset) * f64::from(N_TOKENS)).round() as f32;
        let counts = planned.offsets.iter().map(count).collect();
        tensors.push(SynthTensor::vector(
            format!("blk.{layer}.ffn_counts"),
            counts,
        ));
        let std = self.stream.layers[layer].down_std;
        let norm = std * (self.channels.n_changing() as f64).sqrt();
        let norms = vec![norm as f32; planned.offsets.len()];
        tensors.push(SynthTensor::vector(
            format!("blk.{layer}.ffn_down_norm"),
            norms,
        ));
    }

    fn ahead(&self, layer: usize, planned: &PlannedLayer, tensors: &mut Vec<SynthTensor>) {
        let before = self.stream.layers[layer - 1].variance_mid;
        let here = self.stream.layers[layer].variance_mid;
        // the input is divided by its root mean square, the gate's by the deviation of the channels that change
        let scale = self.channels.rms(before) / here.sqrt();
        let known = self.known * self.stream.seen_ahead(layer);
        let slack = self.offsets.slack(known.sqrt(), MASS_AHEAD);
        self.low_rank(&format!("blk.{layer}.ahead"), scale, planned, tensors);
        let bias = planned.offsets.iter().map(|offset| (offset + slack) as f32);
        tensors.push(SynthTensor::vector(
            format!("blk.{layer}.ahead_b.bias"),
            bias.collect(),
        ));
    }

    fn sketch(&self, layer: usize, planned: &PlannedLayer, tensors: &mut Vec<SynthTensor>) {
        let prefix = format!("blk.{layer}.sketch");
        let bias: Vec<f32> = match self.sketch_kind() {
            SketchKind::LowRank => {
                self.low_rank(&prefix, 1.0, planned, tensors);
                let slack = self.offsets.slack(self.known.sqrt(), MASS_SKETCH);
                planned
                    .offsets
                    .iter()
                    .map(|offset| (offset + slack) as f32)
                    .collect()
            }
            SketchKind::Bits => {
                let name = format!("blk.{layer}.{TWO_BIT_BIAS}");
                tensors.push(SynthTensor::vector(
                    name,
                    self.bit_biases(planned, &TWO_BITS),
                ));
                self.bit_biases(planned, &SIGNS)
            }
        };
        tensors.push(SynthTensor::vector(format!("{prefix}.bias"), bias));
    }

    fn bit_biases(&self, planned: &PlannedLayer, sketch: &BitSketch) -> Vec<f32> {
        // the square of what correlates
        let known = sketch.one * sketch.one * sketch.square / CODES_SQUARE;
        let slack = self.offsets.slack(known.sqrt(), MASS_BITS);
        let n_changing = self.gate_form.channels.n_changing() as f64;
        let scale = 1.0 / (n_changing * CODES_SQUARE).sqrt();
        // the constant channels are one
        let constant = self.gate_form.channels.n_constant as f64 * sketch.largest;
        let bias =
            |offset: &f64| (offset + slack) / (sketch.one * scale) - constant.copysign(*offset);
        let biases = planned.offsets.iter().map(|offset| bias(offset) as f32);
        biases.collect()
    }

    fn low_rank(
        &self,
        prefix: &str,
        scale: f64,
        planned: &PlannedLayer,
        tensors: &mut Vec<SynthTensor>,
    ) {
        let (n_embd, n_ff) = (self.options.shape.n_embd, self.options.shape.n_ff);
        tensors.push(SynthTensor {
            name: format!("{prefix}_a.weight"),
            quant: self.options.quant,
            n_cols: n_embd,
            n_rows: self.gate_form.rank,
            stream: planned.gate_stream,
            rows: Box::new(PatternRows(Arc::clone(&planned.patterns))),
        });
        tensors.push(SynthTensor {
            name: format!("{prefix}_b.weight"),
            quant: CHOICE_TYPE,
            n_cols: self.gate_form.rank,
            n_rows: n_ff,
            stream: planned.gate_stream,
            rows: Box::new(ChoiceRows {
                patterns: Arc::clone(&planned.patterns),
                scale,
            }),
        });
    }
}
