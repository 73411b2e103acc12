//! A model in several files, `name-00001-of-00003.gguf` and so on: opening the first opens all.
//!
//! Metadata are the first file's; every file has tensors. Three keys tie the files together:
//! `split.no` (from 0), `split.count` and `split.tensors.count` (of all files together).
//!
//! Source: `llama-gguf-split` and `llama_model_loader` of llama.cpp.

use std::path::{Path, PathBuf};

use super::{GgufError, GgufFile, names};
use crate::mapped_file::MapError;

/// Key of a file's number, from 0.
const NUMBER_KEY: &str = "split.no";
/// Key of the number of files.
const COUNT_KEY: &str = "split.count";
/// Key of the number of tensors in all files.
const TENSORS_KEY: &str = "split.tensors.count";
/// Most files that the names' five digits and llama.cpp's 16-bit number can count.
const MAX_SHARDS: u64 = u16::MAX as u64;

/// Whether a metadata key says how a model is divided into files, and means nothing in a single one.
pub fn is_split_key(key: &str) -> bool {
    [NUMBER_KEY, COUNT_KEY, TENSORS_KEY].contains(&key)
}

/// The whole model that `first`, the file at `path`, begins; `first` itself where it is all there is.
///
/// # Errors
/// `path` is not the first of its files, has another name than they have, or one of the others is
/// missing, bad, or of another model.
pub(super) fn complete(first: GgufFile, path: &Path) -> Result<GgufFile, GgufError> {
    let in_first = |cause| in_file(path, cause);
    let count = first
        .metadata()
        .get_u64(COUNT_KEY)
        .map_err(in_first)?
        .unwrap_or(1);
    if count <= 1 {
        return Ok(first);
    }
    let set = ShardSet::of(&first, path, count).map_err(in_first)?;
    let mut whole = first;
    for index in 1..count {
        let path = set.path(index);
        let shard = set.open(index, &path)?;
        add(&mut whole, shard);
    }
    index_names(&mut whole)?;
    if whole.tensors.len() as u64 != set.n_tensors {
        return Err(in_first(GgufError::ShardTensors {
            announced: set.n_tensors,
            found: whole.tensors.len(),
        }));
    }
    Ok(whole)
}

fn in_file(path: &Path, cause: GgufError) -> GgufError {
    GgufError::InFile {
        path: path.to_path_buf(),
        cause: Box::new(cause),
    }
}

/// The files of a model, by their names.
struct ShardSet {
    /// What all paths start with.
    prefix: PathBuf,
    count: u64,
    /// Tensors in all files.
    n_tensors: u64,
    /// What the first file calls the model.
    identity: Vec<(&'static str, Option<String>)>,
}

impl ShardSet {
    /// The files that belong to `first`, which says that there are `count`.
    fn of(first: &GgufFile, path: &Path, count: u64) -> Result<Self, GgufError> {
        if count > MAX_SHARDS {
            return Err(GgufError::Count {
                what: "files of the model (split.count)",
                count,
                limit: MAX_SHARDS,
            });
        }
        let index = first.metadata().require_u64(NUMBER_KEY)?;
        if index >= count {
            return Err(GgufError::ShardNumber {
                number: index.saturating_add(1),
                count,
                expected: 1,
            });
        }
        let prefix = prefix(path, index, count);
        if index != 0 {
            return Err(GgufError::NotFirstShard {
                number: index + 1,
                count,
                first: match prefix {
                    Some(prefix) => named(&prefix, 0, count).display().to_string(),
                    None => format!("the file called …{}", suffix(0, count)),
                },
            });
        }
        Ok(Self {
            prefix: prefix.ok_or_else(|| GgufError::ShardName {
                count,
                suffix: suffix(0, count),
            })?,
            count,
            n_tensors: first.metadata().require_u64(TENSORS_KEY)?,
            identity: identity(first),
        })
    }

    fn path(&self, index: u64) -> PathBuf {
        named(&self.prefix, index, self.count)
    }

    /// Opens file `index` and checks that it is that one, of this model.
    fn open(&self, index: u64, path: &Path) -> Result<GgufFile, GgufError> {
        let shard = GgufFile::open_one(path).map_err(|error| match error {
            GgufError::Map(MapError::Missing { path }) => GgufError::MissingShard {
                path,
                number: index + 1,
                count: self.count,
            },
            error => error,
        })?;
        self.check(index, &shard)
            .map_err(|cause| in_file(path, cause))?;
        Ok(shard)
    }

    fn check(&self, index: u64, shard: &GgufFile) -> Result<(), GgufError> {
        let metadata = shard.metadata();
        let number = metadata.require_u64(NUMBER_KEY)?;
        let count = metadata.require_u64(COUNT_KEY)?;
        if (number, count) != (index, self.count) {
            return Err(GgufError::ShardNumber {
                number: number.saturating_add(1),
                count,
                expected: index + 1,
            });
        }
        let n_tensors = metadata.get_u64(TENSORS_KEY)?.unwrap_or(self.n_tensors);
        if n_tensors != self.n_tensors {
            return Err(GgufError::OtherModel {
                key: TENSORS_KEY,
                found: n_tensors.to_string(),
                expected: self.n_tensors.to_string(),
            });
        }
        // only the first file must say what the model is
        for ((key, expected), (_, found)) in self.identity.iter().zip(identity(shard)) {
            if let Some(found) = found
                && expected.as_ref() != Some(&found)
            {
                return Err(GgufError::OtherModel {
                    key,
                    found: format!("{found:?}"),
                    expected: expected
                        .as_ref()
                        .map_or("not there".into(), |text| format!("{text:?}")),
                });
            }
        }
        Ok(())
    }
}

/// Adds a file and its tensors to those before.
fn add(whole: &mut GgufFile, shard: GgufFile) {
    let index = whole.files.len();
    whole.files.extend(shard.files);
    for mut tensor in shard.tensors {
        tensor.set_shard(index);
        whole.tensors.push(tensor);
    }
}

/// Makes the index of all files' tensors.
fn index_names(whole: &mut GgufFile) -> Result<(), GgufError> {
    let sorted = names::sorted(&whole.tensors, |tensor| tensor.name());
    whole.by_name = sorted.map_err(|name| {
        let last = whole.tensors.iter().rfind(|tensor| tensor.name() == name);
        let cause = GgufError::TensorInTwoShards {
            tensor: name.to_owned(),
        };
        let path = last.and_then(|tensor| whole.files[tensor.shard()].path());
        in_file(path.unwrap_or(Path::new("")), cause)
    })?;
    Ok(())
}

/// What tells a model from others, as far as the file says it.
fn identity(file: &GgufFile) -> Vec<(&'static str, Option<String>)> {
    ["general.architecture", "general.name"]
        .map(|key| {
            let text = file.metadata().get_str(key).ok().flatten();
            (key, text.map(str::to_owned))
        })
        .to_vec()
}

/// End of the name of file `index`.
fn suffix(index: u64, count: u64) -> String {
    format!("-{:05}-of-{count:05}.gguf", index + 1)
}

fn named(prefix: &Path, index: u64, count: u64) -> PathBuf {
    let mut name = prefix.as_os_str().to_owned();
    name.push(suffix(index, count));
    name.into()
}

/// The path without its number, if it is called as file `index` has to be.
fn prefix(path: &Path, index: u64, count: u64) -> Option<PathBuf> {
    let name = path.file_name()?.as_encoded_bytes();
    let stem = name.strip_suffix(suffix(index, count).as_bytes())?;
    // a path that is no UTF-8 has no suffix that could be cut off safely
    let stem = std::str::from_utf8(stem).ok()?;
    Some(path.with_file_name(stem)).filter(|_| !stem.is_empty())
}
