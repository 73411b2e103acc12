//! What is no model, given as one: every command says what it is and what to do.

mod common;

use std::path::Path;

use common::running::{Folder, run, tiny};

/// Commands that read a model, `FILE` standing for it.
const COMMANDS: [&[&str]; 4] = [
    &["-m", "FILE", "-p", "Hi", "-n", "1"],
    &["-m", "FILE", "-cnv"],
    &["inspect", "FILE"],
    &["pack", "FILE", "-o", "OUT"],
];

fn assert_refused(folder: &Folder, file: &str, said: &[&str]) {
    let before = folder.names();
    for command in COMMANDS {
        let output = folder.name("out.gguf");
        let args: Vec<&str> = command
            .iter()
            .map(|&arg| match arg {
                "FILE" => file,
                "OUT" => &output,
                arg => arg,
            })
            .collect();
        let ran = run(&args);
        assert_eq!((ran.code, &*ran.out), (2, ""), "{args:?}: {}", ran.err);
        let errors: Vec<&str> =
            (ran.err.lines().filter(|line| line.starts_with("error: "))).collect();
        let [error] = errors[..] else {
            panic!("{args:?}: {}", ran.err)
        };
        for part in said.iter().chain([&file]) {
            assert!(error.contains(part), "{args:?}: {error}");
        }
        assert_eq!(folder.names(), before, "{args:?}");
    }
}

#[test]
fn directories_pipes_and_devices() {
    let folder = tiny();
    std::fs::create_dir(folder.path("folder")).unwrap();
    assert_refused(
        &folder,
        &folder.name("folder"),
        &["a directory", "name the file itself"],
    );
    #[cfg(unix)]
    {
        let pipe = folder.path("pipe.gguf");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        if made.is_ok_and(|status| status.success()) {
            assert_refused(
                &folder,
                &folder.name("pipe.gguf"),
                &["a pipe, socket or device"],
            );
        } else {
            println!("skipped: no mkfifo");
        }
        if Path::new("/dev/zero").exists() {
            assert_refused(&folder, "/dev/zero", &["a pipe, socket or device"]);
        }
    }
    assert_refused(
        &folder,
        &folder.name("none.gguf"),
        &["no such file", "check the path"],
    );
}

#[test]
fn files_of_other_kinds() {
    let folder = tiny();
    let safetensors = [&16u64.to_le_bytes()[..], br#"{"__metadata__":{}}"#].concat();
    let contents: [(&str, &[u8], &[&str]); 5] = [
        ("empty.gguf", b"", &["the file is empty", "again"]),
        ("notes.txt", b"Some notes.\n", &["a text file", "GGUF"]),
        (
            "m.safetensors",
            &safetensors,
            &["a safetensors file", "convert"],
        ),
        (
            "zeros.gguf",
            &[0; 4096],
            &["download has not finished", "again"],
        ),
        ("config.json", b"{\"a\": 1}", &["a JSON text"]),
    ];
    for (name, content, said) in contents {
        std::fs::write(folder.path(name), content).unwrap();
        assert_refused(&folder, &folder.name(name), said);
    }
}

#[test]
fn downloads_under_way() {
    let folder = tiny();
    let whole = std::fs::read(folder.path("m.gguf")).unwrap();
    for (name, length) in [
        ("m.gguf.part", whole.len() - 10),
        ("m.gguf.crdownload", 2000),
        ("m.gguf.incomplete", 3),
    ] {
        std::fs::write(folder.path(name), &whole[..length]).unwrap();
        let said = ["download", "has not finished", "wait for it"];
        assert_refused(&folder, &folder.name(name), &said);
    }
    // a whole file is taken, whatever its name
    std::fs::write(folder.path("whole.part"), &whole).unwrap();
    let ran = run(&["inspect", &folder.name("whole.part")]);
    assert_eq!(ran.code, 0, "{}", ran.err);
}

#[test]
fn an_output_that_cannot_be_is_refused_before_the_work() {
    let folder = Folder::with(&common::tiny_model::TinyModel {
        neuron_major: false,
        ..Default::default()
    });
    let (model, output) = (folder.name("m.gguf"), folder.name("none/packed.gguf"));
    let text = folder.file("text.txt", &common::running::TEXT.repeat(40));
    let ran = run(&["pack", &model, "-o", &output, "-f", &text]);
    assert_eq!((ran.code, &*ran.out), (2, ""), "{}", ran.err);
    assert!(ran.err.contains("none/packed.gguf"), "{}", ran.err);
    assert!(
        !ran.err.contains("chunks"),
        "nothing was measured: {}",
        ran.err
    );
    assert_eq!(folder.names(), ["m.gguf", "text.txt"]);
}

#[test]
fn a_chat_whose_input_is_closed_ends_normally() {
    let template = "{% for m in messages %}{{ m.content }}{% endfor %}";
    let folder = Folder::with(&common::tiny_model::TinyModel {
        keys: vec![("tokenizer.chat_template", template.into())],
        ..Default::default()
    });
    let model = folder.name("m.gguf");
    let ran = run(&["-m", &model, "-cnv"]);
    assert_eq!((ran.code, &*ran.out), (0, ""), "{}", ran.err);
    #[cfg(unix)]
    {
        let program = env!("CARGO_BIN_EXE_pi-runtime");
        let closed = std::process::Command::new("sh")
            .args(["-c", "exec \"$0\" -m \"$1\" -cnv <&-", program, &model])
            .status()
            .unwrap();
        assert_eq!(closed.code(), Some(0));
    }
}

/// The template is the model file's: it must not take the machine down.
#[test]
fn a_template_that_explodes_ends_the_chat_with_its_name() {
    let template = "{% set ns = namespace(s='xy') %}{% for i in range(60) %}\
                    {% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
    let folder = Folder::with(&common::tiny_model::TinyModel {
        keys: vec![("tokenizer.chat_template", template.into())],
        ..Default::default()
    });
    let ran = common::running::run_with(&["-m", &folder.name("m.gguf"), "-cnv"], "Hi\n");
    assert_eq!((ran.code, &*ran.out), (2, ""), "{}", ran.err);
    for part in ["m.gguf", "the chat template wants more than 64 MiB"] {
        assert!(ran.err.contains(part), "{}", ran.err);
    }
}

#[cfg(unix)]
#[test]
fn a_text_without_end_is_refused() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let ran = run(&["-m", &model, "-f", "/dev/zero"]);
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(
        ran.err.contains("/dev/zero: the text has more than"),
        "{}",
        ran.err
    );
}
