//! The schema of `configs/*.toml`: what is asked of the machine.
//!
//! As much as can be is checked while a file is read, so that errors carry its line; what depends
//! on the machine is checked by [`Plan::new`](crate::Plan::new).

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use crate::error::TopologyError;
use crate::plan::N_NODES_MAX;

/// A whole file; the default uses everything that the machine has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TopologyConfig {
    /// Name for logs.
    pub name: Option<String>,
    /// How memory is had.
    pub memory: MemoryConfig,
    /// Teams of threads on the host.
    pub host: HostConfig,
}

/// `[memory]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Huge pages for weights and cache.
    pub huge_pages: HugePages,
}

/// Whether memory is asked for in huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
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
        }
    }
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
#[serde(deny_unknown_fields)]
pub struct ListedTeam {
    /// NUMA node of its memory and CPUs; none: memory where the system puts it.
    pub numa: Option<usize>,
    /// A logical CPU per thread, the leader's first.
    pub cpus: Vec<usize>,
}

/// `[host]` as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HostTable {
    nodes: Option<NodeCount>,
    threads: Option<ThreadsPerNode>,
    reserved_cores: Option<usize>,
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
            };
            config.check()?;
            return Ok(config);
        };
        let other_ways = [
            ("nodes", table.nodes.is_some()),
            ("threads", table.threads.is_some()),
            ("reserved_cores", table.reserved_cores.is_some()),
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

impl<'de> Deserialize<'de> for NodeCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = WordOrNumber {
            expected: "\"all\" or a number of nodes",
            words: &[("all", Self::All)],
            number_max: N_NODES_MAX,
            number: Self::Number,
        };
        deserializer.deserialize_any(visitor)
    }
}

impl<'de> Deserialize<'de> for ThreadsPerNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = WordOrNumber {
            expected: "\"cores\", \"hyperthreads\" or a number of threads",
            words: &[("cores", Self::Cores), ("hyperthreads", Self::Hyperthreads)],
            number_max: usize::MAX,
            number: Self::Number,
        };
        deserializer.deserialize_any(visitor)
    }
}

/// Reads one of some words, or a number from 1 to `number_max`.
struct WordOrNumber<T: 'static> {
    expected: &'static str,
    words: &'static [(&'static str, T)],
    number_max: usize,
    number: fn(usize) -> T,
}

impl<T: Copy> Visitor<'_> for WordOrNumber<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)?;
        match self.number_max {
            usize::MAX => f.write_str(" from 1"),
            number_max => write!(f, " from 1 to {number_max}"),
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        let found = self.words.iter().find(|(word, _)| *word == text);
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        usize::try_from(number)
            .ok()
            .filter(|number| (1..=self.number_max).contains(number))
            .map(self.number)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        usize::try_from(number)
            .ok()
            .filter(|number| (1..=self.number_max).contains(number))
            .map(self.number)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }
}
