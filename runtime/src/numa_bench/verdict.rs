//! Which setting is fastest, and which differ from it by no more than noise.

use super::{Measured, median};

/// Student's t, two-sided, 95 %, by degrees of freedom from 1; 2 beyond.
const T: [f64; 10] = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23];

/// What the samples say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The setting with the highest median.
    pub best: usize,
    /// Settings that cannot be told from it, itself included, in the order of the sweep.
    pub alike: Vec<usize>,
}

impl Verdict {
    /// Compares every setting with the fastest, round by round.
    ///
    /// # Panics
    /// Without settings, or with one that has no sample.
    pub fn of(all: &[Measured]) -> Self {
        let speeds: Vec<Vec<f64>> = all.iter().map(Measured::tokens_per_s).collect();
        Self::of_speeds(&speeds)
    }

    fn of_speeds(speeds: &[Vec<f64>]) -> Self {
        let medians: Vec<f64> = speeds.iter().map(|speeds| median(speeds.clone())).collect();
        let indices = 0..speeds.len();
        let best = indices
            .clone()
            .rev()
            .max_by(|&a, &b| medians[a].total_cmp(&medians[b]))
            .expect("a setting");
        let alike = indices
            .filter(|&index| index == best || is_noise(&speeds[best], &speeds[index]))
            .collect();
        Self { best, alike }
    }

    /// The first of the sweep that is as fast as the fastest: later ones are further from what runs without any setting.
    pub fn winner(&self) -> usize {
        self.alike[0]
    }
}

/// Whether the mean difference between two settings in the same rounds could as well be none.
fn is_noise(fast: &[f64], slow: &[f64]) -> bool {
    let differences: Vec<f64> = fast
        .iter()
        .zip(slow)
        .map(|(fast, slow)| fast - slow)
        .collect();
    let n = differences.len() as f64;
    // one round tells nothing of noise
    if differences.len() < 2 {
        return true;
    }
    let mean = differences.iter().sum::<f64>() / n;
    let squares = differences.iter().map(|d| (d - mean) * (d - mean));
    let error = (squares.sum::<f64>() / (n - 1.0) / n).sqrt();
    let t = T.get(differences.len() - 2).copied().unwrap_or(2.0);
    mean <= t * error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_difference_is_one_however_small() {
        let speeds = [
            vec![100.0, 110.0, 90.0, 105.0],
            vec![102.1, 112.0, 91.9, 107.0],
        ];
        let verdict = Verdict::of_speeds(&speeds);
        assert_eq!((verdict.best, verdict.winner()), (1, 1));
        assert_eq!(verdict.alike, [1]);
    }

    #[test]
    fn a_difference_that_comes_and_goes_is_noise() {
        let speeds = [
            vec![100.0, 110.0, 90.0, 105.0],
            vec![120.0, 100.0, 100.0, 104.0],
            vec![50.0, 51.0, 49.0, 50.0],
        ];
        let verdict = Verdict::of_speeds(&speeds);
        assert_eq!(verdict.alike, [0, 1]);
        assert_eq!(verdict.winner(), 0, "the one that needs no setting");
    }

    #[test]
    fn one_round_tells_nothing() {
        let verdict = Verdict::of_speeds(&[vec![1.0], vec![100.0]]);
        assert_eq!(verdict.best, 1);
        assert_eq!(verdict.alike, [0, 1]);
        // of two that are equal the first
        assert_eq!(Verdict::of_speeds(&[vec![1.0; 3], vec![1.0; 3]]).best, 0);
    }
}
