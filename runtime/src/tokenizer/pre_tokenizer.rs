//! Pre-tokenizers: how byte-level BPE cuts a text into words before it merges inside them.

use tokenizers::utils::SysRegex;

use super::TokenizerError;

/// The longest run of white space: the regular expression engine gives up (and its binding
/// panics) after 10 million steps back, which only such runs can need.
const WHITESPACE_RUN_MAX: usize = 1 << 20;

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const ONE_DIGIT: &str = r"\p{N}";
const FALCON_SIGNS: &str = r"[\p{P}\$\+<=>\^~\|`]+";
const FALCON_DIGITS: &str = r"[0-9][0-9][0-9]";

/// A way to cut texts, and what goes with it.
#[derive(Debug)]
struct Kind {
    /// Names in `tokenizer.ggml.pre`, the usual one first.
    names: &'static [&'static str],
    /// Applied one after the other, each to the pieces of the one before; both what matches and
    /// what lies between is a piece.
    patterns: &'static [&'static str],
    /// A word that is a token is taken whole, whatever the merges say.
    ignore_merges: bool,
    /// Whether a text begins with the begin-of-text token when the file does not say.
    add_bos: bool,
}

/// Source: llama.cpp's table of the same names.
const KINDS: &[Kind] = &[
    Kind {
        names: &["gpt-2", "phi-2", "olmo"],
        patterns: &[GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["smollm", "starcoder", "refact", "codeshell"],
        patterns: &[ONE_DIGIT, GPT2],
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    Kind {
        names: &["qwen2", "deepseek-r1-qwen", "stablelm2"],
        patterns: &[QWEN2],
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["falcon"],
        patterns: &[FALCON_SIGNS, GPT2, FALCON_DIGITS],
        ignore_merges: false,
        add_bos: false,
    },
];

/// The known names, for messages.
pub(super) fn known_names() -> String {
    KINDS
        .iter()
        .flat_map(|kind| kind.names)
        .copied()
        .collect::<Vec<_>>()
        .join(", ")
}

/// Cuts texts into words.
#[derive(Debug)]
pub(super) struct PreTokenizer {
    kind: &'static Kind,
    regexes: Vec<SysRegex>,
}

impl PreTokenizer {
    /// The pre-tokenizer called `name`.
    ///
    /// # Errors
    /// An unknown or missing name.
    pub fn named(name: Option<&str>) -> Result<Self, TokenizerError> {
        let name = name.ok_or(TokenizerError::MissingPreTokenizer)?;
        let kind = KINDS
            .iter()
            .find(|kind| kind.names.contains(&name))
            .ok_or_else(|| TokenizerError::UnknownPreTokenizer {
                pre: name.to_owned(),
            })?;
        let regexes = kind
            .patterns
            .iter()
            .map(|pattern| SysRegex::new(pattern))
            .collect::<Result<_, _>>()
            .map_err(|error| TokenizerError::Library {
                message: error.to_string(),
            })?;
        Ok(Self { kind, regexes })
    }

    /// Whether a word that is a token is taken whole.
    pub fn ignores_merges(&self) -> bool {
        self.kind.ignore_merges
    }

    /// Whether a text begins with the begin-of-text token when the file does not say.
    pub fn adds_bos(&self) -> bool {
        self.kind.add_bos
    }

    /// Calls `each` with every word of `text`, in order; together they are the text.
    ///
    /// # Errors
    /// A run of white space over [`WHITESPACE_RUN_MAX`], or what `each` returns.
    pub fn words<'t>(
        &self,
        text: &'t str,
        each: &mut dyn FnMut(&'t str) -> Result<(), TokenizerError>,
    ) -> Result<(), TokenizerError> {
        if text.len() > WHITESPACE_RUN_MAX {
            check_whitespace(text)?;
        }
        cut(&self.regexes, text, each)
    }
}

/// Cuts `text` by the first of `regexes`, and each piece by the others.
fn cut<'t>(
    regexes: &[SysRegex],
    text: &'t str,
    each: &mut dyn FnMut(&'t str) -> Result<(), TokenizerError>,
) -> Result<(), TokenizerError> {
    let Some((regex, others)) = regexes.split_first() else {
        return each(text);
    };
    let mut end_before = 0;
    for (start, end) in regex.find_iter(text) {
        if end_before < start {
            cut(others, &text[end_before..start], each)?;
        }
        if start < end {
            cut(others, &text[start..end], each)?;
        }
        end_before = end;
    }
    if end_before < text.len() {
        cut(others, &text[end_before..], each)?;
    }
    Ok(())
}

fn check_whitespace(text: &str) -> Result<(), TokenizerError> {
    let (mut n_chars, mut start) = (0, 0);
    for (at, c) in text.char_indices().chain([(text.len(), 'x')]) {
        if c.is_whitespace() {
            if n_chars == 0 {
                start = at;
            }
            n_chars += 1;
            continue;
        }
        if n_chars > WHITESPACE_RUN_MAX {
            let limit = WHITESPACE_RUN_MAX;
            return Err(TokenizerError::WhitespaceRun {
                n_chars,
                at: start,
                limit,
            });
        }
        n_chars = 0;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words<'t>(name: &str, text: &'t str) -> Vec<&'t str> {
        let mut words = Vec::new();
        let pre = PreTokenizer::named(Some(name)).expect("a known name");
        pre.words(text, &mut |word| {
            words.push(word);
            Ok(())
        })
        .expect("cuts");
        words
    }

    #[test]
    fn cuts_as_the_models_were_trained() {
        let text = "I'M  here, 1234\n\n x";
        assert_eq!(
            words("gpt-2", text),
            ["I", "'", "M", " ", " here", ",", " 1234", "\n\n", " x"]
        );
        assert_eq!(
            words("smollm", text),
            [
                "I", "'", "M", " ", " here", ",", " ", "1", "2", "3", "4", "\n\n", " x"
            ]
        );
        assert_eq!(
            words("llama-bpe", text),
            ["I", "'M", " ", " here", ",", " ", "123", "4", "\n\n", " x"]
        );
        assert_eq!(
            words("qwen2", text),
            [
                "I", "'M", " ", " here", ",", " ", "1", "2", "3", "4", "\n\n", " x"
            ]
        );
        assert_eq!(
            words("falcon", text),
            [
                "I", "'", "M", " ", " here", ",", " ", "123", "4", "\n\n", " x"
            ]
        );
    }

    #[test]
    fn every_name_is_found_once_and_its_patterns_compile() {
        let names: Vec<_> = KINDS.iter().flat_map(|kind| kind.names).collect();
        for name in &names {
            assert!(PreTokenizer::named(Some(name)).is_ok());
            assert_eq!(names.iter().filter(|other| other == &name).count(), 1);
        }
    }

    #[test]
    fn long_white_space_is_an_error_and_not_a_panic() {
        for name in ["gpt-2", "llama-bpe"] {
            let pre = PreTokenizer::named(Some(name)).expect("a known name");
            let text = format!("a{}b", " ".repeat(WHITESPACE_RUN_MAX));
            pre.words(&text, &mut |_| Ok(()))
                .expect("the longest run that is allowed");
            let text = format!("a{}", " ".repeat(20_000_000));
            let error = pre.words(&text, &mut |_| Ok(())).expect_err("too long");
            assert!(
                error
                    .to_string()
                    .contains("20000000 white-space characters"),
                "{error}"
            );
        }
    }
}
