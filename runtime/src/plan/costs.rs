//! What a rehearsal costs on the planned threads: each part of a layer, of the head, and of a token.

use std::time::Duration;

use pi_actors::faults::Faults;
use pi_actors::trace::TraceBounds;
use pi_actors::{ActorError, Engine, EngineOptions, Feed, Feeder, LogitsWanted, Next, Teams};
use pi_topology::{NodeRooms, Plan};
use serde::Serialize;

use super::rehearsal::{Class, Rehearsal};
use super::rows::N_TOKENS;
use super::samples::{LayerSample, TokenSample, token_samples};
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::room::fitting_loader;
use crate::model::shares::Division;
use crate::model::{Loader, ModelError};
use crate::session::ModelOptions;

/// About how long a rehearsal decodes.
const MEASURE: Duration = Duration::from_millis(800);

/// Fewest and most tokens of a rehearsal: some of each, and what `bench` decodes by default.
const N_DECODED: (usize, usize) = (6 * N_TOKENS, 20 * N_TOKENS);

/// Tokens decoded before anything counts.
const N_WARM_UP: usize = 2 * N_TOKENS;

/// Positions that a rehearsal needs behind its depth.
pub(super) const N_POSITIONS: usize = N_WARM_UP + N_DECODED.1;

/// Longest wait for an actor.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// Most memory of the rehearsal's recording.
const TRACE_BYTES: usize = 256 << 20;

/// What a layer of a class takes, ns.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct LayerCost {
    /// Projections, attention, and its output.
    pub attention_ns: f64,
    /// The FFN without candidates and active neurons: gates or scores, and what threads wait for one another.
    pub ffn_ns: f64,
    /// Each candidate more, where predictors name them.
    pub candidate_ns: f64,
    /// Each active neuron more.
    pub neuron_ns: f64,
    /// Norms, activations and sums.
    pub device_ns: f64,
    /// Messages, and waiting for other nodes.
    pub hand_off_ns: f64,
}

/// What was measured of a mode.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// By class of layer.
    pub classes: Vec<(Class, LayerCost)>,
    /// The output head.
    pub head_ns: f64,
    /// Embedding, norm, sampling.
    pub other_ns: f64,
    /// FFNs of each node: ns, and active neurons, of one token of the rehearsal.
    pub nodes: Vec<(f64, f64)>,
    /// Slots and working memory of each node.
    pub working_bytes: Vec<u64>,
    /// Layers rehearsed.
    pub n_layer: usize,
    /// Tokens that count.
    pub n_tokens: usize,
}

impl Costs {
    /// Of a layer's class.
    ///
    /// # Panics
    /// When no such layer was rehearsed.
    pub(super) fn of(&self, class: &Class) -> LayerCost {
        let found = self.classes.iter().find(|(known, _)| known == class);
        found.expect("a layer of each class is rehearsed").1
    }
}

/// Runs `rehearsal` on the threads of `plan`, behind `depth` tokens in the cache.
///
/// # Errors
/// Memory or threads that cannot be had.
pub(super) fn measure(
    rehearsal: &Rehearsal,
    file: &GgufFile,
    options: &ModelOptions,
    (plan, rooms): (&Plan, &NodeRooms),
    depth: usize,
) -> Result<Costs, RuntimeError> {
    let in_model = |source: ModelError| RuntimeError::Model {
        path: options.path.clone(),
        source,
    };
    let Rehearsal {
        hyper,
        tensors,
        sparsity,
        predictors,
        ..
    } = rehearsal;
    let n_ctx = options.n_ctx;
    let predictors = predictors.as_deref();
    let loader_of = |division: &Division| {
        Loader::predicted(
            file, hyper, tensors, sparsity, predictors, division, None, n_ctx,
        )
        .map_err(in_model)
    };
    let loader = fitting_loader(plan, sparsity, rooms, options.kv_type, loader_of)?;
    loader.held_bytes(options.kv_type).check(plan, rooms)?;
    let teams = Teams::start(plan)?;
    let weights = loader.load(&teams, plan, &|_| {}).map_err(in_model)?;
    let engine = Engine::start(
        teams,
        weights,
        EngineOptions {
            cpu: options.cpu,
            kv_type: options.kv_type,
            n_ubatch: options.n_batch,
            wait_limit: WAIT_LIMIT,
            faults: Faults::default(),
            trace: Some(TraceBounds {
                n_steps: depth.div_ceil(options.n_batch) + N_POSITIONS + 2,
                node_bytes_max: TRACE_BYTES,
            }),
            tap: None,
        },
    )?;
    if depth > 0 {
        run(&engine, Tokens::prompt(depth))?;
    }
    let room = n_ctx - depth;
    let start = std::time::Instant::now();
    run(&engine, Tokens::decode(depth, N_WARM_UP.min(room / 2)))?;
    let each = start.elapsed() / N_WARM_UP as u32;
    let from = depth + N_WARM_UP.min(room / 2);
    let n = (MEASURE.as_nanos() / each.as_nanos().max(1)) as usize;
    let n = n.clamp(N_DECODED.0, N_DECODED.1).min(n_ctx - from);
    run(&engine, Tokens::decode(from, n))?;
    let events = engine.trace().map(|trace| trace.read()).unwrap_or_default();
    let samples = token_samples(&events, hyper.n_layer, from);
    let classes = Class::all(&tensors.layers, predictors);
    let working = engine.working_bytes().into_iter();
    let candidates = &rehearsal.candidates;
    let mut costs = reduce(&steady(samples), &classes, candidates, plan.nodes.len());
    costs.working_bytes = working.map(|bytes| bytes as u64).collect();
    costs.head_ns *= rehearsal.head_scale;
    Ok(costs)
}

fn run(engine: &Engine, tokens: Tokens) -> Result<(), ActorError> {
    engine.run(tokens)?.outcome
}

/// Feeds the rehearsal's tokens in turn.
struct Tokens {
    tokens: Vec<u32>,
    position: usize,
    given: usize,
    at_once: bool,
}

impl Tokens {
    fn prompt(n: usize) -> Self {
        Self {
            at_once: true,
            ..Self::decode(0, n)
        }
    }

    /// The token at position p is p modulo [`N_TOKENS`].
    fn decode(position: usize, n: usize) -> Self {
        Self {
            tokens: (position..position + n)
                .map(|position| (position % N_TOKENS) as u32)
                .collect(),
            position,
            given: 0,
            at_once: false,
        }
    }
}

impl Feeder for Tokens {
    fn next(&mut self) -> Next<'_> {
        let from = self.given;
        if from == self.tokens.len() {
            return Next::Done;
        }
        self.given = if self.at_once {
            self.tokens.len()
        } else {
            from + 1
        };
        let logits = if self.at_once {
            LogitsWanted::None
        } else {
            LogitsWanted::Last
        };
        Next::Feed(Feed {
            tokens: &self.tokens[from..self.given],
            position: self.position + from,
            logits,
        })
    }

    fn logits(&mut self, _position: usize, _logits: &[f32]) {}
}

/// Of each of the rehearsal's tokens the middle half by time: without those that something else interrupted.
fn steady(samples: Vec<TokenSample>) -> Vec<TokenSample> {
    let mut kinds: Vec<Vec<TokenSample>> = vec![Vec::new(); N_TOKENS];
    for sample in samples {
        kinds[sample.position % N_TOKENS].push(sample);
    }
    let middle = kinds.into_iter().flat_map(|mut kind| {
        kind.sort_by_key(|sample| sample.total_ns);
        let n = kind.len();
        kind.drain(n - n / 4..);
        kind.drain(..n / 4);
        kind
    });
    middle.collect()
}

/// `candidates` are those of each layer.
fn reduce(samples: &[TokenSample], classes: &[Class], candidates: &[f64], n_nodes: usize) -> Costs {
    let mut found: Vec<(Class, LayerCost)> = Vec::new();
    for class in classes {
        if found.iter().any(|(known, _)| known == class) {
            continue;
        }
        let of_class = (0..classes.len()).filter(|&layer| &classes[layer] == class);
        let layers: Vec<OfLayer> = of_class
            .map(|layer| OfLayer {
                candidates: if class.is_predicted() {
                    candidates[layer]
                } else {
                    0.0
                },
                samples: samples.iter().map(|sample| sample.layers[layer]).collect(),
            })
            .collect();
        found.push((class.clone(), layer_cost(&layers)));
    }
    let mean = |value: &dyn Fn(&TokenSample) -> u64| mean(samples.iter().map(value));
    Costs {
        classes: found,
        head_ns: mean(&|sample| sample.head_ns),
        other_ns: mean(&|sample| sample.other_ns()),
        nodes: (0..n_nodes)
            .map(|n| (mean(&|s| s.nodes[n].0), mean(&|s| s.nodes[n].1)))
            .collect(),
        working_bytes: vec![],
        n_layer: classes.len(),
        n_tokens: samples.len(),
    }
}

/// A layer in all tokens that count.
struct OfLayer {
    /// Neurons that its predictors name.
    candidates: f64,
    samples: Vec<LayerSample>,
}

fn mean(values: impl ExactSizeIterator<Item = u64>) -> f64 {
    let n = values.len().max(1);
    values.sum::<u64>() as f64 / n as f64
}

/// The costs of layers of a class. What a neuron costs is told by tokens of one layer that activate more and fewer, what a
/// candidate costs by layers that have more and fewer.
fn layer_cost(layers: &[OfLayer]) -> LayerCost {
    let all = || layers.iter().flat_map(|layer| &layer.samples);
    let of = |value: fn(&LayerSample) -> u64| {
        let values: Vec<u64> = all().map(value).collect();
        mean(values.into_iter())
    };
    let computed = of(|layer| layer.attention_ns + layer.ffn_ns + layer.device_ns);
    let neuron_ns = slope_within(layers);
    let rests = layers.iter().map(|layer| {
        let (active, ns) = centre(&layer.samples);
        (layer.candidates, (ns - neuron_ns * active).max(0.0))
    });
    let rests: Vec<(f64, f64)> = rests.collect();
    let (ffn_ns, candidate_ns) = line(rests.into_iter());
    LayerCost {
        attention_ns: of(|layer| layer.attention_ns),
        ffn_ns,
        candidate_ns,
        neuron_ns,
        device_ns: of(|layer| layer.device_ns),
        // what is neither: queues, and waiting for other nodes
        hand_off_ns: (of(|layer| layer.total_ns) - computed).max(0.0),
    }
}

/// Means of active neurons and of the FFN's ns.
fn centre(samples: &[LayerSample]) -> (f64, f64) {
    let active = mean(samples.iter().map(|sample| u64::from(sample.active)));
    (active, mean(samples.iter().map(|sample| sample.ffn_ns)))
}

/// What an active neuron more takes, ns, by tokens of the same layer; not below 0, nor more than the FFN.
fn slope_within(layers: &[OfLayer]) -> f64 {
    let (mut xx, mut xy, mut x, mut y) = (0.0, 0.0, 0.0, 0.0);
    for layer in layers {
        let (mean_x, mean_y) = centre(&layer.samples);
        for sample in &layer.samples {
            let dx = f64::from(sample.active) - mean_x;
            xx += dx * dx;
            xy += dx * (sample.ffn_ns as f64 - mean_y);
        }
        (x, y) = (x + mean_x, y + mean_y);
    }
    let slope = if xx > 0.0 { (xy / xx).max(0.0) } else { 0.0 };
    if slope * x > y { y / x } else { slope }
}

/// Least squares y = a + b·x, neither below 0.
fn line(points: impl Iterator<Item = (f64, f64)> + Clone) -> (f64, f64) {
    let n = points.clone().count().max(1) as f64;
    let sum = |f: fn((f64, f64)) -> f64| points.clone().map(f).sum::<f64>();
    let (x, y) = (sum(|(x, _)| x) / n, sum(|(_, y)| y) / n);
    let xx: f64 = points.clone().map(|p| (p.0 - x) * (p.0 - x)).sum();
    let xy: f64 = points.map(|p| (p.0 - x) * (p.1 - y)).sum();
    let slope = if xx > 0.0 { (xy / xx).max(0.0) } else { 0.0 };
    if slope * x > y {
        return (0.0, y / x);
    }
    (y - slope * x, slope)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_found_and_never_below_zero() {
        let points = [(0.0, 5.0), (10.0, 25.0), (20.0, 45.0)];
        let (a, b) = line(points.into_iter());
        assert!((a - 5.0).abs() < 1e-9 && (b - 2.0).abs() < 1e-9, "{a} {b}");
        assert_eq!(line([(3.0, 7.0), (3.0, 9.0)].into_iter()), (8.0, 0.0));
        assert_eq!(line([(1.0, 9.0), (2.0, 3.0)].into_iter()), (6.0, 0.0));
        let (a, b) = line([(1.0, 0.0), (3.0, 10.0)].into_iter());
        assert_eq!((a, b), (0.0, 2.5));
    }

    #[test]
    fn costs_of_neurons_and_candidates_are_told_apart() {
        // 1000 + 3 a candidate + 5 an active neuron
        let layer = |candidates: u32, actives: [u32; 2]| OfLayer {
            candidates: f64::from(candidates),
            samples: actives
                .map(|active| LayerSample {
                    ffn_ns: u64::from(1000 + 3 * candidates + 5 * active),
                    active,
                    ..LayerSample::default()
                })
                .to_vec(),
        };
        let near = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-6, "{found}");
        let cost = layer_cost(&[layer(100, [20, 40]), layer(300, [60, 120])]);
        near(cost.neuron_ns, 5.0);
        near(cost.candidate_ns, 3.0);
        near(cost.ffn_ns, 1000.0);
        // layers alike say nothing of candidates: all is in what a layer takes anyway
        let cost = layer_cost(&[layer(100, [20, 40]), layer(100, [20, 40])]);
        near(cost.neuron_ns, 5.0);
        near(cost.ffn_ns + cost.candidate_ns * 100.0, 1300.0);
    }

    #[test]
    fn interrupted_tokens_do_not_count() {
        let sample = |position: usize, total_ns: u64| TokenSample {
            position,
            total_ns,
            layers: vec![],
            head_ns: 0,
            nodes: vec![],
        };
        // token 0 at positions 0, 8, 16, 24: one takes a second
        let samples = vec![
            sample(0, 100),
            sample(8, 1_000_000_000),
            sample(16, 110),
            sample(24, 90),
        ];
        let kept: Vec<u64> = steady(samples).iter().map(|s| s.total_ns).collect();
        assert_eq!(kept, [100, 110]);
    }
}
