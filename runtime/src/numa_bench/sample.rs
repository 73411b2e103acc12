//! One setting in one round: the model opened, warmed up, and timed.

use std::collections::BTreeMap;

use pi_actors::messages::ActorId;
use pi_actors::trace::TraceBounds;
use pi_topology::{Plan, Residence};

use super::median;
use crate::bench::token_source::TEXT;
use crate::bench::{BenchTest, Runner, TokenSource};
use crate::error::RuntimeError;
use crate::plan::samples::{TokenSample, token_samples};
use crate::session::{LoadedModel, ModelOptions, Silent};
use crate::tokenizer::EncodeOptions;

/// Most memory of a node's recording.
const TRACE_BYTES: usize = 128 << 20;

/// What a round gave.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Tokens decoded in a second.
    pub tokens_per_s: f64,
    /// Weights and cache that each node's team read, 10⁹ bytes per second.
    pub node_gb_per_s: Vec<f64>,
    /// Share of the weights' bytes that lie on another NUMA node than the team that has them; none where nobody knows.
    pub remote_share: Option<f64>,
    /// A layer's part of a token in which node 0's executor computed nothing: messages, and waiting for other nodes, µs.
    pub join_wait_us: f64,
}

impl Sample {
    /// Opens the model under `plan`, decodes `n_gen` tokens of a text to warm up, and again for the clock.
    ///
    /// # Errors
    /// The model, or what the machine refuses.
    pub fn measure(
        options: &ModelOptions,
        plan: &Plan,
        n_gen: usize,
    ) -> Result<Self, RuntimeError> {
        let options = ModelOptions {
            trace: Some(TraceBounds {
                n_steps: 2 * n_gen + 2,
                node_bytes_max: TRACE_BYTES,
            }),
            ..options.clone()
        };
        let model = LoadedModel::open(&options, plan, &Silent)?;
        let source = TokenSource::Text(model.tokenizer.encode(TEXT, EncodeOptions::TEXT)?);
        let test = BenchTest {
            n_prompt: 0,
            n_gen,
            n_depth: 0,
            n_threads: plan.n_threads(),
        };
        let measured = Runner::new(&model, &source).run(test, 1)?;
        model.verify_again()?;
        let seconds = measured.samples.ns[0].max(1) as f64 / 1e9;
        let events = model.engine.trace().map(|trace| trace.read());
        let tokens = token_samples(&events.unwrap_or_default(), model.hyper.n_layer, 0);
        // both times through the text the same was read
        let node_gb_per_s = node_bytes(&model, plan.nodes.len())?
            .into_iter()
            .map(|bytes| bytes as f64 / 2.0 / seconds / 1e9);
        Ok(Self {
            tokens_per_s: n_gen as f64 / seconds,
            node_gb_per_s: node_gb_per_s.collect(),
            remote_share: remote_share(&model.residence, plan),
            join_wait_us: join_wait_us(&tokens),
        })
    }
}

/// What the nodes' actors read since the engine started.
fn node_bytes(model: &LoadedModel, n_nodes: usize) -> Result<Vec<u64>, RuntimeError> {
    let mut bytes = vec![0; n_nodes];
    for counted in model.engine.counters()? {
        if let ActorId::ColdLayer { node, .. } = counted.actor {
            bytes[node] += counted.counters.weight_bytes + counted.counters.kv_bytes;
        }
    }
    Ok(bytes)
}

fn remote_share(residence: &Residence, plan: &Plan) -> Option<f64> {
    let nodes = residence.nodes.as_ref()?;
    let sum = |numa_bytes: &BTreeMap<usize, usize>| numa_bytes.values().sum::<usize>();
    let mut all_bytes = 0;
    let mut remote_bytes = 0;
    for (found, team) in nodes.iter().zip(&plan.nodes) {
        let own = found.numa_bytes.get(&team.numa?).copied().unwrap_or(0);
        all_bytes += sum(&found.numa_bytes);
        remote_bytes += sum(&found.numa_bytes) - own;
    }
    (all_bytes > 0).then(|| remote_bytes as f64 / all_bytes as f64)
}

/// The median token's, over its layers; 0 where none was recorded whole.
fn join_wait_us(tokens: &[TokenSample]) -> f64 {
    let waits: Vec<f64> = tokens
        .iter()
        .map(|token| {
            let ns: u64 = token.layers.iter().map(|layer| layer.waiting_ns()).sum();
            ns as f64 / token.layers.len().max(1) as f64 / 1e3
        })
        .collect();
    match waits.is_empty() {
        true => 0.0,
        false => median(waits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::samples::LayerSample;
    use pi_topology::{HugePages, NodePlan, NodeResidence};

    fn plan(numas: &[Option<usize>]) -> Plan {
        let node = |&numa: &Option<usize>| NodePlan {
            numa,
            cpus: vec![0],
        };
        Plan::of_nodes(numas.iter().map(node).collect(), HugePages::Off)
    }

    #[test]
    fn bytes_elsewhere_are_remote() {
        let on = |bytes: &[(usize, usize)]| NodeResidence {
            numa_bytes: bytes.iter().copied().collect(),
            absent_bytes: 7,
        };
        let found = |nodes| Residence {
            nodes: Some(nodes),
            huge_pages: None,
            problem: None,
        };
        let two = plan(&[Some(0), Some(1)]);
        let halves = found(vec![on(&[(0, 50), (1, 50)]), on(&[(0, 50), (1, 50)])]);
        assert_eq!(remote_share(&halves, &two), Some(0.5));
        let home = found(vec![on(&[(0, 80)]), on(&[(1, 20)])]);
        assert_eq!(remote_share(&home, &two), Some(0.0));
        assert_eq!(remote_share(&home, &plan(&[Some(0), Some(0)])), Some(0.2));
        // nobody knows
        assert_eq!(remote_share(&home, &plan(&[None, Some(1)])), None);
        let unknown = Residence {
            nodes: None,
            huge_pages: None,
            problem: Some(String::new()),
        };
        assert_eq!(remote_share(&unknown, &two), None);
    }

    #[test]
    fn a_layers_wait_is_what_node_0_did_not_compute() {
        let token = |total_ns: u64| TokenSample {
            position: 0,
            total_ns: 0,
            layers: vec![
                LayerSample {
                    attention_ns: 1000,
                    ffn_ns: 2000,
                    device_ns: 500,
                    leader_ns: 3500,
                    total_ns,
                    active: 0,
                };
                2
            ],
            head_ns: 0,
            nodes: vec![],
        };
        let waits = [5000, 4500, 3000].map(token);
        assert_eq!(join_wait_us(&waits), 1.0);
        assert_eq!(join_wait_us(&[]), 0.0);
    }
}
