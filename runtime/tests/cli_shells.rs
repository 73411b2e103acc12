//! Help, completions and manual pages.

mod common;

use common::running::{run, text_of, tiny};

#[test]
fn help_is_grouped_and_the_short_one_is_shorter() {
    let (short, long) = (text_of(&["-h"]), text_of(&["--help"]));
    for heading in [
        "Model and machine:",
        "Text:",
        "Choice of tokens:",
        "Chat:",
        "Timeline and log:",
    ] {
        assert_eq!(short.matches(heading).count(), 1, "{heading}: {short}");
        assert!(long.contains(heading));
    }
    assert!(short.len() < long.len());
    assert!(long.contains("Examples:") && long.contains("vicuna-orca"));
    assert!(!short.contains("--no-warmup") && long.contains("--no-warmup"));
    let options = short.split("\nOptions:\n").nth(1).unwrap();
    let headless = options.split("\n\n").next().unwrap();
    let flags: Vec<&str> = headless
        .lines()
        .filter_map(|line| line.split("--").nth(1))
        .collect();
    assert_eq!(flags.len(), 2, "flags without a heading: {headless}");
    assert!(flags[0].starts_with("help") && flags[1].starts_with("version"));
}

#[test]
fn every_shell_has_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = text_of(&["completions", shell]);
        for word in ["repeat-penalty", "perplexity", "chat-template"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    // values, of which one is a word of no flag
    let script = text_of(&["completions", "bash"]);
    assert!(
        script.contains("auto exact in-layer ahead both"),
        "--predictor"
    );
    let ran = run(&["completions", "tcsh"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(
        ran.err.contains("tcsh") && ran.err.contains("zsh"),
        "{}",
        ran.err
    );
}

#[test]
fn manual_pages_name_every_subcommand() {
    let page = text_of(&["man"]);
    assert!(
        page.contains(".TH pi-runtime 1") && page.contains("\\-\\-context\\-shift"),
        "{page}"
    );
    let folder = tiny();
    let pages = folder.name("man/man1");
    text_of(&["man", &pages]);
    let mut names: Vec<String> = std::fs::read_dir(&pages)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    for name in [
        "",
        "-bench",
        "-completions",
        "-inspect",
        "-man",
        "-pack",
        "-perplexity",
        "-tokenize",
    ] {
        let name = format!("pi-runtime{name}.1");
        assert!(names.contains(&name), "{name}: {names:?}");
    }
    let ran = run(&["man", &folder.name("m.gguf")]);
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(
        ran.err.contains("m.gguf: cannot write manual pages"),
        "{}",
        ran.err
    );
}
