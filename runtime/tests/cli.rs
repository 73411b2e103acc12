//! The program as a user meets it: streams, exit codes and messages.

mod common;

use std::io::Read;
use std::process::{Command, Stdio};

use common::demo_model;
use common::running::{TEXT, json_of, run, tiny};

#[test]
fn text_goes_to_stdout_and_the_rest_to_stderr() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = ["-m", &model, "-p", "Hello", "-n", "12", "--temp", "0"];
    let ran = run(&args);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let json = json_of(&[&args[..], &["--json"]].concat());
    assert_eq!(
        ran.out.trim_end_matches('\n'),
        json["text"].as_str().unwrap().trim_end_matches('\n')
    );
    let lines = ran.err.lines().collect::<Vec<_>>();
    assert!(
        lines.len() == 1 && lines[0].starts_with("load "),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("lossy: none"), "{}", ran.err);
}

#[test]
fn json_is_one_object_with_a_hash_that_repeats() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = [
        "-m",
        &model,
        "-p",
        "Hello",
        "-n",
        "5",
        "--temp",
        "0",
        "--ignore-eos",
        "--json",
    ];
    let first = json_of(&args);
    let names: Vec<&String> = first.as_object().unwrap().keys().collect();
    assert_eq!(
        names,
        [
            "text",
            "tokens",
            "logits_hash",
            "stop",
            "timings",
            "placement"
        ]
    );
    assert_eq!(
        (
            first["stop"].as_str(),
            first["tokens"].as_array().unwrap().len()
        ),
        (Some("limit"), 5)
    );
    let hash = first["logits_hash"].as_str().unwrap();
    assert!(
        hash.len() == 16 && u64::from_str_radix(hash, 16).is_ok(),
        "{hash}"
    );
    let timings = &first["timings"];
    assert_eq!(
        (&timings["prompt_n"], &timings["predicted_n"]),
        (&5.into(), &4.into())
    );
    assert!(timings["bytes_per_token"].as_u64().unwrap() > 0);
    assert!(
        timings["active_share"]
            .as_f64()
            .is_some_and(|share| 0.0 < share && share < 1.0)
    );
    for other in [["--sparsity", "off"], ["-t", "1"], ["--tier", "scalar"]] {
        let second = json_of(&[&args[..], &other].concat());
        assert_eq!(second["logits_hash"], first["logits_hash"], "{other:?}");
    }
    let other = json_of(&[&args[..], &["--kv", "f32"]].concat());
    assert_ne!(other["logits_hash"], first["logits_hash"]);
}

#[test]
fn no_token_is_generated_when_none_is_asked_for() {
    let folder = tiny();
    let ran = run(&["-m", &folder.name("m.gguf"), "-p", "Hello", "-n", "0"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{}", ran.err);
}

#[test]
fn a_full_context_ends_the_answer_normally() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = ["-m", &model, "-p", "Hello", "-c", "16", "--ignore-eos"];
    let ran = run(&args);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(
        ran.err.contains("the context of 16 tokens is full"),
        "{}",
        ran.err
    );
    let json = json_of(&[&args[..], &["--json"]].concat());
    assert_eq!(json["stop"], "context");
    assert_eq!(json["tokens"].as_array().unwrap().len(), 16 - 5 + 1);
}

#[test]
fn bad_input_gives_one_message_and_exit_code_2() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let m = ["-m", model.as_str()];
    let p = ["-m", model.as_str(), "-p", "x"];
    let toml = folder.file("bad.toml", "name = \"x\"\n[host]\nthreads = \"many\"\n");
    let short = folder.file("short.txt", "too short");
    let latin = folder.name("latin.txt");
    std::fs::write(&latin, b"caf\xe9").unwrap();
    let cut = folder.file("cut.gguf", "GGUF\u{3}");
    let missing = folder.name("missing");
    let cases: Vec<(Vec<&str>, Vec<&str>)> = vec![
        (m.to_vec(), vec!["no prompt", "-p", "-cnv"]),
        (
            [&m[..], &["-p", ""]].concat(),
            vec!["prompt is empty", "-p TEXT"],
        ),
        (
            [&p[..], &["--no-such-flag"]].concat(),
            vec!["--no-such-flag"],
        ),
        (
            [&p[..], &["-n", "many"]].concat(),
            vec!["many", "--predict"],
        ),
        ([&p[..], &["-t", "0"]].concat(), vec!["0", "--threads"]),
        ([&p[..], &["-t", "9999"]].concat(), vec!["-t 9999"]),
        ([&p[..], &["-c", "257"]].concat(), vec!["257", "256", "-c"]),
        (
            [&m[..], &["-p", TEXT, "-c", "9"]].concat(),
            vec!["67 tokens", "holds 9", "256"],
        ),
        ([&p[..], &["--temp", "-1"]].concat(), vec!["--temp -1"]),
        (
            [&p[..], &["--logit-bias", "999+1"]].concat(),
            vec!["999", "259"],
        ),
        ([&p[..], &["--tier", "sse9"]].concat(), vec!["sse9", "avx2"]),
        (
            [&p[..], &["--log-level", "loud"]].concat(),
            vec!["--log-level loud", "debug"],
        ),
        (
            [&p[..], &["--topology", &missing]].concat(),
            vec!["missing", "No such file"],
        ),
        (
            [&p[..], &["--topology", &toml]].concat(),
            vec!["bad.toml, line 3", "threads"],
        ),
        (
            vec!["-m", &missing, "-p", "x"],
            vec!["missing", "no such file"],
        ),
        (vec!["-m", &cut, "-p", "x"], vec!["cut.gguf"]),
        (
            [&m[..], &["-cnv"]].concat(),
            vec!["m.gguf", "no chat template"],
        ),
        (
            [&["perplexity"], &m[..], &["-f", &missing]].concat(),
            vec!["missing"],
        ),
        (
            [&["perplexity"], &m[..], &["-f", &latin]].concat(),
            vec!["UTF-8", "byte 3"],
        ),
        (
            [&["perplexity"], &m[..], &["-f", &short, "-c", "16"]].concat(),
            vec!["short.txt", "9 tokens", "at least 32"],
        ),
        (
            [&["perplexity"], &m[..], &["-f", &short, "--chunks", "0"]].concat(),
            vec!["--chunks 0"],
        ),
        (
            [&["bench"], &m[..], &["-p", "0", "-n", "0"]].concat(),
            vec!["nothing to measure"],
        ),
        ([&["bench"], &m[..], &["-d", "4000"]].concat(), vec!["256"]),
        (vec!["pack", &model, "-o", &model], vec!["file to be read"]),
        (
            vec!["pack", &model, "-o", &missing],
            vec!["ffn_down_t", "no packing"],
        ),
        (
            vec!["pack", &model, "-o", &missing, "--type", "Q9"],
            vec!["Q9", "Q8_0", "--type"],
        ),
        (vec!["inspect", &missing], vec!["missing"]),
        (vec!["tokenize", "-m", &missing, "-p", "x"], vec!["missing"]),
    ];
    for (args, words) in cases {
        let ran = run(&args);
        assert_eq!(ran.code, 2, "{args:?}: {}{}", ran.out, ran.err);
        assert_eq!(ran.out, "", "{args:?}");
        assert!(!ran.err.contains("panicked"), "{args:?}: {}", ran.err);
        assert_eq!(
            ran.err.matches("error:").count(),
            1,
            "{args:?}: {}",
            ran.err
        );
        for word in words {
            assert!(
                ran.err.contains(word),
                "{args:?}: {word:?} is not in: {}",
                ran.err
            );
        }
    }
}

/// Starts the program with pipes on both ends.
fn spawn(args: &[&str]) -> std::process::Child {
    Command::new(assert_cmd::cargo::cargo_bin!("pi-runtime"))
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn wait(mut child: std::process::Child) -> (Option<i32>, String) {
    let mut err = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    (child.wait().unwrap().code(), err)
}

#[test]
fn a_reader_that_goes_away_is_an_ordinary_end() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let mut child = spawn(&["-m", &model, "-p", "Hello", "--ignore-eos", "--seed", "1"]);
    drop(child.stdout.take());
    let (code, err) = wait(child);
    // tests beside this one bind threads to the same CPUs
    let own = err
        .lines()
        .filter(|line| !line.contains(" has bound threads to it too"));
    assert_eq!((code, own.count()), (Some(0), 0), "{err}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_the_answer() {
    let demo = demo_model();
    let mut child = spawn(&[
        "-m",
        demo.to_str().unwrap(),
        "-p",
        "Once upon a time",
        "--ignore-eos",
    ]);
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0]).unwrap();
    let kill = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(kill.unwrap().success());
    out.read_to_end(&mut Vec::new()).unwrap();
    let (code, err) = wait(child);
    assert_eq!(code, Some(130), "{err}");
    assert!(
        err.contains("interrupted") && err.contains("decode"),
        "{err}"
    );
}
