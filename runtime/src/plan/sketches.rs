//! Predictors of a rehearsal: of the sidecar's shapes and types, naming as many candidates as are expected.

use pi_kernels::QuantType;
use pi_kernels::ffn_sparse::sketch::planes::{GatePlanes, PlanesShape, SketchBits};

use super::loads::CandidateShares;
use super::rehearsal::usual_tokens;
use super::rows::{GateRows, N_TOKENS, Pattern, Random, random_row};
use crate::model::Hyperparameters;
use crate::model::quantize::dequantize_row;
use crate::model::tensors::FileMatrix;
use crate::sidecar::{Ahead, LayerPredictors, Sketch, SketchKind};

/// Bytes that a layer's predictors read for a token, and its candidates' gates.
pub(super) fn predictor_bytes(
    hyper: &Hyperparameters,
    gate: &FileMatrix,
    layer: &LayerPredictors,
    shares: CandidateShares,
) -> u64 {
    let pair = |a: &FileMatrix, b: &FileMatrix| a.bytes.len() + b.bytes.len();
    let biases = hyper.n_ff * size_of::<f32>();
    let ahead = layer.ahead.as_ref();
    let ahead = ahead.map_or(0, |ahead| pair(&ahead.a, &ahead.b) + biases);
    let (own, candidate) = match layer.sketch.as_ref().map(|sketch| &sketch.kind) {
        None if ahead == 0 => (gate.bytes.len(), 0),
        None => (0, gate.row_bytes()),
        Some(SketchKind::LowRank { a, b }) => (pair(a, b) + biases, gate.row_bytes()),
        Some(SketchKind::Bits { two_bit_bias }) => {
            let shape = PlanesShape {
                n_rows: gate.n_rows(),
                n_cols: gate.n_cols(),
            };
            let more = match two_bit_bias {
                None => 0.0,
                Some(_) => (shares.named - shares.candidates).max(0.0),
            };
            let more = more * (hyper.n_ff * shape.high_row_bytes()) as f64;
            let own = shape.top_bytes() + biases + more as usize;
            (own, shape.rest_row_bytes())
        }
    };
    let candidates = shares.candidates * (hyper.n_ff * candidate) as f64;
    (own + ahead) as u64 + candidates.round() as u64
}

/// What distinguishes predictors that cost differently; empty without any.
pub(super) fn predictor_kind(layer: &LayerPredictors) -> String {
    let own = layer.sketch.as_ref().map(|sketch| match &sketch.kind {
        SketchKind::Bits { two_bit_bias: None } => "signs".to_owned(),
        SketchKind::Bits { .. } => "two bits".to_owned(),
        SketchKind::LowRank { a, .. } => format!("rank {}", a.n_rows()),
    });
    let ahead = layer.ahead.as_ref();
    let ahead = ahead.map(|ahead| format!("ahead rank {}", ahead.a.n_rows()));
    own.into_iter().chain(ahead).collect::<Vec<_>>().join(", ")
}

/// A layer's gates, as they were chosen.
pub(super) struct ChosenGates<'a> {
    /// The tokens' inputs, `[n_cols]` each, of root mean square 1.
    pub inputs: &'a [Vec<f32>; N_TOKENS],
    /// For which tokens each neuron's gate is open.
    pub patterns: &'a [Pattern],
    /// The gates' rows.
    pub rows: &'a GateRows,
}

/// Predictors like `like` whose candidates are the open gates and as many others as make the share of all neurons.
pub(super) fn rehearsed(
    like: &LayerPredictors,
    gates: &ChosenGates<'_>,
    shares: CandidateShares,
    random: &mut Random,
) -> LayerPredictors {
    let candidates = widen(gates.patterns, shares.candidates, random);
    let zeros = vec![0.0; candidates.len()];
    let sketch = like.sketch.as_ref().map(|sketch| match &sketch.kind {
        SketchKind::Bits { two_bit_bias: None } => Sketch {
            kind: SketchKind::Bits { two_bit_bias: None },
            bias: bit_biases(gates, &candidates, SketchBits::One),
            floor: sketch.floor.as_ref().map(|_| zeros.clone()),
        },
        SketchKind::Bits { .. } => {
            let named = widen(&candidates, shares.named, random);
            Sketch {
                kind: SketchKind::Bits {
                    two_bit_bias: Some(bit_biases(gates, &candidates, SketchBits::Two)),
                },
                bias: bit_biases(gates, &named, SketchBits::One),
                floor: sketch.floor.as_ref().map(|_| zeros.clone()),
            }
        }
        SketchKind::LowRank { a, b } => {
            let (a, b) = low_rank(a, b, false, gates.inputs, &candidates, random);
            Sketch {
                kind: SketchKind::LowRank { a, b },
                bias: zeros.clone(),
                floor: sketch.floor.as_ref().map(|_| zeros.clone()),
            }
        }
    });
    let ahead = like.ahead.as_ref().map(|ahead| {
        let rectified = ahead.a_bias.is_some();
        let (a, b) = low_rank(
            &ahead.a,
            &ahead.b,
            rectified,
            gates.inputs,
            &candidates,
            random,
        );
        Ahead {
            a_bias: ahead.a_bias.as_ref().map(|bias| vec![0.0; bias.len()]),
            a,
            b,
            b_bias: zeros.clone(),
            alone: ahead.alone,
            prefetch: ahead.prefetch,
        }
    });
    LayerPredictors { sketch, ahead }
}

/// Patterns with more tokens, so that of those tokens whose gates open as often as is expected `share` are set.
fn widen(open: &[Pattern], share: f64, random: &mut Random) -> Vec<Pattern> {
    let more = share_more(open, share);
    open.iter()
        .map(|&pattern| {
            (0..N_TOKENS).fold(pattern, |pattern, token| {
                pattern | Pattern::from(random.unit() < more) << token
            })
        })
        .collect()
}

/// The share of closed gates that have to be candidates too.
fn share_more(open: &[Pattern], share: f64) -> f64 {
    let usual = usual_tokens();
    let n = (open.len() * usual.count_ones() as usize).max(1) as f64;
    let n_open: u32 = open.iter().map(|open| (open & usual).count_ones()).sum();
    let open_share = f64::from(n_open) / n;
    ((share - open_share) / (1.0 - open_share).max(f64::MIN_POSITIVE)).clamp(0.0, 1.0)
}

/// Biases with which as many tokens as a pattern has pass a neuron's score by some bits: those with the highest, which
/// are mostly those whose gate is open.
fn bit_biases(gates: &ChosenGates<'_>, candidates: &[Pattern], bits: SketchBits) -> Vec<f32> {
    let scores: Vec<[f32; N_TOKENS]> = (0..=Pattern::MAX)
        .map(|pattern| {
            let mut scores = bit_scores(gates.rows.row(pattern), bits, gates.inputs);
            scores.sort_by(|a, b| b.total_cmp(a));
            scores
        })
        .collect();
    let bias = |(&pattern, &wanted): (&Pattern, &Pattern)| {
        let scores = &scores[usize::from(pattern)];
        let spread = scores[0] - scores[N_TOKENS - 1] + 1.0;
        -match wanted.count_ones() as usize {
            0 => scores[0] + spread,
            N_TOKENS => scores[N_TOKENS - 1] - spread,
            n => (scores[n - 1] + scores[n]) / 2.0,
        }
    };
    gates.patterns.iter().zip(candidates).map(bias).collect()
}

/// Scores of a row of `Q4_0` by the first bits of its weights.
fn bit_scores(row: &[u8], bits: SketchBits, inputs: &[Vec<f32>; N_TOKENS]) -> [f32; N_TOKENS] {
    let shape = PlanesShape {
        n_rows: 1,
        n_cols: inputs[0].len(),
    };
    let (mut top, mut rest) = (vec![0; shape.top_bytes()], vec![0; shape.rest_bytes()]);
    shape.pack(row, 0, &mut top, &mut rest);
    let (mut sketch, mut values) = (vec![0; row.len()], vec![0.0; shape.n_cols]);
    GatePlanes::new(shape, &top, &rest).sketch_row(0, bits, &mut sketch);
    dequantize_row(QuantType::Q4_0, &sketch, &mut values);
    std::array::from_fn(|token| values.iter().zip(&inputs[token]).map(|(w, x)| w * x).sum())
}

/// A random first matrix, and rows of the second that are above zero for the tokens of their pattern.
fn low_rank(
    a: &FileMatrix,
    b: &FileMatrix,
    rectified: bool,
    inputs: &[Vec<f32>; N_TOKENS],
    candidates: &[Pattern],
    random: &mut Random,
) -> (FileMatrix, FileMatrix) {
    let mut hidden: [Vec<f32>; N_TOKENS] = std::array::from_fn(|_| Vec::new());
    let mut a_bytes = Vec::with_capacity(a.bytes.len());
    let mut values = vec![0.0; a.n_cols()];
    for _ in 0..a.n_rows() {
        let row = random_row(a.quant, a.n_cols(), random);
        dequantize_row(a.quant, &row, &mut values);
        for (hidden, input) in hidden.iter_mut().zip(inputs) {
            let product: f32 = values.iter().zip(input).map(|(w, x)| w * x).sum();
            hidden.push(if rectified { product.max(0.0) } else { product });
        }
        a_bytes.extend_from_slice(&row);
    }
    let rows = GateRows::new(b.quant, b.n_cols(), &hidden, random);
    let b_bytes: Vec<u8> = candidates
        .iter()
        .flat_map(|&pattern| rows.row(pattern).iter().copied())
        .collect();
    let made = |like: &FileMatrix, bytes: Vec<u8>| FileMatrix {
        bytes: bytes.into(),
        ..like.clone()
    };
    (made(a, a_bytes), made(b, b_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_widened_to_the_share_of_usual_tokens_and_lose_nothing() {
        let mut random = Random(5);
        // a usual token in four, and none of the others
        let usual = usual_tokens();
        let first = usual & usual.wrapping_neg();
        let open = vec![first; 4096];
        let wide = widen(&open, 0.375, &mut random);
        assert!(wide.iter().all(|pattern| pattern & first == first));
        let set = |of: Pattern| {
            let set: u32 = wide.iter().map(|wide| (wide & of).count_ones()).sum();
            f64::from(set) / (4096.0 * f64::from(of.count_ones()))
        };
        assert!((set(usual) - 0.375).abs() < 0.01, "{}", set(usual));
        // these have no open gate that is a candidate anyway
        assert!((set(!usual) - 0.125 / 0.75).abs() < 0.01, "{}", set(!usual));
        assert_eq!(widen(&open, 0.05, &mut random), open);
    }

    #[test]
    fn as_many_tokens_pass_a_sketch_of_bits_as_there_are_candidates() {
        let mut random = Random(9);
        let inputs = std::array::from_fn(|_| random.values(128));
        let rows = GateRows::new(QuantType::Q4_0, 128, &inputs, &mut random);
        let patterns = [0b0000_0011, 0, 0b1111_1111, 0b0100_0000];
        let candidates = [0b0010_0111, 0, 0b1111_1111, 0b0101_0000];
        let gates = ChosenGates {
            inputs: &inputs,
            patterns: &patterns,
            rows: &rows,
        };
        for bits in [SketchBits::One, SketchBits::Two] {
            let biases = bit_biases(&gates, &candidates, bits);
            for (n, bias) in biases.iter().enumerate() {
                let scores = bit_scores(rows.row(patterns[n]), bits, &inputs);
                let passed = scores.iter().filter(|score| *score + bias > 0.0).count();
                assert_eq!(
                    passed,
                    candidates[n].count_ones() as usize,
                    "{n} by {bits:?}"
                );
            }
        }
    }
}
