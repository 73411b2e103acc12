//! What an answer is made from and what ends it: prompts, limits, stop texts, batches and the context's end.

mod common;

use common::demo_model;
use common::running::{TEXT, json_of, run, text_of, tiny};

#[test]
fn a_prompt_can_come_from_a_file() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let with = |more: &[&str]| {
        let args = [
            "-m",
            &model,
            "-n",
            "4",
            "--temp",
            "0",
            "--ignore-eos",
            "--json",
        ];
        json_of(&[&args[..], more].concat())["logits_hash"].clone()
    };
    let file = folder.file("prompt.txt", "Hello\n\n");
    assert_eq!(
        with(&["-f", &file]),
        with(&["-p", "Hello\n"]),
        "one line end goes"
    );
    assert_eq!(with(&["-bf", &file]), with(&["-p", "Hello\n\n"]));
    let shown = text_of(&["-m", &model, "-f", &file, "-n", "0", "--display-prompt"]);
    assert_eq!(shown, "Hello\n");
    let shown = text_of(&[
        "-m",
        &model,
        "-p",
        "Hello",
        "-n",
        "2",
        "--display-prompt",
        "--no-warmup",
    ]);
    assert!(shown.starts_with("Hello") && shown.len() > 5, "{shown}");
}

#[test]
fn a_batch_of_any_size_gives_the_same_bits() {
    let folder = tiny();
    let demo = demo_model();
    for model in [folder.name("m.gguf"), demo.to_str().unwrap().to_owned()] {
        let hash = |size: &str| {
            let args = [
                "-m",
                &model,
                "-p",
                TEXT,
                "-n",
                "6",
                "--temp",
                "0",
                "--ignore-eos",
                "--json",
            ];
            json_of(&[&args[..], &["-b", size]].concat())["logits_hash"].clone()
        };
        let whole = hash("512");
        for size in ["1", "2", "7", "64", "2048"] {
            assert_eq!(hash(size), whole, "-b {size}");
        }
    }
}

#[test]
fn a_reverse_prompt_ends_the_answer_and_is_not_printed() {
    let demo = demo_model();
    let args = [
        "-m",
        demo.to_str().unwrap(),
        "-p",
        "The capital of France is",
        "-n",
        "16",
        "--temp",
        "0",
    ];
    let free = json_of(&[&args[..], &["--json"]].concat());
    let text = free["text"].as_str().unwrap();
    assert!(text.contains("Paris"), "{text}");
    // begins and ends within tokens
    let stopped = json_of(&[&args[..], &["--json", "-r", "never said", "-r", "aris."]].concat());
    assert_eq!(stopped["stop"], "word");
    assert_eq!(
        stopped["text"].as_str().unwrap(),
        text.split_once("aris.").unwrap().0
    );
    let n_tokens = |value: &serde_json::Value| value["tokens"].as_array().unwrap().len();
    assert!(n_tokens(&stopped) < n_tokens(&free));
    // what is held back comes out in the end
    let tail: String = text
        .chars()
        .rev()
        .take(4)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect();
    let held = json_of(&[&args[..], &["--json", "-r", &format!("{tail}\u{1}")]].concat());
    assert_eq!(held["text"], free["text"]);
    let streamed = text_of(&[&args[..], &["-r", "aris."]].concat());
    assert_eq!(
        streamed.trim_end(),
        stopped["text"].as_str().unwrap().trim_end()
    );
}

#[test]
fn with_context_shift_an_answer_outgrows_the_context() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = [
        "-m",
        &model,
        "-p",
        "Hello",
        "-c",
        "16",
        "--temp",
        "0",
        "--ignore-eos",
        "--json",
    ];
    let with = |more: &[&str]| json_of(&[&args[..], more].concat());
    let n_tokens = |value: &serde_json::Value| value["tokens"].as_array().unwrap().len();
    let plain = with(&[]);
    assert_eq!((&plain["stop"], n_tokens(&plain)), (&"context".into(), 12));
    let shifted = with(&["--context-shift", "-n", "60"]);
    assert_eq!(
        (&shifted["stop"], n_tokens(&shifted)),
        (&"limit".into(), 60)
    );
    assert!(shifted["timings"]["refed_n"].as_u64().unwrap() > 0);
    assert_eq!(plain["timings"]["refed_n"], 0);
    assert_eq!(
        with(&["--context-shift", "-n", "60"])["logits_hash"],
        shifted["logits_hash"]
    );
    let kept = with(&["--context-shift", "--keep", "5", "-n", "60"]);
    assert_ne!(kept["logits_hash"], shifted["logits_hash"]);
    assert_eq!(
        with(&["--context-shift", "--keep", "-1", "-n", "60"])["logits_hash"],
        kept["logits_hash"]
    );
    for until_full in [
        &["-n", "-2"][..],
        &["-n", "-2", "--context-shift"],
        &["--context-shift", "--no-context-shift"],
    ] {
        let full = with(until_full);
        assert_eq!(
            (&full["stop"], n_tokens(&full)),
            (&"context".into(), 12),
            "{until_full:?}"
        );
        assert_eq!(full["logits_hash"], plain["logits_hash"]);
    }
}

/// Logits of a tiny random model are far below these biases, so that what is chosen can be told by hand.
#[test]
fn biases_and_penalties_reach_the_sampler() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let tokens = |more: &[&str]| {
        let args = [
            "-m", &model, "-p", "Hello", "-n", "4", "--temp", "0", "-l", "65+1000", "-l", "66+900",
            "--json",
        ];
        let json = json_of(&[&args[..], more].concat());
        let ids = json["tokens"].as_array().unwrap().iter();
        ids.map(|id| id.as_u64().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(tokens(&[]), [65; 4]);
    assert_eq!(tokens(&["--logit-bias", "65-inf"]), [66; 4]);
    // 1000, then 500 for good, against 900, then 400
    assert_eq!(tokens(&["--presence-penalty", "500"]), [65, 66, 65, 65]);
    assert_eq!(
        tokens(&["--presence-penalty", "500", "--repeat-last-n", "-1"]),
        [65, 66, 65, 65]
    );
    assert_eq!(
        tokens(&["--presence-penalty", "500", "--repeat-last-n", "1"]),
        [65, 66, 65, 66]
    );
    assert_eq!(
        tokens(&["--presence-penalty", "500", "--repeat-last-n", "0"]),
        [65; 4]
    );
    // 1000, 500, 0 against 900, 400, -100
    assert_eq!(tokens(&["--frequency-penalty", "500"]), [65, 66, 65, 66]);
    // 1000, then 250 for good, against 900, then 225
    assert_eq!(tokens(&["--repeat-penalty", "4"]), [65, 66, 65, 65]);
}

#[test]
fn truncation_and_temperature_reach_the_sampler() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let tokens = |more: &[&str]| {
        let args = [
            "-m",
            &model,
            "-p",
            "Hello",
            "-n",
            "30",
            "--ignore-eos",
            "--seed",
            "1",
            "--json",
        ];
        json_of(&[&args[..], more].concat())["tokens"].clone()
    };
    let greedy = tokens(&["--temp", "0"]);
    let all = [
        "--temperature",
        "1.5",
        "--top-k",
        "0",
        "--top-p",
        "1",
        "--min-p",
        "0",
    ];
    let free = tokens(&all);
    assert_ne!(free, greedy);
    for narrow in [["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]] {
        // the last of a flag's values counts
        let mut args = all.to_vec();
        let at = args.iter().position(|arg| *arg == narrow[0]).unwrap();
        args[at + 1] = narrow[1];
        assert_eq!(tokens(&args), greedy, "{narrow:?}");
    }
    let typical = tokens(&[&all[..], &["--typical", "0.2"]].concat());
    assert_ne!(typical, free);
    assert_eq!(
        tokens(&[&all[..], &["--typical-p", "0.2"]].concat()),
        typical
    );
}

#[test]
fn values_out_of_range_give_one_message_and_exit_code_2() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let cases: [(&[&str], &[&str]); 31] = [
        (&["-n", "-3"], &["-3", "--predict"]),
        (&["-n", "1.5"], &["1.5", "--predict"]),
        (&["-c", "-1"], &["-1"]),
        (&["-b", "0"], &["0", "--batch-size", "1..=65535"]),
        (&["-b", "65536"], &["65536", "1..=65535"]),
        (&["-ub", "many"], &["many", "--batch-size"]),
        (&["--keep", "-2"], &["-2", "--keep"]),
        (&["--top-k", "-2"], &["--top-k -2"]),
        (&["--top-k", "x"], &["--top-k", "x"]),
        (&["--top-p", "1.1"], &["--top-p 1.1", "from 0 to 1"]),
        (&["--top-p", "nan"], &["--top-p NaN"]),
        (&["--min-p", "-0.1"], &["--min-p -0.1"]),
        (&["--min-p", "inf"], &["--min-p inf"]),
        (&["--typical", "2"], &["--typical 2"]),
        (&["--temp", "nan"], &["--temp NaN"]),
        (&["--temp", "inf"], &["--temp inf"]),
        (
            &["--repeat-penalty", "0"],
            &["--repeat-penalty 0", "positive"],
        ),
        (&["--repeat-penalty", "-1"], &["--repeat-penalty -1"]),
        (&["--repeat-last-n", "-2"], &["--repeat-last-n -2", "-1"]),
        (
            &["--presence-penalty", "inf"],
            &["--presence-penalty inf", "finite"],
        ),
        (
            &["--frequency-penalty", "nan"],
            &["--frequency-penalty NaN"],
        ),
        (&["-l", "5"], &["--logit-bias", "15043+1.5"]),
        (&["-l", "1*1"], &["1*1", "15043+1.5"]),
        (&["-l", "259+1"], &["token 259", "0 to 258"]),
        (&["-s", "-2"], &["--seed -2"]),
        (&["-s", "4294967296"], &["--seed 4294967296"]),
        (&["-r", ""], &["--reverse-prompt"]),
        (&["-f", "x"], &["--file", "--prompt"]),
        (&["-sys", "x"], &["--conversation"]),
        (&["--chat-template", "chatml"], &["--conversation"]),
        (&["-st"], &["--conversation"]),
    ];
    for (flags, words) in cases {
        let ran = run(&[&["-m", &model, "-p", "x"], flags].concat());
        assert_eq!(
            (ran.code, ran.out.as_str()),
            (2, ""),
            "{flags:?}: {}",
            ran.err
        );
        assert_eq!(
            ran.err.matches("error:").count(),
            1,
            "{flags:?}: {}",
            ran.err
        );
        assert!(!ran.err.contains("panicked"), "{flags:?}: {}", ran.err);
        for word in words {
            assert!(
                ran.err.contains(word),
                "{flags:?}: {word:?} is not in: {}",
                ran.err
            );
        }
    }
}

#[test]
fn escape_sequences_are_read_unless_they_shall_not_be() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let shown = |args: &[&str]| {
        let always = ["-m", &model, "-n", "1", "--temp", "0", "--display-prompt"];
        text_of(&[&always[..], args].concat())
    };
    assert!(shown(&["-p", r"a\n\x41\q"]).starts_with("a\nA\\q"));
    assert!(shown(&["-p", r"a\nb", "--no-escape"]).starts_with(r"a\nb"));
    assert!(shown(&["-p", r"a\nb", "--no-escape", "-e"]).starts_with("a\nb"));
}
