//! The engine: teams, actors and weights put together; the way in for everything above.

use std::time::Duration;

use pi_kernels::Cpu;
use pi_kernels::attention::KvType;
use pi_topology::Plan;

use crate::counters::{ActorCounters, RunTotals};
use crate::error::ActorError;
use crate::faults::Faults;
use crate::feeder::Feeder;
use crate::messages::ActorId;
use crate::weights::{ModelShape, ModelWeights, SparsityMode};

/// How an engine computes.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Instruction set and activation arithmetic.
    pub cpu: Cpu,
    /// Format of the key/value cache.
    pub kv_type: KvType,
    /// Which neurons are computed; the weights are laid out for it.
    pub sparsity: SparsityMode,
    /// Most tokens that go through the layers together; more are fed in pieces.
    pub n_ubatch: usize,
    /// Longest wait for an actor before a step fails.
    pub wait_limit: Duration,
    /// Panics to inject, for tests.
    pub faults: Faults,
}

/// One thread of a team, while it works on a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TeamThread {
    /// Node, counted from 0.
    pub node: usize,
    /// Thread of the node's team, counted from 0.
    pub thread: usize,
    /// Threads of the node's team.
    pub n_threads: usize,
}

/// Teams of pinned threads, one per node.
#[derive(Debug)]
pub struct Teams;

impl Teams {
    /// Starts and pins the threads of `plan`.
    ///
    /// # Errors
    /// A thread cannot be started or pinned.
    pub fn start(_plan: &Plan) -> Result<Self, ActorError> {
        todo!()
    }

    /// Threads of each node.
    pub fn n_threads(&self) -> Vec<usize> {
        todo!()
    }

    /// Runs `job` once on every thread of every node and returns when all are done: loading and
    /// first touch of a node's memory.
    ///
    /// # Errors
    /// A panic in `job`.
    pub fn run(&self, _job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError> {
        todo!()
    }
}

/// A model ready to compute.
#[derive(Debug)]
pub struct Engine;

/// A feeder that has been served.
#[derive(Debug)]
pub struct Run<F> {
    /// The feeder.
    pub feeder: F,
    /// What was done.
    pub totals: RunTotals,
    /// Why the run ended early, if it did.
    pub outcome: Result<(), ActorError>,
}

impl Engine {
    /// Starts the actors of a model on running teams.
    ///
    /// # Errors
    /// Memory for slots or the cache cannot be had.
    pub fn start(
        _teams: Teams,
        _weights: ModelWeights,
        _options: EngineOptions,
    ) -> Result<Self, ActorError> {
        todo!()
    }

    /// Sizes and constants of the model.
    pub fn shape(&self) -> &ModelShape {
        todo!()
    }

    /// Computes what `feeder` asks for until it is done. One run at a time: others wait.
    ///
    /// # Errors
    /// The engine is gone.
    pub fn run<F: Feeder>(&self, _feeder: F) -> Result<Run<F>, ActorError> {
        todo!()
    }

    /// The counters of every actor, asked from each through its mailbox.
    ///
    /// # Errors
    /// An actor that does not answer.
    pub fn counters(&self) -> Result<Vec<ActorCounters>, ActorError> {
        todo!()
    }

    /// Stops an actor for good: the next token that needs it fails with an error that names it.
    ///
    /// # Errors
    /// There is no such actor.
    pub fn stop_actor(&self, _actor: ActorId) -> Result<(), ActorError> {
        todo!()
    }
}
