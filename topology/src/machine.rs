//! What a machine has: NUMA nodes, their memory, cores and logical CPUs.

use std::fmt;

use crate::error::TopologyError;

/// Nodes and cores of this system or of a made-up one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// NUMA nodes that have at least one CPU.
    pub nodes: Vec<MachineNode>,
    /// Where this knowledge is from.
    pub source: MachineSource,
}

/// Where the knowledge of a machine is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MachineSource {
    /// This system, through hwloc.
    Hwloc,
    /// This system, from the affinity mask alone: one node, a core per logical CPU.
    AffinityMask,
    /// Made up from this description.
    Synthetic(String),
}

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineNode {
    /// Number that the system gives it; none where the system knows no NUMA nodes.
    pub os_index: Option<usize>,
    /// Memory that it has, used or not; 0 if unknown.
    pub memory_bytes: u64,
    /// Cores with at least one CPU that this process may use.
    pub cores: Vec<Core>,
}

/// One physical core.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Core {
    /// Its logical CPUs (hyper-threads) that may be used, as the system numbers them.
    pub cpus: Vec<usize>,
}

impl Machine {
    /// This system, as far as the affinity mask and cpuset of the process allow.
    ///
    /// Call it before pinning threads: where every thread of the process is pinned, only their
    /// CPUs are found.
    ///
    /// # Errors
    /// The system does not tell, or no CPU may be used.
    pub fn discover() -> Result<Self, TopologyError> {
        #[cfg(feature = "hwloc")]
        let machine = Self {
            nodes: crate::hwloc::system_nodes()?,
            source: MachineSource::Hwloc,
        };
        #[cfg(not(feature = "hwloc"))]
        let machine = Self {
            nodes: vec![affinity_node()?],
            source: MachineSource::AffinityMask,
        };
        if machine.n_cpus() == 0 {
            return Err(TopologyError::NoCpus);
        }
        Ok(machine)
    }

    /// A made-up machine from hwloc's synthetic description, such as
    /// `Package:2 [NUMANode(memory=64GiB)] Core:8 PU:2`: to plan for, not to bind to.
    ///
    /// # Errors
    /// hwloc does not take the description.
    #[cfg(feature = "hwloc")]
    pub fn synthetic(description: &str) -> Result<Self, TopologyError> {
        Ok(Self {
            nodes: crate::hwloc::synthetic_nodes(description)?,
            source: MachineSource::Synthetic(description.to_owned()),
        })
    }

    /// Whether threads and memory can be bound to it.
    pub fn is_this_system(&self) -> bool {
        !matches!(self.source, MachineSource::Synthetic(_))
    }

    /// Refuses a machine that nothing can be bound to; ask before a plan for it is carried out.
    ///
    /// # Errors
    /// The machine is made up.
    pub fn require_this_system(&self) -> Result<(), TopologyError> {
        match &self.source {
            MachineSource::Hwloc | MachineSource::AffinityMask => Ok(()),
            MachineSource::Synthetic(description) => Err(TopologyError::Synthetic {
                description: description.clone(),
            }),
        }
    }

    /// Physical cores of all nodes.
    pub fn n_cores(&self) -> usize {
        self.nodes.iter().map(|node| node.cores.len()).sum()
    }

    /// Logical CPUs of all nodes.
    pub fn n_cpus(&self) -> usize {
        self.nodes.iter().map(MachineNode::n_cpus).sum()
    }

    /// Memory of all nodes, used or not.
    pub fn memory_bytes(&self) -> u64 {
        self.nodes.iter().map(|node| node.memory_bytes).sum()
    }

    /// Logical CPUs of all nodes, node by node.
    pub(crate) fn cpus(&self) -> Vec<usize> {
        self.nodes.iter().flat_map(MachineNode::cpus).collect()
    }
}

impl MachineNode {
    /// Logical CPUs of all cores.
    pub fn n_cpus(&self) -> usize {
        self.cores.iter().map(|core| core.cpus.len()).sum()
    }

    /// Logical CPUs in the order in which threads take them.
    pub(crate) fn cpus(&self) -> Vec<usize> {
        cpus_of(&self.cores)
    }
}

/// Logical CPUs of cores: the first of each core, then the second of each, and so on.
pub(crate) fn cpus_of(cores: &[Core]) -> Vec<usize> {
    let n_ranks = cores.iter().map(|core| core.cpus.len()).max().unwrap_or(0);
    (0..n_ranks)
        .flat_map(|rank| cores.iter().filter_map(move |core| core.cpus.get(rank)))
        .copied()
        .collect()
}

/// Numbers as people write CPU lists: `0-3,8`.
pub(crate) fn ranges(mut numbers: Vec<usize>) -> String {
    numbers.sort_unstable();
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if number.checked_sub(1) == Some(*last) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let words: Vec<String> = runs
        .into_iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    words.join(",")
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |n: usize, word: &str| match n {
            1 => format!("1 {word}"),
            n => format!("{n} {word}s"),
        };
        write!(
            f,
            "{}, {}, {} ({})",
            count(self.nodes.len(), "NUMA node"),
            count(self.n_cores(), "core"),
            count(self.n_cpus(), "logical CPU"),
            ranges(self.cpus()),
        )?;
        if self.memory_bytes() > 0 {
            let gib = self.memory_bytes() as f64 / (1u64 << 30) as f64;
            write!(f, ", {gib:.1} GiB of memory")?;
        }
        match &self.source {
            MachineSource::Hwloc => write!(f, ", found by hwloc"),
            MachineSource::AffinityMask => write!(f, ", found in the affinity mask"),
            MachineSource::Synthetic(_) => write!(f, ", made up"),
        }
    }
}

/// All that can be known without hwloc: the CPUs of the affinity mask.
#[cfg(not(feature = "hwloc"))]
fn affinity_node() -> Result<MachineNode, TopologyError> {
    let ids = core_affinity::get_core_ids().ok_or_else(|| TopologyError::Discovery {
        problem: "the system does not tell this process's affinity mask".to_owned(),
    })?;
    Ok(MachineNode {
        os_index: None,
        memory_bytes: crate::memory::total_memory_bytes().unwrap_or(0),
        cores: ids
            .into_iter()
            .map(|id| Core { cpus: vec![id.id] })
            .collect(),
    })
}
