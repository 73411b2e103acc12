//! Escape sequences in texts of the command line, as llama.cpp reads them.

/// Replaces `\n`, `\r`, `\t`, `\'`, `\"`, `\\` and `\x41` (two hexadecimal digits of one ASCII character) by what they
/// stand for; anything else after a backslash stays as it is.
pub fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let sequence = &rest[at..];
        let (character, n_bytes) = match sequence.as_bytes().get(1) {
            Some(b'n') => ('\n', 2),
            Some(b'r') => ('\r', 2),
            Some(b't') => ('\t', 2),
            Some(b'\'') => ('\'', 2),
            Some(b'"') => ('"', 2),
            Some(b'\\') => ('\\', 2),
            Some(b'x') => match ascii(sequence.get(2..4)) {
                Some(character) => (character, 4),
                None => ('\\', 1),
            },
            _ => ('\\', 1),
        };
        out.push(character);
        rest = &sequence[n_bytes..];
    }
    out.push_str(rest);
    out
}

/// The ASCII character of two hexadecimal digits.
fn ascii(digits: Option<&str>) -> Option<char> {
    let digits = digits.filter(|digits| digits.bytes().all(|byte| byte.is_ascii_hexdigit()))?;
    let value = u8::from_str_radix(digits, 16).ok()?;
    value.is_ascii().then_some(char::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_become_what_they_stand_for_and_others_stay() {
        assert_eq!(unescape(r#"a\nb\r\t\'\"\\n"#), "a\nb\r\t'\"\\n");
        assert_eq!(unescape(r"\x41\x7a\x0"), "Az\\x0");
        assert_eq!(unescape(r"\xff \xé4 \q \é \"), r"\xff \xé4 \q \é \");
        assert_eq!(unescape(""), "");
    }
}
