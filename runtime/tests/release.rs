//! What a release holds, and that it runs where it is installed.

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::workspace;

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {err}");
    output
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Whether releases can be laid out here; says so where they cannot.
fn has_tools() -> bool {
    let has = |program: &str| Command::new(program).arg("--version").output().is_ok();
    let here = cfg!(all(target_os = "linux", target_arch = "x86_64"))
        && has("python3")
        && has("bash")
        && Path::new("/usr/share/doc/libhwloc-dev/copyright").is_file();
    if !here {
        eprintln!("skipped: needs x86-64 Linux, bash, python3 and Debian's libhwloc-dev");
    }
    here
}

#[test]
fn a_release_is_whole_and_finds_its_model_where_it_is_installed() {
    if !has_tools() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let release = folder.path().join("release");
    let program = assert_cmd::cargo::cargo_bin!("pi-runtime");
    let script = workspace().join("scripts/release");
    run(Command::new(&script)
        .arg("--stage")
        .args([&release, program]));

    let sums = std::fs::read_to_string(release.join("SHA256SUMS")).unwrap();
    let names: Vec<&str> = sums
        .lines()
        .map(|line| line.split_once("  ").unwrap().1)
        .collect();
    assert!(names.is_sorted(), "{names:?}");
    // manual pages and completions are there once the program makes them
    let mut listed = names.clone();
    listed.retain(|name| !name.starts_with("share/"));
    let expected = [
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "THIRD-PARTY-LICENCES.txt",
        "bin/pi-runtime",
        "configs/README.md",
        "configs/cpu-only.toml",
        "configs/four-nodes.toml",
        "configs/two-nodes.toml",
        "docs/overview.svg",
        "docs/token.svg",
        "install",
        "models/LICENSE",
        "models/README.md",
        "models/smollm2-135m-reglu-q4_0.gguf",
        "models/smollm2-135m-reglu-q4_0.sparse.gguf",
        "texts/README.md",
        "texts/calibration.txt",
        "texts/heldout.txt",
    ];
    for name in expected {
        assert!(listed.contains(&name), "{name} is not in {listed:?}");
    }
    for name in &listed {
        // more topologies and pictures may come
        let may_come = name.starts_with("configs/") || name.starts_with("docs/");
        assert!(
            may_come || expected.contains(name),
            "{name} does not belong"
        );
    }
    let check = ["--check", "--quiet", "SHA256SUMS"];
    run(Command::new("sha256sum").args(check).current_dir(&release));

    let licences = std::fs::read_to_string(release.join("THIRD-PARTY-LICENCES.txt")).unwrap();
    for name in ["hwloc (C library", "onig_sys ", "tokenizers ", "kameo "] {
        assert!(licences.contains(name), "{name} has no licence");
    }
    assert!(
        !licences.contains("\npi-topology "),
        "our own licence is apart"
    );
    assert!(!licences.contains("\nproptest "), "tests are not linked");

    let prefix = folder.path().join("a prefix");
    run(Command::new(release.join("install")).env("PREFIX", &prefix));
    std::fs::remove_dir_all(&release).unwrap();
    let installed = prefix.join("bin/pi-runtime");
    // with the sidecar too, which lies beside the model
    let modes = [&[][..], &["--sparsity", "predicted", "--head", "sparse"]];
    for mode in modes {
        let arguments = ["-p", "The capital of France is", "-n", "8", "--temp", "0"];
        let answer = run(Command::new(&installed)
            .args(arguments)
            .args(mode)
            .current_dir("/")
            .env("HOME", "/nonexistent")
            .env_remove("XDG_DATA_HOME"));
        let answer = text(&answer);
        assert!(answer.starts_with(" Paris"), "{mode:?}: {answer}");
    }
}

#[test]
fn a_folder_that_is_there_is_left_alone() {
    if !has_tools() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(workspace().join("scripts/release"))
        .arg("--stage")
        .arg(folder.path())
        .arg(assert_cmd::cargo::cargo_bin!("pi-runtime"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(err.contains("name a new folder"), "{err}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}
