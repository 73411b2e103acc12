//! The stage that fits predictors: for each layer a sketch of its gates, and a predictor one layer ahead.

use std::num::NonZeroUsize;

use pi_kernels::{Cpu, QuantType};

use super::error::PrepareError;
use super::preparation::Preparation;
use super::samples::SampleFile;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::Hyperparameters;
use crate::model::tensors::{self, FileMatrix};
use crate::predictor::ahead_trained::Training;
use crate::predictor::bits::{self, BitScores};
use crate::predictor::choose::{Costs, Kind, cheapest};
use crate::predictor::thresholds::{
    Evaluation, Masses, Target, TwoBitThresholds, evaluate, evaluate_two_bits, fit,
};
use crate::predictor::{
    Ahead, FitOn, LayerSamples, LowRank, PredictorError, QuantisedMatrix, Workers, ahead_svd,
    ahead_trained, low_rank,
};
use crate::sidecar::{AHEAD_KIND_KEY, SKETCH_KIND_KEY, Section, SidecarError};

/// What parts of a layer cost, in whole scans of its gates. Signs are two ninths of the gates' bytes; a candidate's row
/// is read by itself, which costs half as much again as in a scan, and less where its signs have been read. Measured
/// with AVX-512 and VNNI; without, signs cost 0.6.
const COSTS: Costs = Costs {
    signs: 0.25,
    second_bit: 0.35,
    bits_candidate: 1.2,
    low_rank: 1.0,
    candidate: 1.5,
};
/// Ranks of low-rank sketches that are tried.
const RANKS: [usize; 4] = [32, 64, 96, 128];
/// Numbers between input and scores of predictors one layer ahead.
const AHEAD_RANK: usize = 64;
/// What a sketch is chosen by: root mean square of the share of its mass that a token loses. About what thresholds for half a
/// percent of perplexity lose.
const CHOSEN_AT: Target = Target::LostRms(0.0024);
/// What predictors ahead keep in the mean: they are for time, and the sketch brings what they miss.
const AHEAD_TARGET: Target = Target::MassKept(0.95);
/// Format of the matrices.
const QUANT: QuantType = QuantType::Q4_0;

/// How predictors one layer ahead are fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AheadKind {
    /// fc2·relu(fc1·h), trained.
    Trained,
    /// The best linear map of low rank.
    Svd,
}

impl AheadKind {
    /// The name in a sidecar.
    pub fn name(self) -> &'static str {
        match self {
            AheadKind::Trained => "trained",
            AheadKind::Svd => "svd",
        }
    }
}

/// A layer's sketch.
#[derive(Debug, Clone, PartialEq)]
pub enum Sketch {
    /// None is worth it: all gates are computed.
    None,
    /// The gates' own signs.
    Signs,
    /// The same, and of those that these name, the next bit.
    TwoBits,
    /// A low-rank map.
    LowRank(LowRank),
}

impl Sketch {
    /// The name in a sidecar.
    pub fn name(&self) -> &'static str {
        match self {
            Sketch::None => "none",
            Sketch::Signs => "signs",
            Sketch::TwoBits => "two_bits",
            Sketch::LowRank(_) => "low_rank",
        }
    }

    /// Scores `[n, n_ff]` of the normed inputs `x` `[n, n_embd]`; none without a sketch.
    pub fn scores(
        &self,
        cpu: Cpu,
        workers: Workers,
        gate: &FileMatrix,
        x: &[f32],
    ) -> Option<Scores> {
        let bits = |two| bits::scores(cpu, workers, &quantised(gate), x, two);
        match self {
            Sketch::None => None,
            Sketch::Signs => Some(Scores::One(bits(false).one)),
            Sketch::TwoBits => Some(Scores::TwoBits(bits(true))),
            Sketch::LowRank(map) => Some(Scores::One(map.scores(cpu, workers, x))),
        }
    }
}

/// What a sketch makes of tokens, row-major `[n, n_ff]`.
#[derive(Debug, Clone, PartialEq)]
pub enum Scores {
    /// One score each.
    One(Vec<f32>),
    /// One by signs, and one by two bits.
    TwoBits(BitScores),
}

/// A neuron is a candidate where each score is above zero with its bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Biases {
    /// `[n_ff]`, of the only or first score.
    pub first: Vec<f32>,
    /// `[n_ff]`, of scores by two bits.
    pub two_bits: Option<Vec<f32>>,
}

impl Scores {
    /// Biases with which candidates meet `target`.
    pub fn fit(&self, masses: &Masses<'_>, target: Target) -> Biases {
        match self {
            Scores::One(scores) => Biases {
                first: fit(scores, masses, target).bias,
                two_bits: None,
            },
            Scores::TwoBits(scores) => {
                let TwoBitThresholds { signs, two_bits } =
                    TwoBitThresholds::fit(scores, masses, target);
                Biases {
                    first: signs,
                    two_bits: Some(two_bits),
                }
            }
        }
    }

    /// What the candidates with `biases` keep and cost. `floor` `[n_ff]` as in [`evaluate`].
    pub fn evaluate(
        &self,
        biases: &Biases,
        floor: Option<&[f32]>,
        masses: &Masses<'_>,
    ) -> Evaluation {
        match (self, &biases.two_bits) {
            (Scores::TwoBits(scores), Some(two_bits)) => {
                evaluate_two_bits(scores, &biases.first, two_bits, floor, masses)
            }
            (Scores::TwoBits(BitScores { one: scores, .. }) | Scores::One(scores), _) => {
                evaluate(scores, &biases.first, floor, masses)
            }
        }
    }
}

/// A matrix of the model as predictors take them.
fn quantised(matrix: &FileMatrix) -> QuantisedMatrix {
    QuantisedMatrix {
        quant: matrix.quant,
        n_rows: matrix.n_rows(),
        n_cols: matrix.n_cols(),
        bytes: matrix.bytes.to_vec(),
    }
}

/// A layer's predictors.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerPredictors {
    /// In the layer.
    pub sketch: Sketch,
    /// From the layer before; none for the first.
    pub ahead: Option<Ahead>,
}

impl LayerPredictors {
    /// Their tensors.
    fn section(&self, layer: usize) -> Result<Section, SidecarError> {
        let mut section = Section::new();
        let name = |part: &str| format!("blk.{layer}.{part}");
        let put = |section: &mut Section, part: &str, matrix: &QuantisedMatrix| {
            let (rows, cols) = (matrix.n_rows, matrix.n_cols);
            section.matrix(&name(part), matrix.quant, rows, cols, matrix.bytes.clone())
        };
        if let Some(ahead) = &self.ahead {
            put(&mut section, "ahead_a.weight", &ahead.a)?;
            if let Some(bias) = &ahead.a_bias {
                section.vector(&name("ahead_a.bias"), bias)?;
            }
            put(&mut section, "ahead_b.weight", &ahead.b)?;
            section.vector(&name("ahead_b.bias"), &ahead.b_bias)?;
        }
        if let Sketch::LowRank(map) = &self.sketch {
            put(&mut section, "sketch_a.weight", &map.a)?;
            put(&mut section, "sketch_b.weight", &map.b)?;
        }
        // a part of its own in a checkpoint: the layer's place in the list of all
        section.put(&kind_key(layer), self.sketch.name())?;
        Ok(section)
    }

    /// Those of `layer` in `file`, a sidecar or a checkpoint; none where the file has no predictors.
    pub fn read(
        file: &GgufFile,
        layer: usize,
        hyper: &Hyperparameters,
    ) -> Result<Option<Self>, RuntimeError> {
        let in_file = |source| RuntimeError::Model {
            path: file.path().unwrap_or("sidecar".as_ref()).to_owned(),
            source,
        };
        let Some(kinds) = file.metadata().get_array(SKETCH_KIND_KEY)? else {
            return Ok(None);
        };
        let name = |part: &str| format!("blk.{layer}.{part}");
        let rank_of = |part: &str| {
            let info = file.require_tensor(&name(part))?;
            Ok::<_, RuntimeError>(info.n_rows())
        };
        let matrix = |part: &str, n_rows: usize, n_cols: usize| {
            let matrix = tensors::find_matrix(file, &name(part), n_rows, n_cols);
            matrix.map(|matrix| quantised(&matrix)).map_err(in_file)
        };
        let vector =
            |part: &str, len: usize| tensors::find_vector(file, &name(part), len).map_err(in_file);
        let (n_embd, n_ff) = (hyper.n_embd, hyper.n_ff);
        let sketch = match kinds.to_strs()?.get(layer) {
            Some(&"signs") => Sketch::Signs,
            Some(&"two_bits") => Sketch::TwoBits,
            Some(&"low_rank") => {
                let rank = rank_of("sketch_a.weight")?;
                Sketch::LowRank(LowRank {
                    a: matrix("sketch_a.weight", rank, n_embd)?,
                    b: matrix("sketch_b.weight", n_ff, rank)?,
                })
            }
            _ => Sketch::None,
        };
        let ahead = match file.tensor(&name("ahead_a.weight")) {
            None => None,
            Some(a) => Some(Ahead {
                a: matrix("ahead_a.weight", a.n_rows(), n_embd)?,
                a_bias: match file.tensor(&name("ahead_a.bias")) {
                    Some(_) => Some(vector("ahead_a.bias", a.n_rows())?),
                    None => None,
                },
                b: matrix("ahead_b.weight", n_ff, a.n_rows())?,
                b_bias: vector("ahead_b.bias", n_ff)?,
            }),
        };
        Ok(Some(Self { sketch, ahead }))
    }
}

/// Where a checkpoint notes the kind of one layer's sketch.
fn kind_key(layer: usize) -> String {
    format!("kind.{layer}")
}

impl Preparation {
    /// Threads for fits.
    pub(super) fn workers(&self) -> Workers {
        let n_threads = self.subject.plan.n_threads();
        Workers::new(NonZeroUsize::new(n_threads).unwrap_or(NonZeroUsize::MIN))
    }

    /// Fits the predictors of all layers; each layer's are kept as soon as they are there.
    pub(super) fn predictors(&self) -> Result<Section, RuntimeError> {
        let states = self.states()?;
        let n_layer = self.subject.hyper.n_layer;
        let gpu = self.subject.fit_gpu()?;
        let on = FitOn {
            workers: self.workers(),
            gpu: gpu.as_ref(),
        };
        let layers = self.each_layer("predictors", states.n_tokens(), |layer| {
            let part = format!("predictors-{layer}");
            if self.checkpoint.section(&part).is_none() {
                let section = self.fit_layer(&states, layer, on)?.section(layer)?;
                self.checkpoint.keep(&part, &section)?;
            }
            let kept = GgufFile::open(self.checkpoint.section_path(&part))?;
            let kind = kept.metadata().require_str(&kind_key(layer))?.to_owned();
            Ok((kind, Section::of(&kept, |name| name != kind_key(layer))?))
        })?;
        let mut all = Section::new();
        let mut kinds = Vec::with_capacity(n_layer);
        for (kind, section) in layers {
            kinds.push(kind);
            all.append(&section)?;
        }
        all.put(SKETCH_KIND_KEY, kinds)?;
        if n_layer > 1 {
            all.put(AHEAD_KIND_KEY, self.options.ahead.name())?;
        }
        Ok(all)
    }

    /// What `layer` was seen to do on the tokens of `states`.
    pub(super) fn layer_samples(
        &self,
        states: &SampleFile,
        layer: usize,
    ) -> Result<LayerSamples, RuntimeError> {
        let all = 0..states.n_tokens();
        let x = states.normed(layer, all.clone())?;
        let (gates, contributions) = self.activity(layer).gates_and_contributions(&x);
        let samples = LayerSamples {
            n_tokens: states.n_tokens(),
            n_embd: self.subject.hyper.n_embd,
            n_ff: self.subject.hyper.n_ff,
            x,
            residual_before: match layer {
                0 => None,
                layer => Some(states.residual(layer - 1, all)?),
            },
            gates,
            contributions,
        };
        samples.check().map_err(|source| in_layer(layer, source))?;
        Ok(samples)
    }

    fn fit_layer(
        &self,
        states: &SampleFile,
        layer: usize,
        on: FitOn<'_>,
    ) -> Result<LayerPredictors, RuntimeError> {
        let samples = self.layer_samples(states, layer)?;
        // each has parts that one thread does
        std::thread::scope(|scope| {
            let ahead = (layer > 0).then(|| scope.spawn(|| self.fit_ahead(&samples, layer, on)));
            let sketch = self.fit_sketch(&samples, layer, on)?;
            let ahead = ahead.map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            Ok(LayerPredictors {
                sketch,
                ahead: ahead.transpose()?,
            })
        })
    }

    /// The cheapest sketch that meets the target.
    fn fit_sketch(
        &self,
        samples: &LayerSamples,
        layer: usize,
        on: FitOn<'_>,
    ) -> Result<Sketch, RuntimeError> {
        let (cpu, workers) = (self.subject.options.cpu, on.workers);
        let (n_embd, n_ff) = (samples.n_embd, samples.n_ff);
        let gate = &self.subject.tensors.layers[layer].gate;
        let mut sketches = Vec::new();
        if gate.quant == QuantType::Q4_0 {
            sketches.push((Kind::Signs, Sketch::Signs));
            sketches.push((Kind::TwoBits, Sketch::TwoBits));
        }
        // of a map that is no smaller than the gates nothing is gained
        let ranks = RANKS
            .into_iter()
            .filter(|rank| 2 * rank * (n_embd + n_ff) <= n_embd * n_ff);
        let ranks: Vec<usize> = ranks.collect();
        if let Some(most) = ranks.last() {
            let fit = low_rank::fit(samples, on, *most);
            let fit = fit.map_err(|source| in_layer(layer, source))?;
            for rank in ranks {
                let map = fit.at(rank, QUANT);
                let map = map.map_err(|source| in_layer(layer, source))?;
                sketches.push((Kind::LowRank { rank }, Sketch::LowRank(map)));
            }
        }
        let tokens = samples.calibrating();
        let masses = samples.masses(tokens.clone());
        let x = samples.x(tokens);
        let mut judged: Vec<Option<(Kind, Evaluation)>> = vec![None; sketches.len()];
        workers.each(
            judged.iter_mut().zip(&sketches),
            |(judged, (kind, sketch))| {
                *judged = sketch.scores(cpu, workers, gate, x).map(|scores| {
                    let biases = scores.fit(&masses, CHOSEN_AT);
                    (*kind, scores.evaluate(&biases, None, &masses))
                });
            },
        );
        let judged: Vec<(Kind, Evaluation)> = judged.into_iter().flatten().collect();
        let best = cheapest(&judged, &COSTS, CHOSEN_AT, n_embd, n_ff);
        Ok(best.map_or(Sketch::None, |best| sketches.swap_remove(best).1))
    }

    fn fit_ahead(
        &self,
        samples: &LayerSamples,
        layer: usize,
        on: FitOn<'_>,
    ) -> Result<Ahead, RuntimeError> {
        let (cpu, workers) = (self.subject.options.cpu, on.workers);
        let fitted = match self.options.ahead {
            AheadKind::Svd => ahead_svd::fit(samples, on, AHEAD_RANK, QUANT),
            AheadKind::Trained => {
                let training = Training {
                    rank: AHEAD_RANK,
                    seed: self.options.seed.wrapping_add(layer as u32),
                    ..Training::default()
                };
                ahead_trained::fit(samples, on, &training, |_, _| ())
            }
        };
        let mut ahead = fitted.map_err(|source| in_layer(layer, source))?;
        ahead.calibrate(cpu, workers, samples, AHEAD_TARGET);
        Ok(ahead)
    }
}

/// An error of a layer.
fn in_layer(layer: usize, source: PredictorError) -> PrepareError {
    PrepareError::Predictor { layer, source }
}
