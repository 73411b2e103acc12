//! Runs tests on one loaded model: fills the context, warms up, repeats.

use pi_actors::ActorError;
use pi_actors::counters::{Counters, RunTotals};
use pi_actors::replan::Replans;

use super::feeder::BenchFeeder;
use super::row::{BenchTest, Samples};
use super::token_source::TokenSource;
use crate::head_sketch::Head;
use crate::session::LoadedModel;

/// A model under test, and what its cache holds.
#[derive(Debug)]
pub struct Runner<'a> {
    model: &'a LoadedModel,
    source: &'a TokenSource,
    /// Tokens of the source in the cache, from position 0.
    n_filled: usize,
}

/// What a test gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// Times of the repetitions.
    pub samples: Samples,
    /// Work of all repetitions; with GPUs, of one more before them, in which they count.
    pub work: Counters,
    /// Tokens of that work.
    pub n_tokens: usize,
    /// Neurons that changed between GPU and host in them.
    pub replans: Replans,
}

impl<'a> Runner<'a> {
    /// Tests `model` with the tokens of `source`.
    pub fn new(model: &'a LoadedModel, source: &'a TokenSource) -> Self {
        Self {
            model,
            source,
            n_filled: 0,
        }
    }

    /// Runs `test` once to warm up and then `repetitions` times; where GPUs are to count what they read, once before.
    ///
    /// # Errors
    /// A step that failed.
    pub fn run(&mut self, test: BenchTest, repetitions: usize) -> Result<Measured, ActorError> {
        let n_tokens = test.n_prompt + test.n_gen;
        let tokenizer = &self.model.tokenizer;
        let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
        let mut tokens = self.source.take(test.n_depth + n_tokens, bos);
        let measured = tokens.split_off(test.n_depth);
        self.fill(tokens)?;
        let counted = match self.model.engine.count_on_gpus(true) {
            true => Some(self.once(test, measured.clone())?.1),
            false => None,
        };
        self.model.engine.count_on_gpus(false);
        self.once(test, measured.clone())?;
        let mut samples_ns = Vec::with_capacity(repetitions);
        let mut work = Counters::default();
        let mut replans = Replans::default();
        for _ in 0..repetitions {
            let (ns, totals) = self.once(test, measured.clone())?;
            samples_ns.push(ns);
            work += totals.prefill + totals.decode;
            replans += totals.replans;
        }
        let (work, n_runs) = match counted {
            Some(totals) => (totals.prefill + totals.decode, 1),
            None => (work, repetitions),
        };
        Ok(Measured {
            samples: Samples::new(n_tokens, samples_ns),
            work,
            n_tokens: n_tokens * n_runs,
            replans,
        })
    }

    /// Puts `tokens` into the cache, unless they are there: every test begins behind its depth.
    fn fill(&mut self, tokens: Vec<u32>) -> Result<(), ActorError> {
        let depth = tokens.len();
        if depth != self.n_filled && depth > 0 {
            self.model.engine.run(BenchFeeder::fill(tokens))?.outcome?;
        }
        self.n_filled = depth;
        Ok(())
    }

    /// One repetition: its time in ns, and its work.
    fn once(&self, test: BenchTest, tokens: Vec<u32>) -> Result<(u64, RunTotals), ActorError> {
        let feeder = if test.n_gen == 0 {
            BenchFeeder::prefill(tokens, test.n_depth)
        } else {
            BenchFeeder::decode(tokens, test.n_depth)
        };
        let sparse = self.model.head == Head::Sparse;
        let run = self.model.engine.run(feeder.with_sparse_head(sparse))?;
        run.outcome?;
        let ns = u64::try_from(run.feeder.elapsed().as_nanos()).unwrap_or(u64::MAX);
        Ok((ns, run.totals))
    }
}
