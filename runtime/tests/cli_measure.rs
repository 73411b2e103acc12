//! `perplexity`, `bench` and `pack` as a user meets them.

mod common;

use common::running::{Folder, TEXT, json_of, run, text_of, tiny};
use common::tiny_model::TinyModel;
use pi_kernels::QuantType;

#[test]
fn perplexity_ends_with_llama_cpp_s_line() {
    let folder = tiny();
    let text = folder.file("text.txt", &TEXT.repeat(3));
    let model = folder.name("m.gguf");
    let args = ["perplexity", "-m", &model, "-f", &text, "-c", "32"];
    let ran = run(&args);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let numbers = ran
        .out
        .trim()
        .strip_prefix("Final estimate: PPL = ")
        .unwrap();
    let (ppl, error) = numbers.split_once(" +/- ").unwrap();
    let (ppl, error): (f64, f64) = (ppl.parse().unwrap(), error.parse().unwrap());
    // a random model is about as good as any of 259 tokens
    assert!(
        (50.0..2000.0).contains(&ppl) && error > 0.0,
        "{ppl} {error}"
    );
    assert!(
        ran.err.contains("[1]") && ran.err.contains("[6]"),
        "{}",
        ran.err
    );
    let one = run(&[&args[..], &["--chunks", "1"]].concat());
    assert!(
        one.err.contains("[1]") && !one.err.contains("[2]"),
        "{}",
        one.err
    );
    let off = text_of(&[&args[..], &["--sparsity", "off"]].concat());
    assert_eq!(off, ran.out);
}

#[test]
fn bench_prints_a_row_for_every_test() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = [
        "bench", "-m", &model, "-p", "8", "-n", "4", "-d", "0,8", "-r", "2", "-t", "1", "-o",
    ];
    let rows = json_of(&[&args[..], &["json"]].concat());
    let tests: Vec<[u64; 4]> = (rows.as_array().unwrap().iter())
        .map(|row| {
            ["n_prompt", "n_gen", "n_depth", "n_threads"].map(|key| row[key].as_u64().unwrap())
        })
        .collect();
    assert_eq!(
        tests,
        [[8, 0, 0, 1], [0, 4, 0, 1], [8, 0, 8, 1], [0, 4, 8, 1]]
    );
    for row in rows.as_array().unwrap() {
        assert!(row["avg_ts"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["samples_ns"].as_array().unwrap().len(), 2);
    }
    let (prefill, decode) = (&rows[0], &rows[1]);
    assert!(prefill["bytes_per_token"].is_null());
    assert!(
        decode["percent_of_byte_limit"].as_f64().unwrap() > 0.0,
        "{decode}"
    );
    assert!(rows[3]["bytes_per_token"].as_u64() > decode["bytes_per_token"].as_u64());
    let table = text_of(&[&args[..], &["md", "--random-ids"]].concat());
    assert_eq!(table.lines().count(), 6, "{table}");
    assert!(table.contains("tg4 @ d8"), "{table}");
    assert_eq!(text_of(&[&args[..], &["csv"]].concat()).lines().count(), 5);
}

#[test]
fn packing_floats_changes_no_logit() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    });
    let (plain, packed) = (folder.name("m.gguf"), folder.name("packed.gguf"));
    let table = text_of(&["pack", &plain, "-o", &packed]);
    assert!(
        table.contains("as in the file (dense)") && table.contains("F32 (written)"),
        "{table}"
    );
    let hash = |model: &str| {
        let args = [
            "-m",
            model,
            "-p",
            "Hello",
            "-n",
            "8",
            "--temp",
            "0",
            "--sparsity",
            "exact",
            "--json",
        ];
        json_of(&args)["logits_hash"].clone()
    };
    assert_eq!(hash(&plain), hash(&packed));
    assert_eq!(folder.names(), ["m.gguf", "packed.gguf"]);
}

#[test]
fn pack_measures_with_the_threads_that_it_is_given() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    });
    let (plain, packed) = (folder.name("m.gguf"), folder.name("packed.gguf"));
    let one = folder.file("one.toml", "[host]\nthreads = 1\n");
    let bad = folder.file("bad.toml", "[host]\nthreads = 0\n");
    let pack = |more: &[&str]| run(&[&["pack", &plain, "-o", &packed], more].concat());
    for (more, word) in [
        (["--topology", bad.as_str()], "bad.toml, line 2"),
        (["-t", "9999"], "9999"),
        (["-t", "0"], "--threads"),
        (["--chunks", "0"], "--chunks"),
    ] {
        let ran = pack(&more);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{}", ran.err);
        assert!(ran.err.contains(word), "{}", ran.err);
    }
    assert_eq!(folder.names(), ["bad.toml", "m.gguf", "one.toml"]);
    let ran = pack(&["-t", "1", "--log-level", "info"]);
    assert!(
        ran.code == 0 && ran.err.contains("threads=1"),
        "{}",
        ran.err
    );
    let ran = pack(&["--topology", &one, "--log-level", "info"]);
    assert!(
        ran.code == 0 && ran.err.contains("threads=1"),
        "{}",
        ran.err
    );
}

/// Wherever the two presses meet it: the program ends, and only what was there before is there.
#[cfg(unix)]
#[test]
fn ctrl_c_twice_leaves_no_unfinished_file_behind() {
    use std::io::{BufRead, BufReader};
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        quant: QuantType::Q4_0,
        ..TinyModel::default()
    });
    let text = folder.file("text.txt", &TEXT.repeat(2000));
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("pi-runtime"))
        .args([
            "pack",
            &folder.name("m.gguf"),
            "-o",
            &folder.name("out.gguf"),
        ])
        .args(["-f", &text, "--chunks", "500"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut err = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("packing with") {
        line.clear();
        assert!(err.read_line(&mut line).unwrap() > 0, "it was to measure");
    }
    for _ in 0..2 {
        let kill = std::process::Command::new("kill")
            .args(["-INT", &child.id().to_string()])
            .status();
        assert!(kill.unwrap().success());
    }
    std::io::copy(&mut err, &mut std::io::sink()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(folder.names(), ["m.gguf", "text.txt"]);
}

#[test]
fn pack_shows_what_each_type_costs_and_leaves_nothing_else_behind() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        quant: QuantType::Q4_0,
        ..TinyModel::default()
    });
    let text = folder.file("text.txt", &TEXT.repeat(20));
    let (plain, packed) = (folder.name("m.gguf"), folder.name("packed.gguf"));
    let ran = run(&["pack", &plain, "-o", &packed, "-f", &text, "--chunks", "2"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("% of the neurons are active on"),
        "{}",
        ran.err
    );
    let lines: Vec<&str> = ran.out.lines().collect();
    assert_eq!(lines.len(), 6, "{}", ran.out);
    assert!(
        lines[1..].iter().all(|line| line.contains(" +/- ")),
        "{}",
        ran.out
    );
    assert!(ran.out.contains("Q5_0 (written)"), "{}", ran.out);
    assert_eq!(folder.names(), ["m.gguf", "packed.gguf", "text.txt"]);
    let plain = run(&["-m", &plain, "-p", "Hello", "-n", "2"]);
    assert!(
        plain.err.contains("hint: ") && plain.err.contains("pack"),
        "{}",
        plain.err
    );
    let packed = run(&["-m", &packed, "-p", "Hello", "-n", "2"]);
    assert!(
        packed.code == 0 && packed.err.contains("lossy: none"),
        "{}",
        packed.err
    );
}

#[test]
fn a_re_quantised_down_is_named_as_lossy() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        quant: QuantType::Q4_0,
        ..TinyModel::default()
    });
    let ran = run(&[
        "-m",
        &folder.name("m.gguf"),
        "-p",
        "Hello",
        "-n",
        "2",
        "--sparsity",
        "exact",
    ]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("lossy: down re-quantised Q4_0 -> Q5_0"),
        "{}",
        ran.err
    );
}

#[test]
fn a_failed_packing_leaves_what_was_there() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    });
    let output = folder.name("packed.gguf");
    std::fs::write(&output, b"mine").unwrap();
    let folder_as_output = run(&[
        "pack",
        &folder.name("m.gguf"),
        "-o",
        folder.0.path().to_str().unwrap(),
    ]);
    assert_eq!(folder_as_output.code, 2, "{}", folder_as_output.err);
    let nowhere = folder.name("no/such/folder.gguf");
    assert_ne!(
        run(&["pack", &folder.name("m.gguf"), "-o", &nowhere]).code,
        0
    );
    assert_eq!(std::fs::read(&output).unwrap(), b"mine");
    assert_eq!(folder.names(), ["m.gguf", "packed.gguf"]);
}
