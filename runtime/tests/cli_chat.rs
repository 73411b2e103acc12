//! A chat on pipes: turns, commands, templates, and what is refused.

mod common;

use common::demo_model;
use common::running::{Folder, Ran, TEXT, run, run_with};
use common::tiny_model::TinyModel;

fn with_template(template: &str) -> Folder {
    Folder::with(&TinyModel {
        keys: vec![("tokenizer.chat_template", template.into())],
        ..TinyModel::default()
    })
}

/// Every turn as `role:text|`, which a saved conversation can be checked against.
const PLAIN: &str =
    "{% for message in messages %}{{ message.role }}:{{ message.content }}|{% endfor %}";

/// A model with the plain template, and the flags of a chat with short answers.
fn plain_chat() -> (Folder, Vec<String>) {
    let folder = with_template(PLAIN);
    let flags = ["-cnv", "-n", "3", "--ignore-eos", "--temp", "0"];
    let mut args = vec!["-m".to_owned(), folder.name("m.gguf")];
    args.extend(flags.map(String::from));
    (folder, args)
}

fn chat(args: &[String], more: &[&str], stdin: &str) -> Ran {
    let args: Vec<&str> = args
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
        .collect();
    run_with(&args, stdin)
}

/// The messages that `/save` wrote, as (role, content).
fn saved(path: &str) -> Vec<(String, String)> {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let messages = json["messages"].as_array().unwrap();
    messages
        .iter()
        .map(|message| (text(&message["role"]), text(&message["content"])))
        .collect()
}

fn roles(messages: &[(String, String)]) -> Vec<&str> {
    messages.iter().map(|(role, _)| role.as_str()).collect()
}

#[test]
fn chat_answers_each_line_and_feeds_only_what_is_new() {
    let demo = demo_model();
    let args = [
        "-m",
        demo.to_str().unwrap(),
        "-cnv",
        "--temp",
        "0",
        "-n",
        "24",
    ];
    let one = run_with(&args, "Hello!\n");
    let two = run_with(&args, "Hello!\n\nWhat is the capital of Italy?\n");
    assert_eq!((one.code, two.code), (0, 0), "{}{}", one.err, two.err);
    assert!(
        one.out.trim().len() > 3 && !one.out.contains("im_end"),
        "{}",
        one.out
    );
    let second = two
        .out
        .strip_prefix(&one.out)
        .expect("the first answer is the same");
    assert!(second.contains("Rome"), "{second}");
    let n_prompt = |ran: &Ran| -> usize {
        let (_, rest) = ran.err.split_once("prompt ").unwrap();
        rest.split(' ').next().unwrap().parse().unwrap()
    };
    assert!(
        n_prompt(&two) < 2 * n_prompt(&one),
        "{}{}",
        one.err,
        two.err
    );
}

#[test]
fn chat_takes_a_system_prompt_and_reports_a_template_that_refuses() {
    let folder = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}\
         {{ messages[0].content }}",
    );
    let model = folder.name("m.gguf");
    let args = ["-m", &model, "-cnv", "-n", "3", "--ignore-eos"];
    assert_eq!(run_with(&args, "Hi\n").code, 0);
    let refused = run_with(&[&args[..], &["-sys", "Be brief."]].concat(), "Hi\n");
    assert_eq!((refused.code, refused.out.as_str()), (2, ""));
    assert!(refused.err.contains("no system prompt"), "{}", refused.err);
    let folder = with_template("{% for %}");
    let broken = run(&["-m", &folder.name("m.gguf"), "-cnv"]);
    assert_eq!(broken.code, 2);
    assert!(broken.err.contains("template:1"), "{}", broken.err);
}

/// Where memory lies is found out after loading and after each answer.
#[test]
fn weights_are_verified_after_each_answer() {
    if pi_topology::Machine::discover().unwrap().numas().is_empty() {
        eprintln!("skipped: the system does not number its memory");
        return;
    }
    let (folder, args) = plain_chat();
    let strict = folder.file("strict.toml", "[memory]\nstrict = true\n");
    let more = ["--topology", &strict, "--log-level", "info"];
    let ran = chat(&args, &more, "Hello\nHi\n");
    assert_eq!(ran.code, 0, "{}", ran.err);
    let verified = ran.err.matches("after decoding weights lie: ");
    assert_eq!(verified.count(), 2, "{}", ran.err);
}

#[test]
fn a_turn_that_does_not_fit_is_refused_and_the_chat_goes_on() {
    let (folder, args) = plain_chat();
    let file = folder.name("talk.json");
    let long = "x".repeat(60);
    let ran = chat(
        &args,
        &["-c", "70"],
        &format!("Hello\n{long}\nHi\n/save {file}\n"),
    );
    // somebody at a terminal would have read it; a script has to look at the exit code
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert_eq!(ran.err.matches("error:").count(), 1, "{}", ran.err);
    for word in ["holds 70", "/clear", "--context-shift", "-c"] {
        assert!(ran.err.contains(word), "{word}: {}", ran.err);
    }
    let messages = saved(&file);
    assert_eq!(roles(&messages), ["user", "assistant", "user", "assistant"]);
    assert_eq!(
        (messages[0].1.as_str(), messages[2].1.as_str()),
        ("Hello", "Hi")
    );
    let alone = chat(&args, &["-c", "24"], &format!("{TEXT}\n"));
    assert_eq!(alone.code, 2, "{}", alone.err);
    assert!(alone.err.contains("the prompt has"), "{}", alone.err);
}

#[test]
fn context_shift_leaves_the_oldest_turns_out() {
    let (folder, args) = plain_chat();
    let file = folder.name("talk.json");
    let long = "x".repeat(40);
    let stdin = format!("Hello\n{long}\n/save {file}\n");
    let more = ["-c", "70", "--context-shift", "-sys", "S"];
    let ran = chat(&args, &more, &stdin);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("left out"), "{}", ran.err);
    let messages = saved(&file);
    assert_eq!(roles(&messages), ["system", "user", "assistant"]);
    assert_eq!(
        (messages[0].1.as_str(), messages[1].1.as_str()),
        ("S", long.as_str())
    );
}

#[test]
fn commands_show_and_change_the_conversation() {
    let (folder, args) = plain_chat();
    let (first, second, third) = (folder.name("1"), folder.name("2"), folder.name("3"));
    let text = folder.file("text.txt", "from a file\n");
    let stdin = format!(
        "/stats\n/system\n/system Be brief.\n/system\nHello\n/stats\n/save {first}\n/regen\n/save {second}\n\
         /clear\n/read {text}\nWhat is it?\n/save {third}\n/help\n/exit\nnever read\n"
    );
    let ran = chat(&args, &[], &stdin);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(ran.err.matches("decode ").count(), 2, "{}", ran.err);
    for word in [
        "nothing has been computed",
        "no system prompt",
        "\nBe brief.\n",
        "/regen ",
    ] {
        assert!(ran.err.contains(word), "{word}: {}", ran.err);
    }
    let (one, two) = (saved(&first), saved(&second));
    assert_eq!(roles(&one), ["system", "user", "assistant"]);
    assert_eq!(one, two, "the likeliest answer again");
    let three = saved(&third);
    assert_eq!(roles(&three), ["system", "user", "assistant"]);
    assert_eq!(three[1].1, "from a file\n\nWhat is it?");
    assert_eq!(folder.names(), ["1", "2", "3", "m.gguf", "text.txt"]);
}

#[test]
fn a_saved_conversation_goes_on() {
    let (folder, args) = plain_chat();
    let (first, second) = (folder.name("1"), folder.name("2"));
    let whole = chat(&args, &[], &format!("Hello\nAgain\n/save {first}\n"));
    let half = chat(&args, &[], &format!("Hello\n/save {second}\n"));
    assert_eq!((whole.code, half.code), (0, 0));
    let rest = chat(
        &args,
        &[],
        &format!("/load {second}\nAgain\n/save {second}\n"),
    );
    assert_eq!(rest.code, 0, "{}", rest.err);
    assert_eq!(saved(&first), saved(&second));
    assert_eq!(whole.out, half.out + &rest.out);
}

#[test]
fn what_is_refused_is_named_and_the_chat_goes_on() {
    let (folder, args) = plain_chat();
    let file = folder.name("talk.json");
    let bad = folder.file("bad.json", "{}");
    let missing = folder.name("missing/x");
    let cases = [
        ("/hlep".to_owned(), "/help lists them"),
        ("/read".to_owned(), "name a file"),
        ("/regen".to_owned(), "nothing has been said"),
        (format!("/read {missing}"), "missing"),
        (format!("/load {bad}"), "bad.json"),
        (format!("/save {missing}"), "missing"),
    ];
    for (line, word) in cases {
        let ran = chat(&args, &[], &format!("{line}\n /slash\n/save {file}\n"));
        assert_eq!(ran.code, 2, "{line}: {}", ran.err);
        assert_eq!(ran.err.matches("error:").count(), 1, "{}", ran.err);
        assert!(ran.err.contains(word), "{line}: {}", ran.err);
        let messages = saved(&file);
        assert_eq!(roles(&messages), ["user", "assistant"]);
        assert_eq!(messages[0].1, " /slash");
    }
}

#[test]
fn a_line_that_ends_in_a_backslash_goes_on_in_the_next() {
    let (folder, args) = plain_chat();
    let closed = chat(&args, &[], "");
    assert_eq!(
        (closed.code, closed.out.as_str()),
        (0, ""),
        "{}",
        closed.err
    );
    let file = folder.name("talk.json");
    let ran = chat(&args, &[], &format!("one\\\ntwo\n/save {file}\nlast\\\n"));
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert_eq!(saved(&file)[0].1, "one\ntwo");
    // the input's end ends an entry too
    assert_eq!(ran.out.lines().count(), 2, "{}", ran.out);
}

#[test]
fn a_single_turn_reads_no_more_than_it_needs() {
    let (folder, args) = plain_chat();
    let given = chat(&args, &["-st", "-p", "Hello"], "never read\n");
    let read = chat(&args, &["-st"], "/help\nHello\nnever read\n");
    let prompt = folder.file("prompt.txt", "Hello\n");
    let file = chat(&args, &["-st", "-f", &prompt], "");
    assert_eq!(
        (given.code, read.code, file.code),
        (0, 0, 0),
        "{}",
        given.err
    );
    assert_eq!(given.out, read.out);
    assert_eq!(given.out, file.out);
    assert!(!given.out.is_empty());
    // and without it the chat goes on after the given message
    let on = chat(&args, &["-p", "Hello"], "Hello\n");
    assert!(on.out.starts_with(&given.out) && on.out.len() > given.out.len());
}

#[test]
fn templates_can_be_named_given_or_read() {
    let folder = Folder::with(&TinyModel::default());
    let model = folder.name("m.gguf");
    let chatml = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                  {{ '<|im_start|>assistant\n' }}";
    let path = folder.file("chatml.jinja", chatml);
    let args = [
        "-m",
        &model,
        "-cnv",
        "--temp",
        "0",
        "-n",
        "5",
        "--ignore-eos",
    ];
    let with = |more: &[&str]| run_with(&[&args[..], more].concat(), "Hi\n");
    let named = with(&["--chat-template", "chatml"]);
    assert_eq!(named.code, 0, "{}", named.err);
    assert_eq!(with(&["--chat-template", chatml]).out, named.out);
    assert_eq!(with(&["--chat-template-file", &path]).out, named.out);
    assert_ne!(with(&["--chat-template", "llama3"]).out, named.out);
    for (more, words) in [
        (["--chat-template", "chatmll"], ["chatmll", "chatml, "]),
        (
            ["--chat-template", "{% for %}"],
            ["--chat-template:", "template:1"],
        ),
        (
            ["--chat-template-file", "no-such"],
            ["no-such", "cannot read"],
        ),
    ] {
        let ran = with(&more);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""));
        for word in words {
            assert!(ran.err.contains(word), "{word}: {}", ran.err);
        }
    }
}

#[test]
fn a_reverse_prompt_gives_the_turn_back() {
    let (folder, args) = plain_chat();
    let (first, second) = (folder.name("1"), folder.name("2"));
    let free = chat(&args, &[], &format!("Hello\n/save {first}\n"));
    assert_eq!(free.code, 0, "{}", free.err);
    let answer = &saved(&first)[1].1;
    let end: String = answer.chars().skip(1).collect();
    let stopped = chat(&args, &["-r", &end], &format!("Hello\n/save {second}\n"));
    assert_eq!(stopped.code, 0, "{}", stopped.err);
    let kept: String = answer.chars().take(1).collect();
    assert_eq!(saved(&second)[1].1, kept);
    assert_eq!(stopped.out, format!("{kept}\n"));
}
