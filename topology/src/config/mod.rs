//! The schema of `configs/*.toml`: what is asked of the machine.
//!
//! As much as can be is checked while a file is read, so that errors carry its line; what depends
//! on the machine is checked by [`Plan::new`](crate::Plan::new).

mod predict;
mod printing;
mod reading;
mod size;

use std::fmt;

use serde::{Deserialize, Serialize, Serializer};

use crate::error::TopologyError;
use crate::plan::N_NODES_MAX;

pub use predict::{LayerList, Predict, PredictBy};
pub use size::ByteSize;

/// A whole file; the default uses the cores and memory that the machine has, and no GPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct TopologyConfig {
    /// Name for logs.
    pub name: Option<String>,
    /// What the configuration is made for.
    pub machine: MachineNeeds,
    /// How memory is had.
    pub memory: MemoryConfig,
    /// Which neurons are computed.
    pub sparsity: SparsityConfig,
    /// Teams of threads on the host.
    pub host: HostConfig,
    /// GPUs to use, in the order of their layers; none: the host computes everything.
    #[serde(rename = "gpu")]
    pub gpus: Vec<GpuConfig>,
}

/// `[machine]`: the least that a machine must have for the configuration to make sense on it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct MachineNeeds {
    /// NUMA nodes with cores.
    #[serde(deserialize_with = "reading::count")]
    pub numa_nodes: Option<usize>,
    /// Physical cores of each of them.
    #[serde(deserialize_with = "reading::count")]
    pub cores_per_node: Option<usize>,
    /// Memory of each of them, used or not.
    pub memory_per_node: Option<ByteSize>,
}

/// `[memory]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct MemoryConfig {
    /// Where cold neurons' bundles lie, and so which node computes them.
    pub cold: ColdPolicy,
    /// Huge pages for weights.
    pub huge_pages: HugePages,
    /// Whether memory that cannot be bound, or that lies elsewhere than planned, is an error.
    pub strict: bool,
}

/// `[sparsity]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct SparsityConfig {
    /// Who finds each layer's active neurons, with `--sparsity predicted`; the flag `--predictor` comes before it.
    pub predict: Predict,
}

/// `memory.cold`: where the bundles of cold neurons lie. The results do not depend on it, but where an `ffn_down` is read
/// whole as files store it: there each node has one sum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ColdPolicy {
    /// Each node has whole groups of neurons, in number by its bandwidth where it was measured, else by its threads, in its
    /// own memory.
    #[default]
    Shard,
    /// Each node has all of them in its own memory, and computes the same as with `Shard`.
    Replicate,
    /// Each node computes the same neurons as with `Shard`; the pages of all nodes' weights go round the NUMA nodes.
    Interleave,
    /// One node has all of them, and computes all of them.
    Single(usize),
}

impl fmt::Display for ColdPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shard => f.write_str("shard"),
            Self::Replicate => f.write_str("replicate"),
            Self::Interleave => f.write_str("interleave"),
            Self::Single(node) => write!(f, "single:{node}"),
        }
    }
}

impl Serialize for ColdPolicy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// `[[gpu]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table")]
pub struct GpuConfig {
    /// Its address on the PCI bus; none: the first that no other entry has.
    #[serde(deserialize_with = "reading::pci_address")]
    pub pci_address: Option<String>,
    /// Its memory that may be used.
    pub vram_budget: VramBudget,
    /// Most of a layer's neurons that are hot, in per cent: 0 leaves attention on the GPU alone.
    #[serde(deserialize_with = "reading::percent")]
    pub hot_percent_max: u8,
    /// How host and GPU wait for each other.
    pub sync: GpuSync,
    /// Decoded tokens after which neurons that fired most become hot, in exchange for others; 0: never.
    #[serde(deserialize_with = "reading::tokens")]
    pub replan: usize,
    /// Whether its absence is an error; else the host computes in its place.
    pub required: bool,
}

impl Default for GpuConfig {
    fn default() -> Self {
        Self {
            pci_address: None,
            vram_budget: VramBudget::default(),
            hot_percent_max: 100,
            sync: GpuSync::default(),
            replan: 0,
            required: false,
        }
    }
}

/// `gpu.vram_budget`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum VramBudget {
    /// All that is free.
    #[default]
    All,
    /// So much.
    Bytes(ByteSize),
}

impl fmt::Display for VramBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Bytes(size) => size.fmt(f),
        }
    }
}

/// `gpu.sync`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GpuSync {
    /// By flags in memory that both see: a few microseconds less per layer.
    #[default]
    Flags,
    /// By the driver's events.
    Events,
}

/// Whether memory is asked for in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// Where the system gives them.
    #[default]
    Try,
    /// Or fail.
    Require,
    /// Never.
    Off,
}

/// `[host]`: one team of threads per node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "HostTable")]
pub enum HostConfig {
    /// The machine's cores, divided.
    Divided {
        /// Number of teams.
        nodes: NodeCount,
        /// Threads of each team.
        threads: ThreadsPerNode,
        /// Cores of each team left to others.
        reserved_cores: usize,
        /// Which kinds of core of a hybrid processor have threads.
        cores: CoreChoice,
    },
    /// Teams as listed in `[[host.node]]`.
    Listed(Vec<ListedTeam>),
}

impl Default for HostConfig {
    fn default() -> Self {
        Self::Divided {
            nodes: NodeCount::All,
            threads: ThreadsPerNode::Cores,
            reserved_cores: 0,
            cores: CoreChoice::Fastest,
        }
    }
}

/// `host.cores`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CoreChoice {
    /// The fastest of each NUMA node; slower ones only where more threads are asked for.
    #[default]
    Fastest,
    /// All, the fastest first. Each thread gets an equal part, so that slow ones hold the others up.
    All,
}

/// `host.nodes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodeCount {
    /// One team per NUMA node.
    All,
    /// So many: the first NUMA nodes if there are more, else their cores divided.
    Number(usize),
}

/// `host.threads`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThreadsPerNode {
    /// One per physical core.
    Cores,
    /// One per logical CPU.
    Hyperthreads,
    /// So many: one per physical core first.
    Number(usize),
}

/// `[[host.node]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct ListedTeam {
    /// NUMA node of its memory and CPUs; none: memory where the system puts it.
    #[serde(default, deserialize_with = "reading::count")]
    pub numa: Option<usize>,
    /// A logical CPU per thread, the leader's first: `[0, 1]`, or `"0-15,32-47"`; left out is as wrong as none.
    #[serde(default, deserialize_with = "reading::cpus")]
    pub cpus: Vec<usize>,
}

/// `[host]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct HostTable {
    nodes: Option<NodeCount>,
    threads: Option<ThreadsPerNode>,
    #[serde(default, deserialize_with = "reading::count")]
    reserved_cores: Option<usize>,
    cores: Option<CoreChoice>,
    node: Option<Vec<ListedTeam>>,
}

impl TryFrom<HostTable> for HostConfig {
    type Error = TopologyError;

    fn try_from(table: HostTable) -> Result<Self, TopologyError> {
        let Some(teams) = table.node else {
            let config = Self::Divided {
                nodes: table.nodes.unwrap_or(NodeCount::All),
                threads: table.threads.unwrap_or(ThreadsPerNode::Cores),
                reserved_cores: table.reserved_cores.unwrap_or(0),
                cores: table.cores.unwrap_or_default(),
            };
            config.check()?;
            return Ok(config);
        };
        let other_ways = [
            ("nodes", table.nodes.is_some()),
            ("threads", table.threads.is_some()),
            ("reserved_cores", table.reserved_cores.is_some()),
            ("cores", table.cores.is_some()),
        ];
        if let Some((key, _)) = other_ways.into_iter().find(|(_, is_there)| *is_there) {
            return Err(TopologyError::TwoWays { key });
        }
        let config = Self::Listed(teams);
        config.check()?;
        Ok(config)
    }
}

impl HostConfig {
    /// Checks all that can be checked without a machine.
    ///
    /// # Errors
    /// Too many teams or none, a team without CPUs, a CPU listed twice, or cores reserved from a
    /// number of threads.
    pub(crate) fn check(&self) -> Result<(), TopologyError> {
        match self {
            Self::Divided {
                threads: ThreadsPerNode::Number(_),
                reserved_cores: reserved_cores @ 1..,
                ..
            } => Err(TopologyError::ReservedFromNumber {
                reserved_cores: *reserved_cores,
            }),
            Self::Divided {
                nodes: NodeCount::Number(n_nodes),
                ..
            } => check_node_count(*n_nodes),
            Self::Divided { .. } => Ok(()),
            Self::Listed(teams) => check_listed(teams),
        }
    }
}

/// Whether a layer's neurons can be divided over so many nodes.
pub(crate) fn check_node_count(n_nodes: usize) -> Result<(), TopologyError> {
    if (1..=N_NODES_MAX).contains(&n_nodes) {
        return Ok(());
    }
    Err(TopologyError::NodeCount {
        n_nodes,
        n_nodes_max: N_NODES_MAX,
    })
}

fn check_listed(teams: &[ListedTeam]) -> Result<(), TopologyError> {
    check_node_count(teams.len())?;
    let mut seen: Vec<(usize, usize)> = Vec::new();
    for (node, team) in teams.iter().enumerate() {
        if team.cpus.is_empty() {
            return Err(TopologyError::NoTeamCpus { node });
        }
        for &cpu in &team.cpus {
            if let Some(&(_, first)) = seen.iter().find(|(seen_cpu, _)| *seen_cpu == cpu) {
                return Err(TopologyError::CpuTwice {
                    cpu,
                    first,
                    second: node,
                });
            }
            seen.push((cpu, node));
        }
    }
    Ok(())
}
