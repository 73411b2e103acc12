//! The trained predictor one layer ahead: fc2·relu(fc1·h), fitted to what neurons contribute.
//!
//! The loss of a neuron with score s and share of mass m is (m/λ)·softplus(−s) + softplus(s). Where it is least the
//! score is the logarithm of the neuron's expected mass over λ: `score > 0` then says that the neuron is worth its
//! cost, and a threshold at another target is one shift. Training starts from the linear fit of the same rank: its
//! inner values have variance 1, and a bias of 1 keeps most of them on the straight side of the ReLU.

use std::num::NonZeroUsize;

use pi_kernels::QuantType;

use super::adam::{Adam, Rate};
use super::ahead::Ahead;
use super::ahead_svd;
use super::error::PredictorError;
use super::neuron_model::{NeuronModel, deviations_of};
use super::quantised::QuantisedMatrix;
use super::samples::LayerSamples;
use super::thresholds::{self, Target};
use crate::linear_algebra::{Workers, multiply, times_transposed, view, view_mut, view_t};
use crate::sampler::Mt19937;

/// Neurons whose scores and gradients one thread computes at a time.
const NEURONS: usize = 128;
/// Rows of fc1 that one thread changes at a time.
const ROWS: usize = 16;
/// Tokens whose inner values one thread computes at a time.
const TOKENS: usize = 64;
/// Most that one contribution weighs against a missed chance to skip.
const WEIGHT_MAX: f32 = 30.0;
/// Bias of inner values at the start, in their deviations.
const OPEN_AT_START: f32 = 1.0;
/// What the starting point keeps.
const AT_START: Target = Target::MassKept(0.95);

/// How to train.
#[derive(Debug, Clone, Copy)]
pub struct Training {
    /// Values of the inner layer, a multiple of 32.
    pub rank: usize,
    /// Passes over the samples.
    pub n_epochs: usize,
    /// Tokens of a step.
    pub batch: NonZeroUsize,
    /// Largest step, in units of a parameter's own scale.
    pub rate: f32,
    /// Of the order of tokens.
    pub seed: u32,
    /// Format of the matrices.
    pub quant: QuantType,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            rank: 64,
            n_epochs: 4,
            batch: NonZeroUsize::new(256).expect("not zero"),
            rate: 1.5e-3,
            seed: 1,
            quant: QuantType::Q4_0,
        }
    }
}

/// Trains a predictor on the samples' fitting tokens; it still has to be calibrated.
///
/// The result is the same for any number of threads. `progress` hears of steps done and steps in all.
///
/// # Errors
/// When the samples have no residual stream, or all are the same.
///
/// # Panics
/// When the rank is no multiple of 32.
pub fn fit(
    samples: &LayerSamples,
    workers: Workers,
    training: &Training,
    mut progress: impl FnMut(usize, usize),
) -> Result<Ahead, PredictorError> {
    assert_eq!(training.rank % 32, 0, "rank is a multiple of 32");
    let tokens = samples.fitting();
    let residual = samples
        .residual(tokens.clone())
        .ok_or(PredictorError::NoResidual)?;
    let masses = samples.masses(tokens);
    let (mut net, mass_unit) = Net::start(samples, workers, training)?;
    let n_tokens = masses.n_tokens();
    let batch = training.batch.get().min(n_tokens);
    let n_steps = training.n_epochs * (n_tokens / batch);
    let mut order: Vec<usize> = (0..n_tokens).collect();
    let mut rng = Mt19937::new(training.seed);
    let mut x = vec![0.0; batch * samples.n_embd];
    let mut weights = vec![0.0; batch * samples.n_ff];
    let mut step = 0;
    for _ in 0..training.n_epochs {
        shuffle(&mut order, &mut rng);
        for ids in order.chunks_exact(batch) {
            for (row, id) in x.chunks_exact_mut(samples.n_embd).zip(ids) {
                let from = &residual[id * samples.n_embd..][..samples.n_embd];
                row.iter_mut()
                    .zip(from)
                    .zip(&net.input_scale)
                    .for_each(|((x, r), scale)| *x = r * scale);
            }
            for (row, id) in weights.chunks_exact_mut(samples.n_ff).zip(ids) {
                let shares = masses.shares(*id);
                row.iter_mut()
                    .zip(shares)
                    .for_each(|(w, m)| *w = (m / mass_unit).min(WEIGHT_MAX));
            }
            step += 1;
            net.step(
                workers,
                &x,
                &weights,
                Rate::at(step, n_steps, training.rate),
            );
            progress(step, n_steps);
        }
    }
    Ok(net.rounded(training.quant))
}

fn shuffle(order: &mut [usize], rng: &mut Mt19937) {
    for i in (1..order.len()).rev() {
        order.swap(i, (rng.next_f64() * (i + 1) as f64) as usize);
    }
}

/// Parameters in training. fc1 reads inputs that are scaled to one size each.
struct Net {
    n_embd: usize,
    rank: usize,
    /// `[n_embd]`
    input_scale: Vec<f32>,
    /// `[rank, n_embd]`
    fc1: Adam,
    /// `[rank]`
    fc1_bias: Adam,
    /// `[n_ff, rank]`
    fc2: Adam,
    /// `[n_ff]`
    fc2_bias: Adam,
}

impl Net {
    /// The linear fit as a network, and the mass (λ) that is worth a candidate's cost.
    fn start(
        samples: &LayerSamples,
        workers: Workers,
        training: &Training,
    ) -> Result<(Self, f32), PredictorError> {
        let (n_embd, n_ff, rank) = (samples.n_embd, samples.n_ff, training.rank);
        let linear = rank.min(n_embd);
        let regression = ahead_svd::regression(samples, workers, linear)?;
        let tokens = samples.fitting();
        let residual = samples
            .residual(tokens.clone())
            .ok_or(PredictorError::NoResidual)?;
        let a = regression.directions(linear);
        let b = regression.map_from(&a, linear)?;
        let mut inner = vec![0.0; tokens.len() * linear];
        times_transposed(residual, &a, n_embd, &mut inner);
        let mut scores = vec![0.0; tokens.len() * n_ff];
        times_transposed(&inner, &b, linear, &mut scores);
        let masses = samples.masses(tokens);
        let models = NeuronModel::fit_all(&scores, masses.gates(), masses.all_shares(), n_ff);
        let (bias, mass_unit) = thresholds::per_neuron_at(&scores, &masses, &models, AT_START);
        // a score of a logistic unit: in deviations of the gate around its line
        let gains: Vec<f32> = models.iter().map(deviations_of).collect();
        let scales = input_scales(residual, n_embd);
        // rows beyond the linear fit's look the other way, and nobody listens to them yet
        let mut fc1 = Vec::with_capacity(rank * n_embd);
        for r in 0..rank {
            let sign = if r < linear { 1.0 } else { -1.0 };
            let row = &a[r % linear * n_embd..][..n_embd];
            fc1.extend(row.iter().zip(&scales).map(|(a, scale)| sign * a / scale));
        }
        let mut fc2 = vec![0.0; n_ff * rank];
        let mut fc2_bias = Vec::with_capacity(n_ff);
        for (i, row) in fc2.chunks_exact_mut(rank).enumerate() {
            let map = &b[i * linear..][..linear];
            row.iter_mut()
                .zip(map)
                .for_each(|(to, b)| *to = b * gains[i]);
            let added = OPEN_AT_START * row.iter().sum::<f32>();
            fc2_bias.push((bias[i] * gains[i]).clamp(-20.0, 20.0) - added);
        }
        let net = Self {
            n_embd,
            rank,
            input_scale: scales,
            fc1: Adam::new(fc1),
            fc1_bias: Adam::new(vec![OPEN_AT_START; rank]),
            fc2: Adam::new(fc2),
            fc2_bias: Adam::new(fc2_bias),
        };
        Ok((net, mass_unit as f32))
    }

    /// One step down the gradient of `x` `[batch, n_embd]` with masses in units of λ, `weights` `[batch, n_ff]`.
    fn step(&mut self, workers: Workers, x: &[f32], weights: &[f32], rate: Rate) {
        let (n_embd, rank) = (self.n_embd, self.rank);
        let batch = x.len() / n_embd;
        let n_ff = weights.len() / batch;
        let mut inner = vec![0.0; batch * rank];
        let blocks = inner
            .chunks_mut(TOKENS * rank)
            .zip(x.chunks(TOKENS * n_embd));
        let (fc1, fc1_bias) = (self.fc1.values(), self.fc1_bias.values());
        workers.each(blocks, |(inner, x)| {
            times_transposed(x, fc1, n_embd, inner);
            for row in inner.chunks_exact_mut(rank) {
                row.iter_mut()
                    .zip(fc1_bias)
                    .for_each(|(z, bias)| *z = (*z + bias).max(0.0));
            }
        });
        let mut inner_gradients = vec![0.0; n_ff.div_ceil(NEURONS) * batch * rank];
        let parts = self
            .fc2
            .parts(NEURONS * rank)
            .zip(self.fc2_bias.parts(NEURONS));
        let blocks = parts
            .zip(inner_gradients.chunks_mut(batch * rank))
            .enumerate();
        workers.each(blocks, |(block, ((mut fc2, mut bias), back))| {
            let first = block * NEURONS;
            let n = bias.values.len();
            let mut errors = vec![0.0; batch * n];
            times_transposed(&inner, fc2.values, rank, &mut errors);
            for (errors, weights) in errors.chunks_exact_mut(n).zip(weights.chunks_exact(n_ff)) {
                let weights = &weights[first..first + n];
                for ((error, weight), bias) in errors.iter_mut().zip(weights).zip(&*bias.values) {
                    let open = 1.0 / (1.0 + (-(*error + bias)).exp());
                    *error = (open * (1.0 + weight) - weight) / batch as f32;
                }
            }
            multiply(
                &mut view_mut(back, batch, rank),
                view(&errors, batch, n),
                view(fc2.values, n, rank),
            );
            let mut gradient = vec![0.0; n * rank];
            multiply(
                &mut view_mut(&mut gradient, n, rank),
                view_t(&errors, batch, n),
                view(&inner, batch, rank),
            );
            fc2.update(&gradient, rate);
            bias.update(&column_sums(&errors, n), rate);
        });
        let back = joined(&inner_gradients, &inner);
        let parts = self
            .fc1
            .parts(ROWS * n_embd)
            .zip(self.fc1_bias.parts(ROWS))
            .enumerate();
        workers.each(parts, |(block, (mut fc1, mut bias))| {
            let n = bias.values.len();
            let own: Vec<f32> = back
                .chunks_exact(rank)
                .flat_map(|row| &row[block * ROWS..][..n])
                .copied()
                .collect();
            let mut gradient = vec![0.0; n * n_embd];
            multiply(
                &mut view_mut(&mut gradient, n, n_embd),
                view_t(&own, batch, n),
                view(x, batch, n_embd),
            );
            fc1.update(&gradient, rate);
            bias.update(&column_sums(&own, n), rate);
        });
    }

    fn rounded(&self, quant: QuantType) -> Ahead {
        let mut fc1 = self.fc1.values().to_vec();
        for row in fc1.chunks_exact_mut(self.n_embd) {
            row.iter_mut()
                .zip(&self.input_scale)
                .for_each(|(a, scale)| *a *= scale);
        }
        Ahead {
            a: QuantisedMatrix::round(quant, &fc1, self.n_embd),
            a_bias: Some(self.fc1_bias.values().to_vec()),
            b: QuantisedMatrix::round(quant, self.fc2.values(), self.rank),
            b_bias: self.fc2_bias.values().to_vec(),
        }
    }
}

/// One over the root mean square of each input `[n_embd]`.
fn input_scales(residual: &[f32], n_embd: usize) -> Vec<f32> {
    let mut squares = vec![0.0f64; n_embd];
    for row in residual.chunks_exact(n_embd) {
        squares
            .iter_mut()
            .zip(row)
            .for_each(|(sum, value)| *sum += f64::from(*value).powi(2));
    }
    let n = (residual.len() / n_embd) as f64;
    let size = |sum: &f64| (1.0 / ((sum / n).sqrt() + 1e-3)) as f32;
    squares.iter().map(size).collect()
}

/// Sum of the blocks' gradients, in their order, where the inner value was open.
fn joined(parts: &[f32], inner: &[f32]) -> Vec<f32> {
    let mut sums = vec![0.0; inner.len()];
    for part in parts.chunks_exact(inner.len()) {
        sums.iter_mut()
            .zip(part)
            .for_each(|(sum, value)| *sum += value);
    }
    sums.iter_mut()
        .zip(inner)
        .filter(|(_, h)| **h <= 0.0)
        .for_each(|(sum, _)| *sum = 0.0);
    sums
}

fn column_sums(values: &[f32], n_cols: usize) -> Vec<f32> {
    let mut sums = vec![0.0; n_cols];
    for row in values.chunks_exact(n_cols) {
        sums.iter_mut()
            .zip(row)
            .for_each(|(sum, value)| *sum += value);
    }
    sums
}
