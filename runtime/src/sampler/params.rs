//! The samplers' parameters: llama.cpp's names, defaults and effects, with checked ranges.

use std::fmt;
use std::str::FromStr;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// The longest window of the penalties, tokens.
pub(super) const REPEAT_LAST_N_MAX: i32 = 1 << 20;

/// Why sampling parameters were refused.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum SamplerError {
    /// A value outside its range.
    #[error("{flag} {value} is out of range: give {range}")]
    OutOfRange {
        /// The flag, with its dashes.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What may be given, in words.
        range: &'static str,
    },
    /// A logit bias for a token that the model does not have.
    #[error(
        "--logit-bias names token {id}, but the model has {n_vocab} tokens: give an id from 0 to {}",
        n_vocab - 1
    )]
    BiasOutsideVocabulary {
        /// The token.
        id: u32,
        /// Tokens in the vocabulary.
        n_vocab: usize,
    },
    /// A logit bias that is not `ID+BIAS` or `ID-BIAS`.
    #[error(
        "--logit-bias {text:?} is not a token id followed by a signed number: write it as 15043+1.5 \
         or 15043-1.5, or 15043-inf to forbid the token"
    )]
    BiasSyntax {
        /// What was given.
        text: String,
    },
}

/// A constant added to one token's logit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogitBias {
    /// Token id.
    pub id: u32,
    /// What is added; −∞ forbids the token.
    pub bias: f32,
}

impl FromStr for LogitBias {
    type Err = SamplerError;

    fn from_str(text: &str) -> Result<Self, SamplerError> {
        let syntax = || SamplerError::BiasSyntax {
            text: text.to_owned(),
        };
        let sign_at = text.find(['+', '-']).ok_or_else(syntax)?;
        let (id, bias) = text.split_at(sign_at);
        let id = id.parse().map_err(|_| syntax())?;
        let bias: f32 = bias.parse().map_err(|_| syntax())?;
        let parsed = Self { id, bias };
        if !parsed.is_valid() {
            return Err(syntax());
        }
        Ok(parsed)
    }
}

impl LogitBias {
    /// Whether it is a finite number, or −∞.
    fn is_valid(self) -> bool {
        self.bias < f32::INFINITY
    }
}

impl TryFrom<String> for LogitBias {
    type Error = SamplerError;

    fn try_from(text: String) -> Result<Self, SamplerError> {
        text.parse()
    }
}

impl From<LogitBias> for String {
    fn from(bias: LogitBias) -> Self {
        bias.to_string()
    }
}

impl fmt::Display for LogitBias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:+}", self.id, self.bias)
    }
}

/// What the chain of samplers does; the defaults are llama.cpp's.
///
/// As `clap` arguments it can be flattened into a command; as `serde` data it can be read from a
/// request. Either way [`SamplerParams::validate`] says what is out of range.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Choice of tokens")]
pub struct SamplerParams {
    /// Temperature; 0: always the likeliest token
    #[arg(
        long,
        alias = "temperature",
        value_name = "T",
        default_value_t = 0.8,
        allow_negative_numbers = true
    )]
    pub temp: f32,
    /// Sample among the K likeliest tokens; 0: all
    #[arg(
        long,
        value_name = "K",
        default_value_t = 40,
        allow_negative_numbers = true
    )]
    pub top_k: i32,
    /// Sample among the likeliest tokens that make up this probability; 1: all
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.95,
        allow_negative_numbers = true
    )]
    pub top_p: f32,
    /// Leave out tokens less likely than this share of the likeliest; 0: none
    #[arg(
        long,
        value_name = "P",
        default_value_t = 0.05,
        allow_negative_numbers = true
    )]
    pub min_p: f32,
    /// Sample among the most typical tokens that make up this probability; 1: all
    #[arg(
        long,
        alias = "typical-p",
        value_name = "P",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub typical: f32,
    /// Divide the logits of recent tokens by this (multiply, where negative); 1: off
    #[arg(
        long,
        value_name = "X",
        default_value_t = 1.0,
        allow_negative_numbers = true
    )]
    pub repeat_penalty: f32,
    /// How many tokens back the penalties look; 0: off, -1: as many as the context has
    #[arg(
        long,
        value_name = "N",
        default_value_t = 64,
        allow_negative_numbers = true
    )]
    pub repeat_last_n: i32,
    /// Subtract this from the logit of every recent token; 0: off
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub presence_penalty: f32,
    /// Subtract this from the logit of a recent token for each time it occurred; 0: off
    #[arg(
        long,
        value_name = "X",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub frequency_penalty: f32,
    /// Add a number to a token's logit: 15043+1.5, 15043-1.5, or 15043-inf; may be repeated
    #[arg(short = 'l', long, value_name = "ID±X")]
    pub logit_bias: Vec<LogitBias>,
    /// Seed of the random numbers; -1 or none: a new one each time
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    pub seed: Option<i64>,
}

impl Default for SamplerParams {
    fn default() -> Self {
        Self {
            temp: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.05,
            typical: 1.0,
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
        }
    }
}

impl SamplerParams {
    /// The parameters that always choose the likeliest token.
    pub fn greedy() -> Self {
        Self {
            temp: 0.0,
            ..Self::default()
        }
    }

    /// Makes "the whole context" a number, for a context of `n_ctx` tokens.
    pub fn in_context(mut self, n_ctx: usize) -> Self {
        if self.repeat_last_n < 0 {
            let n_ctx = i32::try_from(n_ctx).unwrap_or(REPEAT_LAST_N_MAX);
            self.repeat_last_n = n_ctx.min(REPEAT_LAST_N_MAX);
        }
        self
    }

    /// Checks every value's range.
    ///
    /// # Errors
    /// The first value that is out of range, with its flag and what may be given.
    pub fn validate(&self) -> Result<(), SamplerError> {
        let share = "a number from 0 to 1";
        check("--temp", self.temp, "0 or a positive number", |v| v >= 0.0)?;
        check("--top-p", self.top_p, share, is_share)?;
        check("--min-p", self.min_p, share, is_share)?;
        check("--typical", self.typical, share, is_share)?;
        check(
            "--repeat-penalty",
            self.repeat_penalty,
            "a positive number",
            |v| v > 0.0 && v.recip().is_finite(),
        )?;
        check(
            "--presence-penalty",
            self.presence_penalty,
            "a finite number",
            |_| true,
        )?;
        check(
            "--frequency-penalty",
            self.frequency_penalty,
            "a finite number",
            |_| true,
        )?;
        // the command line cannot give these, other callers can
        if let Some(bias) = self.logit_bias.iter().find(|bias| !bias.is_valid()) {
            return Err(SamplerError::BiasSyntax {
                text: bias.to_string(),
            });
        }
        let refused =
            |flag, value: String, range| Err(SamplerError::OutOfRange { flag, value, range });
        if self.top_k < -1 {
            let range = "a whole number from 0 (0: all tokens)";
            return refused("--top-k", self.top_k.to_string(), range);
        }
        if !(-1..=REPEAT_LAST_N_MAX).contains(&self.repeat_last_n) {
            let range = "a whole number from 0 to 1048576 (-1: the whole context)";
            return refused("--repeat-last-n", self.repeat_last_n.to_string(), range);
        }
        if self
            .seed
            .is_some_and(|seed| seed < -1 || seed > i64::from(u32::MAX))
        {
            let value = self.seed.unwrap_or_default().to_string();
            return refused(
                "--seed",
                value,
                "a whole number from 0 to 4294967295 (-1: a new one)",
            );
        }
        Ok(())
    }

    /// Checks that every logit bias names a token below `n_vocab`.
    ///
    /// # Errors
    /// The first that does not.
    pub fn validate_biases(&self, n_vocab: usize) -> Result<(), SamplerError> {
        match self
            .logit_bias
            .iter()
            .find(|bias| bias.id as usize >= n_vocab)
        {
            Some(bias) => Err(SamplerError::BiasOutsideVocabulary {
                id: bias.id,
                n_vocab,
            }),
            None => Ok(()),
        }
    }

    /// Whether the chain always ends at the highest (adjusted) logit, whatever else is set.
    ///
    /// Top-k, top-p and min-p keep the highest; typical may not.
    pub fn is_greedy(&self) -> bool {
        self.temp <= 0.0 && self.typical >= 1.0
    }

    /// Whether penalties have an effect.
    pub(super) fn penalises(&self) -> bool {
        self.repeat_last_n != 0
            && (self.repeat_penalty != 1.0
                || self.presence_penalty != 0.0
                || self.frequency_penalty != 0.0)
    }

    /// Whether anything changes single tokens' logits.
    pub(super) fn adjusts_logits(&self) -> bool {
        self.penalises() || !self.logit_bias.is_empty()
    }

    /// The seed to start from: the given one, or one drawn from the clock and the process id.
    pub(super) fn resolve_seed(&self) -> u32 {
        if let Some(seed) = self.seed.and_then(|seed| u32::try_from(seed).ok()) {
            return seed;
        }
        let now_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos() as u64);
        let mixed = (now_ns ^ u64::from(std::process::id()).rotate_left(40))
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 32) as u32
    }
}

fn is_share(value: f32) -> bool {
    (0.0..=1.0).contains(&value)
}

/// Errors unless `value` is finite and `holds`.
fn check(
    flag: &'static str,
    value: f32,
    range: &'static str,
    holds: impl Fn(f32) -> bool,
) -> Result<(), SamplerError> {
    if value.is_finite() && holds(value) {
        return Ok(());
    }
    Err(SamplerError::OutOfRange {
        flag,
        value: value.to_string(),
        range,
    })
}
