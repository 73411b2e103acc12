//! What a machine has: packages, NUMA nodes and their memory, cores and logical CPUs, caches, GPUs.

mod assembly;
mod drawing;
mod parts;
mod xml;

use std::fmt;

use serde::Serialize;

use crate::error::TopologyError;

#[cfg(feature = "hwloc")]
pub(crate) use assembly::{FoundNode, assemble};
pub use parts::{Cache, Gpu, MemoryNode, NodeDistances, Package, Withheld};

/// This system, a saved one or a made-up one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// Where this knowledge is from.
    pub source: MachineSource,
    /// Packages that have at least one CPU; none where the system does not tell.
    pub packages: Vec<Package>,
    /// NUMA nodes that have at least one CPU. Cores of a node without memory are in the nearest one
    /// that has some.
    pub nodes: Vec<MachineNode>,
    /// NUMA nodes that have memory and no CPU.
    pub memory_nodes: Vec<MemoryNode>,
    /// How far NUMA nodes are from one another, where it is known.
    pub distances: Option<NodeDistances>,
    /// Names of the kinds of core, slowest first; none where all are alike.
    pub core_kinds: Vec<String>,
    /// Caches of data, largest level first.
    pub caches: Vec<Cache>,
    /// NVIDIA's GPUs, by address.
    pub gpus: Vec<Gpu>,
    /// What the machine has besides, and this process may not use.
    pub withheld: Withheld,
}

/// Where the knowledge of a machine is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineSource {
    /// This system, through hwloc.
    Hwloc,
    /// This system, from the affinity mask alone: one node, a core per logical CPU.
    AffinityMask,
    /// Made up from this description.
    Synthetic(String),
    /// Saved from some machine in the XML of this name.
    Xml(String),
}

/// One NUMA node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MachineNode {
    /// Number that the system gives it; none where the system knows no NUMA nodes.
    pub os_index: Option<usize>,
    /// Memory that it has, used or not; 0 if unknown.
    pub memory_bytes: u64,
    /// Cores with at least one CPU that this process may use.
    pub cores: Vec<Core>,
}

/// One physical core.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Core {
    /// Its logical CPUs (hyper-threads) that may be used, as the system numbers them.
    pub cpus: Vec<usize>,
    /// Which of the machine's kinds of core it is, slowest first; 0 where all are alike.
    pub kind: usize,
}

#[cfg(not(feature = "hwloc"))]
const NO_HWLOC: &str = "this program is built without the feature hwloc";

impl Machine {
    /// A machine of which nothing else is known.
    pub fn of_nodes(nodes: Vec<MachineNode>, source: MachineSource) -> Self {
        Self {
            source,
            packages: Vec::new(),
            nodes,
            memory_nodes: Vec::new(),
            distances: None,
            core_kinds: Vec::new(),
            caches: Vec::new(),
            gpus: Vec::new(),
            withheld: Withheld::default(),
        }
    }

    /// This system, as far as the affinity mask and cpuset of the process allow. GPUs are those on
    /// the PCI bus; [`Machine::ask_gpu_driver`] finds out more.
    ///
    /// Call it before pinning threads: where every thread of the process is pinned, only their
    /// CPUs are found.
    ///
    /// # Errors
    /// The system does not tell, or no CPU may be used.
    pub fn discover() -> Result<Self, TopologyError> {
        #[cfg(feature = "hwloc")]
        let mut machine = crate::hwloc::system_machine()?;
        #[cfg(not(feature = "hwloc"))]
        let mut machine = Self::of_nodes(vec![affinity_node()?], MachineSource::AffinityMask);
        if machine.n_cpus() == 0 {
            return Err(TopologyError::NoCpus);
        }
        machine.gpus = crate::gpu::system_gpus();
        Ok(machine)
    }

    /// A made-up machine from hwloc's synthetic description, such as
    /// `Package:2 [NUMANode(memory=64GiB)] Core:8 PU:2`: to plan for, not to bind to.
    ///
    /// # Errors
    /// hwloc does not take the description, or is not built in.
    pub fn synthetic(description: &str) -> Result<Self, TopologyError> {
        #[cfg(feature = "hwloc")]
        return crate::hwloc::synthetic_machine(description);
        #[cfg(not(feature = "hwloc"))]
        return Err(TopologyError::Description {
            description: description.to_owned(),
            problem: NO_HWLOC.to_owned(),
        });
    }

    /// A saved machine from the text of a file that `lstopo FILE.xml` wrote, called `name` in
    /// messages: to plan for, not to bind to.
    ///
    /// # Errors
    /// The text is no such file, or the machine has no CPU.
    pub fn from_xml(name: &str, xml: &str) -> Result<Self, TopologyError> {
        xml::machine(name, xml)
    }

    /// Asks NVIDIA's driver for the GPUs' names and memory, where there is a driver; adds GPUs that
    /// the PCI bus does not show, as in some containers. It takes up to seconds.
    pub fn ask_gpu_driver(&mut self) {
        if self.is_this_system() {
            crate::gpu::ask_driver(&mut self.gpus);
        }
    }

    /// Whether threads and memory can be bound to it.
    pub fn is_this_system(&self) -> bool {
        matches!(
            self.source,
            MachineSource::Hwloc | MachineSource::AffinityMask
        )
    }

    /// Refuses a machine that nothing can be bound to; ask before a plan for it is carried out.
    ///
    /// # Errors
    /// The machine is made up, or saved from another one.
    pub fn require_this_system(&self) -> Result<(), TopologyError> {
        match &self.source {
            MachineSource::Hwloc | MachineSource::AffinityMask => Ok(()),
            MachineSource::Synthetic(description) | MachineSource::Xml(description) => {
                Err(TopologyError::Synthetic {
                    description: description.clone(),
                })
            }
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
        let each = self.nodes.iter().map(|node| node.memory_bytes);
        each.fold(0, u64::saturating_add)
    }

    /// NUMA nodes, with CPUs or without, that the system numbers.
    pub fn numas(&self) -> Vec<usize> {
        let with_cpus = self.nodes.iter().filter_map(|node| node.os_index);
        let without = self.memory_nodes.iter().filter_map(|node| node.os_index);
        with_cpus.chain(without).collect()
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

    /// Its fastest cores and the others: none of these where all are alike.
    pub(crate) fn cores_by_speed(&self) -> (Vec<Core>, Vec<Core>) {
        let fastest = self.cores.iter().map(|core| core.kind).max();
        let mut cores = self.cores.clone();
        cores.sort_by_key(|core| std::cmp::Reverse(core.kind));
        cores
            .into_iter()
            .partition(|core| Some(core.kind) == fastest)
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

/// The numbers of a list such as `0-3,8`; none where it is not one, or names more CPUs than there can be.
pub(crate) fn numbers(list: &str) -> Option<Vec<usize>> {
    const N_CPUS_MAX: usize = 1 << 16;
    // Rust reads "+1" as a number too
    if list.contains('+') {
        return None;
    }
    let mut numbers = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        if last < first || last >= N_CPUS_MAX {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Numbers as people write CPU lists: `0-3,8`.
pub fn ranges(mut numbers: Vec<usize>) -> String {
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

/// Bytes as people read them.
pub(crate) fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
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
            write!(f, ", {} of memory", gib(self.memory_bytes()))?;
        }
        match &self.source {
            MachineSource::Hwloc => write!(f, ", found by hwloc"),
            MachineSource::AffinityMask => write!(f, ", found in the affinity mask"),
            MachineSource::Synthetic(_) => write!(f, ", made up"),
            MachineSource::Xml(name) => write!(f, ", saved in {name}"),
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
            .map(|id| Core {
                cpus: vec![id.id],
                kind: 0,
            })
            .collect(),
    })
}
