//! The sidecar `<model>.sparse.gguf`: what `prepare` found out about a model, for the modes that need it.
//!
//! One GGUF file with a section for each part: activation frequencies, predictors, thresholds, the sketch of the head.
//! Every section may be absent. The file belongs to one model, which it names by a hash.

mod error;
mod hash;
mod predictors;
pub mod profile;
mod section;
mod threshold;

use std::path::{Path, PathBuf};

pub use error::SidecarError;
pub use hash::model_hash;
pub use predictors::{
    AHEAD_KIND_KEY, Ahead, LayerPredictors, SKETCH_KIND_KEY, Sketch, SketchKind, TWO_BIT_BIAS,
};
pub use profile::Profile;
pub use section::Section;
pub use threshold::{ThresholdFigures, ThresholdSection};

use crate::gguf::{GgufError, GgufFile, GgufWriter};
use crate::model::Hyperparameters;
use crate::model::description::Description;
use crate::model::tensors::{self, FileMatrix};

/// `general.architecture` of a sidecar.
pub const ARCHITECTURE: &str = "pi-sparse";
/// Version of the format.
pub const VERSION: u32 = 3;

const VERSION_KEY: &str = "sparse.version";
const HASH_KEY: &str = "sparse.model_hash";

/// Where a model's sidecar is unless it is named: the model's path with `.sparse.gguf` for `.gguf`.
pub fn default_path(model: &Path) -> PathBuf {
    let stem = match model.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("gguf") => model.with_extension(""),
        _ => model.to_owned(),
    };
    let mut path = stem.into_os_string();
    path.push(".sparse.gguf");
    path.into()
}

/// The sizes that a sidecar states.
fn shape(hyper: &Hyperparameters) -> [(&'static str, usize); 4] {
    [
        ("sparse.block_count", hyper.n_layer),
        ("sparse.embedding_length", hyper.n_embd),
        ("sparse.feed_forward_length", hyper.n_ff),
        ("sparse.vocab_size", hyper.n_vocab),
    ]
}

/// The header of a new sidecar for a model; sections add their keys and tensors.
///
/// # Errors
/// Only for a model name that no file can hold.
pub fn sidecar_header(
    model: &GgufFile,
    hyper: &Hyperparameters,
) -> Result<GgufWriter, SidecarError> {
    let mut header = GgufWriter::new();
    header.put("general.architecture", ARCHITECTURE)?;
    let name = Description::of(model).name;
    header.put("general.name", format!("{name} (sparse running)").as_str())?;
    header.put(VERSION_KEY, VERSION)?;
    header.put(HASH_KEY, model_hash(model).as_str())?;
    for (key, size) in shape(hyper) {
        header.put(key, size as u32)?;
    }
    Ok(header)
}

/// An open sidecar of a model.
#[derive(Debug, Clone)]
pub struct Sidecar {
    file: GgufFile,
    path: PathBuf,
}

impl Sidecar {
    /// Opens the sidecar at `path`, and checks that it belongs to `model`.
    ///
    /// # Errors
    /// A file that cannot be read or is no sidecar, a newer version, or the sidecar of another model.
    pub fn open(
        path: &Path,
        model: &GgufFile,
        hyper: &Hyperparameters,
    ) -> Result<Self, SidecarError> {
        let file = GgufFile::open(path)?;
        let sidecar = Self {
            file,
            path: path.to_owned(),
        };
        sidecar.check(model, hyper)?;
        Ok(sidecar)
    }

    fn check(&self, model: &GgufFile, hyper: &Hyperparameters) -> Result<(), SidecarError> {
        let metadata = self.file.metadata();
        let path = || self.path.clone();
        if metadata.get_str("general.architecture")? != Some(ARCHITECTURE) {
            return Err(SidecarError::NoSidecar { path: path() });
        }
        let version = metadata.require_u32(VERSION_KEY)?;
        if version != VERSION {
            return Err(SidecarError::Version {
                path: path(),
                version,
            });
        }
        for (key, expected) in shape(hyper) {
            let found = metadata.require_usize(key)?;
            if found != expected {
                return Err(SidecarError::OtherShape {
                    path: path(),
                    key,
                    found,
                    expected,
                });
            }
        }
        let found = metadata.require_str(HASH_KEY)?;
        let expected = model_hash(model);
        if found != expected {
            return Err(SidecarError::OtherModel {
                path: path(),
                found: found.to_owned(),
                expected,
            });
        }
        Ok(())
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its metadata and tensors.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// The vector `name`, `[len]` f32, if it is there.
    ///
    /// # Errors
    /// Another length or type, or a value that is not finite.
    pub fn vector(&self, name: &str, len: usize) -> Result<Option<Vec<f32>>, SidecarError> {
        if self.file.tensor(name).is_none() {
            return Ok(None);
        }
        let values = tensors::find_vector(&self.file, name, len)
            .map_err(|source| self.in_tensor(name, source))?;
        match values.iter().position(|value| !value.is_finite()) {
            Some(index) => Err(SidecarError::NotFinite {
                path: self.path.clone(),
                tensor: name.to_owned(),
                index,
            }),
            None => Ok(Some(values)),
        }
    }

    /// The matrix `name`, `[n_rows, n_cols]`, if it is there.
    ///
    /// # Errors
    /// Another shape, or a type that cannot be computed with.
    pub fn matrix(
        &self,
        name: &str,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<Option<FileMatrix>, SidecarError> {
        if self.file.tensor(name).is_none() {
            return Ok(None);
        }
        tensors::find_matrix(&self.file, name, n_rows, n_cols)
            .map(Some)
            .map_err(|source| self.in_tensor(name, source))
    }

    /// The error for a part that is missing although another one needs it.
    pub fn missing(&self, what: impl Into<String>) -> SidecarError {
        SidecarError::Missing {
            path: self.path.clone(),
            what: what.into(),
        }
    }

    fn in_tensor(&self, name: &str, source: crate::model::ModelError) -> SidecarError {
        SidecarError::Tensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            source: Box::new(source),
        }
    }
}

/// Reads a value of a sidecar's metadata, naming the file in errors.
impl From<GgufError> for SidecarError {
    fn from(source: GgufError) -> Self {
        SidecarError::Gguf(source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sidecar_lies_beside_its_model() {
        let beside = |model: &str| default_path(model.as_ref());
        assert_eq!(beside("m/a.b.gguf"), PathBuf::from("m/a.b.sparse.gguf"));
        assert_eq!(beside("m/a.bin"), PathBuf::from("m/a.bin.sparse.gguf"));
    }
}
