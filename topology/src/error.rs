//! Why a machine cannot be used as asked.

use std::io;

use thiserror::Error;

/// What can go wrong between a configuration and the machine.
#[derive(Debug, Error)]
pub enum TopologyError {
    /// The system does not say what it has.
    #[error(
        "cannot discover the CPUs of this machine: {problem}; compare with `lstopo`, or build without the feature hwloc"
    )]
    Discovery {
        /// What was tried and what came back.
        problem: String,
    },
    /// hwloc was told to describe another machine.
    #[error(
        "hwloc describes another machine than this one, and threads cannot be bound to it: unset HWLOC_XMLFILE, HWLOC_SYNTHETIC and HWLOC_FSROOT"
    )]
    NotThisSystem,
    /// A made-up or saved machine where threads are to run.
    #[error(
        "{description}: a made-up or saved machine can be planned for, but threads and memory cannot be bound to it: plan for the discovered one"
    )]
    Synthetic {
        /// Its description.
        description: String,
    },
    /// A description that hwloc does not take.
    #[error(
        "{description:?} does not describe a machine: {problem}; write it as in \"Package:2 [NUMANode(memory=64GiB)] Core:8 PU:2\""
    )]
    Description {
        /// As given.
        description: String,
        /// What is wrong.
        problem: String,
    },
    /// A file that is no saved machine.
    #[error(
        "{name}: this is no machine that hwloc saved: {problem}; save one with `lstopo FILE.xml`"
    )]
    Xml {
        /// The file.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A machine without CPUs.
    #[error("the machine has no CPU that this process may use: widen its affinity mask or cpuset")]
    NoCpus,
    /// Layers of which it is not clear who predicts them.
    #[error("who predicts ({text:?}): {problem}")]
    Predict {
        /// As given.
        text: String,
        /// What is wrong, and what would do.
        problem: String,
    },
    /// Teams beyond the neuron groups of a layer, or none.
    #[error(
        "{n_nodes} nodes: a layer's neurons are divided over 1 to {n_nodes_max} nodes; set host.nodes to a number in that range"
    )]
    NodeCount {
        /// Nodes asked for or found.
        n_nodes: usize,
        /// Most that there can be.
        n_nodes_max: usize,
    },
    /// Two ways to say which CPUs to use.
    #[error(
        "[host] has {key} and [[host.node]], which says the same another way: remove one of them"
    )]
    TwoWays {
        /// The key beside `host.node`.
        key: &'static str,
    },
    /// Cores left to others from a number of threads.
    #[error(
        "reserved_cores = {reserved_cores} goes with threads = \"cores\" or \"hyperthreads\", not with a number: lower the number instead"
    )]
    ReservedFromNumber {
        /// As given.
        reserved_cores: usize,
    },
    /// No core left to compute on.
    #[error(
        "node {node} has {n_cores} cores and leaves {reserved_cores} to others, so that none is left: set host.reserved_cores to at most {}", n_cores.saturating_sub(1)
    )]
    ReservedCores {
        /// Team, counted from 0.
        node: usize,
        /// Cores of the team.
        n_cores: usize,
        /// As configured.
        reserved_cores: usize,
    },
    /// Cold bundles on a team that is not there.
    #[error(
        "memory.cold = \"single:{node}\", but the nodes are counted from 0, and the last one is {}: name one of them", n_nodes.saturating_sub(1)
    )]
    NoColdNode {
        /// As configured.
        node: usize,
        /// Teams.
        n_nodes: usize,
    },
    /// Fewer threads than teams.
    #[error(
        "-t {threads}: each of the {n_nodes} nodes needs a thread; give -t {n_nodes} or more, or configure fewer nodes"
    )]
    FewThreads {
        /// Threads asked for.
        threads: usize,
        /// Teams.
        n_nodes: usize,
    },
    /// More threads than CPUs.
    #[error(
        "{asked_by}: node {node} would run {n_threads} threads but has {n_cpus} logical CPUs; {cure}"
    )]
    ManyThreads {
        /// The flag or key, with its value.
        asked_by: String,
        /// Team, counted from 0.
        node: usize,
        /// Threads that the team would have.
        n_threads: usize,
        /// Logical CPUs that it can have.
        n_cpus: usize,
        /// What would do.
        cure: String,
    },
    /// A team without a CPU.
    #[error("host.node {node} lists no CPU: name at least one in cpus = […]")]
    NoTeamCpus {
        /// Team, counted from 0.
        node: usize,
    },
    /// A NUMA node that is not there.
    #[error(
        "host.node {node} wants NUMA node {numa}, but the machine has {known}: use one of these, or leave numa out"
    )]
    UnknownNuma {
        /// Team, counted from 0.
        node: usize,
        /// As configured.
        numa: usize,
        /// The NUMA nodes that the machine has, in words.
        known: String,
    },
    /// A CPU that is not there, or not allowed.
    #[error(
        "host.node {node} wants CPU {cpu}, but this process may use CPUs {known}: use these, or widen the affinity mask or cpuset"
    )]
    UnknownCpu {
        /// Team, counted from 0.
        node: usize,
        /// As configured.
        cpu: usize,
        /// The CPUs that may be used, as ranges.
        known: String,
    },
    /// A CPU of another NUMA node than its team's.
    #[error(
        "host.node {node} is on NUMA node {numa}, but its CPU {cpu} is not (that node has CPUs {known}): move the CPU to another team, or leave numa out"
    )]
    ForeignCpu {
        /// Team, counted from 0.
        node: usize,
        /// Its NUMA node.
        numa: usize,
        /// The CPU.
        cpu: usize,
        /// The CPUs of the NUMA node, as ranges.
        known: String,
    },
    /// Two threads on one CPU.
    #[error(
        "CPU {cpu} is listed twice, in host.node {first} and host.node {second}: a CPU runs one thread, list it once"
    )]
    CpuTwice {
        /// The CPU.
        cpu: usize,
        /// Team that lists it first, counted from 0.
        first: usize,
        /// Team that lists it again.
        second: usize,
    },
    /// A thread that cannot be bound.
    #[error(
        "cannot bind a thread to CPU {cpu}: {problem}; check the affinity mask and cpuset of this process"
    )]
    Pin {
        /// The CPU.
        cpu: usize,
        /// What the system says.
        problem: String,
    },
    /// A thread that cannot be started.
    #[error("cannot start a thread: {source}; raise the limit of processes (ulimit -u)")]
    Thread {
        /// Why.
        source: io::Error,
    },
    /// More memory than there is.
    #[error(
        "{purpose} needs {bytes} bytes of memory, but {available_bytes} are available: close other programs, raise the memory limit, or use a smaller model or context"
    )]
    NotEnoughMemory {
        /// What it is for.
        purpose: &'static str,
        /// Bytes asked for.
        bytes: u64,
        /// Bytes that could be had.
        available_bytes: u64,
    },
    /// More bound to a NUMA node than it has free.
    #[error(
        "NUMA node {numa} would have to hold {bytes} bytes of weights and cache, but {free_bytes} can be had there: {cure}"
    )]
    NodeFull {
        /// The node.
        numa: usize,
        /// Bytes that would be bound to it.
        bytes: u64,
        /// Bytes that can be had there.
        free_bytes: u64,
        /// What would do.
        cure: String,
    },
    /// A NUMA node without room for a measurement.
    #[error(
        "measuring NUMA node {numa} needs {bytes} bytes there, but {free_bytes} can be had: free memory there (numactl -H shows it), or leave the node out ([[host.node]] lists those that are used)"
    )]
    NodeUnmeasured {
        /// The node.
        numa: usize,
        /// Fewest bytes that say something.
        bytes: u64,
        /// Bytes that can be had there.
        free_bytes: u64,
    },
    /// Memory that the system refuses.
    #[error(
        "the system refuses {bytes} bytes of memory: {source}; close other programs, or raise the limit (ulimit -v)"
    )]
    Map {
        /// Bytes asked for.
        bytes: usize,
        /// Why.
        source: io::Error,
    },
    /// Memory that cannot be bound to its node.
    #[error(
        "cannot bind {bytes} bytes to NUMA node {numa}: {problem}; check the cpuset's memory nodes (Mems_allowed_list in /proc/self/status)"
    )]
    BindMemory {
        /// Bytes of the area.
        bytes: usize,
        /// The node.
        numa: usize,
        /// What the system says.
        problem: String,
    },
    /// Memory that is not bound, where that is an error.
    #[error(
        "memory.strict = true, but memory is not bound to NUMA node {numa}: {problem}; allow it (docker run --cap-add SYS_NICE), or set strict = false"
    )]
    NotBound {
        /// The node, or one of them.
        numa: usize,
        /// Why.
        problem: String,
    },
    /// Memory that lies elsewhere than planned, where that is an error.
    #[error(
        "memory.strict = true, but {problem}; free memory there (numactl -H shows it), or set strict = false"
    )]
    Misplaced {
        /// Which memory, with numbers.
        problem: String,
    },
    /// Huge pages that were required and cannot be had.
    #[error(
        "huge_pages = \"require\", but {problem}: as root, echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or set pages aside (vm.nr_hugepages), or set huge_pages = \"try\""
    )]
    HugePages {
        /// What is missing.
        problem: String,
    },
}

impl TopologyError {
    /// Whether the machine is at fault (memory, a binding refused) rather than what was asked.
    pub fn is_environment(&self) -> bool {
        match self {
            TopologyError::Discovery { .. }
            | TopologyError::NoCpus
            | TopologyError::Pin { .. }
            | TopologyError::Thread { .. }
            | TopologyError::NotEnoughMemory { .. }
            | TopologyError::Map { .. }
            | TopologyError::BindMemory { .. }
            | TopologyError::NotBound { .. }
            | TopologyError::Misplaced { .. } => true,
            TopologyError::NotThisSystem
            | TopologyError::Synthetic { .. }
            | TopologyError::Description { .. }
            | TopologyError::Xml { .. }
            | TopologyError::Predict { .. }
            | TopologyError::NodeCount { .. }
            | TopologyError::TwoWays { .. }
            | TopologyError::ReservedFromNumber { .. }
            | TopologyError::ReservedCores { .. }
            | TopologyError::NoColdNode { .. }
            | TopologyError::NodeFull { .. }
            | TopologyError::HugePages { .. }
            | TopologyError::NodeUnmeasured { .. }
            | TopologyError::FewThreads { .. }
            | TopologyError::ManyThreads { .. }
            | TopologyError::NoTeamCpus { .. }
            | TopologyError::UnknownNuma { .. }
            | TopologyError::UnknownCpu { .. }
            | TopologyError::ForeignCpu { .. }
            | TopologyError::CpuTwice { .. } => false,
        }
    }
}
