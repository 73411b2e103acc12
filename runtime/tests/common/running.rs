//! Running the program on files in a folder of its own.

use std::path::PathBuf;

use serde_json::Value;

use super::program;
use super::tiny_model::TinyModel;

/// A text of 67 bytes.
pub const TEXT: &str = "The quick brown fox jumps over the lazy dog, and the dog wakes up. ";

/// What a finished program left.
pub struct Ran {
    pub code: i32,
    pub out: String,
    /// Without what it said of tests beside it, whose threads are bound to the same CPUs.
    pub err: String,
}

fn own_lines(err: &str) -> String {
    let lines = err.split_inclusive('\n');
    lines
        .filter(|line| !line.contains(" has bound threads to it too"))
        .collect()
}

pub fn run_with(args: &[&str], stdin: &str) -> Ran {
    let output = program().args(args).write_stdin(stdin).output().unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: own_lines(std::str::from_utf8(&output.stderr).unwrap()),
    }
}

pub fn run(args: &[&str]) -> Ran {
    run_with(args, "")
}

/// Runs what has to succeed, and gives what it printed.
pub fn text_of(args: &[&str]) -> String {
    let ran = run(args);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.err);
    ran.out
}

pub fn json_of(args: &[&str]) -> Value {
    serde_json::from_str(&text_of(args)).unwrap()
}

/// A folder with a model in it.
pub struct Folder(pub tempfile::TempDir);

impl Folder {
    pub fn with(model: &TinyModel) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        model.write(&folder.path("m.gguf"));
        folder
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    pub fn file(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.name(name)
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

/// The default tiny model, as `m.gguf`.
pub fn tiny() -> Folder {
    Folder::with(&TinyModel::default())
}
