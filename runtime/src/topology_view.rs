//! A machine with what is planned on it: `pi-runtime topology`.

use std::path::Path;

use pi_topology::{Conflict, Limit, Machine, NodeRooms, Plan, SystemState, VramBudget, conflicts};
use serde_json::json;

use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::room::held_in;
use crate::model::shares::neurons_by_threads;
use crate::model::sparsity::SparsityPlan;
use crate::model::{Hyperparameters, ModelTensors};
use crate::session::N_CTX_DEFAULT_MAX;

/// Why a model's neurons are not divided as the rest is.
pub(crate) const NEURONS_BY_THREADS: &str = "neurons stay divided by threads: `ffn_down` is stored by output and gives one \
     sum a node, whose bits no measurement may change; `pi-runtime pack` stores it by neuron";

/// What a model takes of each node's memory, with the default flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelBytes {
    /// Sparsity mode that it would run in.
    pub sparsity: &'static str,
    /// Whether its neurons are divided by threads, whatever the rest.
    pub neurons_by_threads: bool,
    /// Tokens of the context.
    pub n_ctx: usize,
    /// Weights, by node.
    pub weights_bytes: Vec<u64>,
    /// Keys and values of a full context, by node.
    pub cache_bytes: Vec<u64>,
    /// The NUMA node that it does not fit into, and what would do.
    pub too_much: Option<String>,
}

impl ModelBytes {
    /// Reads a file's header and divides its tensors as `plan` has it, for a context of `n_ctx` tokens (0: the model's
    /// own, at most 4096) and nodes with `rooms`.
    ///
    /// # Errors
    /// The file cannot be run: the message names it.
    pub fn of(
        path: &Path,
        plan: &Plan,
        rooms: &NodeRooms,
        n_ctx: usize,
    ) -> Result<Self, RuntimeError> {
        let file = GgufFile::open(path)?;
        let in_file = |source| RuntimeError::Model {
            path: path.to_path_buf(),
            source,
        };
        let hyper = Hyperparameters::read(&file).map_err(in_file)?;
        let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
        let sparsity =
            SparsityPlan::resolve(None, hyper.gate, &tensors.stored_downs()).map_err(in_file)?;
        let n_ctx = match n_ctx {
            0 => hyper.n_ctx_max.min(N_CTX_DEFAULT_MAX),
            n_ctx => n_ctx,
        };
        let (held, too_much) =
            held_in(plan, rooms, &file, &hyper, &tensors, &sparsity, n_ctx).map_err(in_file)?;
        Ok(Self {
            sparsity: sparsity.mode.name(),
            neurons_by_threads: neurons_by_threads(plan, &sparsity),
            n_ctx,
            weights_bytes: held.weights,
            cache_bytes: held.cache,
            too_much,
        })
    }
}

/// A machine, a plan for it, and what a model takes there.
#[derive(Debug)]
pub struct TopologyView {
    machine: Machine,
    plan: Plan,
    model: Option<ModelBytes>,
    /// This system's; none for another machine.
    system: Option<SystemState>,
    conflicts: Vec<Conflict>,
}

impl TopologyView {
    /// Puts them together; for this system also its limits.
    pub fn new(machine: Machine, plan: Plan, model: Option<ModelBytes>) -> Self {
        let system = machine.is_this_system().then(SystemState::read);
        let conflicts = system
            .as_ref()
            .map_or_else(Vec::new, |system| conflicts(&machine, Some(&plan), system));
        Self {
            machine,
            plan,
            model,
            system,
            conflicts,
        }
    }

    /// A drawing for the terminal.
    pub fn text(&self) -> String {
        let notes = self.model.as_ref().map_or_else(Vec::new, ModelBytes::notes);
        let mut text = self.machine.draw(Some(&self.plan), &notes);
        text.push_str(&format!("  cold neurons: {}\n", self.plan.cold));
        if self.plan.nodes.len() > 1 {
            text.push_str(&format!("  shares by {}\n", self.plan.proportion));
        }
        if let Some(model) = &self.model {
            text.push_str(&format!(
                "  mode {}, a context of {} tokens\n",
                model.sparsity, model.n_ctx
            ));
            if model.neurons_by_threads {
                text.push_str(&format!("  {NEURONS_BY_THREADS}\n"));
            }
            if let Some(problem) = &model.too_much {
                text.push_str(&format!("\nDoes not fit: {problem}\n"));
            }
        }
        for limit in self.limits() {
            text.push_str(&format!("\nLimit: {limit}\n"));
        }
        for conflict in &self.conflicts {
            text.push_str(&format!(
                "\n{}\n  to mend it: {}\n",
                conflict.problem, conflict.cure
            ));
        }
        text
    }

    /// Limits of control groups and of the process, in words.
    fn limits(&self) -> Vec<String> {
        let Some(system) = &self.system else {
            return Vec::new();
        };
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
        let mut limits = Vec::new();
        if let Some(n_cpus) = system.cpu_limit {
            limits.push(format!(
                "a control group allows the time of {n_cpus:.1} CPUs"
            ));
        }
        if let Some(bytes) = system.memory_limit_bytes {
            limits.push(format!("a control group allows {} of memory", gib(bytes)));
        }
        if let Limit::Bytes(bytes) = system.address_space_bytes {
            limits.push(format!("ulimit -v allows {} of addresses", gib(bytes)));
        }
        limits
    }

    /// Everything as one JSON object.
    ///
    /// # Errors
    /// None that is known of: a machine's numbers and texts have a form in JSON.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        let model = self.model.as_ref();
        let teams: Vec<serde_json::Value> = self
            .plan
            .nodes
            .iter()
            .enumerate()
            .map(|(node, team)| {
                let mut value = json!({ "numa": team.numa, "cpus": team.cpus });
                if let Some(model) = model {
                    value["weights_bytes"] = model.weights_bytes[node].into();
                    value["cache_bytes"] = model.cache_bytes[node].into();
                }
                value
            })
            .collect();
        let gpus = &self.machine.gpus;
        let gpus = gpus.iter().zip(self.plan.gpu_entries(gpus));
        let gpus: Vec<serde_json::Value> = gpus
            .filter_map(|(gpu, entry)| {
                let budget = match entry?.vram_budget {
                    VramBudget::All => gpu.memory_bytes,
                    VramBudget::Bytes(size) => Some(size.0),
                };
                Some(json!({ "pci_address": gpu.pci_address, "vram_budget_bytes": budget }))
            })
            .collect();
        let system = self.system.as_ref();
        serde_json::to_string(&json!({
            "machine": self.machine,
            "limits": system.map(|system| json!({
                "affinity_cpus": system.affinity_cpus,
                "cpuset_cpus": system.cpuset_cpus,
                "isolated_cpus": system.isolated_cpus,
                "online_cpus": system.online_cpus,
                "cpu_limit": system.cpu_limit,
                "memory_limit_bytes": system.memory_limit_bytes,
                "memory_numas": system.memory_numas,
            })),
            "plan": {
                "nodes": teams,
                "gpus": gpus,
                "cold": self.plan.cold,
                "shares": self.plan.proportion,
                "huge_pages": self.plan.huge_pages,
                "strict": self.plan.strict,
            },
            "model": model.map(|model| json!({
                "sparsity": model.sparsity,
                "n_ctx": model.n_ctx,
                "neurons_by_threads": model.neurons_by_threads,
                "too_much": model.too_much,
            })),
            "conflicts": self.conflicts,
        }))
    }
}

impl ModelBytes {
    /// A note for each team.
    fn notes(&self) -> Vec<String> {
        let megabytes = |bytes: u64| format!("{:.1} MB", bytes as f64 / 1e6);
        let nodes = self.weights_bytes.iter().zip(&self.cache_bytes);
        nodes
            .map(|(&weights, &cache)| {
                format!(
                    "{} of weights, {} of cache",
                    megabytes(weights),
                    megabytes(cache)
                )
            })
            .collect()
    }
}
