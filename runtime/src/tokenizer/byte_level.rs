//! GPT-2's alphabet: a printable character for each byte, so that BPE can work on text.

/// The character that stands for `byte`.
///
/// Printable bytes of Latin-1 stand for themselves, the other 68 for U+0100 and up, in order.
///
/// Source: `bytes_to_unicode` of GPT-2's encoder.
pub(crate) const fn byte_to_char(byte: u8) -> char {
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => byte as char,
        0..=0x20 => shifted(byte as u32),
        0x7f..=0xa0 => shifted(byte as u32 - 0x7f + 0x21),
        0xad => shifted(0x43),
    }
}

const fn shifted(n: u32) -> char {
    match char::from_u32(0x100 + n) {
        Some(c) => c,
        None => unreachable!(),
    }
}

/// The byte that `c` stands for, if it is of the alphabet.
pub(super) const fn char_to_byte(c: char) -> Option<u8> {
    match c as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// Appends the characters that stand for `text`'s bytes.
pub(super) fn encode(text: &str, out: &mut String) {
    out.extend(text.bytes().map(byte_to_char));
}

/// Appends the bytes that `text` stands for; a character outside the alphabet gives its UTF-8.
pub(super) fn decode(text: &str, out: &mut Vec<u8>) {
    for c in text.chars() {
        match char_to_byte(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_byte_has_its_own_printable_character_and_comes_back() {
        let chars: BTreeSet<char> = (0..=255).map(byte_to_char).collect();
        assert_eq!(chars.len(), 256);
        for byte in 0..=255 {
            let c = byte_to_char(byte);
            assert_eq!(char_to_byte(c), Some(byte));
            assert!(!c.is_whitespace() && !c.is_control(), "{c:?}");
        }
        let n_in_alphabet = ('\0'..='\u{2000}')
            .filter(|&c| char_to_byte(c).is_some())
            .count();
        assert_eq!(n_in_alphabet, 256);
    }

    #[test]
    fn is_gpt_2s_table() {
        let mut text = String::new();
        encode(" \n\u{ad}A\0\u{7f}", &mut text);
        // 0xad as UTF-8: c2 ad
        assert_eq!(text, "ĠĊÂŃAĀġ");
        let mut bytes = Vec::new();
        decode("Ġhallo▁", &mut bytes);
        assert_eq!(bytes, " hallo▁".as_bytes());
    }
}
