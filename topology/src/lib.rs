//! The machine: what it has, what is asked of it, and where threads and memory go.

use std::path::PathBuf;

use thiserror::Error;

/// Why a machine cannot be used as asked.
#[derive(Debug, Error)]
pub enum TopologyError {
    /// Placeholder until discovery is there.
    #[error("{}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
    },
}

/// Which threads and memory a program uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Teams, one per node.
    pub nodes: Vec<NodePlan>,
    /// Huge pages for weights and cache.
    pub huge_pages: HugePages,
}

/// One node's team and memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// The NUMA node (as the system numbers it) whose memory is used; none: the system's choice.
    pub numa: Option<usize>,
    /// Logical CPU (as the system numbers it) of each thread, the leader's first.
    pub cpus: Vec<usize>,
}

/// Whether memory is asked for in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HugePages {
    /// Where the system gives them.
    #[default]
    Try,
    /// Or fail.
    Require,
    /// Never.
    Off,
}
