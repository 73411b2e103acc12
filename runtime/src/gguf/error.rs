//! What can be wrong with a GGUF file, or with writing one.

use std::io;
use std::path::PathBuf;

use super::{GgmlType, ValueType};
use crate::mapped_file::MapError;

/// Why a GGUF file was refused, a key or tensor could not be used, or a file not be written.
///
/// Keys and tensor names come from the file, so messages show them quoted and escaped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GgufError {
    /// The file could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// An error of the named file.
    #[error("{}: {cause}", path.display())]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: Box<GgufError>,
    },

    /// A file that is cut off, with a name that says why.
    #[error(
        "{}: its name says that the download has not finished: wait for it, or download the file again \
         ({cause})", path.display()
    )]
    Unfinished {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: Box<GgufError>,
    },

    /// The file is of another kind.
    #[error("not a GGUF file: this looks like {looks_like}; {cure}")]
    NotGguf {
        /// What it seems to be, with its article.
        looks_like: &'static str,
        /// What to do about it.
        cure: &'static str,
    },
    /// Written on a big-endian machine.
    #[error(
        "this is a big-endian GGUF file; only little-endian ones can be read: convert it with \
         gguf_convert_endian.py or download the usual little-endian file"
    )]
    BigEndian,
    /// A version of the format that is not known.
    #[error("GGUF version {version} is not supported, only 2 and 3; {cure}")]
    Version {
        /// The version in the header.
        version: u32,
        /// What to do about it.
        cure: &'static str,
    },
    /// The header ends before what it announces.
    #[error(
        "the file ends inside {place}: {wanted} bytes wanted at byte {offset}, {left} are left; \
         the file is cut off or damaged: copy or download it again"
    )]
    HeaderCutOff {
        /// What was being read.
        place: String,
        /// Offset in the file in bytes.
        offset: usize,
        /// Bytes that the header says are there.
        wanted: u64,
        /// Bytes that are there.
        left: usize,
    },
    /// A count in the header that no file of this length, or no model, can have.
    #[error(
        "the header announces {count} {what}, and at most {limit} are possible here; \
         the file is damaged: copy or download it again"
    )]
    Count {
        /// What is counted.
        what: &'static str,
        /// The count in the file.
        count: u64,
        /// The largest count accepted.
        limit: u64,
    },

    /// A key or tensor name that is no text, or too long.
    #[error("{place}: {problem}; the file is damaged: copy or download it again")]
    BadName {
        /// Which one.
        place: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The same key twice.
    #[error("metadata key {key:?} is there twice; convert the model again")]
    DuplicateKey {
        /// The key.
        key: String,
    },
    /// A value type with an unknown id.
    #[error(
        "metadata key {key:?} has the unknown value type {id}; the file is damaged or newer than \
         this program"
    )]
    UnknownValueType {
        /// The key.
        key: String,
        /// Id in the file.
        id: u32,
    },
    /// A value that its type does not allow.
    #[error("metadata key {key:?}: {problem}; the file is damaged: copy or download it again")]
    BadValue {
        /// The key.
        key: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A key that is needed.
    #[error(
        "metadata key {key:?} is missing; the file is incomplete for this use: convert the model \
         again"
    )]
    MissingKey {
        /// The key.
        key: String,
    },
    /// A key whose value has another type than needed.
    #[error("metadata key {key:?} is {found}, expected {expected}; convert the model again")]
    WrongValueType {
        /// The key.
        key: String,
        /// Type in the file.
        found: String,
        /// Types accepted.
        expected: &'static str,
    },
    /// A number that does not fit.
    #[error("metadata key {key:?} is {value}, outside the range of {expected}")]
    OutOfRange {
        /// The key.
        key: String,
        /// Value in the file.
        value: i128,
        /// Type wanted.
        expected: &'static str,
    },
    /// An alignment that is no power of two, or absurd.
    #[error(
        "general.alignment is {alignment}; it must be a power of two up to {limit}: the file is \
         damaged, copy or download it again"
    )]
    Alignment {
        /// The alignment in the file.
        alignment: u64,
        /// The largest one accepted.
        limit: u64,
    },

    /// A tensor type with an unknown id.
    #[error(
        "tensor {tensor:?} has the unknown type {id}; the file is damaged, or newer or much older \
         than this program"
    )]
    UnknownTensorType {
        /// The tensor.
        tensor: String,
        /// Id in the file.
        id: u32,
    },
    /// The same tensor name twice.
    #[error("tensor {tensor:?} is there twice; convert the model again")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
    },
    /// A shape that cannot be.
    #[error("tensor {tensor:?} with shape {shape:?}: {problem}; the file is damaged or unusable")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its dimensions, the fastest first.
        shape: Vec<u64>,
        /// What is wrong with it.
        problem: String,
    },
    /// A tensor's data does not start at a multiple of the alignment.
    #[error(
        "tensor {tensor:?} starts at {offset} in the data section, no multiple of the file's \
         alignment {alignment}; the file is damaged: copy or download it again"
    )]
    Unaligned {
        /// The tensor.
        tensor: String,
        /// Offset in the data section in bytes.
        offset: u64,
        /// Alignment of the file in bytes.
        alignment: usize,
    },
    /// A tensor's data lies beyond the file's end.
    #[error(
        "tensor {tensor:?} needs {bytes} bytes from byte {start} on, but the file ends at byte \
         {file_bytes}; the file is cut off or damaged: copy or download it again"
    )]
    DataCutOff {
        /// The tensor.
        tensor: String,
        /// Offset in the file in bytes.
        start: u64,
        /// Length of its data.
        bytes: u64,
        /// Length of the file.
        file_bytes: usize,
    },
    /// Two tensors share bytes.
    #[error(
        "the data of tensors {first:?} and {second:?} overlap; the file is damaged: copy or \
         download it again"
    )]
    Overlap {
        /// The one that starts first.
        first: String,
        /// The one that starts inside it.
        second: String,
    },
    /// A tensor that is needed.
    #[error(
        "tensor {tensor:?} is missing; the file is incomplete for this use: convert the model again"
    )]
    MissingTensor {
        /// The tensor.
        tensor: String,
    },
    /// A tensor whose shape is not what the model's metadata says.
    #[error("tensor {tensor:?} has shape {found:?}, the model's metadata need {expected:?}")]
    WrongShape {
        /// The tensor.
        tensor: String,
        /// Shape in the file, the fastest dimension first.
        found: Vec<usize>,
        /// Shape needed.
        expected: Vec<usize>,
    },
    /// A tensor whose type cannot be computed with.
    #[error(
        "tensor {tensor:?} has type {found}, which cannot be run; use a file with {supported} \
         (llama.cpp's llama-quantize makes them)"
    )]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// Its type.
        found: GgmlType,
        /// Names of the types that can be run.
        supported: String,
    },

    /// One of a model's files was given that is not the first.
    #[error(
        "this is file {number} of a model in {count} files; name the first one instead: {first}"
    )]
    NotFirstShard {
        /// Its number, from 1.
        number: u64,
        /// Number of files.
        count: u64,
        /// The first file's path, or how its name ends.
        first: String,
    },
    /// The first of a model's files is not called as such, so the others cannot be found.
    #[error(
        "this is the first of a model's {count} files, but its name does not end in {suffix}: give \
         all of them their original names"
    )]
    ShardName {
        /// Number of files.
        count: u64,
        /// What the name must end in.
        suffix: String,
    },
    /// One of a model's files is not there.
    #[error(
        "{}: no such file; it is file {number} of the model's {count}: put all of them into one \
         folder",
        path.display()
    )]
    MissingShard {
        /// Where it should be.
        path: PathBuf,
        /// Its number, from 1.
        number: u64,
        /// Number of files.
        count: u64,
    },
    /// A file that says it is another one than its name does.
    #[error(
        "the file says that it is number {number} of {count}, but it was opened as number {expected} \
         of its model: give the files their original names, or download them again"
    )]
    ShardNumber {
        /// Its number in its metadata, from 1.
        number: u64,
        /// Number of files in its metadata.
        count: u64,
        /// The number in its name.
        expected: u64,
    },
    /// A file of another model than the first one.
    #[error(
        "{key} is {found} here and {expected} in the model's first file: the files belong to \
         different models, download them again"
    )]
    OtherModel {
        /// The key that differs.
        key: &'static str,
        /// Its value here.
        found: String,
        /// Its value in the first file.
        expected: String,
    },
    /// Another number of tensors in all files than the first one says.
    #[error(
        "split.tensors.count is {announced}, but the model's files have {found} tensors: they belong \
         to different models, or one is damaged; download them again"
    )]
    ShardTensors {
        /// Tensors that the first file says there are.
        announced: u64,
        /// Tensors that there are.
        found: usize,
    },
    /// The same tensor in two files.
    #[error(
        "tensor {tensor:?} is in this file and in one of the model's files before it: they belong to \
         different models, download them again"
    )]
    TensorInTwoShards {
        /// The tensor.
        tensor: String,
    },

    /// The operating system refused while a file was being written.
    #[error("{}: cannot {action}: {cause}", path.display())]
    Write {
        /// The file to be written.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The operating system's answer.
        cause: io::Error,
    },
    /// The path to write to is taken by something that must not be replaced.
    #[error("{}: exists and is not a regular file; choose another output path", path.display())]
    NotReplaceable {
        /// The path given.
        path: PathBuf,
    },
    /// The caller gave a file's writer other data than announced.
    #[error("cannot write tensor {tensor:?}: {problem}")]
    WrongData {
        /// The tensor.
        tensor: String,
        /// What was wrong.
        problem: String,
    },
    /// The caller gave a list whose items have different types.
    #[error("cannot write metadata key {key:?}: an item of type {found} in an array of {expected}")]
    MixedArray {
        /// The key.
        key: String,
        /// Type of the item.
        found: ValueType,
        /// Type of the array.
        expected: ValueType,
    },
}

impl GgufError {
    /// Whether the machine is at fault (disk full, out of memory) rather than the file or path.
    pub fn is_environment(&self) -> bool {
        match self {
            GgufError::Map(error) => error.is_environment(),
            GgufError::InFile { cause, .. } | GgufError::Unfinished { cause, .. } => {
                cause.is_environment()
            }
            GgufError::Write { cause, .. } => !matches!(
                cause.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::NotADirectory
                    | io::ErrorKind::InvalidInput
            ),
            _ => false,
        }
    }
}
