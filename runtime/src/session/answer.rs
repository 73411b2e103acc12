//! Answers one after another on one cache: what a prompt shares with what was fed before is not fed again.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pi_actors::counters::RunTotals;

use super::generation::{ContextShift, Finished, Generation, GenerationOptions, TextSink};
use super::opening::LoadedModel;
use crate::chat::common_prefix;
use crate::error::RuntimeError;
use crate::head_sketch::Head;
use crate::sampler::{LogitBias, Sampler, SamplerParams};

/// A model and what its cache holds.
#[derive(Debug)]
pub struct Session {
    model: LoadedModel,
    /// Tokens in the cache, by position.
    cached: Vec<u32>,
}

/// What an answer is made with.
pub struct AnswerOptions {
    /// Choice of each token.
    pub sampler: SamplerParams,
    /// Tokens at most; none: until something else stops it.
    pub n_predict: Option<usize>,
    /// Whether tokens that end a text are never chosen.
    pub ignore_eos: bool,
    /// What to do when the context is full; none: the answer ends.
    pub shift: Option<ContextShift>,
    /// Texts that end the answer where it comes to them; none of them is empty.
    pub stop_texts: Vec<String>,
    /// Whether to hash all logits.
    pub hash_logits: bool,
    /// Set by Ctrl-C.
    pub interrupt: Arc<AtomicBool>,
    /// Where the text goes.
    pub sink: TextSink,
}

/// An answer and the work that it took.
#[derive(Debug)]
pub struct Answer {
    /// Text, tokens and times.
    pub finished: Finished,
    /// What was read and computed.
    pub totals: RunTotals,
}

impl Session {
    /// A session with an empty cache.
    pub fn new(model: LoadedModel) -> Self {
        Self {
            model,
            cached: Vec::new(),
        }
    }

    /// The model.
    pub fn model(&self) -> &LoadedModel {
        &self.model
    }

    /// Checks that a prompt can be answered.
    ///
    /// # Errors
    /// It is empty, or longer than the context.
    pub fn check(&self, prompt: &[u32]) -> Result<(), RuntimeError> {
        if prompt.is_empty() {
            return Err(RuntimeError::EmptyPrompt);
        }
        if prompt.len() > self.model.n_ctx {
            return Err(RuntimeError::PromptTooLong {
                n_prompt: prompt.len(),
                n_ctx: self.model.n_ctx,
                n_ctx_max: self.model.hyper.n_ctx_max,
            });
        }
        Ok(())
    }

    /// Answers `prompt` and waits for the end.
    ///
    /// # Errors
    /// As [`Session::check`]; sampling parameters out of range; a text that cannot be given out; a step that failed.
    pub fn answer(
        &mut self,
        prompt: Vec<u32>,
        options: AnswerOptions,
    ) -> Result<Answer, RuntimeError> {
        self.check(&prompt)?;
        let sampler = self.sampler(options.sampler, options.ignore_eos)?;
        let n_reused = common_prefix(&self.cached, &prompt).min(prompt.len() - 1);
        let generation = Generation::new(
            prompt,
            sampler,
            &self.model.tokenizer,
            GenerationOptions {
                n_predict: options.n_predict,
                n_ctx: self.model.n_ctx,
                n_reused,
                shift: options.shift,
                stop_texts: options.stop_texts,
                hash_logits: options.hash_logits,
                sparse_head: self.model.head == Head::Sparse,
                interrupt: options.interrupt,
                sink: options.sink,
            },
        );
        // until the run has ended well, nobody knows what the cache holds
        let cached = std::mem::take(&mut self.cached);
        if generation.is_done() {
            self.cached = cached;
            return Ok(Answer {
                finished: generation.finish(),
                totals: RunTotals::default(),
            });
        }
        let run = self.model.engine.run(generation)?;
        let mut finished = run.feeder.finish();
        run.outcome.map_err(|error| self.model.step_error(error))?;
        if let Some(failure) = finished.failure.take() {
            return Err(failure);
        }
        self.cached.clone_from(&finished.fed);
        Ok(Answer {
            finished,
            totals: run.totals,
        })
    }

    fn sampler(
        &self,
        mut params: SamplerParams,
        ignore_eos: bool,
    ) -> Result<Sampler, RuntimeError> {
        if ignore_eos {
            let never = |id: &u32| LogitBias {
                id: *id,
                bias: f32::NEG_INFINITY,
            };
            let ends = self.model.tokenizer.vocabulary().end_ids();
            params.logit_bias.extend(ends.iter().map(never));
        }
        let params = params.in_context(self.model.n_ctx);
        let sampler = Sampler::new(params, self.model.hyper.n_vocab)?;
        tracing::info!(seed = sampler.seed(), "sampling");
        Ok(sampler)
    }
}
