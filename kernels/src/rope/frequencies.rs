//! Angles of the pairs at a position, with the scalings for long contexts.

use std::f32::consts::PI;

use super::{RopeScaling, RopeSpec};

/// Parameters of Llama 3's scaling, for files without the tensor `rope_freqs`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// What slow pairs are divided by.
    pub factor: f32,
    /// Pairs that turn fewer times than this in the original context are divided by `factor`.
    pub low_freq_factor: f32,
    /// Pairs that turn more often than this are kept; between the two the divisor is blended.
    pub high_freq_factor: f32,
    /// Context in training, in tokens.
    pub original_context: f32,
}

impl Llama3Scaling {
    /// The divisor of each pair's frequency, `[n_dims / 2]`.
    ///
    /// Source: `rope_type = "llama3"` of Hugging Face transformers.
    pub fn divisors(&self, n_dims: usize, freq_base: f32) -> Vec<f32> {
        let base = f64::from(freq_base);
        let turns = |i: usize| {
            let frequency = base.powf(-2.0 * i as f64 / n_dims as f64);
            f64::from(self.original_context) * frequency / (2.0 * std::f64::consts::PI)
        };
        let (factor, low) = (f64::from(self.factor), f64::from(self.low_freq_factor));
        let high = f64::from(self.high_freq_factor);
        (0..n_dims / 2)
            .map(|i| {
                let turns = turns(i);
                if turns > high {
                    1.0
                } else if turns < low {
                    factor as f32
                } else {
                    let smooth = (turns - low) / (high - low);
                    (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                }
            })
            .collect()
    }
}

/// Parameters of YaRN. Peng et al., "YaRN: Efficient Context Window Extension" (2023).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct YarnScaling {
    /// Context now over context in training.
    pub factor: f32,
    /// Context in training, in tokens.
    pub original_context: usize,
    /// Share of extrapolation for fast pairs: 1 for YaRN, 0 for plain interpolation.
    pub ext_factor: f32,
    /// Multiplies all cosines and sines, beside YaRN's own 1 + 0.1 ln(factor).
    pub attn_factor: f32,
    /// Pairs that turn more often in the original context are extrapolated: 32.
    pub beta_fast: f32,
    /// Pairs that turn fewer times are interpolated: 1.
    pub beta_slow: f32,
}

impl YarnScaling {
    /// YaRN's usual parameters.
    pub fn new(factor: f32, original_context: usize) -> Self {
        Self {
            factor,
            original_context,
            ext_factor: 1.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        }
    }

    /// The pairs between which extrapolation turns into interpolation.
    fn ramp(&self, n_dims: usize, freq_base: f32) -> (f32, f32) {
        let pair_of_turns = |turns: f32| {
            let wavelength = self.original_context as f32 / (turns * 2.0 * PI);
            n_dims as f32 * wavelength.ln() / (2.0 * freq_base.ln())
        };
        let start = pair_of_turns(self.beta_fast).floor().max(0.0);
        let end = pair_of_turns(self.beta_slow)
            .ceil()
            .min((n_dims - 1) as f32);
        (start, end)
    }

    /// The angle of a pair and the magnitude of its rotation.
    fn angle(&self, pair: usize, ramp: (f32, f32), theta: f32) -> (f32, f32) {
        let scale = 1.0 / self.factor;
        let interpolated = scale * theta;
        if self.ext_factor == 0.0 {
            return (interpolated, self.attn_factor);
        }
        let place = (pair as f32 - ramp.0) / (ramp.1 - ramp.0).max(0.001);
        let mix = (1.0 - place.clamp(0.0, 1.0)) * self.ext_factor;
        let angle = interpolated * (1.0 - mix) + theta * mix;
        (angle, self.attn_factor * (1.0 + 0.1 * (1.0 / scale).ln()))
    }
}

/// Ratio of the frequencies of neighbouring pairs.
pub(super) fn theta_scale(spec: &RopeSpec) -> f32 {
    let exponent = f64::from(-2.0 / spec.n_dims as f32);
    f64::from(spec.freq_base).powf(exponent) as f32
}

/// Calls `visit(pair, cos, sin)` for each pair at `position`.
///
/// The angle without scaling is position · theta_scale^pair, multiplied up in f32.
/// Source: `ggml_rope_cache_init` and `rope_yarn` of llama.cpp.
pub(super) fn each_angle(
    spec: &RopeSpec,
    theta_scale: f32,
    position: usize,
    mut visit: impl FnMut(usize, f32, f32),
) {
    let ramp = match &spec.scaling {
        RopeScaling::Yarn(yarn) => yarn.ramp(spec.n_dims, spec.freq_base),
        _ => (0.0, 0.0),
    };
    let mut theta = position as f32;
    for pair in 0..spec.n_dims / 2 {
        let (angle, magnitude) = match &spec.scaling {
            RopeScaling::None => (theta, 1.0),
            RopeScaling::Linear { factor } => (theta * (1.0 / factor), 1.0),
            RopeScaling::Divisors { divisors } => (theta / divisors[pair], 1.0),
            RopeScaling::Yarn(yarn) => yarn.angle(pair, ramp, theta),
        };
        let (sin, cos) = f64::from(angle).sin_cos();
        visit(pair, cos as f32 * magnitude, sin as f32 * magnitude);
        theta *= theta_scale;
    }
}
