//! What the asked-for sparsity means for a model and its sidecar.

use std::sync::Arc;

use super::ModelOptions;
use crate::error::RuntimeError;
use crate::model::sparsity::{DownStored, SparsityPlan};
use crate::model::threshold::Thresholds;
use crate::model::{GateKind, Hyperparameters, ModelError, Sparsity};
use crate::sidecar::{Sidecar, SidecarError, ThresholdSection};

/// Where the thresholds of `threshold` come from.
#[derive(Debug, Clone, Default)]
pub enum ThresholdSource {
    /// From the sidecar, if they gain anything.
    #[default]
    Sidecar,
    /// From the sidecar, whether they gain anything or not.
    Forced,
    /// These.
    Given(Arc<Thresholds>),
}

/// Whether the mode cannot do without the sidecar.
pub(super) fn needs_sidecar(options: &ModelOptions, hyper: &Hyperparameters) -> bool {
    let given = matches!(options.thresholds, ThresholdSource::Given(_));
    let relu = hyper.gate == GateKind::Relu;
    match options.sparsity {
        Some(Sparsity::Predicted) => relu,
        Some(Sparsity::Threshold) => !given && !relu,
        _ => false,
    }
}

/// The plan for what was asked for.
///
/// # Errors
/// A mode that is not the model's, or a sidecar without what it needs.
pub(super) fn plan(
    options: &ModelOptions,
    hyper: &Hyperparameters,
    stored: &[DownStored],
    sidecar: Option<&Sidecar>,
) -> Result<SparsityPlan, RuntimeError> {
    let in_file = |source: ModelError| RuntimeError::Model {
        path: options.path.clone(),
        source,
    };
    let thresholds = match (options.sparsity, &options.thresholds, sidecar) {
        (Some(Sparsity::Threshold), ThresholdSource::Given(thresholds), _) => {
            Arc::clone(thresholds)
        }
        (Some(Sparsity::Threshold), source, Some(sidecar)) if hyper.gate != GateKind::Relu => {
            let forced = matches!(source, ThresholdSource::Forced);
            Arc::new(from_sidecar(sidecar, hyper, stored, forced)?)
        }
        _ => return SparsityPlan::resolve(options.sparsity, hyper.gate, stored).map_err(in_file),
    };
    SparsityPlan::with_thresholds(thresholds, hyper.gate, stored).map_err(in_file)
}

fn from_sidecar(
    sidecar: &Sidecar,
    hyper: &Hyperparameters,
    stored: &[DownStored],
    forced: bool,
) -> Result<Thresholds, SidecarError> {
    let section = ThresholdSection::read(sidecar, hyper, stored)?;
    let section = section.ok_or_else(|| sidecar.missing("thresholds"))?;
    if section.figures.gains || forced {
        return Ok(section.thresholds);
    }
    Err(SidecarError::NothingGained {
        path: sidecar.path().to_owned(),
        figures: section.figures.to_string(),
    })
}
