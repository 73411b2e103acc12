//! What a score says about a neuron's gate, and so about what the neuron is expected to contribute.

use libm::erfc;

/// Activations that a neuron's mass per gate is drawn towards the layer's by: it is not known from one or two.
const PRIOR_ACTIVATIONS: f64 = 5.0;
/// Standard deviations below zero at which a gate counts as possibly open still.
const DEVIATIONS_MAX: f64 = 8.0;
/// Largest bias: an f32 with room for scores beside it.
const BIAS_MAX: f64 = 1e20;

/// A neuron's gate given its score: Gaussian around a straight line, and mass in proportion to the open gate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NeuronModel {
    slope: f64,
    intercept: f64,
    /// Standard deviation of the gate around the line.
    sigma: f64,
    /// Mass per unit of open gate.
    mass_per_gate: f64,
}

impl NeuronModel {
    /// Fits every neuron of a layer to row-major `[n_tokens, n_ff]` scores, gates and masses.
    pub fn fit_all(scores: &[f32], gates: &[f32], masses: &[f32], n_ff: usize) -> Vec<NeuronModel> {
        let mut sums = vec![Sums::default(); n_ff];
        let rows = scores.chunks_exact(n_ff).zip(gates.chunks_exact(n_ff));
        for ((scores, gates), masses) in rows.zip(masses.chunks_exact(n_ff)) {
            for (i, sums) in sums.iter_mut().enumerate() {
                sums.add(
                    f64::from(scores[i]),
                    f64::from(gates[i]),
                    f64::from(masses[i]),
                );
            }
        }
        let n_tokens = scores.len() as f64 / n_ff as f64;
        let total = |of: fn(&Sums) -> f64| sums.iter().map(of).sum::<f64>();
        let open = total(|sums| sums.open);
        let prior = Prior {
            mass_per_gate: total(|sums| sums.mass) / open.max(f64::MIN_POSITIVE),
            open: PRIOR_ACTIVATIONS * open / total(|sums| sums.n_open).max(1.0),
        };
        sums.iter()
            .map(|sums| sums.model(n_tokens, &prior))
            .collect()
    }

    /// Mass per unit of open gate.
    pub fn mass_per_gate(&self) -> f64 {
        self.mass_per_gate
    }

    /// The bias with which `score + bias > 0` says that the expected mass is over `mass_min`.
    pub fn bias(&self, mass_min: f64) -> f32 {
        let deviations = inverse_expected_open(mass_min / (self.mass_per_gate * self.sigma));
        let bias = (self.intercept - deviations * self.sigma) / self.slope;
        bias.clamp(-BIAS_MAX, BIAS_MAX) as f32
    }
}

/// What a score is multiplied by so that 2 is one deviation of the gate around its line.
pub(super) fn deviations_of(model: &NeuronModel) -> f32 {
    (2.0 * model.slope / model.sigma) as f32
}

/// What all neurons of a layer together say about one that is hardly ever active.
struct Prior {
    mass_per_gate: f64,
    /// Sum of open gates that it counts for.
    open: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    score: f64,
    gate: f64,
    score_score: f64,
    score_gate: f64,
    gate_gate: f64,
    mass: f64,
    open: f64,
    n_open: f64,
}

impl Sums {
    fn add(&mut self, score: f64, gate: f64, mass: f64) {
        self.score += score;
        self.gate += gate;
        self.score_score += score * score;
        self.score_gate += score * gate;
        self.gate_gate += gate * gate;
        self.mass += mass;
        if gate > 0.0 {
            self.open += gate;
            self.n_open += 1.0;
        }
    }

    fn model(&self, n: f64, prior: &Prior) -> NeuronModel {
        let (score, gate) = (self.score / n, self.gate / n);
        let tiny = f64::from(f32::MIN_POSITIVE);
        let score_variance = (self.score_score / n - score * score).max(tiny);
        let gate_variance = (self.gate_gate / n - gate * gate).max(tiny);
        // a score that falls as the gate opens says nothing: the line is all but flat then
        let slope_min = 1e-3 * (gate_variance / score_variance).sqrt();
        let covariance = self.score_gate / n - score * gate;
        let slope = (covariance / score_variance).max(slope_min);
        let explained = slope * (2.0 * covariance - slope * score_variance);
        NeuronModel {
            slope,
            intercept: gate - slope * score,
            sigma: (gate_variance - explained).max(1e-8 * gate_variance).sqrt(),
            mass_per_gate: ((self.mass + prior.open * prior.mass_per_gate)
                / (self.open + prior.open).max(tiny))
            .max(tiny),
        }
    }
}

/// Φ(z) of the standard normal distribution.
fn normal_cdf(z: f64) -> f64 {
    0.5 * erfc(-z * std::f64::consts::FRAC_1_SQRT_2)
}

/// Mean of max(0, g) where g is normal with mean z and deviation 1.
fn expected_open(z: f64) -> f64 {
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    z * normal_cdf(z) + density
}

/// The z with that mean, but not below −8.
fn inverse_expected_open(open: f64) -> f64 {
    // the mean is z itself to 1e-5 from here on
    if open > 4.0 {
        return open;
    }
    let mut z = -DEVIATIONS_MAX;
    if open <= expected_open(z).max(0.0) {
        return z;
    }
    // Newton on the logarithm, which is concave: from below it never passes the root
    for _ in 0..30 {
        let value = expected_open(z).max(f64::MIN_POSITIVE);
        let step = (open / value).ln() * value / normal_cdf(z);
        z += step;
        if step < 1e-6 {
            break;
        }
    }
    z
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inverse_is_one() {
        for z in [-6.0, -3.0, -1.0, 0.0, 0.7, 2.5, 4.5, 90.0] {
            let back = inverse_expected_open(expected_open(z));
            assert!((back - z).abs() < 1e-3, "{z} came back as {back}");
        }
        assert_eq!(inverse_expected_open(0.0), -DEVIATIONS_MAX);
    }

    /// A gate that is 2·score − 1 and noise: the line is found, and more mass asks for a higher score.
    #[test]
    fn a_planted_line_is_found() {
        let mut rng = crate::sampler::Mt19937::new(4);
        let mut scores = Vec::new();
        let mut gates = Vec::new();
        for _ in 0..4000 {
            let score = rng.next_f64() as f32 * 4.0 - 2.0;
            let noise: f64 = (0..12).map(|_| rng.next_f64()).sum::<f64>() - 6.0;
            scores.push(score);
            gates.push(2.0 * score - 1.0 + 0.5 * noise as f32);
        }
        let masses: Vec<f32> = gates.iter().map(|gate| gate.max(0.0) * 3.0).collect();
        let model = NeuronModel::fit_all(&scores, &gates, &masses, 1)[0];
        assert!((model.slope - 2.0).abs() < 0.03, "{model:?}");
        assert!((model.intercept + 1.0).abs() < 0.03, "{model:?}");
        assert!((model.sigma - 0.5).abs() < 0.03, "{model:?}");
        assert!((model.mass_per_gate - 3.0).abs() < 1e-3, "{model:?}");
        // expected mass 3 · 0.5 · φ(0) where the line crosses zero, at score 0.5
        let bias = model.bias(1.5 * expected_open(0.0));
        assert!((bias + 0.5).abs() < 0.02, "{bias}");
        assert!(model.bias(1.0) > model.bias(2.0));
    }

    #[test]
    fn a_neuron_that_never_fires_gets_a_finite_bias() {
        let scores = [0.1, 0.2, -0.1, 0.3, 0.2, 0.5, 0.1, 0.4];
        let gates = [-1.0, 1.0, -1.0, 2.0, -1.0, 1.0, -1.0, -1.0];
        let masses = [0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0];
        for model in NeuronModel::fit_all(&scores, &gates, &masses, 2) {
            for mass_min in [0.0, 1e-9, 1.0, 1e9] {
                assert!(model.bias(mass_min).is_finite(), "{model:?}");
            }
        }
    }
}
