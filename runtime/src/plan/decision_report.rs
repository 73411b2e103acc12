//! Who is to predict in which layer, as text and as JSON.

use std::fmt::Write;

use pi_topology::PredictBy;
use serde_json::{Value, json};

use super::predicted::{Decision, WayCost};

impl Decision {
    /// What was decided, why, and how a run uses it.
    pub(super) fn write(&self, text: &mut String, mode: &str) -> std::fmt::Result {
        let Self { list, token_ms, .. } = self;
        let same = match self.is_exact() {
            true => ", which is --sparsity exact",
            false => "",
        };
        writeln!(text, "{mode}: fastest here, by layer: {list}{same}")?;
        let tokens = self.each(|way| Some(way.token_ms));
        writeln!(
            text,
            "{mode}: because a token takes by {tokens} in all layers, measured in turns, and {token_ms:.3} ms so"
        )?;
        let layer = self.typical_layer;
        let layers = self.each(|way| way.layer_ms[layer]);
        writeln!(
            text,
            "{mode}: and a typical layer ({layer}) by {layers}; exact loses nothing, so others have to save 2 % of it; ahead \
             alone costs fidelity and has to be asked for"
        )?;
        writeln!(
            text,
            "{mode}: runs do so with --predictor \"{list}\", or with a topology file (--topology) that says:"
        )?;
        writeln!(text, "\n{}", self.toml())
    }

    /// The ways that have such a figure.
    fn each(&self, ms: impl Fn(&WayCost) -> Option<f64>) -> String {
        let ways = self.ways.iter().filter_map(|way| Some((way.by, ms(way)?)));
        let ways: Vec<String> = ways.map(|(by, ms)| format!("{by} {ms:.3} ms")).collect();
        ways.join(", ")
    }

    /// The same.
    pub(super) fn json(&self) -> Value {
        let way = |way: &WayCost| {
            json!({
                "by": way.by.name(),
                "ms_per_token": way.token_ms,
                "ms_per_layer": way.layer_ms,
            })
        };
        json!({
            "predict": self.list.to_string(),
            "ms_per_token": self.token_ms,
            "typical_layer": self.typical_layer,
            "ways": self.ways.iter().map(way).collect::<Vec<_>>(),
            "is_exact": self.is_exact(),
            "toml": self.toml(),
        })
    }

    /// Whether nothing is predicted.
    fn is_exact(&self) -> bool {
        let n_layer = self.ways[0].layer_ms.len();
        let kinds = self.list.of_model(n_layer).unwrap_or_default();
        kinds.iter().all(|by| *by == PredictBy::Exact)
    }
}
