//! Who predicts in which layer: each way measured in all layers, and the fastest one of each layer that keeps the model's
//! fidelity.

use pi_topology::{LayerList, Predict, PredictBy};

use super::costs::Costs;
use super::forecast::neurons_ns;
use super::{Mode, Planning};
use crate::error::RuntimeError;
use crate::model::Sparsity;
use crate::model::predicting::{lacks, predicts};
use crate::model::sparsity::SparsityPlan;
use crate::sidecar::{LayerPredictors, Sidecar};

/// What a way that loses something, or needs more, has to save of a layer's time before it is taken: about what two
/// rehearsals differ by.
const SAVED_SHARE_MIN: f64 = 0.02;

/// Times that each way is rehearsed, in turns with the others.
const ROUNDS: usize = 3;

/// One way to predict in all layers that can be predicted so.
#[derive(Debug)]
pub(super) struct Way {
    by: PredictBy,
    predictors: Vec<LayerPredictors>,
    /// Which layers can; the others have all their gates computed.
    possible: Vec<bool>,
}

/// What a way costs.
#[derive(Debug, Clone, PartialEq)]
pub struct WayCost {
    /// Who predicts.
    pub by: PredictBy,
    /// Each layer that can be predicted so, ms; none: it cannot.
    pub layer_ms: Vec<Option<f64>>,
    /// A token that has it in all layers that can.
    pub token_ms: f64,
}

impl WayCost {
    /// With what each layer takes, and what is no layer's.
    fn new(way: &Way, layers_ms: &[f64], outside_ms: f64) -> Self {
        let possible = way.possible.iter().zip(layers_ms);
        Self {
            by: way.by,
            token_ms: layers_ms.iter().sum::<f64>() + outside_ms,
            layer_ms: possible
                .map(|(possible, &ms)| possible.then_some(ms))
                .collect(),
        }
    }
}

/// Of each layer the median of some rounds.
fn medians(rounds: &[Vec<f64>]) -> Vec<f64> {
    let of_layer = |layer: usize| {
        let mut all: Vec<f64> = rounds.iter().map(|round| round[layer]).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    (0..rounds[0].len()).map(of_layer).collect()
}

/// Who is to predict in which layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// Layer by layer.
    pub list: LayerList,
    /// A token so, ms.
    pub token_ms: f64,
    /// What was measured: all layers `exact`, and the others.
    pub ways: Vec<WayCost>,
    /// The layer with as many layers above it as below it, by what they take with sketches.
    pub typical_layer: usize,
}

impl Decision {
    /// `ways` begin with [`PredictBy::Exact`], which is possible everywhere.
    fn new(ways: Vec<WayCost>) -> Self {
        let n_layer = ways[0].layer_ms.len();
        let mut token_ms = ways[0].token_ms;
        let kinds = (0..n_layer).map(|layer| {
            let of = |way: &WayCost| Some((way.by, way.layer_ms[layer]?));
            let (exact, exact_ms) = of(&ways[0]).expect("all gates can be computed");
            let (mut best, mut best_ms) = (exact, exact_ms);
            for (by, ms) in ways[1..].iter().filter_map(of) {
                if ms < best_ms * (1.0 - SAVED_SHARE_MIN) {
                    (best, best_ms) = (by, ms);
                }
            }
            token_ms -= exact_ms - best_ms;
            best
        });
        let kinds: Vec<PredictBy> = kinds.collect();
        Self {
            list: LayerList::of(&kinds),
            token_ms,
            typical_layer: typical_layer(&ways),
            ways,
        }
    }

    /// The lines of a topology file that make runs use it.
    pub fn toml(&self) -> String {
        let mut config = pi_topology::TopologyConfig::default();
        config.sparsity.predict = Predict::Layers(self.list.clone());
        config.to_short_toml()
    }
}

/// The layer in the middle of all by time, where sketches work if there are some.
fn typical_layer(ways: &[WayCost]) -> usize {
    let by = ways.get(1).unwrap_or(&ways[0]);
    let ms = |layer: usize| {
        by.layer_ms[layer]
            .or(ways[0].layer_ms[layer])
            .unwrap_or(0.0)
    };
    let mut layers: Vec<usize> = (0..by.layer_ms.len()).collect();
    layers.sort_by(|&a, &b| ms(a).total_cmp(&ms(b)));
    layers.get(layers.len() / 2).copied().unwrap_or(0)
}

impl Planning<'_> {
    /// `predicted` as a run has it, and the ways among which the plan can choose where nobody has chosen. None without
    /// predictors.
    ///
    /// # Errors
    /// A bad sidecar, or one without what is asked for.
    pub(super) fn predicted(
        &self,
        sidecar: Option<&Sidecar>,
        mut sparsity: SparsityPlan,
    ) -> Result<Option<Mode>, RuntimeError> {
        let Some(sidecar) = sidecar else {
            return Ok(None);
        };
        let Some(all) = sidecar.predictors(self.hyper, self.tensors)? else {
            return Ok(None);
        };
        let asked = &self.options.predicting;
        let predictors = asked.choose(sidecar, &all)?;
        sparsity.predicts = predicts(&predictors);
        // looking ahead alone costs fidelity: it is for who asks for it
        let wanted = match (&asked.by, self.gpus.is_empty()) {
            (Predict::Auto, true) => vec![PredictBy::Exact, PredictBy::InLayer, PredictBy::Both],
            _ => vec![],
        };
        let way = |by: PredictBy| {
            let possible: Vec<bool> = all.iter().map(|layer| lacks(layer, by).is_none()).collect();
            let kept = |(layer, possible): (&LayerPredictors, &bool)| match possible {
                true => asked.kept(layer, by),
                false => LayerPredictors::default(),
            };
            Way {
                by,
                predictors: all.iter().zip(&possible).map(kept).collect(),
                possible,
            }
        };
        let ways = wanted.into_iter().map(way).filter(|way| {
            let prefetched = way.by != PredictBy::Both || asked.prefetch;
            prefetched && way.possible.contains(&true)
        });
        Ok(Some(Mode {
            sparsity,
            ways: ways.collect(),
            predictors: Some(predictors),
        }))
    }

    /// Measures the mode's ways in turns, and decides; none where there is nothing to decide. `costs` are those of the mode
    /// itself: what does not depend on who predicts is theirs.
    ///
    /// # Errors
    /// As the mode's own rehearsal.
    pub(super) fn decide(
        &self,
        mode: &Mode,
        costs: &Costs,
    ) -> Result<Option<Decision>, RuntimeError> {
        if mode.ways.len() < 2 {
            return Ok(None);
        }
        let mut rounds: Vec<Vec<Vec<f64>>> = vec![Vec::new(); mode.ways.len()];
        for _ in 0..ROUNDS {
            for (way, rounds) in mode.ways.iter().zip(&mut rounds) {
                let of_way = self.measure(&mode.sparsity, Some(&way.predictors))?;
                rounds.push(self.layers_ms(mode, way, (costs, &of_way)));
            }
        }
        let outside_ms = (costs.head_ns + costs.other_ns) / 1e6;
        let ways = mode.ways.iter().zip(rounds);
        let ways = ways.map(|(way, rounds)| WayCost::new(way, &medians(&rounds), outside_ms));
        Ok(Some(Decision::new(ways.collect())))
    }

    /// Each layer with a way, ms, by the costs of the mode and of the way.
    fn layers_ms(&self, mode: &Mode, way: &Way, (own, costs): (&Costs, &Costs)) -> Vec<f64> {
        let layers = self.layer_bytes(&mode.sparsity, Some(&way.predictors));
        let own_layers = self.layer_bytes(&mode.sparsity, mode.predictors.as_deref());
        let both = layers.iter().zip(&own_layers).enumerate();
        both.map(|(index, (layer, own_layer))| {
            let attention_ns = own.of(&own_layer.class).attention_ns;
            let neurons_ns = neurons_ns(costs, layer, &self.expected, index);
            (attention_ns + neurons_ns) / 1e6
        })
        .collect()
    }

    /// What is assumed of candidates, where the sidecar does not say.
    pub(super) fn assumed_candidates(&self, mode: &Mode) -> Option<String> {
        if mode.sparsity.mode != Sparsity::Predicted || self.expected.measured {
            return None;
        }
        let shares = self.expected.shares.iter().map(|shares| shares.candidates);
        let mean = shares.sum::<f64>() / self.expected.shares.len().max(1) as f64;
        Some(format!(
            "{:.0} % candidates are assumed: the sidecar does not say",
            mean * 100.0
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use PredictBy::{Both, Exact, InLayer};

    fn way(by: PredictBy, layer_ms: &[Option<f64>]) -> WayCost {
        let sum: f64 = layer_ms.iter().flatten().sum();
        WayCost {
            by,
            layer_ms: layer_ms.to_vec(),
            token_ms: sum + 1.0,
        }
    }

    #[test]
    fn each_layer_gets_what_is_fastest_there() {
        let exact = way(Exact, &[Some(4.0), Some(4.0), Some(4.0), Some(4.0)]);
        let own = way(InLayer, &[Some(5.0), Some(3.0), Some(3.0), None]);
        let both = way(Both, &[None, Some(2.0), Some(3.5), None]);
        let decision = Decision::new(vec![exact, own, both]);
        assert_eq!(decision.list, LayerList::of(&[Exact, Both, InLayer, Exact]));
        assert!((decision.token_ms - (4.0 + 2.0 + 3.0 + 4.0 + 1.0)).abs() < 1e-12);
        assert_eq!(
            decision.toml(),
            "[sparsity]\npredict = \"0: exact, 1: both, 2: in-layer, 3: exact\"\n"
        );
    }

    #[test]
    fn what_loses_something_has_to_save_more_than_noise() {
        let exact = way(Exact, &[Some(4.0), Some(4.0)]);
        let own = way(InLayer, &[Some(3.99), Some(3.0)]);
        let both = way(Both, &[None, Some(2.99)]);
        let decision = Decision::new(vec![exact, own, both]);
        assert_eq!(decision.list, LayerList::of(&[Exact, InLayer]));
        assert_eq!(decision.ways.len(), 3);
    }

    #[test]
    fn of_rounds_the_median_counts() {
        let rounds = [vec![3.0, 9.0], vec![1.0, 5.0], vec![2.0, 4.0]];
        assert_eq!(medians(&rounds), [2.0, 5.0]);
    }

    #[test]
    fn the_typical_layer_is_the_one_in_the_middle() {
        let exact = way(Exact, &[Some(4.0); 3]);
        let own = way(InLayer, &[Some(9.0), Some(1.0), Some(5.0)]);
        assert_eq!(Decision::new(vec![exact, own]).typical_layer, 2);
    }
}
