//! A predictor one layer ahead, as it is stored: from the residual stream of the layer before to a layer's neurons.

use pi_kernels::Cpu;

use super::quantised::QuantisedMatrix;
use super::samples::LayerSamples;
use super::thresholds::{self, Evaluation, Target};
use crate::linear_algebra::Workers;

/// Scores `b·h + b_bias` with `h = relu(a·r + a_bias)` where there is an `a_bias`, else `h = a·r`.
///
/// A neuron is predicted where its score is above zero.
#[derive(Debug, Clone, PartialEq)]
pub struct Ahead {
    /// `[rank, n_embd]`
    pub a: QuantisedMatrix,
    /// `[rank]`, of trained predictors.
    pub a_bias: Option<Vec<f32>>,
    /// `[n_ff, rank]`
    pub b: QuantisedMatrix,
    /// `[n_ff]`, the threshold included.
    pub b_bias: Vec<f32>,
}

impl Ahead {
    /// Products `b·h`, row-major `[n, n_ff]`, of every row of `residual` `[n, n_embd]`; the bias isn't added.
    pub fn products(&self, cpu: Cpu, workers: Workers, residual: &[f32]) -> Vec<f32> {
        let mut inner = self.a.products(cpu, workers, residual);
        if let Some(bias) = &self.a_bias {
            for row in inner.chunks_exact_mut(bias.len()) {
                row.iter_mut()
                    .zip(bias)
                    .for_each(|(h, bias)| *h = (*h + bias).max(0.0));
            }
        }
        self.b.products(cpu, workers, &inner)
    }

    /// Sets the biases so that the samples' calibrating tokens meet `target`, and says what that takes there.
    ///
    /// # Panics
    /// When the samples have no residual stream.
    pub fn calibrate(
        &mut self,
        cpu: Cpu,
        workers: Workers,
        samples: &LayerSamples,
        target: Target,
    ) -> Evaluation {
        let tokens = samples.calibrating();
        let residual = samples
            .residual(tokens.clone())
            .expect("samples with a residual stream");
        let mut scores = self.products(cpu, workers, residual);
        let masses = samples.masses(tokens);
        // one shift for all goes on top of the biases that training gave
        for row in scores.chunks_exact_mut(self.b_bias.len()) {
            row.iter_mut()
                .zip(&self.b_bias)
                .for_each(|(score, bias)| *score += bias);
        }
        let fitted = thresholds::fit(&scores, &masses, target);
        let evaluation = thresholds::evaluate(&scores, &fitted.bias, None, &masses);
        self.b_bias
            .iter_mut()
            .zip(&fitted.bias)
            .for_each(|(bias, shift)| *bias += shift);
        evaluation
    }
}
