//! Tokenizers of real models against llama.cpp's ids.

use std::fs;
use std::path::{Path, PathBuf};

use pi_runtime::gguf::GgufFile;
use pi_runtime::tokenizer::{EncodeOptions, Tokenizer};
use proptest::prelude::*;
use serde::Deserialize;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn open(path: &Path) -> Tokenizer {
    let file = GgufFile::open(path).expect("a readable model");
    Tokenizer::from_metadata(file.metadata()).expect("a known tokenizer")
}

fn demo() -> Tokenizer {
    open(&workspace().join("models/smollm2-135m-reglu-q4_0.gguf"))
}

/// llama.cpp's vocabulary-only file `name`, where the shared reference data is at hand.
fn vocabulary_file(name: &str) -> Option<PathBuf> {
    let path = workspace().join(format!("../shared/reference/vocab/ggml-vocab-{name}.gguf"));
    if !path.exists() {
        println!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

#[derive(Deserialize)]
struct Fixture {
    rows: Vec<Row>,
}

#[derive(Deserialize)]
struct Row {
    text: String,
    parse_special: bool,
    ids: Vec<u32>,
}

#[test]
fn the_demo_models_ids_equal_llama_cpps() {
    let path = workspace().join("tests/fixtures/tokenizer/smollm2.json");
    let json = fs::read_to_string(path).expect("the fixture");
    let fixture: Fixture = serde_json::from_str(&json).expect("valid JSON");
    let tokenizer = demo();
    assert!(fixture.rows.len() > 50);
    for Row {
        text,
        parse_special,
        ids,
    } in fixture.rows
    {
        // the demo model adds no begin-of-text token
        let options = EncodeOptions {
            add_special: true,
            parse_special,
        };
        assert_eq!(
            tokenizer.encode(&text, options).expect("encodes"),
            ids,
            "{text:?}"
        );
    }
}

/// Compares with llama.cpp's own test strings; its test adds and parses no special tokens.
fn compare_with_llama_cpp(name: &str) {
    let Some(path) = vocabulary_file(name) else {
        return;
    };
    let read = |extension| {
        let path = path.with_extension(extension);
        fs::read_to_string(&path).expect("a test file beside the vocabulary")
    };
    let texts = read("gguf.inp");
    let mut texts: Vec<&str> = texts.split("\n__ggml_vocab_test__\n").collect();
    assert_eq!(texts.pop(), Some(""), "the separator follows every text");
    let expected = read("gguf.out");
    let expected: Vec<&str> = expected.lines().collect();
    assert_eq!(texts.len(), expected.len());
    let tokenizer = open(&path);
    for (text, line) in texts.iter().zip(expected) {
        let ids: Vec<u32> = line
            .split_whitespace()
            .map(|id| id.parse().expect("an id"))
            .collect();
        let encoded = tokenizer
            .encode(text, EncodeOptions::TEXT)
            .expect("encodes");
        assert_eq!(encoded, ids, "{name}: {text:?}");
    }
    println!("{name}: {} strings", texts.len());
}

#[test]
fn gpt_2_equals_llama_cpp() {
    compare_with_llama_cpp("gpt-2");
}

#[test]
fn llama_3_equals_llama_cpp() {
    compare_with_llama_cpp("llama-bpe");
}

#[test]
fn qwen_2_equals_llama_cpp() {
    compare_with_llama_cpp("qwen2");
}

#[test]
fn llama_2_equals_llama_cpp() {
    compare_with_llama_cpp("llama-spm");
}

#[test]
fn falcon_equals_llama_cpp() {
    compare_with_llama_cpp("falcon");
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

/// Any text at all, with more white space, digits and letters than chance would give.
fn any_text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        any::<String>(),
        "[ \t\r\n\u{a0}\u{3000}]{0,8}",
        "[a-zA-Z0-9' .,]{0,12}",
        "[\u{300}-\u{36f}\u{400}-\u{4ff}\u{4e00}-\u{4eff}\u{1f600}-\u{1f64f}\u{200d}]{0,6}",
    ];
    prop::collection::vec(part, 0..6).prop_map(|parts| parts.concat())
}

/// Text → ids → text, at once and token by token.
fn check_round_trip(tokenizer: &Tokenizer, text: &str) -> Result<(), TestCaseError> {
    let ids = tokenizer
        .encode(text, EncodeOptions::TEXT)
        .expect("encodes");
    prop_assert_eq!(&tokenizer.decode(&ids), text);
    let mut stream = tokenizer.stream();
    let mut streamed = String::new();
    for id in ids {
        streamed.extend(stream.push(id));
    }
    prop_assert_eq!(stream.flush(), None);
    prop_assert!(
        streamed == text || streamed == format!(" {text}"),
        "{:?}",
        streamed
    );
    Ok(())
}

#[test]
fn byte_level_round_trips_are_exact() {
    for name in ["gpt-2", "llama-bpe", "qwen2"] {
        let Some(path) = vocabulary_file(name) else {
            return;
        };
        let tokenizer = open(&path);
        proptest!(config(), |(text in any_text())| {
            check_round_trip(&tokenizer, &text)?;
        });
    }
}

#[test]
fn the_demo_models_round_trips_are_exact_for_the_bytes_that_it_has() {
    let tokenizer = demo();
    let known = |c: char| {
        let ids = tokenizer
            .encode(&c.to_string(), EncodeOptions::TEXT)
            .expect("encodes");
        tokenizer.decode(&ids) == c.to_string()
    };
    assert!(" \nazé東🙂".chars().all(known));
    proptest!(config(), |(text in any_text())| {
        let text: String = text.chars().filter(|&c| known(c)).collect();
        check_round_trip(&tokenizer, &text)?;
    });
}

#[test]
fn sentence_piece_round_trips_but_for_its_space_sign() {
    let Some(path) = vocabulary_file("llama-spm") else {
        return;
    };
    let tokenizer = open(&path);
    proptest!(config(), |(text in any_text())| {
        let text = text.replace('▁', "_");
        check_round_trip(&tokenizer, &text)?;
    });
}

#[test]
fn the_demo_model_knows_its_special_tokens() {
    let tokenizer = demo();
    assert_eq!(tokenizer.n_vocab(), 49152);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
    assert!(!tokenizer.adds_bos());
    assert_eq!(tokenizer.vocabulary().end_ids(), [0, 2]);
}
