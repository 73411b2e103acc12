//! Reduced-rank regression: the best linear map through few numbers from inputs to many outputs.

use nalgebra::{Cholesky, DMatrix};

use super::error::PredictorError;
use super::fit_gpu::FitOn;
use crate::linear_algebra::{
    Lower, Workers, covariance, leading_directions, n_tracked, product, transposed, whole,
};

/// Share of the inputs' mean variance that is added to each, so that no direction has none.
const RIDGE: f64 = 1e-4;
/// Passes of the subspace iteration; each squares the lead of strong directions twice.
const N_PASSES: usize = 10;
/// Where it begins.
const SEED: u32 = 1;

/// Least-squares fit of outputs `y` to inputs `x`, from which maps of any rank are read off.
///
/// A map of rank r is `y ≈ B·A·x + const`. Of all `A` `[r, n_in]`, [`Self::directions`] is the one that leaves the
/// least squared error, which weighs inputs as they occur and not the entries of the map.
///
/// Source: Izenman 1975, "Reduced-rank regression for the multivariate linear model".
#[derive(Debug)]
pub(super) struct Regression {
    workers: Workers,
    /// `[n_in, n_in]` covariance of the inputs, with the ridge.
    inputs: DMatrix<f64>,
    /// Its factor.
    factor: Lower,
    /// `[n_out, n_in]` covariance of outputs and inputs.
    cross: DMatrix<f64>,
    /// `[n_directions, n_in]` leading directions of the whitened map, orthonormal, strongest first.
    leading: DMatrix<f64>,
}

impl Regression {
    /// Fits `y` (row-major `[n, n_out]`) to `x` (row-major `[n, n_in]`) through at most `rank_max` numbers.
    ///
    /// # Errors
    /// When all inputs are the same.
    pub fn fit(
        FitOn { workers, gpu }: FitOn<'_>,
        (x, n_in): (&[f32], usize),
        (y, n_out): (&[f32], usize),
        rank_max: usize,
    ) -> Result<Self, PredictorError> {
        let constant = PredictorError::Constant {
            n_tokens: x.len() / n_in,
        };
        let covariance = |a, b| {
            let on_gpu = gpu.and_then(|gpu| gpu.covariance(workers, a, b));
            on_gpu.unwrap_or_else(|| covariance(workers, a, b))
        };
        let mut inputs = covariance((x, n_in), (x, n_in));
        let mean_variance = inputs.trace() / n_in as f64;
        for i in 0..n_in {
            inputs[(i, i)] += RIDGE * mean_variance;
        }
        if mean_variance <= 0.0 {
            return Err(constant);
        }
        let factor = Lower::new(workers, inputs.clone()).ok_or(constant)?;
        let cross = covariance((x, n_in), (y, n_out));
        // the whitened map is cross · L⁻ᵀ; it is not made, as that takes more than all passes over a few rows do
        let mut on_gpu = gpu.and_then(|gpu| gpu.take(&cross, n_tracked(n_in, rank_max)));
        let leading = leading_directions(workers, n_in, rank_max, N_PASSES, SEED, |rows| {
            let mut rows = rows.clone();
            factor.solve(workers, &mut rows);
            let ours = on_gpu.as_mut().and_then(|cross| cross.squared_times(&rows));
            let mut rows = ours.unwrap_or_else(|| {
                let outputs = product(workers, whole(&rows), transposed(&cross));
                product(workers, whole(&outputs), whole(&cross))
            });
            factor.solve_transposed(workers, &mut rows);
            rows
        });
        drop(on_gpu);
        Ok(Self {
            workers,
            inputs,
            factor,
            cross,
            leading,
        })
    }

    /// Values of an input.
    pub fn n_in(&self) -> usize {
        self.inputs.nrows()
    }

    /// `A`, row-major `[rank, n_in]`: its outputs are uncorrelated and have variance 1, strongest first.
    pub fn directions(&self, rank: usize) -> Vec<f32> {
        let mut rows = self.leading.rows(0, rank).into_owned();
        self.factor.solve(self.workers, &mut rows);
        rows.transpose().iter().map(|value| *value as f32).collect()
    }

    /// `B`, row-major `[n_out, rank]`: the best for the given `A` (row-major `[rank, n_in]`), however it was rounded.
    ///
    /// # Errors
    /// When the rows of `A` depend on one another beyond repair.
    pub fn map_from(&self, a: &[f32], rank: usize) -> Result<Vec<f32>, PredictorError> {
        let n_in = self.inputs.nrows();
        let a = DMatrix::from_row_iterator(rank, n_in, a.iter().map(|value| f64::from(*value)));
        let moments = product(self.workers, whole(&a), whole(&self.inputs));
        let mut gram = moments * a.transpose();
        let lift = 1e-9 * gram.trace() / rank as f64;
        for i in 0..rank {
            gram[(i, i)] += lift;
        }
        let factor = Cholesky::new(gram).ok_or(PredictorError::Dependent { rank })?;
        // Bᵀ = (A C Aᵀ)⁻¹ · A · crossᵀ; column-major [rank, n_out] is row-major [n_out, rank]
        let map = factor.solve(&product(self.workers, whole(&a), transposed(&self.cross)));
        Ok(map.iter().map(|value| *value as f32).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::sampler::Mt19937;

    #[test]
    fn a_planted_map_of_rank_3_is_found_whole() {
        let (n, n_in, n_out, rank) = (400, 20, 50, 3);
        let mut rng = Mt19937::new(3);
        let mut draw =
            |n: usize| -> Vec<f32> { (0..n).map(|_| rng.next_f64() as f32 - 0.5).collect() };
        let (x, a, b) = (draw(n * n_in), draw(rank * n_in), draw(n_out * rank));
        let x = DMatrix::from_row_slice(n, n_in, &x);
        let map =
            DMatrix::from_row_slice(n_out, rank, &b) * DMatrix::from_row_slice(rank, n_in, &a);
        let y = &x * map.transpose();
        let rows = |m: &DMatrix<f32>| m.transpose().as_slice().to_vec();
        let workers = Workers::new(NonZeroUsize::MIN);
        let fit =
            Regression::fit(workers.into(), (&rows(&x), n_in), (&rows(&y), n_out), 6).unwrap();
        let found_a = fit.directions(rank);
        let found_b = fit.map_from(&found_a, rank).unwrap();
        let found = DMatrix::from_row_slice(n_out, rank, &found_b)
            * DMatrix::from_row_slice(rank, n_in, &found_a);
        assert!(
            (&found - &map).norm() < 2e-3 * map.norm(),
            "{}",
            (&found - &map).norm()
        );
        // its outputs are uncorrelated, variance 1
        let h = &x * DMatrix::from_row_slice(rank, n_in, &found_a).transpose();
        for r in 0..rank {
            assert!(
                (h.column(r).variance() - 1.0).abs() < 2e-2,
                "{}",
                h.column(r).variance()
            );
        }
    }

    #[test]
    fn constant_inputs_are_refused() {
        let workers = Workers::new(NonZeroUsize::MIN);
        let x = vec![1.0; 64 * 8];
        let error = Regression::fit(workers.into(), (&x, 8), (&x, 8), 2).unwrap_err();
        assert_eq!(error, PredictorError::Constant { n_tokens: 64 });
    }
}
