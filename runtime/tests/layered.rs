//! Invariant 5: nothing above `topology` knows CPU numbers, and nothing below `runtime` knows files.
//!
//! A rule about source text, so the test reads the sources.

use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// Every source of a crate, examples and tests of their own not included.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Where `crates` say one of `words`, comments aside: `file:line: text`.
fn finds(crates: &[&str], words: &[&str]) -> Vec<String> {
    let mut finds = Vec::new();
    for name in crates {
        let files = sources(&workspace().join(name).join("src"));
        assert!(!files.is_empty(), "{name} has sources");
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for (line, text) in text.lines().enumerate() {
                let code = text.split("//").next().unwrap();
                if words.iter().any(|word| code.contains(word)) {
                    finds.push(format!("{}:{}: {text}", file.display(), line + 1));
                }
            }
        }
    }
    finds
}

/// The names in a crate's `[dependencies]` and in its `[dev-dependencies]`.
fn dependencies(name: &str) -> Vec<String> {
    let path = workspace().join(name).join("Cargo.toml");
    let text = fs::read_to_string(path).unwrap();
    let mut inside = false;
    let mut names = Vec::new();
    for line in text.lines() {
        if line.starts_with('[') {
            inside = line.contains("dependencies");
        } else if inside && let Some((name, _)) = line.split_once(['.', ' ', '=']) {
            names.push(name.to_owned());
        }
    }
    assert!(!names.is_empty(), "{name} has dependencies");
    names
}

#[test]
fn crates_depend_one_way() {
    let order = ["pi-topology", "pi-kernels", "pi-actors", "pi-runtime"];
    let allowed: [(&str, &[&str]); 4] = [
        ("topology", &[]),
        ("kernels", &[]),
        ("actors", &["pi-topology", "pi-kernels"]),
        ("runtime", &["pi-topology", "pi-kernels", "pi-actors"]),
    ];
    for (name, allowed) in allowed {
        for dependency in dependencies(name) {
            let ours = order.contains(&dependency.as_str());
            assert!(
                !ours || allowed.contains(&dependency.as_str()),
                "{name} depends on {dependency}"
            );
        }
    }
}

#[test]
fn cpus_are_known_to_topology_alone() {
    for name in ["kernels", "actors", "runtime"] {
        for binding in ["hwlocality", "core_affinity"] {
            assert!(
                !dependencies(name).iter().any(|found| found == binding),
                "{name} depends on {binding}"
            );
        }
    }
    let words = [
        "setaffinity",
        "getaffinity",
        "getcpu",
        "CPU_SET",
        "mbind(",
        "available_parallelism",
    ];
    let finds = finds(&["kernels", "actors", "runtime"], &words);
    assert!(finds.is_empty(), "{}", finds.join("\n"));
}

#[test]
fn files_and_the_environment_are_known_to_runtime_alone() {
    let words = [
        "std::fs", "File::", "std::env", "env::var", "std::net", "memmap2",
    ];
    let finds_below = finds(&["kernels", "actors"], &words);
    assert!(finds_below.is_empty(), "{}", finds_below.join("\n"));
    // what the system says of itself in /proc and /sys, and memory without a file behind it
    let words = ["File::", "std::env", "env::var", "std::net", "Mmap::map("];
    let finds = finds(&["topology"], &words);
    assert!(finds.is_empty(), "{}", finds.join("\n"));
}
