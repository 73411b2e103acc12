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
}

impl fmt::Debug for BytePairEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BytePairEncoder")
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
            let text = text_of(id, token).into_owned();
            if let Some(first) = vocab.insert(text, id) {
                let text = (*token).to_owned();
                return Err(TokenizerError::DuplicateToken {
                    text,
                    first,
                    second: id,
                });
            }
        }
        let merges = merges(data, &vocab)?;
        let model = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(pre_tokenizer.ignores_merges())
            .build()
            .map_err(|error| TokenizerError::Library {
                message: error.to_string(),
            })?;
        Ok(Self {
            pre_tokenizer,
            model,
        })
    }

    /// Whether a text begins with the begin-of-text token when the file does not say.
    pub fn adds_bos(&self) -> bool {
        self.pre_tokenizer.adds_bos()
    }

    /// Appends the ids of `text`.
    ///
    /// # Errors
    /// A run of white space that is too long.
    pub fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut word_chars = String::new();
        self.pre_tokenizer.words(text, &mut |word| {
            word_chars.clear();
            byte_level::encode(word, &mut word_chars);
            let tokens =
                self.model
                    .tokenize(&word_chars)
                    .map_err(|error| TokenizerError::Library {
                        message: error.to_string(),
                    })?;
            ids.extend(tokens.iter().map(|token| token.id));
            Ok(())
        })
    }
}

/// The pairs of `data.merges`, each checked, in the order of their ranks.
fn merges(data: &VocabData<'_>, vocab: &Vocab) -> Result<Merges, TokenizerError> {
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
