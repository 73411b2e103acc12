//! In-layer sketch: gates through a few numbers, `B·(A·x)`, from the layer's own normed input.

use pi_kernels::{Cpu, QuantType};

use super::error::PredictorError;
use super::fit_gpu::FitOn;
use super::quantised::QuantisedMatrix;
use super::regression::Regression;
use super::samples::LayerSamples;
use crate::linear_algebra::Workers;

/// A low-rank map as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `[rank, n_embd]`
    pub a: QuantisedMatrix,
    /// `[n_ff, rank]`
    pub b: QuantisedMatrix,
}

impl LowRank {
    /// Numbers between input and scores.
    pub fn rank(&self) -> usize {
        self.a.n_rows
    }

    /// Scores, row-major `[n, n_ff]`, of every row of `x` `[n, n_embd]`, as the runtime computes them.
    pub fn scores(&self, cpu: Cpu, workers: Workers, x: &[f32]) -> Vec<f32> {
        let inner = self.a.products(cpu, workers, x);
        self.b.products(cpu, workers, &inner)
    }
}

/// Low-rank maps of a layer, of any rank up to a largest.
#[derive(Debug)]
pub struct LowRankFit {
    regression: Regression,
}

/// Fits gates to the normed input on the samples' fitting tokens, for ranks up to `rank_max`.
///
/// The fit weighs inputs as they occur, so it needs far lower ranks than the gate matrix's own singular vectors.
///
/// # Errors
/// When all inputs are the same.
pub fn fit<'a>(
    samples: &LayerSamples,
    on: impl Into<FitOn<'a>>,
    rank_max: usize,
) -> Result<LowRankFit, PredictorError> {
    let tokens = samples.fitting();
    let x = (samples.x(tokens.clone()), samples.n_embd);
    let gates = (samples.gates(tokens), samples.n_ff);
    Ok(LowRankFit {
        regression: Regression::fit(on.into(), x, gates, rank_max)?,
    })
}

impl LowRankFit {
    /// The map of `rank`, its matrices rounded to `quant`; the second makes up for the rounding of the first.
    ///
    /// # Errors
    /// When the inputs have fewer directions than `rank`.
    ///
    /// # Panics
    /// When the rank is no multiple of 32 or above the largest fitted.
    pub fn at(&self, rank: usize, quant: QuantType) -> Result<LowRank, PredictorError> {
        rounded(&self.regression, rank, quant)
    }
}

pub(super) fn rounded(
    regression: &Regression,
    rank: usize,
    quant: QuantType,
) -> Result<LowRank, PredictorError> {
    let n_in = regression.n_in();
    let a = QuantisedMatrix::round(quant, &regression.directions(rank), n_in);
    let map = regression.map_from(&a.values(), rank)?;
    Ok(LowRank {
        b: QuantisedMatrix::round(quant, &map, rank),
        a,
    })
}
