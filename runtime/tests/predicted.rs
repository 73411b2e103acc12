//! `--sparsity predicted`: what predictors leave in is computed as in `exact`, and what cannot be run is refused.

mod common;

use common::running::{Folder, Ran, json_of, run};
use common::tiny_model::TinyModel;
use common::{all_candidates, demo_model};
use pi_runtime::gguf::GgufFile;
use serde_json::Value;

const PROMPT: &str = "The capital of France is";

/// Answers `PROMPT` from the demo model with these flags; the model's hash of logits, and its timings.
fn answer(flags: &[&str]) -> (Value, Value) {
    let model = demo_model();
    let mut args = vec![
        "-m",
        model.to_str().unwrap(),
        "-p",
        PROMPT,
        "-n",
        "6",
        "--temp",
        "0",
        "--json",
    ];
    args.extend(flags);
    let json = json_of(&args);
    assert!(json["logits_hash"].is_string(), "{json}");
    (json["logits_hash"].clone(), json["timings"].clone())
}

#[test]
fn predictors_that_leave_nothing_out_give_the_bits_of_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("all.sparse.gguf");
    all_candidates::write(&path, &GgufFile::open(demo_model()).unwrap(), 1e9);
    let sidecar = [
        "--sidecar",
        path.to_str().unwrap(),
        "--sparsity",
        "predicted",
    ];
    for activations in ["q8", "f32"] {
        let (exact, timings) = answer(&["--sparsity", "exact", "--activations", activations]);
        for predictor in ["in-layer", "ahead", "both"] {
            let mut flags = vec!["--activations", activations, "--predictor", predictor];
            flags.extend(sidecar);
            let (hash, predicted) = answer(&flags);
            assert_eq!(hash, exact, "{activations} {predictor}");
            assert_eq!(predicted["active_share"], timings["active_share"]);
            assert_eq!(predicted["lossy"][0], "predicted neurons");
        }
    }
}

#[test]
fn predictors_that_leave_all_out_compute_no_neuron() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.sparse.gguf");
    all_candidates::write(&path, &GgufFile::open(demo_model()).unwrap(), -1e9);
    let name = path.to_str().unwrap();
    let (_, timings) = answer(&["--sidecar", name, "--sparsity", "predicted"]);
    // a third of the layers has no sketch, and looks at all gates
    let share = timings["active_share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 1.0 / 3.0, "{share}");
    assert_eq!(timings["candidate_share"], 1.0 / 3.0);
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, 2, "{}", ran.err);
    for word in words {
        assert!(ran.err.contains(word), "no {word:?} in: {}", ran.err);
    }
    assert_eq!(ran.err.trim_end().lines().count(), 1, "{}", ran.err);
}

#[test]
fn what_cannot_be_predicted_is_refused_with_cause_and_cure() {
    let folder = Folder::with(&TinyModel::default());
    let model = folder.name("m.gguf");
    let predict = |more: &[&str]| {
        let mut args = vec![
            "-m",
            model.as_str(),
            "-p",
            "a",
            "-n",
            "1",
            "--sparsity",
            "predicted",
        ];
        args.extend(more);
        run(&args)
    };
    refused(&predict(&[]), &["m.sparse.gguf", "prepare"]);
    let missing = folder.name("missing.sparse.gguf");
    refused(&predict(&["--sidecar", &missing]), &["missing.sparse.gguf"]);
    refused(&predict(&["--sidecar", &model]), &["no sidecar", "prepare"]);

    let other = folder.path("other.sparse.gguf");
    all_candidates::write(&other, &GgufFile::open(demo_model()).unwrap(), 0.0);
    let name = other.to_str().unwrap();
    refused(
        &predict(&["--sidecar", name]),
        &["another model", "prepare"],
    );
    let bytes = std::fs::read(&other).unwrap();
    std::fs::write(&other, &bytes[..bytes.len() / 2]).unwrap();
    let demo = demo_model();
    let demo = demo.to_str().unwrap();
    let cut = run(&[
        "-m",
        demo,
        "-p",
        "a",
        "-n",
        "1",
        "--sparsity",
        "predicted",
        "--sidecar",
        name,
    ]);
    refused(&cut, &["other.sparse.gguf"]);

    let path = folder.path("nan.sparse.gguf");
    all_candidates::write(&path, &GgufFile::open(demo_model()).unwrap(), f32::NAN);
    let name = path.to_str().unwrap();
    let nan = run(&[
        "-m",
        demo,
        "-p",
        "a",
        "-n",
        "1",
        "--sparsity",
        "predicted",
        "--sidecar",
        name,
    ]);
    refused(&nan, &["not finite", "prepare"]);
}
