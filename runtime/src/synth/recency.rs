//! How a token's state remembers the tokens before it.
//!
//! The planted queries and keys are the same for every token: rotated by position, their product depends on the
//! distance only. So attention averages the values of the last few tokens, which is what changes slowly in the state.

/// Distances that the statistics see; older tokens have next to no weight.
const N_LAGS: usize = 192;
/// Angles per position of the planted pairs: those that turn by a good part of a circle within the memory.
const ANGLES: std::ops::RangeInclusive<f64> = 0.005..=0.3;
/// Score of a token with itself.
const SCORE: f64 = 14.0;
/// Standard deviation of what queries and keys have beside the planted part.
pub(super) const CONTENT: f64 = 0.15;

/// Planted attention.
#[derive(Debug, Clone)]
pub(super) struct Recency {
    /// Which values of a head are planted, `[head_dim]`.
    pub planted: Vec<bool>,
    /// Their value in queries and keys.
    pub value: f64,
    head_dim: usize,
    /// Autocorrelation of the weights by distance, `[N_LAGS]`.
    overlap: Vec<f64>,
}

impl Recency {
    /// For heads of `head_dim` values, rotated with `rope_base`; none where no pair turns at the right speed.
    pub fn new(head_dim: usize, rope_base: f64) -> Option<Self> {
        let angle = |pair: usize| rope_base.powf(-((2 * pair) as f64) / head_dim as f64);
        let pairs: Vec<f64> = (0..head_dim / 2)
            .map(angle)
            .filter(|angle| ANGLES.contains(angle))
            .collect();
        if pairs.is_empty() {
            return None;
        }
        let n_pairs = pairs.len() as f64;
        let score = |lag: usize| {
            let cosines = pairs.iter().map(|angle| (angle * lag as f64).cos());
            SCORE * cosines.sum::<f64>() / n_pairs
        };
        let weights: Vec<f64> = (0..N_LAGS).map(|lag| (score(lag) - SCORE).exp()).collect();
        let all: f64 = weights.iter().sum();
        let overlap = (0..N_LAGS)
            .map(|lag| {
                let products = weights[lag..].iter().zip(&weights).map(|(a, b)| a * b);
                products.sum::<f64>() / (all * all)
            })
            .collect();
        Some(Self {
            planted: (0..head_dim)
                .map(|value| ANGLES.contains(&angle(value / 2)))
                .collect(),
            value: (SCORE * (head_dim as f64).sqrt() / (2.0 * n_pairs)).sqrt(),
            head_dim,
            overlap,
        })
    }

    /// By how much the unevenness of scores raises the mean square of a weight, where constant channels vary by
    /// `deviation` around 1.
    fn unevenness(&self, deviation: f64) -> f64 {
        let content = SCORE * CONTENT * CONTENT / (self.head_dim as f64).sqrt();
        // exponentials of normal scores, over a sum that has them in it
        let square = ((SCORE * deviation).powi(2) + content).exp();
        square / (1.0 + 2.0 * self.overlap[0] * (square - 1.0))
    }

    /// Variance of the average of values whose autocorrelation is `memory`, and the average's own autocorrelation;
    /// constant channels vary by `deviation` around 1 from token to token, as the norm's divisor does.
    pub fn average(&self, memory: &Memory, deviation: f64) -> (f64, Memory) {
        let unevenness = self.unevenness(deviation);
        let covariance = |lag: usize| {
            let distant = |shift: i64| {
                let distance = (lag as i64 - shift).unsigned_abs() as usize;
                match distance {
                    0 => unevenness,
                    _ => memory.0.get(distance).copied().unwrap_or(0.0),
                }
            };
            let signed = 1 - N_LAGS as i64..N_LAGS as i64;
            signed
                .map(|shift| self.overlap[shift.unsigned_abs() as usize] * distant(shift))
                .sum::<f64>()
        };
        let covariances: Vec<f64> = (0..N_LAGS).map(covariance).collect();
        let variance = covariances[0];
        (
            variance,
            Memory(covariances.iter().map(|value| value / variance).collect()),
        )
    }
}

/// Autocorrelation of a state by distance of tokens, `[N_LAGS]`; 1 at distance 0.
#[derive(Debug, Clone)]
pub(super) struct Memory(Vec<f64>);

impl Memory {
    /// Of tokens that have nothing to do with one another.
    pub fn none() -> Self {
        Self(
            (0..N_LAGS)
                .map(|lag| f64::from(u8::from(lag == 0)))
                .collect(),
        )
    }

    /// Correlation of two tokens that follow on one another.
    pub fn of_neighbours(&self) -> f64 {
        self.0[1]
    }

    /// Of the state plus an independent part with `energy` times its variance.
    pub fn plus(&self, energy: f64, part: &Self) -> Self {
        let sum = |(own, other): (&f64, &f64)| (own + energy * other) / (1.0 + energy);
        Self(self.0.iter().zip(&part.0).map(sum).collect())
    }

    /// With every correlation changed by `f`.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self(self.0.iter().map(|value| f(*value)).collect())
    }
}
