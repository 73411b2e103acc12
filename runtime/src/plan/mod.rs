//! `pi-runtime plan`: where a model goes on this machine, and what a token will cost.
//!
//! Placement is solved by [`pi_topology::placement`]; the costs are measured each time: a few of the model's layers,
//! with random bytes in the model's shapes and types, run on the planned threads through the real actors
//! ([`rehearsal`], [`costs`]), and a token is the sum of its parts over all layers ([`forecast`]). Nothing that is
//! measured here changes what a model computes.

mod costs;
mod forecast;
mod loads;
mod memory;
mod rehearsal;
mod report;
mod rows;
mod samples;

use std::path::PathBuf;

use pi_topology::placement::{
    ColdShare, LayerLoad, LayerPlacement, LayerTime, MachineSpeed, NodeSpeed, solve,
};
use pi_topology::{Plan, available_memory_bytes, read_bandwidth};

pub use costs::{Costs, LayerCost};
pub use forecast::{Part, PartForecast};
pub use loads::{Frequencies, FrequencySource};
pub use memory::NodeMemory;
pub use report::{GroupRun, ModeReport, Report};

use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::description::Description;
use crate::model::sparsity::SparsityPlan;
use crate::model::{Hyperparameters, Loader, ModelError, ModelTensors, Sparsity};
use crate::session::{ModelOptions, N_CTX_DEFAULT_MAX};
use forecast::{OtherBytes, forecast};
use loads::{LayerBytes, head_bytes, layer_bytes};
use memory::{budgets, check};
use rehearsal::{Rehearsal, choose_layers};

/// Weights that are rehearsed for each thread, as far as the model has as many: more than its share of a cache.
const REHEARSED_BYTES_A_THREAD: usize = 192 << 20;

/// What is to be planned.
#[derive(Debug, Clone)]
pub struct PlanRequest {
    /// The model; [`ModelOptions::sparsity`] asks for one mode, none for all that the model has.
    pub model: ModelOptions,
    /// The threads and nodes.
    pub plan: Plan,
    /// Its sidecar; none: the one beside the model, if there is one.
    pub sidecar: Option<PathBuf>,
    /// Tokens in the context.
    pub depth: usize,
}

/// Plans, and measures for it: a second or two for each mode.
///
/// # Errors
/// The model, its sidecar, or memory and threads that cannot be had.
pub fn plan(request: &PlanRequest) -> Result<Report, RuntimeError> {
    let path = &request.model.path;
    let file = GgufFile::open(path)?;
    let in_file = |source: ModelError| RuntimeError::Model {
        path: path.clone(),
        source,
    };
    let hyper = Hyperparameters::read(&file).map_err(in_file)?;
    let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
    let sidecar = request.sidecar.as_deref();
    let frequencies = Frequencies::find(path, &file, &hyper, sidecar)?;
    let n_ctx = match request.model.n_ctx {
        0 => hyper.n_ctx_max.min(N_CTX_DEFAULT_MAX),
        n_ctx => n_ctx,
    };
    let planning = Planning {
        request,
        options: ModelOptions {
            n_ctx,
            ..request.model.clone()
        },
        file: &file,
        hyper: &hyper,
        tensors: &tensors,
        frequencies: &frequencies,
    };
    planning.check_depth()?;
    let (modes, hint) = planning.modes()?;
    // what does not fit is refused before anything is measured
    let budgets = budgets(&request.plan)?;
    for mode in &modes {
        check(&planning.memory(mode, &budgets, None)?)?;
    }
    let bandwidth = read_bandwidth(&request.plan)?;
    let reports = modes
        .iter()
        .map(|mode| planning.mode(mode, &budgets, bandwidth))
        .collect::<Result<_, _>>()?;
    Ok(Report {
        model: Description::of(&file).name,
        path: path.clone(),
        threads: threads(&request.plan),
        tier: planning.options.cpu.tier().name(),
        activations: planning.options.cpu.mode().to_string(),
        n_ctx,
        depth: request.depth,
        bandwidth_bytes_per_s: bandwidth,
        frequency_source: frequencies.source.clone(),
        active_share: frequencies.mean(),
        hint,
        modes: reports,
    })
}

fn threads(plan: &Plan) -> Vec<usize> {
    plan.nodes.iter().map(|node| node.cpus.len()).collect()
}

/// A request with what is known of its model.
struct Planning<'a> {
    request: &'a PlanRequest,
    options: ModelOptions,
    file: &'a GgufFile,
    hyper: &'a Hyperparameters,
    tensors: &'a ModelTensors,
    frequencies: &'a Frequencies,
}

impl Planning<'_> {
    fn in_model(&self, source: ModelError) -> RuntimeError {
        RuntimeError::Model {
            path: self.options.path.clone(),
            source,
        }
    }

    fn check_depth(&self) -> Result<(), RuntimeError> {
        let (depth, n_ctx) = (self.request.depth, self.options.n_ctx);
        if n_ctx >= depth + 2 {
            return Ok(());
        }
        Err(RuntimeError::Flag {
            flag: "-d",
            value: depth.to_string(),
            problem: format!(
                "behind it a context of {n_ctx} tokens has no room for two more: give fewer, or more context with -c"
            ),
        })
    }

    /// The modes to plan: the one that is asked for, or all that cost no accuracy; and a hint.
    fn modes(&self) -> Result<(Vec<SparsityPlan>, Option<String>), RuntimeError> {
        let resolve = |asked| {
            SparsityPlan::resolve(asked, self.hyper.gate, &self.tensors.stored_downs())
                .map_err(|source| self.in_model(source))
        };
        if let Some(mode) = self.options.sparsity {
            return Ok((vec![resolve(Some(mode))?], None));
        }
        let mut modes = vec![resolve(Some(Sparsity::Off))?];
        let best = resolve(None)?;
        let hint = best.hint.clone();
        if best.mode != Sparsity::Off {
            modes.push(best);
        }
        Ok((modes, hint))
    }

    fn loader<'t>(&'t self, sparsity: &SparsityPlan) -> Result<Loader<'t>, RuntimeError> {
        let threads = threads(&self.request.plan);
        let n_ctx = self.options.n_ctx;
        Loader::new(
            self.file,
            self.hyper,
            self.tensors,
            sparsity,
            &threads,
            n_ctx,
        )
        .map_err(|source| self.in_model(source))
    }

    /// What each node holds; without `costs` without its working memory.
    fn memory(
        &self,
        sparsity: &SparsityPlan,
        budgets: &[Option<u64>],
        costs: Option<&Costs>,
    ) -> Result<Vec<NodeMemory>, RuntimeError> {
        let loader = self.loader(sparsity)?;
        let row_bytes = self.options.kv_type.row_bytes(self.hyper.head_dim);
        let rows = 2 * self.options.n_ctx * self.hyper.n_layer;
        let nodes = loader.node_bytes().into_iter().zip(loader.shares());
        Ok(nodes
            .zip(budgets)
            .enumerate()
            .map(|(node, ((weights, share), &budget))| {
                let cache = rows * row_bytes * share.kv_heads.len();
                let working = costs.map_or(0, |costs| costs.working_bytes[node]);
                let huge_pages = self.request.plan.huge_pages;
                NodeMemory::new(huge_pages, weights as u64, cache as u64, working, budget)
            })
            .collect())
    }

    fn mode(
        &self,
        sparsity: &SparsityPlan,
        budgets: &[Option<u64>],
        bandwidth_bytes_per_s: f64,
    ) -> Result<ModeReport, RuntimeError> {
        let rehearsal = self.rehearsal(sparsity);
        let costs = costs::measure(
            &rehearsal,
            self.file,
            &self.options,
            &self.request.plan,
            self.request.depth,
        )?;
        let memory = self.memory(sparsity, budgets, Some(&costs))?;
        check(&memory)?;
        let layers = layer_bytes(self.hyper, self.tensors, sparsity);
        let parts = forecast(
            sparsity.mode,
            &costs,
            &layers,
            self.frequencies,
            self.other_bytes(),
        );
        let placed = self.place(sparsity, &layers, &costs, &memory)?;
        Ok(ModeReport::new(
            sparsity,
            parts,
            bandwidth_bytes_per_s,
            memory,
            placed,
            &costs,
        ))
    }

    fn rehearsal(&self, sparsity: &SparsityPlan) -> Rehearsal {
        let wanted = REHEARSED_BYTES_A_THREAD * self.request.plan.n_threads();
        // what is rehearsed is there twice for a moment
        let bytes = available_memory_bytes().map_or(wanted, |available| {
            wanted.min(usize::try_from(available / 4).unwrap_or(wanted))
        });
        let layers = choose_layers(&self.tensors.layers, bytes);
        Rehearsal::new(
            self.hyper,
            self.tensors,
            sparsity,
            layers,
            &self.frequencies.by_layer,
        )
    }

    fn other_bytes(&self) -> OtherBytes {
        let (head, other) = head_bytes(self.hyper, self.tensors);
        let hyper = self.hyper;
        let seen = self.request.depth + 1;
        let seen = hyper.window.map_or(seen, |window| seen.min(window));
        let row_bytes = self.options.kv_type.row_bytes(hyper.head_dim);
        OtherBytes {
            head,
            other,
            kv: (2 * seen * hyper.n_layer * hyper.n_head_kv * row_bytes) as u64,
        }
    }

    /// Each layer's neurons by node, as the solver would have them, and as the loader has them.
    fn place(
        &self,
        sparsity: &SparsityPlan,
        layers: &[LayerBytes],
        costs: &Costs,
        memory: &[NodeMemory],
    ) -> Result<Placed, RuntimeError> {
        let loader = self.loader(sparsity)?;
        let ends = loader.neuron_groups().to_vec();
        let by_layer = layers.iter().zip(&self.frequencies.by_layer);
        let loads: Vec<LayerLoad> = by_layer
            .map(|(layer, frequencies)| layer.load(sparsity.mode, frequencies))
            .collect();
        let shares = loader.shares();
        let loaded = ColdShares(shares.iter().map(|share| share.groups.clone()).collect());
        let machine = self.machine(&loads, costs, memory, &loader);
        let solved = solve(&loads, &machine, &ends)?;
        let current = loaded.placement();
        let lost_s: f64 = loads
            .iter()
            .zip(&solved)
            .map(|(load, best)| {
                let time = |placement| LayerTime::of(load, placement, &machine, &ends).neurons_s();
                time(&current) - time(best)
            })
            .sum();
        Ok(Placed {
            solved,
            loaded: loaded.0,
            lost_ms: lost_s * 1e3,
        })
    }

    /// The nodes as they did the rehearsal.
    fn machine(
        &self,
        loads: &[LayerLoad],
        costs: &Costs,
        memory: &[NodeMemory],
        loader: &Loader<'_>,
    ) -> MachineSpeed {
        let (scanned, active, n) = loads.iter().fold((0, 0, 0), |(s, a, n), load| {
            (s + load.scanned_bytes, a + load.active_bytes, n + 1)
        });
        let mean = |bytes: u64| bytes as f64 / f64::from(n.max(1));
        let shares = loader.shares();
        let nodes = shares.iter().zip(&costs.nodes).zip(memory);
        let speed = nodes.map(|((share, &(ns, n_active)), memory)| {
            let scanned = (share.neurons.len() * costs.n_layer) as f64 * mean(scanned);
            let bytes = scanned + n_active * mean(active);
            let others = memory.weights_bytes + memory.cache_bytes + memory.working_bytes;
            let own: u64 = loads
                .iter()
                .map(|load| share.neurons.len() as u64 * load.bundle_bytes)
                .sum();
            NodeSpeed {
                // a node without neurons has not shown what it can do: as much as its threads' share
                bytes_per_s: if bytes > 0.0 && ns > 0.0 {
                    bytes / ns * 1e9
                } else {
                    1.0
                },
                budget_bytes: memory
                    .budget_bytes
                    .map_or(u64::MAX, |budget| (budget + own).saturating_sub(others)),
                // all layers are in one arena, which is rounded up once: with the weights
                granule_bytes: 1,
            }
        });
        let hand_offs: f64 = costs.classes.iter().map(|(_, cost)| cost.hand_off_ns).sum();
        MachineSpeed {
            devices: vec![],
            nodes: speed.collect(),
            hand_off_s: hand_offs / costs.classes.len().max(1) as f64 / 1e9,
        }
    }
}

/// A node's groups, the same in every layer.
struct ColdShares(Vec<std::ops::Range<usize>>);

impl ColdShares {
    fn placement(&self) -> LayerPlacement {
        LayerPlacement {
            hot_ids: vec![],
            cold: self.0.iter().cloned().map(ColdShare::Groups).collect(),
        }
    }
}

/// Where neurons go.
pub(crate) struct Placed {
    /// Layer by layer, as the solver would have them.
    pub solved: Vec<LayerPlacement>,
    /// Groups of each node, as the loader has them: in proportion to threads.
    pub loaded: Vec<std::ops::Range<usize>>,
    /// What the loader's division costs more, ms a token.
    pub lost_ms: f64,
}
