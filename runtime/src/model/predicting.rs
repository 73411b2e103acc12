//! Who predicts a layer's neurons.

use crate::sidecar::LayerPredictors;

/// Who predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PredictBy {
    /// The layer's own sketch, when the hidden state is there.
    InLayer,
    /// The predictor one layer ahead alone.
    Ahead,
    /// The predictor one layer ahead, and the sketch adds what is missing.
    Both,
}

/// How neurons are predicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Predicting {
    /// Who predicts; none: by the layer's own sketch. Where the host is the device, what is predicted ahead is started
    /// no earlier than the hidden state is there, so that it can only cost.
    pub by: Option<PredictBy>,
    /// Whether what is predicted ahead is pulled towards the cache.
    pub prefetch: bool,
}

impl Predicting {
    /// Whether what is predicted ahead is all that is computed.
    pub fn ahead_alone(self) -> bool {
        self.by == Some(PredictBy::Ahead)
    }

    /// Leaves those predictors that shall work.
    pub fn choose(self, layers: &mut [LayerPredictors]) {
        for layer in layers {
            if matches!(self.by, None | Some(PredictBy::InLayer)) {
                layer.ahead = None;
            }
        }
    }
}
