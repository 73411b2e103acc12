//! Which threads and memory are used: what is asked, fitted to what the machine has.

use std::collections::HashSet;

use serde::Serialize;
use tracing::warn;

use crate::config::{
    ColdPolicy, CoreChoice, GpuConfig, HostConfig, HugePages, ListedTeam, NodeCount,
    ThreadsPerNode, TopologyConfig, check_node_count,
};
use crate::error::TopologyError;
use crate::machine::{Core, Gpu, Machine, MachineNode, cpus_of, ranges};
use crate::proportion::Proportion;

/// Most nodes that a plan can have: a layer's neurons are in so many groups, and a node has at
/// least one.
pub const N_NODES_MAX: usize = 16;

/// Which threads and memory a program uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Teams, one per node.
    pub nodes: Vec<NodePlan>,
    /// Huge pages for weights.
    pub huge_pages: HugePages,
    /// Where cold neurons' bundles lie.
    pub cold: ColdPolicy,
    /// What the nodes' shares are in proportion to.
    pub proportion: Proportion,
    /// Whether memory that cannot be bound, or that lies elsewhere than planned, is an error.
    pub strict: bool,
    /// GPUs that are used, in the order of their layers.
    #[serde(skip)]
    pub gpus: Vec<GpuConfig>,
}

/// One node's team and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodePlan {
    /// The NUMA node (as the system numbers it) whose memory is used; none: the system's choice.
    pub numa: Option<usize>,
    /// Logical CPU (as the system numbers it) of each thread, the leader's first.
    pub cpus: Vec<usize>,
}

impl Plan {
    /// Teams as they are given, each with its share of the weights.
    pub fn of_nodes(nodes: Vec<NodePlan>, huge_pages: HugePages) -> Self {
        Self {
            nodes,
            huge_pages,
            cold: ColdPolicy::Shard,
            proportion: Proportion::Threads,
            strict: false,
            gpus: Vec::new(),
        }
    }

    /// Fits `config` to `machine`.
    ///
    /// `threads` (the command line's `-t`) is a total that is divided over the nodes as evenly as
    /// can be, the first nodes taking what is left over; it overrides the configured threads.
    ///
    /// # Errors
    /// The machine lacks a node or CPU that is asked for, a CPU is listed twice, there are more
    /// than [`N_NODES_MAX`] nodes, or more threads than CPUs or fewer than nodes, or no team for
    /// `memory.cold`.
    pub fn new(
        config: &TopologyConfig,
        machine: &Machine,
        threads: Option<usize>,
    ) -> Result<Self, TopologyError> {
        let plan = Self::quietly(config, machine, threads)?;
        warn_of_shared_cpus(&plan.nodes);
        Ok(plan)
    }

    /// The same without a word in the log, for plans that are only thought of.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub(crate) fn quietly(
        config: &TopologyConfig,
        machine: &Machine,
        threads: Option<usize>,
    ) -> Result<Self, TopologyError> {
        config.host.check()?;
        if machine.n_cpus() == 0 {
            return Err(TopologyError::NoCpus);
        }
        let teams = match &config.host {
            HostConfig::Divided {
                nodes,
                threads,
                reserved_cores,
                cores,
            } => divided_teams(machine, *nodes, *threads, *reserved_cores, *cores)?,
            HostConfig::Listed(teams) => listed_teams(machine, teams)?,
        };
        let cold = config.memory.cold;
        if let ColdPolicy::Single(node) = cold
            && node >= teams.len()
        {
            return Err(TopologyError::NoColdNode {
                node,
                n_nodes: teams.len(),
            });
        }
        let counts = match threads {
            None => teams.iter().map(|team| team.n_threads).collect(),
            Some(threads) => even_counts(threads, teams.len())?,
        };
        let cpus = assign(&teams, &counts).map_err(|full| full.explain(&teams, threads))?;
        let nodes: Vec<NodePlan> = teams
            .iter()
            .zip(cpus)
            .map(|(team, cpus)| NodePlan {
                numa: team.numa,
                cpus,
            })
            .collect();
        Ok(Self {
            nodes,
            huge_pages: config.memory.huge_pages,
            cold,
            proportion: Proportion::Threads,
            strict: config.memory.strict,
            gpus: config.gpus.clone(),
        })
    }

    /// NUMA nodes whose memory is used, ascending; none where the system chooses.
    pub fn numas(&self) -> Vec<usize> {
        let mut numas: Vec<usize> = self.nodes.iter().filter_map(|node| node.numa).collect();
        numas.sort_unstable();
        numas.dedup();
        numas
    }

    /// The entry that uses each of `gpus`, none where no entry does: those with an address first, the others in order.
    pub fn gpu_entries(&self, gpus: &[Gpu]) -> Vec<Option<&GpuConfig>> {
        let named = |gpu: &Gpu| {
            let mut entries = self.gpus.iter();
            entries.find(|entry| {
                let address = entry.pci_address.as_deref();
                address.is_some_and(|address| address.eq_ignore_ascii_case(&gpu.pci_address))
            })
        };
        let mut others = self.gpus.iter().filter(|entry| entry.pci_address.is_none());
        gpus.iter()
            .map(|gpu| named(gpu).or_else(|| others.next()))
            .collect()
    }

    /// Threads of each team.
    pub fn team_sizes(&self) -> Vec<usize> {
        self.nodes.iter().map(|node| node.cpus.len()).collect()
    }

    /// Threads of all teams.
    pub fn n_threads(&self) -> usize {
        self.nodes.iter().map(|node| node.cpus.len()).sum()
    }
}

/// A team before its number of threads is known.
struct Team {
    numa: Option<usize>,
    /// CPUs in the order in which threads take them.
    own: Vec<usize>,
    /// CPUs of its NUMA node that no team has; the team that asks first takes them.
    spare: Vec<usize>,
    /// Threads as configured.
    n_threads: usize,
}

/// A team that has no CPU left for a thread.
struct TeamFull {
    node: usize,
    n_threads: usize,
    n_cpus: usize,
}

impl TeamFull {
    fn explain(self, teams: &[Team], threads: Option<usize>) -> TopologyError {
        let (asked_by, cure) = match threads {
            None => (
                format!("host.threads = {}", self.n_threads),
                format!("set it to {} or fewer", self.n_cpus),
            ),
            Some(threads) => (
                format!("-t {threads}"),
                match largest_fit(teams, threads) {
                    Some(fit) => format!("give -t {fit} or fewer"),
                    None => "configure fewer nodes".to_owned(),
                },
            ),
        };
        TopologyError::ManyThreads {
            asked_by,
            node: self.node,
            n_threads: self.n_threads,
            n_cpus: self.n_cpus,
            cure,
        }
    }
}

/// The largest total below `threads` for which every team has CPUs.
fn largest_fit(teams: &[Team], threads: usize) -> Option<usize> {
    let n_cpus: usize = teams
        .iter()
        .map(|team| team.own.len() + team.spare.len())
        .sum();
    (teams.len()..threads.min(n_cpus + 1)).rev().find(|&total| {
        even_counts(total, teams.len()).is_ok_and(|counts| assign(teams, &counts).is_ok())
    })
}

/// `total` threads over `n_nodes` teams.
fn even_counts(total: usize, n_nodes: usize) -> Result<Vec<usize>, TopologyError> {
    if total < n_nodes {
        return Err(TopologyError::FewThreads {
            threads: total,
            n_nodes,
        });
    }
    Ok((0..n_nodes).map(|i| part(total, n_nodes, i)).collect())
}

/// Size of part `index` of `total` things in `n_parts` parts as even as can be.
fn part(total: usize, n_parts: usize, index: usize) -> usize {
    total / n_parts + usize::from(index < total % n_parts)
}

/// CPUs of each team's threads.
fn assign(teams: &[Team], counts: &[usize]) -> Result<Vec<Vec<usize>>, TeamFull> {
    let mut lent: HashSet<usize> = HashSet::new();
    let mut assigned = Vec::with_capacity(teams.len());
    for (node, (team, &n_threads)) in teams.iter().zip(counts).enumerate() {
        let spare = team.spare.iter().filter(|cpu| !lent.contains(cpu));
        let free: Vec<usize> = team.own.iter().chain(spare).copied().collect();
        let Some(cpus) = free.get(..n_threads) else {
            return Err(TeamFull {
                node,
                n_threads,
                n_cpus: free.len(),
            });
        };
        lent.extend(cpus.iter().skip(team.own.len()));
        assigned.push(cpus.to_vec());
    }
    Ok(assigned)
}

/// Teams of a machine's cores, NUMA node by NUMA node.
fn divided_teams(
    machine: &Machine,
    nodes: NodeCount,
    threads: ThreadsPerNode,
    reserved_cores: usize,
    choice: CoreChoice,
) -> Result<Vec<Team>, TopologyError> {
    let n_nodes = match nodes {
        NodeCount::All => machine.nodes.len(),
        NodeCount::Number(n_nodes) => n_nodes,
    };
    check_node_count(n_nodes)?;
    let homes = &machine.nodes[..n_nodes.min(machine.nodes.len())];
    let mut teams = Vec::with_capacity(n_nodes);
    for (index, home) in homes.iter().enumerate() {
        let n_here = part(n_nodes, homes.len(), index);
        let (mut chosen, mut slow) = home.cores_by_speed();
        if choice == CoreChoice::All {
            chosen.append(&mut slow);
        }
        if chosen.len() < n_here {
            teams.extend((0..n_here).map(|i| sharing_team(home, threads, i)));
            continue;
        }
        let n_chosen = chosen.len();
        let mut cores = chosen.as_slice();
        for i in 0..n_here {
            let (own, others) = cores.split_at(part(n_chosen, n_here, i));
            cores = others;
            let team = core_team(home.os_index, own, threads, reserved_cores);
            let team = team.map(|team| Team {
                spare: cpus_of(&slow),
                ..team
            });
            teams.push(team.ok_or(TopologyError::ReservedCores {
                node: teams.len(),
                n_cores: own.len(),
                reserved_cores,
            })?);
        }
    }
    Ok(teams)
}

/// A team with cores of its own; none if all are reserved.
fn core_team(
    numa: Option<usize>,
    cores: &[Core],
    threads: ThreadsPerNode,
    reserved_cores: usize,
) -> Option<Team> {
    let n_used = cores.len().checked_sub(reserved_cores)?;
    let (used, reserved) = cores.split_at(n_used);
    let mut own = cpus_of(used);
    let n_threads = match threads {
        ThreadsPerNode::Cores => used.len(),
        ThreadsPerNode::Hyperthreads => own.len(),
        ThreadsPerNode::Number(n_threads) => n_threads,
    };
    if n_used == 0 {
        return None;
    }
    // Only an explicit -t reaches these.
    own.extend(cpus_of(reserved));
    Some(Team {
        numa,
        own,
        spare: Vec::new(),
        n_threads,
    })
}

/// Team `index` of more teams than its NUMA node has cores: they go round its CPUs.
fn sharing_team(home: &MachineNode, threads: ThreadsPerNode, index: usize) -> Team {
    let mut own = home.cpus();
    let first = index % own.len();
    own.rotate_left(first);
    Team {
        numa: home.os_index,
        own,
        spare: Vec::new(),
        n_threads: match threads {
            ThreadsPerNode::Cores | ThreadsPerNode::Hyperthreads => 1,
            ThreadsPerNode::Number(n_threads) => n_threads,
        },
    }
}

/// Teams as listed, on a machine that has what they name.
fn listed_teams(machine: &Machine, listed: &[ListedTeam]) -> Result<Vec<Team>, TopologyError> {
    let taken: HashSet<usize> = listed.iter().flat_map(|team| &team.cpus).copied().collect();
    listed
        .iter()
        .enumerate()
        .map(|(node, team)| {
            let home = listed_home(machine, node, team)?;
            let spare = home.cpus().into_iter().filter(|cpu| !taken.contains(cpu));
            Ok(Team {
                numa: team.numa,
                own: team.cpus.clone(),
                spare: spare.collect(),
                n_threads: team.cpus.len(),
            })
        })
        .collect()
}

/// The NUMA node of a listed team: the one that it names, else its leader's.
fn listed_home<'m>(
    machine: &'m Machine,
    node: usize,
    team: &ListedTeam,
) -> Result<&'m MachineNode, TopologyError> {
    let home_of = |cpu: usize| {
        let mut homes = machine.nodes.iter();
        homes.find(|home| home.cpus().contains(&cpu))
    };
    if let Some(&cpu) = team.cpus.iter().find(|&&cpu| home_of(cpu).is_none()) {
        return Err(TopologyError::UnknownCpu {
            node,
            cpu,
            known: ranges(machine.cpus()),
        });
    }
    let Some(numa) = team.numa else {
        let leader = team
            .cpus
            .first()
            .ok_or(TopologyError::NoTeamCpus { node })?;
        return home_of(*leader).ok_or(TopologyError::NoCpus);
    };
    let mut homes = machine.nodes.iter();
    let home = homes
        .find(|home| home.os_index == Some(numa))
        .ok_or_else(|| unknown_numa(machine, node, numa))?;
    let own = home.cpus();
    match team.cpus.iter().find(|cpu| !own.contains(cpu)) {
        None => Ok(home),
        Some(&cpu) => Err(TopologyError::ForeignCpu {
            node,
            numa,
            cpu,
            known: ranges(own),
        }),
    }
}

fn unknown_numa(machine: &Machine, node: usize, numa: usize) -> TopologyError {
    let known: Vec<usize> = machine.nodes.iter().filter_map(|n| n.os_index).collect();
    TopologyError::UnknownNuma {
        node,
        numa,
        known: match known.len() {
            0 => "no numbered NUMA node".to_owned(),
            1 => format!("only NUMA node {}", known[0]),
            _ => format!("NUMA nodes {}", ranges(known)),
        },
    }
}

fn warn_of_shared_cpus(nodes: &[NodePlan]) {
    let mut seen = HashSet::new();
    let cpus = nodes.iter().flat_map(|node| &node.cpus).copied();
    let shared: HashSet<usize> = cpus.filter(|cpu| !seen.insert(*cpu)).collect();
    if !shared.is_empty() {
        warn!(
            n_nodes = nodes.len(),
            cpus = ranges(shared.into_iter().collect()),
            "more teams than cores: threads share CPUs, which is good for tests only"
        );
    }
}
