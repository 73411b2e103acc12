//! A token's time, from what its parts cost and how often each occurs.
//!
//! ```text
//! token = Σ layers (attention + ffn + candidates · candidate + active · neuron + device + hand-off) + head + other
//! ```
//!
//! where every cost is that of the layer's class (the types of its matrices, and what predicts it), `active` are the
//! neurons that the layer is expected to activate, and `candidates` those that its predictors are expected to name.

use serde::Serialize;

use super::costs::Costs;
use super::loads::{Expected, LayerBytes};
use crate::model::Sparsity;

/// A part of a token's time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Projections, attention and its output.
    Attention,
    /// Finding the active neurons: all gates, or predictors and candidates' gates; in `off` with the rest.
    Gates,
    /// Up and down of active neurons; in `off` all of the FFN.
    Neurons,
    /// The output head.
    Head,
    /// Messages, and waiting for other nodes.
    HandOffs,
    /// Norms, sums, embedding, sampling.
    Other,
}

impl Part {
    /// All of them, in the order of a token.
    pub const ALL: [Part; 6] = [
        Part::Attention,
        Part::Gates,
        Part::Neurons,
        Part::Head,
        Part::HandOffs,
        Part::Other,
    ];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Part::Attention => "attention",
            Part::Gates => "gates",
            Part::Neurons => "up, down",
            Part::Head => "head",
            Part::HandOffs => "hand-offs",
            Part::Other => "norms, other",
        }
    }
}

/// A part's time and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PartForecast {
    /// Which.
    pub part: Part,
    /// Of a token.
    pub ms: f64,
    /// Weights and cache that are read for it.
    pub bytes: u64,
}

/// Bytes that are no layer's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OtherBytes {
    pub head: u64,
    /// Embedding row and last norm.
    pub other: u64,
    /// Keys and values of all layers.
    pub kv: u64,
}

/// The parts of a token, in the order of [`Part::ALL`].
pub(super) fn forecast(
    mode: Sparsity,
    costs: &Costs,
    layers: &[LayerBytes],
    expected: &Expected<'_>,
    other: OtherBytes,
) -> Vec<PartForecast> {
    let mut ns = [0.0; Part::ALL.len()];
    let mut bytes = [0; Part::ALL.len()];
    let sparse = mode != Sparsity::Off;
    for (index, layer) in layers.iter().enumerate() {
        let cost = costs.of(&layer.class);
        let (active, candidates) = touched(layer, expected, index);
        let share = active / expected.n_neurons(index);
        ns[Part::Attention as usize] += cost.attention_ns;
        bytes[Part::Attention as usize] += layer.attention;
        let neurons_ns = cost.neuron_ns * active;
        if sparse {
            ns[Part::Gates as usize] += cost.ffn_ns + cost.candidate_ns * candidates;
            bytes[Part::Gates as usize] += layer.gate;
            ns[Part::Neurons as usize] += neurons_ns;
            bytes[Part::Neurons as usize] += (layer.neurons as f64 * share).round() as u64;
        } else {
            ns[Part::Neurons as usize] += cost.ffn_ns + neurons_ns;
            bytes[Part::Neurons as usize] += layer.gate + layer.neurons;
        }
        ns[Part::HandOffs as usize] += cost.hand_off_ns;
        ns[Part::Other as usize] += cost.device_ns;
    }
    bytes[Part::Attention as usize] += other.kv;
    ns[Part::Head as usize] = costs.head_ns;
    bytes[Part::Head as usize] = other.head;
    ns[Part::Other as usize] += costs.other_ns;
    bytes[Part::Other as usize] = other.other;
    let part = |part: Part| PartForecast {
        part,
        ms: ns[part as usize] / 1e6,
        bytes: bytes[part as usize],
    };
    Part::ALL.map(part).into()
}

/// Neurons of a layer that a token computes, and those whose gates are looked at where these are fewer than all.
fn touched(layer: &LayerBytes, expected: &Expected<'_>, index: usize) -> (f64, f64) {
    let active = expected.frequencies.active(index);
    match layer.class.is_predicted() {
        true => (active * expected.found[index], expected.candidates(index)),
        false => (active, 0.0),
    }
}

/// A layer's time without attention, ns: what depends on who predicts its neurons.
pub(super) fn neurons_ns(
    costs: &Costs,
    layer: &LayerBytes,
    expected: &Expected<'_>,
    index: usize,
) -> f64 {
    let cost = costs.of(&layer.class);
    let (active, candidates) = touched(layer, expected, index);
    let ffn_ns = cost.ffn_ns + cost.candidate_ns * candidates + cost.neuron_ns * active;
    ffn_ns + cost.device_ns + cost.hand_off_ns
}

#[cfg(test)]
mod tests {
    use super::super::costs::LayerCost;
    use super::super::loads::{CandidateShares, Frequencies, FrequencySource};
    use super::super::rehearsal::Class;
    use super::*;
    use pi_kernels::QuantType;

    fn of_type(quant: QuantType, predictor: &str) -> Class {
        Class {
            types: vec![quant],
            predictor: predictor.to_owned(),
        }
    }

    fn forecast_of(mode: Sparsity, predictor: &str) -> Vec<PartForecast> {
        let of_type = |quant| of_type(quant, predictor);
        let layer = |class: QuantType| LayerBytes {
            class: of_type(class),
            attention: 100,
            gate: 40,
            neurons: 80,
        };
        let cost = |attention_ns: f64| LayerCost {
            attention_ns,
            ffn_ns: 2e6,
            candidate_ns: 5e5,
            neuron_ns: 1e6,
            device_ns: 1e6,
            hand_off_ns: 5e5,
        };
        let costs = Costs {
            classes: vec![
                (of_type(QuantType::Q4_0), cost(1e6)),
                (of_type(QuantType::Q8_0), cost(3e6)),
            ],
            head_ns: 7e6,
            other_ns: 1e6,
            nodes: vec![],
            working_bytes: vec![],
            n_layer: 2,
            n_tokens: 1,
        };
        let frequencies = Frequencies {
            by_layer: vec![vec![0.5, 0.25], vec![1.0, 0.25]],
            source: FrequencySource::Assumed,
        };
        let other = OtherBytes {
            head: 500,
            other: 3,
            kv: 10,
        };
        let layers = [layer(QuantType::Q4_0), layer(QuantType::Q8_0)];
        let shares = CandidateShares {
            candidates: 0.5,
            named: 0.0,
        };
        let expected = Expected {
            frequencies: &frequencies,
            found: vec![0.5; 2],
            shares: vec![shares; 2],
            measured: true,
        };
        let parts = forecast(mode, &costs, &layers, &expected, other);
        let all: f64 = (layers.iter().enumerate())
            .map(|(index, layer)| neurons_ns(&costs, layer, &expected, index))
            .sum();
        let ms: f64 = parts.iter().map(|part| part.ms).sum();
        assert!(
            (all / 1e6 + 4.0 + 7.0 + 1.0 - ms).abs() < 1e-9,
            "{all} {ms}"
        );
        parts
    }

    #[test]
    fn every_part_is_counted_as_often_as_it_occurs() {
        let times: Vec<(f64, u64)> = forecast_of(Sparsity::Exact, "")
            .iter()
            .map(|part| (part.ms, part.bytes))
            .collect();
        // 0.75 and 1.25 active neurons of 2
        let expected = [
            (4.0, 210),
            (4.0, 80),
            (2.0, 80),
            (7.0, 500),
            (1.0, 0),
            (3.0, 3),
        ];
        assert_eq!(times, expected);
    }

    #[test]
    fn candidates_count_where_they_are_named() {
        let parts = forecast_of(Sparsity::Predicted, "signs");
        // a half of two neurons in each of two layers; of the active ones half is computed
        assert_eq!((parts[1].ms, parts[2].ms), (4.0 + 2.0 * 0.5, 1.0));
    }

    #[test]
    fn dense_ffns_are_one_part() {
        let parts = forecast_of(Sparsity::Off, "");
        assert_eq!((parts[1].ms, parts[1].bytes), (0.0, 0));
        assert_eq!((parts[2].ms, parts[2].bytes), (6.0, 240));
    }
}
