//! Rotary position embedding: rotates pairs of values of each query and key head by angles that
//! grow with the position.

mod frequencies;
mod rotate;
#[cfg(test)]
mod tests;

use crate::cpu::Cpu;
use crate::simd::by_tier;

pub use frequencies::{Llama3Scaling, YarnScaling};

/// Which values of a head form a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RopePairs {
    /// Values 2i and 2i + 1 (llama as GGUF stores it).
    Adjacent,
    /// Values i and i + n_dims/2 (Qwen2, and Hugging Face's order).
    Halves,
}

/// How angles are stretched for contexts longer than the trained one.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Angles as trained.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// Context now over context in training.
        factor: f32,
    },
    /// The frequency of pair i divided by `divisors[i]`: Llama 3, from the tensor `rope_freqs` or
    /// from [`Llama3Scaling::divisors`].
    Divisors {
        /// `[n_dims / 2]` f32.
        divisors: Vec<f32>,
    },
    /// YaRN: slow pairs interpolated, fast ones kept.
    Yarn(YarnScaling),
}

/// Everything that determines the rotation.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeSpec {
    /// Which values form a pair.
    pub pairs: RopePairs,
    /// Values of a head that are rotated, from its start; the others are left alone. Even.
    pub n_dims: usize,
    /// Frequency of pair i is `freq_base^(−2i / n_dims)`.
    pub freq_base: f32,
    /// Stretching for long contexts.
    pub scaling: RopeScaling,
}

/// The rotations of any position, computed one position at a time.
///
/// A table of all positions of a long context would be larger than small models; so each token's
/// row is computed once, and then used for every layer and head.
#[derive(Debug, Clone)]
pub struct RopeTable {
    spec: RopeSpec,
    theta_scale: f32,
}

impl RopeTable {
    /// Prepares the rotations of `spec`.
    ///
    /// # Panics
    /// When `n_dims` is 0 or odd, or the number of divisors is not `n_dims / 2`.
    pub fn new(spec: RopeSpec) -> Self {
        let n_dims = spec.n_dims;
        assert!(
            n_dims > 0 && n_dims.is_multiple_of(2),
            "rotated dimensions {n_dims} are pairs"
        );
        if let RopeScaling::Divisors { divisors } = &spec.scaling {
            assert_eq!(divisors.len(), n_dims / 2, "one divisor for each pair");
        }
        let theta_scale = frequencies::theta_scale(&spec);
        Self { spec, theta_scale }
    }

    /// What the table was made from.
    pub fn spec(&self) -> &RopeSpec {
        &self.spec
    }

    /// Length of a row of [`Self::fill`].
    pub fn row_len(&self) -> usize {
        2 * self.spec.n_dims
    }

    /// Writes the rotation at `position` to `row`, `[2, n_dims]` f32. Overwrites `row`.
    ///
    /// First the cosine for each dimension, then the sine, with the sign it is used with (− for
    /// the first of a pair). Angles follow the same f32 recurrence as llama.cpp's CPU code, with
    /// which the reference outputs were made; cosines and sines are taken in f64 and rounded once.
    ///
    /// # Panics
    /// When `row` does not have [`Self::row_len`] values.
    pub fn fill(&self, position: usize, row: &mut [f32]) {
        assert_eq!(row.len(), self.row_len(), "length of a row of rotations");
        let n_dims = self.spec.n_dims;
        let (cos, sin) = row.split_at_mut(n_dims);
        frequencies::each_angle(&self.spec, self.theta_scale, position, |pair, c, s| {
            let (first, second) = match self.spec.pairs {
                RopePairs::Adjacent => (2 * pair, 2 * pair + 1),
                RopePairs::Halves => (pair, pair + n_dims / 2),
            };
            cos[first] = c;
            cos[second] = c;
            sin[first] = -s;
            sin[second] = s;
        });
    }

    /// Rotates heads that lie behind one another, `[n_heads, head_dim]` f32, in place, by a `row`
    /// of [`Self::fill`].
    ///
    /// Dimension d with partner e becomes `x[d] · cos[d] + x[e] · sin[d]`, the second product
    /// rounded before the sum; dimensions from `n_dims` on are left alone.
    ///
    /// # Panics
    /// When `head_dim` is less than `n_dims`, or the lengths do not fit.
    pub fn apply(&self, cpu: Cpu, row: &[f32], heads: &mut [f32], head_dim: usize) {
        assert_eq!(row.len(), self.row_len(), "length of a row of rotations");
        assert!(
            head_dim >= self.spec.n_dims,
            "heads of {head_dim} hold the rotated dimensions"
        );
        assert_eq!(heads.len() % head_dim, 0, "whole heads");
        let (cos, sin) = row.split_at(self.spec.n_dims);
        let pairs = self.spec.pairs;
        for head in heads.chunks_exact_mut(head_dim) {
            let head = &mut head[..self.spec.n_dims];
            by_tier!(
                cpu,
                rotate::scalar,
                rotate::vector,
                (pairs: RopePairs, cos: &[f32], sin: &[f32], head: &mut [f32])
            );
        }
    }
}
