//! What a model is called in tables, and how large it is.

use std::collections::BTreeMap;

use crate::gguf::GgufFile;

/// A model in a table's row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// Architecture, number of parameters and type of most bytes: `llama 135M Q4_0`.
    pub name: String,
    /// Bytes of all tensors.
    pub size_bytes: u64,
    /// Values of all tensors.
    pub n_params: u64,
}

impl Description {
    /// Describes what is in `file`, in llama-bench's way.
    pub fn of(file: &GgufFile) -> Self {
        let mut bytes_by_type: BTreeMap<String, u64> = BTreeMap::new();
        for tensor in file.tensors() {
            *bytes_by_type
                .entry(tensor.ggml_type().to_string())
                .or_default() += tensor.size_bytes() as u64;
        }
        let n_params = file
            .tensors()
            .iter()
            .map(|tensor| tensor.n_values() as u64)
            .sum();
        let text = |key: &str| file.metadata().get_str(key).ok().flatten();
        let main_type = bytes_by_type.iter().max_by_key(|(_, bytes)| **bytes);
        let parts = [
            text("general.architecture").map(str::to_owned),
            Some(text("general.size_label").map_or_else(|| rounded(n_params), str::to_owned)),
            main_type.map(|(name, _)| name.clone()),
        ];
        Self {
            name: parts.into_iter().flatten().collect::<Vec<_>>().join(" "),
            size_bytes: bytes_by_type.values().sum(),
            n_params,
        }
    }
}

/// A number of parameters in thousands, millions or billions.
fn rounded(n_params: u64) -> String {
    let n = n_params as f64;
    match n_params {
        0..1_000_000 => format!("{:.0}K", n / 1e3),
        1_000_000..1_000_000_000 => format!("{:.0}M", n / 1e6),
        _ => format!("{:.1}B", n / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::{GgmlType, GgufWriter};

    #[test]
    fn the_type_with_most_bytes_names_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let mut header = GgufWriter::new();
        header.put("general.architecture", "llama").unwrap();
        header.add_tensor("a", GgmlType::Q4_0, &[64, 64]).unwrap();
        header.add_tensor("b", GgmlType::F32, &[64]).unwrap();
        let mut stream = header.create(&path).unwrap();
        stream.write("a", &[0; 64 * 36]).unwrap();
        stream.write("b", &[0; 256]).unwrap();
        stream.finish().unwrap();
        let description = Description::of(&GgufFile::open(&path).unwrap());
        assert_eq!(description.name, "llama 4K Q4_0");
        assert_eq!((description.size_bytes, description.n_params), (2560, 4160));
    }

    #[test]
    fn parameters_are_rounded() {
        assert_eq!(rounded(134_515_008), "135M");
        assert_eq!(rounded(6_738_415_616), "6.7B");
    }
}
