//! Byte-level BPE: words over GPT-2's alphabet, merged by rank.

use std::fmt;

use tokenizers::Model as _;
use tokenizers::models::bpe::{BPE, Merges, Vocab};

use super::pre_tokenizer::PreTokenizer;
use super::vocabulary::text_of;
use super::{TokenizerError, VocabData, byte_level};

/// Encodes text by byte-level BPE.
pub(super) struct BytePairEncoder {
    pre_tokenizer: PreTokenizer,
    model: BPE,
    /// Bytes whose character is no token, `[256]`. Some vocabularies lack a few that no UTF-8
    /// text has, or that were rare where they were trained.
    unknown: [bool; 256],
}

impl fmt::Debug for BytePairEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BytePairEncoder")
            .field("pre_tokenizer", &self.pre_tokenizer)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl BytePairEncoder {
    /// Builds vocabulary and merge tables.
    ///
    /// # Errors
    /// An unknown pre-tokenizer, no merges, or a merge that does not join two tokens into a third.
    pub fn new(data: &VocabData<'_>) -> Result<Self, TokenizerError> {
        let pre_tokenizer = PreTokenizer::named(data.pre)?;
        if data.merges.is_empty() {
            return Err(TokenizerError::MissingList { key: "merges" });
        }
        let mut vocab = Vocab::with_capacity(data.tokens.len());
        for (id, token) in (0u32..).zip(&data.tokens) {
            if let Some(first) = vocab.insert(text_of(id, token).into_owned(), id) {
                let text = (*token).to_owned();
                return Err(TokenizerError::DuplicateToken {
                    text,
                    first,
                    second: id,
                });
            }
        }
        let mut unknown = [false; 256];
        for byte in 0..=255u8 {
            let mut buffer = [0; 4];
            let text: &str = byte_level::byte_to_char(byte).encode_utf8(&mut buffer);
            unknown[byte as usize] = !vocab.contains_key(text);
        }
        let merges = read_merges(data, &vocab)?;
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre_tokenizer.ignores_merges())
            .build()
            .map_err(|error| library(&error))?;
        Ok(Self {
            pre_tokenizer,
            model,
            unknown,
        })
    }

    /// Whether a text begins with the begin-of-text token when the file does not say.
    pub fn adds_bos(&self) -> bool {
        self.pre_tokenizer.adds_bos()
    }

    /// Appends the ids of `text`; a byte that has no token is left out, as in llama.cpp.
    ///
    /// # Errors
    /// A run of white space that is too long.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut chars = String::new();
        self.pre_tokenizer.words(text, &mut |word| {
            chars.clear();
            byte_level::encode(word, &mut chars);
            if word.bytes().any(|byte| self.unknown[byte as usize]) && !self.is_whole(&chars) {
                // what stands on the two sides of such a byte must not merge
                return chars
                    .split(|c| {
                        byte_level::char_to_byte(c).is_some_and(|b| self.unknown[b as usize])
                    })
                    .try_for_each(|part| self.merge(part, ids));
            }
            self.merge(&chars, ids)
        })
    }

    /// Whether the word is taken whole, whatever the merges say.
    fn is_whole(&self, chars: &str) -> bool {
        self.pre_tokenizer.ignores_merges() && self.model.token_to_id(chars).is_some()
    }

    fn merge(&self, chars: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let tokens = self
            .model
            .tokenize(chars)
            .map_err(|error| library(&error))?;
        ids.extend(tokens.iter().map(|token| token.id));
        Ok(())
    }
}

fn library(error: &tokenizers::Error) -> TokenizerError {
    TokenizerError::Library {
        message: error.to_string(),
    }
}

/// The pairs of `data.merges`, each checked, in the order of their ranks.
fn read_merges(data: &VocabData<'_>, vocab: &Vocab) -> Result<Merges, TokenizerError> {
    let mut merges = Merges::with_capacity(data.merges.len());
    let mut joined = String::new();
    for (index, &merge) in data.merges.iter().enumerate() {
        let bad = || TokenizerError::BadMerge {
            index,
            merge: merge.to_owned(),
        };
        // the first character belongs to the left part, even where it is a space
        let skipped = merge.chars().next().map_or(0, char::len_utf8);
        let space_at = merge[skipped..].find(' ').ok_or_else(bad)? + skipped;
        let (left, right) = (&merge[..space_at], &merge[space_at + 1..]);
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if ![left, right, &joined]
            .iter()
            .all(|&part| vocab.contains_key(part))
        {
            return Err(bad());
        }
        merges.push((left.to_owned(), right.to_owned()));
    }
    Ok(merges)
}
