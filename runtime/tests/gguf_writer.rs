//! Writing GGUF files: what is written reads back, and an unfinished file leaves nothing behind.

use std::path::Path;

use pi_runtime::gguf::{GgmlType, GgufError, GgufFile, GgufWriter, OwnedValue, Value, ValueType};
use proptest::prelude::*;

/// A value of any type; arrays up to two deep.
fn any_value() -> impl Strategy<Value = OwnedValue> {
    (0..ValueType::ALL.len()).prop_flat_map(|index| value_of(ValueType::ALL[index], 2))
}

fn value_of(value_type: ValueType, depth: usize) -> BoxedStrategy<OwnedValue> {
    match value_type {
        ValueType::U8 => any::<u8>().prop_map(OwnedValue::from).boxed(),
        ValueType::I8 => any::<i8>().prop_map(OwnedValue::from).boxed(),
        ValueType::U16 => any::<u16>().prop_map(OwnedValue::from).boxed(),
        ValueType::I16 => any::<i16>().prop_map(OwnedValue::from).boxed(),
        ValueType::U32 => any::<u32>().prop_map(OwnedValue::from).boxed(),
        ValueType::I32 => any::<i32>().prop_map(OwnedValue::from).boxed(),
        ValueType::F32 => any::<f32>().prop_map(OwnedValue::from).boxed(),
        ValueType::Bool => any::<bool>().prop_map(OwnedValue::from).boxed(),
        ValueType::Str => ".{0,12}".prop_map(OwnedValue::from).boxed(),
        ValueType::U64 => any::<u64>().prop_map(OwnedValue::from).boxed(),
        ValueType::I64 => any::<i64>().prop_map(OwnedValue::from).boxed(),
        ValueType::F64 => any::<f64>().prop_map(OwnedValue::from).boxed(),
        ValueType::Array => (0..ValueType::ALL.len())
            .prop_flat_map(move |index| {
                let element = match ValueType::ALL[index] {
                    ValueType::Array if depth == 0 => ValueType::Str,
                    element => element,
                };
                let items = prop::collection::vec(value_of(element, depth.saturating_sub(1)), 0..5);
                items.prop_map(move |items| OwnedValue::Array { element, items })
            })
            .boxed(),
    }
}

/// The value as it would be written, to compare with what was.
fn owned(value: Value<'_>) -> OwnedValue {
    match value {
        Value::U8(value) => value.into(),
        Value::I8(value) => value.into(),
        Value::U16(value) => value.into(),
        Value::I16(value) => value.into(),
        Value::U32(value) => value.into(),
        Value::I32(value) => value.into(),
        Value::F32(value) => value.into(),
        Value::Bool(value) => value.into(),
        Value::Str(bytes) => std::str::from_utf8(bytes).unwrap().into(),
        Value::U64(value) => value.into(),
        Value::I64(value) => value.into(),
        Value::F64(value) => value.into(),
        Value::Array(array) => OwnedValue::Array {
            element: array.element_type(),
            items: array.iter().map(owned).collect(),
        },
    }
}

#[derive(Debug, Clone)]
struct AnyTensor {
    ggml_type: GgmlType,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn any_tensor() -> impl Strategy<Value = AnyTensor> {
    let shape = (1usize..3, prop::collection::vec(1usize..4, 0..4));
    (0..GgmlType::ALL.len(), shape, any::<u8>()).prop_map(|(index, (n_blocks, rest), seed)| {
        let ggml_type = GgmlType::ALL[index];
        let n_rows: usize = rest.iter().product();
        let bytes = n_blocks * ggml_type.block_bytes() * n_rows;
        let shape = std::iter::once(n_blocks * ggml_type.block_values())
            .chain(rest)
            .collect();
        let data = (0..bytes)
            .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
            .collect();
        AnyTensor {
            ggml_type,
            shape,
            data,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_reads_back(
        values in prop::collection::vec(any_value(), 0..12),
        tensors in prop::collection::vec(any_tensor(), 0..6),
        alignment in prop::option::of(0u32..8),
        part in 1usize..5000,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let mut header = GgufWriter::new();
        for (i, value) in values.iter().enumerate() {
            header.put(&format!("key.{i}"), value.clone()).unwrap();
        }
        if let Some(power) = alignment {
            header.put("general.alignment", 1u32 << power).unwrap();
        }
        for (i, tensor) in tensors.iter().enumerate() {
            header.add_tensor(&format!("t{i}"), tensor.ggml_type, &tensor.shape).unwrap();
        }
        let mut stream = header.create(&path).unwrap();
        for (i, tensor) in tensors.iter().enumerate() {
            for bytes in tensor.data.chunks(part) {
                stream.write(&format!("t{i}"), bytes).unwrap();
            }
        }
        stream.finish().unwrap();

        let file = GgufFile::open(&path).unwrap();
        prop_assert_eq!(file.alignment(), alignment.map_or(32, |power| 1 << power));
        for (i, value) in values.iter().enumerate() {
            let read = owned(file.metadata().get(&format!("key.{i}")).unwrap());
            // Through text, so that NaN equals NaN.
            prop_assert_eq!(format!("{read:?}"), format!("{value:?}"));
        }
        prop_assert_eq!(file.tensors().len(), tensors.len());
        for (i, tensor) in tensors.iter().enumerate() {
            let info = file.tensor(&format!("t{i}")).unwrap();
            prop_assert_eq!(info.ggml_type(), tensor.ggml_type);
            prop_assert_eq!(info.shape(), &tensor.shape[..]);
            prop_assert_eq!(&file.tensor_data(info)[..], &tensor.data[..]);
        }

        // A copy of the metadata is the same metadata.
        let copy_path = folder.path().join("copy.gguf");
        let mut copy = GgufWriter::new();
        copy.copy_metadata(file.metadata(), |key| key == "key.0").unwrap();
        copy.create(&copy_path).unwrap().finish().unwrap();
        let copy = GgufFile::open(&copy_path).unwrap();
        let text = |file: &GgufFile| -> Vec<String> {
            let entries = file.metadata().iter().filter(|(key, _)| *key != "key.0");
            entries.map(|(key, value)| format!("{key} {:?}", owned(value))).collect()
        };
        prop_assert_eq!(text(&copy), text(&file));
        prop_assert!(!copy.metadata().contains("key.0"));
        prop_assert_eq!(copy.alignment(), file.alignment());
    }
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn two_tensors() -> GgufWriter {
    let mut header = GgufWriter::new();
    header.add_tensor("a", GgmlType::F32, &[3]).unwrap();
    header.add_tensor("b", GgmlType::F32, &[2]).unwrap();
    header
}

#[test]
fn an_unfinished_file_leaves_the_old_one_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, "old").unwrap();
    let mut stream = two_tensors().create(&path).unwrap();
    stream.write("a", &[1; 12]).unwrap();
    assert_eq!(
        names_in(folder.path()).len(),
        2,
        "the new bytes go to a file of their own"
    );
    drop(stream);
    assert_eq!(names_in(folder.path()), ["model.gguf"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");

    let mut stream = two_tensors().create(&path).unwrap();
    stream.write("a", &[1; 12]).unwrap();
    let error = stream.finish().unwrap_err().to_string();
    assert!(
        error.contains("tensor \"b\"") && error.contains("before all of its data"),
        "{error}"
    );
    assert_eq!(names_in(folder.path()), ["model.gguf"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");

    let mut stream = two_tensors().create(&path).unwrap();
    stream.write("a", &[1; 12]).unwrap();
    stream.write("b", &[2; 8]).unwrap();
    stream.finish().unwrap();
    assert_eq!(names_in(folder.path()), ["model.gguf"]);
    assert_eq!(GgufFile::open(&path).unwrap().tensors().len(), 2);
}

#[test]
fn a_writer_refuses_data_that_was_not_announced() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut stream = two_tensors().create(&path).unwrap();
    let message = |result: Result<(), GgufError>| result.unwrap_err().to_string();
    assert!(message(stream.write("b", &[0; 8])).contains("it is the turn of \"a\""));
    assert!(message(stream.write("a", &[0; 13])).contains("13 bytes given, 12 are left of it"));
    stream.write("a", &[0; 4]).unwrap();
    assert!(message(stream.write("a", &[0; 12])).contains("12 bytes given, 8 are left of it"));
    stream.write("a", &[0; 8]).unwrap();
    stream.write("b", &[0; 8]).unwrap();
    assert!(message(stream.write("b", &[0; 1])).contains("1 bytes given, 0 are left of it"));
    assert!(message(stream.write("c", &[0; 1])).contains("all announced tensors are written"));
}

#[test]
fn a_writer_refuses_headers_that_could_not_be_read() {
    let mut header = GgufWriter::new();
    let message = |result: Result<(), GgufError>| result.unwrap_err().to_string();
    let mixed = OwnedValue::Array {
        element: ValueType::U8,
        items: vec![OwnedValue::U8(1), OwnedValue::Bool(true)],
    };
    assert!(message(header.put("mixed", mixed)).contains("an item of type bool in an array of u8"));
    assert!(message(header.put("", 1u32)).contains("the name is empty"));
    assert!(message(header.put("general.alignment", 24u32)).contains("power of two"));
    assert!(message(header.put("general.alignment", "32")).contains("is str, expected u32"));
    let long_name = "n".repeat(64);
    assert!(message(header.add_tensor(&long_name, GgmlType::F32, &[1])).contains("1 to 63 bytes"));
    assert!(message(header.add_tensor("w", GgmlType::F32, &[1; 5])).contains("more than 4"));
    assert!(message(header.add_tensor("w", GgmlType::Q4_0, &[31])).contains("multiple of 32"));
    header.add_tensor("w", GgmlType::F32, &[1]).unwrap();
    assert!(message(header.add_tensor("w", GgmlType::F32, &[1])).contains("is there twice"));
}

#[test]
fn a_later_value_replaces_an_earlier_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut header = GgufWriter::new();
    header.put("first", 1u32).unwrap();
    header.put("second", 2u32).unwrap();
    header.put("first", "one").unwrap();
    header.create(&path).unwrap().finish().unwrap();
    let file = GgufFile::open(&path).unwrap();
    let keys: Vec<&str> = file.metadata().iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["first", "second"]);
    assert_eq!(file.metadata().require_str("first").unwrap(), "one");
}

#[test]
fn a_writer_replaces_files_only() {
    let folder = tempfile::tempdir().unwrap();
    let error = two_tensors().create(folder.path()).unwrap_err().to_string();
    assert!(
        error.contains("not a regular file; choose another output path"),
        "{error}"
    );
    let missing = folder.path().join("none").join("model.gguf");
    let error = two_tensors().create(&missing).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("cannot create a file in its folder"),
        "{error}"
    );
    assert!(!error.is_environment());
    assert!(names_in(folder.path()).is_empty());
}

/// A full disk is the machine's fault, and leaves no file.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_of_the_environment() {
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let error = GgufError::Write {
        path: "model.gguf".into(),
        action: "write the file",
        cause: full,
    };
    assert!(error.is_environment());
    assert!(
        error
            .to_string()
            .starts_with("model.gguf: cannot write the file: "),
        "{error}"
    );
}
