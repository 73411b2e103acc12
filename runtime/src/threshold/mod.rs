//! Calibration of `threshold`, the mode for gates that never close: which neurons can be left out for a given rise of
//! perplexity, and whether that makes decoding faster.
//!
//! A neuron's contribution is |act(gate)| · ‖down row‖ or |act(gate) · up| · ‖down row‖. Each layer has a largest one
//! that is left out; it is divided by the neuron's ‖down row‖, so that the decode path compares with one number.

pub mod distribution;
pub mod fragility;
pub mod proposal;
pub mod samples;
pub mod search;
mod trials;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use pi_topology::Plan;

use crate::bench::TokenSource;
use crate::bench::token_source::TEXT;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::threshold::Thresholds;
use crate::model::{Hyperparameters, ModelError, ModelTensors};
use crate::session::{LoadedModel, ModelOptions};
use crate::sidecar::{ThresholdFigures, ThresholdSection};
use crate::tokenizer::EncodeOptions;
use fragility::Fragility;
use proposal::{Division, Proposal, Proposer};
use samples::{LayerStatistics, SampleTap};
use search::{search, within};
use trials::{Trials, chunks, distance, perplexity, rise, too_short};

/// How much faster decoding has to become to be called a gain.
const SPEED_UP_MIN: f64 = 1.01;

/// Layers are probed on so many chunks,
const PROBED_CHUNKS: usize = 4;
/// of so many tokens.
const PROBED_TOKENS: usize = 128;
/// A trial looks at its rise after each of so many parts of the text,
const JUDGED_PARTS: usize = 4;
/// and ends where it lies so many standard errors above the budget.
const HOPELESS_ERRORS: f64 = 1.0;

/// How thresholds are calibrated.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrateOptions {
    /// How much perplexity may rise: 0.005 is half a percent.
    pub budget: f64,
    /// How the skipped share is divided over the layers.
    pub division: Division,
    /// Tokens of a chunk of text; each starts with an empty context.
    pub chunk_tokens: usize,
    /// Chunks of which hidden states are sampled: the first ones of the text.
    pub sampled_chunks: usize,
    /// Tokens sampled.
    pub n_samples: usize,
    /// Chunks behind these that are scored.
    pub scored_chunks: usize,
    /// Rounds in which `off` and the thresholds decode in turn; 0: speed is not measured, and bytes decide.
    pub bench_rounds: usize,
    /// Tokens of a round.
    pub bench_tokens: usize,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        Self {
            budget: 0.005,
            division: Division::ByResidual,
            chunk_tokens: 512,
            sampled_chunks: 4,
            n_samples: 256,
            scored_chunks: 16,
            bench_rounds: 5,
            bench_tokens: 64,
        }
    }
}

/// What the calibration does, for a progress bar.
#[derive(Debug, Clone)]
pub enum Step<'a> {
    /// Hidden states are sampled, and the text is scored in `off`.
    Sampling,
    /// The contributions of all neurons are sorted.
    Sorting,
    /// Each layer alone is quantised again, to see which ones bear it badly.
    Probing,
    /// Thresholds were tried: perplexity rose by `rise`.
    Tried {
        /// Which.
        proposal: &'a Proposal,
        /// 0.01 is one percent.
        rise: f64,
        /// Standard error of that.
        error: f64,
    },
    /// Both modes decode in turn.
    Timing,
}

/// Calibrates a model's thresholds on `text`, which is from the file at `text_path`.
///
/// The model is opened again for each trial, as `options` say but for mode, sidecar and context. The same model, text
/// and options give the same thresholds; measured speeds differ, and with them perhaps `gains`.
///
/// # Errors
/// A model whose gates close, a text of fewer than two chunks, a step that failed, or `interrupt` was set.
pub fn calibrate(
    options: &ModelOptions,
    plan: &Plan,
    text: &str,
    text_path: &Path,
    how: &CalibrateOptions,
    progress: &mut dyn FnMut(Step<'_>),
    interrupt: &Arc<AtomicBool>,
) -> Result<ThresholdSection, RuntimeError> {
    let calibration = Calibration::begin(options, plan, text, text_path, how, progress, interrupt)?;
    calibration.finish(progress)
}

/// A calibration whose samples are taken.
pub struct Calibration<'a> {
    how: &'a CalibrateOptions,
    options: &'a ModelOptions,
    trials: Trials<'a>,
    hyper: Hyperparameters,
    tensors: ModelTensors,
    layers: Vec<LayerStatistics>,
    scored: Vec<Vec<u32>>,
    /// Negative log-likelihoods in `off`.
    off: Vec<f64>,
}

impl<'a> Calibration<'a> {
    /// Takes the samples, and scores the text in `off`.
    ///
    /// # Errors
    /// As [`calibrate`].
    pub fn begin(
        options: &'a ModelOptions,
        plan: &'a Plan,
        text: &str,
        text_path: &Path,
        how: &'a CalibrateOptions,
        progress: &mut dyn FnMut(Step<'_>),
        interrupt: &'a Arc<AtomicBool>,
    ) -> Result<Self, RuntimeError> {
        progress(Step::Sampling);
        let in_file = |source: ModelError| RuntimeError::Model {
            path: options.path.clone(),
            source,
        };
        let file = GgufFile::open(&options.path)?;
        let hyper = Hyperparameters::read(&file).map_err(in_file)?;
        let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
        // before anything takes time
        Proposer::new(&hyper, &tensors, &[], how.division).map_err(in_file)?;
        let chunk_tokens = how.chunk_tokens.clamp(2, hyper.n_ctx_max);
        let trials = Trials {
            options,
            plan,
            n_ctx: chunk_tokens.max(how.bench_tokens.min(hyper.n_ctx_max)),
            interrupt,
        };
        let n_sampled = how.sampled_chunks.max(1);
        let stride = (n_sampled * chunk_tokens).div_ceil(how.n_samples.max(1));
        let tap = SampleTap::new(hyper.n_layer, stride.min(chunk_tokens));
        let model = trials.off(Some(tap.clone()))?;
        let tokens = model.tokenizer.encode(text, EncodeOptions::TEXT)?;
        let mut sampled = chunks(&tokens, chunk_tokens, first_token(&model));
        if sampled.len() < 2 {
            return Err(too_short(text_path, tokens.len(), chunk_tokens));
        }
        let mut scored = sampled.split_off(n_sampled.min(sampled.len() / 2));
        scored.truncate(how.scored_chunks.max(1));
        trials.score(&model, &sampled, chunk_tokens)?;
        drop(model);
        let mut calibration = Self {
            how,
            options,
            trials,
            layers: vec![],
            off: vec![],
            hyper,
            tensors,
            scored,
        };
        let model = calibration.trials.off(None)?;
        calibration.off = calibration.score(&model)?;
        drop(model);
        progress(Step::Sorting);
        let layers = LayerStatistics::of_all(
            options.cpu,
            calibration.hyper.gate,
            &calibration.tensors.layers,
            &tap,
            plan.n_threads(),
        );
        calibration.layers = layers.map_err(in_file)?;
        Ok(calibration)
    }

    /// Negative log-likelihoods of the scored text: of the tokens behind the first quarter of each chunk.
    fn score(&self, model: &LoadedModel) -> Result<Vec<f64>, RuntimeError> {
        let first = self.scored[0].len() / 4;
        self.trials.score(model, &self.scored, first)
    }

    /// What makes thresholds for the model.
    ///
    /// # Errors
    /// A model whose gates close.
    pub fn proposer(&self, division: Division) -> Result<Proposer<'_>, RuntimeError> {
        let (hyper, tensors) = (&self.hyper, &self.tensors);
        Proposer::new(hyper, tensors, &self.layers, division).map_err(|source| {
            RuntimeError::Model {
                path: self.options.path.clone(),
                source,
            }
        })
    }

    /// How much perplexity rises with `thresholds` (0.01: one percent), the standard error of that, and the perplexity.
    ///
    /// # Errors
    /// As [`calibrate`].
    pub fn try_out(&self, thresholds: &Arc<Thresholds>) -> Result<(f64, f64, f64), RuntimeError> {
        let nlls = self.score(&self.trials.with(thresholds)?)?;
        let (rise, error) = rise(&self.off, &nlls);
        Ok((rise, error, perplexity(&nlls)))
    }

    /// The same as far as it decides: the rise and its standard error, over a part of the text where that lies
    /// above the budget by more than its error.
    fn judge(&self, thresholds: &Arc<Thresholds>) -> Result<(f64, f64), RuntimeError> {
        let model = self.trials.with(thresholds)?;
        let first = self.scored[0].len() / 4;
        let (mut nlls, mut judged) = (vec![], (0.0, 0.0));
        for part in self.scored.chunks(self.scored.len().div_ceil(JUDGED_PARTS)) {
            nlls.extend(self.trials.score(&model, part, first)?);
            judged = rise(&self.off[..nlls.len()], &nlls);
            if judged.0 - HOPELESS_ERRORS * judged.1 > self.how.budget {
                break;
            }
        }
        Ok(judged)
    }

    /// Quantises each layer's rows of down again, alone, and sees how far that moves the likelihoods of a short text.
    ///
    /// # Errors
    /// As [`calibrate`].
    pub fn fragility(&self) -> Result<Fragility, RuntimeError> {
        let proposer = self.proposer(self.how.division)?;
        // the coarsest type shows it best
        let Some(way) = proposer.ways().first().copied() else {
            return Ok(Fragility::default());
        };
        let again = proposer.requantised();
        if again.is_empty() {
            return Ok(Fragility::default());
        }
        let shortened = |chunk: &Vec<u32>| chunk[..chunk.len().min(PROBED_TOKENS)].to_vec();
        let chunks: Vec<_> = self
            .scored
            .iter()
            .take(PROBED_CHUNKS)
            .map(shortened)
            .collect();
        let first = chunks[0].len() / 4;
        let off = self.trials.score(&self.trials.off(None)?, &chunks, first)?;
        let all = proposer.propose_all(way, 0.0).thresholds;
        let disturbances = again.into_iter().map(|layer| {
            let mut alone = Thresholds {
                layers: vec![None; self.hyper.n_layer],
                skipped: 0.0,
            };
            alone.layers[layer].clone_from(&all.layers[layer]);
            let model = self.trials.with(&Arc::new(alone))?;
            let nlls = self.trials.score(&model, &chunks, first)?;
            Ok((layer, distance(&off, &nlls)))
        });
        let disturbances = disturbances.collect::<Result<_, RuntimeError>>()?;
        Ok(Fragility::of(disturbances))
    }

    /// Searches, and measures what was found.
    ///
    /// # Errors
    /// As [`calibrate`].
    pub fn finish(
        &self,
        progress: &mut dyn FnMut(Step<'_>),
    ) -> Result<ThresholdSection, RuntimeError> {
        progress(Step::Probing);
        let fragility = self.fragility()?;
        let proposer = self.proposer(self.how.division)?.sparing(&fragility);
        let found = search(
            &proposer.ways(),
            proposer.bytes_off(),
            self.how.budget,
            |way, share| proposer.propose(way, share),
            |proposal| -> Result<(f64, f64), RuntimeError> {
                let (rise, error) = self.judge(&proposal.thresholds)?;
                progress(Step::Tried {
                    proposal,
                    rise,
                    error,
                });
                Ok((rise, error))
            },
        )?;
        let thresholds = match found {
            Some(found) => found.proposal.thresholds,
            None => Arc::new(Thresholds {
                layers: vec![None; self.hyper.n_layer],
                skipped: 0.0,
            }),
        };
        progress(Step::Timing);
        self.measure(&thresholds)
    }

    /// All figures of `thresholds`.
    ///
    /// # Errors
    /// As [`calibrate`].
    pub fn measure(&self, thresholds: &Arc<Thresholds>) -> Result<ThresholdSection, RuntimeError> {
        let with = self.trials.with(thresholds)?;
        let nlls = self.score(&with)?;
        let (rise, rise_error) = rise(&self.off, &nlls);
        let off = self.trials.off(None)?;
        let source = TokenSource::Text(off.tokenizer.encode(TEXT, EncodeOptions::TEXT)?);
        let n_tokens = self.how.bench_tokens.clamp(1, self.trials.n_ctx);
        let rounds = self.how.bench_rounds;
        let compared = self
            .trials
            .compare([&off, &with], &source, n_tokens, rounds)?;
        let timed = rounds > 0;
        let faster = !timed || compared.speed_up >= SPEED_UP_MIN;
        let fewer = compared.bytes[1] < compared.bytes[0];
        let tok_s = compared.tok_s.map(|tok_s| if timed { tok_s } else { 0.0 });
        Ok(ThresholdSection {
            thresholds: Thresholds::clone(thresholds),
            figures: ThresholdFigures {
                budget: self.how.budget,
                ppl_off: perplexity(&self.off),
                ppl_threshold: perplexity(&nlls),
                rise_error,
                skipped: thresholds.skipped,
                bytes_off: compared.bytes[0],
                bytes_threshold: compared.bytes[1],
                tok_s_off: tok_s[0],
                tok_s_threshold: tok_s[1],
                gains: within(rise, rise_error, self.how.budget) && fewer && faster,
            },
        })
    }
}

/// What a chunk begins with.
fn first_token(model: &LoadedModel) -> Option<u32> {
    let tokenizer = &model.tokenizer;
    tokenizer.bos().filter(|_| tokenizer.adds_bos())
}
