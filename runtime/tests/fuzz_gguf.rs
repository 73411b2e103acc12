//! A fuzz target for everything that reads a model file's head.
//!
//! `cargo test` runs it with random inputs, as many as [`ITERATIONS`] says. For longer:
//! `BOLERO_RANDOM_TEST_TIME_MS=600000 BOLERO_RANDOM_ITERATIONS=1000000000 cargo test --release -p
//! pi-runtime --test fuzz_gguf`, and with a fuzzing engine, which needs a nightly compiler and
//! `cargo install cargo-bolero`: `cargo bolero test -p pi-runtime --test fuzz_gguf
//! heads_are_refused_or_read`. A failure prints its seed for `BOLERO_RANDOM_SEED`.

mod common;

use bytes::Bytes;
use common::gguf_parts::{Parts, Random, mutate_bytes};
use common::tiny_kinds::kinds;
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::sparsity::SparsityPlan;
use pi_runtime::model::{Hyperparameters, ModelTensors};
use pi_runtime::tokenizer::{EncodeOptions, Tokenizer};

/// Inputs of an ordinary test run.
const ITERATIONS: usize = 10_000;

/// The file that an input stands for: itself behind a right start, or a tiny model with as many wrong
/// fields as the input has numbers for.
fn file_of(input: &[u8], kinds: &[(&str, Parts)]) -> Vec<u8> {
    let (Some(&choice), rest) = (input.first(), input.get(1..).unwrap_or_default()) else {
        return vec![];
    };
    if choice < 64 {
        let start = [&b"GGUF\x03\0\0\0"[..], b"PWRI\x02\0\0\0", b""];
        return [start[usize::from(choice) % 3], rest].concat();
    }
    let mut parts = kinds[usize::from(choice) % kinds.len()].1.clone();
    for seed in rest.chunks(4).take(8) {
        let seed = seed
            .iter()
            .fold(0, |seed, &byte| seed << 8 | u64::from(byte));
        parts.mutate(&mut Random(seed));
    }
    let mut file = parts.build();
    if choice & 1 == 1 {
        let seed = rest.iter().fold(1, |seed: u64, &byte| {
            seed.wrapping_mul(31).wrapping_add(u64::from(byte))
        });
        mutate_bytes(&mut Random(seed), &mut file);
    }
    file
}

/// Whether the whole head was usable.
fn read(file: Vec<u8>) -> Result<(), String> {
    let text = |error: &dyn std::error::Error| error.to_string();
    let file = GgufFile::from_bytes(Bytes::from(file)).map_err(|error| text(&error))?;
    // each for itself: one that fails must not hide another that panics
    let tokenizer = Tokenizer::from_metadata(file.metadata()).map_err(|error| text(&error));
    let encoded = tokenizer.and_then(|tokenizer| {
        let encoded = tokenizer.encode("a b\u{1f600}", EncodeOptions::PROMPT);
        encoded.map_err(|error| text(&error))
    });
    let hyper = Hyperparameters::read(&file).map_err(|error| text(&error))?;
    let tensors = ModelTensors::find(&file, &hyper).map_err(|error| text(&error))?;
    SparsityPlan::resolve(None, hyper.gate, &tensors.stored_downs())
        .map_err(|error| text(&error))?;
    encoded.map(drop)
}

#[test]
fn heads_are_refused_or_read() {
    let folder = tempfile::tempdir().unwrap();
    let kinds = kinds(folder.path());
    for (name, parts) in &kinds {
        read(parts.build()).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    bolero::check!()
        .with_iterations(ITERATIONS)
        .with_max_len(64)
        .for_each(move |input: &[u8]| {
            if let Err(error) = read(file_of(input, &kinds)) {
                assert!(error.len() > 20, "{error}");
            }
        });
}
