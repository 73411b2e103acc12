//! Texts that end an answer when it comes to them.

/// Holds back what may become one of the texts, until it has or cannot any more.
#[derive(Debug, Clone, Default)]
pub(super) struct StopTexts {
    /// None of them is empty.
    texts: Vec<String>,
    /// The answer's end, held back.
    held: String,
}

/// What has been decided of an answer's text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decided {
    /// What can be given out; without the text that it came to.
    pub text: String,
    /// Whether one of the texts is there.
    pub stopped: bool,
}

impl StopTexts {
    pub fn new(texts: Vec<String>) -> Self {
        assert!(
            texts.iter().all(|text| !text.is_empty()),
            "an empty text would end every answer"
        );
        Self {
            texts,
            held: String::new(),
        }
    }

    /// Adds the answer's next piece, which may begin or end anywhere in one of the texts.
    pub fn push(&mut self, piece: &str) -> Decided {
        self.held.push_str(piece);
        let found = self.texts.iter().filter_map(|text| self.held.find(text));
        if let Some(at) = found.min() {
            self.held.truncate(at);
            return Decided {
                text: self.flush(),
                stopped: true,
            };
        }
        let n_open = self.open_bytes();
        let undecided = self.held.split_off(self.held.len() - n_open);
        Decided {
            text: std::mem::replace(&mut self.held, undecided),
            stopped: false,
        }
    }

    /// What is held back: nothing follows that could make it one of the texts.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of what is held that one of the texts begins with.
    fn open_bytes(&self) -> usize {
        let open = |text: &String| {
            let mut lengths = text.char_indices().map(|(at, _)| at).rev();
            lengths.find(|length| self.held.ends_with(&text[..*length]))
        };
        self.texts.iter().filter_map(open).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each piece gives, and whether the last one stops.
    fn pieces(texts: &[&str], pieces: &[&str]) -> (Vec<String>, bool, String) {
        let mut stops = StopTexts::new(texts.iter().map(ToString::to_string).collect());
        let mut stopped = false;
        let mut given = vec![];
        for piece in pieces {
            assert!(!stopped, "nothing follows a stop");
            let decided = stops.push(piece);
            given.push(decided.text);
            stopped = decided.stopped;
        }
        (given, stopped, stops.flush())
    }

    fn given(texts: &[&str]) -> Vec<String> {
        texts.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn without_texts_everything_passes() {
        assert_eq!(
            pieces(&[], &["a", "b"]),
            (given(&["a", "b"]), false, String::new())
        );
    }

    #[test]
    fn a_text_is_found_across_pieces_and_left_out() {
        assert_eq!(
            pieces(&["User:"], &["Hi\nUs", "er", ":x"]),
            (given(&["Hi\n", "", ""]), true, String::new())
        );
        assert_eq!(
            pieces(&["b"], &["abab"]),
            (given(&["a"]), true, String::new())
        );
    }

    #[test]
    fn what_turns_out_otherwise_is_given_late() {
        assert_eq!(
            pieces(&["User:"], &["Us", "ual U"]),
            (given(&["", "Usual "]), false, "U".into())
        );
        // the beginning may begin again within itself
        assert_eq!(
            pieces(&["aab"], &["aa", "a", "b"]),
            (given(&["", "a", ""]), true, String::new())
        );
    }

    #[test]
    fn the_earliest_of_several_counts() {
        assert_eq!(
            pieces(&["d", "bc"], &["abcd"]),
            (given(&["a"]), true, String::new())
        );
        // the longest beginning is held
        assert_eq!(
            pieces(&["cx", "bcy"], &["abc", "x"]),
            (given(&["a", "b"]), true, String::new())
        );
    }

    #[test]
    fn characters_of_several_bytes_are_not_cut() {
        assert_eq!(
            pieces(&["é🦙"], &["aé", "é", "🦙"]),
            (given(&["a", "é", ""]), true, String::new())
        );
    }
}
