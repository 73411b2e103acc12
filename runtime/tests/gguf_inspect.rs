//! `inspect`: the tables and the JSON of a small file, and the demo model's.

use std::path::{Path, PathBuf};

use pi_runtime::gguf::{GgmlType, GgufWriter};
use pi_runtime::inspect::{InspectArgs, run};

fn inspect(file: &Path, json: bool, full: bool) -> String {
    let mut out = Vec::new();
    run(
        &InspectArgs {
            file: file.to_path_buf(),
            json,
            full,
        },
        &mut out,
    )
    .unwrap();
    String::from_utf8(out).unwrap()
}

fn small_file(folder: &Path) -> PathBuf {
    let path = folder.join("small.gguf");
    let mut header = GgufWriter::new();
    header.put("general.architecture", "llama").unwrap();
    header
        .put("llama.attention.layer_norm_rms_epsilon", 1e-5f32)
        .unwrap();
    header.put("bad.float", f32::NAN).unwrap();
    header
        .put("template", format!("line\n\x1b[0m{}", "é".repeat(200)))
        .unwrap();
    header
        .put(
            "tokens",
            (0..9).map(|i| format!("t{i}")).collect::<Vec<_>>(),
        )
        .unwrap();
    header.put("large", u64::MAX).unwrap();
    header
        .add_tensor("a.weight", GgmlType::Q4_0, &[64, 2])
        .unwrap();
    header.add_tensor("b.weight", GgmlType::F32, &[3]).unwrap();
    header
        .add_tensor("c.weight", GgmlType::Q4_0, &[32])
        .unwrap();
    let mut stream = header.create(&path).unwrap();
    stream.write("a.weight", &[0; 72]).unwrap();
    stream.write("b.weight", &[0; 12]).unwrap();
    stream.write("c.weight", &[0; 18]).unwrap();
    stream.finish().unwrap();
    path
}

#[test]
fn prints_metadata_tensors_and_totals() {
    let folder = tempfile::tempdir().unwrap();
    let text = inspect(&small_file(folder.path()), false, false);
    let has = |words: &[&str]| {
        let found = text
            .lines()
            .any(|line| line.split_whitespace().collect::<Vec<_>>() == words);
        assert!(found, "no line {words:?} in:\n{text}");
    };
    has(&["general.architecture", "str", "\"llama\""]);
    has(&["llama.attention.layer_norm_rms_epsilon", "f32", "0.00001"]);
    has(&["bad.float", "f32", "NaN"]);
    has(&[
        "a.weight",
        "[64,",
        "2]",
        "Q4_0",
        "72",
        &data_offset(&text, 0),
    ]);
    has(&["b.weight", "[3]", "F32", "12", &data_offset(&text, 96)]);
    has(&["Q4_0", "2", "160", "90"]);
    has(&["F32", "1", "3", "12"]);
    has(&["all", "3", "163", "102"]);
    assert!(
        text.contains("[\"t0\", \"t1\", \"t2\", \"t3\", \"t4\", \"t5\", …] (9 items)"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "control characters must be escaped");
    assert!(text.contains("… (409 bytes)"), "{text}");
    let full = inspect(&folder.path().join("small.gguf"), false, true);
    assert!(
        full.contains("\"t8\"] (9 items)") && !full.contains("(409 bytes)"),
        "{full}"
    );
}

/// Offset in the file of a place in the data section, as text.
fn data_offset(text: &str, offset: usize) -> String {
    let (_, after) = text.split_once("data from byte ").unwrap();
    let start: usize = after.split(',').next().unwrap().parse().unwrap();
    (start + offset).to_string()
}

#[test]
fn json_holds_the_same_and_parses() {
    let folder = tempfile::tempdir().unwrap();
    let path = small_file(folder.path());
    let json: serde_json::Value = serde_json::from_str(&inspect(&path, true, false)).unwrap();
    assert_eq!(json["magic"], "GGUF");
    assert_eq!(json["version"], 3);
    let metadata = &json["metadata"];
    assert_eq!(metadata["general.architecture"]["value"], "llama");
    assert_eq!(
        metadata["llama.attention.layer_norm_rms_epsilon"]["value"],
        1e-5
    );
    assert_eq!(metadata["bad.float"]["value"], "NaN");
    assert_eq!(metadata["large"]["value"], u64::MAX);
    assert_eq!(metadata["tokens"]["type"], "array<str>");
    assert_eq!(metadata["tokens"]["len"], 9);
    assert_eq!(metadata["tokens"]["value"].as_array().unwrap().len(), 6);
    assert_eq!(json["tensors"][1]["name"], "b.weight");
    assert_eq!(json["tensors"][0]["shape"], serde_json::json!([64, 2]));
    assert_eq!(
        json["tensors"][2]["offset"],
        json["data_offset"].as_u64().unwrap() + 128
    );
    assert_eq!(json["totals"]["by_type"]["Q4_0"]["bytes"], 90);
    assert_eq!(json["totals"]["all"]["tensors"], 3);
    let full: serde_json::Value = serde_json::from_str(&inspect(&path, true, true)).unwrap();
    assert_eq!(full["metadata"]["tokens"]["value"][8], "t8");
}

#[test]
fn lists_the_demo_model() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/smollm2-135m-reglu-q4_0.gguf");
    let json: serde_json::Value = serde_json::from_str(&inspect(&path, true, false)).unwrap();
    assert_eq!(json["metadata"]["general.architecture"]["value"], "llama");
    assert_eq!(json["metadata"]["llama.hidden_activation"]["value"], "relu");
    assert_eq!(json["metadata"]["tokenizer.ggml.tokens"]["len"], 49152);
    let tensors = json["tensors"].as_array().unwrap();
    let down = tensors
        .iter()
        .find(|t| t["name"] == "blk.0.ffn_down_t.weight")
        .unwrap();
    assert_eq!(down["shape"], serde_json::json!([576, 1536]));
    assert_eq!(down["type"], "Q4_0");
    assert_eq!(down["bytes"], 324 * 1536);
}

#[test]
fn a_closed_pipe_is_an_error_of_the_output() {
    struct Closed;
    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let folder = tempfile::tempdir().unwrap();
    for json in [false, true] {
        let args = InspectArgs {
            file: small_file(folder.path()),
            json,
            full: false,
        };
        let error = run(&args, &mut Closed).unwrap_err();
        let pi_runtime::inspect::InspectError::Output(cause) = error else {
            panic!("{error}");
        };
        assert_eq!(cause.kind(), std::io::ErrorKind::BrokenPipe);
    }
}
