//! The profile in a sidecar: how often each neuron fired on a text, and how much each can contribute.

use super::{Section, Sidecar, SidecarError};
use crate::gguf::GgufFile;

const N_TOKENS_KEY: &str = "sparse.profile.n_tokens";
const COUNTS: &str = "ffn_counts";
const DOWN_NORM: &str = "ffn_down_norm";

/// Activation counts and weight norms of all neurons.
#[derive(Debug, Clone, PartialEq)]
pub struct Profile {
    /// Tokens that were looked at.
    pub n_tokens: usize,
    /// Layers in order.
    pub layers: Vec<LayerProfile>,
}

/// One layer's part of a [`Profile`].
#[derive(Debug, Clone, PartialEq)]
pub struct LayerProfile {
    /// Tokens for which each neuron's gate was above zero, `[n_ff]`.
    pub counts: Vec<u32>,
    /// L2 norm of each neuron's down row, `[n_ff]`.
    pub down_norms: Vec<f32>,
}

impl LayerProfile {
    /// Mean share of the layer's neurons that are active for a token.
    pub fn density(&self, n_tokens: usize) -> f64 {
        self.total() as f64 / (self.counts.len() * n_tokens).max(1) as f64
    }

    /// Activations of all neurons.
    pub fn total(&self) -> u64 {
        self.counts.iter().map(|count| u64::from(*count)).sum()
    }

    /// The counts, largest first.
    pub fn descending(&self) -> Vec<u32> {
        let mut counts = self.counts.clone();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    /// Neurons that never fired.
    pub fn n_silent(&self) -> usize {
        self.counts.iter().filter(|count| **count == 0).count()
    }

    /// The smallest share of the neurons that has `share` of the activations; 0 where nothing fired.
    pub fn neurons_with(&self, share: f64) -> f64 {
        let wanted = self.total() as f64 * share;
        let mut sum = 0.0;
        for (n, count) in self.descending().into_iter().enumerate() {
            if sum >= wanted {
                return n as f64 / self.counts.len() as f64;
            }
            sum += f64::from(count);
        }
        1.0
    }
}

impl Profile {
    /// Mean share of all neurons that are active for a token.
    pub fn density(&self) -> f64 {
        let densities = self.layers.iter().map(|layer| layer.density(self.n_tokens));
        densities.sum::<f64>() / self.layers.len().max(1) as f64
    }

    /// The profile as it is written.
    ///
    /// # Errors
    /// Only for too many layers for a name.
    pub fn section(&self) -> Result<Section, SidecarError> {
        let mut section = Section::new();
        section.put(N_TOKENS_KEY, self.n_tokens as u32)?;
        for (index, layer) in self.layers.iter().enumerate() {
            // whole numbers below 2^24 are exact in f32
            let counts: Vec<f32> = layer.counts.iter().map(|count| *count as f32).collect();
            section.vector(&name(index, COUNTS), &counts)?;
            section.vector(&name(index, DOWN_NORM), &layer.down_norms)?;
        }
        Ok(section)
    }

    /// The profile in a checkpoint or sidecar, if it is there, of `n_layer` layers of `n_ff` neurons.
    ///
    /// # Errors
    /// It is not whole, or holds what no count or norm can be.
    pub fn read(
        sidecar: &Sidecar,
        n_layer: usize,
        n_ff: usize,
    ) -> Result<Option<Self>, SidecarError> {
        let metadata = sidecar.file().metadata();
        let Some(n_tokens) = metadata.get_usize(N_TOKENS_KEY)? else {
            return Ok(None);
        };
        let bad = |problem: String| SidecarError::BadKey {
            path: sidecar.path().to_owned(),
            problem,
        };
        let vector = |layer: usize, part: &str| {
            let name = name(layer, part);
            let values = sidecar.vector(&name, n_ff)?;
            let values = values.ok_or_else(|| sidecar.missing(format!("`{name}`")))?;
            match values.iter().find(|value| **value < 0.0) {
                Some(value) => Err(bad(format!("`{name}` holds {value}"))),
                None => Ok(values),
            }
        };
        let layers = (0..n_layer)
            .map(|layer| {
                let counts: Vec<u32> = vector(layer, COUNTS)?.iter().map(|c| *c as u32).collect();
                if let Some(count) = counts.iter().find(|count| **count as usize > n_tokens) {
                    let problem = format!(
                        "a neuron of layer {layer} fired {count} times in {n_tokens} tokens"
                    );
                    return Err(bad(problem));
                }
                Ok(LayerProfile {
                    counts,
                    down_norms: vector(layer, DOWN_NORM)?,
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Some(Self { n_tokens, layers }))
    }

    /// Whether a key or tensor of a sidecar is the profile's.
    pub fn owns(name: &str) -> bool {
        name.starts_with("sparse.profile.") || name.ends_with(COUNTS) || name.ends_with(DOWN_NORM)
    }

    /// Whether `file` has a profile.
    pub fn is_in(file: &GgufFile) -> bool {
        file.metadata().contains(N_TOKENS_KEY)
    }
}

fn name(layer: usize, part: &str) -> String {
    format!("blk.{layer}.{part}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_neurons_do_most() {
        let layer = LayerProfile {
            counts: vec![0, 60, 30, 10, 0],
            down_norms: vec![1.0; 5],
        };
        assert_eq!(layer.total(), 100);
        assert_eq!(layer.n_silent(), 2);
        assert_eq!(layer.descending(), [60, 30, 10, 0, 0]);
        assert_eq!(layer.neurons_with(0.5), 0.2);
        assert_eq!(layer.neurons_with(0.9), 0.4);
        assert_eq!(layer.neurons_with(1.0), 0.6);
        assert_eq!(layer.density(100), 0.2);
        let silent = LayerProfile {
            counts: vec![0; 5],
            ..layer
        };
        assert_eq!(silent.neurons_with(0.9), 0.0);
    }
}
