//! What a token reads of a model, part by part, and how often its neurons fire.

use std::path::{Path, PathBuf};

use pi_kernels::QuantType;
use pi_topology::placement::LayerLoad;

use super::rehearsal::class_of;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::sparsity::{DownPlan, Sparsity, SparsityPlan};
use crate::model::tensors::LayerTensors;
use crate::model::{GateKind, Hyperparameters, ModelTensors};
use crate::sidecar::{Sidecar, SidecarError, default_path};

/// Share of tokens that every neuron of a ReLU model is taken to fire for where there is no profile.
const ASSUMED_SHARE: f32 = 0.15;

/// A layer's bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct LayerBytes {
    /// Types of its matrices.
    pub class: Vec<QuantType>,
    /// Projections with their biases, and both norms.
    pub attention: u64,
    /// Gate rows.
    pub gate: u64,
    /// Up and down weights of all neurons.
    pub neurons: u64,
}

impl LayerBytes {
    fn of(hyper: &Hyperparameters, layer: &LayerTensors, down: DownPlan) -> Self {
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
        Self {
            class: class_of(layer),
            attention: (matrices + floats) as u64,
            gate: layer.gate.bytes.len() as u64,
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
) -> Vec<LayerBytes> {
    let layers = tensors.layers.iter().zip(&sparsity.down);
    layers
        .map(|(layer, down)| LayerBytes::of(hyper, layer, *down))
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
        n_tokens: u32,
    },
    /// The same for every neuron, because nothing is known.
    Assumed,
    /// Every neuron contributes to every token.
    Dense,
}

impl Frequencies {
    /// Of a model: from the sidecar that is named, or that lies beside the model.
    ///
    /// # Errors
    /// A sidecar that is named and cannot be read, one of another model, or a profile that says something impossible.
    pub fn find(
        model: &Path,
        file: &GgufFile,
        hyper: &Hyperparameters,
        sidecar: Option<&Path>,
    ) -> Result<Self, RuntimeError> {
        let same = |share: f32| vec![vec![share; hyper.n_ff]; hyper.n_layer];
        if hyper.gate != GateKind::Relu {
            return Ok(Self {
                by_layer: same(1.0),
                source: FrequencySource::Dense,
            });
        }
        let beside = default_path(model);
        let path = match sidecar {
            Some(path) => Some(path),
            None => beside.exists().then_some(beside.as_path()),
        };
        let profile = match path {
            Some(path) => profile(&Sidecar::open(path, file, hyper)?, hyper)?,
            None => None,
        };
        Ok(match profile {
            Some((n_tokens, by_layer)) => Self {
                by_layer,
                source: FrequencySource::Profile {
                    path: path.unwrap_or(&beside).to_path_buf(),
                    n_tokens,
                },
            },
            None => Self {
                by_layer: same(ASSUMED_SHARE),
                source: FrequencySource::Assumed,
            },
        })
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

/// Tokens that were counted and each neuron's share of them; none where the sidecar has no profile.
fn profile(
    sidecar: &Sidecar,
    hyper: &Hyperparameters,
) -> Result<Option<(u32, Vec<Vec<f32>>)>, RuntimeError> {
    let key = "sparse.profile.n_tokens";
    let Some(n_tokens) = sidecar.file().metadata().get_u32(key)? else {
        return Ok(None);
    };
    let bad = |problem: String| {
        RuntimeError::Sidecar(SidecarError::BadKey {
            path: sidecar.path().to_path_buf(),
            problem,
        })
    };
    if n_tokens == 0 {
        return Err(bad(format!("`{key}` is 0")));
    }
    let layer = |layer: usize| {
        let name = format!("blk.{layer}.ffn_counts");
        let counts = sidecar
            .vector(&name, hyper.n_ff)?
            .ok_or_else(|| bad(format!("there is a profile, but no `{name}`")))?;
        let shares: Vec<f32> = counts.iter().map(|n| n / n_tokens as f32).collect();
        match shares.iter().position(|share| !(0.0..=1.0).contains(share)) {
            Some(neuron) => Err(bad(format!(
                "value {neuron} of `{name}` is {}, of {n_tokens} tokens",
                counts[neuron]
            ))),
            None => Ok(shares),
        }
    };
    let by_layer: Result<_, RuntimeError> = (0..hyper.n_layer).map(layer).collect();
    Ok(Some((n_tokens, by_layer?)))
}
