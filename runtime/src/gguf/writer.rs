//! Writing a GGUF file: the whole header first, then the tensors one after another.

use std::collections::HashSet;

use bytes::Bytes;

use super::owned_value::{OwnedValue, encode_string};
use super::stream::{GgufStream, Slot};
use super::{
    ALIGNMENT_KEY, DEFAULT_ALIGNMENT, GgmlType, GgufError, MAX_ALIGNMENT, Metadata, ValueType,
    tensor_info,
};

/// Longest tensor name that ggml reads, in bytes.
const MAX_NAME_BYTES: usize = 63;
/// Version of the format that is written.
const VERSION: u32 = 3;

/// The header of a file to be written: metadata and the table of tensors.
///
/// ```no_run
/// # use pi_runtime::gguf::{GgmlType, GgufError, GgufWriter};
/// # fn main() -> Result<(), GgufError> {
/// let mut header = GgufWriter::new();
/// header.put("general.architecture", "llama")?;
/// header.add_tensor("output_norm.weight", GgmlType::F32, &[64])?;
/// let mut file = header.create("model.gguf".as_ref())?;
/// file.write("output_norm.weight", &[0; 256])?;
/// file.finish()
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct GgufWriter {
    entries: Vec<(String, ValueType, Bytes)>,
    alignment: usize,
    tensors: Vec<Declared>,
    names: HashSet<String>,
}

#[derive(Debug, Clone)]
struct Declared {
    name: String,
    ggml_type: GgmlType,
    shape: Vec<u64>,
    bytes: u64,
}

impl Default for GgufWriter {
    fn default() -> GgufWriter {
        GgufWriter::new()
    }
}

impl GgufWriter {
    /// An empty header.
    pub fn new() -> GgufWriter {
        GgufWriter {
            entries: Vec::new(),
            alignment: DEFAULT_ALIGNMENT,
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }

    /// Sets `key` to `value`, in the place of an earlier value of the key if there is one.
    ///
    /// `general.alignment` (a `u32`) decides where the tensors lie.
    ///
    /// # Errors
    /// An array's items differ in type, the key is empty, or the alignment is no power of two.
    pub fn put(&mut self, key: &str, value: impl Into<OwnedValue>) -> Result<(), GgufError> {
        let value = value.into();
        if key == ALIGNMENT_KEY {
            let OwnedValue::U32(alignment) = value else {
                return Err(GgufError::WrongValueType {
                    key: key.to_owned(),
                    found: value.value_type().name().to_owned(),
                    expected: "u32",
                });
            };
            self.set_alignment(alignment.into())?;
        }
        let mut encoded = Vec::new();
        value.encode(key, &mut encoded)?;
        self.put_encoded(key, value.value_type(), encoded.into())
    }

    /// Copies all of another file's metadata but the keys that `skip` names; the file's alignment
    /// comes with it.
    ///
    /// # Errors
    /// Only for metadata that no open file can have.
    pub fn copy_metadata(
        &mut self,
        metadata: &Metadata,
        skip: impl Fn(&str) -> bool,
    ) -> Result<(), GgufError> {
        for (key, value_type, encoded) in metadata.encoded() {
            if skip(key) {
                continue;
            }
            if key == ALIGNMENT_KEY {
                self.set_alignment(metadata.require_u64(key)?)?;
            }
            self.put_encoded(key, value_type, encoded)?;
        }
        Ok(())
    }

    /// Adds all keys and announces all tensors of `other`, whose alignment is not taken.
    ///
    /// # Errors
    /// A tensor's name is taken.
    pub fn append(&mut self, other: &GgufWriter) -> Result<(), GgufError> {
        for (key, value_type, encoded) in &other.entries {
            if key != ALIGNMENT_KEY {
                self.put_encoded(key, *value_type, encoded.clone())?;
            }
        }
        for tensor in &other.tensors {
            let shape: Vec<usize> = tensor.shape.iter().map(|&dim| dim as usize).collect();
            self.add_tensor(&tensor.name, tensor.ggml_type, &shape)?;
        }
        Ok(())
    }

    fn set_alignment(&mut self, alignment: u64) -> Result<(), GgufError> {
        if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
            return Err(GgufError::Alignment {
                alignment,
                limit: MAX_ALIGNMENT,
            });
        }
        self.alignment = alignment as usize;
        Ok(())
    }

    fn put_encoded(
        &mut self,
        key: &str,
        value_type: ValueType,
        encoded: Bytes,
    ) -> Result<(), GgufError> {
        if key.is_empty() {
            return Err(GgufError::BadName {
                place: "a metadata key to be written".to_owned(),
                problem: "the name is empty",
            });
        }
        match self
            .entries
            .iter_mut()
            .find(|(present, _, _)| present == key)
        {
            Some(entry) => (entry.1, entry.2) = (value_type, encoded),
            None => self.entries.push((key.to_owned(), value_type, encoded)),
        }
        Ok(())
    }

    /// Announces a tensor; tensors are written in the order in which they are announced.
    ///
    /// `shape` is in GGUF order, the fastest dimension first.
    ///
    /// # Errors
    /// The name is taken, empty or too long for ggml, or the shape is impossible for the type.
    pub fn add_tensor(
        &mut self,
        name: &str,
        ggml_type: GgmlType,
        shape: &[usize],
    ) -> Result<(), GgufError> {
        let shape: Vec<u64> = shape.iter().map(|&dim| dim as u64).collect();
        let refused = |problem: &'static str| GgufError::WrongData {
            tensor: name.to_owned(),
            problem: problem.to_owned(),
        };
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(refused("its name must have 1 to 63 bytes"));
        }
        if shape.len() > 4 {
            return Err(refused("more than 4 dimensions"));
        }
        let bytes = tensor_info::data_bytes(name, ggml_type, &shape)?;
        if !self.names.insert(name.to_owned()) {
            return Err(GgufError::DuplicateTensor {
                tensor: name.to_owned(),
            });
        }
        self.tensors.push(Declared {
            name: name.to_owned(),
            ggml_type,
            shape,
            bytes,
        });
        Ok(())
    }

    /// Starts the file: writes the header to a temporary file beside `path`.
    ///
    /// # Errors
    /// `path` exists and is not a regular file, or the operating system refuses.
    pub fn create(self, path: &std::path::Path) -> Result<GgufStream, GgufError> {
        let (header, slots) = self.encode()?;
        GgufStream::create(path, &header, slots)
    }

    /// The header's bytes, padded up to the data, and where each tensor goes.
    fn encode(self) -> Result<(Vec<u8>, Vec<Slot>), GgufError> {
        let mut header = Vec::new();
        header.extend(b"GGUF");
        header.extend(VERSION.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value_type, encoded) in &self.entries {
            encode_string(key, &mut header);
            header.extend(value_type.id().to_le_bytes());
            header.extend_from_slice(encoded);
        }
        let mut offset = 0u64;
        let mut slots = Vec::with_capacity(self.tensors.len());
        for tensor in self.tensors {
            encode_string(&tensor.name, &mut header);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor
                .shape
                .iter()
                .for_each(|dim| header.extend(dim.to_le_bytes()));
            header.extend(tensor.ggml_type.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            slots.push(Slot {
                name: tensor.name.clone(),
                offset,
                bytes: tensor.bytes,
            });
            offset = offset
                .checked_add(tensor.bytes)
                .and_then(|end| end.checked_next_multiple_of(self.alignment as u64))
                .ok_or_else(|| GgufError::WrongData {
                    tensor: tensor.name,
                    problem: "the file's size overflows".to_owned(),
                })?;
        }
        header.resize(header.len().next_multiple_of(self.alignment), 0);
        Ok((header, slots))
    }
}
