//! Perplexity of a text, chunked and scored exactly as llama.cpp's `llama-perplexity` does.
//!
//! The text's tokens are cut into chunks of `n_ctx`; each chunk starts with an empty context (its first token replaced
//! by the begin-of-text token where the model wants one), and the tokens of its second half are scored.

mod scorer;

use thiserror::Error;

pub use scorer::{ChunkScorer, Report};

/// Why a text cannot be scored.
#[derive(Debug, Error, PartialEq)]
pub enum PerplexityError {
    /// Fewer tokens than two chunks.
    #[error(
        "the text has {n_tokens} tokens, but chunks of {n_ctx} need at least {}: give a longer text with -f or smaller chunks with -c",
        2 * n_ctx
    )]
    TextTooShort {
        /// Tokens of the text.
        n_tokens: usize,
        /// Tokens of a chunk.
        n_ctx: usize,
    },
    /// Scores of which no error can be told.
    #[error(
        "{n_scored} tokens are scored with a perplexity of {ppl:.4}: too few, or no numbers, to tell its error; \
         raise -c or --chunks, or check the model"
    )]
    NoEstimate {
        /// Tokens scored.
        n_scored: usize,
        /// Their perplexity.
        ppl: f64,
    },
}

/// A text's tokens, cut into chunks.
#[derive(Debug, Clone)]
pub struct Chunks {
    tokens: Vec<u32>,
    n_ctx: usize,
    n_chunks: usize,
    bos: Option<u32>,
}

impl Chunks {
    /// Cuts `tokens` into chunks of `n_ctx`, at most `limit` of them; `bos` replaces each chunk's first token.
    ///
    /// # Errors
    /// [`PerplexityError::TextTooShort`], as llama.cpp refuses it.
    pub fn new(
        tokens: Vec<u32>,
        n_ctx: usize,
        limit: Option<usize>,
        bos: Option<u32>,
    ) -> Result<Self, PerplexityError> {
        if tokens.len() < 2 * n_ctx {
            return Err(PerplexityError::TextTooShort {
                n_tokens: tokens.len(),
                n_ctx,
            });
        }
        let whole = tokens.len() / n_ctx;
        Ok(Self {
            n_chunks: limit.map_or(whole, |limit| limit.min(whole)),
            tokens,
            n_ctx,
            bos,
        })
    }

    /// Tokens of a chunk.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Number of chunks.
    pub fn len(&self) -> usize {
        self.n_chunks
    }

    /// Whether there is nothing to score.
    pub fn is_empty(&self) -> bool {
        self.n_chunks == 0
    }

    /// First position of a chunk whose logits are scored, against the token after it.
    pub fn first_scored(&self) -> usize {
        self.n_ctx / 2
    }

    /// What to feed for chunk `index`: `n_ctx` tokens.
    pub fn fed(&self, index: usize) -> Vec<u32> {
        let mut tokens = self.tokens[index * self.n_ctx..(index + 1) * self.n_ctx].to_vec();
        if let Some(bos) = self.bos {
            tokens[0] = bos;
        }
        tokens
    }
}

/// Running sums of the negative log-likelihoods.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    nll: f64,
    nll_squared: f64,
    count: usize,
}

/// A finished score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// Perplexity.
    pub ppl: f64,
    /// Its standard error.
    pub error: f64,
}

impl Score {
    /// Scores one position: `logits` `[n_vocab]` against the token that follows.
    pub fn add(&mut self, logits: &[f32], next: u32) {
        let nll = -log_softmax(logits, next);
        self.nll += nll;
        self.nll_squared += nll * nll;
        self.count += 1;
    }

    /// Tokens scored.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Perplexity so far; NaN before the first token.
    pub fn ppl(&self) -> f64 {
        (self.nll / self.count as f64).exp()
    }

    /// Perplexity and its standard error.
    ///
    /// # Errors
    /// [`PerplexityError::NoEstimate`] where the error cannot be told.
    pub fn estimate(&self) -> Result<Estimate, PerplexityError> {
        let count = self.count as f64;
        let mean = self.nll / count;
        let variance = self.nll_squared / count - mean * mean;
        let ppl = mean.exp();
        let error = (variance / (count - 1.0)).sqrt() * ppl;
        if variance > 0.0 && error.is_finite() {
            return Ok(Estimate { ppl, error });
        }
        Err(PerplexityError::NoEstimate {
            n_scored: self.count,
            ppl,
        })
    }
}

impl std::fmt::Display for Estimate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Final estimate: PPL = {:.4} +/- {:.5}",
            self.ppl, self.error
        )
    }
}

/// Log-probability of `token`: exponentials in f32, their sum in f64, as llama.cpp does.
pub(crate) fn log_softmax(logits: &[f32], token: u32) -> f64 {
    let (max, log_sum) = normaliser(logits);
    f64::from(logits[token as usize] - max) - log_sum
}

/// What a token's log-probability is less than its logit.
pub(crate) fn log_normaliser(logits: &[f32]) -> f64 {
    let (max, log_sum) = normaliser(logits);
    f64::from(max) + log_sum
}

/// The greatest logit, and the logarithm of the sum of exponentials of what the others are less.
fn normaliser(logits: &[f32]) -> (f32, f64) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from((logit - max).exp()))
        .sum();
    (max, sum.ln())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_whole_and_start_with_bos() {
        let chunks = Chunks::new((0..23).collect(), 5, None, Some(99)).unwrap();
        assert_eq!(chunks.len(), 4);
        assert_eq!(chunks.first_scored(), 2);
        assert_eq!(chunks.fed(0), [99, 1, 2, 3, 4]);
        assert_eq!(chunks.fed(3), [99, 16, 17, 18, 19]);
        let limited = Chunks::new((0..23).collect(), 5, Some(2), None).unwrap();
        assert_eq!((limited.len(), limited.fed(1)), (2, vec![5, 6, 7, 8, 9]));
    }

    #[test]
    fn short_text_is_refused_with_what_is_needed() {
        let error = Chunks::new(vec![0; 9], 5, None, None).unwrap_err();
        assert!(
            error.to_string().contains("9 tokens") && error.to_string().contains("at least 10"),
            "{error}"
        );
    }

    #[test]
    fn uniform_logits_have_the_vocabulary_as_perplexity() {
        let mut score = Score::default();
        for token in 0..8 {
            score.add(&[1.5; 8], token);
        }
        assert!((score.ppl() - 8.0).abs() < 1e-9);
    }

    #[test]
    fn too_few_scores_have_no_error() {
        let mut score = Score::default();
        assert!(score.estimate().is_err());
        score.add(&[0.0, 0.0], 0);
        let error = score.estimate().unwrap_err().to_string();
        assert!(
            error.contains("1 tokens") && error.contains("2.0000"),
            "{error}"
        );
        score.add(&[f32::NAN, 0.0], 0);
        assert!(score.estimate().is_err());
    }

    #[test]
    fn estimate_has_llama_cpp_s_error_and_wording() {
        // two tokens of probability 1/2 and 1/4: mean nll 1.5 ln 2, variance (ln 2 / 2)²
        let mut score = Score::default();
        score.add(&[0.0, 0.0], 0);
        score.add(&[0.0, 3f32.ln()], 0);
        let estimate = score.estimate().unwrap();
        let ppl = 2f64.powf(1.5);
        assert!(
            (estimate.ppl - ppl).abs() < 1e-6
                && (estimate.error - ppl * 2f64.ln() / 2.0).abs() < 1e-6
        );
        assert_eq!(
            estimate.to_string(),
            "Final estimate: PPL = 2.8284 +/- 0.98026"
        );
    }
}
