//! What findings are made of: gathered on this machine, or made up in tests.

use std::path::Path;

use pi_kernels::Tier;
use pi_topology::{
    Conflict, Machine, Plan, SystemState, TopologyConfig, TopologyError, conflicts,
    memory_binding_problem, read_bandwidth, try_pinning,
};

use super::model_needs::ModelNeeds;
use crate::error::RuntimeError;

/// What is known of the machine and of the model that is to run on it.
#[derive(Debug)]
pub struct Facts {
    /// Instruction-set tiers that the processor has, slowest first.
    pub tiers: Vec<Tier>,
    /// Whether the program is built for a processor that has tiers above scalar.
    pub has_faster_tiers: bool,
    /// The system's limits and settings.
    pub system: SystemState,
    /// Its cores and nodes.
    pub machine: Result<Machine, TopologyError>,
    /// The threads that would run; none without a machine.
    pub plan: Option<Result<PlanFacts, TopologyError>>,
    /// What keeps threads and memory from where they would go.
    pub conflicts: Vec<Conflict>,
    /// The model.
    pub model: ModelFacts,
    /// Bytes per second that the planned threads read; none where it was not measured.
    pub bandwidth: Option<Result<f64, TopologyError>>,
}

/// What trying the default plan showed.
#[derive(Debug)]
pub struct PlanFacts {
    /// Threads of all teams.
    pub n_threads: usize,
    /// Teams.
    pub n_nodes: usize,
    /// Whether threads can be bound to their CPUs.
    pub pinning: Result<(), TopologyError>,
    /// Why memory cannot be bound to nodes; none where it can.
    pub memory_binding: Result<Option<String>, TopologyError>,
}

/// What is known of the model.
#[derive(Debug)]
pub enum ModelFacts {
    /// None was named, and the demo model is not there: why, and the cure.
    None(String),
    /// It cannot be used: why.
    Unusable(String),
    /// What it needs.
    Usable(ModelNeeds),
}

impl Facts {
    /// Looks at this machine, and at the model if there is one; `measure` takes about a second more.
    pub fn gather(model: Result<&Path, &RuntimeError>, measure: bool) -> Self {
        let machine = Machine::discover();
        let plan = machine
            .as_ref()
            .ok()
            .map(|machine| Plan::new(&TopologyConfig::default(), machine, None));
        let bandwidth = match &plan {
            Some(Ok(plan)) if measure => Some(read_bandwidth(plan)),
            _ => None,
        };
        let planned = plan.as_ref().and_then(|plan| plan.as_ref().ok());
        let model = match model {
            Ok(path) => ModelNeeds::of(path, planned).map_or_else(
                |error| ModelFacts::Unusable(error.to_string()),
                ModelFacts::Usable,
            ),
            Err(error) => ModelFacts::None(error.to_string()),
        };
        let system = SystemState::read();
        let conflicts = match (&machine, &plan) {
            (Ok(machine), Some(Ok(plan))) => conflicts(machine, Some(plan), &system),
            (Ok(machine), _) => conflicts(machine, None, &system),
            (Err(_), _) => Vec::new(),
        };
        Self {
            tiers: Tier::available(),
            has_faster_tiers: cfg!(target_arch = "x86_64"),
            system,
            conflicts,
            machine,
            plan: plan.map(|plan| {
                plan.map(|plan| PlanFacts {
                    n_threads: plan.n_threads(),
                    n_nodes: plan.nodes.len(),
                    pinning: try_pinning(&plan),
                    memory_binding: memory_binding_problem(&plan),
                })
            }),
            model,
            bandwidth,
        }
    }

    /// The plan, where there is one.
    pub(super) fn planned(&self) -> Option<&PlanFacts> {
        self.plan.as_ref()?.as_ref().ok()
    }

    /// What the model needs, where it can be used.
    pub(super) fn needs(&self) -> Option<&ModelNeeds> {
        match &self.model {
            ModelFacts::Usable(needs) => Some(needs),
            ModelFacts::None(_) | ModelFacts::Unusable(_) => None,
        }
    }
}
