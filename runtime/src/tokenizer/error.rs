//! Why a tokenizer could not be built or a text not be encoded.

use super::pre_tokenizer;
use crate::gguf::GgufError;

/// What is wrong with a file's tokenizer metadata, or with a text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key that is missing or of another type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// `tokenizer.ggml.model` names something else than the known kinds.
    #[error(
        "tokenizer.ggml.model is {model:?}, which is not supported; known are \"gpt2\" (byte-level \
         BPE) and \"llama\" (SentencePiece): use a model with one of these"
    )]
    UnknownModel {
        /// The name in the file.
        model: String,
    },
    /// `tokenizer.ggml.pre` names a pre-tokenizer that is not known.
    #[error(
        "tokenizer.ggml.pre is {pre:?}, a pre-tokenizer that is not supported; known are {}: \
         another one would give wrong token ids, so use a model with one of these",
        pre_tokenizer::known_names()
    )]
    UnknownPreTokenizer {
        /// The name in the file.
        pre: String,
    },
    /// A byte-level BPE vocabulary without `tokenizer.ggml.pre`.
    #[error(
        "tokenizer.ggml.pre is missing, and guessing it would give wrong token ids; known are {}: \
         convert the model again with a current llama.cpp, which writes the key",
        pre_tokenizer::known_names()
    )]
    MissingPreTokenizer,
    /// A list that must be there is empty or missing.
    #[error(
        "tokenizer.ggml.{key} is missing or empty; the file is damaged or was converted \
         without its tokenizer: convert or download it again"
    )]
    MissingList {
        /// The key's last part.
        key: &'static str,
    },
    /// A list that must be as long as the tokens is not.
    #[error(
        "tokenizer.ggml.{key} has {found} entries, but there are {n_vocab} tokens; the \
         file is damaged: convert or download it again"
    )]
    WrongLength {
        /// The key's last part.
        key: &'static str,
        /// Its length.
        found: usize,
        /// Tokens in the vocabulary.
        n_vocab: usize,
    },
    /// More tokens, or longer ones, than ids and offsets of 32 bits can name.
    #[error(
        "tokenizer.ggml.tokens holds more than 4 GiB of text or 2^31 tokens; the file is \
         damaged: convert or download it again"
    )]
    TooLarge,
    /// Two tokens with the same text.
    #[error(
        "tokenizer.ggml.tokens has {text:?} twice, as token {first} and {second}; the \
         file is damaged: convert or download it again"
    )]
    DuplicateToken {
        /// The text.
        text: String,
        /// Its first id.
        first: u32,
        /// Its second id.
        second: u32,
    },
    /// A special token's id is not in the vocabulary.
    #[error(
        "tokenizer.ggml.{key} is {id}, but there are {n_vocab} tokens; the file is \
         damaged: convert or download it again"
    )]
    SpecialOutside {
        /// The key's last part.
        key: &'static str,
        /// The id in the file.
        id: u32,
        /// Tokens in the vocabulary.
        n_vocab: usize,
    },
    /// A token is to be added to every text, but the file does not say which.
    #[error(
        "the tokenizer adds a token to every text (tokenizer.ggml.{switch}), but \
         tokenizer.ggml.{key} is missing: convert the model again"
    )]
    MissingSpecial {
        /// The key that asks for it.
        switch: &'static str,
        /// The key that would name it.
        key: &'static str,
    },
    /// A merge that is not two tokens that join into a third.
    #[error(
        "tokenizer.ggml.merges[{index}] is {merge:?}, which does not join two tokens \
         into a third; the file is damaged: convert or download it again"
    )]
    BadMerge {
        /// Its place in the list.
        index: usize,
        /// The merge as in the file.
        merge: String,
    },
    /// A score that is not a number.
    #[error(
        "tokenizer.ggml.scores[{index}] is not a number; the file is damaged: convert or \
         download it again"
    )]
    BadScore {
        /// Its place in the list.
        index: usize,
    },
    /// A run of white space that the regular expressions cannot take.
    #[error(
        "the text has {n_chars} white-space characters in a row at byte {at}, more than \
         the {limit} that the pre-tokenizer can take: remove some"
    )]
    WhitespaceRun {
        /// Length of the run in characters.
        n_chars: usize,
        /// Where it starts, in bytes of its fragment.
        at: usize,
        /// The longest that is allowed.
        limit: usize,
    },
    /// The `tokenizers` crate refused.
    #[error(
        "the tokenizer could not be built or run: {message}; the file is probably \
         damaged: convert or download it again"
    )]
    Library {
        /// What the crate said.
        message: String,
    },
}
