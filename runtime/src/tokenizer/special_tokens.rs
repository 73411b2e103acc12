//! Tokens that are found in a text before it is tokenised: control and user-defined ones.

use super::{TokenKind, VocabData, Vocabulary};

/// A part of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// A special token.
    Token(u32),
    /// Text, never empty.
    Text(&'t str),
}

#[derive(Debug)]
struct Special {
    id: u32,
    text: Box<str>,
    /// User-defined tokens are found always, control and unknown ones only when asked for.
    always: bool,
}

/// Finds special tokens in texts: the longest ones first, as llama.cpp does.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    /// By descending length, then by id.
    specials: Vec<Special>,
    /// For each first byte, the indices into `specials`.
    by_first_byte: Vec<Vec<u32>>,
}

impl SpecialTokens {
    /// Collects the special tokens of a vocabulary.
    pub fn new(data: &VocabData<'_>, vocabulary: &Vocabulary) -> Self {
        let mut specials: Vec<Special> = (0u32..)
            .zip(&data.tokens)
            .filter(|(_, token)| !token.is_empty())
            .filter_map(|(id, &token)| {
                let always = match vocabulary.kind(id) {
                    TokenKind::UserDefined => true,
                    TokenKind::Control | TokenKind::Unknown => false,
                    _ => return None,
                };
                Some(Special {
                    id,
                    text: token.into(),
                    always,
                })
            })
            .collect();
        specials.sort_by_key(|special| (usize::MAX - special.text.len(), special.id));
        let mut by_first_byte = vec![Vec::new(); 256];
        for (index, special) in (0u32..).zip(&specials) {
            by_first_byte[special.text.as_bytes()[0] as usize].push(index);
        }
        Self {
            specials,
            by_first_byte,
        }
    }

    /// Cuts `text` at its special tokens; control tokens count only with `parse_special`.
    pub fn split<'t>(&self, text: &'t str, parse_special: bool) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        if !text.is_empty() {
            fragments.push(Fragment::Text(text));
        }
        for index in self.present(text) {
            let special = &self.specials[index as usize];
            if special.always || parse_special {
                fragments = cut(&fragments, special);
            }
        }
        fragments
    }

    /// The specials that occur anywhere in `text`, in their order.
    fn present(&self, text: &str) -> Vec<u32> {
        let bytes = text.as_bytes();
        let mut found = Vec::new();
        for (at, &byte) in bytes.iter().enumerate() {
            for &index in &self.by_first_byte[byte as usize] {
                let special = self.specials[index as usize].text.as_bytes();
                if bytes[at..].starts_with(special) && !found.contains(&index) {
                    found.push(index);
                }
            }
        }
        found.sort_unstable();
        found
    }
}

/// Cuts the texts among `fragments` at every occurrence of `special`.
fn cut<'t>(fragments: &[Fragment<'t>], special: &Special) -> Vec<Fragment<'t>> {
    let mut out = Vec::with_capacity(fragments.len() + 2);
    for &fragment in fragments {
        let Fragment::Text(text) = fragment else {
            out.push(fragment);
            continue;
        };
        let mut end_before = 0;
        for (start, found) in text.match_indices(&*special.text) {
            if end_before < start {
                out.push(Fragment::Text(&text[end_before..start]));
            }
            out.push(Fragment::Token(special.id));
            end_before = start + found.len();
        }
        if end_before < text.len() {
            out.push(Fragment::Text(&text[end_before..]));
        }
    }
    out
}
