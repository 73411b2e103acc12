//! Why no predictor can be fitted.

use thiserror::Error;

/// Why no predictor can be fitted to a layer's samples.
#[derive(Debug, Error, Clone, PartialEq)]
pub enum PredictorError {
    /// Too little text.
    #[error(
        "{n_tokens} tokens are too few to fit a predictor to: at least {n_tokens_min} are needed; give a longer text"
    )]
    TooFewTokens {
        /// Tokens there are.
        n_tokens: usize,
        /// Fewest that will do.
        n_tokens_min: usize,
    },
    /// A value that nothing can be fitted to.
    #[error("no predictor can be fitted: the {what} hold a value that is not a finite number")]
    NotFinite {
        /// Which values.
        what: &'static str,
    },
    /// The samples of a predictor one layer ahead lack what it reads.
    #[error("a predictor one layer ahead needs the residual stream of the layer before")]
    NoResidual,
    /// More numbers than the inputs have directions.
    #[error(
        "the inputs have fewer than {rank} directions: a lower rank or a longer text is needed"
    )]
    Dependent {
        /// Numbers asked for.
        rank: usize,
    },
    /// Nothing to tell the inputs apart by.
    #[error("no predictor can be fitted: the inputs of all {n_tokens} tokens are the same")]
    Constant {
        /// Tokens there are.
        n_tokens: usize,
    },
}
