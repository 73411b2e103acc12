//! Reading GGUF files: what is accepted, and the message for each thing that is refused.

use bytes::Bytes;
use pi_runtime::gguf::{GgmlType, GgufError, GgufFile, Value, ValueType, Variant};

/// A file put together byte by byte, so that anything in it can be wrong.
struct Raw {
    bytes: Vec<u8>,
}

impl Raw {
    fn new(n_tensors: u64, n_keys: u64) -> Raw {
        Raw::with_magic(b"GGUF", 3, n_tensors, n_keys)
    }

    fn with_magic(magic: &[u8; 4], version: u32, n_tensors: u64, n_keys: u64) -> Raw {
        Raw {
            bytes: magic.to_vec(),
        }
        .u32(version)
        .u64(n_tensors)
        .u64(n_keys)
    }

    fn raw(mut self, bytes: &[u8]) -> Raw {
        self.bytes.extend_from_slice(bytes);
        self
    }

    fn u32(self, value: u32) -> Raw {
        self.raw(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Raw {
        self.raw(&value.to_le_bytes())
    }

    fn string(self, text: &[u8]) -> Raw {
        self.u64(text.len() as u64).raw(text)
    }

    fn key(self, key: &str, value_type: ValueType) -> Raw {
        self.string(key.as_bytes()).u32(value_type.id())
    }

    fn array(self, key: &str, element: ValueType, len: u64) -> Raw {
        self.key(key, ValueType::Array).u32(element.id()).u64(len)
    }

    fn tensor(self, name: &str, shape: &[u64], type_id: u32, offset: u64) -> Raw {
        let named = self.string(name.as_bytes()).u32(shape.len() as u32);
        shape
            .iter()
            .fold(named, |raw, &dim| raw.u64(dim))
            .u32(type_id)
            .u64(offset)
    }

    /// Pads to `alignment` and appends `count` bytes of data.
    fn data(mut self, alignment: usize, count: usize) -> Raw {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(alignment), 0);
        self.bytes.extend((0..count).map(|i| i as u8));
        self
    }

    fn open(self) -> Result<GgufFile, GgufError> {
        GgufFile::from_bytes(Bytes::from(self.bytes))
    }

    #[track_caller]
    fn refused(self, message: &str) {
        let error = self.open().expect_err("the file should be refused");
        assert!(
            error.to_string().contains(message),
            "{error}\n  does not contain: {message}"
        );
        assert!(!error.is_environment());
    }
}

const F32: u32 = 0;
const Q4_0: u32 = 2;

#[test]
fn reads_every_value_type_of_versions_2_and_3() {
    for version in [2, 3] {
        let file = Raw::with_magic(b"GGUF", version, 1, 15)
            .key("u8", ValueType::U8)
            .raw(&[200])
            .key("i8", ValueType::I8)
            .raw(&[0xff])
            .key("u16", ValueType::U16)
            .raw(&60_000u16.to_le_bytes())
            .key("i16", ValueType::I16)
            .raw(&(-2i16).to_le_bytes())
            .key("u32", ValueType::U32)
            .u32(4_000_000_000)
            .key("i32", ValueType::I32)
            .u32((-3i32) as u32)
            .key("f32", ValueType::F32)
            .u32(1.5f32.to_bits())
            .key("bool", ValueType::Bool)
            .raw(&[1])
            .key("str", ValueType::Str)
            .string("naïve".as_bytes())
            .key("u64", ValueType::U64)
            .u64(u64::MAX)
            .key("i64", ValueType::I64)
            .u64((-4i64) as u64)
            .key("f64", ValueType::F64)
            .u64(0.25f64.to_bits())
            .array("strs", ValueType::Str, 3)
            .string(b"a")
            .string(b"")
            .string("\u{120}b".as_bytes())
            .array("empty", ValueType::I32, 0)
            .array("nested", ValueType::Array, 2)
            .u32(ValueType::U8.id())
            .u64(2)
            .raw(&[7, 8])
            .u32(ValueType::U8.id())
            .u64(0)
            .tensor("w", &[32, 3], Q4_0, 0)
            .data(32, 54)
            .open()
            .unwrap();
        assert_eq!((file.version(), file.variant()), (version, Variant::Gguf));
        let metadata = file.metadata();
        assert_eq!(metadata.len(), 15);
        assert_eq!(metadata.get_u32("u8").unwrap(), Some(200));
        assert_eq!(metadata.get_i32("i8").unwrap(), Some(-1));
        assert_eq!(metadata.get_u64("u16").unwrap(), Some(60_000));
        assert_eq!(metadata.get_i32("i16").unwrap(), Some(-2));
        assert_eq!(metadata.require_u32("u32").unwrap(), 4_000_000_000);
        assert_eq!(metadata.get_i32("i32").unwrap(), Some(-3));
        assert_eq!(metadata.require_f32("f32").unwrap(), 1.5);
        assert_eq!(metadata.get_bool("bool").unwrap(), Some(true));
        assert_eq!(metadata.require_str("str").unwrap(), "naïve");
        assert_eq!(metadata.require_u64("u64").unwrap(), u64::MAX);
        assert_eq!(metadata.get("i64"), Some(Value::I64(-4)));
        assert_eq!(metadata.get_f32("f64").unwrap(), Some(0.25));
        assert_eq!(
            metadata.require_array("strs").unwrap().to_strs().unwrap(),
            ["a", "", "\u{120}b"]
        );
        assert!(metadata.require_array("empty").unwrap().is_empty());
        let nested: Vec<Value<'_>> = metadata.require_array("nested").unwrap().iter().collect();
        let [Value::Array(first), Value::Array(second)] = nested[..] else {
            panic!("two arrays expected, got {nested:?}");
        };
        assert_eq!((first.to_u32s().unwrap(), second.len()), (vec![7, 8], 0));

        let tensor = file.tensor("w").unwrap();
        assert_eq!(
            (tensor.n_cols(), tensor.n_rows(), tensor.n_values()),
            (32, 3, 96)
        );
        assert_eq!(tensor.ggml_type(), GgmlType::Q4_0);
        let data = file.tensor_data(tensor);
        assert_eq!(data[..], (0..54).collect::<Vec<u8>>()[..]);
    }
}

#[test]
fn powerinfer_files_have_their_own_magic_and_integer_ids() {
    let file = Raw::with_magic(b"PWRI", 3, 1, 0)
        .tensor("blk.0.gpu_idx", &[4], 18, 0)
        .data(32, 16)
        .open()
        .unwrap();
    assert_eq!(file.variant(), Variant::PowerInfer);
    assert_eq!(file.tensors()[0].ggml_type(), GgmlType::I32);
}

#[test]
fn a_file_without_tensors_may_end_with_its_header() {
    let file = Raw::new(0, 1)
        .key("a", ValueType::U8)
        .raw(&[1])
        .open()
        .unwrap();
    assert_eq!(file.data_start(), file.len_bytes());
    assert!(file.tensors().is_empty());
}

#[test]
fn getters_refuse_other_types_and_say_which() {
    let file = Raw::new(0, 4)
        .key("name", ValueType::Str)
        .string(b"\xff\xfe")
        .key("count", ValueType::I32)
        .u32((-1i32) as u32)
        .array("list", ValueType::I64, 2)
        .u64(5)
        .u64(1 << 40)
        .array("words", ValueType::Str, 1)
        .string(b"\xc3\x28")
        .open()
        .unwrap();
    let metadata = file.metadata();
    let message = |error: GgufError| error.to_string();
    assert_eq!(metadata.get_u32("none").unwrap(), None);
    assert_eq!(
        message(metadata.require_u32("none").unwrap_err()),
        "metadata key \"none\" is missing; the file is incomplete for this use: convert the model \
         again"
    );
    assert_eq!(
        message(metadata.get_u32("name").unwrap_err()),
        "metadata key \"name\" is str, expected u32; convert the model again"
    );
    assert_eq!(
        message(metadata.get_u32("count").unwrap_err()),
        "metadata key \"count\" is -1, outside the range of u32"
    );
    assert!(message(metadata.get_str("name").unwrap_err()).contains("not valid UTF-8"));
    assert!(message(metadata.get_str("list").unwrap_err()).contains("is array<i64>, expected str"));
    assert!(message(metadata.get_bool("count").unwrap_err()).contains("expected bool"));
    assert!(message(metadata.get_f32("count").unwrap_err()).contains("expected f32"));
    assert!(message(metadata.get_array("count").unwrap_err()).contains("expected array"));
    let list = metadata.require_array("list").unwrap();
    assert!(message(list.to_i32s().unwrap_err()).contains("is 1099511627776, outside the range"));
    assert!(message(list.to_f32s().unwrap_err()).contains("array<i64>, expected array<f32>"));
    assert!(message(list.to_strs().unwrap_err()).contains("expected array<str>"));
    let words = metadata.require_array("words").unwrap();
    assert!(message(words.to_strs().unwrap_err()).contains("string 0 of 1 is not valid UTF-8"));
    assert_eq!(words.to_byte_strs().unwrap(), [b"\xc3\x28"]);
}

#[test]
fn refuses_wrong_starts() {
    Raw {
        bytes: b"GG".to_vec(),
    }
    .refused("not a GGUF file");
    Raw {
        bytes: b"GGUF\x03".to_vec(),
    }
    .refused("the file ends inside the header");
    Raw::with_magic(b"GGUF", 1, 0, 0).refused("GGUF version 1 is not supported");
    Raw::with_magic(b"GGUF", 4, 0, 0).refused("newer than this program");
    Raw::with_magic(b"GGUF", 0, 0, 0).refused("GGUF version 0 is not supported");
    Raw::with_magic(b"GGUF", 3u32.swap_bytes(), 0, 0).refused("big-endian GGUF file");
}

#[test]
fn refuses_impossible_counts_and_lengths() {
    Raw::new(0, u64::MAX).refused("18446744073709551615 metadata keys, and at most 0");
    Raw::new(u64::MAX, 0).refused("18446744073709551615 tensors, and at most 0");
    Raw::new(0, 70_000)
        .raw(&[0; 1 << 21])
        .refused("at most 65536 are possible");
    Raw::new(0, 1)
        .u64(u64::MAX)
        .raw(&[0; 64])
        .refused("the file ends inside metadata entry 0");
    Raw::new(0, 1)
        .key("s", ValueType::Str)
        .u64(1 << 63)
        .refused("the file ends inside the value of metadata key \"s\"");
    for element in ValueType::ALL {
        for len in [u64::MAX, u64::MAX / 8 + 2, 1 << 61, 100] {
            Raw::new(0, 1)
                .array("list", element, len)
                .refused("the value of metadata key \"list\"");
        }
    }
    Raw::new(0, 1)
        .array("list", ValueType::Str, 2)
        .u64(3)
        .raw(b"abc")
        .raw(&[9, 0, 0, 0, 0, 0, 0, 0, 1])
        .refused("9 bytes wanted at byte");
}

#[test]
fn refuses_bad_values_and_names() {
    Raw::new(0, 1)
        .string(b"")
        .u32(0)
        .raw(&[0; 8])
        .refused("metadata entry 0: the name is empty");
    Raw::new(0, 1)
        .string(b"\xff\xff")
        .u32(0)
        .raw(&[0; 8])
        .refused("the name is not valid UTF-8");
    Raw::new(0, 1)
        .string(&[b'k'; 70_000])
        .u32(0)
        .raw(&[0; 8])
        .refused("longer than the format");
    Raw::new(0, 1)
        .string(b"odd")
        .u32(13)
        .raw(&[0; 8])
        .refused("\"odd\" has the unknown value type 13");
    Raw::new(0, 1)
        .key("list", ValueType::Array)
        .u32(99)
        .u64(0)
        .refused("value type 99");
    Raw::new(0, 1)
        .key("flag", ValueType::Bool)
        .raw(&[2])
        .refused("\"flag\": a bool is 2");
    Raw::new(0, 1)
        .array("flags", ValueType::Bool, 2)
        .raw(&[1, 3])
        .refused("a bool is 3");
    Raw::new(0, 2)
        .key("twice", ValueType::U8)
        .raw(&[1])
        .key("twice", ValueType::U8)
        .raw(&[1])
        .refused("metadata key \"twice\" is there twice");
    let deep = (0..100).fold(Raw::new(0, 1).key("deep", ValueType::Array), |raw, _| {
        raw.u32(ValueType::Array.id()).u64(1)
    });
    deep.raw(&[0; 64])
        .refused("\"deep\": arrays nested deeper than 4");
    Raw::new(1, 0)
        .tensor("", &[1], F32, 0)
        .data(32, 4)
        .refused("the name of tensor 0: the name is empty");
    let long_name = "n".repeat(256);
    Raw::new(1, 0)
        .tensor(&long_name, &[1], F32, 0)
        .data(32, 4)
        .refused("longer than the format");
}

#[test]
fn messages_escape_what_comes_from_the_file() {
    let error = Raw::new(0, 1)
        .string(b"\x1b[31m")
        .u32(77)
        .raw(&[0; 8])
        .open()
        .unwrap_err();
    assert!(error.to_string().contains("\"\\u{1b}[31m\""), "{error}");
}

#[test]
fn refuses_bad_alignments() {
    for alignment in [0u32, 3, 48, 1 << 30] {
        Raw::new(0, 1)
            .key("general.alignment", ValueType::U32)
            .u32(alignment)
            .refused("general.alignment is");
    }
    Raw::new(0, 1)
        .key("general.alignment", ValueType::Str)
        .string(b"32")
        .refused("\"general.alignment\" is str, expected u64");
    let file = Raw::new(1, 1)
        .key("general.alignment", ValueType::U32)
        .u32(4096)
        .tensor("w", &[4], F32, 0)
        .data(4096, 16)
        .open()
        .unwrap();
    assert_eq!((file.alignment(), file.data_start()), (4096, 4096));
}

#[test]
fn refuses_impossible_tensors() {
    let one = |shape: &[u64], type_id| Raw::new(1, 0).tensor("w", shape, type_id, 0).data(32, 1024);
    one(&[1; 5], F32).refused("tensor \"w\" with shape []: 5 dimensions, at most 4");
    one(&[4, 0], F32).refused("with shape [4, 0]: a dimension is 0");
    one(&[33], Q4_0).refused("rows of Q4_0 must be a multiple of 32 long");
    one(&[1 << 32, 1 << 32], F32).refused("the size overflows");
    one(&[u64::MAX], F32).refused("the size overflows");
    one(&[32, u64::MAX / 18, 2], Q4_0).refused("the size overflows");
    one(&[4], 4).refused("tensor \"w\" has the unknown type 4");
    one(&[4], 1000).refused("tensor \"w\" has the unknown type 1000");
    one(&[257], F32)
        .refused("tensor \"w\" needs 1028 bytes from byte 64 on, but the file ends at byte 1088");
    one(&[256], F32).open().unwrap();
}

#[test]
fn refuses_data_out_of_place() {
    let at = |offset| Raw::new(1, 0).tensor("w", &[8], F32, offset).data(32, 64);
    at(32).open().unwrap();
    at(4).refused(
        "tensor \"w\" starts at 4 in the data section, no multiple of the file's alignment 32",
    );
    at(64).refused("needs 32 bytes from byte 128 on, but the file ends at byte 128");
    at(u64::MAX - 31).refused("tensor \"w\" needs 32 bytes");
    let two = |second_offset| {
        Raw::new(2, 0)
            .tensor("a", &[9], F32, 0)
            .tensor("b", &[8], F32, second_offset)
            .data(32, 128)
    };
    two(64).open().unwrap();
    two(32).refused("the data of tensors \"a\" and \"b\" overlap");
    two(0).refused("overlap");
    Raw::new(2, 0)
        .tensor("a", &[8], F32, 0)
        .tensor("a", &[8], F32, 32)
        .data(32, 64)
        .refused("tensor \"a\" is there twice");
}

#[test]
fn says_what_a_caller_misses() {
    let file = Raw::new(1, 0)
        .tensor("w", &[8, 2], GgmlType::I32.id(), 0)
        .data(32, 64)
        .open()
        .unwrap();
    let missing = file.require_tensor("x").unwrap_err().to_string();
    assert!(
        missing.contains("tensor \"x\" is missing; the file is incomplete"),
        "{missing}"
    );
    let tensor = file.require_tensor("w").unwrap();
    tensor.expect_shape(&[8, 2]).unwrap();
    assert_eq!(
        tensor.expect_shape(&[2, 8]).unwrap_err().to_string(),
        "tensor \"w\" has shape [8, 2], the model's metadata need [2, 8]"
    );
    let unsupported = tensor.require_quant().unwrap_err().to_string();
    assert!(
        unsupported.contains("has type I32, which cannot be run"),
        "{unsupported}"
    );
    assert!(
        unsupported.contains("F32, F16, BF16, Q4_0"),
        "{unsupported}"
    );
}

#[test]
fn errors_of_an_opened_file_name_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("page.gguf");
    std::fs::write(&path, "<!DOCTYPE html><html></html>").unwrap();
    let message = GgufFile::open(&path).unwrap_err().to_string();
    assert!(
        message.contains("page.gguf: not a GGUF file: this looks like a web page"),
        "{message}"
    );
    let message = GgufFile::open(folder.path().join("none.gguf"))
        .unwrap_err()
        .to_string();
    assert!(message.contains("none.gguf: no such file"), "{message}");
}
