//! The channels of the residual stream.

use pi_kernels::QuantType;

use super::blocks::unit_values;

/// The first channels hold a constant that nothing writes to, and from which gates, queries and keys get what is planted
/// in them; all others change. A block's values share a scale, so the constant ones fill blocks of their own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Channels {
    pub n_embd: usize,
    pub n_constant: usize,
}

impl Channels {
    pub fn new(quant: QuantType, n_embd: usize) -> Self {
        Self {
            n_embd,
            n_constant: unit_values(quant),
        }
    }

    pub fn n_changing(&self) -> usize {
        self.n_embd - self.n_constant
    }

    /// Root mean square of a stream whose constant channels are 1 and the others have `variance`.
    pub fn rms(&self, variance: f64) -> f64 {
        let square = self.n_constant as f64 + self.n_changing() as f64 * variance;
        (square / self.n_embd as f64).sqrt()
    }

    /// Relative standard deviation over tokens of that root mean square.
    pub fn deviation(&self, variance: f64) -> f64 {
        let changing = self.n_changing() as f64 * variance;
        let share = changing / (self.n_constant as f64 + changing);
        share / (2.0 * self.n_changing() as f64).sqrt()
    }

    /// Weights of a norm after which constant channels are 1, and the others have variance 1.
    pub fn norm_weights(&self, variance: f64) -> Vec<f32> {
        let rms = self.rms(variance);
        let changing = rms / variance.sqrt();
        let weight = |channel: usize| {
            if channel < self.n_constant {
                rms
            } else {
                changing
            }
        };
        (0..self.n_embd)
            .map(|channel| weight(channel) as f32)
            .collect()
    }
}
