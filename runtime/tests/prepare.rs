//! `prepare`: a sidecar that runs, the same bytes whatever interrupted it, and bad input with cause and cure.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use common::running::{Folder, Ran, run, text_of};
use common::tiny_model::TinyModel;
use common::tiny_synth;
use pi_actors::trace::Scorer;
use pi_kernels::QuantType;
use pi_kernels::ffn_sparse::sketch::planes::PlanesShape;
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::{Hyperparameters, ModelTensors, Sparsity};
use pi_runtime::prepare::{
    AheadKind, Observer, Preparation, PrepareOptions, Report, Stage, report_table,
};
use pi_runtime::session::{ModelOptions, TopologyFile};
use pi_runtime::sidecar::{Sidecar, SketchKind};

fn arguments<'a>(model: &'a str, output: &'a str) -> Vec<&'a str> {
    let fast = ["--chunks", "8", "--ahead", "svd", "--quality", "1%"];
    let mut arguments = vec!["prepare", "-m", model, "-o", output];
    arguments.extend(fast);
    arguments
}

/// Prepares `model` in all stages, within this process.
fn prepared(model: &Path, output: &Path) -> Report {
    struct Quiet;
    impl Observer for Quiet {}
    let options = PrepareOptions {
        model: ModelOptions::new(model.to_owned()),
        plan: TopologyFile::read(None).unwrap().plan(None).unwrap(),
        output: output.to_owned(),
        texts: vec![],
        n_passages: Some(8),
        seed: 1,
        ahead: AheadKind::Svd,
        quality: 0.01,
        stages: Stage::ALL.to_vec(),
    };
    let preparation = Preparation::open(options, Arc::new(Quiet), Arc::default()).unwrap();
    preparation.run().unwrap().report.unwrap()
}

/// Bytes that scores read for a token on `n_nodes` nodes, without second bits, by the shapes in a sidecar; and whether
/// there are second bits.
fn score_bytes(model: &Path, sidecar: &Path, n_nodes: usize) -> (Vec<(Scorer, usize)>, bool) {
    let file = GgufFile::open(model).unwrap();
    let hyper = Hyperparameters::read(&file).unwrap();
    let tensors = ModelTensors::find(&file, &hyper).unwrap();
    let sidecar = Sidecar::open(sidecar, &file, &hyper).unwrap();
    let layers = sidecar.predictors(&hyper, &tensors).unwrap().unwrap();
    let planes = PlanesShape {
        n_rows: hyper.n_ff,
        n_cols: hyper.n_embd,
    };
    let (mut signs, mut low_rank, mut ahead, mut has_second) = (0, 0, 0, false);
    for layer in &layers {
        match layer.sketch.as_ref().map(|sketch| &sketch.kind) {
            None => {}
            Some(SketchKind::Bits { two_bit_bias }) => {
                signs += planes.top_bytes();
                has_second |= two_bit_bias.is_some();
            }
            // each node reads all of a
            Some(SketchKind::LowRank { a, b }) => {
                low_rank += n_nodes * a.bytes.len() + b.bytes.len()
            }
        }
        let map = layer.ahead.as_ref();
        ahead += map.map_or(0, |map| map.a.bytes.len() + map.b.bytes.len());
    }
    let all = [
        (Scorer::Signs, signs),
        (Scorer::LowRank, low_rank),
        (Scorer::Ahead, ahead),
    ];
    let there = all.into_iter().filter(|(_, bytes)| *bytes > 0);
    (there.collect(), has_second)
}

#[test]
fn each_predictor_s_share_of_a_token_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let (model, sidecar) = (
        tiny_synth::write(folder.path()),
        folder.path().join("s.gguf"),
    );
    let report = prepared(&model, &sidecar);
    let n_nodes = TopologyFile::read(None)
        .unwrap()
        .plan(None)
        .unwrap()
        .nodes
        .len();
    let (mut expected, has_second) = score_bytes(&model, &sidecar, n_nodes);
    let has = |scorer| expected.iter().any(|(there, _)| *there == scorer);
    assert!(has(Scorer::Ahead) && (has(Scorer::Signs) || has(Scorer::LowRank)));

    let predicted = &report.costs[0];
    let modes = &report.modes;
    let mode = modes
        .iter()
        .find(|mode| mode.mode == Sparsity::Predicted)
        .unwrap();
    assert_eq!(predicted.bytes, mode.speed.bytes_per_token);
    let (mut bytes, mut ns) = (0.0, 0.0);
    for cost in &predicted.scorers {
        (bytes, ns) = (bytes + cost.bytes, ns + cost.ns);
    }
    assert_eq!(predicted.sum(), (bytes, ns));
    assert!(
        bytes < predicted.bytes && ns < predicted.ns,
        "{predicted:?}"
    );

    let table = report_table(&report);
    let mut told = Vec::new();
    for token in &report.costs {
        assert!(table.contains(token.flags), "{table}");
        for cost in &token.scorers {
            for share in [token.share_of_bytes(cost), token.share_of_time(cost)] {
                assert!(share > 0.0 && share < 1.0, "{cost:?} of {token:?}");
            }
            told.push((cost.scorer, cost.bytes as usize));
        }
    }
    let mut scorers: Vec<Scorer> = expected.iter().map(|(scorer, _)| *scorer).collect();
    scorers.extend(has_second.then_some(Scorer::SecondBits));
    scorers.extend(report.head.map(|_| Scorer::Head));
    scorers.sort();
    assert!(
        told.iter().map(|(scorer, _)| *scorer).eq(scorers),
        "{told:?}"
    );
    told.retain(|(scorer, _)| !matches!(scorer, Scorer::SecondBits | Scorer::Head));
    expected.sort();
    assert_eq!(told, expected);
}

fn start(arguments: &[&str]) -> Child {
    Command::new(assert_cmd::cargo::cargo_bin("pi-runtime"))
        .args(arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Starts a preparation, and sends it `signal` as soon as the part `name` is done; its exit code and messages.
fn interrupted(arguments: &[&str], part: &Path, signal: &str) -> (Option<i32>, String) {
    let mut child = start(arguments);
    while !part.exists() {
        if let Some(status) = child.try_wait().unwrap() {
            let output = child.wait_with_output().unwrap();
            let err = String::from_utf8_lossy(&output.stderr).into_owned();
            panic!("{status} before {} was there: {err}", part.display());
        }
        std::thread::yield_now();
    }
    let kill = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.status.code(), err)
}

#[test]
fn an_interrupted_preparation_goes_on_and_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_synth::write(folder.path());
    let name = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (model, whole, cut) = (model.to_str().unwrap(), name("a.gguf"), name("b.gguf"));

    let out = text_of(&arguments(model, &whole));
    for words in [
        "of all neurons are active",
        "candidates",
        "predicted",
        "agreement",
    ] {
        assert!(out.contains(words), "no {words:?} in: {out}");
    }
    assert!(!Path::new(&format!("{whole}.partial")).exists());

    let partial = PathBuf::from(format!("{cut}.partial"));
    let again = arguments(model, &cut);
    let (code, _) = interrupted(&again, &partial.join("predictors-1.gguf"), "-KILL");
    assert_eq!(code, None);
    let (code, err) = interrupted(&again, &partial.join("thresholds-0-0.gguf"), "-INT");
    assert_eq!(code, Some(130), "{err}");
    assert!(err.contains("going on from what is done"), "{err}");
    assert!(err.contains("the same command goes on"), "{err}");
    assert!(!Path::new(&cut).exists());
    let ran = run(&again);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("going on from what is done"),
        "{}",
        ran.err
    );
    assert!(!partial.exists());
    assert_eq!(fs::read(&whole).unwrap(), fs::read(&cut).unwrap());

    // what was made runs
    let flags = ["--sparsity", "predicted", "--sidecar", &whole];
    let mut answer = vec!["-m", model, "-p", "a", "-n", "3", "--temp", "0"];
    answer.extend(flags);
    text_of(&answer);
}

#[test]
fn another_seed_starts_anew_and_says_so() {
    let folder = Folder::with(&TinyModel {
        n_ctx: 64,
        ..TinyModel::default()
    });
    let (model, output) = (folder.name("m.gguf"), folder.name("s.gguf"));
    let base = ["prepare", "profile", "-m", &model, "-o", &output];
    let partial = folder.path("s.gguf.partial");
    let mut many = base.to_vec();
    many.extend(["--chunks", "4000"]);
    let (code, err) = interrupted(&many, &partial.join("passages"), "-INT");
    assert_eq!(code, Some(130), "{err}");
    let mut other = base.to_vec();
    other.extend(["--chunks", "8", "--seed", "2"]);
    let ran = run(&other);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("starting anew"), "{}", ran.err);
    assert_eq!(folder.names(), ["m.gguf", "s.gguf"]);
}

#[test]
fn a_stage_keeps_the_others_parts_and_plots_are_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_synth::write(folder.path());
    let (model, output) = (model.to_str().unwrap(), folder.path().join("s.gguf"));
    let plots = folder.path().join("plots");
    let flags = ["-m", model, "-o", output.to_str().unwrap(), "--chunks", "8"];
    let stage = |name: &str, more: &[&str]| {
        let mut arguments = vec!["prepare", name];
        arguments.extend(flags);
        arguments.extend(more);
        run(&arguments)
    };
    let ran = stage("thresholds", &[]);
    refused(&ran, &["predictors", "prepare predictors"]);
    let ran = stage("head", &[]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let ran = stage("profile", &["--plot", plots.to_str().unwrap()]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    for name in ["power-law.svg", "density.svg"] {
        assert!(
            fs::read_to_string(plots.join(name))
                .unwrap()
                .contains("</svg>")
        );
    }
    let listed = text_of(&["inspect", output.to_str().unwrap()]);
    assert!(listed.contains("ffn_counts"), "{listed}");
}

#[test]
fn gates_that_never_close_get_thresholds_and_no_predictors() {
    let silu = TinyModel {
        gate: None,
        ..TinyModel::default()
    };
    for model in [silu, TinyModel::gemma()] {
        let folder = Folder::with(&TinyModel {
            quant: QuantType::Q8_0,
            neuron_major: false,
            ..model
        });
        let (model, output) = (folder.name("m.gguf"), folder.name("s.gguf"));
        let ran = run(&["prepare", "-m", &model, "-o", &output, "--chunks", "8"]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        assert!(ran.err.contains("thresholds"), "{}", ran.err);
        let ran = run(&["prepare", "predictors", "-m", &model, "-o", &output]);
        refused(&ran, &["never close", "prepare thresholds"]);
    }
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, 2, "{}", ran.err);
    for word in words {
        assert!(ran.err.contains(word), "no {word:?} in: {}", ran.err);
    }
}

#[test]
fn bad_input_is_refused_with_cause_and_cure() {
    let folder = Folder::with(&TinyModel::default());
    let (model, output) = (folder.name("m.gguf"), folder.name("s.gguf"));
    let short = folder.file("short.txt", "too short");
    let with = |more: &[&str]| {
        let mut arguments = vec!["prepare", "-m", &model];
        arguments.extend(more);
        run(&arguments)
    };
    refused(
        &with(&["-o", &output, "-f", &short]),
        &["short.txt", "9 tokens", "give a longer text"],
    );
    refused(&with(&["-o", &model]), &["-o", "no sidecar"]);
    refused(&with(&["-o", &output, "--quality", "0"]), &["--quality"]);
    refused(&with(&["-o", &output, "--chunks", "2"]), &["--chunks"]);
    refused(
        &with(&["-o", &output, "--sparsity", "off"]),
        &["--sparsity"],
    );
    refused(
        &with(&["-o", &output, "--sidecar", &short]),
        &["--sidecar", "-o"],
    );
    refused(&with(&["-o", &folder.name("none/s.gguf")]), &["none"]);
    assert_eq!(folder.names(), ["m.gguf", "short.txt"]);
}

#[test]
fn another_model_s_sidecar_is_refused_by_a_stage() {
    let folder = Folder::with(&TinyModel::default());
    let other = TinyModel {
        seed: 2,
        ..TinyModel::default()
    };
    other.write(&folder.path("other.gguf"));
    let (model, other) = (folder.name("m.gguf"), folder.name("other.gguf"));
    let output = folder.name("s.gguf");
    let profile = |model: &str| {
        let flags = ["-m", model, "-o", &output, "--chunks", "8"];
        run(&[&["prepare", "profile"], &flags[..]].concat())
    };
    assert_eq!(profile(&model).code, 0);
    refused(&profile(&other), &["hash", "prepare"]);
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_the_machine_s_fault_and_leaves_no_sidecar() {
    let folder = Folder::with(&TinyModel::default());
    let (model, output) = (folder.name("m.gguf"), folder.name("s.gguf"));
    let program = assert_cmd::cargo::cargo_bin("pi-runtime");
    // no file may grow beyond 64 blocks, and writes say so
    let limited = "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"";
    let ran = Command::new("sh")
        .args(["-c", limited])
        .arg(program)
        .args(["prepare", "profile", "-m", &model, "-o", &output])
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(1), "{err}");
    assert!(err.contains("cannot keep what is done so far"), "{err}");
    assert!(!folder.path("s.gguf").exists());
}
