//! Adam: gradient steps in units of each parameter's own scale.
//!
//! Source: Kingma and Ba 2015, "Adam: a method for stochastic optimization".

use pi_kernels::cuda::fit::AdamStep;

/// Decay of the mean gradient, and of the mean square.
const DECAY: [f32; 2] = [0.9, 0.99];
/// Steps until the rate is whole.
const N_WARM_UP: usize = 20;
const EPSILON: f32 = 1e-8;

/// Size of one step, and how far the means have come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rate {
    /// The step's number, from 1.
    pub step: usize,
    /// Steps in all.
    pub n_steps: usize,
    rate: f32,
    unbias: [f32; 2],
}

impl Rate {
    /// Rate of step `step` (from 1) of `n_steps`: a short rise, then along a cosine to zero.
    pub fn at(step: usize, n_steps: usize, most: f32) -> Self {
        let rise = (step as f32 / N_WARM_UP as f32).min(1.0);
        let fall = 0.5 * (1.0 + (std::f32::consts::PI * step as f32 / n_steps as f32).cos());
        let unbias = DECAY.map(|decay| 1.0 / (1.0 - decay.powi(step as i32)));
        Self {
            step,
            n_steps,
            rate: most * rise * fall,
            unbias,
        }
    }
}

impl Rate {
    /// The same as a GPU takes it.
    pub fn on_gpu(self) -> AdamStep {
        AdamStep {
            rate: self.rate,
            decay: DECAY,
            unbias: self.unbias,
        }
    }
}

/// Parameters with their means.
pub(super) struct Adam {
    values: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
}

/// Some of an [`Adam`]'s parameters, one thread's.
pub(super) struct Part<'a> {
    pub values: &'a mut [f32],
    mean: &'a mut [f32],
    square: &'a mut [f32],
}

impl Adam {
    pub fn new(values: Vec<f32>) -> Self {
        let zeros = vec![0.0; values.len()];
        Self {
            values,
            mean: zeros.clone(),
            square: zeros,
        }
    }

    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Disjoint parts of `length` parameters, the last perhaps shorter.
    pub fn parts(&mut self, length: usize) -> impl Iterator<Item = Part<'_>> {
        let means = self
            .mean
            .chunks_mut(length)
            .zip(self.square.chunks_mut(length));
        let parts = self.values.chunks_mut(length).zip(means);
        parts.map(|(values, (mean, square))| Part {
            values,
            mean,
            square,
        })
    }
}

impl Part<'_> {
    /// One step against `gradient`.
    pub fn update(&mut self, gradient: &[f32], rate: Rate) {
        let means = self.mean.iter_mut().zip(self.square.iter_mut());
        for ((value, (mean, square)), gradient) in self.values.iter_mut().zip(means).zip(gradient) {
            *mean += (1.0 - DECAY[0]) * (gradient - *mean);
            *square += (1.0 - DECAY[1]) * (gradient * gradient - *square);
            let size = (*square * rate.unbias[1]).sqrt() + EPSILON;
            *value -= rate.rate * *mean * rate.unbias[0] / size;
        }
    }
}
