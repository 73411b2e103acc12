//! Choosing the next token from its logits.
//!
//! The chain has llama.cpp's samplers, in llama.cpp's order and with the same effect:
//! logit bias → penalties → top-k → typical → top-p → min-p → temperature → draw.
//! One file per family. Nothing here allocates after [`Sampler::new`].

mod candidates;
mod greedy;
mod logit_bias;
mod params;
mod penalties;
mod rng;
mod temperature;
mod truncation;
mod typical;

pub use candidates::{Candidate, Candidates};
pub use greedy::argmax;
pub use params::{LogitBias, SamplerError, SamplerParams};
pub use rng::Mt19937;

use penalties::Penalties;

/// Chooses tokens: holds the parameters, the last tokens, the random numbers and the buffers.
///
/// One per generated sequence.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplerParams,
    penalties: Penalties,
    rng: Mt19937,
    seed: u32,
    candidates: Candidates,
    adjusted: Vec<f32>,
    /// The parameters' logit biases, as a sparse head takes them.
    biases: Vec<(u32, f32)>,
}

impl Sampler {
    /// Builds the chain for a vocabulary of `n_vocab` tokens.
    ///
    /// Without a seed one is drawn here; [`Sampler::seed`] tells which.
    ///
    /// # Errors
    /// A parameter out of its range, or a logit bias for a token outside the vocabulary.
    pub fn new(params: SamplerParams, n_vocab: usize) -> Result<Self, SamplerError> {
        params.validate()?;
        params.validate_biases(n_vocab)?;
        let seed = params.resolve_seed();
        let greedy = params.is_greedy();
        let n_candidates = if greedy { 0 } else { n_vocab };
        let n_adjusted = if greedy && params.adjusts_logits() {
            n_vocab
        } else {
            0
        };
        Ok(Self {
            penalties: Penalties::new(&params, n_vocab),
            rng: Mt19937::new(seed),
            seed,
            candidates: Candidates::with_capacity(n_candidates),
            adjusted: vec![0.0; n_adjusted],
            biases: (params.logit_bias.iter())
                .map(|bias| (bias.id, bias.bias))
                .collect(),
            params,
        })
    }

    /// The seed in use, drawn or given.
    pub fn seed(&self) -> u32 {
        self.seed
    }

    /// The parameters that the chain was built from.
    pub fn params(&self) -> &SamplerParams {
        &self.params
    }

    /// Chooses a token from `logits` (f32, `[n_vocab]`) and returns its id.
    ///
    /// Does not record it: call [`Sampler::accept`] with every token that enters the sequence.
    /// Logits that are NaN are never chosen while another is there.
    ///
    /// # Panics
    /// When `logits` is empty, or its length is not the `n_vocab` of the constructor.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        self.sample_from(None, logits)
    }

    /// As [`Sampler::sample`] where only the tokens `ids`, which ascend, can be chosen, and `logits` (f32, `[ids.len()]`)
    /// are theirs.
    ///
    /// # Panics
    /// When there are none, or more than `n_vocab`, or lengths differ.
    pub fn sample_candidates(&mut self, ids: &[u32], logits: &[f32]) -> u32 {
        assert_eq!(ids.len(), logits.len(), "a logit for each token");
        self.sample_from(Some(ids), logits)
    }

    fn sample_from(&mut self, ids: Option<&[u32]>, logits: &[f32]) -> u32 {
        assert!(!logits.is_empty(), "no logits to sample from");
        if self.params.is_greedy() {
            return self.sample_greedy(ids, logits);
        }
        self.filter(ids, logits);
        temperature::draw(&mut self.candidates, &mut self.rng)
    }

    /// What a token would be drawn from: those that can still be chosen, with their probabilities. `ids` and `logits` as
    /// in [`Sampler::sample_candidates`]; without ids as in [`Sampler::sample`]. Draws no random number.
    ///
    /// # Panics
    /// As these, or when the parameters always choose the likeliest token.
    pub fn distribution(&mut self, ids: Option<&[u32]>, logits: &[f32]) -> &[Candidate] {
        assert!(!self.params.is_greedy(), "nothing is drawn");
        self.filter(ids, logits);
        self.candidates.softmax();
        self.candidates.items()
    }

    /// What is added to tokens' logits, by token.
    pub fn biases(&self) -> &[(u32, f32)] {
        &self.biases
    }

    /// All of the chain but the draw.
    fn filter(&mut self, ids: Option<&[u32]>, logits: &[f32]) {
        let candidates = &mut self.candidates;
        match ids {
            None => candidates.fill(logits),
            Some(ids) => candidates.fill_some(ids, logits),
        }
        logit_bias::apply(candidates, &self.params.logit_bias);
        self.penalties.apply(candidates);
        truncation::top_k(candidates, self.params.top_k.max(0) as usize);
        typical::typical(candidates, self.params.typical);
        truncation::top_p(candidates, self.params.top_p);
        truncation::min_p(candidates, self.params.min_p);
        temperature::temperature(candidates, self.params.temp);
    }

    /// Records a token of the sequence, prompt or generated, for the penalties.
    pub fn accept(&mut self, id: u32) {
        self.penalties.accept(id);
    }

    /// Forgets the accepted tokens and starts the random numbers anew from the same seed.
    pub fn reset(&mut self) {
        self.penalties.reset();
        self.rng = Mt19937::new(self.seed);
    }

    fn sample_greedy(&mut self, ids: Option<&[u32]>, logits: &[f32]) -> u32 {
        let best = |logits: &[f32]| {
            let best = argmax(logits);
            ids.map_or(best, |ids| ids[best as usize])
        };
        if !self.params.adjusts_logits() {
            return best(logits);
        }
        let adjusted = &mut self.adjusted[..logits.len()];
        adjusted.copy_from_slice(logits);
        match ids {
            None => {
                logit_bias::apply(adjusted, &self.params.logit_bias);
                self.penalties.apply(adjusted);
            }
            Some(ids) => {
                let logits = &mut *adjusted;
                let mut some = logit_bias::SomeLogits { ids, logits };
                logit_bias::apply(&mut some, &self.params.logit_bias);
                self.penalties.apply(&mut some);
            }
        }
        best(adjusted)
    }
}

#[cfg(test)]
mod llama_cpp_tests;
#[cfg(test)]
mod tests;
