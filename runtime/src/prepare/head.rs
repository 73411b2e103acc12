//! The stage that makes the sketch of the output head, and what of the report is about it.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use super::preparation::Preparation;
use super::stage::Stage;
use super::text::Passages;
use crate::error::RuntimeError;
use crate::gguf::GgufWriter;
use crate::head_sketch::{
    Agreement, FitOptions, HeadSketchError, HeadTap, agreement, prepare_head,
};
use crate::sampler::SamplerParams;
use crate::sidecar::Section;

/// Parts that a bar of shares has.
const N_PARTS: usize = 100;

impl Preparation {
    /// Makes the sketch, where one saves anything.
    pub(super) fn head(&self) -> Result<Section, RuntimeError> {
        let passages = &self.passages.0;
        let tap = Arc::new(HeadTap::default());
        let model = self.subject.run_tapped(passages.n_ctx(), tap.clone())?;
        let options = FitOptions {
            n_threads: NonZeroUsize::new(self.subject.plan.n_threads())
                .unwrap_or(NonZeroUsize::MIN),
            seed: self.options.seed,
            ..FitOptions::default()
        };
        self.observer.begin("head", N_PARTS);
        let progress = |share: f64| self.observer.at((share * N_PARTS as f64) as usize);
        let made = prepare_head(
            &model,
            &tap,
            passages.tokens(),
            &options,
            &self.stop,
            &progress,
        );
        self.observer.end();
        let sketch = match made {
            Err(RuntimeError::HeadSketch(error @ HeadSketchError::Width { .. })) => {
                self.observer
                    .say(&format!("no sketch of the head: {error}"));
                None
            }
            made => made?,
        };
        let Some(sketch) = sketch else {
            self.observer
                .say("a sketch of this head would save too little: there is none");
            return Ok(Section::new());
        };
        let mut header = GgufWriter::new();
        sketch.declare(&mut header)?;
        let mut file = header.create(&self.checkpoint.section_path(Stage::Head.name()))?;
        sketch.write(&mut file)?;
        file.finish()?;
        let section = self.checkpoint.section(Stage::Head.name());
        Ok(section.unwrap_or_default())
    }

    /// How often the sparse head of the sidecar chooses what the full one does on `passages`; none without a sketch.
    pub(super) fn head_agreement(
        &self,
        sidecar: &Path,
        sections: &[Section],
        passages: &Passages,
    ) -> Result<Option<Agreement>, RuntimeError> {
        let at = Stage::ALL.iter().position(|stage| *stage == Stage::Head);
        if at.is_none_or(|at| sections[at].is_empty()) {
            return Ok(None);
        }
        let model = self.subject.run_sparse_head(passages.n_ctx(), sidecar)?;
        let chunks: Vec<Vec<u32>> = (0..passages.len())
            .map(|passage| passages.get(passage).to_vec())
            .collect();
        let params = SamplerParams::default();
        self.observer.begin("head's agreement", chunks.len());
        let mut sum = Agreement::default();
        for (done, chunk) in chunks.iter().enumerate() {
            self.check_stop()?;
            let seed = self.options.seed.wrapping_add(done as u32);
            let found = agreement(&model, std::slice::from_ref(chunk), &params, seed)?;
            join(&mut sum, &found);
            self.observer.at(done + 1);
        }
        self.observer.end();
        Ok(Some(sum))
    }
}

/// The figures of both, each weighted with its positions.
fn join(sum: &mut Agreement, other: &Agreement) {
    let n = (sum.n_positions + other.n_positions).max(1) as f64;
    let (own, theirs) = (sum.n_positions as f64 / n, other.n_positions as f64 / n);
    let mean = |a: f64, b: f64| a * own + b * theirs;
    *sum = Agreement {
        n_positions: sum.n_positions + other.n_positions,
        greedy: mean(sum.greedy, other.greedy),
        sampled: mean(sum.sampled, other.sampled),
        total_variation: mean(sum.total_variation, other.total_variation),
        candidates: mean(sum.candidates, other.candidates),
        sparse_bytes: mean(sum.sparse_bytes, other.sparse_bytes),
        full_bytes: mean(sum.full_bytes, other.full_bytes),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_weigh_alike() {
        let part = |n_positions, greedy| Agreement {
            n_positions,
            greedy,
            ..Agreement::default()
        };
        let mut sum = Agreement::default();
        join(&mut sum, &part(100, 1.0));
        join(&mut sum, &part(300, 0.6));
        assert_eq!(sum.n_positions, 400);
        assert!((sum.greedy - 0.7).abs() < 1e-12);
    }
}
