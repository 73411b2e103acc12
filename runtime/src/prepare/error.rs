//! Why a model cannot be prepared.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::predictor::PredictorError;

/// Why a model cannot be prepared.
#[derive(Debug, Error)]
pub enum PrepareError {
    /// Too few tokens to learn from, or to report on.
    #[error(
        "{text}: the text has {n_tokens} tokens, but at least {needed} are needed: give a longer text, or several, with -f"
    )]
    TextTooShort {
        /// Its files, or what it is.
        text: String,
        /// Its tokens.
        n_tokens: usize,
        /// Tokens needed.
        needed: usize,
    },
    /// The folder of what is done so far cannot be used.
    #[error("{}: cannot {action} what is done so far: {source}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A picture that cannot be written.
    #[error("{}: cannot write the plot: {problem}", path.display())]
    Plot {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// A stage whose forerunner has not been run.
    #[error("{}: there is no {missing} in it, which this stage needs: run `pi-runtime prepare {stage}` first", path.display())]
    StageMissing {
        /// The sidecar.
        path: PathBuf,
        /// What is missing.
        missing: &'static str,
        /// The stage that makes it.
        stage: &'static str,
    },
    /// A layer whose neurons cannot be predicted.
    #[error("layer {layer}: {source}")]
    Predictor {
        /// The layer.
        layer: usize,
        /// Why.
        source: PredictorError,
    },
    /// A stage that does nothing for the model.
    #[error("{stage}: {why}")]
    NotForThisModel {
        /// The stage.
        stage: &'static str,
        /// Why, and what to do.
        why: &'static str,
    },
}

impl PrepareError {
    /// Whether the machine is at fault, and not what was given.
    pub fn is_environment(&self) -> bool {
        let Self::Checkpoint { source, .. } = self else {
            return false;
        };
        !matches!(
            source.kind(),
            io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied
                | io::ErrorKind::NotADirectory
                | io::ErrorKind::InvalidInput
        )
    }
}
