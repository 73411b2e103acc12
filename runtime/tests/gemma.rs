//! A Gemma model from the command line: what runs, and what is refused. Its logits are checked in `family.rs`.

mod common;

use common::gpu::has_gpu;
use common::running::{Folder, Ran, run, text_of};
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
    check_perplexity(&[]);
}

fn check_perplexity(flags: &[&str]) {
    const LLAMA_CPP: f64 = 670.3934;
    let (model, text) = (fixture("family/gemma.gguf"), fixture("text/bench.txt"));
    let args = ["perplexity", "-m", &model, "-f", &text, "-c", "256"];
    let more = ["--chunks", "3", "--activations", "f32"];
    let printed = text_of(&[&args[..], &more, flags].concat());
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

/// Together and token by token.
#[test]
fn a_gpu_gives_the_same_perplexity() {
    if !has_gpu() {
        println!("skipped: no NVIDIA GPU");
        return;
    }
    let folder = Folder::with(&TinyModel::gemma());
    let topology = folder.file("t.toml", "[[gpu]]\nrequired = true\n");
    for batch in ["256", "1"] {
        check_perplexity(&["--topology", &topology, "-b", batch]);
    }
}
