//! A chat at a terminal, over a pseudo-terminal: prompt, editing, history, Ctrl-C and Ctrl-D.
#![cfg(unix)]

mod common;

use std::path::Path;

use common::demo_model;
use common::running::Folder;
use common::tiny_model::TinyModel;
use rexpect::process::WaitStatus;
use rexpect::session::{PtySession, spawn_command};

const UP: &str = "\x1b[A";

/// A model that answers with three tokens.
fn chatty() -> Folder {
    let template = "{% for message in messages %}{{ message.content }}|{% endfor %}";
    Folder::with(&TinyModel {
        keys: vec![("tokenizer.chat_template", template.into())],
        ..TinyModel::default()
    })
}

/// The program at a terminal, with its state in `folder`. It waits without a limit.
fn start(folder: &Folder, model: &Path, flags: &[&str]) -> PtySession {
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("pi-runtime"));
    command
        .arg("-m")
        .arg(model)
        .args(["-cnv", "--temp", "0"])
        .args(flags)
        .env("XDG_STATE_HOME", folder.path("state"))
        .env("TERM", "xterm")
        .env("NO_COLOR", "1")
        .env_remove("RUST_LOG");
    spawn_command(command, None).unwrap()
}

fn short(folder: &Folder) -> PtySession {
    start(folder, &folder.path("m.gguf"), &["-n", "3", "--ignore-eos"])
}

fn press(session: &mut PtySession, keys: &str) {
    session.send(keys).unwrap();
    session.flush().unwrap();
}

/// The exit code, after all that is printed is read.
fn exit_code(mut session: PtySession) -> i32 {
    session.exp_eof().unwrap();
    match session.process().wait().unwrap() {
        WaitStatus::Exited(_, code) => code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn lines_are_edited_and_history_is_kept_between_chats() {
    let folder = chatty();
    let mut session = short(&folder);
    let before = session.exp_string("> ").unwrap();
    // a bar is drawn only where loading takes long, and is wiped out before the prompt
    if let Some((_, after)) = before.rsplit_once("loading ") {
        assert!(after.contains("\x1b[2K"), "{before:?}");
    }
    // the cursor goes back over "lp" to put an e before it
    press(&mut session, "/hlp\x1b[D\x1b[De\r");
    session.exp_string("/regen").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "/stats\r");
    session.exp_string("nothing has been computed").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, &format!("{UP}{UP}\r"));
    session.exp_string("/regen").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "\x04");
    assert_eq!(exit_code(session), 0);
    let history = std::fs::read_to_string(folder.path("state/pi-runtime/history")).unwrap();
    assert!(history.contains("/help\n/stats\n"), "{history}");

    let mut session = short(&folder);
    session.exp_string("> ").unwrap();
    press(&mut session, &format!("{UP}{UP}\r"));
    session.exp_string("nothing has been computed").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "/exit\r");
    assert_eq!(exit_code(session), 0);
}

#[test]
fn a_refused_turn_is_told_and_no_failure_at_a_terminal() {
    let folder = chatty();
    let mut session = short(&folder);
    session.exp_string("> ").unwrap();
    press(&mut session, "/nonsense\r");
    session.exp_string("error: /nonsense").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "one\\\r");
    session.exp_string(". ").unwrap();
    press(&mut session, "two\r");
    session.exp_string("> ").unwrap();
    press(&mut session, "/save ");
    press(&mut session, &folder.name("talk.json"));
    press(&mut session, "\r");
    session.exp_string("wrote ").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "\x04");
    assert_eq!(exit_code(session), 0);
    let talk = std::fs::read_to_string(folder.path("talk.json")).unwrap();
    assert!(talk.contains("one\\ntwo"), "{talk}");
}

#[test]
fn ctrl_c_clears_a_line_and_ends_the_chat_at_an_empty_one() {
    let folder = chatty();
    let mut session = short(&folder);
    session.exp_string("> ").unwrap();
    press(&mut session, "/nonsense\x03");
    press(&mut session, "/stats\r");
    session.exp_string("nothing has been computed").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "\x03");
    assert_eq!(exit_code(session), 130);
}

#[test]
fn ctrl_c_ends_the_answer_and_the_chat_goes_on() {
    let folder = chatty();
    let mut session = start(&folder, &demo_model(), &["--ignore-eos"]);
    session.exp_string("> ").unwrap();
    press(&mut session, "Count from one to a thousand.\r");
    // the line's own echo has ended, and something of the answer is there
    session.exp_string("thousand.").unwrap();
    session.exp_string("\n").unwrap();
    session.exp_regex("[a-z0-9]+ [a-z0-9]+ [a-z0-9]+ ").unwrap();
    session.exp_regex("[a-z0-9]").unwrap();
    session.send_control('c').unwrap();
    session.exp_string("interrupted").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "/stats\r");
    session.exp_string("decode ").unwrap();
    session.exp_string("> ").unwrap();
    press(&mut session, "\x04");
    assert_eq!(exit_code(session), 0);
}

#[test]
fn a_dumb_terminal_gets_plain_lines() {
    let folder = chatty();
    let mut command = std::process::Command::new(assert_cmd::cargo::cargo_bin!("pi-runtime"));
    command
        .args(["-m", &folder.name("m.gguf"), "-cnv", "-n", "3"])
        .env("XDG_STATE_HOME", folder.path("state"))
        .env("TERM", "dumb")
        .env_remove("NO_COLOR")
        .env_remove("RUST_LOG");
    let mut session = spawn_command(command, None).unwrap();
    session.exp_string("> ").unwrap();
    session.send_line("/stats").unwrap();
    let mut seen = session.exp_string("nothing has been computed").unwrap();
    seen += &session.exp_string("> ").unwrap();
    press(&mut session, "\x04");
    seen += &session.exp_eof().unwrap();
    assert!(!seen.contains('\x1b'), "{seen:?}");
}
