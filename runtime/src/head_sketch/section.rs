//! The sidecar's section: keys under `sparse.head.`, tensors `head_sketch.a.weight` and `head_sketch.b.weight`.

use pi_kernels::quant::BLOCK;

use super::{HeadSketch, PROJECT_TYPE, SCORES_TYPE};
use crate::gguf::{GgmlType, GgufError, GgufStream, GgufWriter};
use crate::model::Hyperparameters;
use crate::model::quantize::dequantize_row;
use crate::model::tensors::FileMatrix;
use crate::sidecar::{Sidecar, SidecarError};

const RANK_KEY: &str = "sparse.head.rank";
const GROUPS_KEY: &str = "sparse.head.groups";
const CANDIDATES_KEY: &str = "sparse.head.mean_candidates";
const PROJECT: &str = "head_sketch.a.weight";
const SCORES: &str = "head_sketch.b.weight";

/// A sketch as the loader takes it: mapped, checked.
#[derive(Debug, Clone)]
pub struct SketchTensors {
    /// `[rank, n_embd]`
    pub project: FileMatrix,
    /// `[n_vocab, rank]`
    pub scores: FileMatrix,
    /// As [`HeadSketch::n_groups`].
    pub n_groups: usize,
    /// As [`HeadSketch::mean_candidates`].
    pub mean_candidates: f32,
}

impl HeadSketch {
    /// Adds the section's keys and tensors to a sidecar's header.
    ///
    /// # Errors
    /// Keys or tensors that are there already.
    pub fn declare(&self, header: &mut GgufWriter) -> Result<(), GgufError> {
        header.put(RANK_KEY, self.rank as u32)?;
        header.put(GROUPS_KEY, self.n_groups as u32)?;
        header.put(CANDIDATES_KEY, self.mean_candidates)?;
        header.add_tensor(
            PROJECT,
            GgmlType::from(PROJECT_TYPE),
            &[self.n_embd, self.rank],
        )?;
        header.add_tensor(
            SCORES,
            GgmlType::from(SCORES_TYPE),
            &[self.rank, self.n_vocab],
        )
    }

    /// Writes the section's tensors.
    ///
    /// # Errors
    /// Those of the file.
    pub fn write(&self, file: &mut GgufStream) -> Result<(), GgufError> {
        file.write(PROJECT, &self.project)?;
        file.write(SCORES, &self.scores)
    }
}

impl SketchTensors {
    /// Reads the section.
    ///
    /// # Errors
    /// It is not there, its sizes are none that a head of `hyper` can have, or a weight is not finite.
    pub fn read(sidecar: &Sidecar, hyper: &Hyperparameters) -> Result<Self, SidecarError> {
        let metadata = sidecar.file().metadata();
        let missing = || sidecar.missing("sketch of the head, which --head sparse needs");
        let rank = metadata.get_usize(RANK_KEY)?.ok_or_else(missing)?;
        let n_groups = metadata.require_usize(GROUPS_KEY)?;
        let mean_candidates = metadata.require_f32(CANDIDATES_KEY)?;
        let bad = |problem: String| SidecarError::BadKey {
            path: sidecar.path().to_owned(),
            problem,
        };
        if rank == 0 || !rank.is_multiple_of(BLOCK) || rank > hyper.n_embd {
            let n_embd = hyper.n_embd;
            return Err(bad(format!(
                "`{RANK_KEY}` is {rank}, and not a multiple of {BLOCK} up to {n_embd}"
            )));
        }
        if n_groups == 0 {
            return Err(bad(format!("`{GROUPS_KEY}` is 0")));
        }
        if !(0.0..=hyper.n_vocab as f32).contains(&mean_candidates) {
            return Err(bad(format!("`{CANDIDATES_KEY}` is {mean_candidates}")));
        }
        let matrix = |name: &str, n_rows: usize, n_cols: usize| {
            let matrix = sidecar.matrix(name, n_rows, n_cols)?.ok_or_else(missing)?;
            check_finite(sidecar, name, &matrix)?;
            Ok::<_, SidecarError>(matrix)
        };
        Ok(Self {
            project: matrix(PROJECT, rank, hyper.n_embd)?,
            scores: matrix(SCORES, hyper.n_vocab, rank)?,
            n_groups,
            mean_candidates,
        })
    }
}

/// A score that is no number would silently make its token no candidate.
fn check_finite(sidecar: &Sidecar, name: &str, matrix: &FileMatrix) -> Result<(), SidecarError> {
    let n_cols = matrix.n_cols();
    let mut values = vec![0.0; n_cols];
    for row in 0..matrix.n_rows() {
        dequantize_row(matrix.quant, matrix.rows(row..row + 1), &mut values);
        if let Some(column) = values.iter().position(|value| !value.is_finite()) {
            return Err(SidecarError::NotFinite {
                path: sidecar.path().to_owned(),
                tensor: name.to_owned(),
                index: row * n_cols + column,
            });
        }
    }
    Ok(())
}
