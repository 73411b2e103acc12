//! The stages of a preparation, and what of a sidecar is whose.

use crate::sidecar::{Profile, TWO_BIT_BIAS};

/// A stage of a preparation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Counts how often each neuron fires.
    Profile,
    /// Fits predictors of what fires, and their thresholds.
    Predictors,
    /// Finds thresholds that keep the wanted quality, for the predictors that are there, or for gates that never close.
    Thresholds,
    /// Fits the sketch of the output head.
    Head,
    /// Says on held-out text what it all costs and gives.
    Report,
}

impl Stage {
    /// All of them, in the order in which they run and in which their sections are written.
    pub const ALL: [Stage; 5] = [
        Stage::Profile,
        Stage::Predictors,
        Stage::Thresholds,
        Stage::Head,
        Stage::Report,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Profile => "profile",
            Stage::Predictors => "predictors",
            Stage::Thresholds => "thresholds",
            Stage::Head => "head",
            Stage::Report => "report",
        }
    }

    /// Whether the key or tensor `name` of a sidecar is made by this stage.
    pub fn owns(self, name: &str) -> bool {
        let tensor = name
            .strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'))
            .map_or("", |(_, tensor)| tensor);
        let is_bias = matches!(tensor, "sketch.bias" | TWO_BIT_BIAS | "gate_floor");
        match self {
            Stage::Profile => Profile::owns(name),
            Stage::Predictors => {
                let of_tensor = tensor.starts_with("ahead_") || tensor.starts_with("sketch");
                name.starts_with("sparse.ahead.")
                    || name == "sparse.sketch.kind"
                    || (of_tensor && !is_bias)
            }
            Stage::Thresholds => {
                let is_key =
                    name.starts_with("sparse.threshold.") || name == "sparse.sketch.target";
                is_key || is_bias || tensor == "threshold"
            }
            Stage::Head => name.starts_with("sparse.head.") || name.starts_with("head_sketch."),
            Stage::Report => name.starts_with("sparse.report."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_a_sidecar_is_one_stage_s() {
        let names = [
            ("sparse.profile.n_tokens", Stage::Profile),
            ("blk.3.ffn_counts", Stage::Profile),
            ("blk.3.ffn_down_norm", Stage::Profile),
            ("sparse.ahead.kind", Stage::Predictors),
            ("sparse.sketch.kind", Stage::Predictors),
            ("blk.3.ahead_a.weight", Stage::Predictors),
            ("blk.3.ahead_a.bias", Stage::Predictors),
            ("blk.3.ahead_b.weight", Stage::Predictors),
            ("blk.3.sketch_a.weight", Stage::Predictors),
            ("blk.3.ahead_b.bias", Stage::Predictors),
            ("blk.12.sketch.bias", Stage::Thresholds),
            ("blk.3.gate_floor", Stage::Thresholds),
            ("blk.3.threshold", Stage::Thresholds),
            ("sparse.sketch.target", Stage::Thresholds),
            ("sparse.threshold.criterion", Stage::Thresholds),
            ("sparse.head.rank", Stage::Head),
            ("head_sketch.a.weight", Stage::Head),
            ("sparse.report.perplexity", Stage::Report),
        ];
        for (name, owner) in names {
            let owners: Vec<Stage> = Stage::ALL
                .into_iter()
                .filter(|stage| stage.owns(name))
                .collect();
            assert_eq!(owners, [owner], "{name}");
        }
        let header = ["sparse.version", "sparse.model_hash", "general.name"];
        assert!(
            header
                .iter()
                .all(|name| !Stage::ALL.iter().any(|stage| stage.owns(name)))
        );
    }
}
