//! Where the loader's memory and threads come from.

use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use pi_actors::{ActorError, TeamThread, Teams};
use pi_topology::{ArenaWriter, Plan, Residence, TopologyError};

use super::error::ModelError;

/// Memory of one node that is being filled.
pub trait Arena: Send {
    /// All of it, zeroed until written.
    fn as_mut_slice(&mut self) -> &mut [u8];

    /// Ends the filling; the bytes stay where they are.
    fn freeze(self: Box<Self>) -> Bytes;

    /// The same, with what writes to them again, where that is possible.
    fn freeze_with_writer(self: Box<Self>) -> (Bytes, Option<ArenaWriter>) {
        (self.freeze(), None)
    }
}

/// Gives each node its memory.
pub trait NodeMemory {
    /// Zeroed memory of node `node`, at least `bytes` long; its pages are not touched yet.
    ///
    /// # Errors
    /// The machine does not give it.
    fn allocate(&self, node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError>;

    /// Takes note of what each node's memory holds now; where it lies does not change any more.
    ///
    /// # Errors
    /// It does not lie where it has to.
    fn filled(&self, _arenas: &[Bytes]) -> Result<(), ModelError> {
        Ok(())
    }
}

/// Threads of the nodes, as [`Teams`] has them.
pub trait NodeThreads {
    /// Threads of each node.
    fn n_threads(&self) -> Vec<usize>;

    /// Runs `job` once on every thread of every node and returns when all are done.
    ///
    /// # Errors
    /// A panic in `job`.
    fn run(&self, job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError>;
}

impl NodeThreads for Teams {
    fn n_threads(&self) -> Vec<usize> {
        Teams::n_threads(self)
    }

    fn run(&self, job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError> {
        Teams::run(self, job)
    }
}

/// Each node's own memory, in huge pages as planned.
impl NodeMemory for Plan {
    fn allocate(&self, node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError> {
        let arena = self.arena(node, bytes).map_err(ModelError::Memory)?;
        Ok(Box::new(arena))
    }
}

/// A plan's memory, of which it is verified that it lies where it was planned: after loading, and whenever it is asked.
#[derive(Debug)]
pub struct VerifiedMemory<'a> {
    plan: &'a Plan,
    arenas: Mutex<Vec<Bytes>>,
}

impl<'a> VerifiedMemory<'a> {
    /// Memory as `plan` has it.
    pub fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            arenas: Mutex::default(),
        }
    }

    /// The weights in it, of which every node's can be found again.
    pub fn into_weights(self) -> PlacedWeights {
        let arenas = self.arenas.into_inner();
        PlacedWeights {
            plan: self.plan.clone(),
            arenas: arenas.unwrap_or_else(PoisonError::into_inner),
        }
    }
}

impl NodeMemory for VerifiedMemory<'_> {
    fn allocate(&self, node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError> {
        self.plan.allocate(node, bytes)
    }

    fn filled(&self, arenas: &[Bytes]) -> Result<(), ModelError> {
        let mut kept = self.arenas.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = arenas.to_vec();
        Ok(())
    }
}

/// Weights in the memory of their nodes.
#[derive(Debug, Clone)]
pub struct PlacedWeights {
    plan: Plan,
    arenas: Vec<Bytes>,
}

impl PlacedWeights {
    /// Finds out page by page where the weights lie.
    ///
    /// # Errors
    /// They lie elsewhere than planned, or nobody knows where, and the plan is strict.
    pub fn verify(&self) -> Result<Residence, TopologyError> {
        let areas: Vec<&[u8]> = self.arenas.iter().map(AsRef::as_ref).collect();
        self.plan.verify(&areas)
    }
}

impl Arena for pi_topology::Arena {
    fn as_mut_slice(&mut self) -> &mut [u8] {
        pi_topology::Arena::as_mut_slice(self)
    }

    fn freeze(self: Box<Self>) -> Bytes {
        pi_topology::Arena::freeze(*self)
    }

    fn freeze_with_writer(self: Box<Self>) -> (Bytes, Option<ArenaWriter>) {
        let (bytes, writer) = pi_topology::Arena::freeze_with_writer(*self);
        (bytes, Some(writer))
    }
}

/// Ordinary memory, wherever the system puts it.
#[derive(Debug, Clone, Copy, Default)]
pub struct HeapMemory;

impl NodeMemory for HeapMemory {
    fn allocate(&self, _node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError> {
        Ok(Box::new(vec![0u8; bytes]))
    }
}

impl Arena for Vec<u8> {
    fn as_mut_slice(&mut self) -> &mut [u8] {
        self
    }

    fn freeze(self: Box<Self>) -> Bytes {
        Bytes::from(*self)
    }
}
