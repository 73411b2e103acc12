//! The stage for gates that never close: thresholds on what neurons contribute, as far as the wanted quality allows.

use std::path::Path;

use super::preparation::Preparation;
use super::stage::Stage;
use super::text::CALIBRATION;
use crate::error::RuntimeError;
use crate::gguf::GgufWriter;
use crate::sidecar::{Section, ThresholdSection};
use crate::threshold::{CalibrateOptions, Step, calibrate};

/// Pieces of the text that are read, evenly over it.
const N_PIECES: usize = 24;
/// Step between pieces that follow one another, so that the first few are of all kinds; it divides no multiple of their
/// number but its own.
const PIECE_STEP: usize = 7;
/// Bytes of a token, at least; more text than is read does no harm.
const BYTES_PER_TOKEN: usize = 5;

/// `N_PIECES` pieces of `text` of at most `piece_bytes` each, evenly over it, one after another in mixed order.
fn mixed(text: &str, piece_bytes: usize) -> String {
    let cut = |at: usize| (at..=text.len()).find(|at| text.is_char_boundary(*at));
    let piece = |n: usize| {
        let start = cut(n * (text.len() / N_PIECES)).unwrap_or(text.len());
        let next = (n + 1) * (text.len() / N_PIECES);
        let end = cut(next.min(start + piece_bytes)).unwrap_or(text.len());
        &text[start..end.max(start)]
    };
    (0..N_PIECES)
        .map(|n| piece(n * PIECE_STEP % N_PIECES))
        .collect()
}

impl Preparation {
    /// Calibrates the thresholds, and says what they gain.
    pub(super) fn gate_thresholds(&self) -> Result<Section, RuntimeError> {
        let how = CalibrateOptions {
            budget: self.options.quality,
            chunk_tokens: self.passages.0.n_ctx(),
            ..CalibrateOptions::default()
        };
        let n_tokens = how.chunk_tokens * (how.sampled_chunks + how.scored_chunks);
        let text = self.text(n_tokens * BYTES_PER_TOKEN);
        let mut progress = |step: Step<'_>| {
            let line = match step {
                Step::Sampling => "thresholds: taking samples".to_owned(),
                Step::Sorting => "thresholds: sorting contributions".to_owned(),
                Step::Probing => "thresholds: trying each layer alone".to_owned(),
                Step::Timing => "thresholds: decoding in both modes in turn".to_owned(),
                Step::Tried {
                    proposal,
                    rise,
                    error,
                } => format!(
                    "thresholds: {:.1} % of the neurons skipped cost {:+.2} ± {:.2} % perplexity",
                    proposal.thresholds.skipped * 100.0,
                    rise * 100.0,
                    error * 100.0
                ),
            };
            self.observer.say(&line);
        };
        let path = self.options.texts.first();
        let path = path.map_or("the built-in text", |(name, _)| name);
        let made = calibrate(
            &self.subject.options,
            &self.subject.plan,
            &text,
            Path::new(path),
            &how,
            &mut progress,
            &self.stop,
        )?;
        self.say_gain(&made);
        let mut header = GgufWriter::new();
        made.declare(&mut header)?;
        let part = self.checkpoint.section_path(Stage::Thresholds.name());
        let mut file = header.create(&part)?;
        made.write(&mut file)?;
        file.finish()?;
        let section = self.checkpoint.section(Stage::Thresholds.name());
        Ok(section.unwrap_or_default())
    }

    fn say_gain(&self, made: &ThresholdSection) {
        let figures = &made.figures;
        let line = match figures.gains {
            true => format!("thresholds: {figures}"),
            false => format!(
                "nothing is gained by thresholds within {:.2} % of perplexity ({figures}): run the model dense (--sparsity off)",
                figures.budget * 100.0
            ),
        };
        self.observer.say(&line);
    }

    /// Pieces of the text that is learnt from, at least `n_bytes` where it has them.
    fn text(&self, n_bytes: usize) -> String {
        let piece_bytes = n_bytes.div_ceil(N_PIECES);
        match &self.options.texts[..] {
            [] => mixed(CALIBRATION, piece_bytes),
            texts => {
                let all: String = texts.iter().map(|(_, text)| text.as_str()).collect();
                mixed(&all, piece_bytes)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_mixed_and_whole_characters() {
        let text: String = (0..480).map(|n| ['ä', 'b', 'c'][n % 3]).collect();
        let mixed_text = mixed(&text, 10);
        assert!(mixed_text.len() <= N_PIECES * 13, "{}", mixed_text.len());
        let digits: String = (0..N_PIECES).map(|n| char::from(b'a' + n as u8)).collect();
        let long: String = digits
            .chars()
            .flat_map(|c| std::iter::repeat_n(c, 50))
            .collect();
        let mut seen: Vec<char> = mixed(&long, 1).chars().collect();
        assert_eq!(seen[..3], ['a', 'h', 'o']);
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), N_PIECES);
        assert_eq!(mixed("ab", 10), "");
    }
}
