//! A plan as text and as JSON.

use std::fmt::Write;
use std::ops::Range;
use std::path::PathBuf;

use pi_topology::Proportion;
use pi_topology::placement::ColdShare;
use serde_json::{Value, json};

use super::costs::{Costs, LayerCost};
use super::forecast::{Part, PartForecast};
use super::gpu::{GpuForecast, PlannedGpu};
use super::gpu_report::{forecast_json, gpu_json};
use super::link::LinkFigures;
use super::loads::FrequencySource;
use super::memory::NodeMemory;
use super::predicted::Decision;
use super::{Placed, SparsityPlan};
use crate::topology_view::NEURONS_BY_THREADS;

/// A part that reads at least this share of what the threads can read is bound by memory.
const MEMORY_BOUND: f64 = 0.85;

/// What the loader's division of neurons may cost before it is worth a line, ms a token.
const LOST_MS_MIN: f64 = 0.05;

/// The plan of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The model's name.
    pub model: String,
    /// Its file.
    pub path: PathBuf,
    /// Threads of each node.
    pub threads: Vec<usize>,
    /// What the nodes' shares are in proportion to.
    pub proportion: Proportion,
    /// Instruction set.
    pub tier: &'static str,
    /// `f32` or `q8`.
    pub activations: String,
    /// The model's layers.
    pub n_layer: usize,
    /// Values of its hidden state.
    pub n_embd: usize,
    /// Tokens of the context.
    pub n_ctx: usize,
    /// Tokens in the context when the times hold.
    pub depth: usize,
    /// What the threads read at best.
    pub bandwidth_bytes_per_s: f64,
    /// When `topology measure` found that out; none where it was measured now.
    pub bandwidth_measured: Option<String>,
    /// Where frequencies are from.
    pub frequency_source: FrequencySource,
    /// Mean share of neurons that a token activates.
    pub active_share: f64,
    /// Whether that was asked for; which neurons these are, the source says.
    pub active_asked: bool,
    /// Something the user may want to know.
    pub hint: Option<String>,
    /// Each mode.
    pub modes: Vec<ModeReport>,
    /// GPUs that are the device, with what passes to and from each.
    pub gpus: Vec<(PlannedGpu, LinkFigures)>,
}

/// One mode.
#[derive(Debug, Clone, PartialEq)]
pub struct ModeReport {
    /// `off`, `exact` or `predicted`.
    pub mode: &'static str,
    /// Lossy parts.
    pub lossy: Vec<String>,
    /// What else was measured, and what follows.
    pub notes: Vec<String>,
    /// A token on the host alone, in the order of [`Part::ALL`].
    pub parts: Vec<PartForecast>,
    /// What the threads read at best.
    pub bandwidth_bytes_per_s: f64,
    /// By node.
    pub memory: Vec<NodeMemory>,
    /// Neurons by node, layers alike together.
    pub groups: Vec<GroupRun>,
    /// The loader's division, where it costs time: groups of each node, ms a token.
    pub loaded: Option<(Vec<Range<usize>>, f64)>,
    /// Measured, by the types of a layer's matrices.
    pub layer_costs: Vec<(String, LayerCost)>,
    /// Layers and tokens that were measured.
    pub rehearsed: (usize, usize),
    /// Active neurons of all nodes and layers in a token that was measured, on average.
    pub rehearsed_active: f64,
    /// Who is to predict in which layer; none where somebody has said, or nothing can be predicted.
    pub decision: Option<Decision>,
    /// The same with GPUs as the device; none without.
    pub gpu: Option<GpuForecast>,
}

/// Consecutive layers whose neurons are divided alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRun {
    /// These layers.
    pub layers: Range<usize>,
    /// Neuron groups of each node.
    pub groups: Vec<Range<usize>>,
}

impl ModeReport {
    pub(super) fn new(
        sparsity: &SparsityPlan,
        parts: Vec<PartForecast>,
        bandwidth_bytes_per_s: f64,
        memory: Vec<NodeMemory>,
        placed: Placed,
        costs: &Costs,
    ) -> Self {
        let layer_costs = costs.classes.iter();
        let layer_costs = layer_costs.map(|(class, cost)| (class.name(), *cost));
        let notes = placed.neurons_by_threads.then_some(NEURONS_BY_THREADS);
        Self {
            mode: sparsity.mode.name(),
            lossy: sparsity.lossy(),
            notes: notes.map(str::to_owned).into_iter().collect(),
            parts,
            bandwidth_bytes_per_s,
            memory,
            groups: runs(&placed),
            loaded: (placed.lost_ms > LOST_MS_MIN).then_some((placed.loaded, placed.lost_ms)),
            layer_costs: layer_costs.collect(),
            rehearsed: (costs.n_layer, costs.n_tokens),
            rehearsed_active: costs.nodes.iter().map(|(_, active)| active).sum(),
            decision: None,
            gpu: None,
        }
    }

    /// A token's time.
    pub fn token_ms(&self) -> f64 {
        self.parts.iter().map(|part| part.ms).sum()
    }

    /// Bytes that a token reads.
    pub fn token_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }

    /// Tokens decoded in a second.
    pub fn tokens_per_s(&self) -> f64 {
        1e3 / self.token_ms()
    }

    /// Of the speed at which the threads would only read.
    pub fn percent_of_byte_limit(&self) -> f64 {
        self.token_bytes() as f64 * self.tokens_per_s() / self.bandwidth_bytes_per_s * 100.0
    }

    /// The part that takes most time.
    pub fn bottleneck(&self) -> PartForecast {
        let longest = self.parts.iter().max_by(|a, b| a.ms.total_cmp(&b.ms));
        *longest.expect("a token has parts")
    }

    /// What holds the bottleneck back, in words.
    fn bottleneck_text(&self) -> String {
        let PartForecast { part, ms, bytes } = self.bottleneck();
        let share = ms / self.token_ms() * 100.0;
        let speed = bytes as f64 / ms * 1e3;
        let used = speed / self.bandwidth_bytes_per_s;
        let by = match part {
            Part::HandOffs => "waiting".to_owned(),
            _ if used >= MEMORY_BOUND => format!("memory: it reads {:.1} GB/s", speed / 1e9),
            _ => format!(
                "instructions and joins: it reads {:.1} GB/s of {:.1}",
                speed / 1e9,
                self.bandwidth_bytes_per_s / 1e9
            ),
        };
        format!("{} ({share:.0} %), by {by}", part.name())
    }
}

/// Layers alike together.
fn runs(placed: &Placed) -> Vec<GroupRun> {
    let mut runs: Vec<GroupRun> = Vec::new();
    for (layer, placement) in placed.solved.iter().enumerate() {
        let groups: Vec<Range<usize>> = placement
            .cold
            .iter()
            .map(|share| match share {
                ColdShare::Groups(groups) => groups.clone(),
                ColdShare::Ids(_) => unreachable!("without a device nodes own groups"),
            })
            .collect();
        match runs.last_mut() {
            Some(run) if run.groups == groups => run.layers.end = layer + 1,
            _ => runs.push(GroupRun {
                layers: layer..layer + 1,
                groups,
            }),
        }
    }
    runs
}

impl Report {
    /// The plan as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // a string takes everything
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        let threads: Vec<String> = self.threads.iter().map(usize::to_string).collect();
        writeln!(text, "model    {} ({})", self.model, self.path.display())?;
        writeln!(
            text,
            "machine  {} node{}, {} threads, {}, activations {}, reads {:.1} GB/s",
            self.threads.len(),
            if self.threads.len() == 1 { "" } else { "s" },
            threads.join(" + "),
            self.tier,
            self.activations,
            self.bandwidth_bytes_per_s / 1e9
        )?;
        if let Some(measured) = &self.bandwidth_measured {
            writeln!(text, "         of {measured}, by `topology measure`")?;
        }
        if self.threads.len() > 1 {
            writeln!(text, "shares   by {}", self.proportion)?;
        }
        writeln!(text, "neurons  {}", self.frequencies_text())?;
        self.write_gpus(text)?;
        if let Some(hint) = &self.hint {
            writeln!(text, "hint     {hint}")?;
        }
        self.write_times(text)?;
        self.write_memory(text)?;
        for mode in &self.modes {
            let ModeReport {
                mode: name,
                lossy,
                rehearsed: (n_layer, n_tokens),
                ..
            } = mode;
            writeln!(text, "\n{name}: bottleneck {}", mode.bottleneck_text())?;
            writeln!(
                text,
                "{name}: measured now on {n_layer} layers of random bytes, {n_tokens} tokens"
            )?;
            if !lossy.is_empty() {
                writeln!(text, "{name}: lossy: {}", lossy.join(", "))?;
            }
            for note in &mode.notes {
                writeln!(text, "{name}: {note}")?;
            }
            if let Some(decision) = &mode.decision {
                decision.write(text, name)?;
            }
            if let Some(gpu) = &mode.gpu {
                self.write_gpu(text, name, gpu)?;
            }
            if self.threads.len() > 1 {
                mode.write_groups(text)?;
            }
        }
        Ok(())
    }

    fn frequencies_text(&self) -> String {
        let percent = self.active_share * 100.0;
        match &self.frequency_source {
            FrequencySource::Profile { path, .. } if self.active_asked => format!(
                "{percent:.1} % active, as asked: which ones, by the profile in {}",
                path.display()
            ),
            FrequencySource::Assumed if self.active_asked => {
                format!("{percent:.1} % active, as asked, the same for all")
            }
            FrequencySource::Profile { path, n_tokens } => format!(
                "{percent:.1} % active by the profile of {n_tokens} tokens in {}",
                path.display()
            ),
            FrequencySource::Assumed => format!(
                "{percent:.0} % active is assumed, the same for all: `pi-runtime prepare` measures it"
            ),
            FrequencySource::Dense => "all contribute: no gate is ever closed".to_owned(),
        }
    }

    /// Parts by mode, then what they add up to.
    fn write_times(&self, text: &mut String) -> std::fmt::Result {
        write!(
            text,
            "\n{:<24}",
            format!("ms a token, depth {}", self.depth)
        )?;
        for mode in &self.modes {
            write!(text, " {:>10}", mode.mode)?;
        }
        writeln!(text)?;
        for (index, part) in Part::ALL.iter().enumerate() {
            write!(text, "  {:<22}", part.name())?;
            for mode in &self.modes {
                match mode.parts[index] {
                    PartForecast {
                        ms: 0.0, bytes: 0, ..
                    } => write!(text, " {:>10}", "-")?,
                    PartForecast { ms, .. } => write!(text, " {ms:>10.3}")?,
                }
            }
            writeln!(text)?;
        }
        let mut row = |name: &str, value: &dyn Fn(&ModeReport) -> String| {
            write!(text, "{name:<24}")?;
            for mode in &self.modes {
                write!(text, " {:>10}", value(mode))?;
            }
            writeln!(text)
        };
        row("token", &|mode| format!("{:.3}", mode.token_ms()))?;
        row("tokens/s", &|mode| format!("{:.2}", mode.tokens_per_s()))?;
        row("MB a token", &|mode| {
            format!("{:.1}", mode.token_bytes() as f64 / 1e6)
        })?;
        row("% of byte limit", &|mode| {
            format!("{:.0}", mode.percent_of_byte_limit())
        })
    }

    fn write_memory(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "\n{:<24} {:>10} {:>10} {:>10} {:>10} {:>10}",
            format!("MiB, context {}", self.n_ctx),
            "weights",
            "cache",
            "slots",
            "together",
            "budget"
        )?;
        let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
        for mode in &self.modes {
            for (node, memory) in mode.memory.iter().enumerate() {
                let name = format!("  {}, node {node}", mode.mode);
                let budget = memory.budget_bytes.map_or("unknown".to_owned(), mib);
                writeln!(
                    text,
                    "{name:<24} {:>10} {:>10} {:>10} {:>10} {budget:>10}",
                    mib(memory.weights_bytes),
                    mib(memory.cache_bytes),
                    mib(memory.working_bytes),
                    mib(memory.total_bytes())
                )?;
            }
        }
        Ok(())
    }

    /// The plan as one JSON object.
    pub fn json(&self) -> Value {
        let source = match &self.frequency_source {
            FrequencySource::Profile { path, n_tokens } => {
                json!({"kind": "profile", "path": path.display().to_string(), "n_tokens": n_tokens})
            }
            FrequencySource::Assumed => json!({"kind": "assumed"}),
            FrequencySource::Dense => json!({"kind": "dense"}),
        };
        json!({
            "model": self.model,
            "path": self.path.display().to_string(),
            "threads": self.threads,
            "shares": self.proportion,
            "tier": self.tier,
            "activations": self.activations,
            "n_ctx": self.n_ctx,
            "n_depth": self.depth,
            "bandwidth_gb_per_s": self.bandwidth_bytes_per_s / 1e9,
            "bandwidth_measured": self.bandwidth_measured,
            "frequencies": source,
            "active_share": self.active_share,
            "active_asked": self.active_asked,
            "hint": self.hint,
            "gpus": self.gpus.iter().map(gpu_json).collect::<Vec<_>>(),
            "modes": self.modes.iter().map(ModeReport::json).collect::<Vec<_>>(),
        })
    }
}

fn groups_json(groups: &[Range<usize>]) -> Value {
    groups
        .iter()
        .map(|groups| json!([groups.start, groups.end]))
        .collect()
}

fn groups_text(groups: &[Range<usize>]) -> String {
    let nodes: Vec<String> = groups
        .iter()
        .map(|groups| format!("{}..{}", groups.start, groups.end))
        .collect();
    nodes.join(" | ")
}

impl ModeReport {
    fn write_groups(&self, text: &mut String) -> std::fmt::Result {
        let name = self.mode;
        for GroupRun { layers, groups } in &self.groups {
            writeln!(
                text,
                "{name}: layers {}-{}: neuron groups {}",
                layers.start,
                layers.end - 1,
                groups_text(groups)
            )?;
        }
        if let Some((groups, ms)) = &self.loaded {
            writeln!(
                text,
                "{name}: the loader has {}: {ms:.2} ms more a token, which is in the times above; `topology measure`, and \
                 threads in [[host.node]], change it",
                groups_text(groups)
            )?;
        }
        Ok(())
    }

    fn json(&self) -> Value {
        let memory = |node: &NodeMemory| {
            json!({
                "weights_bytes": node.weights_bytes,
                "cache_bytes": node.cache_bytes,
                "working_bytes": node.working_bytes,
                "total_bytes": node.total_bytes(),
                "budget_bytes": node.budget_bytes,
            })
        };
        let run = |run: &GroupRun| {
            json!({
                "layers": [run.layers.start, run.layers.end],
                "groups": groups_json(&run.groups),
            })
        };
        let loaded = self
            .loaded
            .as_ref()
            .map(|(groups, ms)| json!({"groups": groups_json(groups), "more_ms_per_token": ms}));
        json!({
            "sparsity": self.mode,
            "lossy": self.lossy,
            "notes": self.notes,
            "ms_per_token": self.token_ms(),
            "tokens_per_s": self.tokens_per_s(),
            "bytes_per_token": self.token_bytes(),
            "percent_of_byte_limit": self.percent_of_byte_limit(),
            "bottleneck": self.bottleneck().part,
            "parts": self.parts,
            "nodes": self.memory.iter().map(memory).collect::<Vec<_>>(),
            "neuron_groups": self.groups.iter().map(run).collect::<Vec<_>>(),
            "loaded_groups": loaded,
            "layer_costs": self.layer_costs.iter().map(|(types, cost)| json!({"types": types, "cost": cost})).collect::<Vec<_>>(),
            "rehearsed_layers": self.rehearsed.0,
            "rehearsed_tokens": self.rehearsed.1,
            "rehearsed_active_neurons": self.rehearsed_active,
            "decision": self.decision.as_ref().map(Decision::json),
            "gpu": self.gpu.as_ref().map(forecast_json),
        })
    }
}
