//! The stage that sets the sketches' thresholds: as loose as the wanted quality allows.
//!
//! Thresholds of all layers are fitted to one target at a time, for a row of targets; of these the loosest is taken
//! with which what is foretold of passages that nothing was fitted to stays within the budget.

use std::path::Path;
use std::sync::Arc;

use super::PrepareError;
use super::divergence::{Beside, Foretold};
use super::predictors::{Biases, LayerPredictors, Sketch};
use super::preparation::Preparation;
use super::stage::Stage;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::Sparsity;
use crate::predictor::thresholds::{Target, fit_floor};
use crate::sidecar::{Section, TWO_BIT_BIAS, sidecar_header};

/// Targets from loose to strict: root mean square over tokens of the share of its mass that a token loses.
pub(super) const TARGETS: [f64; 14] = [
    0.05, 0.035, 0.025, 0.018, 0.012, 0.009, 0.007, 0.0055, 0.0045, 0.0035, 0.0028, 0.0024, 0.002,
    0.0014,
];
/// Share of the target that active neurons of small contribution may lose.
const FLOOR_SHARE: f64 = 0.25;
/// Share of the budget that the divergence on passages kept back may use: other texts cost more than the one that is
/// chosen by (about a quarter, for the demo model on held-out text).
const BUDGET_USED: f64 = 0.8;

const TARGET_KEY: &str = "sparse.sketch.target";

impl Preparation {
    /// Fits thresholds for every target, and takes those that the budget allows.
    pub(super) fn sketch_thresholds(&self) -> Result<Section, RuntimeError> {
        let predictors = self.predictors_file()?;
        let states = self.states()?;
        let part = |layer: usize, target: usize| format!("thresholds-{layer}-{target}");
        self.each_layer("thresholds", states.n_tokens(), |layer| {
            let is_there = |target: usize| self.checkpoint.section(&part(layer, target)).is_some();
            match (0..TARGETS.len()).all(is_there) {
                true => Ok(()),
                false => self.fit_targets(&predictors, &states, layer),
            }
        })?;
        let mut by_target = vec![Section::new(); TARGETS.len()];
        for layer in 0..self.subject.hyper.n_layer {
            for (target, all) in by_target.iter_mut().enumerate() {
                let done = self.checkpoint.section(&part(layer, target));
                all.append(&done.unwrap_or_default())?;
            }
        }
        self.loosest(&predictors, &by_target)
    }

    /// Fits the thresholds of one layer to all targets, and keeps them.
    fn fit_targets(
        &self,
        predictors: &GgufFile,
        states: &super::samples::SampleFile,
        layer: usize,
    ) -> Result<(), RuntimeError> {
        let hyper = &self.subject.hyper;
        let predictors = LayerPredictors::read(predictors, layer, hyper)?;
        let sketch = predictors.map_or(Sketch::None, |predictors| predictors.sketch);
        let samples = self.layer_samples(states, layer)?;
        let tokens = samples.calibrating();
        let gate = &self.subject.tensors.layers[layer].gate;
        let (cpu, x) = (self.subject.options.cpu, samples.x(tokens.clone()));
        let scores = sketch.scores(cpu, self.workers(), gate, x);
        let masses = samples.masses(tokens);
        // each is one thread's
        let mut fitted: [Option<(Vec<f32>, Biases)>; TARGETS.len()] = [const { None }; _];
        if let Some(scores) = &scores {
            let targets = fitted.iter_mut().zip(TARGETS);
            self.workers().each(targets, |(fitted, target)| {
                let floor = fit_floor(&masses, target * FLOOR_SHARE);
                let kept = masses.above(&floor);
                let biases = scores.fit(&kept, Target::LostRms(target));
                *fitted = Some((floor, biases));
            });
        }
        for (index, fitted) in fitted.into_iter().enumerate() {
            let mut section = Section::new();
            if let Some((floor, biases)) = fitted {
                section.vector(&format!("blk.{layer}.sketch.bias"), &biases.first)?;
                if let Some(bias) = &biases.two_bits {
                    section.vector(&format!("blk.{layer}.{TWO_BIT_BIAS}"), bias)?;
                }
                section.vector(&format!("blk.{layer}.gate_floor"), &floor)?;
            }
            let part = format!("thresholds-{layer}-{index}");
            self.checkpoint.keep(&part, &section)?;
        }
        Ok(())
    }

    /// The loosest thresholds whose perplexity is within the budget.
    fn loosest(
        &self,
        predictors: &GgufFile,
        by_target: &[Section],
    ) -> Result<Section, RuntimeError> {
        let budget = self.options.quality * BUDGET_USED;
        let passages = &self.passages.1;
        let reference = Foretold::default();
        let reference =
            self.second_halves("divergence", Sparsity::Exact, None, passages, reference)?;
        let reference = Arc::new(reference);
        // targets below `loose` fail, and `strict` is the loosest known to do
        let (mut loose, mut strict) = (0, TARGETS.len());
        while loose < strict {
            self.check_stop()?;
            let middle = (loose + strict) / 2;
            let path = self.checkpoint.folder().join("trial.sparse.gguf");
            self.write_trial(predictors, &by_target[middle], &path)?;
            let beside = Beside::new(Arc::clone(&reference));
            let (mode, sidecar) = (Sparsity::Predicted, Some(path.as_path()));
            let beside = self.second_halves("divergence", mode, sidecar, passages, beside)?;
            let rise = beside.divergence().exp() - 1.0;
            let seen = beside.score.ppl() / reference.score.ppl() - 1.0;
            self.observer.say(&format!(
                "losing {:.2} % of a token's mass: perplexity {:+.2} % by divergence from `exact` on passages kept back ({:+.2} % by their tokens)",
                TARGETS[middle] * 100.0,
                rise * 100.0,
                seen * 100.0
            ));
            if rise <= budget {
                strict = middle;
            } else {
                loose = middle + 1;
            }
        }
        if strict == TARGETS.len() {
            self.observer.say(&format!(
                "warning: perplexity rises by more than {:.2} % even with the strictest thresholds, which are taken",
                budget * 100.0
            ));
        }
        let taken = strict.min(TARGETS.len() - 1);
        let mut section = by_target[taken].clone();
        section.put(TARGET_KEY, TARGETS[taken] as f32)?;
        Ok(section)
    }

    /// A sidecar with the predictors and some thresholds.
    fn write_trial(
        &self,
        predictors: &GgufFile,
        thresholds: &Section,
        path: &Path,
    ) -> Result<(), RuntimeError> {
        let mut section = Section::of(predictors, |name| Stage::Predictors.owns(name))?;
        section.append(thresholds)?;
        let header = sidecar_header(&self.subject.file, &self.subject.hyper)?;
        section.write(header, path)?;
        Ok(())
    }

    /// The file that has the predictors: what was just made, or the sidecar that is there.
    pub(super) fn predictors_file(&self) -> Result<GgufFile, RuntimeError> {
        let made = self.checkpoint.section_path(Stage::Predictors.name());
        if made.exists() {
            return Ok(GgufFile::open(made)?);
        }
        let missing = || PrepareError::StageMissing {
            path: self.options.output.clone(),
            missing: "predictors",
            stage: Stage::Predictors.name(),
        };
        let sidecar = self.kept.as_ref().ok_or_else(missing)?;
        match LayerPredictors::read(sidecar.file(), 0, &self.subject.hyper)? {
            Some(_) => Ok(sidecar.file().clone()),
            None => Err(missing().into()),
        }
    }
}
