//! `pi-runtime numa-bench`: where cold neurons lie, how many teams and threads, which pages: tried in turns on a model.
//!
//! A [`Setting`] is one such choice. Every round opens the model once with each setting, decodes a text to warm up and
//! again for the clock; odd rounds go through the settings backwards, so that what drifts meanwhile falls on all alike.
//! [`Verdict`] says what of the differences is more than noise.

mod plot;
mod prediction;
mod report;
mod sample;
mod setting;
mod verdict;

pub use plot::svg;
pub use prediction::Prediction;
pub use report::{csv, table, winner};
pub use sample::Sample;
pub use setting::{Point, Setting, Sweep};
pub use verdict::Verdict;

use crate::error::RuntimeError;
use crate::session::ModelOptions;

/// What was measured of a setting: a sample for each round.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The setting and its plan.
    pub point: Point,
    /// By round.
    pub samples: Vec<Sample>,
}

impl Measured {
    /// Tokens per second, round by round.
    pub fn tokens_per_s(&self) -> Vec<f64> {
        let samples = self.samples.iter();
        samples.map(|sample| sample.tokens_per_s).collect()
    }

    /// The median of a figure over all rounds.
    fn median(&self, figure: impl Fn(&Sample) -> f64) -> f64 {
        median(self.samples.iter().map(figure).collect())
    }
}

/// Measures every point in each of `n_rounds` rounds, decoding `n_gen` tokens; `said` is told of each before it is.
///
/// # Errors
/// The model, or what the machine refuses.
pub fn measure(
    options: &ModelOptions,
    points: Vec<Point>,
    n_gen: usize,
    n_rounds: usize,
    said: &dyn Fn(&str),
) -> Result<Vec<Measured>, RuntimeError> {
    let mut all: Vec<Measured> = (points.into_iter())
        .map(|point| Measured {
            point,
            samples: Vec::with_capacity(n_rounds),
        })
        .collect();
    for round in 0..n_rounds {
        for index in order(all.len(), round) {
            let measured = &mut all[index];
            said(&format!(
                "round {} of {n_rounds}: {}",
                round + 1,
                measured.point.setting
            ));
            let sample = Sample::measure(options, &measured.point.plan, n_gen)?;
            measured.samples.push(sample);
        }
    }
    Ok(all)
}

/// The order of a round: forwards, then backwards.
fn order(n_points: usize, round: usize) -> Vec<usize> {
    let forwards = 0..n_points;
    match round.is_multiple_of(2) {
        true => forwards.collect(),
        false => forwards.rev().collect(),
    }
}

/// The value in the middle; of an even number the mean of both.
///
/// # Panics
/// Without values.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    (values[(n - 1) / 2] + values[n / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_go_back_and_forth() {
        assert_eq!(order(3, 0), [0, 1, 2]);
        assert_eq!(order(3, 1), [2, 1, 0]);
        assert_eq!(order(3, 2), [0, 1, 2]);
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![7.0]), 7.0);
    }
}
