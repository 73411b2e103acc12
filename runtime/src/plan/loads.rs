//! What a token reads of a model, part by part, and how often its neurons fire.

use std::path::PathBuf;

use pi_topology::placement::LayerLoad;

use super::rehearsal::Class;
use super::sketches::predictor_bytes;
use crate::error::RuntimeError;
use crate::model::sparsity::{DownPlan, Sparsity, SparsityPlan};
use crate::model::tensors::LayerTensors;
use crate::model::{GateKind, Hyperparameters, ModelTensors};
use crate::sidecar::{LayerPredictors, Profile, Sidecar, SidecarError};

/// Share of tokens that every neuron of a ReLU model is taken to fire for where there is no profile.
const ASSUMED_SHARE: f32 = 0.15;

/// Candidates for each neuron that fires, where a sidecar does not say how many its sketches name.
const ASSUMED_CANDIDATES: f64 = 2.2;

/// Neurons that signs name for each of these whose next bit is looked at, likewise.
const ASSUMED_NAMED: f64 = 2.0;

/// Times that frequencies are scaled: each brings their mean nearer to what it is to be.
const N_SCALINGS: usize = 16;

/// Key of the share of neurons that were candidates of each layer's sketch on held-out text, f32 `[n_layer]`,
const CANDIDATES_KEY: &str = "sparse.report.candidates";
/// and of those that signs named before the next bit was looked at; 0 where it is not.
const NAMED_KEY: &str = "sparse.report.named";

/// Of the same text: shares of neurons whose gates were open, and that were computed.
const DENSITY_KEY: &str = "sparse.report.density";
const COMPUTED_KEY: &str = "sparse.report.computed";

/// Shares of a layer's neurons that its predictors name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct CandidateShares {
    /// Neurons whose gates are computed.
    pub candidates: f64,
    /// Neurons that signs name, where the next bit is looked at too.
    pub named: f64,
}

/// A layer's bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LayerBytes {
    /// What it costs like.
    pub class: Class,
    /// Projections with their biases, and both norms.
    pub attention: u64,
    /// What finds the active neurons: gate rows, or a sketch and candidates' gates.
    pub gate: u64,
    /// Up and down weights of all neurons.
    pub neurons: u64,
}

impl LayerBytes {
    fn of(
        hyper: &Hyperparameters,
        layer: &LayerTensors,
        down: DownPlan,
        predictors: Option<&LayerPredictors>,
        shares: CandidateShares,
    ) -> Self {
        let matrices = [&layer.wq, &layer.wk, &layer.wv, &layer.wo];
        let matrices: usize = matrices.iter().map(|matrix| matrix.bytes.len()).sum();
        let bias = layer.qkv_bias.as_ref();
        let biases = bias.map_or(0, |bias| bias.q.len() + bias.k.len() + bias.v.len());
        let floats = (biases + 2 * hyper.n_embd) * size_of::<f32>();
        let down = match down {
            DownPlan::NeuronRows(quant) | DownPlan::Transposed { to: quant, .. } => {
                hyper.n_ff * quant.row_bytes(hyper.n_embd)
            }
            DownPlan::Dense(quant) => hyper.n_embd * quant.row_bytes(hyper.n_ff),
        };
        let gate = match predictors {
            None => layer.gate.bytes.len() as u64,
            Some(predictors) => predictor_bytes(hyper, &layer.gate, predictors, shares),
        };
        Self {
            class: Class::of(layer, predictors),
            attention: (matrices + floats) as u64,
            gate,
            neurons: (layer.up.bytes.len() + down) as u64,
        }
    }

    /// The layer as placement sees it.
    pub fn load(&self, mode: Sparsity, frequencies: &[f32]) -> LayerLoad {
        let n = frequencies.len().max(1) as u64;
        let bundle_bytes = (self.gate + self.neurons) / n;
        let (scanned_bytes, active_bytes) = match mode {
            Sparsity::Off => (bundle_bytes, 0),
            _ => (self.gate / n, self.neurons / n),
        };
        LayerLoad {
            fixed_bytes: self.attention,
            scanned_bytes,
            active_bytes,
            bundle_bytes,
            frequencies: frequencies.to_vec(),
        }
    }
}

/// Every layer's bytes under a plan.
pub(super) fn layer_bytes(
    hyper: &Hyperparameters,
    tensors: &ModelTensors,
    sparsity: &SparsityPlan,
    predictors: Option<&[LayerPredictors]>,
    shares: &[CandidateShares],
) -> Vec<LayerBytes> {
    let layers = tensors.layers.iter().zip(&sparsity.down).enumerate();
    layers
        .map(|(index, (layer, down))| {
            let predictors = predictors.map(|all| &all[index]);
            LayerBytes::of(hyper, layer, *down, predictors, shares[index])
        })
        .collect()
}

/// Bytes of the head, and of a token's embedding and the last norm.
pub(super) fn head_bytes(hyper: &Hyperparameters, tensors: &ModelTensors) -> (u64, u64) {
    let head = tensors.output.as_ref().unwrap_or(&tensors.token_embd);
    let other = tensors.token_embd.row_bytes() + hyper.n_embd * size_of::<f32>();
    (head.bytes.len() as u64, other as u64)
}

/// How often neurons fire.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    /// Share of tokens, `[n_layer][n_ff]`.
    pub by_layer: Vec<Vec<f32>>,
    /// Where they are from.
    pub source: FrequencySource,
}

/// Where frequencies are from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrequencySource {
    /// The profile of a sidecar.
    Profile {
        /// The sidecar.
        path: PathBuf,
        /// Tokens that were counted.
        n_tokens: usize,
    },
    /// The same for every neuron, because nothing is known.
    Assumed,
    /// Every neuron contributes to every token.
    Dense,
}

impl Frequencies {
    /// Of a model: from its sidecar's profile, if there is one.
    ///
    /// # Errors
    /// A profile that says something impossible.
    pub fn find(hyper: &Hyperparameters, sidecar: Option<&Sidecar>) -> Result<Self, RuntimeError> {
        let same = |share: f32| vec![vec![share; hyper.n_ff]; hyper.n_layer];
        if hyper.gate != GateKind::Relu {
            return Ok(Self {
                by_layer: same(1.0),
                source: FrequencySource::Dense,
            });
        }
        if let Some(sidecar) = sidecar
            && let Some((n_tokens, by_layer)) = profile(sidecar, hyper)?
        {
            let path = sidecar.path().to_path_buf();
            return Ok(Self {
                by_layer,
                source: FrequencySource::Profile { path, n_tokens },
            });
        }
        Ok(Self {
            by_layer: same(ASSUMED_SHARE),
            source: FrequencySource::Assumed,
        })
    }

    /// The same neurons in the same order, firing so much more or less that `active` is the mean; as they are where gates
    /// never close.
    #[must_use]
    pub fn scaled_to(mut self, active: f64) -> Self {
        if self.source == FrequencySource::Dense {
            return self;
        }
        let less = active / self.mean().max(f64::MIN_POSITIVE);
        if less < 1.0 {
            let shares = self.by_layer.iter_mut().flatten();
            shares.for_each(|share| *share = (f64::from(*share) * less) as f32);
            return self;
        }
        // what fires always cannot fire more often, so that the others have to
        for _ in 0..N_SCALINGS {
            let all = || {
                self.by_layer
                    .iter()
                    .flatten()
                    .map(|share| f64::from(*share))
            };
            let n_always = all().filter(|share| *share >= 1.0).count() as f64;
            let others: f64 = all().filter(|share| *share < 1.0).sum();
            if others <= 0.0 {
                // the rest never fires
                break;
            }
            let factor = (active * all().count() as f64 - n_always) / others;
            let shares = self.by_layer.iter_mut().flatten();
            for share in shares.filter(|share| **share < 1.0) {
                *share = (f64::from(*share) * factor).min(1.0) as f32;
            }
        }
        self
    }

    /// Mean over all neurons.
    pub fn mean(&self) -> f64 {
        let values = self.by_layer.iter().flatten();
        let n = values.clone().count().max(1);
        values.map(|&share| f64::from(share)).sum::<f64>() / n as f64
    }

    /// Neurons of a layer that a token is expected to activate.
    pub(super) fn active(&self, layer: usize) -> f64 {
        self.by_layer[layer]
            .iter()
            .map(|&share| f64::from(share))
            .sum()
    }
}

/// What is expected of a model's gates and predictors.
#[derive(Debug, Clone)]
pub(super) struct Expected<'a> {
    pub frequencies: &'a Frequencies,
    /// Share of each layer's active neurons that are computed where it is predicted, `[n_layer]`.
    pub found: Vec<f64>,
    /// What each layer's predictors name, `[n_layer]`.
    pub shares: Vec<CandidateShares>,
    /// Whether these were measured.
    pub measured: bool,
}

impl<'a> Expected<'a> {
    /// By `frequencies`, and by what the sidecar says of its sketches.
    ///
    /// # Errors
    /// Shares that cannot be.
    pub fn new(
        frequencies: &'a Frequencies,
        sidecar: Option<&Sidecar>,
    ) -> Result<Self, RuntimeError> {
        let n_layer = frequencies.by_layer.len();
        let known = |key| match sidecar {
            Some(sidecar) => reported_shares(sidecar, key, n_layer),
            None => Ok(None),
        };
        let (candidates, named) = (known(CANDIDATES_KEY)?, known(NAMED_KEY)?);
        let (density, computed) = (known(DENSITY_KEY)?, known(COMPUTED_KEY)?);
        let active = |layer: usize| {
            let n = frequencies.by_layer[layer].len().max(1) as f64;
            frequencies.active(layer) / n
        };
        // the report's text was more or less active than what is planned for
        let as_planned = |share: f64, layer: usize| match &density {
            Some(density) if density[layer] > 0.0 => {
                (share * active(layer) / density[layer]).min(1.0)
            }
            _ => share,
        };
        let shares = (0..n_layer).map(|layer| {
            let candidates = match &candidates {
                Some(candidates) => as_planned(candidates[layer], layer),
                None => (active(layer) * ASSUMED_CANDIDATES).min(1.0),
            };
            CandidateShares {
                candidates,
                named: match &named {
                    Some(named) => as_planned(named[layer], layer),
                    None => (candidates * ASSUMED_NAMED).min(1.0),
                },
            }
        });
        let found = (0..n_layer).map(|layer| match (&density, &computed) {
            (Some(density), Some(computed)) if density[layer] > 0.0 => {
                (computed[layer] / density[layer]).min(1.0)
            }
            _ => 1.0,
        });
        Ok(Self {
            frequencies,
            found: found.collect(),
            shares: shares.collect(),
            measured: candidates.is_some(),
        })
    }
}

impl Expected<'_> {
    /// Neurons of a layer.
    pub fn n_neurons(&self, layer: usize) -> f64 {
        self.frequencies.by_layer[layer].len().max(1) as f64
    }

    /// Neurons of a layer that its predictors name for a token.
    pub fn candidates(&self, layer: usize) -> f64 {
        self.shares[layer].candidates * self.n_neurons(layer)
    }
}

fn reported_shares(
    sidecar: &Sidecar,
    key: &str,
    n_layer: usize,
) -> Result<Option<Vec<f64>>, RuntimeError> {
    let Some(array) = sidecar.file().metadata().get_array(key)? else {
        return Ok(None);
    };
    let shares = array.to_f32s()?;
    let good = |share: &f32| (0.0..=1.0).contains(share);
    if shares.len() != n_layer || !shares.iter().all(good) {
        return Err(RuntimeError::Sidecar(SidecarError::BadKey {
            path: sidecar.path().to_path_buf(),
            problem: format!("`{key}` is not a share of neurons for each of {n_layer} layers"),
        }));
    }
    Ok(Some(shares.into_iter().map(f64::from).collect()))
}

/// Tokens that were counted, and each neuron's share of them, by layer.
type Counted = (usize, Vec<Vec<f32>>);

/// What the profile counted; none where the sidecar has no profile.
fn profile(sidecar: &Sidecar, hyper: &Hyperparameters) -> Result<Option<Counted>, RuntimeError> {
    let Some(profile) = Profile::read(sidecar, hyper.n_layer, hyper.n_ff)? else {
        return Ok(None);
    };
    if profile.n_tokens == 0 {
        return Err(RuntimeError::Sidecar(SidecarError::BadKey {
            path: sidecar.path().to_path_buf(),
            problem: "the profile is of 0 tokens".to_owned(),
        }));
    }
    let share = |count: &u32| (f64::from(*count) / profile.n_tokens as f64) as f32;
    let layers = profile.layers.iter();
    let by_layer = layers.map(|layer| layer.counts.iter().map(share).collect());
    Ok(Some((profile.n_tokens, by_layer.collect())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(by_layer: &[&[f32]], source: FrequencySource) -> Frequencies {
        Frequencies {
            by_layer: by_layer.iter().map(|layer| layer.to_vec()).collect(),
            source,
        }
    }

    #[test]
    fn frequencies_are_scaled_to_a_mean_and_none_beyond_always() {
        let before = frequencies(&[&[0.1, 0.2], &[0.0, 0.9]], FrequencySource::Assumed);
        for active in [0.15, 0.3, 0.5, 0.7] {
            let after = before.clone().scaled_to(active);
            assert!((after.mean() - active).abs() < 1e-4, "{after:?}");
            assert!(after.by_layer.iter().flatten().all(|share| *share <= 1.0));
            assert_eq!(after.by_layer[1][0], 0.0);
        }
        // a fourth never fires
        assert_eq!(before.clone().scaled_to(1.0).mean(), 0.75);
        assert_eq!(before.scaled_to(0.0).mean(), 0.0);
        let dense = frequencies(&[&[1.0; 2]], FrequencySource::Dense);
        assert_eq!(dense.clone().scaled_to(0.5), dense);
    }
}
