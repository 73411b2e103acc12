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

/// Measures every point in each of `n_rounds` rounds, decoding `n_gen` tokens; `said` is told of each before it is. A setting
/// that the first round finds no room for is left out, and the log says so.
///
/// # Errors
/// The model, or what the machine refuses; or there is no room for any setting.
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
        let mut refused = Vec::new();
        for index in order(all.len(), round) {
            let measured = &mut all[index];
            said(&format!(
                "round {} of {n_rounds}: {}",
                round + 1,
                measured.point.setting
            ));
            match Sample::measure(options, &measured.point.plan, n_gen) {
                Ok(sample) => measured.samples.push(sample),
                // a copy on every node may be too much where shares are not
                Err(error) if round == 0 && error.is_lack_of_room() => refused.push((index, error)),
                Err(error) => return Err(error),
            }
        }
        all = without_refused(all, refused)?;
    }
    Ok(all)
}

/// All that there is room for, and the log has what not; the last error where that is none.
fn without_refused(
    mut all: Vec<Measured>,
    mut refused: Vec<(usize, RuntimeError)>,
) -> Result<Vec<Measured>, RuntimeError> {
    if refused.len() == all.len()
        && let Some((_, error)) = refused.pop()
    {
        return Err(error);
    }
    // from the last one, so that the others keep their places
    for (index, error) in refused.into_iter().rev() {
        let left_out = all.remove(index);
        tracing::warn!("{}: left out, for {error}", left_out.point.setting);
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
    fn settings_without_room_are_left_out_but_not_all() {
        use pi_topology::{ColdPolicy, TopologyError};
        let full = || {
            RuntimeError::from(TopologyError::NodeFull {
                numa: 1,
                bytes: 2,
                free_bytes: 1,
                cure: "less".to_owned(),
            })
        };
        assert!(full().is_lack_of_room());
        let of = |cold| report::tests::measured(cold, None, &[1.0]);
        let policies = [
            ColdPolicy::Shard,
            ColdPolicy::Replicate,
            ColdPolicy::Single(1),
        ];
        let three = || policies.map(of).to_vec();
        let left = without_refused(three(), vec![(1, full()), (2, full())]).unwrap();
        assert_eq!(left, [of(ColdPolicy::Shard)]);
        assert_eq!(without_refused(three(), vec![]).unwrap().len(), 3);
        let all = vec![(0, full()), (1, full()), (2, full())];
        assert!(without_refused(three(), all).unwrap_err().is_lack_of_room());
    }

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![7.0]), 7.0);
    }
}
