//! A Gemma model from the command line: what runs, and what is refused. Its logits are checked in `family.rs`.

mod common;

use common::gpu::has_gpu;
use common::running::{Folder, Ran, TEXT, json_of, run, text_of};
use common::tiny_model::TinyModel;
use common::workspace;

fn fixture(name: &str) -> String {
    let path = workspace().join("tests/fixtures").join(name);
    path.to_str().unwrap().to_owned()
}

fn refused(ran: &Ran, words: &[&str]) {
    assert_eq!(ran.code, 2, "{}", ran.err);
    for word in words {
        assert!(ran.err.contains(word), "no {word:?} in: {}", ran.err);
    }
}

/// The reference is llama-perplexity's of the same values as f32, with a cache of f32.
#[test]
fn perplexity_is_llama_cpp_s() {
    const LLAMA_CPP: f64 = 670.3934;
    let (model, text) = (fixture("family/gemma.gguf"), fixture("text/bench.txt"));
    let args = ["perplexity", "-m", &model, "-f", &text, "-c", "256"];
    let more = ["--chunks", "3", "--activations", "f32"];
    let printed = text_of(&[&args[..], &more].concat());
    let (_, figures) = printed.split_once("PPL = ").unwrap();
    let found: f64 = figures.split(' ').next().unwrap().parse().unwrap();
    let difference = found / LLAMA_CPP - 1.0;
    println!("{:+.4} %", 100.0 * difference);
    assert!(difference.abs() < 0.002, "{difference}");
}

#[test]
fn modes_for_gates_that_close_are_refused() {
    let folder = Folder::with(&TinyModel::gemma());
    let model = folder.name("m.gguf");
    for mode in ["exact", "predicted"] {
        let ran = run(&["-m", &model, "-p", "a", "-n", "1", "--sparsity", mode]);
        refused(&ran, &[mode, "gates are gelu", "--sparsity off"]);
        assert_eq!(ran.err.lines().count(), 1, "{}", ran.err);
    }
    let packed = run(&["pack", &model, "-o", &folder.name("p.gguf")]);
    refused(&packed, &["gelu", "never close"]);
    let planned = text_of(&["plan", "-m", &model]);
    assert!(planned.contains("no gate is ever closed"), "{planned}");
}

/// Where there is a GPU, it has no GELU; else there is none.
#[test]
fn a_gpu_is_refused_or_left_out() {
    let folder = Folder::with(&TinyModel::gemma());
    let model = folder.name("m.gguf");
    let args = ["-m", &model, "-p", TEXT, "-n", "4", "--temp", "0", "--json"];
    let host = json_of(&args);
    let with = |required: bool| {
        let text = format!("[[gpu]]\nrequired = {required}\n");
        let topology = folder.file("t.toml", &text);
        run(&[&args[..], &["--topology", &topology]].concat())
    };
    let left_out = with(false);
    assert_eq!(left_out.code, 0, "{}", left_out.err);
    assert!(
        left_out.err.contains("the host computes in its place"),
        "{}",
        left_out.err
    );
    let left_out: serde_json::Value = serde_json::from_str(&left_out.out).unwrap();
    assert_eq!(left_out["logits_hash"], host["logits_hash"]);
    let cause = match has_gpu() {
        true => "a model with GELU gates does not run on a GPU",
        false => "no NVIDIA GPU",
    };
    refused(&with(true), &[cause]);
}
