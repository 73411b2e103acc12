//! Running a model with thresholds on a text: how likely the text is, and how fast it is decoded.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pi_actors::{Feed, Feeder, LayerTap, LogitsWanted, Next};
use pi_topology::Plan;

use crate::bench::{BenchTest, Runner, TokenSource};
use crate::error::RuntimeError;
use crate::model::Sparsity;
use crate::model::threshold::Thresholds;
use crate::perplexity::log_softmax;
use crate::session::{LoadedModel, ModelOptions, Silent, ThresholdSource};

/// Opens a model in `off` or with thresholds, and scores a text with it.
pub(super) struct Trials<'a> {
    pub options: &'a ModelOptions,
    pub plan: &'a Plan,
    pub n_ctx: usize,
    pub interrupt: &'a Arc<AtomicBool>,
}

impl Trials<'_> {
    /// The model in `off`, watched by `tap`.
    pub fn off(&self, tap: Option<Arc<dyn LayerTap>>) -> Result<LoadedModel, RuntimeError> {
        self.open(Sparsity::Off, ThresholdSource::Sidecar, tap)
    }

    /// The model with `thresholds`.
    pub fn with(&self, thresholds: &Arc<Thresholds>) -> Result<LoadedModel, RuntimeError> {
        let source = ThresholdSource::Given(Arc::clone(thresholds));
        self.open(Sparsity::Threshold, source, None)
    }

    fn open(
        &self,
        mode: Sparsity,
        thresholds: ThresholdSource,
        tap: Option<Arc<dyn LayerTap>>,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = ModelOptions {
            n_ctx: self.n_ctx,
            sparsity: Some(mode),
            thresholds,
            sidecar: None,
            trace: None,
            tap,
            ..self.options.clone()
        };
        LoadedModel::open(&options, self.plan, &Silent)
    }

    /// Feeds `chunks`, each to an empty context, and gives the negative log-likelihood of every token from position
    /// `first` on.
    pub fn score(
        &self,
        model: &LoadedModel,
        chunks: &[Vec<u32>],
        first: usize,
    ) -> Result<Vec<f64>, RuntimeError> {
        let scorer = Scorer {
            chunks: chunks.to_vec(),
            n_given: 0,
            first: first.max(1),
            nlls: vec![],
            interrupt: Arc::clone(self.interrupt),
        };
        let run = model.engine.run(scorer)?;
        run.outcome.map_err(|error| model.step_error(error))?;
        if self.interrupt.load(Ordering::Acquire) {
            return Err(RuntimeError::Interrupted);
        }
        Ok(run.feeder.nlls)
    }

    /// Decodes `source`'s first `n_tokens` tokens `rounds` times by each of two models in turn (once, where nothing is
    /// to be timed).
    pub fn compare(
        &self,
        models: [&LoadedModel; 2],
        source: &TokenSource,
        n_tokens: usize,
        rounds: usize,
    ) -> Result<Comparison, RuntimeError> {
        let test = BenchTest {
            n_prompt: 0,
            n_gen: n_tokens,
            n_depth: 0,
            n_threads: self.plan.n_threads(),
        };
        let mut runners = models.map(|model| Runner::new(model, source));
        let (mut ns, mut bytes) = ([vec![], vec![]], [0.0; 2]);
        for _ in 0..rounds.max(1) {
            for (n, runner) in runners.iter_mut().enumerate() {
                let measured = runner
                    .run(test, 1)
                    .map_err(|error| models[n].step_error(error))?;
                ns[n].extend(measured.samples.ns.iter().map(|ns| *ns as f64));
                bytes[n] = measured.work.weight_bytes as f64 / measured.n_tokens as f64;
                if self.interrupt.load(Ordering::Acquire) {
                    return Err(RuntimeError::Interrupted);
                }
            }
        }
        let ratios = ns[0].iter().zip(&ns[1]).map(|(off, with)| off / with);
        let speed_up = median(ratios.collect());
        let tok_s = ns.map(|ns| n_tokens as f64 * 1e9 / median(ns));
        Ok(Comparison {
            bytes,
            tok_s,
            speed_up,
        })
    }
}

/// Two models side by side.
pub(super) struct Comparison {
    /// Weight bytes of a token.
    pub bytes: [f64; 2],
    /// Tokens decoded per second: the medians.
    pub tok_s: [f64; 2],
    /// Median over the rounds of how much faster the second one was.
    pub speed_up: f64,
}

/// How much perplexity rises from one scoring of a text to another, and the standard error of that.
pub(super) fn rise(off: &[f64], with: &[f64]) -> (f64, f64) {
    let n = off.len() as f64;
    let differences = || with.iter().zip(off).map(|(with, off)| with - off);
    let mean = differences().sum::<f64>() / n;
    let variance = differences().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let ratio = mean.exp();
    // a text that became impossible rose without bound
    let ratio = if ratio.is_nan() { f64::INFINITY } else { ratio };
    (ratio - 1.0, (variance / n).sqrt() * ratio)
}

/// How far one scoring of a text lies from another: root mean square over tokens.
pub(super) fn distance(off: &[f64], with: &[f64]) -> f64 {
    let squares = with.iter().zip(off).map(|(with, off)| (with - off).powi(2));
    (squares.sum::<f64>() / off.len() as f64).sqrt()
}

/// Perplexity of a text scored so.
pub(super) fn perplexity(nlls: &[f64]) -> f64 {
    (nlls.iter().sum::<f64>() / nlls.len() as f64).exp()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n.is_multiple_of(2) => (values[middle - 1] + values[middle]) / 2.0,
        _ => values[middle],
    }
}

/// Scores chunk after chunk.
struct Scorer {
    chunks: Vec<Vec<u32>>,
    n_given: usize,
    first: usize,
    nlls: Vec<f64>,
    interrupt: Arc<AtomicBool>,
}

impl Feeder for Scorer {
    fn next(&mut self) -> Next<'_> {
        if self.interrupt.load(Ordering::Acquire) {
            return Next::Done;
        }
        let Some(tokens) = self.chunks.get(self.n_given) else {
            return Next::Done;
        };
        self.n_given += 1;
        Next::Feed(Feed {
            tokens,
            position: 0,
            logits: LogitsWanted::From(self.first - 1),
        })
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        if let Some(next) = self.chunks[self.n_given - 1].get(position + 1) {
            self.nlls.push(-log_softmax(logits, *next));
        }
    }
}

/// A text's tokens in chunks of `n`, the first token of each replaced by `bos`; as many as are whole.
pub(super) fn chunks(tokens: &[u32], n: usize, bos: Option<u32>) -> Vec<Vec<u32>> {
    let whole = tokens.chunks_exact(n).map(|chunk| {
        let mut chunk = chunk.to_vec();
        chunk[0] = bos.unwrap_or(chunk[0]);
        chunk
    });
    whole.collect()
}

/// The error for a text of too few tokens.
pub(super) fn too_short(path: &Path, n_tokens: usize, n_ctx: usize) -> RuntimeError {
    RuntimeError::Perplexity {
        path: path.to_path_buf(),
        source: crate::perplexity::PerplexityError::TextTooShort { n_tokens, n_ctx },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rise_is_that_of_the_perplexities_and_its_error_that_of_pairs() {
        let off = [1.0, 2.0, 4.0, 0.5];
        let with = off.map(|nll| nll + 0.01);
        let (same, error) = rise(&off, &with);
        assert!((same - (0.01f64.exp() - 1.0)).abs() < 1e-12 && error < 1e-12);
        let with = [1.1, 2.0, 4.2, 0.6];
        let (rise, error) = rise(&off, &with);
        let ratio = perplexity(&with) / perplexity(&off);
        assert!((rise - (ratio - 1.0)).abs() < 1e-12 && error > 0.0);
        assert_eq!(super::rise(&off, &[f64::NAN; 4]).0, f64::INFINITY);
        assert!((distance(&off, &with) - (0.06f64 / 4.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn chunks_are_whole_and_begin_as_the_model_wants() {
        assert_eq!(chunks(&[1, 2, 3, 4, 5], 2, None), [[1, 2], [3, 4]]);
        assert_eq!(chunks(&[1, 2, 3], 3, Some(9)), [[9, 2, 3]]);
    }
}
