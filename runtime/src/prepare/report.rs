//! The stage that says what a sidecar gives, on a text that nothing was fitted to.

use std::path::{Path, PathBuf};

use super::predictors::{Biases, LayerPredictors, Sketch};
use super::preparation::Preparation;
use super::score_costs::{Predictors, TokenCosts};
use super::stage::Stage;
use super::text::{HELD_OUT, Passages, Text};
use super::trials::Speed;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::head_sketch::Agreement;
use crate::model::Sparsity;
use crate::model::tensors;
use crate::predictor::LayerSamples;
use crate::predictor::thresholds::{Evaluation, Masses, evaluate};
use crate::sidecar::{Section, TWO_BIT_BIAS, sidecar_header};

/// Passages whose hidden states are looked at.
const N_PASSAGES_SEEN: usize = 8;
/// Passages whose perplexity is measured.
const N_PASSAGES_SCORED: usize = 32;
/// Passages of which half the positions are compared: a thousand.
const N_PASSAGES_COMPARED: usize = 4;
/// Rounds of decoding in each mode.
const N_ROUNDS: usize = 3;

/// What the predictors of a layer did on held-out text.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// Kind of the sketch.
    pub sketch: &'static str,
    /// What its candidates keep and cost; of all neurons where there is no sketch.
    pub in_layer: Evaluation,
    /// What the predictor ahead keeps and costs, if there is one.
    pub ahead: Option<Evaluation>,
}

/// A mode's figures on held-out text.
#[derive(Debug, Clone, PartialEq)]
pub struct ModeReport {
    /// The mode.
    pub mode: Sparsity,
    /// Perplexity.
    pub perplexity: f64,
    /// Share of positions at which the likeliest token is that of `exact`.
    pub agreement: f64,
    /// Decode speed; not part of the sidecar, as it differs from run to run.
    pub speed: Speed,
}

/// What a sidecar gives.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// Layers in order; none where there are no predictors.
    pub layers: Vec<LayerReport>,
    /// The modes that run with it.
    pub modes: Vec<ModeReport>,
    /// Positions compared for the agreement.
    pub n_compared: usize,
    /// Tokens of held-out text whose neurons were looked at.
    pub n_tokens: usize,
    /// The sparse head beside the full one, if there is a sketch of it.
    pub head: Option<Agreement>,
    /// What each predictor takes of a decoded token; not part of the sidecar, as times differ from run to run, and bytes
    /// with the nodes. None where there are no predictors, or a GPU has them.
    pub costs: Vec<TokenCosts>,
}

impl Report {
    /// A mean over the layers.
    pub fn mean(&self, figure: impl Fn(&LayerReport) -> f64) -> f64 {
        self.layers.iter().map(figure).sum::<f64>() / self.layers.len().max(1) as f64
    }

    /// The figures that do not depend on the machine.
    ///
    /// # Errors
    /// Never: the keys are valid.
    pub fn section(&self) -> Result<Section, RuntimeError> {
        let mut section = Section::new();
        let key = |name: &str| format!("sparse.report.{name}");
        section.put(&key("n_tokens"), self.n_tokens as u32)?;
        for mode in &self.modes {
            let name = mode.mode.name();
            let perplexity = mode.perplexity as f32;
            section.put(&key(&format!("perplexity.{name}")), perplexity)?;
            section.put(&key(&format!("agreement.{name}")), mode.agreement as f32)?;
        }
        if let Some(head) = &self.head {
            section.put(&key("head.greedy"), head.greedy as f32)?;
            section.put(&key("head.sampled"), head.sampled as f32)?;
            let distance = head.total_variation as f32;
            section.put(&key("head.total_variation"), distance)?;
            section.put(&key("head.candidates"), head.candidates as f32)?;
        }
        let mut layers = |name: &str, figure: &dyn Fn(&LayerReport) -> f64| {
            let figures: Vec<f32> = self.layers.iter().map(|l| figure(l) as f32).collect();
            section.put(&key(name), figures)
        };
        if !self.layers.is_empty() {
            layers("mass_kept", &|layer| 1.0 - layer.in_layer.lost.mean)?;
            layers("mass_lost_rms", &|layer| layer.in_layer.lost.rms)?;
            layers("found", &|layer| layer.in_layer.found)?;
            layers("precision", &|layer| layer.in_layer.precision)?;
            layers("candidates", &|layer| layer.in_layer.candidates)?;
            layers("named", &|layer| layer.in_layer.named)?;
            layers("density", &|layer| layer.in_layer.density)?;
            layers("computed", &|layer| layer.in_layer.computed)?;
            let ahead = |layer: &LayerReport| layer.ahead.unwrap_or_default();
            layers("ahead_mass_kept", &|layer| 1.0 - ahead(layer).lost.mean)?;
            layers("ahead_candidates", &|layer| ahead(layer).candidates)?;
        }
        Ok(section)
    }
}

impl Preparation {
    /// Measures on held-out text what the sections give.
    pub(super) fn report(&self, sections: &[Section]) -> Result<Report, RuntimeError> {
        let text = Text::new("the held-out text", &[HELD_OUT], &self.subject.tokenizer)?;
        let n_ctx = self.passages.0.n_ctx();
        let passages = |n| text.passages(n_ctx, n, 2, self.subject.bos());
        let sidecar = self.sidecar_so_far(sections)?;
        let file = GgufFile::open(&sidecar)?;
        let has_predictors = LayerPredictors::read(&file, 0, &self.subject.hyper)?.is_some();
        let seen = passages(N_PASSAGES_SEEN)?;
        let layers = match has_predictors {
            true => self.layer_reports(&file, &seen)?,
            false => Vec::new(),
        };
        let mut modes = vec![(Sparsity::Off, None)];
        if self.subject.is_relu() {
            modes.push((Sparsity::Exact, None));
        }
        if has_predictors {
            modes.push((Sparsity::Predicted, Some(sidecar.as_path())));
        }
        if file.metadata().get_bool("sparse.threshold.gains")? == Some(true) {
            modes.push((Sparsity::Threshold, Some(sidecar.as_path())));
        }
        let compared = passages(N_PASSAGES_COMPARED)?;
        let modes = self.mode_reports(&modes, &passages(N_PASSAGES_SCORED)?, &compared)?;
        let head = self.head_agreement(&sidecar, sections, &seen)?;
        let predictors = Predictors {
            in_layer: has_predictors && layers.iter().any(|layer| layer.sketch != "none"),
            ahead: layers.iter().any(|layer| layer.ahead.is_some()),
            head: head.is_some(),
        };
        Ok(Report {
            costs: self.score_costs(&sidecar, predictors)?,
            layers,
            modes,
            n_compared: compared.len() * (n_ctx - n_ctx / 2),
            n_tokens: seen.tokens().len(),
            head,
        })
    }

    /// A file with the sections that are there.
    fn sidecar_so_far(&self, sections: &[Section]) -> Result<PathBuf, RuntimeError> {
        let path = self.checkpoint.folder().join("so-far.sparse.gguf");
        let mut all = Section::new();
        for section in sections {
            all.append(section)?;
        }
        all.write(
            sidecar_header(&self.subject.file, &self.subject.hyper)?,
            &path,
        )?;
        Ok(path)
    }

    fn layer_reports(
        &self,
        file: &GgufFile,
        passages: &Passages,
    ) -> Result<Vec<LayerReport>, RuntimeError> {
        let path = self.checkpoint.folder().join("held-out.f16");
        let states = self.collect(passages, &path, 0, |_| Ok(()))?;
        self.each_layer("report", states.n_tokens(), |layer| {
            let samples = self.layer_samples(&states, layer)?;
            self.layer_report(file, layer, &samples)
        })
    }

    fn layer_report(
        &self,
        file: &GgufFile,
        layer: usize,
        samples: &LayerSamples,
    ) -> Result<LayerReport, RuntimeError> {
        let hyper = &self.subject.hyper;
        let (cpu, workers) = (self.subject.options.cpu, self.workers());
        let gate = &self.subject.tensors.layers[layer].gate;
        let all = 0..samples.n_tokens;
        let masses: Masses<'_> = samples.masses(all.clone());
        let predictors = LayerPredictors::read(file, layer, hyper)?;
        let (sketch, ahead) = match predictors {
            Some(predictors) => (predictors.sketch, predictors.ahead),
            None => (Sketch::None, None),
        };
        let in_layer = match sketch.scores(cpu, workers, gate, samples.x(all.clone())) {
            Some(scores) => {
                let first = self.vector(file, layer, "sketch.bias")?;
                let floor = self.vector(file, layer, "gate_floor")?;
                let biases = Biases {
                    first: first.ok_or_else(|| self.missing_thresholds())?,
                    two_bits: self.vector(file, layer, TWO_BIT_BIAS)?,
                };
                scores.evaluate(&biases, floor.as_deref(), &masses)
            }
            // all gates are computed
            None => evaluate(
                samples.gates(all.clone()),
                &vec![0.0; hyper.n_ff],
                None,
                &masses,
            ),
        };
        let ahead = ahead.zip(samples.residual(all)).map(|(ahead, residual)| {
            let scores = ahead.products(cpu, workers, residual);
            evaluate(&scores, &ahead.b_bias, None, &masses)
        });
        Ok(LayerReport {
            sketch: sketch.name(),
            in_layer,
            ahead,
        })
    }

    fn missing_thresholds(&self) -> super::PrepareError {
        super::PrepareError::StageMissing {
            path: self.options.output.clone(),
            missing: "thresholds",
            stage: Stage::Thresholds.name(),
        }
    }

    fn vector(
        &self,
        file: &GgufFile,
        layer: usize,
        part: &str,
    ) -> Result<Option<Vec<f32>>, RuntimeError> {
        let name = format!("blk.{layer}.{part}");
        if file.tensor(&name).is_none() {
            return Ok(None);
        }
        let found = tensors::find_vector(file, &name, self.subject.hyper.n_ff);
        found.map(Some).map_err(|source| RuntimeError::Model {
            path: self.options.output.clone(),
            source,
        })
    }

    fn mode_reports(
        &self,
        modes: &[(Sparsity, Option<&Path>)],
        scored: &Passages,
        compared: &Passages,
    ) -> Result<Vec<ModeReport>, RuntimeError> {
        let speeds = self.speeds(modes, N_ROUNDS)?;
        let reference = match modes.iter().any(|(mode, _)| *mode == Sparsity::Exact) {
            true => Sparsity::Exact,
            false => Sparsity::Off,
        };
        let expected = self.likeliest_tokens(reference, None, compared)?;
        let mut reports = Vec::with_capacity(modes.len());
        for ((mode, sidecar), speed) in modes.iter().zip(speeds) {
            let tokens = self.likeliest_tokens(*mode, *sidecar, compared)?;
            let equal = tokens.iter().zip(&expected).filter(|(a, b)| a == b).count();
            reports.push(ModeReport {
                mode: *mode,
                perplexity: self.perplexity(*mode, *sidecar, scored)?,
                agreement: equal as f64 / expected.len().max(1) as f64,
                speed,
            });
        }
        Ok(reports)
    }
}
