//! The trained predictor one layer ahead: fc2·relu(fc1·h), fitted to what neurons contribute.
//!
//! The loss of a neuron with score s and share of mass m is (m/λ)·softplus(−s) + softplus(s). Where it is least the
//! score is the logarithm of the neuron's expected mass over λ: `score > 0` then says that the neuron is worth its
//! cost, and a threshold at another target is one shift. Training starts from the linear fit of the same rank: its
//! inner values have variance 1, and a bias of 1 keeps most of them on the straight side of the ReLU.

use std::convert::Infallible;
use std::num::NonZeroUsize;

use pi_kernels::QuantType;

use super::adam::{Adam, Rate};
use super::ahead::Ahead;
use super::ahead_svd;
use super::error::PredictorError;
use super::fit_gpu::{FitOn, StartOn};
use super::neuron_model::{NeuronModel, deviations_of};
use super::quantised::QuantisedMatrix;
use super::samples::LayerSamples;
use super::thresholds::{self, Masses, Target};
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
/// The result is the same for any number of threads, and rounded in another way on a GPU. `progress` hears of steps done and steps in all.
///
/// # Errors
/// When the samples have no residual stream, or all are the same.
///
/// # Panics
/// When the rank is no multiple of 32.
pub fn fit<'a>(
    samples: &LayerSamples,
    on: impl Into<FitOn<'a>>,
    training: &Training,
    mut progress: impl FnMut(usize, usize),
) -> Result<Ahead, PredictorError> {
    assert_eq!(training.rank % 32, 0, "rank is a multiple of 32");
    let tokens = samples.fitting();
    let residual = samples
        .residual(tokens.clone())
        .ok_or(PredictorError::NoResidual)?;
    let masses = samples.masses(tokens);
    let on = on.into();
    let (mut net, mass_unit) = Net::start(samples, on, training)?;
    let batch = training.batch.get().min(masses.n_tokens());
    let on_gpu = on.gpu.and_then(|gpu| {
        let start = net.as_start((residual, &masses), mass_unit, batch);
        gpu.trained(start, |step| {
            each_step(masses.n_tokens(), training, |ids, rate| {
                step(ids, rate)?;
                progress(rate.step, rate.n_steps);
                Ok(())
            })
        })
    });
    if let Some([fc1, fc1_bias, fc2, fc2_bias]) = on_gpu {
        let trained = Net {
            fc1: Adam::new(fc1),
            fc1_bias: Adam::new(fc1_bias),
            fc2: Adam::new(fc2),
            fc2_bias: Adam::new(fc2_bias),
            ..net
        };
        return Ok(trained.rounded(training.quant));
    }
    let mut x = vec![0.0; batch * samples.n_embd];
    let mut weights = vec![0.0; batch * samples.n_ff];
    each_step(masses.n_tokens(), training, |ids, rate| {
        let ids = || ids.iter().map(|id| *id as usize);
        for (row, id) in x.chunks_exact_mut(samples.n_embd).zip(ids()) {
            let from = &residual[id * samples.n_embd..][..samples.n_embd];
            row.iter_mut()
                .zip(from)
                .zip(&net.input_scale)
                .for_each(|((x, r), scale)| *x = r * scale);
        }
        for (row, id) in weights.chunks_exact_mut(samples.n_ff).zip(ids()) {
            let shares = masses.shares(id);
            row.iter_mut()
                .zip(shares)
                .for_each(|(w, m)| *w = (m / mass_unit).min(WEIGHT_MAX));
        }
        net.step(on.workers, &x, &weights, rate);
        progress(rate.step, rate.n_steps);
        Ok::<(), Infallible>(())
    })
    .unwrap_or_else(|never| match never {});
    Ok(net.rounded(training.quant))
}

/// Calls `step` with the tokens of each step and its rate: all tokens in another order in each epoch, a batch at a time.
fn each_step<E>(
    n_tokens: usize,
    training: &Training,
    mut step: impl FnMut(&[u32], Rate) -> Result<(), E>,
) -> Result<(), E> {
    let batch = training.batch.get().min(n_tokens);
    let n_steps = training.n_epochs * (n_tokens / batch);
    let mut order: Vec<u32> = (0..n_tokens as u32).collect();
    let mut rng = Mt19937::new(training.seed);
    let mut number = 0;
    for _ in 0..training.n_epochs {
        shuffle(&mut order, &mut rng);
        for ids in order.chunks_exact(batch) {
            number += 1;
            step(ids, Rate::at(number, n_steps, training.rate))?;
        }
    }
    Ok(())
}

fn shuffle(order: &mut [u32], rng: &mut Mt19937) {
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
        on: FitOn<'_>,
        training: &Training,
    ) -> Result<(Self, f32), PredictorError> {
        let (n_embd, n_ff, rank) = (samples.n_embd, samples.n_ff, training.rank);
        let linear = rank.min(n_embd);
        let regression = ahead_svd::regression(samples, on, linear)?;
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

    /// The network as a GPU takes it, with the residual stream and masses of all tokens.
    fn as_start<'a>(
        &'a self,
        (residual, masses): (&'a [f32], &'a Masses<'_>),
        mass_unit: f32,
        batch: usize,
    ) -> StartOn<'a> {
        StartOn {
            fc1: self.fc1.values(),
            fc1_bias: self.fc1_bias.values(),
            fc2: self.fc2.values(),
            fc2_bias: self.fc2_bias.values(),
            input_scale: &self.input_scale,
            residual,
            masses: masses.all_shares(),
            mass_unit,
            weight_max: WEIGHT_MAX,
            batch,
        }
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

#[cfg(test)]
mod tests {
    use pi_kernels::KernelError;
    use pi_kernels::cuda::Device;

    use super::super::FitGpu;
    use super::*;

    /// From one start, a few steps move parameters to where the host's do. (Many do not: Adam takes whole steps where a gradient is
    /// nothing but rounding.)
    #[test]
    fn steps_on_a_gpu_are_the_host_s() {
        let device = match Device::open(0) {
            Ok(device) => device,
            Err(KernelError::CudaNoDriver | KernelError::CudaNoDevice { .. }) => {
                println!("skipped: no CUDA driver");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let (n_tokens, n_embd, n_ff) = (400, 96, 700);
        let mut rng = Mt19937::new(4);
        let mut draw =
            |n: usize| -> Vec<f32> { (0..n).map(|_| rng.next_f64() as f32 - 0.5).collect() };
        let x = draw(n_tokens * n_embd);
        let gates: Vec<f32> = (x.chunks_exact(n_embd))
            .flat_map(|x| {
                (0..n_ff)
                    .map(|i| x[i % 24].abs() + x[24 + i % 72] - 0.4)
                    .collect::<Vec<_>>()
            })
            .collect();
        let samples = LayerSamples {
            n_tokens,
            n_embd,
            n_ff,
            contributions: gates.iter().map(|gate| gate.max(0.0)).collect(),
            gates,
            residual_before: Some(x.clone()),
            x,
        };
        let training = Training::default();
        let workers = Workers::new(NonZeroUsize::MIN);
        let tokens = samples.fitting();
        let masses = samples.masses(tokens.clone());
        let residual = samples.residual(tokens).unwrap();
        let (mut net, unit) = Net::start(&samples, workers.into(), &training).unwrap();
        let parameters = |net: &Net| {
            let all = [&net.fc1, &net.fc1_bias, &net.fc2, &net.fc2_bias];
            all.map(|adam| adam.values().to_vec())
        };
        let start = parameters(&net);
        let steps: Vec<Vec<u32>> = (0..3)
            .map(|step| (0..200).map(|n| (n * 7 + step * 31) % 300).collect())
            .collect();
        let rate = |step: usize| Rate::at(step + 1, 40, 1e-2);
        let gpu = FitGpu::new(device, 1 << 30);
        let on_gpu = gpu.trained(net.as_start((residual, &masses), unit, 200), |work| {
            (0..3).try_for_each(|step| work(&steps[step], rate(step)))
        });
        for (step, ids) in steps.iter().enumerate() {
            let ids = || ids.iter().map(|id| *id as usize);
            let x = ids().flat_map(|id| {
                let row = residual[id * n_embd..(id + 1) * n_embd].iter();
                let scaled = row.zip(&net.input_scale).map(|(x, scale)| x * scale);
                scaled.collect::<Vec<_>>()
            });
            let weights = ids().flat_map(|id| {
                let shares = masses.shares(id).iter();
                shares
                    .map(|m| (m / unit).min(WEIGHT_MAX))
                    .collect::<Vec<_>>()
            });
            let (x, weights): (Vec<f32>, Vec<f32>) = (x.collect(), weights.collect());
            net.step(workers, &x, &weights, rate(step));
        }
        let parts = parameters(&net).into_iter().zip(on_gpu.unwrap()).zip(start);
        for (part, ((host, ours), start)) in parts.enumerate() {
            let moved = |to: &[f32]| -> Vec<f32> {
                to.iter().zip(&start).map(|(to, from)| to - from).collect()
            };
            let (host, ours) = (moved(&host), moved(&ours));
            let error: f32 = ours.iter().zip(&host).map(|(a, b)| (a - b).powi(2)).sum();
            let size: f32 = host.iter().map(|value| value * value).sum();
            assert!(size > 0.0, "part {part} has moved");
            assert!(error <= 1e-3 * size, "part {part}: {error} of {size}");
        }
    }
}
