//! Predictors of which neurons will be active: their fit, their thresholds, and the choice among them.
//!
//! Arrays in, arrays out; files and the running of models are others' work. Two kinds are fitted to [`LayerSamples`]:
//!
//! - *in the layer*, from its own input, a sketch names candidates whose gates are then computed exactly: [`bits`] of
//!   the gate rows, or a [`low_rank`] map;
//! - *ahead*, from the residual stream of the layer before, [`ahead_svd`] or [`ahead_trained`] names neurons to fetch
//!   and to start on.
//!
//! [`thresholds`] sets a bias per neuron for either, and says what candidates keep; [`choose`] takes the cheapest
//! sketch. Matrices are fitted to the first three quarters of the tokens, thresholds to the rest: on tokens that the
//! matrices have seen thresholds would be too tight. Whatever is fitted is evaluated with the weights as they are
//! stored, through the runtime's own kernels. Results are the same for any number of threads,
//! and rounded in another way where a GPU takes part.

mod adam;
pub mod ahead;
pub mod ahead_svd;
pub mod ahead_trained;
pub mod bits;
pub mod choose;
pub mod error;
mod fit_gpu;
pub mod low_rank;
mod neuron_model;
mod quantised;
mod regression;
mod samples;
pub mod thresholds;

#[cfg(test)]
mod tests;

pub use crate::linear_algebra::Workers;
pub use ahead::Ahead;
pub use error::PredictorError;
pub use fit_gpu::{FitGpu, FitOn};
pub use low_rank::LowRank;
pub use quantised::QuantisedMatrix;
pub use samples::LayerSamples;
