//! Why a sidecar cannot be used.

use std::path::{Path, PathBuf};

use pi_topology::PredictBy;
use thiserror::Error;

use crate::gguf::GgufError;
use crate::model::ModelError;

/// Why a sidecar cannot be used.
#[derive(Debug, Error)]
pub enum SidecarError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Gguf(GgufError),
    /// A mode needs it and it is not there.
    #[error(
        "there is no {}: make it with `pi-runtime prepare -m {} -o {}`, or name another one with --sidecar",
        path.display(), model.display(), path.display()
    )]
    NotThere {
        /// Where it would be.
        path: PathBuf,
        /// The model.
        model: PathBuf,
    },
    /// Another GGUF file.
    #[error("{}: this is no sidecar: give the file that `pi-runtime prepare` made for the model", path.display())]
    NoSidecar {
        /// The file.
        path: PathBuf,
    },
    /// A version that is not known.
    #[error("{}: version {version} of the sidecar's format is not known: run `pi-runtime prepare` again", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Sizes of another model.
    #[error("{}: `{key}` is {found}, but the model's is {expected}: this is the sidecar of another model; run `pi-runtime prepare` for this one", path.display())]
    OtherShape {
        /// The file.
        path: PathBuf,
        /// Which size.
        key: &'static str,
        /// In the sidecar.
        found: usize,
        /// Of the model.
        expected: usize,
    },
    /// The hash of another model of the same sizes.
    #[error("{}: made for a model with hash {found}, but this one has {expected}: run `pi-runtime prepare` for this one", path.display())]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// In the sidecar.
        found: String,
        /// Of the model.
        expected: String,
    },
    /// A tensor of another shape or type.
    #[error("{}: {source}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        source: Box<ModelError>,
    },
    /// A value that is not finite.
    #[error("{}: value {index} of `{tensor}` is not finite: the file is damaged; run `pi-runtime prepare` again", path.display())]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Which value.
        index: usize,
    },
    /// Metadata that say something impossible.
    #[error("{}: {problem}: run `pi-runtime prepare` again", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What.
        problem: String,
    },
    /// A part that is asked for is not there.
    #[error("{}: the sidecar has no {what}: run `pi-runtime prepare` again", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// What.
        what: String,
    },
    /// A layer, or every layer, that cannot be predicted in the way that is asked for.
    #[error("{}", no_predictor(path, *layer, *by, what))]
    NoPredictor {
        /// The file.
        path: PathBuf,
        /// Which; none: all.
        layer: Option<usize>,
        /// In which way.
        by: PredictBy,
        /// What is not there.
        what: &'static str,
    },
    /// Thresholds that were found to gain nothing.
    #[error(
        "{}: calibration found that --sparsity threshold gains nothing on this model ({figures}): use --sparsity off, or \
         add --force-threshold to run it anyway",
        path.display()
    )]
    NothingGained {
        /// The file.
        path: PathBuf,
        /// What was measured.
        figures: String,
    },
}

fn no_predictor(path: &Path, layer: Option<usize>, by: PredictBy, what: &str) -> String {
    let path = path.display();
    match layer {
        Some(0) if by != PredictBy::InLayer => format!(
            "{path}: layer 0 cannot be predicted by \"{by}\", as there is no layer before it: name it exact or in-layer \
             (--predictor, or predict of [sparsity])"
        ),
        Some(layer) => format!(
            "{path}: layer {layer} cannot be predicted by \"{by}\": the sidecar has no {what} for it: name another way, \
             such as exact, which needs nothing (--predictor, or predict of [sparsity]), or run `pi-runtime prepare` again"
        ),
        None => format!(
            "{path}: nothing can be predicted by \"{by}\": the sidecar has no {what} for any layer: name another way \
             (--predictor, or predict of [sparsity]), or run `pi-runtime prepare` again"
        ),
    }
}

impl SidecarError {
    /// Whether the machine is at fault, and not the file.
    pub fn is_environment(&self) -> bool {
        matches!(self, Self::Gguf(source) if source.is_environment())
    }
}
