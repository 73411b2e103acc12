//! Tokenizers over small vocabularies made up here.

use proptest::prelude::*;

use super::*;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// The 256 byte characters, then tokens that merges make, then special tokens.
struct SmallBpe {
    tokens: Vec<String>,
    types: Vec<i32>,
    merges: Vec<&'static str>,
}

impl SmallBpe {
    fn new() -> Self {
        let mut tokens: Vec<String> = (0..=255)
            .map(|byte| byte_level::byte_to_char(byte).to_string())
            .collect();
        tokens.extend(
            [
                "he",
                "ll",
                "hell",
                "Ġhe",
                "<|im_start|>",
                "<|im_end|>",
                "<|im_end|>!",
            ]
            .map(String::from),
        );
        let mut types = vec![NORMAL; 260];
        types.extend([CONTROL, CONTROL, USER_DEFINED]);
        Self {
            tokens,
            types,
            merges: vec!["h e", "l l", "he ll", "Ġ he"],
        }
    }

    fn data(&self) -> VocabData<'_> {
        VocabData {
            model: "gpt2",
            pre: Some("gpt-2"),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            token_types: self.types.clone(),
            merges: self.merges.clone(),
            bos: Some(260),
            eos: Some(261),
            ..VocabData::default()
        }
    }
}

/// Tokens `<unk> <s> </s>`, the 256 bytes, then those of `pieces`.
struct SmallSpm {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
}

impl SmallSpm {
    fn new(pieces: &[(&str, f32)]) -> Self {
        let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
        tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
        tokens.extend(pieces.iter().map(|(text, _)| (*text).to_owned()));
        let mut scores = vec![0.0; 259];
        scores.extend(pieces.iter().map(|(_, score)| score));
        let mut types = vec![UNKNOWN, CONTROL, CONTROL];
        types.extend([BYTE; 256]);
        types.extend(vec![NORMAL; pieces.len()]);
        Self {
            tokens,
            scores,
            types,
        }
    }

    fn data(&self) -> VocabData<'_> {
        VocabData {
            model: "llama",
            tokens: self.tokens.iter().map(String::as_str).collect(),
            scores: self.scores.clone(),
            token_types: self.types.clone(),
            ..VocabData::default()
        }
    }
}

fn refused(data: &VocabData<'_>) -> String {
    Tokenizer::new(data).expect_err("refused").to_string()
}

fn pieces(tokenizer: &Tokenizer, text: &str, options: EncodeOptions) -> Vec<String> {
    let ids = tokenizer.encode(text, options).expect("encodes");
    ids.iter()
        .map(|&id| tokenizer.vocabulary().piece_text(id).into_owned())
        .collect()
}

#[test]
fn bpe_merges_by_rank() {
    let small = SmallBpe::new();
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    assert_eq!(
        pieces(&tokenizer, "hello he", EncodeOptions::TEXT),
        ["hell", "o", " he"]
    );
    assert_eq!(
        tokenizer
            .encode("", EncodeOptions::PROMPT)
            .expect("encodes"),
        Vec::<u32>::new()
    );
}

#[test]
fn control_tokens_are_text_unless_asked_for_and_user_defined_ones_never_are() {
    let small = SmallBpe::new();
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    let text = "<|im_start|>he<|im_end|>";
    let parsed = tokenizer
        .encode(text, EncodeOptions::TEMPLATE)
        .expect("encodes");
    assert_eq!(parsed, [260, 256, 261]);
    let plain = tokenizer
        .encode(text, EncodeOptions::TEXT)
        .expect("encodes");
    assert!(plain.len() > 10 && !plain.contains(&260));
    // the longest special token wins, wherever it stands
    let longest = tokenizer.encode("<|im_end|>!<|im_end|>", EncodeOptions::TEMPLATE);
    assert_eq!(longest.expect("encodes"), [262, 261]);
    assert_eq!(
        tokenizer
            .encode("<|im_end|>!", EncodeOptions::TEXT)
            .expect("encodes"),
        [262]
    );
}

#[test]
fn begin_and_end_of_text_are_added_as_the_file_says() {
    let small = SmallBpe::new();
    let add = VocabData {
        add_bos: Some(true),
        add_eos: Some(true),
        ..small.data()
    };
    let tokenizer = Tokenizer::new(&add).expect("valid");
    assert_eq!(
        tokenizer
            .encode("he", EncodeOptions::PROMPT)
            .expect("encodes"),
        [260, 256, 261]
    );
    assert_eq!(
        tokenizer
            .encode("he", EncodeOptions::TEMPLATE)
            .expect("encodes"),
        [256]
    );
    let silent = Tokenizer::new(&small.data()).expect("valid");
    assert_eq!(
        silent.encode("he", EncodeOptions::PROMPT).expect("encodes"),
        [256]
    );
    // Llama 3's pre-tokenizer adds the first one where the file is silent
    let llama3 = VocabData {
        pre: Some("llama-bpe"),
        ..small.data()
    };
    let tokenizer = Tokenizer::new(&llama3).expect("valid");
    assert_eq!(
        tokenizer
            .encode("he", EncodeOptions::PROMPT)
            .expect("encodes"),
        [260, 256]
    );
}

#[test]
fn decoding_leaves_control_tokens_out_and_keeps_all_bytes() {
    let small = SmallBpe::new();
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    assert_eq!(
        tokenizer.decode(&[260, 256, 261, 262, 9999]),
        "he<|im_end|>!"
    );
    let text = "naïve 🦙\0\n";
    let ids = tokenizer
        .encode(text, EncodeOptions::TEXT)
        .expect("encodes");
    assert_eq!(tokenizer.decode(&ids), text);
    assert_eq!(tokenizer.decode(&ids[..3]), "na\u{fffd}");
}

#[test]
fn a_stream_holds_characters_back_until_they_are_whole() {
    let small = SmallBpe::new();
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    let ids = tokenizer
        .encode("a🦙b", EncodeOptions::TEXT)
        .expect("encodes");
    let mut stream = tokenizer.stream();
    let parts: Vec<Option<String>> = ids
        .iter()
        .map(|&id| stream.push(id).map(str::to_owned))
        .collect();
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(parts, [some("a"), None, None, None, some("🦙"), some("b")]);
    assert_eq!(stream.flush(), None);
    stream.push(ids[1]);
    assert_eq!(stream.push(260), None, "control tokens are not shown");
    assert_eq!(stream.flush(), Some("\u{fffd}"));
    assert_eq!(
        tokenizer.stream().showing_control().push(260),
        Some("<|im_start|>")
    );
}

#[test]
fn ends_are_known_by_metadata_and_by_name() {
    let small = SmallBpe::new();
    let data = VocabData {
        eos: Some(5),
        eot: Some(6),
        ..small.data()
    };
    let tokenizer = Tokenizer::new(&data).expect("valid");
    assert_eq!(tokenizer.vocabulary().end_ids(), [5, 6, 261]);
    assert!(tokenizer.is_end(261) && !tokenizer.is_end(260));
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let small = SmallSpm::new(&[
        ("▁", -1.0),
        ("a", -2.0),
        ("b", -3.0),
        ("c", -3.5),
        ("ab", -5.0),
        ("bc", -4.0),
        ("▁a", -6.0),
    ]);
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    // "bc" has the higher score, so "ab" never comes about
    assert_eq!(pieces(&tokenizer, "abc", EncodeOptions::TEXT), [" a", "bc"]);
    let ids = tokenizer
        .encode("aé", EncodeOptions::PROMPT)
        .expect("encodes");
    // <s>, "▁a", then the bytes c3 a9
    assert_eq!(ids, [1, 265, 3 + 0xc3, 3 + 0xa9]);
    assert_eq!(tokenizer.decode(&ids), "aé");
}

#[test]
fn sentence_piece_breaks_ties_from_the_left() {
    // all scores equal, as with Llama 2's runs of spaces
    let small = SmallSpm::new(&[("a", 0.0), ("aa", -1.0), ("aaa", -1.0)]);
    let data = VocabData {
        add_space_prefix: Some(false),
        ..small.data()
    };
    let tokenizer = Tokenizer::new(&data).expect("valid");
    assert_eq!(
        pieces(&tokenizer, "aaaaa", EncodeOptions::TEXT),
        ["aaa", "aa"]
    );
}

#[test]
fn sentence_piece_puts_a_space_first_and_after_special_tokens() {
    let small = SmallSpm::new(&[("▁", -1.0), ("a", -2.0)]);
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    assert_eq!(
        pieces(&tokenizer, "a<s>a", EncodeOptions::TEMPLATE),
        [" ", "a", "<s>", " ", "a"]
    );
    assert_eq!(
        tokenizer.decode(
            &tokenizer
                .encode(" a", EncodeOptions::PROMPT)
                .expect("encodes")
        ),
        " a"
    );
    let without = VocabData {
        add_space_prefix: Some(false),
        ..small.data()
    };
    let tokenizer = Tokenizer::new(&without).expect("valid");
    assert_eq!(pieces(&tokenizer, "a", EncodeOptions::TEXT), ["a"]);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let small = SmallBpe::new();
    let message = refused(&VocabData {
        model: "bert",
        ..small.data()
    });
    assert!(
        message.starts_with("tokenizer.ggml.model is \"bert\", which is not supported"),
        "{message}"
    );
    let message = refused(&VocabData {
        pre: Some("tekken"),
        ..small.data()
    });
    for part in ["\"tekken\"", "gpt-2", "smollm", "llama-bpe", "qwen2"] {
        assert!(message.contains(part), "{message}");
    }
    let message = refused(&VocabData {
        pre: None,
        ..small.data()
    });
    assert!(
        message.starts_with("tokenizer.ggml.pre is missing"),
        "{message}"
    );
}

#[test]
fn data_that_contradicts_itself_is_refused() {
    let small = SmallBpe::new();
    let spm = SmallSpm::new(&[("a", 0.0)]);
    let mut twice = SmallBpe::new();
    twice.tokens[1] = twice.tokens[0].clone();
    for (data, part) in [
        (
            VocabData {
                tokens: vec![],
                ..small.data()
            },
            "tokenizer.ggml.tokens is missing",
        ),
        (
            VocabData {
                token_types: vec![1],
                ..small.data()
            },
            "tokenizer.ggml.token_type has 1 entries",
        ),
        (
            VocabData {
                merges: vec![],
                ..small.data()
            },
            "tokenizer.ggml.merges is missing",
        ),
        (
            VocabData {
                merges: vec!["he"],
                ..small.data()
            },
            "merges[0] is \"he\"",
        ),
        (
            VocabData {
                merges: vec!["h e", "x y"],
                ..small.data()
            },
            "merges[1] is \"x y\"",
        ),
        (
            VocabData {
                merges: vec!["he h"],
                ..small.data()
            },
            "merges[0]",
        ),
        (
            VocabData {
                merges: vec!["hell hellhellhellhell"],
                ..small.data()
            },
            "merges[0]",
        ),
        (
            VocabData {
                merges: vec![""],
                ..small.data()
            },
            "merges[0]",
        ),
        (
            VocabData {
                merges: vec!["é"],
                ..small.data()
            },
            "merges[0]",
        ),
        (
            VocabData {
                bos: Some(9999),
                ..small.data()
            },
            "tokenizer.ggml.bos_token_id is 9999",
        ),
        (
            VocabData {
                bos: None,
                add_bos: Some(true),
                ..small.data()
            },
            "bos_token_id is missing",
        ),
        (twice.data(), "twice, as token 0 and 1"),
        (
            VocabData {
                scores: vec![],
                ..spm.data()
            },
            "tokenizer.ggml.scores is missing",
        ),
        (
            VocabData {
                scores: vec![f32::NAN; 260],
                ..spm.data()
            },
            "scores[0] is not a number",
        ),
    ] {
        let message = refused(&data);
        assert!(message.contains(part), "{message}, wanted {part}");
    }
}

#[test]
fn merges_whose_right_part_is_no_token_are_refused() {
    let mut small = SmallBpe::new();
    small.tokens.push("abc".to_owned());
    small.types.push(NORMAL);
    let message = refused(&VocabData {
        merges: vec!["a bc"],
        ..small.data()
    });
    assert!(message.contains("merges[0] is \"a bc\""), "{message}");
}

#[test]
fn tokens_without_text_get_a_name() {
    let mut small = SmallBpe::new();
    small.tokens.extend([String::new(), String::new()]);
    small.types.extend([NORMAL, CONTROL]);
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    assert_eq!(tokenizer.vocabulary().piece(263), b"[EMPTY_263]");
    assert_eq!(pieces(&tokenizer, "he", EncodeOptions::TEMPLATE), ["he"]);
}

#[test]
fn the_command_prints_in_three_forms() {
    let small = SmallBpe::new();
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    let print = |ids: bool, json: bool, no_special: bool| {
        let args = TokenizeArgs {
            model: None,
            prompt: None,
            file: None,
            ids,
            json,
            no_special,
        };
        let mut out = Vec::new();
        run(&args, &tokenizer, "he\n<|im_end|>", &mut out).expect("writes");
        String::from_utf8(out).expect("text")
    };
    assert_eq!(
        print(true, false, false),
        "[256,10,261]\n".replace("10", &newline_id(&tokenizer))
    );
    assert!(print(false, false, false).starts_with("   256 -> \"he\"\n"));
    let json: serde_json::Value = serde_json::from_str(&print(false, true, false)).expect("JSON");
    assert_eq!(json[0], serde_json::json!({"id": 256, "text": "he"}));
    assert_eq!(json[2]["text"], "<|im_end|>");
    assert!(!print(true, false, true).contains("261"));
}

fn newline_id(tokenizer: &Tokenizer) -> String {
    tokenizer
        .encode("\n", EncodeOptions::TEXT)
        .expect("encodes")[0]
        .to_string()
}

#[test]
fn a_byte_without_a_token_is_left_out_and_its_neighbours_do_not_merge() {
    let mut small = SmallBpe::new();
    small.tokens[usize::from(b'x')] = "no longer x".to_owned();
    let tokenizer = Tokenizer::new(&small.data()).expect("valid");
    assert_eq!(pieces(&tokenizer, "hxe", EncodeOptions::TEXT), ["h", "e"]);
    assert_eq!(pieces(&tokenizer, "xxhex", EncodeOptions::TEXT), ["he"]);
    assert_eq!(
        pieces(&tokenizer, "x", EncodeOptions::TEXT),
        Vec::<String>::new()
    );
}

proptest! {
    #[test]
    fn any_text_comes_back_from_bytes(text in any::<String>()) {
        let small = SmallBpe::new();
        let tokenizer = Tokenizer::new(&small.data()).expect("valid");
        let ids = tokenizer.encode(&text, EncodeOptions::TEXT).expect("encodes");
        prop_assert_eq!(tokenizer.decode(&ids), text);
    }

    #[test]
    fn any_text_comes_back_from_sentence_piece(text in "[ab \u{0}-\u{10ffff}]{0,40}") {
        let small = SmallSpm::new(&[("▁", -1.0), ("a", -2.0), ("▁a", -3.0), ("ab", -4.0)]);
        let tokenizer = Tokenizer::new(&small.data()).expect("valid");
        let text = text.replace('▁', "_");
        let ids = tokenizer.encode(&text, EncodeOptions::PROMPT).expect("encodes");
        prop_assert_eq!(tokenizer.decode(&ids), text);
    }

    #[test]
    fn a_stream_of_any_ids_gives_what_decoding_them_gives(ids in prop::collection::vec(0u32..270, 0..40)) {
        let small = SmallBpe::new();
        let tokenizer = Tokenizer::new(&small.data()).expect("valid");
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for &id in &ids {
            text.extend(stream.push(id));
        }
        text.extend(stream.flush());
        prop_assert_eq!(text, tokenizer.decode(&ids));
    }
}
