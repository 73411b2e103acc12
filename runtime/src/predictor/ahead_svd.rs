//! The simple predictor one layer ahead: reduced-rank regression of a layer's gates on the residual stream before it.

use pi_kernels::QuantType;

use super::ahead::Ahead;
use super::error::PredictorError;
use super::fit_gpu::FitOn;
use super::low_rank::{LowRank, rounded};
use super::regression::Regression;
use super::samples::LayerSamples;

/// Fits a linear predictor of `rank`, its matrices rounded to `quant`; biases are zero until it is calibrated.
///
/// # Errors
/// When the samples have no residual stream, all are the same, or they have fewer directions than `rank`.
///
/// # Panics
/// When the rank is no multiple of 32.
pub fn fit<'a>(
    samples: &LayerSamples,
    on: impl Into<FitOn<'a>>,
    rank: usize,
    quant: QuantType,
) -> Result<Ahead, PredictorError> {
    let regression = regression(samples, on.into(), rank)?;
    let LowRank { a, b } = rounded(&regression, rank, quant)?;
    Ok(Ahead {
        a,
        a_bias: None,
        b,
        b_bias: vec![0.0; samples.n_ff],
    })
}

pub(super) fn regression(
    samples: &LayerSamples,
    on: FitOn<'_>,
    rank: usize,
) -> Result<Regression, PredictorError> {
    let tokens = samples.fitting();
    let residual = samples
        .residual(tokens.clone())
        .ok_or(PredictorError::NoResidual)?;
    let gates = (samples.gates(tokens), samples.n_ff);
    Regression::fit(on, (residual, samples.n_embd), gates, rank)
}
