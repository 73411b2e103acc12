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

/// Whoever else predicts: a layer that is `exact` loses nothing, and costs nothing else.
#[test]
fn layers_that_are_exact_have_the_bits_of_exact() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("none.sparse.gguf");
    // predictors that leave all out
    all_candidates::write(&path, &GgufFile::open(demo_model()).unwrap(), -1e9);
    let with = |predictor: &str| {
        let sidecar = ["--sidecar", path.to_str().unwrap()];
        let flags = ["--sparsity", "predicted", "--predictor", predictor];
        answer(&[&sidecar[..], &flags].concat())
    };
    let (exact, timings) = answer(&["--sparsity", "exact"]);
    for all in ["exact", "0-29: exact", "3-29: exact, 0-2: exact"] {
        let (hash, predicted) = with(all);
        assert_eq!(hash, exact, "{all}");
        assert_eq!(predicted["lossy"], serde_json::json!([]), "{all}");
        for share in ["active_share", "candidate_share"] {
            assert_eq!(predicted[share], timings[share], "{all}");
        }
    }
    // of the layers that are not, every candidate is left out
    for (mixed, share) in [
        ("0-2: exact, 3-4: in-layer, 5-29: exact", 28.0 / 30.0),
        (
            "0-14: exact, 15: both, 16: in-layer, 17-29: exact",
            28.0 / 30.0,
        ),
    ] {
        let (hash, predicted) = with(mixed);
        assert_ne!(hash, exact, "{mixed}");
        assert_eq!(predicted["lossy"][0], "predicted neurons", "{mixed}");
        let candidates = predicted["candidate_share"].as_f64().unwrap();
        assert!((candidates - share).abs() < 1e-9, "{mixed}: {candidates}");
    }
}

/// The demo model's own predictors, a way after the other: the bits depend on neither threads nor nodes, and the file says
/// what the flag does.
#[test]
fn mixed_layers_give_the_same_bits_on_any_threads_and_nodes() {
    let folder = tempfile::tempdir().unwrap();
    let mixed = "0-3: exact, 4-13: in-layer, 14-19: both, 20-21: exact, 22: ahead, 23-29: in-layer";
    let predicted = ["--sparsity", "predicted", "-t"];
    let by_flag = |threads: &str| {
        let flags = [&predicted[..], &[threads, "--predictor", mixed]].concat();
        answer(&flags).0
    };
    let expected = by_flag("1");
    let in_layer = answer(&["--sparsity", "predicted", "-t", "1"]).0;
    assert_ne!(expected, in_layer, "what is asked for is what runs");
    assert_eq!(by_flag("2"), expected);
    for nodes in [1, 2, 4] {
        let path = folder.path().join("x.toml");
        let text = format!("[sparsity]\npredict = \"{mixed}\"\n[host]\nnodes = {nodes}\n");
        std::fs::write(&path, text).unwrap();
        let name = path.to_str().unwrap();
        let threads = nodes.to_string();
        let flags = [
            &predicted[..],
            &[&threads, "--topology", name, "--simulate"],
        ]
        .concat();
        assert_eq!(answer(&flags).0, expected, "{nodes} nodes");
        // the flag comes before the file
        let flags = [&flags[..], &["--predictor", "auto"]].concat();
        assert_eq!(answer(&flags).0, in_layer, "{nodes} nodes");
    }
}

#[test]
fn ways_that_layers_cannot_be_predicted_by_are_refused() {
    let folder = Folder::with(&TinyModel::default());
    let path = folder.path("some.sparse.gguf");
    // signs, low rank and none in turns; ahead from layer 1 on
    all_candidates::write(&path, &GgufFile::open(demo_model()).unwrap(), 0.0);
    let (model, path) = (demo_model(), path.to_str().unwrap().to_owned());
    let predicted = ["-n", "1", "--sparsity", "predicted", "--sidecar", &path];
    let args = ["-m", model.to_str().unwrap(), "-p", "a"];
    let by = |list: &str| run(&[&args[..], &predicted, &["--predictor", list]].concat());
    let cure = "--predictor, or predict of [sparsity]";
    refused(
        &by("0-2: in-layer, 3-29: exact"),
        &["layer 2 cannot", "no sketch", "exact", cure],
    );
    refused(
        &by("0: both, 1-29: exact"),
        &["layer 0", "no layer before it", cure],
    );
    refused(
        &by("0: ahead, 1-29: exact"),
        &["layer 0", "no layer before it", cure],
    );
    refused(
        &by("0-3: exact"),
        &[
            "0-3: exact",
            "layers 4-29 are not named",
            "name each layer of 0-29 once",
        ],
    );
    refused(
        &by("0-30: exact"),
        &["no layer 30", "name each layer of 0-29 once"],
    );
    for (list, words) in [
        ("0-3: exact, 3-29: exact", "layer 3 is named twice"),
        ("0-29: exakt", "nothing predicts by \"exakt\""),
    ] {
        let ran = by(list);
        assert_eq!(ran.code, 2, "{}", ran.err);
        assert!(ran.err.contains(words), "{}", ran.err);
        let text = format!("name = \"x\"\n[sparsity]\npredict = \"{list}\"\n");
        let topology = folder.file("x.toml", &text);
        let ran = run(&[&args[..], &predicted, &["--topology", &topology]].concat());
        refused(&ran, &["x.toml, line 3", "predict", words]);
    }
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, 2, "{}", ran.err);
    for word in words {
        assert!(ran.err.contains(word), "no {word:?} in: {}", ran.err);
    }
    assert_eq!(ran.err.trim_end().lines().count(), 1, "{}", ran.err);
}

#[test]
fn gates_that_never_close_are_refused_before_a_sidecar_is_asked_for() {
    for gate in ["silu", "gelu"] {
        let folder = Folder::with(&TinyModel {
            gate: Some(gate),
            ..TinyModel::default()
        });
        let model = folder.name("m.gguf");
        let args = ["-m", &model, "-p", "a", "-n", "1"];
        let ran = run(&[&args[..], &["--sparsity", "predicted"]].concat());
        refused(&ran, &["predicted", gate, "--sparsity off"]);
    }
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
