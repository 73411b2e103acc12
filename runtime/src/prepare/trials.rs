//! Runs of the model in one mode or another: how well it foretells a text, what it would say, and how fast.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pi_actors::counters::Counters;
use pi_actors::{Feed, Feeder, LogitsWanted, Next};

use super::preparation::{Observer, Preparation};
use super::text::Passages;
use crate::bench::token_source::TEXT;
use crate::bench::{BenchTest, Runner, TokenSource};
use crate::error::RuntimeError;
use crate::model::Sparsity;
use crate::perplexity::Score;
use crate::tokenizer::EncodeOptions;

/// Tokens decoded to measure speed.
const N_TOKENS_TIMED: usize = 64;

/// Sees what a run foretells.
pub(super) trait Visit: Send + 'static {
    /// The logits behind one position, and the token that comes there; none behind a passage's last one.
    fn visit(&mut self, logits: &[f32], next: Option<u32>);
}

/// The likeliest token behind each position.
#[derive(Debug, Default)]
struct Likeliest(Vec<u32>);

impl Visit for Likeliest {
    fn visit(&mut self, logits: &[f32], _next: Option<u32>) {
        let best = (0..logits.len()).reduce(|best, id| match logits[id] > logits[best] {
            true => id,
            false => best,
        });
        self.0.push(best.unwrap_or(0) as u32);
    }
}

impl Visit for Score {
    fn visit(&mut self, logits: &[f32], next: Option<u32>) {
        if let Some(next) = next {
            self.add(logits, next);
        }
    }
}

/// Feeds passages one by one, and shows what is foretold of their second halves.
struct SecondHalves<V> {
    passages: Passages,
    n_given: usize,
    stop: Arc<AtomicBool>,
    observer: Arc<dyn Observer>,
    visitor: V,
}

impl<V: Visit> Feeder for SecondHalves<V> {
    fn next(&mut self) -> Next<'_> {
        self.observer.at(self.n_given);
        if self.n_given == self.passages.len() || self.stop.load(Ordering::Acquire) {
            return Next::Done;
        }
        self.n_given += 1;
        Next::Feed(Feed {
            tokens: self.passages.get(self.n_given - 1),
            position: 0,
            logits: LogitsWanted::From(self.passages.n_ctx() / 2),
        })
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        let passage = self.passages.get(self.n_given - 1);
        let next = passage.get(position + 1).copied();
        self.visitor.visit(logits, next);
    }
}

/// Decode speed, and what a token takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Tokens a second.
    pub tok_s: f64,
    /// Weight bytes of a token.
    pub bytes_per_token: f64,
}

impl Preparation {
    /// Perplexity of `passages` in `mode`: of the tokens in their second halves, as `pi-runtime perplexity` counts.
    pub(super) fn perplexity(
        &self,
        mode: Sparsity,
        sidecar: Option<&Path>,
        passages: &Passages,
    ) -> Result<f64, RuntimeError> {
        let score = Score::default();
        let score = self.second_halves("perplexity", mode, sidecar, passages, score)?;
        Ok(score.ppl())
    }

    /// The likeliest token behind each position of the second halves of `passages` in `mode`.
    pub(super) fn likeliest_tokens(
        &self,
        mode: Sparsity,
        sidecar: Option<&Path>,
        passages: &Passages,
    ) -> Result<Vec<u32>, RuntimeError> {
        let what = "likeliest tokens";
        let likeliest = Likeliest::default();
        let likeliest = self.second_halves(what, mode, sidecar, passages, likeliest)?;
        Ok(likeliest.0)
    }

    /// Shows `visitor` what `mode` foretells on the host of the second halves of `passages`; `what` is wanted of it.
    pub(super) fn second_halves<V: Visit>(
        &self,
        what: &str,
        mode: Sparsity,
        sidecar: Option<&Path>,
        passages: &Passages,
        visitor: V,
    ) -> Result<V, RuntimeError> {
        let model = self.subject.run_judged(mode, passages.n_ctx(), sidecar)?;
        let name = format!("{what} {}", mode.name());
        self.observer.begin(&name, passages.len());
        let run = model.engine.run(SecondHalves {
            passages: passages.clone(),
            n_given: 0,
            stop: Arc::clone(&self.stop),
            observer: Arc::clone(&self.observer),
            visitor,
        })?;
        self.observer.end();
        run.outcome.map_err(|error| model.step_error(error))?;
        self.check_stop()?;
        Ok(run.feeder.visitor)
    }

    /// What is decoded to be timed, and how many tokens of it.
    fn timed_text(&self) -> Result<(TokenSource, usize), RuntimeError> {
        let tokens = self.subject.tokenizer.encode(TEXT, EncodeOptions::TEXT)?;
        let n = N_TOKENS_TIMED.min(self.subject.hyper.n_ctx_max);
        Ok((TokenSource::Text(tokens), n))
    }

    /// The tokens that are decoded to be timed.
    pub(super) fn timed_tokens(&self) -> Result<Vec<u32>, RuntimeError> {
        let (source, n) = self.timed_text()?;
        Ok(source.take(n, self.subject.bos()))
    }

    /// Decode speed of each of `modes`: the median of `n_rounds` rounds in which all take turns, so that other load on
    /// the machine meets them alike.
    pub(super) fn speeds(
        &self,
        modes: &[(Sparsity, Option<&Path>)],
        n_rounds: usize,
    ) -> Result<Vec<Speed>, RuntimeError> {
        let (source, n_gen) = self.timed_text()?;
        let test = BenchTest {
            n_prompt: 0,
            n_gen,
            n_depth: 0,
            n_threads: self.subject.plan.n_threads(),
        };
        let mut samples = vec![Vec::with_capacity(n_rounds); modes.len()];
        let mut work = vec![(Counters::default(), 0); modes.len()];
        self.observer.begin("speed", n_rounds * modes.len());
        for round in 0..n_rounds {
            for (index, (mode, sidecar)) in modes.iter().enumerate() {
                self.check_stop()?;
                // one at a time, as memory may not hold two
                let model = self.subject.run_timed(*mode, n_gen, *sidecar)?;
                let measured = Runner::new(&model, &source).run(test, 1)?;
                samples[index].push(measured.samples.ts_summary().0);
                work[index].0 += measured.work;
                work[index].1 += measured.n_tokens;
                self.observer.at(round * modes.len() + index + 1);
            }
        }
        self.observer.end();
        let median = |samples: &mut Vec<f64>| {
            samples.sort_by(f64::total_cmp);
            samples[samples.len() / 2]
        };
        Ok(samples
            .iter_mut()
            .zip(work)
            .map(|(samples, (work, n_tokens))| Speed {
                tok_s: median(samples),
                bytes_per_token: work.weight_bytes as f64 / n_tokens.max(1) as f64,
            })
            .collect())
    }
}
