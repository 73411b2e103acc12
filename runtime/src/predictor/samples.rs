//! What a layer was seen to do: the material that predictors are fitted to.

use std::ops::Range;

use super::error::PredictorError;
use super::thresholds::Masses;

/// Tokens kept back for thresholds: every this-many-th part, at the end.
const CALIBRATION_PART: usize = 4;

/// What one layer's feed-forward network saw and did on a text, token after token.
#[derive(Debug, Clone, Default)]
pub struct LayerSamples {
    /// Tokens.
    pub n_tokens: usize,
    /// Values of a token's hidden state.
    pub n_embd: usize,
    /// Neurons of the layer.
    pub n_ff: usize,
    /// `[n_tokens, n_embd]` the layer's normed input, as its gates read it.
    pub x: Vec<f32>,
    /// `[n_tokens, n_embd]` the residual stream of the layer before, after its attention, over its RMS.
    pub residual_before: Option<Vec<f32>>,
    /// `[n_tokens, n_ff]` the gates before their activation function.
    pub gates: Vec<f32>,
    /// `[n_tokens, n_ff]` what each neuron adds to the output: |relu(gate) · up| · ‖down row‖.
    pub contributions: Vec<f32>,
}

impl LayerSamples {
    /// Checks lengths and values.
    ///
    /// # Errors
    /// A value that is not finite, a negative contribution, or fewer than 64 tokens.
    ///
    /// # Panics
    /// When a list has another length than its shape says.
    pub fn check(&self) -> Result<(), PredictorError> {
        const N_TOKENS_MIN: usize = 64;
        let (hidden, neurons) = (self.n_tokens * self.n_embd, self.n_tokens * self.n_ff);
        assert_eq!(self.x.len(), hidden, "x is [n_tokens, n_embd]");
        assert_eq!(self.gates.len(), neurons, "gates are [n_tokens, n_ff]");
        assert_eq!(
            self.contributions.len(),
            neurons,
            "contributions are [n_tokens, n_ff]"
        );
        let residual = self.residual_before.as_deref();
        if let Some(residual) = residual {
            assert_eq!(residual.len(), hidden, "residual is [n_tokens, n_embd]");
        }
        if self.n_tokens < N_TOKENS_MIN {
            return Err(PredictorError::TooFewTokens {
                n_tokens: self.n_tokens,
                n_tokens_min: N_TOKENS_MIN,
            });
        }
        let lists = [
            ("normed input", &self.x[..]),
            ("residual stream", residual.unwrap_or(&[])),
            ("gates", &self.gates),
            ("contributions", &self.contributions),
        ];
        for (what, values) in lists {
            if !values.iter().all(|value| value.is_finite()) {
                return Err(PredictorError::NotFinite { what });
            }
        }
        if self.contributions.iter().any(|value| *value < 0.0) {
            return Err(PredictorError::NotFinite {
                what: "contributions (one is negative)",
            });
        }
        Ok(())
    }

    /// The tokens that matrices are fitted to: the first three quarters.
    pub fn fitting(&self) -> Range<usize> {
        0..self.n_tokens - self.n_tokens / CALIBRATION_PART
    }

    /// The tokens that thresholds are fitted to, which the matrices have not seen.
    pub fn calibrating(&self) -> Range<usize> {
        self.fitting().end..self.n_tokens
    }

    /// `[tokens.len(), n_embd]` normed inputs.
    pub fn x(&self, tokens: Range<usize>) -> &[f32] {
        rows(&self.x, self.n_embd, tokens)
    }

    /// `[tokens.len(), n_embd]` residual streams of the layer before, where they were collected.
    pub fn residual(&self, tokens: Range<usize>) -> Option<&[f32]> {
        let residual = self.residual_before.as_deref()?;
        Some(rows(residual, self.n_embd, tokens))
    }

    /// `[tokens.len(), n_ff]` gates.
    pub fn gates(&self, tokens: Range<usize>) -> &[f32] {
        rows(&self.gates, self.n_ff, tokens)
    }

    /// Gates and shares of mass of `tokens`.
    pub fn masses(&self, tokens: Range<usize>) -> Masses<'_> {
        let contributions = rows(&self.contributions, self.n_ff, tokens.clone());
        Masses::new(self.gates(tokens), contributions, self.n_ff)
    }
}

fn rows(values: &[f32], n_cols: usize, tokens: Range<usize>) -> &[f32] {
    &values[tokens.start * n_cols..tokens.end * n_cols]
}
