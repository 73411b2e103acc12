//! A configuration held against a machine: what the machine lacks, and what fits instead.

use std::fmt;

use crate::config::{
    ByteSize, ColdPolicy, GpuConfig, HostConfig, ListedTeam, MachineNeeds, MemoryConfig, NodeCount,
    ThreadsPerNode, TopologyConfig, VramBudget,
};
use crate::machine::{Gpu, Machine, gib};
use crate::plan::{N_NODES_MAX, Plan};

/// Back ends for GPUs that the program has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backends {
    /// For NVIDIA's.
    pub cuda: bool,
}

/// Something that is asked and not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The key with its value.
    pub asked: String,
    /// What there is instead.
    pub there: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.asked, self.there)
    }
}

/// `config` changed so that it plans `plan` on `machine` without any flag beside it, with teams listed CPU by CPU where
/// nothing shorter does. None where nothing does: teams of unequal size that share CPUs.
pub fn asking_for(
    config: &TopologyConfig,
    plan: &Plan,
    machine: &Machine,
) -> Option<TopologyConfig> {
    let with = |host: HostConfig| TopologyConfig {
        memory: MemoryConfig {
            cold: plan.cold,
            huge_pages: plan.huge_pages,
            strict: plan.strict,
        },
        host,
        ..config.clone()
    };
    let is_it = |config: &TopologyConfig| {
        let found = Plan::quietly(config, machine, None);
        found.is_ok_and(|found| found.nodes == plan.nodes)
    };
    let hosts = divided_hosts(&config.host, plan).into_iter();
    hosts.chain([listed_host(plan)]).map(with).find(is_it)
}

/// `host` with a team for each NUMA node, as it is, and with as many teams as `plan` has; each also with its threads.
fn divided_hosts(host: &HostConfig, plan: &Plan) -> Vec<HostConfig> {
    let &HostConfig::Divided {
        nodes,
        threads,
        reserved_cores,
        cores,
    } = host
    else {
        return Vec::new();
    };
    let sizes = plan.team_sizes();
    let mut counts = vec![(threads, reserved_cores)];
    if sizes.iter().all(|&size| size == sizes[0]) {
        // a number of threads says how many cores are left to others
        counts.push((ThreadsPerNode::Number(sizes[0]), 0));
    }
    let n_nodes = [NodeCount::All, nodes, NodeCount::Number(sizes.len())];
    let of_counts = |(threads, reserved_cores)| {
        n_nodes.map(|nodes| HostConfig::Divided {
            nodes,
            threads,
            reserved_cores,
            cores,
        })
    };
    counts.into_iter().flat_map(of_counts).collect()
}

/// The teams of `plan`, CPU by CPU.
fn listed_host(plan: &Plan) -> HostConfig {
    let teams = plan.nodes.iter().map(|node| ListedTeam {
        numa: node.numa,
        cpus: node.cpus.clone(),
    });
    HostConfig::Listed(teams.collect())
}

/// What becomes of a configuration on a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fit {
    /// What the machine lacks; the configuration fits where it lacks nothing.
    pub lacks: Vec<Difference>,
    /// GPUs that are not there and not required: the host computes in their place.
    pub fallbacks: Vec<Difference>,
    /// The nearest configuration that fits.
    pub nearest: TopologyConfig,
    /// The configuration on what there is: as many teams as it asks for, missing GPUs on the host.
    pub simulated: TopologyConfig,
}

impl Fit {
    /// Holds `config` against a machine with CPUs, for a program with these `backends`.
    pub fn new(config: &TopologyConfig, machine: &Machine, backends: Backends) -> Self {
        let mut lacks = Vec::new();
        let mut fallbacks = Vec::new();
        let needs = lacking_needs(&config.machine, machine, &mut lacks);
        let gpus = fitting_gpus(config, machine, backends, &mut lacks, &mut fallbacks);
        if let Err(error) = Plan::quietly(config, machine, None)
            && !error.is_environment()
        {
            lacks.push(Difference {
                asked: "[host]".to_owned(),
                there: error.to_string(),
            });
        }
        let there = TopologyConfig {
            machine: needs,
            gpus,
            ..config.clone()
        };
        let simulated = first_that_fits(&there, simulated_hosts(config, machine), machine);
        let nearest = match lacks.is_empty() {
            true => there.clone(),
            false => first_that_fits(&there, nearest_hosts(config, machine), machine),
        };
        Self {
            lacks,
            fallbacks,
            nearest,
            simulated,
        }
    }
}

/// `needs` without those that the machine does not meet, which are added to `lacks`.
fn lacking_needs(
    needs: &MachineNeeds,
    machine: &Machine,
    lacks: &mut Vec<Difference>,
) -> MachineNeeds {
    let mut met = needs.clone();
    if let Some(asked) = needs.numa_nodes.filter(|&n| n > machine.nodes.len()) {
        met.numa_nodes = None;
        lacks.push(Difference {
            asked: format!("machine.numa_nodes = {asked}"),
            there: match machine.nodes.len() {
                1 => "the machine has 1 NUMA node with cores".to_owned(),
                n => format!("the machine has {n} NUMA nodes with cores"),
            },
        });
    }
    let fewest = machine.nodes.iter().map(|node| node.cores.len()).min();
    if let Some((asked, there)) = needs.cores_per_node.zip(fewest).filter(|(a, t)| a > t) {
        met.cores_per_node = None;
        lacks.push(Difference {
            asked: format!("machine.cores_per_node = {asked}"),
            there: match there {
                1 => "a node has 1 core that may be used".to_owned(),
                there => format!("a node has {there} cores that may be used"),
            },
        });
    }
    let known = machine.nodes.iter().map(|node| node.memory_bytes);
    let least = known.filter(|&bytes| bytes > 0).min().map(ByteSize);
    if let Some((asked, there)) = needs.memory_per_node.zip(least).filter(|(a, t)| a > t) {
        met.memory_per_node = None;
        lacks.push(Difference {
            asked: format!("machine.memory_per_node = \"{asked}\""),
            there: format!("a node has {} of memory", gib(there.0)),
        });
    }
    met
}

/// The GPUs of `config` that can be used, each with a budget that it has.
fn fitting_gpus(
    config: &TopologyConfig,
    machine: &Machine,
    backends: Backends,
    lacks: &mut Vec<Difference>,
    fallbacks: &mut Vec<Difference>,
) -> Vec<GpuConfig> {
    let mut free: Vec<&Gpu> = machine.gpus.iter().collect();
    // those that are named are not for others
    let named = |gpu: &Gpu| {
        let mut others = config.gpus.iter();
        others.any(|other| is_at(other, gpu))
    };
    let mut fitting = Vec::new();
    for (index, asked) in config.gpus.iter().enumerate() {
        let position = free.iter().position(|gpu| match asked.pci_address {
            Some(_) => is_at(asked, gpu),
            None => !named(gpu),
        });
        let found = position.map(|position| free.remove(position));
        let there = match found {
            None => missing_gpu(machine, asked),
            Some(gpu) if !backends.cuda => format!(
                "{} is there, but this program has no CUDA back end yet",
                gpu_name(gpu)
            ),
            Some(gpu) => match (asked.vram_budget, gpu.memory_bytes) {
                (VramBudget::Bytes(size), Some(bytes)) if size.0 > bytes => {
                    fitting.push(GpuConfig {
                        vram_budget: VramBudget::All,
                        ..asked.clone()
                    });
                    format!("{} has {} of memory", gpu_name(gpu), gib(bytes))
                }
                _ => {
                    fitting.push(asked.clone());
                    continue;
                }
            },
        };
        let budget = match asked.vram_budget {
            VramBudget::All => String::new(),
            VramBudget::Bytes(size) => format!(" with {size}"),
        };
        let difference = Difference {
            asked: format!("gpu {index}{budget}"),
            there,
        };
        match asked.required {
            true => lacks.push(difference),
            false => fallbacks.push(difference),
        }
    }
    fitting
}

fn is_at(asked: &GpuConfig, gpu: &Gpu) -> bool {
    let address = asked.pci_address.as_ref();
    address.is_some_and(|address| address.eq_ignore_ascii_case(&gpu.pci_address))
}

fn gpu_name(gpu: &Gpu) -> String {
    match &gpu.name {
        Some(name) => format!("{name} at {}", gpu.pci_address),
        None => format!("an NVIDIA GPU at {}", gpu.pci_address),
    }
}

fn missing_gpu(machine: &Machine, asked: &GpuConfig) -> String {
    let addresses: Vec<&str> = machine
        .gpus
        .iter()
        .map(|gpu| gpu.pci_address.as_str())
        .collect();
    match (&asked.pci_address, addresses.len()) {
        (_, 0) => "the machine has no NVIDIA GPU".to_owned(),
        (Some(address), _) => format!(
            "the machine has no NVIDIA GPU at {address}, but at {}",
            addresses.join(", ")
        ),
        (None, 1) => "the machine has 1 NVIDIA GPU".to_owned(),
        (None, n) => format!("the machine has {n} NVIDIA GPUs"),
    }
}

/// The first of `hosts` for which there is a plan; the default's where there is none.
fn first_that_fits(
    config: &TopologyConfig,
    hosts: Vec<HostConfig>,
    machine: &Machine,
) -> TopologyConfig {
    let with = |host: HostConfig, cold: ColdPolicy| {
        let mut config = config.clone();
        config.host = host;
        config.memory.cold = cold;
        config
    };
    let policies = [config.memory.cold, ColdPolicy::Shard];
    let candidates = policies
        .into_iter()
        .flat_map(|cold| hosts.iter().map(move |host| (host.clone(), cold)));
    candidates
        .map(|(host, cold)| with(host, cold))
        .find(|config| Plan::quietly(config, machine, None).is_ok())
        .unwrap_or_else(|| with(HostConfig::default(), ColdPolicy::Shard))
}

/// Hosts as near to the configured one as can be, nearest first, with no more teams than NUMA nodes where the
/// configuration asks for NUMA nodes.
fn nearest_hosts(config: &TopologyConfig, machine: &Machine) -> Vec<HostConfig> {
    let there = machine.nodes.len();
    let lacks_nodes = config.machine.numa_nodes.is_some_and(|n| n > there);
    match &config.host {
        HostConfig::Divided {
            nodes,
            threads,
            reserved_cores,
            cores,
        } => {
            let nodes = match *nodes {
                NodeCount::Number(n) if lacks_nodes => NodeCount::Number(n.min(there)),
                NodeCount::All if there > N_NODES_MAX => NodeCount::Number(N_NODES_MAX),
                nodes => nodes,
            };
            lesser_hosts(nodes, *threads, *reserved_cores, *cores, machine)
        }
        HostConfig::Listed(teams) => {
            let mut hosts = vec![config.host.clone()];
            let left = teams_that_are_there(teams, machine);
            if !left.is_empty() {
                hosts.push(HostConfig::Listed(left));
            }
            hosts.extend(hosts_of(NodeCount::Number(teams.len().min(there)), machine));
            hosts
        }
    }
}

/// Hosts with as many teams as the configuration asks for, nearest first.
fn simulated_hosts(config: &TopologyConfig, machine: &Machine) -> Vec<HostConfig> {
    let there = machine.nodes.len();
    match &config.host {
        HostConfig::Divided {
            nodes,
            threads,
            reserved_cores,
            cores,
        } => {
            let nodes = match (*nodes, config.machine.numa_nodes) {
                (NodeCount::All, Some(asked)) if asked > there => {
                    NodeCount::Number(asked.min(N_NODES_MAX))
                }
                (NodeCount::All, _) if there > N_NODES_MAX => NodeCount::Number(N_NODES_MAX),
                (nodes, _) => nodes,
            };
            lesser_hosts(nodes, *threads, *reserved_cores, *cores, machine)
        }
        HostConfig::Listed(teams) => {
            let mut hosts = vec![config.host.clone()];
            hosts.extend(hosts_of(NodeCount::Number(teams.len()), machine));
            hosts
        }
    }
}

/// Divided hosts that ask for ever less: fewer threads, and no cores for others.
fn lesser_hosts(
    nodes: NodeCount,
    threads: ThreadsPerNode,
    reserved_cores: usize,
    cores: crate::config::CoreChoice,
    machine: &Machine,
) -> Vec<HostConfig> {
    let host = |threads, reserved_cores| HostConfig::Divided {
        nodes,
        threads,
        reserved_cores,
        cores,
    };
    let mut hosts = vec![host(threads, reserved_cores)];
    match threads {
        ThreadsPerNode::Number(asked) => {
            let n_most = asked.min(machine.n_cpus());
            hosts.extend(
                (1..=n_most)
                    .rev()
                    .map(|n| host(ThreadsPerNode::Number(n), 0)),
            );
        }
        threads => hosts.extend((0..reserved_cores).rev().map(|n| host(threads, n))),
    }
    hosts
}

fn hosts_of(nodes: NodeCount, machine: &Machine) -> Vec<HostConfig> {
    let cores = crate::config::CoreChoice::default();
    lesser_hosts(nodes, ThreadsPerNode::Cores, 0, cores, machine)
}

/// Listed teams with the CPUs that there are, on the NUMA nodes that these are of; teams without any are left out.
fn teams_that_are_there(teams: &[ListedTeam], machine: &Machine) -> Vec<ListedTeam> {
    let mut left = Vec::new();
    for team in teams {
        let is_there = |cpu: &&usize| machine.nodes.iter().any(|node| node.cpus().contains(cpu));
        let cpus: Vec<usize> = team.cpus.iter().filter(is_there).copied().collect();
        let Some(leader) = cpus.first() else {
            continue;
        };
        let mut nodes = machine.nodes.iter();
        let home = nodes.find(|node| node.cpus().contains(leader));
        let cpus = cpus
            .into_iter()
            .filter(|cpu| team.numa.is_none() || home.is_some_and(|n| n.cpus().contains(cpu)));
        left.push(ListedTeam {
            numa: team.numa.and(home.and_then(|node| node.os_index)),
            cpus: cpus.collect(),
        });
    }
    left
}
