//! A part of a sidecar on its way: keys, and tensors with their bytes, in memory.
//!
//! Parts are made one by one, kept as files of their own until all are there, and then joined into one file.

use std::path::Path;

use bytes::Bytes;
use pi_kernels::QuantType;

use super::SidecarError;
use crate::gguf::{GgmlType, GgufError, GgufFile, GgufWriter, OwnedValue};

/// Keys and tensors that belong together.
#[derive(Debug, Clone, Default)]
pub struct Section {
    header: GgufWriter,
    /// In the order in which the header announces them.
    tensors: Vec<(String, Bytes)>,
    n_keys: usize,
}

impl Section {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// The keys and tensors of `file` whose names `belongs` takes.
    ///
    /// # Errors
    /// Only for names that no open file can have.
    pub fn of(file: &GgufFile, belongs: impl Fn(&str) -> bool) -> Result<Self, SidecarError> {
        let mut section = Self::new();
        let metadata = file.metadata();
        section
            .header
            .copy_metadata(metadata, |key| !belongs(key))?;
        section.n_keys = metadata.iter().filter(|(key, _)| belongs(key)).count();
        for tensor in file
            .tensors()
            .iter()
            .filter(|tensor| belongs(tensor.name()))
        {
            let shape = tensor.shape();
            section
                .header
                .add_tensor(tensor.name(), tensor.ggml_type(), shape)?;
            let data = file.tensor_data(tensor);
            section.tensors.push((tensor.name().to_owned(), data));
        }
        Ok(section)
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.n_keys == 0 && self.tensors.is_empty()
    }

    /// Bytes of its tensors.
    pub fn size_bytes(&self) -> usize {
        self.tensors.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// Sets a key.
    ///
    /// # Errors
    /// As [`GgufWriter::put`].
    pub fn put(&mut self, key: &str, value: impl Into<OwnedValue>) -> Result<(), SidecarError> {
        self.header.put(key, value)?;
        self.n_keys += 1;
        Ok(())
    }

    /// Adds the vector `name`, f32.
    ///
    /// # Errors
    /// The name is taken or too long.
    ///
    /// # Panics
    /// When a value is not finite: no sidecar with one could be opened.
    pub fn vector(&mut self, name: &str, values: &[f32]) -> Result<(), SidecarError> {
        assert!(
            values.iter().all(|value| value.is_finite()),
            "{name} is finite"
        );
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.add(name, GgmlType::F32, &[values.len()], bytes.into())
    }

    /// Adds the matrix `name`, `[n_rows, n_cols]`, its rows of type `quant` in the file's order.
    ///
    /// # Errors
    /// The name is taken or too long.
    ///
    /// # Panics
    /// When `rows` has another length.
    pub fn matrix(
        &mut self,
        name: &str,
        quant: QuantType,
        n_rows: usize,
        n_cols: usize,
        rows: impl Into<Bytes>,
    ) -> Result<(), SidecarError> {
        let rows = rows.into();
        let expected = n_rows * quant.row_bytes(n_cols);
        assert_eq!(rows.len(), expected, "bytes of {name}");
        self.add(name, GgmlType::from(quant), &[n_cols, n_rows], rows)
    }

    fn add(
        &mut self,
        name: &str,
        ggml_type: GgmlType,
        shape: &[usize],
        bytes: Bytes,
    ) -> Result<(), SidecarError> {
        self.header.add_tensor(name, ggml_type, shape)?;
        self.tensors.push((name.to_owned(), bytes));
        Ok(())
    }

    /// Adds all of another part.
    ///
    /// # Errors
    /// A tensor is in both.
    pub fn append(&mut self, other: &Section) -> Result<(), SidecarError> {
        self.header.append(&other.header)?;
        self.tensors.extend_from_slice(&other.tensors);
        self.n_keys += other.n_keys;
        Ok(())
    }

    /// Writes it behind `header` to `path`, which stays as it was until the file is whole.
    ///
    /// # Errors
    /// A tensor's name is taken, or what the file system refuses.
    pub fn write(&self, mut header: GgufWriter, path: &Path) -> Result<(), GgufError> {
        header.append(&self.header)?;
        let mut stream = header.create(path)?;
        for (name, bytes) in &self.tensors {
            stream.write(name, bytes)?;
        }
        stream.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_survive_a_file_and_are_joined() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        let mut first = Section::new();
        first.put("a.n", 7u32).unwrap();
        first.vector("a.v", &[1.0, -2.5]).unwrap();
        let mut second = Section::new();
        second
            .matrix("b.m", QuantType::F16, 2, 1, vec![1u8, 2, 3, 4])
            .unwrap();
        first.append(&second).unwrap();
        first.write(GgufWriter::new(), &path).unwrap();

        let file = GgufFile::open(&path).unwrap();
        let a = Section::of(&file, |name| name.starts_with("a.")).unwrap();
        let b = Section::of(&file, |name| name.starts_with("b.")).unwrap();
        assert_eq!((a.size_bytes(), b.size_bytes()), (8, 4));
        assert!(!a.is_empty() && !b.is_empty());
        assert!(Section::of(&file, |_| false).unwrap().is_empty());

        let again = folder.path().join("b.gguf");
        let mut both = a;
        both.append(&b).unwrap();
        both.write(GgufWriter::new(), &again).unwrap();
        assert_eq!(std::fs::read(path).unwrap(), std::fs::read(again).unwrap());
        assert!(both.append(&b).is_err());
    }

    #[test]
    #[should_panic(expected = "v is finite")]
    fn values_that_are_not_finite_are_not_written() {
        let _ = Section::new().vector("v", &[f32::NAN]);
    }
}
