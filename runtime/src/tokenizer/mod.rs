//! Text to token ids and back, from a GGUF file's metadata, with llama.cpp's ids.
//!
//! Byte-level BPE runs through the `tokenizers` crate; SentencePiece (Llama 2) merges by score,
//! where the crate knows only ranks, so that its rules are written out here.

mod byte_level;
mod byte_pair;
mod command;
mod error;
mod pre_tokenizer;
mod sentence_piece;
mod special_tokens;
mod token_stream;
mod vocab_data;
mod vocabulary;

use std::sync::Arc;

use crate::gguf::Metadata;

pub(crate) use byte_level::byte_to_char;
pub use command::{TokenizeArgs, TokenizeError, run};
pub use error::TokenizerError;
pub use token_stream::TokenStream;
pub use vocab_data::VocabData;
pub use vocabulary::{TokenKind, Vocabulary};

use byte_pair::BytePairEncoder;
use sentence_piece::SentencePieceEncoder;
use special_tokens::{Fragment, SpecialTokens};

/// How a text is to be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add the begin- and end-of-text tokens that the file asks for.
    pub add_special: bool,
    /// Take control tokens written in the text (`<|im_start|>`) for what they are, not as text.
    pub parse_special: bool,
}

impl EncodeOptions {
    /// A prompt: both.
    pub const PROMPT: Self = Self {
        add_special: true,
        parse_special: true,
    };
    /// A piece of plain text inside a sequence: neither.
    pub const TEXT: Self = Self {
        add_special: false,
        parse_special: false,
    };
    /// What a chat template wrote: control tokens are parsed, and the template has added the
    /// begin-of-text token if there is one.
    pub const TEMPLATE: Self = Self {
        add_special: false,
        parse_special: true,
    };
}

/// Encodes texts and decodes tokens of one model.
#[derive(Debug)]
pub struct Tokenizer {
    vocabulary: Arc<Vocabulary>,
    special_tokens: SpecialTokens,
    encoder: Encoder,
    add_bos: bool,
    add_eos: bool,
    add_space_prefix: bool,
}

#[derive(Debug)]
enum Encoder {
    BytePair(Box<BytePairEncoder>),
    SentencePiece(SentencePieceEncoder),
}

impl Tokenizer {
    /// Builds the tokenizer of a GGUF file.
    ///
    /// # Errors
    /// As [`VocabData::from_metadata`] and [`Tokenizer::new`].
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        Self::new(&VocabData::from_metadata(metadata)?)
    }

    /// Builds the tokenizer that a file's metadata describes.
    ///
    /// # Errors
    /// A tokenizer model or pre-tokenizer that is not known (the message names those that are),
    /// or data that contradicts itself (the message names the key).
    pub fn new(data: &VocabData<'_>) -> Result<Self, TokenizerError> {
        data.check()?;
        let vocabulary = Arc::new(Vocabulary::new(data)?);
        let special_tokens = SpecialTokens::new(data, &vocabulary);
        let (encoder, defaults) = match data.model {
            "gpt2" => {
                let encoder = BytePairEncoder::new(data)?;
                let add_bos = encoder.adds_bos();
                (Encoder::BytePair(Box::new(encoder)), (add_bos, false))
            }
            "llama" => (
                Encoder::SentencePiece(SentencePieceEncoder::new(data, &vocabulary)?),
                (true, true),
            ),
            other => {
                return Err(TokenizerError::UnknownModel {
                    model: other.to_owned(),
                });
            }
        };
        let tokenizer = Self {
            add_bos: data.add_bos.unwrap_or(defaults.0),
            add_eos: data.add_eos.unwrap_or(false),
            add_space_prefix: data.add_space_prefix.unwrap_or(defaults.1)
                && matches!(encoder, Encoder::SentencePiece(_)),
            vocabulary,
            special_tokens,
            encoder,
        };
        tokenizer.check_added_tokens()?;
        Ok(tokenizer)
    }

    fn check_added_tokens(&self) -> Result<(), TokenizerError> {
        for (added, id, switch, key) in [
            (self.add_bos, self.bos(), "add_bos_token", "bos_token_id"),
            (self.add_eos, self.eos(), "add_eos_token", "eos_token_id"),
        ] {
            if added && id.is_none() {
                return Err(TokenizerError::MissingSpecial { switch, key });
            }
        }
        Ok(())
    }

    /// Encodes `text` into token ids.
    ///
    /// # Errors
    /// A run of white space that is too long for the pre-tokenizer.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        if options.add_special && self.add_bos {
            ids.extend(self.bos());
        }
        let mut after_special = true;
        for fragment in self.special_tokens.split(text, options.parse_special) {
            match fragment {
                Fragment::Token(id) => ids.push(id),
                Fragment::Text(text) => match &self.encoder {
                    Encoder::BytePair(encoder) => encoder.encode(text, &mut ids)?,
                    Encoder::SentencePiece(encoder) => {
                        let space_before = self.add_space_prefix && after_special;
                        encoder.encode(text, space_before, &mut ids);
                    }
                },
            }
            after_special = matches!(fragment, Fragment::Token(_));
        }
        if options.add_special && self.add_eos {
            ids.extend(self.eos());
        }
        Ok(ids)
    }

    /// Decodes a whole text; control tokens are left out, bytes that are no UTF-8 become U+FFFD.
    ///
    /// Takes away the space that encoding put before the text. For a text that grows token by
    /// token use [`Tokenizer::stream`].
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    /// As [`Tokenizer::decode`], but the bytes as they are.
    pub fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        let mut strip_space = self.add_space_prefix;
        for &id in ids {
            if self.vocabulary.kind(id) == TokenKind::Control {
                continue;
            }
            let piece = self.vocabulary.piece(id);
            bytes.extend_from_slice(match piece.strip_prefix(b" ") {
                Some(rest) if strip_space => rest,
                _ => piece,
            });
            strip_space = false;
        }
        bytes
    }

    /// Starts decoding a text token by token, as it is generated.
    pub fn stream(&self) -> TokenStream {
        TokenStream::new(Arc::clone(&self.vocabulary))
    }

    /// The tokens' texts and kinds.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Tokens in the vocabulary.
    pub fn n_vocab(&self) -> usize {
        self.vocabulary.len()
    }

    /// The begin-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.vocabulary.bos()
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<u32> {
        self.vocabulary.eos()
    }

    /// Whether the file asks for the begin-of-text token before a text.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// Whether `id` ends the generation: the end of text, or of the model's turn.
    pub fn is_end(&self, id: u32) -> bool {
        self.vocabulary.is_end(id)
    }
}

#[cfg(test)]
mod tests;
