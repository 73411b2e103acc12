//! What several test binaries need; not every binary uses all of it.
#![allow(dead_code)]

pub mod all_candidates;
pub mod engine;
pub mod gguf_parts;
pub mod gpu;
pub mod plain_twin;
pub mod reference;
pub mod running;
pub mod threads;
pub mod tiny_kinds;
pub mod tiny_model;
pub mod tiny_synth;
pub mod trace_file;
pub mod watch;

use std::path::PathBuf;

/// The workspace's root.
pub fn workspace() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The demo model, which the repository carries.
pub fn demo_model() -> PathBuf {
    workspace().join("models/smollm2-135m-reglu-q4_0.gguf")
}

/// The program under test, without colours or a user's folders in its environment.
pub fn program() -> assert_cmd::Command {
    let mut command = assert_cmd::Command::cargo_bin("pi-runtime").unwrap();
    command.env("NO_COLOR", "1").env_remove("RUST_LOG");
    // what was measured of this machine divides models by it
    let nothing = concat!(env!("CARGO_TARGET_TMPDIR"), "/nothing-measured");
    command.env("XDG_CACHE_HOME", nothing);
    command
}

/// Length of the difference of two lists, over that of what was expected.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "as many values");
    let pairs = found.iter().zip(expected);
    let error: f32 = pairs.map(|(a, b)| (a - b).powi(2)).sum();
    let size: f32 = expected.iter().map(|value| value * value).sum();
    (error / size).sqrt()
}
