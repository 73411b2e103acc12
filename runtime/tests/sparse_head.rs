//! `--head sparse` as a user meets it, with sketches of a tiny model's head that are made here.

mod common;

use common::running::{Folder, TEXT, json_of, run, text_of, tiny};
use common::tiny_model::{N_VOCAB, TinyModel};
use pi_kernels::QuantType;
use pi_runtime::gguf::GgufFile;
use pi_runtime::head_sketch::{HeadSketch, PROJECT_TYPE, SCORES_TYPE};
use pi_runtime::model::Hyperparameters;
use pi_runtime::model::quantize::quantize_row;
use pi_runtime::sampler::Mt19937;
use pi_runtime::sidecar::sidecar_header;

const RANK: usize = 32;

/// A sketch that sees the first numbers of the hidden state, with random rows; with all groups nobody is left out.
fn sketch(n_embd: usize, n_groups: usize) -> HeadSketch {
    let mut random = Mt19937::new(8);
    let rows = |quant: QuantType, n_rows, n_cols, value: &mut dyn FnMut(usize, usize) -> f32| {
        let mut bytes = vec![0; n_rows * quant.row_bytes(n_cols)];
        let each_row = bytes.chunks_exact_mut(quant.row_bytes(n_cols));
        for (row, out) in each_row.enumerate() {
            let values: Vec<f32> = (0..n_cols).map(|column| value(row, column)).collect();
            quantize_row(quant, &values, out);
        }
        bytes
    };
    HeadSketch {
        n_embd,
        n_vocab: N_VOCAB,
        rank: RANK,
        n_groups,
        mean_candidates: 40.0,
        project: rows(PROJECT_TYPE, RANK, n_embd, &mut |row, column| {
            f32::from(row == column)
        }),
        scores: rows(SCORES_TYPE, N_VOCAB, RANK, &mut |_, _| {
            random.next_f64() as f32 - 0.5
        }),
    }
}

/// Writes `m.sparse.gguf` for `m.gguf`, with the sketch if there is one.
fn write_sidecar(folder: &Folder, sketch: Option<&HeadSketch>) {
    let model = GgufFile::open(folder.path("m.gguf")).unwrap();
    let hyper = Hyperparameters::read(&model).unwrap();
    let mut header = sidecar_header(&model, &hyper).unwrap();
    if let Some(sketch) = sketch {
        sketch.declare(&mut header).unwrap();
    }
    let mut file = header.create(&folder.path("m.sparse.gguf")).unwrap();
    if let Some(sketch) = sketch {
        sketch.write(&mut file).unwrap();
    }
    file.finish().unwrap();
}

fn n_embd() -> usize {
    TinyModel::default().n_embd
}

const ALL: usize = N_VOCAB.div_ceil(16);

#[test]
fn with_all_groups_the_answer_is_the_full_head_s() {
    let folder = tiny();
    // the worst score is a candidate only where it is its group's best: biases make all of them candidates
    write_sidecar(&folder, Some(&sketch(n_embd(), ALL)));
    let model = folder.name("m.gguf");
    let biases: Vec<String> = (0..N_VOCAB).map(|id| format!("-l{id}+0")).collect();
    for sampling in [
        &["--temp", "0"][..],
        &["-s", "7", "--repeat-penalty", "1.3"],
    ] {
        let mut args = vec!["-m", &model, "-p", TEXT, "-n", "12", "--json"];
        args.extend(sampling);
        args.extend(biases.iter().map(String::as_str));
        let full = json_of(&args);
        args.extend(["--head", "sparse"]);
        let sparse = json_of(&args);
        assert_eq!(sparse["tokens"], full["tokens"]);
        assert_ne!(
            sparse["logits_hash"], full["logits_hash"],
            "ids are hashed too"
        );
        assert_eq!(sparse["timings"]["lossy"][0], "head sparse");
        assert_eq!(full["timings"]["lossy"].as_array().unwrap().len(), 0);
    }
}

#[test]
fn fewer_bytes_are_read_and_named_and_results_repeat() {
    let folder = tiny();
    write_sidecar(&folder, Some(&sketch(n_embd(), 1)));
    let model = folder.name("m.gguf");
    let args = [
        "-m",
        &model,
        "-p",
        TEXT,
        "-n",
        "12",
        "-s",
        "3",
        "--json",
        "--ignore-eos",
    ];
    let full = json_of(&args);
    let sparse_args = [&args[..], &["--head", "sparse"]].concat();
    let one = json_of(&[&sparse_args[..], &["-t", "1"]].concat());
    let two = json_of(&[&sparse_args[..], &["-t", "2"]].concat());
    assert_eq!(one["logits_hash"], two["logits_hash"]);
    assert_eq!(one["tokens"], two["tokens"]);
    let bytes = |ran: &serde_json::Value| ran["timings"]["bytes_per_token"].as_u64().unwrap();
    assert!(bytes(&one) < bytes(&full), "{one} {full}");

    let chat = run(&["-m", &model, "-p", TEXT, "-n", "4", "--head", "sparse"]);
    assert_eq!(chat.code, 0, "{}", chat.err);
    assert!(chat.err.contains("lossy: head sparse"), "{}", chat.err);
    let rows = |head: &str| {
        let args = [
            "bench", "-m", &model, "-p", "0", "-n", "8", "-r", "1", "-o", "json", "--head",
        ];
        json_of(&[&args[..], &[head]].concat())
    };
    let (full, sparse) = (rows("full"), rows("sparse"));
    assert_eq!(
        (&full[0]["head"], &sparse[0]["head"]),
        (&"full".into(), &"sparse".into())
    );
    let bytes = |rows: &serde_json::Value| rows[0]["bytes_per_token"].as_u64().unwrap();
    assert!(bytes(&sparse) < bytes(&full));
}

#[test]
fn perplexity_uses_the_full_head_whatever_is_asked() {
    let folder = tiny();
    let text = folder.file("text.txt", &TEXT.repeat(2));
    let model = folder.name("m.gguf");
    let args = ["perplexity", "-m", &model, "-f", &text, "-c", "32"];
    let full = text_of(&args);
    // it needs no sidecar either
    let ran = run(&[&args[..], &["--head", "sparse"]].concat());
    assert_eq!((ran.code, ran.out), (0, full), "{}", ran.err);
    assert!(!ran.err.contains("lossy"), "{}", ran.err);
}

#[test]
fn a_sidecar_that_is_missing_or_damaged_is_named_with_its_cure() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let refused = |words: &[&str]| {
        let ran = run(&["-m", &model, "-p", "a", "-n", "2", "--head", "sparse"]);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{}", ran.err);
        for word in words {
            assert!(ran.err.contains(word), "{word}: {}", ran.err);
        }
        assert_eq!(ran.err.trim().lines().count(), 1, "{}", ran.err);
    };
    refused(&["m.sparse.gguf", "pi-runtime prepare"]);
    write_sidecar(&folder, None);
    refused(&["sketch of the head", "pi-runtime prepare"]);
    let good = sketch(n_embd(), 2);
    let damaged = |change: &dyn Fn(&mut HeadSketch)| {
        let mut sketch = good.clone();
        change(&mut sketch);
        write_sidecar(&folder, Some(&sketch));
    };
    damaged(&|sketch| sketch.n_groups = 0);
    refused(&["sparse.head.groups"]);
    damaged(&|sketch| sketch.mean_candidates = f32::NAN);
    refused(&["sparse.head.mean_candidates"]);
    // the scale of the third token's row
    damaged(&|sketch| sketch.scores[36..38].copy_from_slice(&[0x00, 0x7E]));
    refused(&["head_sketch.b.weight", "not finite", "64"]);
    damaged(&|sketch| {
        sketch.n_vocab = N_VOCAB - 1;
        sketch.scores.truncate((N_VOCAB - 1) * 18);
    });
    refused(&["head_sketch.b.weight"]);
    damaged(&|_| ());
    let bytes = std::fs::read(folder.path("m.sparse.gguf")).unwrap();
    std::fs::write(folder.path("m.sparse.gguf"), &bytes[..bytes.len() - 100]).unwrap();
    refused(&["m.sparse.gguf"]);
}
