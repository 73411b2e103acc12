//! `sparsity.predict`: who finds each layer's active neurons.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::error::TopologyError;

/// Who finds a layer's active neurons, with `--sparsity predicted`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PredictBy {
    /// Nobody predicts: all gates are computed, and nothing is lost.
    Exact,
    /// The layer's own sketch, when the hidden state is there.
    InLayer,
    /// The predictor one layer ahead alone.
    Ahead,
    /// The predictor one layer ahead, and the sketch adds what is missing.
    Both,
}

impl PredictBy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Exact, Self::InLayer, Self::Ahead, Self::Both];

    /// As files and flags have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::InLayer => "in-layer",
            Self::Ahead => "ahead",
            Self::Both => "both",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|by| by.name() == name)
    }
}

impl fmt::Display for PredictBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `sparsity.predict`, and `--predictor`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Predict {
    /// Every layer's own sketch, where it has one.
    #[default]
    Auto,
    /// The same in all layers, as far as they have what it needs.
    All(PredictBy),
    /// Layer by layer, each named once.
    Layers(LayerList),
}

/// Layers, and who predicts in each: ascending, and none twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerList(Vec<(RangeInclusive<usize>, PredictBy)>);

impl LayerList {
    /// The list of a model whose layers are these, the first one first.
    pub fn of(layers: &[PredictBy]) -> Self {
        let mut list: Vec<(RangeInclusive<usize>, PredictBy)> = Vec::new();
        for (layer, &by) in layers.iter().enumerate() {
            match list.last_mut() {
                Some((layers, known)) if *known == by => *layers = *layers.start()..=layer,
                _ => list.push((layer..=layer, by)),
            }
        }
        Self(list)
    }

    /// Each layer of a model of `n_layer`.
    ///
    /// # Errors
    /// [`TopologyError::Predict`] where not each of them is named, or one that is none of them.
    pub fn of_model(&self, n_layer: usize) -> Result<Vec<PredictBy>, TopologyError> {
        let refused = |problem: String| {
            Err(self.refused(format!(
                "{problem}: name each layer of {} once",
                range_text(&(0..=n_layer.saturating_sub(1)))
            )))
        };
        let mut all = Vec::new();
        for (layers, by) in &self.0 {
            if *layers.end() >= n_layer {
                let problem = format!("the model has no layer {}", layers.end());
                return refused(problem);
            }
            if *layers.start() > all.len() {
                return refused(not_named(all.len()..=layers.start() - 1));
            }
            all.resize(layers.end() + 1, *by);
        }
        match all.len() < n_layer {
            true => refused(not_named(all.len()..=n_layer - 1)),
            false => Ok(all),
        }
    }

    fn refused(&self, problem: String) -> TopologyError {
        TopologyError::Predict {
            text: self.to_string(),
            problem,
        }
    }

    /// # Errors
    /// What is wrong with it, and what would do.
    fn parse(text: &str) -> Result<Self, String> {
        let mut list = Vec::new();
        for part in text.split(',') {
            let (layers, name) = part.split_once(':').unwrap_or(("", part));
            let (layers, name) = (layers.trim(), name.trim());
            let by = PredictBy::named(name).ok_or_else(|| {
                format!("nothing predicts by {name:?}: it is exact, in-layer, ahead or both")
            })?;
            let layers = parse_range(layers).ok_or_else(|| {
                format!(
                    "{layers:?} are no layers: write as in \"0-3: exact, 4-29: in-layer\", or one of auto, exact, \
                     in-layer, ahead and both"
                )
            })?;
            list.push((layers, by));
        }
        list.sort_by_key(|(layers, _)| *layers.start());
        for pair in list.windows(2) {
            let (before, after) = (&pair[0].0, &pair[1].0);
            if after.start() <= before.end() {
                let layer = after.start();
                return Err(format!("layer {layer} is named twice: name it once"));
            }
        }
        Ok(Self(list))
    }
}

fn not_named(layers: RangeInclusive<usize>) -> String {
    match layers.start() == layers.end() {
        true => format!("layer {} is not named", layers.start()),
        false => format!("layers {} are not named", range_text(&layers)),
    }
}

/// `7`, or `4-29`.
fn parse_range(text: &str) -> Option<RangeInclusive<usize>> {
    let number = |text: &str| {
        let text = text.trim();
        // Rust reads "+1" as a number too
        let digits = text.starts_with(|c: char| c.is_ascii_digit());
        // so that the next one is a number too
        let number = text.parse::<u32>().ok().filter(|_| digits)?;
        usize::try_from(number).ok()
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..=last)
}

fn range_text(layers: &RangeInclusive<usize>) -> String {
    match layers.start() == layers.end() {
        true => layers.start().to_string(),
        false => format!("{}-{}", layers.start(), layers.end()),
    }
}

impl fmt::Display for LayerList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (layers, by)) in self.0.iter().enumerate() {
            let before = if index == 0 { "" } else { ", " };
            write!(f, "{before}{}: {by}", range_text(layers))?;
        }
        Ok(())
    }
}

impl fmt::Display for Predict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::All(by) => by.fmt(f),
            Self::Layers(list) => list.fmt(f),
        }
    }
}

impl FromStr for Predict {
    type Err = TopologyError;

    /// `auto`, who predicts in all layers, or a list of layers as in `0-3: exact, 4-29: in-layer`.
    fn from_str(text: &str) -> Result<Self, TopologyError> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            name => match PredictBy::named(name) {
                Some(by) => Ok(Self::All(by)),
                None => LayerList::parse(name).map(Self::Layers).map_err(|problem| {
                    TopologyError::Predict {
                        text: text.to_owned(),
                        problem,
                    }
                }),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(text: &str) -> LayerList {
        match text.parse() {
            Ok(Predict::Layers(list)) => list,
            other => panic!("{text}: {other:?}"),
        }
    }

    fn problem(text: &str) -> String {
        text.parse::<Predict>().unwrap_err().to_string()
    }

    #[test]
    fn what_is_printed_is_read_back() {
        for (text, printed) in [
            ("auto", "auto"),
            (" in-layer", "in-layer"),
            ("ahead", "ahead"),
            ("both", "both"),
            ("exact", "exact"),
            ("2 - 4:both,0-1 : exact", "0-1: exact, 2-4: both"),
            ("0:exact", "0: exact"),
        ] {
            let predict: Predict = text.parse().unwrap();
            assert_eq!(predict.to_string(), printed);
            assert_eq!(predict, printed.parse().unwrap());
        }
    }

    #[test]
    fn a_list_names_every_layer_once() {
        use PredictBy::{Both, Exact, InLayer};
        let layers = [Exact, Exact, InLayer, Both, Both];
        let mixed = list("3-4: both, 0-1: exact, 2: in-layer");
        assert_eq!(mixed.of_model(5).unwrap(), layers);
        assert_eq!(LayerList::of(&layers), mixed);
        // neighbours that agree are still two entries
        let parts = list("0: exact, 1: exact");
        assert_eq!(parts.of_model(2).unwrap(), [Exact, Exact]);
        let refused = |text: &str, n| list(text).of_model(n).unwrap_err().to_string();
        for (text, n_layer, words) in [
            (
                "0-3: exact",
                5,
                "layer 4 is not named: name each layer of 0-4 once",
            ),
            ("0: exact, 3: both", 4, "layers 1-2 are not named"),
            ("1-3: exact", 4, "layer 0 is not named"),
            (
                "0-4: exact",
                4,
                "the model has no layer 4: name each layer of 0-3 once",
            ),
        ] {
            let error = refused(text, n_layer);
            assert!(error.contains(words), "{error}");
            assert!(error.contains(text), "{error}");
        }
    }

    #[test]
    fn wrong_lists_are_refused_with_cause_and_cure() {
        for (text, words) in [
            ("", "nothing predicts by \"\""),
            (
                "inlayer",
                "\"inlayer\": it is exact, in-layer, ahead or both",
            ),
            ("0-3: exakt", "nothing predicts by \"exakt\""),
            ("0-3: auto", "nothing predicts by \"auto\""),
            ("exact, 4-29: in-layer", "\"\" are no layers: write as in"),
            ("3-0: exact", "\"3-0\" are no layers"),
            ("+1: exact", "\"+1\" are no layers"),
            ("0-99999999999: exact", "are no layers"),
            (
                "0-3: exact, 2-4: both",
                "layer 2 is named twice: name it once",
            ),
            ("0-3: exact,", "nothing predicts by \"\""),
        ] {
            let error = problem(text);
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
