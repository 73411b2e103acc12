//! What a file says about its tokenizer.

use super::TokenizerError;
use crate::gguf::{GgufError, Metadata, ValueType};

/// The `tokenizer.*` metadata of a file, borrowed from it.
///
/// Lists that are absent are empty.
#[derive(Debug, Clone, Default)]
pub struct VocabData<'a> {
    /// `tokenizer.ggml.model`: `gpt2` or `llama`.
    pub model: &'a str,
    /// `tokenizer.ggml.pre`: how byte-level BPE cuts a text into words.
    pub pre: Option<&'a str>,
    /// `tokenizer.ggml.tokens`: text by id, `[n_vocab]`.
    pub tokens: Vec<&'a str>,
    /// `tokenizer.ggml.scores`: SentencePiece's log-probabilities, `[n_vocab]`.
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.token_type`: see [`super::TokenKind`], `[n_vocab]`.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`: pairs of byte-level BPE, in the order of their ranks.
    pub merges: Vec<&'a str>,
    /// `tokenizer.ggml.bos_token_id`: begin of text.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`: end of text.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: end of turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.eom_token_id`: end of message.
    pub eom: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`.
    pub add_eos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`: SentencePiece puts a space before a text.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<&'a str>,
}

impl<'a> VocabData<'a> {
    /// Reads the `tokenizer.*` keys of a GGUF file.
    ///
    /// # Errors
    /// No model or no tokens, a value of the wrong type, or text that is not UTF-8.
    pub fn from_metadata(metadata: &'a Metadata) -> Result<Self, GgufError> {
        let strs = |key: &str| match metadata.get_array(key)? {
            Some(array) => array.to_strs(),
            None => Ok(Vec::new()),
        };
        Ok(Self {
            model: metadata.require_str("tokenizer.ggml.model")?,
            pre: metadata.get_str("tokenizer.ggml.pre")?,
            tokens: metadata.require_array("tokenizer.ggml.tokens")?.to_strs()?,
            scores: read_scores(metadata)?,
            token_types: match metadata.get_array("tokenizer.ggml.token_type")? {
                Some(array) => array.to_i32s()?,
                None => Vec::new(),
            },
            merges: strs("tokenizer.ggml.merges")?,
            bos: metadata.get_u32("tokenizer.ggml.bos_token_id")?,
            eos: metadata.get_u32("tokenizer.ggml.eos_token_id")?,
            eot: metadata.get_u32("tokenizer.ggml.eot_token_id")?,
            eom: metadata.get_u32("tokenizer.ggml.eom_token_id")?,
            unk: metadata.get_u32("tokenizer.ggml.unknown_token_id")?,
            add_bos: metadata.get_bool("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.get_bool("tokenizer.ggml.add_eos_token")?,
            add_space_prefix: metadata.get_bool("tokenizer.ggml.add_space_prefix")?,
            chat_template: metadata.get_str("tokenizer.chat_template")?,
        })
    }

    /// Checks lengths and ids against the number of tokens.
    pub(super) fn check(&self) -> Result<(), TokenizerError> {
        let n_vocab = self.tokens.len();
        if n_vocab == 0 {
            return Err(TokenizerError::MissingList { key: "tokens" });
        }
        let n_bytes: usize = self.tokens.iter().map(|token| token.len()).sum();
        // a token without text is shown by its number, which takes a few bytes more
        if n_vocab >= 1 << 31 || n_bytes + n_vocab * 24 > u32::MAX as usize {
            return Err(TokenizerError::TooLarge);
        }
        for (key, found) in [
            ("scores", self.scores.len()),
            ("token_type", self.token_types.len()),
        ] {
            if found != 0 && found != n_vocab {
                return Err(TokenizerError::WrongLength {
                    key,
                    found,
                    n_vocab,
                });
            }
        }
        for (key, id) in [
            ("bos_token_id", self.bos),
            ("eos_token_id", self.eos),
            ("eot_token_id", self.eot),
            ("eom_token_id", self.eom),
            ("unknown_token_id", self.unk),
        ] {
            if let Some(id) = id.filter(|&id| id as usize >= n_vocab) {
                return Err(TokenizerError::SpecialOutside { key, id, n_vocab });
            }
        }
        Ok(())
    }
}

/// The scores; some converters write them as whole numbers.
fn read_scores(metadata: &Metadata) -> Result<Vec<f32>, GgufError> {
    match metadata.get_array("tokenizer.ggml.scores")? {
        None => Ok(Vec::new()),
        Some(array) if array.element_type() == ValueType::I32 => Ok(array
            .to_i32s()?
            .into_iter()
            .map(|score| score as f32)
            .collect()),
        Some(array) => array.to_f32s(),
    }
}
