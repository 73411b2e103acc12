//! Synthetic models: the same bytes always, and the planned activity on what really ran.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use pi_kernels::QuantType;
use pi_runtime::bench::token_source::TEXT;
use pi_runtime::gguf::GgufFile;
use pi_runtime::session::Silent;
use pi_runtime::sidecar::default_path;
use pi_runtime::synth::{SynthOptions, SynthShape, Synthesis};
use pi_runtime::tokenizer::{EncodeOptions, Tokenizer};

use common::engine::{Forced, Greedy, Setup};
use common::watch::{Seen, Watch};
use common::{demo_model, program, tiny_synth};

/// Tokens that are fed.
const N_TOKENS: usize = 1000;
/// What the sidecar is to find: at least and at most.
const AHEAD_MASS: std::ops::RangeInclusive<f64> = 0.93..=0.98;

fn write(options: &SynthOptions, path: &Path, n_threads: usize) {
    let synthesis = Synthesis::new(options).unwrap();
    assert!(
        synthesis
            .write(path, n_threads, &Silent, &|| false)
            .unwrap()
    );
}

fn both_files(path: &Path) -> (Vec<u8>, Vec<u8>) {
    (
        fs::read(path).unwrap(),
        fs::read(default_path(path)).unwrap(),
    )
}

fn tokens(path: &Path, n: usize) -> Vec<u32> {
    let file = GgufFile::open(path).unwrap();
    let tokenizer = Tokenizer::from_metadata(file.metadata()).unwrap();
    let mut tokens = tokenizer.encode(TEXT, EncodeOptions::PROMPT).unwrap();
    assert!(tokens.len() >= n, "the text has {} tokens", tokens.len());
    tokens.truncate(n);
    tokens
}

/// What `N_TOKENS` of text make fire, and the sorted distances of the two highest logits.
fn feed(path: &Path, sidecar: Option<&Path>) -> (Seen, Vec<f32>) {
    let watch = Arc::new(Watch::new(path, sidecar));
    let setup = Setup {
        n_ctx: N_TOKENS,
        tap: Some(watch.clone()),
        ..Setup::q8()
    };
    let engine = setup.start(path);
    let margins = Arc::new(Mutex::new(vec![]));
    let noted = Arc::clone(&margins);
    // logits are many bytes for the demo model's vocabulary
    let first = if sidecar.is_some() { 0 } else { N_TOKENS - 1 };
    let forced = Forced::new(
        vec![(tokens(path, N_TOKENS), first)],
        move |_, _, logits| {
            noted.lock().unwrap().push(margin(logits));
        },
    );
    let run = engine.run(forced).unwrap();
    run.outcome.unwrap();
    let seen = watch.take();
    // what was seen is what ran
    let ran = (run.totals.prefill + run.totals.decode)
        .active_share()
        .unwrap();
    assert!(
        (seen.active_share() - ran).abs() < 1e-9,
        "{} seen, {ran} ran",
        seen.active_share()
    );
    let mut margins = margins.lock().unwrap().clone();
    margins.sort_by(f32::total_cmp);
    (seen, margins)
}

fn margin(logits: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::MIN, f32::MIN);
    for logit in logits {
        (first, second) = match *logit {
            logit if logit > first => (logit, first),
            logit => (first, second.max(logit)),
        };
    }
    first - second
}

#[test]
fn bytes_depend_on_the_options_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&tiny_synth::options(), &path, 1);
    let once = both_files(&path);
    assert!(once.0.len() < 10_000_000);
    for n_threads in [2, 3] {
        write(&tiny_synth::options(), &path, n_threads);
        assert!(both_files(&path) == once, "{n_threads} threads");
    }
    let other = SynthOptions {
        seed: 2,
        ..tiny_synth::options()
    };
    write(&other, &path, 2);
    assert!(both_files(&path).0 != once.0);
}

#[test]
fn activity_is_as_planned_on_what_ran() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&tiny_synth::options(), &path, 2);
    let (seen, margins) = feed(&path, Some(&default_path(&path)));
    let (demo, _) = feed(&demo_model(), None);

    let share = seen.active_share();
    println!("active {share:.4}");
    assert!((share - 0.10).abs() < 0.01, "{share}");
    for (n, layer) in seen.layers.iter().enumerate() {
        let (share, top) = (layer.active_share(), layer.top_share(0.26));
        println!("layer {n}: active {share:.4}, the top 26 % make {top:.3}");
        assert!((share - 0.10).abs() < 0.02, "layer {n}: {share}");
        assert!((top - 0.80).abs() < 0.04, "layer {n}: {top}");
    }
    let tops: Vec<f64> = seen
        .layers
        .iter()
        .map(|layer| layer.top_share(0.26))
        .collect();
    let top = tops.iter().sum::<f64>() / tops.len() as f64;
    assert!((top - 0.80).abs() < 0.03, "{top}");
    let (overlap, demos) = (seen.overlap(), demo.overlap());
    println!("overlap {overlap:.3}, the demo model's {demos:.3}");
    assert!((overlap - demos).abs() < 0.1, "{overlap}, demo {demos}");
    let median = margins[margins.len() / 2];
    println!("median margin {median:.2}");
    assert!(median >= 0.5, "{median}");
    predictors_find_most_but_not_all(&seen);
}

fn predictors_find_most_but_not_all(seen: &Seen) {
    let neurons = |n_tokens: usize| (1024 * n_tokens) as f64;
    for (n, layer) in seen.layers.iter().enumerate() {
        let share = |candidates: usize| candidates as f64 / neurons(layer.active.len());
        let (found, candidates) = (layer.ahead.mass / layer.mass, share(layer.ahead.candidates));
        let sketched = layer.sketch.mass / layer.mass;
        println!(
            "layer {n}: ahead {found:.3} of the mass in {candidates:.3} of the neurons, sketch {sketched:.4} in {:.3}",
            share(layer.sketch.candidates)
        );
        if n > 0 {
            assert!(AHEAD_MASS.contains(&found), "layer {n}: {found}");
            assert!(candidates < 0.3, "layer {n}: {candidates}");
        }
        assert!((0.99..1.0).contains(&sketched), "layer {n}: {sketched}");
    }
}

#[test]
fn predictors_cost_at_least_a_twenty_fifth() {
    let folder = tempfile::tempdir().unwrap();
    for quant in [QuantType::Q4_0, QuantType::Q8_0, QuantType::F16] {
        let path = folder.path().join("m.gguf");
        write(
            &SynthOptions {
                quant,
                ..tiny_synth::options()
            },
            &path,
            2,
        );
        let (model, sidecar) = (
            GgufFile::open(&path).unwrap(),
            GgufFile::open(default_path(&path)).unwrap(),
        );
        let bytes = |file: &GgufFile, name: &str| {
            let tensor = file
                .require_tensor(&format!("blk.1.{name}.weight"))
                .unwrap();
            file.tensor_data(tensor).len() as f64
        };
        let ffn = ["ffn_gate", "ffn_up", "ffn_down_t"].map(|name| bytes(&model, name));
        let predictor = ["ahead_a", "ahead_b"].map(|name| bytes(&sidecar, name));
        let cost = predictor.iter().sum::<f64>() / ffn.iter().sum::<f64>();
        assert!((0.04..0.10).contains(&cost), "{quant}: {cost}");
    }
}

#[test]
fn likeliest_tokens_do_not_repeat_for_ever() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    write(&tiny_synth::options(), &path, 2);
    let watch = Arc::new(Watch::new(&path, None));
    let setup = Setup {
        tap: Some(watch.clone()),
        ..Setup::q8()
    };
    let engine = setup.start(&path);
    let (generated, _) = Greedy::run(&engine, &tokens(&path, 20), 200);
    let mut distinct = generated.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let overlap = watch.take().overlap();
    println!("{} distinct of 200, overlap {overlap:.3}", distinct.len());
    assert!(distinct.len() > 60, "{generated:?}");
    assert!((overlap - 0.285).abs() < 0.1, "{overlap}");
}

#[test]
fn every_type_runs_at_its_activity() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    for quant in QuantType::ALL {
        // at least three super-blocks of channels that change
        let n_embd = if quant.block_values() == 256 {
            1024
        } else {
            256
        };
        let shape = SynthShape {
            n_layer: 2,
            n_embd,
            n_ff: 512,
            n_vocab: 512,
            ..tiny_synth::options().shape
        };
        write(
            &SynthOptions {
                quant,
                shape,
                ..tiny_synth::options()
            },
            &path,
            2,
        );
        let engine = Setup::q8().start(&path);
        let forced = Forced::new(vec![(tokens(&path, 100), 99)], |_, _, logits| {
            assert!(logits.iter().all(|logit| logit.is_finite()));
        });
        let run = engine.run(forced).unwrap();
        run.outcome.unwrap();
        let share = run.totals.prefill.active_share().unwrap();
        assert!((share - 0.10).abs() < 0.03, "{quant}: {share}");
    }
}

/// Runs `synth` with `flags` and the output `path`.
fn synth(path: &Path, flags: &[&str]) -> assert_cmd::assert::Assert {
    let mut command = program();
    command.arg("synth").arg("-o").arg(path).args(flags);
    command.assert()
}

#[test]
fn bad_flags_are_refused_by_name_and_leave_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("m.gguf");
    for flags in [
        ["--preset", "70x"],
        ["--type", "Q9"],
        ["--embd", "2040"],
        ["--heads", "33"],
        ["--kv-heads", "5"],
        ["--layers", "0"],
        ["--active", "1.5"],
        ["--skew", "-1"],
        ["--vocab", "10"],
    ] {
        let output = synth(&path, &flags).code(2).get_output().clone();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            stderr.contains(flags[0]) && stderr.trim_end().lines().count() <= 3,
            "{stderr}"
        );
    }
    synth(folder.path(), &["--layers", "1"]).code(2);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn the_program_writes_a_model_that_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let sizes = "--layers 3 --embd 128 --ff 512 --heads 4 --kv-heads 2 --vocab 600 --ctx 256";
    // with sketches of signs, and of low rank
    for quant in ["Q4_0", "Q8_0"] {
        let flags: Vec<&str> = sizes.split(' ').chain(["--type", quant]).collect();
        synth(&path, &flags).success();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
        let answer = |mode: &str| -> serde_json::Value {
            let mut run = program();
            run.arg("-m").arg(&path).args(["--sparsity", mode]);
            run.args(["-p", "The capital of", "-n", "40", "--temp", "0", "--json"]);
            let output = run.assert().success().get_output().stdout.clone();
            serde_json::from_slice(&output).unwrap()
        };
        let share =
            |answer: &serde_json::Value, name: &str| answer["timings"][name].as_f64().unwrap();
        let (exact, predicted) = (answer("exact"), answer("predicted"));
        assert_eq!(exact["tokens"].as_array().unwrap().len(), 40, "{exact}");
        // nearly all that fires is found among a part of the neurons
        let candidates = share(&predicted, "candidate_share");
        assert!((0.1..0.5).contains(&candidates), "{quant}: {candidates}");
        let found = share(&predicted, "active_share") / share(&exact, "active_share");
        assert!((0.8..1.2).contains(&found), "{quant}: {found}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_leaves_nothing() {
    // a file size limit ends writing as a full disk does
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.gguf");
    let program = assert_cmd::cargo::cargo_bin("pi-runtime");
    let script = "trap '' XFSZ; ulimit -f 1000; exec \"$0\" synth -o \"$1\" --layers 4 --embd 256 --ff 1024 --heads 4 --kv-heads 2";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .args([program.as_path(), &path])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("m.gguf") && stderr.contains("write the file"),
        "{stderr}"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
