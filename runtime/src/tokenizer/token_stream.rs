//! Text that grows token by token, cut only between characters.

use std::sync::Arc;

use super::{TokenKind, Vocabulary};

/// Decodes tokens as they come and gives out text as soon as its characters are whole.
///
/// Control tokens give nothing. Bytes that can never become UTF-8 become U+FFFD. Allocates
/// nothing after its construction.
#[derive(Debug, Clone)]
pub struct TokenStream {
    vocabulary: Arc<Vocabulary>,
    show_control: bool,
    /// Bytes of a character that is not whole yet.
    pending: Vec<u8>,
    text: String,
}

impl TokenStream {
    pub(super) fn new(vocabulary: Arc<Vocabulary>) -> Self {
        let bytes = vocabulary.longest_bytes() + 4;
        Self {
            vocabulary,
            show_control: false,
            pending: Vec::with_capacity(bytes),
            // a byte that is no UTF-8 grows to the three bytes of U+FFFD
            text: String::with_capacity(3 * bytes),
        }
    }

    /// Gives out control tokens too, by their names.
    #[must_use]
    pub fn showing_control(mut self) -> Self {
        self.show_control = true;
        self
    }

    /// Adds a token and returns the text that is now whole, if any.
    pub fn push(&mut self, id: u32) -> Option<&str> {
        self.text.clear();
        if self.show_control || self.vocabulary.kind(id) != TokenKind::Control {
            self.pending.extend_from_slice(self.vocabulary.piece(id));
        }
        let n_taken = take_whole(&self.pending, &mut self.text);
        self.pending.drain(..n_taken);
        self.given()
    }

    /// Ends the text: returns U+FFFD if a character was left incomplete.
    pub fn flush(&mut self) -> Option<&str> {
        self.text.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.text.push(char::REPLACEMENT_CHARACTER);
        }
        self.given()
    }

    fn given(&self) -> Option<&str> {
        if self.text.is_empty() {
            None
        } else {
            Some(&self.text)
        }
    }
}

/// Moves what is decided of `bytes` to `text` and returns how many bytes that is; what is left
/// is the beginning of a character.
fn take_whole(bytes: &[u8], text: &mut String) -> usize {
    let mut n_taken = 0;
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        n_taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let at_end = n_taken + invalid.len() == bytes.len();
        if at_end && is_beginning(invalid) {
            break;
        }
        if !invalid.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            n_taken += invalid.len();
        }
    }
    n_taken
}

/// Whether more bytes could make `bytes` a character.
fn is_beginning(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(bytes: &[u8]) -> (String, usize) {
        let mut text = String::new();
        let n_taken = take_whole(bytes, &mut text);
        (text, n_taken)
    }

    #[test]
    fn whole_characters_go_out_and_beginnings_wait() {
        assert_eq!(taken(b"abc"), ("abc".into(), 3));
        assert_eq!(taken("aé".as_bytes()), ("aé".into(), 3));
        assert_eq!(taken(b"a\xc3"), ("a".into(), 1));
        assert_eq!(taken(b"\xf0\x9f\xa6"), (String::new(), 0));
        assert_eq!(taken(b""), (String::new(), 0));
    }

    #[test]
    fn bytes_that_can_be_no_character_are_replaced() {
        assert_eq!(taken(b"\x80a"), ("\u{fffd}a".into(), 2));
        assert_eq!(taken(b"\xc3a"), ("\u{fffd}a".into(), 2));
        assert_eq!(taken(b"\xff"), ("\u{fffd}".into(), 1));
        assert_eq!(taken(b"\xf0\x9f\xa6\xc3"), ("\u{fffd}".into(), 3));
    }

    #[test]
    fn byte_by_byte_gives_what_the_whole_gives() {
        for bytes in [
            "naïve 🦙 Ωmega".as_bytes(),
            b"\xf0\x9f\xa6\xc3\xa9\xff\xc3",
            b"\xe2\x82a\xed\xa0\x80",
            b"\xf4\x90\x80\x80x",
        ] {
            let mut pending = Vec::new();
            let mut text = String::new();
            for &byte in bytes {
                pending.push(byte);
                let n_taken = take_whole(&pending, &mut text);
                pending.drain(..n_taken);
            }
            if !pending.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
            assert_eq!(text, String::from_utf8_lossy(bytes));
        }
    }
}
