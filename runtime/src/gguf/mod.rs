//! GGUF files: read in place from a memory mapping, and written atomically.
//!
//! Nothing in a file is trusted: every count, length, offset, alignment, type and shape is checked
//! against the file's real length before it is used, so that a bad file gives a [`GgufError`] that
//! names the key or tensor, and neither a panic nor an allocation larger than the file explains.
//!
//! Source: the GGUF specification, versions 2 and 3, little-endian
//! (`docs/gguf.md` in the ggml repository).

mod cursor;
mod error;
mod ggml_type;
mod magic;
mod metadata;
mod names;
mod owned_value;
mod runnable;
mod shards;
mod stream;
mod tensor_info;
mod value;
mod writer;

use std::ops::Range;
use std::path::Path;

use bytes::Bytes;

pub use error::GgufError;
pub use ggml_type::GgmlType;
pub use magic::Variant;
pub use metadata::Metadata;
pub use owned_value::OwnedValue;
pub use shards::is_split_key;
pub use stream::GgufStream;
pub use tensor_info::TensorInfo;
pub use value::{Array, ArrayIter, Value, ValueType};
pub use writer::GgufWriter;

use crate::mapped_file::{Access, MappedFile};
use cursor::{Cursor, Place};

/// Alignment of the data section and of each tensor where the file does not state one, in bytes.
pub const DEFAULT_ALIGNMENT: usize = 32;
/// Largest alignment accepted, in bytes.
const MAX_ALIGNMENT: u64 = 1 << 24;
/// Metadata key of the alignment.
const ALIGNMENT_KEY: &str = "general.alignment";

/// An open GGUF model: checked headers, and data read on demand from the mapping.
///
/// A model may be spread over several files (shards); then metadata, version and alignment are
/// those of the first, and the tensors those of all.
#[derive(Debug, Clone)]
pub struct GgufFile {
    /// One, or all shards in order.
    files: Vec<ShardFile>,
    variant: Variant,
    version: u32,
    alignment: usize,
    metadata: Metadata,
    tensors: Vec<TensorInfo>,
    /// Indices into `tensors`, ordered by name.
    by_name: Vec<u32>,
}

/// One of the files that a model is read from.
#[derive(Debug, Clone)]
pub struct ShardFile {
    mapped: Option<MappedFile>,
    bytes: Bytes,
    data_start: usize,
}

impl ShardFile {
    /// The path, if the file was opened by [`GgufFile::open`].
    pub fn path(&self) -> Option<&Path> {
        self.mapped.as_ref().map(MappedFile::path)
    }

    /// Length of the file in bytes.
    pub fn len_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Where the tensors' data begins, in bytes from the start of the file.
    pub fn data_start(&self) -> usize {
        self.data_start
    }
}

impl GgufFile {
    /// Maps the file at `path`, and all others of the model if it is the first of several, and
    /// checks their headers.
    ///
    /// # Errors
    /// A file cannot be mapped, is not GGUF 2 or 3 in little-endian order, or anything in its
    /// header is impossible; it is a later one of several, or one of the others does not belong to
    /// it. All name the file.
    pub fn open(path: impl AsRef<Path>) -> Result<GgufFile, GgufError> {
        let path = path.as_ref();
        shards::complete(GgufFile::open_one(path)?, path)
    }

    /// Maps the file at `path` alone.
    fn open_one(path: &Path) -> Result<GgufFile, GgufError> {
        let mapped = MappedFile::open(path)?;
        let mut file = GgufFile::from_bytes(mapped.bytes().clone()).map_err(|cause| {
            let (path, cause) = (mapped.path().to_path_buf(), Box::new(cause));
            if is_download_under_way(&path) {
                GgufError::Unfinished { path, cause }
            } else {
                GgufError::InFile { path, cause }
            }
        })?;
        file.files[0].mapped = Some(mapped);
        Ok(file)
    }

    /// Checks the header of one file that is in memory.
    ///
    /// # Errors
    /// As [`open`](GgufFile::open), without the file's name.
    pub fn from_bytes(bytes: Bytes) -> Result<GgufFile, GgufError> {
        let variant = Variant::detect(&bytes)?;
        let mut cursor = Cursor::new(&bytes);
        cursor.take(4, Place::Header)?;
        let version = checked_version(cursor.u32(Place::Header)?)?;
        let n_tensors = cursor.u64(Place::Header)?;
        let n_keys = cursor.u64(Place::Header)?;
        let metadata = Metadata::read(&bytes, &mut cursor, n_keys)?;
        let alignment = checked_alignment(&metadata)?;
        let entries = tensor_info::read_table(&mut cursor, n_tensors, variant)?;
        let data_start = (cursor.position() as u64).next_multiple_of(alignment as u64);
        let tensors = tensor_info::place(entries, data_start, alignment, bytes.len())?;
        let by_name = names::sorted(&tensors, |tensor| tensor.name()).map_err(|tensor| {
            GgufError::DuplicateTensor {
                tensor: tensor.to_owned(),
            }
        })?;
        Ok(GgufFile {
            variant,
            version,
            alignment,
            metadata,
            tensors,
            by_name,
            files: vec![ShardFile {
                mapped: None,
                // A file without tensors may end before the next multiple of the alignment.
                data_start: (data_start as usize).min(bytes.len()),
                bytes,
            }],
        })
    }

    /// The path of the (first) file, if it was opened by [`open`](GgufFile::open).
    pub fn path(&self) -> Option<&Path> {
        self.files[0].path()
    }

    /// The files in order: one, or all shards.
    pub fn files(&self) -> &[ShardFile] {
        &self.files
    }

    /// Length of all files together in bytes.
    pub fn len_bytes(&self) -> usize {
        self.files.iter().map(ShardFile::len_bytes).sum()
    }

    /// The magic that the file starts with.
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// Version of the format: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Alignment of the data in bytes.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// Where the tensors' data begins in the (first) file, in bytes from its start.
    pub fn data_start(&self) -> usize {
        self.files[0].data_start
    }

    /// Keys and values.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors in the order of the files' tables.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor called `name`, if it is there.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        names::find(&self.tensors, &self.by_name, |tensor| tensor.name(), name)
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`GgufError::MissingTensor`]
    pub fn require_tensor(&self, name: &str) -> Result<&TensorInfo, GgufError> {
        self.tensor(name).ok_or_else(|| GgufError::MissingTensor {
            tensor: name.to_owned(),
        })
    }

    /// A tensor's data, without copying; it keeps the mapping alive.
    ///
    /// # Panics
    /// If `tensor` belongs to another, longer file.
    pub fn tensor_data(&self, tensor: &TensorInfo) -> Bytes {
        let file = &self.files[tensor.shard()];
        file.bytes.slice(tensor.file_range())
    }

    /// Takes the pages of `bytes` of a tensor's data out of this process once they have been
    /// copied; see [`MappedFile::drop_pages`].
    pub fn drop_pages(&self, tensor: &TensorInfo, bytes: Range<usize>) {
        if let Some(mapped) = &self.files[tensor.shard()].mapped {
            let start = tensor.file_range().start;
            mapped.drop_pages(start + bytes.start..start + bytes.end);
        }
    }

    /// As [`drop_pages`](GgufFile::drop_pages) for all of a tensor's data.
    pub fn drop_tensor_pages(&self, tensor: &TensorInfo) {
        self.drop_pages(tensor, 0..tensor.size_bytes());
    }

    /// Says how the tensors' data will be read from here on, in all files.
    pub fn advise(&self, access: Access) {
        for file in &self.files {
            if let Some(mapped) = &file.mapped {
                mapped.advise(file.data_start..file.bytes.len(), access);
            }
        }
    }
}

/// Whether a file has the name that browsers and downloaders give to one that is not whole yet.
fn is_download_under_way(path: &Path) -> bool {
    const ENDINGS: [&str; 6] = [
        "part",
        "partial",
        "crdownload",
        "download",
        "incomplete",
        "aria2",
    ];
    path.extension()
        .is_some_and(|extension| ENDINGS.iter().any(|ending| extension == *ending))
}

fn checked_version(version: u32) -> Result<u32, GgufError> {
    match version {
        2 | 3 => Ok(version),
        // The number is in the upper bytes: written in the other byte order.
        _ if version != 0 && version & 0xffff == 0 => Err(GgufError::BigEndian),
        1 => Err(GgufError::Version {
            version,
            cure: "convert the model again",
        }),
        _ => Err(GgufError::Version {
            version,
            cure: "the file is damaged, or newer than this program",
        }),
    }
}

fn checked_alignment(metadata: &Metadata) -> Result<usize, GgufError> {
    let alignment = metadata
        .get_u64(ALIGNMENT_KEY)?
        .unwrap_or(DEFAULT_ALIGNMENT as u64);
    if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
        return Ok(alignment as usize);
    }
    Err(GgufError::Alignment {
        alignment,
        limit: MAX_ALIGNMENT,
    })
}
