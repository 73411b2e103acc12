//! The rotary position embedding of a model, out of its metadata.

use pi_kernels::rope::{RopePairs, RopeScaling, RopeSpec, YarnScaling};

use super::architecture::Architecture;
use super::error::ModelError;
use super::hyperparameters::Keys;

/// Rotary position embedding, but for the Llama-3 factors, which are a tensor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// Which values turn together.
    pub pairs: RopePairs,
    /// Values of a head that turn; the others stay.
    pub n_rot: usize,
    /// Base of the frequencies.
    pub freq_base: f32,
    /// Stretching for long contexts.
    pub scaling: PositionScaling,
}

/// How angles are stretched for contexts longer than the trained one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PositionScaling {
    /// Not at all.
    None,
    /// Positions are divided by this.
    Linear(f32),
    /// Slow pairs are interpolated, fast ones kept.
    Yarn(YarnScaling),
}

impl Rope {
    /// The kernels' form, with Llama 3's divisors `[n_rot / 2]` where the model has them.
    ///
    /// # Errors
    /// [`ModelError::UnsupportedFeature`] for divisors beside another scaling.
    pub fn spec(&self, divisors: Option<Vec<f32>>) -> Result<RopeSpec, ModelError> {
        let scaling = match (divisors, self.scaling) {
            (None, PositionScaling::None) => RopeScaling::None,
            (None, PositionScaling::Linear(factor)) => RopeScaling::Linear { factor },
            (None, PositionScaling::Yarn(yarn)) => RopeScaling::Yarn(yarn),
            (Some(divisors), PositionScaling::None) => RopeScaling::Divisors { divisors },
            (Some(_), PositionScaling::Linear(factor)) => return Err(beside("linear", factor)),
            (Some(_), PositionScaling::Yarn(yarn)) => return Err(beside("yarn", yarn.factor)),
        };
        Ok(RopeSpec {
            pairs: self.pairs,
            n_dims: self.n_rot,
            freq_base: self.freq_base,
            scaling,
        })
    }

    /// Reads and checks the keys under `rope.`, for heads of `head_dim` values and a model trained
    /// (or stretched) to `n_ctx` tokens.
    pub(super) fn read(
        keys: &Keys<'_>,
        architecture: &Architecture,
        head_dim: usize,
        n_ctx: usize,
    ) -> Result<Self, ModelError> {
        let n_rot = keys.count_or("rope.dimension_count", head_dim)?;
        if n_rot > head_dim || n_rot % 2 != 0 {
            let needed = format!("it must be even and at most the head's {head_dim} values");
            return Err(keys.bad("rope.dimension_count", n_rot, needed));
        }
        Ok(Self {
            pairs: architecture.rope,
            n_rot,
            freq_base: keys.positive_or("rope.freq_base", 10_000.0)?,
            scaling: scaling(keys, n_ctx)?,
        })
    }

    /// The longest context that stretching makes of one of `n_ctx` tokens.
    pub(super) fn stretched_context(&self, n_ctx: usize) -> usize {
        match self.scaling {
            PositionScaling::Yarn(yarn) => {
                n_ctx.max((yarn.original_context as f64 * f64::from(yarn.factor)) as usize)
            }
            PositionScaling::None | PositionScaling::Linear(_) => n_ctx,
        }
    }
}

fn beside(scaling: &str, factor: f32) -> ModelError {
    ModelError::UnsupportedFeature {
        feature: "position scaling beside rope_freqs.weight",
        key: "rope.scaling.type".into(),
        value: format!("{scaling} by {factor}"),
        cure: "convert the model again",
    }
}

fn scaling(keys: &Keys<'_>, n_ctx: usize) -> Result<PositionScaling, ModelError> {
    // a factor without a type is linear; `scale_linear` is how files of 2023 wrote it
    let kind = keys.text("rope.scaling.type")?.unwrap_or("linear");
    let old_factor = keys.positive_or("rope.scale_linear", 1.0)?;
    let factor = keys.positive_or("rope.scaling.factor", old_factor)?;
    match kind {
        "none" => Ok(PositionScaling::None),
        "linear" if factor == 1.0 => Ok(PositionScaling::None),
        "linear" => Ok(PositionScaling::Linear(factor)),
        "yarn" => yarn(keys, factor, n_ctx).map(PositionScaling::Yarn),
        other => Err(ModelError::UnsupportedFeature {
            feature: "another kind of position scaling",
            key: keys.name("rope.scaling.type"),
            value: other.to_owned(),
            cure: "use a model without scaling, with linear scaling, YaRN or Llama 3's factors",
        }),
    }
}

/// YaRN's own magnitude of a rotation, `1 + 0.1 · weight · ln(factor)`.
fn magnitude(factor: f32, weight: f32) -> f32 {
    0.1 * weight * factor.ln() + 1.0
}

/// YaRN with llama.cpp's keys and defaults.
///
/// `attn_factor` multiplies YaRN's own magnitude, `yarn_log_multiplier` divides it by another one
/// (mscale_all_dim). `yarn_attn_factor`, where converters put transformers' `attention_factor`,
/// takes its place, as in transformers; llama.cpp does not read it for these architectures.
fn yarn(keys: &Keys<'_>, factor: f32, n_ctx: usize) -> Result<YarnScaling, ModelError> {
    let must = |holds: bool, key: &str, value: f32, needed: &str| match holds {
        true => Ok(()),
        false => Err(keys.bad(key, value, needed.into())),
    };
    let needed = "YaRN can only lengthen a context: it must be at least 1";
    must(factor >= 1.0, "rope.scaling.factor", factor, needed)?;
    let ext_factor = keys.number_or("rope.scaling.yarn_ext_factor", 1.0)?;
    let needed = "it must be from 0 to 1";
    must(
        (0.0..=1.0).contains(&ext_factor),
        "rope.scaling.yarn_ext_factor",
        ext_factor,
        needed,
    )?;
    let beta_fast = keys.positive_or("rope.scaling.yarn_beta_fast", 32.0)?;
    let beta_slow = keys.positive_or("rope.scaling.yarn_beta_slow", 1.0)?;
    let needed = "it must not be more than yarn_beta_fast";
    must(
        beta_slow <= beta_fast,
        "rope.scaling.yarn_beta_slow",
        beta_slow,
        needed,
    )?;
    let log_multiplier = keys.number_or("rope.scaling.yarn_log_multiplier", 0.0)?;
    must(
        log_multiplier >= 0.0,
        "rope.scaling.yarn_log_multiplier",
        log_multiplier,
        "it must not be negative",
    )?;
    // the kernel multiplies its own magnitude in, unless nothing is extrapolated
    let own = if ext_factor == 0.0 {
        1.0
    } else {
        magnitude(factor, 1.0)
    };
    let usual = if ext_factor == 0.0 {
        1.0
    } else {
        own / magnitude(factor, log_multiplier)
    };
    let wanted = keys.positive_or("rope.scaling.yarn_attn_factor", usual)?;
    Ok(YarnScaling {
        ext_factor,
        attn_factor: keys.positive_or("rope.scaling.attn_factor", 1.0)? * (wanted / own),
        beta_fast,
        beta_slow,
        ..YarnScaling::new(
            factor,
            keys.count_or("rope.scaling.original_context_length", n_ctx)?,
        )
    })
}
