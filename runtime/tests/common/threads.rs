//! Threads that are not pinned, in place of an engine's teams.

use pi_actors::{ActorError, TeamThread};
use pi_runtime::model::node_memory::NodeThreads;

/// This many threads for each node.
pub struct ScopedThreads(pub Vec<usize>);

impl NodeThreads for ScopedThreads {
    fn n_threads(&self) -> Vec<usize> {
        self.0.clone()
    }

    fn run(&self, job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError> {
        std::thread::scope(|scope| {
            for (node, &n_threads) in self.0.iter().enumerate() {
                for thread in 0..n_threads {
                    scope.spawn(move || {
                        job(TeamThread {
                            node,
                            thread,
                            n_threads,
                        });
                    });
                }
            }
        });
        Ok(())
    }
}
