//! What is asked for: sizes, type and activity of a synthetic model.

use pi_kernels::QuantType;

use super::blocks::unit_values;
use super::error::SynthError;
use super::recency::Recency;
use super::vocabulary::N_VOCAB;

/// Most layers, neurons and the like that are taken.
const MAX_COUNT: usize = 1 << 20;
/// Fewest values of a head that the planted attention fits into.
const HEAD_DIM_MIN: usize = 32;
/// Fewest channels that change: the planted sums are normal only over many values.
const N_CHANGING_MIN: usize = 96;

/// Sizes of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SynthShape {
    /// Layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Neurons of a layer.
    pub n_ff: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads.
    pub n_head_kv: usize,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Context that the model states.
    pub n_ctx: usize,
    /// Base of the rotary embedding's angles.
    pub rope_base: f64,
}

/// A real model's sizes by name.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// The name.
    pub name: &'static str,
    /// Whose sizes they are.
    pub what: &'static str,
    /// The sizes.
    pub shape: SynthShape,
}

const fn preset(
    name: &'static str,
    what: &'static str,
    [n_layer, n_embd, n_ff, n_head, n_head_kv, n_vocab, n_ctx]: [usize; 7],
    rope_base: f64,
) -> Preset {
    Preset {
        name,
        what,
        shape: SynthShape {
            n_layer,
            n_embd,
            n_ff,
            n_head,
            n_head_kv,
            n_vocab,
            n_ctx,
            rope_base,
        },
    }
}

/// All presets; the first is the default.
pub const PRESETS: [Preset; 6] = [
    preset(
        "2b",
        "a small model",
        [32, 2048, 8192, 32, 8, 32000, 4096],
        1e4,
    ),
    preset(
        "7b",
        "Llama 2 7B",
        [32, 4096, 11008, 32, 32, 32000, 4096],
        1e4,
    ),
    preset(
        "13b",
        "Llama 2 13B",
        [40, 5120, 13824, 40, 40, 32000, 4096],
        1e4,
    ),
    preset(
        "34b",
        "Code Llama 34B",
        [48, 8192, 22016, 64, 8, 32000, 16384],
        1e6,
    ),
    preset(
        "70b",
        "Llama 2 70B",
        [80, 8192, 28672, 64, 8, 32000, 4096],
        1e4,
    ),
    // Falcon's block has two matrices of 4 · n_embd in the FFN and attention beside it; here it is a llama's
    preset(
        "falcon-40b",
        "sizes of Falcon 40B in a llama's layers",
        [60, 8192, 32768, 128, 8, 65024, 2048],
        1e4,
    ),
];

/// A model to be made.
#[derive(Debug, Clone, PartialEq)]
pub struct SynthOptions {
    /// `general.name`
    pub name: String,
    /// Its sizes.
    pub shape: SynthShape,
    /// Type of all matrices.
    pub quant: QuantType,
    /// Share of the neurons that fire, the mean over tokens and neurons.
    pub active: f64,
    /// How much the neurons' frequencies differ: the neuron one standard deviation above the median one fires about
    /// e^skew times as often.
    pub skew: f64,
    /// Other numbers for another seed.
    pub seed: u64,
}

fn refused(flag: &'static str, value: impl ToString, problem: impl Into<String>) -> SynthError {
    SynthError::Shape {
        flag,
        value: value.to_string(),
        problem: problem.into(),
    }
}

impl SynthOptions {
    /// Checks that such a model can be made.
    ///
    /// # Errors
    /// [`SynthError::Shape`] with the first flag that has to be changed.
    pub fn check(&self) -> Result<(), SynthError> {
        self.check_counts()?;
        self.check_heads()?;
        self.check_blocks()?;
        if !(0.005..=0.6).contains(&self.active) {
            return Err(refused(
                "--active",
                self.active,
                "give a share from 0.005 to 0.6",
            ));
        }
        if !(0.1..=5.0).contains(&self.skew) {
            return Err(refused("--skew", self.skew, "give a number from 0.1 to 5"));
        }
        Ok(())
    }

    fn check_counts(&self) -> Result<(), SynthError> {
        let shape = &self.shape;
        for (flag, value, low, high) in [
            ("--layers", shape.n_layer, 1, 10_000),
            ("--embd", shape.n_embd, 1, MAX_COUNT),
            ("--ff", shape.n_ff, 64, MAX_COUNT),
            ("--heads", shape.n_head, 1, MAX_COUNT),
            ("--kv-heads", shape.n_head_kv, 1, MAX_COUNT),
            ("--vocab", shape.n_vocab, *N_VOCAB.start(), *N_VOCAB.end()),
            ("--ctx", shape.n_ctx, 16, MAX_COUNT),
        ] {
            if !(low..=high).contains(&value) {
                return Err(refused(
                    flag,
                    value,
                    format!("give a number from {low} to {high}"),
                ));
            }
        }
        if !shape.n_ff.is_multiple_of(32) {
            return Err(refused("--ff", shape.n_ff, "give a multiple of 32"));
        }
        Ok(())
    }

    fn check_heads(&self) -> Result<(), SynthError> {
        let SynthShape {
            n_embd,
            n_head,
            n_head_kv,
            ..
        } = self.shape;
        if !n_embd.is_multiple_of(2 * n_head) {
            let problem = format!("heads have to divide --embd {n_embd} into even parts");
            return Err(refused("--heads", n_head, problem));
        }
        if !n_head.is_multiple_of(n_head_kv) {
            let problem = format!("key and value heads have to divide the {n_head} query heads");
            return Err(refused("--kv-heads", n_head_kv, problem));
        }
        let head_dim = n_embd / n_head;
        if head_dim < HEAD_DIM_MIN || self.recency().is_none() {
            let problem = format!(
                "a head would have {head_dim} values: at least {HEAD_DIM_MIN} are needed, so give at most {} heads",
                n_embd / HEAD_DIM_MIN
            );
            return Err(refused("--heads", n_head, problem));
        }
        Ok(())
    }

    fn check_blocks(&self) -> Result<(), SynthError> {
        let (n_embd, quant) = (self.shape.n_embd, self.quant);
        let block = quant.block_values();
        if !n_embd.is_multiple_of(block.max(32)) {
            let problem = format!(
                "rows have to be whole {} blocks: give a multiple of {}",
                quant.name(),
                block.max(32)
            );
            return Err(refused("--embd", n_embd, problem));
        }
        // two blocks at least, or all neurons would have the same few patterns
        let least = unit_values(quant) + N_CHANGING_MIN.max(2 * block);
        if n_embd < least {
            let problem = format!("{} rows need at least {least} values", quant.name());
            return Err(refused("--embd", n_embd, problem));
        }
        Ok(())
    }

    pub(super) fn recency(&self) -> Option<Recency> {
        Recency::new(self.shape.n_embd / self.shape.n_head, self.shape.rope_base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn presets_can_be_made_and_bad_shapes_are_refused_by_flag() {
        let options = |shape| SynthOptions {
            name: "test".into(),
            shape,
            quant: QuantType::Q4_0,
            active: 0.1,
            skew: 2.4,
            seed: 1,
        };
        for preset in PRESETS {
            options(preset.shape).check().unwrap();
        }
        let good = PRESETS[0].shape;
        for (flag, bad) in [
            (
                "--embd",
                SynthShape {
                    n_embd: 2080,
                    n_head: 5,
                    n_head_kv: 5,
                    ..good
                },
            ),
            ("--heads", SynthShape { n_head: 33, ..good }),
            (
                "--heads",
                SynthShape {
                    n_head: 128,
                    ..good
                },
            ),
            (
                "--kv-heads",
                SynthShape {
                    n_head_kv: 5,
                    ..good
                },
            ),
            ("--ff", SynthShape { n_ff: 100, ..good }),
            ("--layers", SynthShape { n_layer: 0, ..good }),
            ("--vocab", SynthShape { n_vocab: 7, ..good }),
        ] {
            let quant = QuantType::Q4_K;
            let refused = SynthOptions {
                quant,
                ..options(bad)
            }
            .check()
            .unwrap_err();
            assert!(refused.to_string().starts_with(flag), "{refused}");
        }
    }
}
