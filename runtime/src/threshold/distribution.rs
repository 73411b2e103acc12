//! How much the neurons of a layer contribute, over a sample of tokens.

use crate::model::quantize::dequantize_row;
use crate::model::tensors::FileDown;

/// Steps of the share of neurons that a distribution is kept in.
const STEPS: usize = 2000;

/// The distribution of one layer's contributions, |act(gate)| · ‖down row‖ or |act(gate) · up| · ‖down row‖.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// Ascending: value n is not exceeded by n / `STEPS` of the contributions.
    quantiles: Vec<f32>,
}

impl Distribution {
    /// The distribution of `values`; those that are not finite are left out.
    pub fn of(mut values: Vec<f32>) -> Self {
        values.retain(|value| value.is_finite());
        values.sort_unstable_by(f32::total_cmp);
        let last = values.len().saturating_sub(1);
        let quantile = |step: usize| values.get(last * step / STEPS).copied().unwrap_or(0.0);
        Self {
            quantiles: (0..=STEPS).map(quantile).collect(),
        }
    }

    /// The largest contribution of the `share` (0 … 1) that contributes least.
    pub fn tau(&self, share: f64) -> f32 {
        let step = (share.clamp(0.0, 1.0) * STEPS as f64).floor() as usize;
        self.quantiles[step.min(STEPS)]
    }

    /// Share of the contributions that are not above `tau`.
    pub fn share(&self, tau: f32) -> f64 {
        let below = self.quantiles.partition_point(|value| *value <= tau);
        below.saturating_sub(1) as f64 / STEPS as f64
    }
}

/// The thresholds of neurons whose down rows have these lengths, `[n_ff]`: `tau` over the length, finite.
pub fn thresholds(tau: f32, down_norms: &[f32]) -> Vec<f32> {
    let threshold = |norm: &f32| (tau / norm).clamp(0.0, f32::MAX);
    let or_all = |threshold: f32| {
        if threshold.is_nan() {
            f32::MAX
        } else {
            threshold
        }
    };
    down_norms.iter().map(threshold).map(or_all).collect()
}

/// Length (L2) of each neuron's row of down, `[n_ff]`.
pub fn down_norms(down: &FileDown) -> Vec<f32> {
    let matrix = down.matrix();
    let mut row = vec![0.0; matrix.n_cols()];
    let mut each_row = |visit: &mut dyn FnMut(usize, &[f32])| {
        for r in 0..matrix.n_rows() {
            dequantize_row(matrix.quant, matrix.rows(r..r + 1), &mut row);
            visit(r, &row);
        }
    };
    let squares = match down {
        FileDown::NeuronMajor(_) => {
            let mut squares = vec![0.0f64; matrix.n_rows()];
            each_row(&mut |neuron, row| {
                squares[neuron] = row.iter().map(|w| f64::from(*w).powi(2)).sum();
            });
            squares
        }
        FileDown::Plain(_) => {
            let mut squares = vec![0.0f64; matrix.n_cols()];
            each_row(&mut |_, row| {
                for (sum, w) in squares.iter_mut().zip(row) {
                    *sum += f64::from(*w).powi(2);
                }
            });
            squares
        }
    };
    squares.iter().map(|sum| sum.sqrt() as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_taus_are_inverse_and_ascend() {
        let values: Vec<f32> = (0..10_001)
            .rev()
            .map(|n| (n as f32 / 100.0).powi(2))
            .collect();
        let distribution = Distribution::of(values);
        assert_eq!(
            (distribution.tau(0.0), distribution.tau(1.0)),
            (0.0, 10_000.0)
        );
        assert!((distribution.tau(0.5) - 2500.0).abs() < 1.0);
        for share in [0.1, 0.25, 0.5, 0.9] {
            let back = distribution.share(distribution.tau(share));
            assert!(
                (back - share).abs() <= 1.0 / STEPS as f64,
                "{share}: {back}"
            );
        }
        assert_eq!(
            (distribution.share(-1.0), distribution.share(1e9)),
            (0.0, 1.0)
        );
    }

    #[test]
    fn values_that_are_no_numbers_and_none_at_all_are_borne() {
        let some = Distribution::of(vec![f32::NAN, 1.0, f32::INFINITY, 3.0]);
        assert_eq!((some.tau(0.0), some.tau(1.0)), (1.0, 3.0));
        assert_eq!(Distribution::of(vec![]).tau(0.7), 0.0);
    }

    #[test]
    fn thresholds_are_finite_also_without_a_down_row() {
        assert_eq!(
            thresholds(3.0, &[1.5, 0.0, 1e-45]),
            [2.0, f32::MAX, f32::MAX]
        );
        assert_eq!(thresholds(0.0, &[2.0, 0.0]), [0.0, f32::MAX]);
    }
}
