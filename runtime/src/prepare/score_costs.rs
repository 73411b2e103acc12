//! What predictors take of a decoded token: bytes, which are counted, and time, on this machine and now.

use std::path::Path;
use std::time::Duration;

use pi_actors::counters::Counters;
use pi_actors::trace::{ScoreCost, Scorer};

use super::preparation::Preparation;
use super::subject::Traced;
use crate::bench::BenchFeeder;
use crate::error::RuntimeError;
use crate::head_sketch::Head;
use crate::model::Sparsity;
use crate::model::predicting::PredictBy;
use crate::session::LoadedModel;

/// Rounds of which the one of median time counts.
const N_ROUNDS: usize = 3;

/// Which predictors a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Predictors {
    /// Sketches in the layers.
    pub in_layer: bool,
    /// One layer ahead.
    pub ahead: bool,
    /// A sketch of the head.
    pub head: bool,
}

/// A token as it is decoded with some predictors, and what these take of it.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenCosts {
    /// The flags that switch them on.
    pub flags: &'static str,
    /// All bytes of weights.
    pub bytes: f64,
    /// All its time.
    pub ns: f64,
    /// The predictors that made scores, in the order of [`Scorer::ALL`].
    pub scorers: Vec<ScorerCosts>,
}

/// What a predictor's scores take of a token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScorerCosts {
    /// Which.
    pub scorer: Scorer,
    /// Bytes of weights.
    pub bytes: f64,
    /// Time of a node's first thread, of the node that takes longest.
    pub ns: f64,
}

impl TokenCosts {
    /// The share of all bytes that `cost` is.
    pub fn share_of_bytes(&self, cost: &ScorerCosts) -> f64 {
        cost.bytes / self.bytes
    }

    /// The share of all time that `cost` is.
    pub fn share_of_time(&self, cost: &ScorerCosts) -> f64 {
        cost.ns / self.ns
    }

    /// All its predictors together.
    pub fn sum(&self) -> (f64, f64) {
        let costs = self.scorers.iter();
        costs.fold((0.0, 0.0), |sum, cost| {
            (sum.0 + cost.bytes, sum.1 + cost.ns)
        })
    }
}

/// How a token is decoded, and whose costs are told.
struct Setting {
    flags: &'static str,
    run: Traced,
    scorers: &'static [Scorer],
}

impl Setting {
    /// One for each kind of predictor: what is on costs in the others' tokens too.
    fn all(predictors: Predictors) -> Vec<Self> {
        let Predictors {
            in_layer,
            ahead,
            head,
        } = predictors;
        let predicted = Traced {
            mode: Some(Sparsity::Predicted),
            by: PredictBy::InLayer,
            head: Head::Full,
        };
        let in_layer_alone = Self {
            flags: "--sparsity predicted",
            run: predicted,
            scorers: &[Scorer::Signs, Scorer::SecondBits, Scorer::LowRank],
        };
        let both = Self {
            flags: "--sparsity predicted --predictor both",
            run: Traced {
                by: PredictBy::Both,
                ..predicted
            },
            scorers: &[Scorer::Ahead],
        };
        let sparse_head = Self {
            flags: match in_layer {
                true => "--sparsity predicted --head sparse",
                false => "--head sparse",
            },
            run: Traced {
                mode: predicted.mode.filter(|_| in_layer),
                head: Head::Sparse,
                ..predicted
            },
            scorers: &[Scorer::Head],
        };
        let wanted = [
            (in_layer, in_layer_alone),
            (in_layer && ahead, both),
            (head, sparse_head),
        ];
        let wanted = wanted.into_iter().filter(|(wanted, _)| *wanted);
        wanted.map(|(_, setting)| setting).collect()
    }
}

/// One time that a text was decoded.
struct Round {
    elapsed: Duration,
    work: Counters,
    /// In the order of [`Scorer::ALL`].
    scores: [ScoreCost; Scorer::ALL.len()],
}

impl Preparation {
    /// What each of `predictors` takes; none where a GPU scores.
    pub(super) fn score_costs(
        &self,
        sidecar: &Path,
        predictors: Predictors,
    ) -> Result<Vec<TokenCosts>, RuntimeError> {
        if !self.subject.plan.gpus.is_empty() {
            return Ok(Vec::new());
        }
        let settings = Setting::all(predictors);
        self.observer.begin("predictors' costs", settings.len());
        let mut costs = Vec::with_capacity(settings.len());
        for setting in &settings {
            self.check_stop()?;
            costs.push(self.token_costs(sidecar, setting)?);
            self.observer.at(costs.len());
        }
        self.observer.end();
        Ok(costs)
    }

    fn token_costs(&self, sidecar: &Path, setting: &Setting) -> Result<TokenCosts, RuntimeError> {
        let tokens = self.timed_tokens()?;
        let n_tokens = tokens.len() as f64;
        let model = self
            .subject
            .run_traced(tokens.len(), sidecar, setting.run)?;
        // the first one warms up
        let mut rounds = (0..=N_ROUNDS)
            .map(|_| round(&model, &tokens))
            .collect::<Result<Vec<_>, _>>()?;
        rounds.remove(0);
        rounds.sort_by_key(|round| round.elapsed);
        let median = &rounds[N_ROUNDS / 2];
        let scorers = setting.scorers.iter().map(|&scorer| {
            let cost = median.scores[scorer as usize];
            ScorerCosts {
                scorer,
                bytes: cost.bytes as f64 / n_tokens,
                ns: cost.ns as f64 / n_tokens,
            }
        });
        Ok(TokenCosts {
            flags: setting.flags,
            bytes: median.work.weight_bytes as f64 / n_tokens,
            ns: median.elapsed.as_nanos() as f64 / n_tokens,
            scorers: scorers.filter(|cost| cost.bytes > 0.0).collect(),
        })
    }
}

fn round(model: &LoadedModel, tokens: &[u32]) -> Result<Round, RuntimeError> {
    let before = scores(model);
    let feeder = BenchFeeder::decode(tokens.to_vec(), 0);
    let feeder = feeder.with_sparse_head(model.head == Head::Sparse);
    let run = model.engine.run(feeder)?;
    run.outcome.map_err(|error| model.step_error(error))?;
    let after = scores(model);
    let nodes = || after.iter().zip(&before);
    let scores = std::array::from_fn(|scorer| ScoreCost {
        bytes: nodes()
            .map(|(after, before)| after[scorer].bytes - before[scorer].bytes)
            .sum(),
        ns: nodes()
            .map(|(after, before)| after[scorer].ns.saturating_sub(before[scorer].ns))
            .max()
            .unwrap_or(0),
    });
    Ok(Round {
        elapsed: run.feeder.elapsed(),
        work: run.totals.prefill + run.totals.decode,
        scores,
    })
}

/// What scores have taken each node so far.
fn scores(model: &LoadedModel) -> Vec<[ScoreCost; Scorer::ALL.len()]> {
    let trace = model.engine.trace();
    trace.map(|trace| trace.score_costs()).unwrap_or_default()
}
