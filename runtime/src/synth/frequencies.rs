//! How often each neuron fires, how that repeats from token to token, and who finds the ones that fire.
//!
//! Neuron i fires when z + o_i > 0, where z is its gate's share of the token, standard normal, and the offset o_i is
//! planted. The offsets are normal over the neurons of a layer: o_i = m + s·u_i. So the frequencies are Φ(o_i).

use super::gaussian::{
    STEP, below, density, excess, excess_square, expect, increasing_root, points, quantile,
};

/// Offsets that stand for all in sums over neurons.
const N_SAMPLE: usize = 96;

/// The distribution of a layer's offsets.
#[derive(Debug, Clone)]
pub(super) struct Offsets {
    mean: f64,
    spread: f64,
    sample: Vec<f64>,
}

impl Offsets {
    /// Offsets with which a share `active` of the neurons fires, and whose frequencies differ by `skew`: the slope of
    /// ln Φ(m + s·u) at the median neuron, u = 0; so the neuron one standard deviation above the median fires about
    /// e^skew times as often.
    pub fn new(active: f64, skew: f64) -> Self {
        let mean = |spread: f64| quantile(active) * (1.0 + spread * spread).sqrt();
        let slope = |spread: f64| spread * density(mean(spread)) / below(mean(spread));
        let spread = increasing_root(0.0, 4.0, |spread| slope(spread) - skew);
        let mut offsets = Self {
            mean: mean(spread),
            spread,
            sample: vec![],
        };
        offsets.sample = offsets.of_layer(N_SAMPLE);
        offsets
    }

    /// The offsets of `n_ff` neurons, ascending.
    pub fn of_layer(&self, n_ff: usize) -> Vec<f64> {
        let share = |i: usize| (i as f64 + 0.5) / n_ff as f64;
        (0..n_ff)
            .map(|i| self.mean + self.spread * quantile(share(i)))
            .collect()
    }

    fn mean_of(&self, f: impl Fn(f64) -> f64) -> f64 {
        self.sample.iter().map(|&offset| f(offset)).sum::<f64>() / self.sample.len() as f64
    }

    /// Mean square of a neuron's open gate, E[max(z + o, 0)²].
    pub fn gate_square(&self) -> f64 {
        self.mean_of(excess_square)
    }

    /// The overlap (Jaccard) of the active sets of two tokens whose gates correlate by `rho`, 0 ≤ rho < 1.
    pub fn overlap(&self, rho: f64) -> f64 {
        // given what the tokens share, each fires for itself
        let both = self.mean_of(|offset| {
            let fires = |shared: f64| below((rho.sqrt() * shared + offset) / (1.0 - rho).sqrt());
            expect(|shared| fires(shared).powi(2))
        });
        both / (2.0 * self.mean_of(below) - both)
    }

    /// Correlation of a neuron's contributions max(z + o, 0)·up to two tokens whose states correlate by `rho`.
    pub fn contribution_correlation(&self, rho: f64) -> f64 {
        let (rho, rest) = (rho.clamp(0.0, 0.999), (1.0 - rho.clamp(0.0, 0.999)).sqrt());
        let product = self.mean_of(|offset| {
            expect(|shared| (rest * excess((rho.sqrt() * shared + offset) / rest)).powi(2))
        });
        rho * product / self.gate_square()
    }

    /// What has to be added to the estimate of z + o by a score that correlates with z by `rho`, so that where the sum
    /// is positive a share `mass` of all contributions is.
    ///
    /// Every neuron has the same: to be found are those of which most is expected, E[max(z + o, 0) | estimate], and
    /// that depends on the estimate alone.
    pub fn slack(&self, rho: f64, mass: f64) -> f64 {
        let noise = (1.0 - rho * rho).sqrt();
        let expected = |estimate: f64| noise * excess(estimate / noise);
        let estimates = |&offset: &f64| points().map(move |score| (score, rho * score + offset));
        let mut found: Vec<(f64, f64)> = (self.sample.iter().flat_map(estimates))
            .map(|(score, estimate)| (estimate, density(score) * expected(estimate)))
            .collect();
        // those with the highest estimates are chosen first
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        let wanted = mass * self.mean_of(excess) * self.sample.len() as f64 / STEP;
        let mut so_far = 0.0;
        let last = found.iter().find(|(_, found)| {
            so_far += found;
            so_far >= wanted
        });
        last.map_or(6.0, |(estimate, _)| -estimate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_neurons_makes_four_fifths_of_the_activations() {
        let offsets = Offsets::new(0.10, 2.4).of_layer(4096);
        let mut frequencies: Vec<f64> = offsets.iter().map(|&offset| below(offset)).collect();
        frequencies.reverse();
        let all: f64 = frequencies.iter().sum();
        assert!((all / 4096.0 - 0.10).abs() < 1e-3);
        let top: f64 = frequencies[..4096 * 26 / 100].iter().sum();
        assert!((top / all - 0.80).abs() < 0.005, "{}", top / all);
    }

    #[test]
    fn overlap_rises_from_chance_to_identity() {
        let offsets = Offsets::new(0.10, 2.4);
        let overlaps: Vec<f64> = [0.0, 0.3, 0.5, 0.999]
            .map(|rho| offsets.overlap(rho))
            .to_vec();
        // the middle two were simulated: 0.285 and 0.359
        assert!((overlaps[1] - 0.285).abs() < 0.01 && (overlaps[2] - 0.359).abs() < 0.01);
        assert!(
            overlaps[0] < overlaps[1] && overlaps[3] > 0.9,
            "{overlaps:?}"
        );
        assert!((offsets.contribution_correlation(0.999) - 1.0).abs() < 0.05);
    }

    #[test]
    fn more_slack_finds_more() {
        let offsets = Offsets::new(0.10, 2.4);
        let slack = |mass| offsets.slack(0.87, mass);
        assert!(slack(0.93) < slack(0.98) && slack(0.98) < slack(0.995));
        // a better score needs less
        assert!(offsets.slack(0.95, 0.98) < slack(0.98));
    }
}
