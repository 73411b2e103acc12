//! Parts of a machine that threads do not run on: packages, caches, memory without cores, GPUs.

use serde::Serialize;

/// What is soldered or plugged in as one processor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Package {
    /// Number that the system gives it.
    pub os_index: Option<usize>,
    /// The processor's name, where it is known.
    pub name: Option<String>,
    /// Its logical CPUs that may be used.
    pub cpus: Vec<usize>,
}

/// A cache of data, or of data and instructions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cache {
    /// 1 is nearest to the core.
    pub level: usize,
    /// Its size; 0 if unknown.
    pub bytes: u64,
    /// Bytes that it loads at a time; 0 if unknown.
    pub line_bytes: usize,
    /// Logical CPUs that share it.
    pub cpus: Vec<usize>,
}

/// A NUMA node that has no CPUs of its own: memory behind CXL, high-bandwidth memory beside a node's DRAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MemoryNode {
    /// Number that the system gives it.
    pub os_index: Option<usize>,
    /// Memory that it has, used or not; 0 if unknown.
    pub memory_bytes: u64,
    /// What it is, where the system says so: `CXL`, `MCDRAM`, `HBM`, `GPUMemory`.
    pub kind: Option<String>,
    /// Logical CPUs that are local to it; none are, where the system does not tell.
    pub local_cpus: Vec<usize>,
}

/// How far NUMA nodes are from one another, as the firmware says: 10 is a node's own memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeDistances {
    /// Numbers of the nodes, as the system gives them.
    pub numas: Vec<usize>,
    /// From each node to each, `[numas.len(), numas.len()]`.
    pub values: Vec<u64>,
}

impl NodeDistances {
    /// The distance from one NUMA node to another; none where it is not known.
    pub fn between(&self, from: usize, to: usize) -> Option<u64> {
        let position = |numa: usize| self.numas.iter().position(|&known| known == numa);
        let (from, to) = (position(from)?, position(to)?);
        self.values.get(from * self.numas.len() + to).copied()
    }
}

/// An NVIDIA GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Gpu {
    /// Address on the PCI bus, such as `0000:01:00.0`.
    pub pci_address: String,
    /// Device number that PCI gives its model.
    pub pci_device: u16,
    /// Its name, where the driver tells.
    pub name: Option<String>,
    /// Its memory, where the driver tells.
    pub memory_bytes: Option<u64>,
    /// Compute capability, major and minor, where the driver tells.
    pub compute_capability: Option<(u32, u32)>,
    /// NUMA node that it is attached to, where the system knows.
    pub numa: Option<usize>,
}

/// CPUs and NUMA nodes that the machine has and this process may not use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Withheld {
    /// Logical CPUs.
    pub cpus: Vec<usize>,
    /// NUMA nodes whose memory may not be used.
    pub numas: Vec<usize>,
}
