//! The tokens: what each one is and the bytes it stands for.

use std::borrow::Cow;

use super::{TokenizerError, VocabData, byte_level};

/// What a token is for; the numbers are those of `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum TokenKind {
    /// A piece of text.
    Normal = 1,
    /// Stands for text that has no token.
    Unknown = 2,
    /// Steers the model and is never shown: begin and end of text, of a turn.
    Control = 3,
    /// A piece of text that is found before all others.
    UserDefined = 4,
    /// A place in the table without use.
    Unused = 5,
    /// One byte.
    Byte = 6,
}

impl TokenKind {
    fn from_ggml(kind: i32) -> Self {
        match kind {
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 | 0 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Normal,
        }
    }
}

/// Texts of tokens that end a model's turn, whatever the metadata says.
///
/// Source: llama.cpp's list of end-of-generation tokens, as far as llama-family models use it.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
];

/// Kind and bytes of every token.
#[derive(Debug)]
pub struct Vocabulary {
    kinds: Vec<TokenKind>,
    /// The bytes of all tokens, one after the other.
    bytes: Vec<u8>,
    /// Where each token's bytes end, `[n_vocab]`.
    ends: Vec<u32>,
    end_ids: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    unk: u32,
    longest_bytes: usize,
}

/// A token's text; one that is empty in the file gets a name of its own.
pub(super) fn text_of<'a>(id: u32, token: &'a str) -> Cow<'a, str> {
    if token.is_empty() {
        Cow::Owned(format!("[EMPTY_{id}]"))
    } else {
        Cow::Borrowed(token)
    }
}

impl Vocabulary {
    /// Reads kinds and decodes the texts of all tokens.
    pub(super) fn new(data: &VocabData<'_>) -> Result<Self, TokenizerError> {
        let n_vocab = data.tokens.len();
        let sentence_piece = data.model == "llama";
        let default = |id: u32| Some(id).filter(|&id| sentence_piece && (id as usize) < n_vocab);
        let eos = data.eos.or(default(2));
        let mut end_ids: Vec<u32> = [eos, data.eot, data.eom].into_iter().flatten().collect();
        let mut kinds = Vec::with_capacity(n_vocab);
        let mut bytes = Vec::with_capacity(n_vocab * 8);
        let mut ends = Vec::with_capacity(n_vocab);
        let mut longest_bytes = 0;
        for (id, &token) in (0u32..).zip(&data.tokens) {
            let given = data
                .token_types
                .get(id as usize)
                .copied()
                .map_or(TokenKind::Normal, TokenKind::from_ggml);
            let ends_turn = matches!(token.as_bytes().first(), Some(b'<' | b'[' | b'_'))
                && END_TEXTS.contains(&token);
            if ends_turn {
                end_ids.push(id);
            }
            let kind = if ends_turn { TokenKind::Control } else { given };
            kinds.push(kind);
            let start = bytes.len();
            push_piece(kind, &text_of(id, token), sentence_piece, &mut bytes);
            longest_bytes = longest_bytes.max(bytes.len() - start);
            ends.push(u32::try_from(bytes.len()).map_err(|_| TokenizerError::TooLarge)?);
        }
        end_ids.sort_unstable();
        end_ids.dedup();
        Ok(Self {
            kinds,
            bytes,
            ends,
            end_ids,
            bos: data.bos.or(default(1)),
            eos,
            unk: data.unk.unwrap_or(0),
            longest_bytes,
        })
    }

    /// Tokens in the vocabulary.
    #[allow(clippy::len_without_is_empty, reason = "a vocabulary is never empty")]
    pub fn len(&self) -> usize {
        self.kinds.len()
    }

    /// What token `id` is for; an id outside the vocabulary is unused.
    pub fn kind(&self, id: u32) -> TokenKind {
        self.kinds
            .get(id as usize)
            .copied()
            .unwrap_or(TokenKind::Unused)
    }

    /// The bytes that token `id` stands for (a control token's name); none outside the vocabulary.
    ///
    /// Not always UTF-8: a character may be spread over several tokens.
    pub fn piece(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..end as usize]
    }

    /// [`Vocabulary::piece`] as text.
    pub fn piece_text(&self, id: u32) -> Cow<'_, str> {
        String::from_utf8_lossy(self.piece(id))
    }

    /// Bytes of the longest piece.
    pub(super) fn longest_bytes(&self) -> usize {
        self.longest_bytes
    }

    /// The begin-of-text token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-text token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The token for text that has none.
    pub(super) fn unk(&self) -> u32 {
        self.unk
    }

    /// All tokens that end the generation, ascending.
    pub fn end_ids(&self) -> &[u32] {
        &self.end_ids
    }

    /// Whether `id` ends the generation.
    pub fn is_end(&self, id: u32) -> bool {
        self.end_ids.binary_search(&id).is_ok()
    }
}

/// Appends the bytes that a token of this kind and text stands for.
fn push_piece(kind: TokenKind, text: &str, sentence_piece: bool, bytes: &mut Vec<u8>) {
    match kind {
        TokenKind::Unused => {}
        TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown => {
            bytes.extend_from_slice(text.as_bytes());
        }
        TokenKind::Byte => match byte_of(text) {
            Some(byte) => bytes.push(byte),
            None => bytes.extend_from_slice(text.as_bytes()),
        },
        TokenKind::Normal if sentence_piece => {
            for (i, part) in text.split('▁').enumerate() {
                if i > 0 {
                    bytes.push(b' ');
                }
                bytes.extend_from_slice(part.as_bytes());
            }
        }
        TokenKind::Normal => byte_level::decode(text, bytes),
    }
}

/// The byte of a byte token's text, `<0x0A>`.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}
