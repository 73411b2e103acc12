//! The residual stream's expected energy and memory from layer to layer, and the weights' scales that follow.

use super::frequencies::Offsets;
use super::gaussian::increasing_root;
use super::layout::Channels;
use super::recency::{Memory, Recency};

/// Overlap of consecutive active sets that is planted: the demo model's mean over its layers, on text (0.28 to 0.29).
const OVERLAP: f64 = 0.285;
/// Correlations of neighbouring tokens' states that are planted whatever overlap they give.
const CORRELATIONS: std::ops::RangeInclusive<f64> = 0.2..=0.6;
/// Most that a layer's FFN adds to the stream, as a share of the stream's energy; the demo model's layers add 2 to 10 %.
const FFN_ENERGY_MAX: f64 = 0.04;
/// What all FFNs together may add: errors of the expectation add up with it.
const FFN_ENERGY_ALL: f64 = 1.0;
/// What a layer's attention adds at least and at most.
const ATTENTION_ENERGY: (f64, f64) = (0.004, 4.0);

/// A layer's part of the stream: variances are per value, of the channels that change.
#[derive(Debug, Clone)]
pub(super) struct LayerStream {
    /// Before attention.
    pub variance_in: f64,
    /// After attention.
    pub variance_mid: f64,
    /// Standard deviation of the weights of `attn_output`, where values have variance 1.
    pub attention_std: f64,
    /// Standard deviation of the weights of `ffn_down_t`, where gates and ups have variance 1.
    pub down_std: f64,
}

/// What the stream is expected to be.
#[derive(Debug, Clone)]
pub(super) struct Stream {
    /// Layers in order.
    pub layers: Vec<LayerStream>,
    /// After the last layer.
    pub variance_out: f64,
}

impl Stream {
    /// Follows the stream from embeddings of variance 1 through `n_layer` layers.
    ///
    /// In every layer attention adds as much as brings the correlation of neighbouring tokens back to what gives the
    /// planted overlap.
    pub fn new(
        n_layer: usize,
        n_ff: usize,
        channels: Channels,
        offsets: &Offsets,
        recency: &Recency,
    ) -> Self {
        let (low, high) = (*CORRELATIONS.start(), *CORRELATIONS.end());
        let wanted = increasing_root(low, high, |rho| offsets.overlap(rho) - OVERLAP);
        let ffn_energy = FFN_ENERGY_MAX.min(FFN_ENERGY_ALL / n_layer as f64);
        let contributions = Contributions::new(offsets);
        let gate_square = offsets.gate_square();
        let (mut variance, mut memory) = (1.0, Memory::none());
        let mut layers = Vec::with_capacity(n_layer);
        for _ in 0..n_layer {
            let (averaged, slow) = recency.average(&memory, channels.deviation(variance));
            let missing = wanted - memory.of_neighbours();
            let room = (slow.of_neighbours() - wanted).max(1e-3);
            let energy = (missing / room).clamp(ATTENTION_ENERGY.0, ATTENTION_ENERGY.1);
            let attention = energy * variance / (channels.n_embd as f64 * averaged);
            let mid = variance * (1.0 + energy);
            let down = ffn_energy * mid / (n_ff as f64 * gate_square);
            layers.push(LayerStream {
                variance_in: variance,
                variance_mid: mid,
                attention_std: attention.sqrt(),
                down_std: down.sqrt(),
            });
            memory = memory.plus(energy, &slow);
            let ffn = memory.map(|rho| contributions.correlation(rho));
            memory = memory.plus(ffn_energy, &ffn);
            variance = mid * (1.0 + ffn_energy);
        }
        Self {
            layers,
            variance_out: variance,
        }
    }

    /// Squared correlation of the stream after attention in the layer before `layer` with the one in `layer`.
    pub fn seen_ahead(&self, layer: usize) -> f64 {
        self.layers[layer - 1].variance_mid / self.layers[layer].variance_mid
    }

    /// The median of [`Stream::seen_ahead`] over the layers.
    pub fn seen_ahead_typical(&self) -> f64 {
        let mut seen: Vec<f64> = (1..self.layers.len())
            .map(|layer| self.seen_ahead(layer))
            .collect();
        seen.sort_by(f64::total_cmp);
        seen.get(seen.len() / 2).copied().unwrap_or(1.0)
    }
}

/// [`Offsets::contribution_correlation`] as a table.
struct Contributions(Vec<f64>);

impl Contributions {
    const STEPS: usize = 24;

    fn new(offsets: &Offsets) -> Self {
        let at = |i: usize| offsets.contribution_correlation(i as f64 / Self::STEPS as f64);
        Self((0..=Self::STEPS).map(at).collect())
    }

    fn correlation(&self, rho: f64) -> f64 {
        let at = rho.clamp(0.0, 1.0) * Self::STEPS as f64;
        let low = (at as usize).min(Self::STEPS - 1);
        let part = at - low as f64;
        self.0[low] * (1.0 - part) + self.0[low + 1] * part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_stays_through_all_layers() {
        let offsets = Offsets::new(0.10, 2.4);
        let recency = Recency::new(128, 1e4).unwrap();
        let channels = Channels::new(pi_kernels::QuantType::Q4_0, 8192);
        let stream = Stream::new(80, 28672, channels, &offsets, &recency);
        assert!(stream.variance_out < 10.0, "{}", stream.variance_out);
        let first = &stream.layers[0];
        // the first layer's attention has to make all of the memory, the others to keep it up
        assert!(first.variance_mid / first.variance_in > 1.3);
        for layer in 1..80 {
            assert!(stream.seen_ahead(layer) > 0.9, "layer {layer}");
        }
    }
}
