//! Texts to learn from and to report on, cut into passages of tokens.

use std::ops::Range;

use xxhash_rust::xxh3::Xxh3;

use super::PrepareError;
use crate::tokenizer::{EncodeOptions, Tokenizer, TokenizerError};

/// What is learnt from where no text is named (origins and licences: texts/README.md).
pub const CALIBRATION: &str = include_str!("../../../texts/calibration.txt");
/// What is reported on; nothing is fitted to it.
pub const HELD_OUT: &str = include_str!("../../../texts/heldout.txt");

/// Tokens of a passage, where the model's context is no shorter.
pub const PASSAGE_TOKENS: usize = 512;

/// A text's tokens.
#[derive(Debug, Clone)]
pub struct Text {
    /// Its files, or what it is.
    pub name: String,
    /// Ids of all of it.
    pub tokens: Vec<u32>,
}

impl Text {
    /// The tokens of `texts`, one after another. Control tokens written in them count as such, as chats contain them.
    ///
    /// # Errors
    /// A text that cannot be tokenised.
    pub fn new(
        name: impl Into<String>,
        texts: &[impl AsRef<str>],
        tokenizer: &Tokenizer,
    ) -> Result<Self, TokenizerError> {
        let mut tokens = Vec::new();
        for text in texts {
            tokens.extend(tokenizer.encode(text.as_ref(), EncodeOptions::TEMPLATE)?);
        }
        Ok(Self {
            name: name.into(),
            tokens,
        })
    }

    /// The text's hash, as 32 hexadecimal digits.
    pub fn hash(&self) -> String {
        let mut hash = Xxh3::new();
        for token in &self.tokens {
            hash.update(&token.to_le_bytes());
        }
        format!("{:032x}", hash.digest128())
    }

    /// At most `n` whole passages of `n_ctx` tokens, evenly over the text; `bos` replaces each one's first token.
    ///
    /// # Errors
    /// The text has fewer than `n_min` of them.
    pub fn passages(
        &self,
        n_ctx: usize,
        n: usize,
        n_min: usize,
        bos: Option<u32>,
    ) -> Result<Passages, PrepareError> {
        let whole = self.tokens.len() / n_ctx;
        if whole < n_min {
            return Err(PrepareError::TextTooShort {
                text: self.name.clone(),
                n_tokens: self.tokens.len(),
                needed: n_min * n_ctx,
            });
        }
        let n = n.min(whole);
        let tokens = (0..n).flat_map(|passage| {
            let start = passage * whole / n * n_ctx;
            let tokens = &self.tokens[start..start + n_ctx];
            let first = bos.unwrap_or(tokens[0]);
            std::iter::once(first).chain(tokens[1..].iter().copied())
        });
        Ok(Passages {
            tokens: tokens.collect(),
            n_ctx,
        })
    }
}

/// Pieces of a text, each as long as the others.
#[derive(Debug, Clone, PartialEq)]
pub struct Passages {
    tokens: Vec<u32>,
    n_ctx: usize,
}

impl Passages {
    /// Number of passages.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.n_ctx
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Tokens of a passage.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Tokens of all passages, one after another.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens of one passage.
    pub fn get(&self, passage: usize) -> &[u32] {
        &self.tokens[self.at(passage)]
    }

    /// Where the tokens of a passage are among those of all.
    pub fn at(&self, passage: usize) -> Range<usize> {
        passage * self.n_ctx..(passage + 1) * self.n_ctx
    }

    /// The same passages with every `step`-th one at the end.
    pub fn dealt(&self, step: usize) -> Passages {
        let (mut dealt, last) = self.split(step);
        dealt.tokens.extend(last.tokens);
        dealt
    }

    /// Every `step`-th passage apart from the others: first those that stay, then those taken out.
    pub fn split(&self, step: usize) -> (Passages, Passages) {
        let part = |out: bool| Passages {
            tokens: (0..self.len())
                .filter(|passage| (passage % step == step - 1) == out)
                .flat_map(|passage| self.get(passage).iter().copied())
                .collect(),
            n_ctx: self.n_ctx,
        };
        (part(false), part(true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(n_tokens: u32) -> Text {
        Text {
            name: "t".into(),
            tokens: (0..n_tokens).collect(),
        }
    }

    #[test]
    fn passages_lie_evenly_over_the_text() {
        let passages = text(103).passages(10, 3, 1, Some(1000)).unwrap();
        assert_eq!((passages.len(), passages.n_ctx()), (3, 10));
        let starts: Vec<u32> = (0..3).map(|n| passages.get(n)[1]).collect();
        assert_eq!(starts, [1, 31, 61]);
        assert!((0..3).all(|n| passages.get(n)[0] == 1000));
        assert_eq!(text(103).passages(10, 99, 1, None).unwrap().len(), 10);
    }

    #[test]
    fn a_short_text_is_refused_with_what_is_needed() {
        let error = text(39).passages(10, 8, 4, None).unwrap_err().to_string();
        assert!(
            error.contains("39 tokens") && error.contains("at least 40"),
            "{error}"
        );
    }

    #[test]
    fn every_so_many_th_passage_is_taken_out() {
        let (stay, out) = text(100).passages(10, 10, 1, None).unwrap().split(4);
        assert_eq!((stay.len(), out.len()), (8, 2));
        assert_eq!((out.get(0)[0], out.get(1)[0]), (30, 70));
        assert_eq!(stay.get(3)[0], 40);
        let dealt = stay.dealt(4);
        let starts: Vec<u32> = (0..8).map(|n| dealt.get(n)[0]).collect();
        assert_eq!(starts, [0, 10, 20, 50, 60, 80, 40, 90]);
    }

    #[test]
    fn another_token_is_another_text() {
        assert_ne!(text(10).hash(), text(11).hash());
        assert_eq!(text(10).hash(), text(10).hash());
    }
}
