//! `pi-runtime doctor` on the machine that runs the tests.

mod common;

use common::demo_model;
use common::running::{json_of, run, text_of, tiny};

#[test]
fn this_machine_can_run_the_demo_model() {
    let demo = demo_model();
    let json = json_of(&["doctor", "-m", demo.to_str().unwrap(), "--json"]);
    assert_eq!(json["can_run"], true, "{json}");
    let findings = json["findings"].as_array().unwrap();
    let about = |subject: &str| {
        let finding = findings.iter().find(|found| found["subject"] == subject);
        finding.unwrap_or_else(|| panic!("nothing is said about {subject}"))
    };
    let model = about("model")["text"].as_str().unwrap();
    assert!(model.contains("sparsity exact"), "{model}");
    assert!(about("cores")["text"].as_str().unwrap().contains("core"));
    assert_eq!(about("threads")["state"], "ok");
    for finding in findings {
        let is_problem = finding["state"] == "problem";
        assert!(!is_problem || finding["cure"].is_string(), "{finding}");
    }
}

#[test]
fn lines_and_a_verdict_are_printed() {
    let folder = tiny();
    let text = text_of(&["doctor", "-m", &folder.name("m.gguf")]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("ok      system"), "{text}");
    assert!(lines[lines.len() - 1].contains("can run here"), "{text}");
}

#[test]
fn a_model_that_cannot_run_is_a_problem_with_exit_code_2() {
    let folder = tiny();
    let bad = folder.file("bad.gguf", "GGUF and nothing behind it");
    let ran = run(&["doctor", "-m", &bad]);
    assert_eq!(ran.code, 2, "{}{}", ran.out, ran.err);
    assert!(ran.out.contains("bad.gguf"), "{}", ran.out);
    assert!(ran.out.contains("cannot run here"), "{}", ran.out);
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
}

#[cfg(target_os = "linux")]
#[test]
fn a_limit_of_the_shell_is_seen() {
    let program = assert_cmd::cargo::cargo_bin!("pi-runtime");
    let script = "ulimit -l 64 && ulimit -v 67108864 && exec \"$0\" doctor --json -m \"$1\"";
    let output = std::process::Command::new("bash")
        .args(["-c", script])
        .arg(program)
        .arg(demo_model())
        .output()
        .unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let the = |subject: &str| {
        let mut findings = json["findings"].as_array().unwrap().iter();
        findings.find(|found| found["subject"] == subject).unwrap()
    };
    // what it means depends on whether there is a GPU
    let locked = the("locked memory")["text"].as_str().unwrap();
    assert!(locked.starts_with("limited to 64.0 KiB; "), "{locked}");
    let finding = the("address space");
    assert_eq!(finding["state"], "note", "{finding}");
    assert_eq!(finding["cure"], "ulimit -v unlimited", "{finding}");
}
