//! Which setting is fastest, and which differ from it by no more than noise.

use super::{Measured, median};

/// Student's t, two-sided, 95 %, by degrees of freedom from 1.
const T: [f64; 10] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
];
/// The same of infinitely many: the normal distribution's.
const Z: f64 = 1.959_964;

/// What the samples say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// The setting with the highest median.
    pub best: usize,
    /// Settings that cannot be told from it, itself included, in the order of the sweep.
    pub alike: Vec<usize>,
    /// Of these the one nearest to what runs without any configuration.
    pub winner: usize,
}

impl Verdict {
    /// Compares every setting with the fastest, round by round.
    ///
    /// # Panics
    /// Without settings, or with one that has no sample.
    pub fn of(all: &[Measured]) -> Self {
        let speeds: Vec<Vec<f64>> = all.iter().map(Measured::tokens_per_s).collect();
        Self::of_speeds(&speeds, |index| all[index].point.distance())
    }

    fn of_speeds<D: Ord>(speeds: &[Vec<f64>], distance: impl Fn(usize) -> D) -> Self {
        let medians: Vec<f64> = speeds.iter().map(|speeds| median(speeds.clone())).collect();
        let indices = 0..speeds.len();
        let best = indices
            .clone()
            .rev()
            .max_by(|&a, &b| medians[a].total_cmp(&medians[b]))
            .expect("a setting");
        let alike: Vec<usize> = indices
            .filter(|&index| index == best || is_noise(&speeds[best], &speeds[index]))
            .collect();
        let winner = alike.iter().copied().min_by_key(|&index| distance(index));
        Self {
            best,
            winner: winner.unwrap_or(best),
            alike,
        }
    }
}

/// Student's t, two-sided, 95 %. Beyond the table it is the series in 1 / degrees of freedom around the normal
/// distribution's: exact to 0.0002.
///
/// Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
fn student(degrees_of_freedom: usize) -> f64 {
    if let Some(t) = T.get(degrees_of_freedom - 1) {
        return *t;
    }
    let v = degrees_of_freedom as f64;
    let z = |power| Z.powi(power);
    Z + (z(3) + Z) / (4.0 * v)
        + (5.0 * z(5) + 16.0 * z(3) + 3.0 * Z) / (96.0 * v * v)
        + (3.0 * z(7) + 19.0 * z(5) + 17.0 * z(3) - 15.0 * Z) / (384.0 * v * v * v)
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
    mean <= student(differences.len() - 1) * error
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
        let verdict = Verdict::of_speeds(&speeds, |index| index);
        assert_eq!((verdict.best, verdict.winner), (1, 1));
        assert_eq!(verdict.alike, [1]);
    }

    #[test]
    fn a_difference_that_comes_and_goes_is_noise() {
        let speeds = [
            vec![100.0, 110.0, 90.0, 105.0],
            vec![120.0, 100.0, 100.0, 104.0],
            vec![50.0, 51.0, 49.0, 50.0],
        ];
        let verdict = Verdict::of_speeds(&speeds, |index| index);
        assert_eq!(verdict.alike, [0, 1]);
        assert_eq!(verdict.winner, 0, "the one that needs no setting");
        let backwards = Verdict::of_speeds(&speeds, |index| 3 - index);
        assert_eq!(backwards.winner, 1, "wherever in the sweep it is");
    }

    #[test]
    fn one_round_tells_nothing() {
        let verdict = Verdict::of_speeds(&[vec![1.0], vec![100.0]], |index| index);
        assert_eq!(verdict.best, 1);
        assert_eq!(verdict.alike, [0, 1]);
        // of two that are equal the first
        let equal = Verdict::of_speeds(&[vec![1.0; 3], vec![1.0; 3]], |index| index);
        assert_eq!(equal.best, 0);
    }

    /// Values of Abramowitz and Stegun, table 26.10.
    #[test]
    fn students_t_is_that_of_the_tables() {
        for (degrees_of_freedom, expected) in [
            (1, 12.706),
            (10, 2.228),
            (11, 2.201),
            (15, 2.131),
            (20, 2.086),
            (30, 2.042),
            (60, 2.000),
            (120, 1.980),
            (100_000, 1.960),
        ] {
            let t = student(degrees_of_freedom);
            assert!((t - expected).abs() < 6e-4, "{degrees_of_freedom}: {t}");
        }
    }
}
