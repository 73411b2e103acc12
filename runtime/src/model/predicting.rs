//! Who predicts a layer's neurons.

pub use pi_topology::{LayerList, Predict, PredictBy};

use crate::error::RuntimeError;
use crate::sidecar::{LayerPredictors, Sidecar, SidecarError};

/// How neurons are predicted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Predicting {
    /// Who predicts in which layer. Where the host is the device, what is predicted ahead is started no earlier than the
    /// hidden state is there, so that it can only cost.
    pub by: Predict,
    /// Whether what is predicted ahead is pulled towards the cache.
    pub prefetch: bool,
}

impl Predicting {
    /// Those predictors that shall work, `[n_layer]`, of `all` that `sidecar` has.
    ///
    /// # Errors
    /// A list that does not name each layer once, or that names predictors which the sidecar does not have; one way for
    /// all layers that none of them has.
    pub fn choose(
        &self,
        sidecar: &Sidecar,
        all: &[LayerPredictors],
    ) -> Result<Vec<LayerPredictors>, RuntimeError> {
        let missing = |layer: Option<usize>, by, what| SidecarError::NoPredictor {
            path: sidecar.path().to_owned(),
            layer,
            by,
            what,
        };
        let kinds = match &self.by {
            Predict::Auto => vec![PredictBy::InLayer; all.len()],
            Predict::All(by) => {
                let mut lacks = all.iter().map(|layer| lacks(layer, *by));
                if let Some(what) = lacks.next().flatten()
                    && lacks.all(|lacks| lacks.is_some())
                {
                    return Err(missing(None, *by, what).into());
                }
                vec![*by; all.len()]
            }
            Predict::Layers(list) => {
                let kinds = list.of_model(all.len())?;
                for (layer, &by) in kinds.iter().enumerate() {
                    if let Some(what) = lacks(&all[layer], by) {
                        return Err(missing(Some(layer), by, what).into());
                    }
                }
                kinds
            }
        };
        let layers = all.iter().zip(kinds);
        Ok(layers.map(|(layer, by)| self.kept(layer, by)).collect())
    }

    /// What works in a layer where `by` predicts, as far as it is there.
    pub(crate) fn kept(&self, layer: &LayerPredictors, by: PredictBy) -> LayerPredictors {
        let mut kept = layer.clone();
        if by == PredictBy::Exact {
            kept.sketch = None;
        }
        if matches!(by, PredictBy::Exact | PredictBy::InLayer) {
            kept.ahead = None;
        }
        if let Some(ahead) = &mut kept.ahead {
            ahead.alone = by == PredictBy::Ahead;
            ahead.prefetch = self.prefetch;
        }
        kept
    }
}

/// Whether the neurons of some layer are predicted.
pub fn predicts(layers: &[LayerPredictors]) -> bool {
    let mut layers = layers.iter();
    layers.any(|layer| layer.sketch.is_some() || layer.ahead.is_some())
}

/// What a layer lacks for being predicted in a way, in words.
pub(crate) fn lacks(layer: &LayerPredictors, by: PredictBy) -> Option<&'static str> {
    let sketch = matches!(by, PredictBy::InLayer | PredictBy::Both);
    let ahead = matches!(by, PredictBy::Ahead | PredictBy::Both);
    if ahead && layer.ahead.is_none() {
        return Some("predictor one layer ahead");
    }
    (sketch && layer.sketch.is_none()).then_some("sketch")
}
