//! The tensor table of a GGUF file: names, types, shapes and where the data lies.

use std::ops::Range;

use super::cursor::{Cursor, Place};
use super::{GgmlType, GgufError, Variant, names};

/// Most tensors accepted; the largest real files have some tens of thousands.
const MAX_TENSORS: u64 = 1 << 17;
/// Longest tensor name accepted, in bytes (ggml itself allows 63).
const MAX_NAME_BYTES: usize = 255;
/// Most dimensions that ggml knows.
const MAX_DIMENSIONS: u32 = 4;
/// Fewest bytes of an entry: length of the name, name, dimension count, type, offset.
const ENTRY_BYTES_MIN: u64 = 8 + 1 + 4 + 4 + 8;

/// One tensor of a file: everything but its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    name: String,
    ggml_type: GgmlType,
    shape: Vec<usize>,
    shard: usize,
    file_range: Range<usize>,
}

impl TensorInfo {
    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element type.
    pub fn ggml_type(&self) -> GgmlType {
        self.ggml_type
    }

    /// Dimensions in GGUF order: the first one runs fastest, so a matrix is `[n_cols, n_rows]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Length of a row: the first dimension.
    pub fn n_cols(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all other dimensions.
    pub fn n_rows(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Number of values.
    pub fn n_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Length of the data in bytes.
    pub fn size_bytes(&self) -> usize {
        self.file_range.len()
    }

    /// Where the data lies in the file, in bytes.
    pub fn file_range(&self) -> Range<usize> {
        self.file_range.clone()
    }

    /// Number of the file that holds the data, from 0; see [`super::GgufFile::files`].
    pub fn shard(&self) -> usize {
        self.shard
    }

    pub(super) fn set_shard(&mut self, shard: usize) {
        self.shard = shard;
    }

    /// Checks the shape, the fastest dimension first.
    ///
    /// # Errors
    /// [`GgufError::WrongShape`] with both shapes.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<(), GgufError> {
        if self.shape == expected {
            return Ok(());
        }
        Err(GgufError::WrongShape {
            tensor: self.name.clone(),
            found: self.shape.clone(),
            expected: expected.to_vec(),
        })
    }
}

/// Length in bytes of a tensor's data.
///
/// # Errors
/// [`GgufError::Shape`]: a dimension is 0, rows are no whole blocks, or the length overflows.
pub(super) fn data_bytes(name: &str, ggml_type: GgmlType, shape: &[u64]) -> Result<u64, GgufError> {
    let bad = |problem: String| GgufError::Shape {
        tensor: name.to_owned(),
        shape: shape.to_vec(),
        problem,
    };
    if shape.contains(&0) {
        return Err(bad("a dimension is 0".to_owned()));
    }
    let too_large = || bad("the size overflows".to_owned());
    let n_cols = shape.first().copied().unwrap_or(1);
    let n_rows = shape
        .iter()
        .skip(1)
        .try_fold(1u64, |product, &dim| product.checked_mul(dim));
    let block_values = ggml_type.block_values() as u64;
    if !n_cols.is_multiple_of(block_values) {
        return Err(bad(format!(
            "rows of {ggml_type} must be a multiple of {block_values} long"
        )));
    }
    (n_cols / block_values)
        .checked_mul(ggml_type.block_bytes() as u64)
        .zip(n_rows)
        .and_then(|(row_bytes, n_rows)| row_bytes.checked_mul(n_rows))
        // The number of values must not overflow either: types below a byte a value.
        .filter(|_| {
            shape
                .iter()
                .try_fold(1u64, |product, &dim| product.checked_mul(dim))
                .is_some()
        })
        .ok_or_else(too_large)
}

/// A table entry as the file states it; only name, type and size have been checked.
pub(super) struct RawEntry {
    name: String,
    ggml_type: GgmlType,
    shape: Vec<u64>,
    offset: u64,
    bytes: u64,
}

/// Reads the `n_tensors` entries of the table at `cursor`.
pub(super) fn read_table(
    cursor: &mut Cursor<'_>,
    n_tensors: u64,
    variant: Variant,
) -> Result<Vec<RawEntry>, GgufError> {
    let limit = MAX_TENSORS.min(cursor.left() as u64 / ENTRY_BYTES_MIN);
    if n_tensors > limit {
        return Err(GgufError::Count {
            what: "tensors",
            count: n_tensors,
            limit,
        });
    }
    (0..n_tensors)
        .map(|index| read_entry(cursor, index, variant))
        .collect()
}

fn read_entry(
    cursor: &mut Cursor<'_>,
    index: u64,
    variant: Variant,
) -> Result<RawEntry, GgufError> {
    let place = Place::TensorName(index);
    let name = names::checked(cursor.string(place)?, MAX_NAME_BYTES, place)?.to_owned();
    let place = Place::Tensor(&name);
    let n_dimensions = cursor.u32(place)?;
    if n_dimensions > MAX_DIMENSIONS {
        return Err(GgufError::Shape {
            tensor: name,
            shape: Vec::new(),
            problem: format!("{n_dimensions} dimensions, at most {MAX_DIMENSIONS} are possible"),
        });
    }
    let shape = (0..n_dimensions)
        .map(|_| cursor.u64(place))
        .collect::<Result<Vec<u64>, _>>()?;
    let id = cursor.u32(place)?;
    let offset = cursor.u64(place)?;
    let ggml_type = match variant {
        Variant::Gguf => GgmlType::from_id(id),
        Variant::PowerInfer => GgmlType::from_powerinfer_id(id),
    };
    let Some(ggml_type) = ggml_type else {
        return Err(GgufError::UnknownTensorType { tensor: name, id });
    };
    let bytes = data_bytes(&name, ggml_type, &shape)?;
    Ok(RawEntry {
        name,
        ggml_type,
        shape,
        offset,
        bytes,
    })
}

/// Places the tensors in the file and checks that each lies inside it, aligned and alone.
///
/// `data_start` and `file_bytes` are offsets in the file.
pub(super) fn place(
    entries: Vec<RawEntry>,
    data_start: u64,
    alignment: usize,
    file_bytes: usize,
) -> Result<Vec<TensorInfo>, GgufError> {
    let mut tensors = Vec::with_capacity(entries.len());
    for entry in entries {
        if !entry.offset.is_multiple_of(alignment as u64) {
            return Err(GgufError::Unaligned {
                tensor: entry.name,
                offset: entry.offset,
                alignment,
            });
        }
        let start = data_start.saturating_add(entry.offset);
        let end = start.saturating_add(entry.bytes);
        if end > file_bytes as u64 {
            return Err(GgufError::DataCutOff {
                tensor: entry.name,
                start,
                bytes: entry.bytes,
                file_bytes,
            });
        }
        // Not beyond the file's end, so these and the dimensions fit into `usize`.
        tensors.push(TensorInfo {
            name: entry.name,
            ggml_type: entry.ggml_type,
            shape: entry.shape.iter().map(|&dim| dim as usize).collect(),
            shard: 0,
            file_range: start as usize..end as usize,
        });
    }
    refuse_overlaps(&tensors)?;
    Ok(tensors)
}

fn refuse_overlaps(tensors: &[TensorInfo]) -> Result<(), GgufError> {
    let mut by_start: Vec<&TensorInfo> = tensors.iter().collect();
    by_start.sort_unstable_by_key(|tensor| tensor.file_range.start);
    match by_start
        .windows(2)
        .find(|pair| pair[0].file_range.end > pair[1].file_range.start)
    {
        Some(pair) => Err(GgufError::Overlap {
            first: pair[0].name.clone(),
            second: pair[1].name.clone(),
        }),
        None => Ok(()),
    }
}
