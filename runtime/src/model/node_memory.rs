//! Where the loader's memory and threads come from.

use bytes::Bytes;
use pi_actors::{ActorError, TeamThread, Teams};
use pi_topology::Plan;

use super::error::ModelError;

/// Memory of one node that is being filled.
pub trait Arena: Send {
    /// All of it, zeroed until written.
    fn as_mut_slice(&mut self) -> &mut [u8];

    /// Ends the filling; the bytes stay where they are.
    fn freeze(self: Box<Self>) -> Bytes;
}

/// Gives each node its memory.
pub trait NodeMemory {
    /// Zeroed memory of node `node`, at least `bytes` long; its pages are not touched yet.
    ///
    /// # Errors
    /// The machine does not give it.
    fn allocate(&self, node: usize, bytes: usize) -> Result<Box<dyn Arena>, ModelError>;
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
        let numa = self.nodes[node].numa;
        let arena = pi_topology::Arena::new(bytes, numa, self.huge_pages)
            .map_err(|error| ModelError::Memory(error.to_string()))?;
        Ok(Box::new(arena))
    }
}

impl Arena for pi_topology::Arena {
    fn as_mut_slice(&mut self) -> &mut [u8] {
        pi_topology::Arena::as_mut_slice(self)
    }

    fn freeze(self: Box<Self>) -> Bytes {
        pi_topology::Arena::freeze(*self)
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
