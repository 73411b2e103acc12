//! SentencePiece as Llama 2 uses it: merge the pair whose joined token has the highest score.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::vocabulary::text_of;
use super::{TokenizerError, VocabData, Vocabulary};

/// What a space becomes.
const SPACE: &str = "▁";

/// Encodes text by scores, with a byte token for each byte of what is not in the vocabulary.
#[derive(Debug)]
pub(super) struct SentencePieceEncoder {
    ids: HashMap<Box<str>, u32>,
    scores: Vec<f32>,
    /// Token of each byte, or of unknown text.
    byte_ids: Vec<u32>,
    /// Bytes of the longest token: longer pairs need no look-up.
    longest_bytes: usize,
}

/// A part of the text, linked to its neighbours; empty once it is merged into its left one.
#[derive(Debug, Clone, Copy)]
struct Symbol {
    start: usize,
    len: usize,
    before: Option<usize>,
    after: Option<usize>,
}

/// Two neighbours that together are a token.
#[derive(Debug)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    len: usize,
}

/// Highest score first, then leftmost.
impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl SentencePieceEncoder {
    /// Builds the table of tokens.
    ///
    /// # Errors
    /// No scores, a score that is NaN, or a token twice.
    pub fn new(data: &VocabData<'_>, vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        if data.scores.is_empty() {
            return Err(TokenizerError::MissingList { key: "scores" });
        }
        if let Some(index) = data.scores.iter().position(|score| score.is_nan()) {
            return Err(TokenizerError::BadScore { index });
        }
        let mut ids = HashMap::with_capacity(data.tokens.len());
        for (id, token) in (0u32..).zip(&data.tokens) {
            if let Some(first) = ids.insert(text_of(id, token).into(), id) {
                let text = (*token).to_owned();
                return Err(TokenizerError::DuplicateToken {
                    text,
                    first,
                    second: id,
                });
            }
        }
        let unknown = vocabulary.unk();
        let byte_ids = (0..=255u8)
            .map(|byte| byte_id(&ids, byte).unwrap_or(unknown))
            .collect();
        let longest_bytes = data
            .tokens
            .iter()
            .map(|token| token.len())
            .max()
            .unwrap_or(0);
        // −0 would be below +0 in the total order, but equals it
        let scores = data.scores.iter().map(|score| score + 0.0).collect();
        Ok(Self {
            ids,
            scores,
            byte_ids,
            longest_bytes,
        })
    }

    /// Appends the ids of `text`, with a space put before it if asked for.
    pub fn encode(&self, text: &str, space_before: bool, out: &mut Vec<u32>) {
        let mut escaped = String::with_capacity(text.len() + text.len() / 4 + SPACE.len());
        if space_before {
            escaped.push_str(SPACE);
        }
        for c in text.chars() {
            match c {
                ' ' => escaped.push_str(SPACE),
                other => escaped.push(other),
            }
        }
        let symbols = self.merge(&escaped);
        for symbol in symbols.iter().filter(|symbol| symbol.len > 0) {
            let piece = &escaped[symbol.start..symbol.start + symbol.len];
            match self.ids.get(piece) {
                Some(&id) => out.push(id),
                None => out.extend(piece.bytes().map(|byte| self.byte_ids[byte as usize])),
            }
        }
    }

    /// Starts from single characters and merges while two neighbours are a token.
    fn merge(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                len: c.len_utf8(),
                before: i.checked_sub(1),
                after: Some(i + 1),
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.after = None;
        }
        let mut queue = BinaryHeap::with_capacity(symbols.len());
        for right in 1..symbols.len() {
            queue.extend(self.pair(text, &symbols, right - 1, right));
        }
        while let Some(pair) = queue.pop() {
            let (left, right) = (symbols[pair.left], symbols[pair.right]);
            // one of the two was merged with another since
            if left.len == 0 || right.len == 0 || left.len + right.len != pair.len {
                continue;
            }
            symbols[pair.left] = Symbol {
                len: pair.len,
                after: right.after,
                ..left
            };
            symbols[pair.right].len = 0;
            if let Some(after) = right.after {
                symbols[after].before = Some(pair.left);
                queue.extend(self.pair(text, &symbols, pair.left, after));
            }
            if let Some(before) = left.before {
                queue.extend(self.pair(text, &symbols, before, pair.left));
            }
        }
        symbols
    }

    /// The two neighbours, if together they are a token.
    fn pair(&self, text: &str, symbols: &[Symbol], left: usize, right: usize) -> Option<Pair> {
        let start = symbols[left].start;
        let len = symbols[left].len + symbols[right].len;
        if len > self.longest_bytes {
            return None;
        }
        let &id = self.ids.get(&text[start..start + len])?;
        Some(Pair {
            score: self.scores[id as usize],
            left,
            right,
            len,
        })
    }
}

/// The token of a byte: `<0x0A>`, or the byte itself where it is a character.
fn byte_id(ids: &HashMap<Box<str>, u32>, byte: u8) -> Option<u32> {
    let named = format!("<0x{byte:02X}>");
    let itself = (byte as char).to_string();
    ids.get(named.as_str())
        .or_else(|| ids.get(itself.as_str()).filter(|_| byte.is_ascii()))
        .copied()
}
