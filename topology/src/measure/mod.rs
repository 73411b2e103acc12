//! What threads can read from memory at best: of their own NUMA node, of others, and row by row.

mod readers;

use serde::{Deserialize, Serialize};

use crate::config::HugePages;
use crate::error::TopologyError;
use crate::machine::Machine;
use crate::memory::available_memory_bytes;
use crate::node_room::NodeRooms;
use crate::plan::{NodePlan, Plan};
use readers::{Pattern, Reader, speeds};

/// Bytes read per pass where there is memory for it: far more than any cache.
const BUFFER_BYTES: usize = 1 << 30;

/// Fewest bytes for a measurement that says something.
const BUFFER_BYTES_MIN: usize = 256 << 20;

/// The same of a NUMA node's memory, of which it is a quarter.
const NODE_BYTES_MIN: usize = 64 << 20;

/// Passes of which the best counts.
const N_PASSES: usize = 5;

/// Sizes of the rows that are read one by one: bundles of models from 135 M to 70 B.
const ROW_BYTES: [usize; 6] = [320, 648, 1152, 2304, 4608, 9216];

/// What memory gives the teams of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemorySpeeds {
    /// By team.
    pub teams: Vec<TeamSpeeds>,
    /// Each team's whole, reading memory of each NUMA node while no other team reads.
    pub across: Vec<AcrossSpeed>,
    /// All teams at once, each from its own node, bytes per second.
    pub together_bytes_per_s: f64,
}

/// What a team reads of its own node's memory, alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TeamSpeeds {
    /// NUMA node of its memory; none where the system chooses.
    pub numa: Option<usize>,
    /// From start to end, by so many of its first threads.
    pub by_threads: Vec<ThreadsSpeed>,
    /// Rows in random order, by all its threads.
    pub by_row_bytes: Vec<RowsSpeed>,
}

/// A speed by the number of threads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ThreadsSpeed {
    /// Threads that read.
    pub n_threads: usize,
    /// Together, bytes per second.
    pub bytes_per_s: f64,
}

/// A speed by the size of rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RowsSpeed {
    /// Bytes of a row.
    pub row_bytes: usize,
    /// Bytes of rows per second.
    pub bytes_per_s: f64,
}

/// A team's speed on one NUMA node's memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AcrossSpeed {
    /// The team that reads.
    pub team: usize,
    /// NUMA node of the memory.
    pub numa: usize,
    /// Bytes per second.
    pub bytes_per_s: f64,
}

impl MemorySpeeds {
    /// Measures with the threads of `plan` and the memory of `machine`, which must be this system: a few seconds for
    /// each team, and as much again for each NUMA node. `said` is told of each part before it is measured.
    ///
    /// # Errors
    /// There is not even 256 MiB of memory, a thread cannot be started or pinned, or memory of several nodes cannot be
    /// bound, without which a speed across them would be none.
    pub fn measure(
        plan: &Plan,
        machine: &Machine,
        said: &dyn Fn(&str),
    ) -> Result<Self, TopologyError> {
        machine.require_this_system()?;
        let bytes = buffer_bytes(available_memory_bytes())?;
        let bytes = bytes.min(bytes_of_one_node(machine)?);
        let rooms = NodeRooms::of(&machine.numas());
        let bytes = bytes_within(&rooms, bytes, |_| 1.0)?;
        // all teams together have as much as one alone, so that no node has more than that
        let measuring = Measuring {
            bytes,
            huge_pages: plan.huge_pages,
            n_passes: N_PASSES,
        };
        measuring.all(plan, machine, said)
    }

    /// What the first `n_threads` threads of team `team` read of its own node, bytes per second.
    pub fn threads_bytes_per_s(&self, team: usize, n_threads: usize) -> Option<f64> {
        let mut speeds = self.teams.get(team)?.by_threads.iter();
        let found = speeds.find(|speed| speed.n_threads == n_threads);
        found.map(|speed| speed.bytes_per_s)
    }

    /// What all threads of team `team` read of its own node, bytes per second.
    pub fn team_bytes_per_s(&self, team: usize) -> Option<f64> {
        let speeds = &self.teams.get(team)?.by_threads;
        speeds.last().map(|speed| speed.bytes_per_s)
    }

    /// What team `team` reads of NUMA node `numa`, bytes per second.
    pub fn across_bytes_per_s(&self, team: usize, numa: usize) -> Option<f64> {
        let mut across = self.across.iter();
        let found = across.find(|speed| (speed.team, speed.numa) == (team, numa));
        found.map(|speed| speed.bytes_per_s)
    }
}

/// How to measure.
struct Measuring {
    huge_pages: HugePages,
    bytes: usize,
    n_passes: usize,
}

impl Measuring {
    fn all(
        &self,
        plan: &Plan,
        machine: &Machine,
        said: &dyn Fn(&str),
    ) -> Result<MemorySpeeds, TopologyError> {
        let mut teams = Vec::with_capacity(plan.nodes.len());
        for (index, node) in plan.nodes.iter().enumerate() {
            said(&format!("team {index}: its own memory"));
            teams.push(self.team(node)?);
        }
        let mut across = Vec::new();
        for (team, node) in plan.nodes.iter().enumerate() {
            for numa in machine.numas() {
                said(&format!("team {team}: memory of NUMA node {numa}"));
                // on a machine with one node nothing can lie elsewhere
                let strict = machine.numas().len() > 1;
                let readers = readers_of(node, node.cpus.len(), Some(numa), strict);
                let bytes_per_s = self.speeds(&readers, &[Pattern::Whole])?[0];
                across.push(AcrossSpeed {
                    team,
                    numa,
                    bytes_per_s,
                });
            }
        }
        said("all teams together");
        let together = self.speeds(&Reader::of_plan(plan), &[Pattern::Whole])?;
        Ok(MemorySpeeds {
            teams,
            across,
            together_bytes_per_s: together[0],
        })
    }

    fn team(&self, node: &NodePlan) -> Result<TeamSpeeds, TopologyError> {
        let mut by_threads = Vec::new();
        for n_threads in thread_counts(node.cpus.len()) {
            let readers = readers_of(node, n_threads, node.numa, false);
            let bytes_per_s = self.speeds(&readers, &[Pattern::Whole])?[0];
            by_threads.push(ThreadsSpeed {
                n_threads,
                bytes_per_s,
            });
        }
        let patterns = ROW_BYTES.map(|row_bytes| Pattern::Rows { row_bytes });
        let readers = readers_of(node, node.cpus.len(), node.numa, false);
        let found = self.speeds(&readers, &patterns)?.into_iter();
        let rows = ROW_BYTES.into_iter().zip(found);
        Ok(TeamSpeeds {
            numa: node.numa,
            by_threads,
            by_row_bytes: rows
                .map(|(row_bytes, bytes_per_s)| RowsSpeed {
                    row_bytes,
                    bytes_per_s,
                })
                .collect(),
        })
    }

    fn speeds(&self, readers: &[Reader], patterns: &[Pattern]) -> Result<Vec<f64>, TopologyError> {
        speeds(
            readers,
            self.huge_pages,
            self.bytes,
            patterns,
            self.n_passes,
        )
    }
}

fn readers_of(node: &NodePlan, n_threads: usize, numa: Option<usize>, strict: bool) -> Vec<Reader> {
    let cpus = node.cpus.iter().take(n_threads);
    cpus.map(|&cpu| Reader { cpu, numa, strict }).collect()
}

/// 1, 2, 4 and so on, and last `n_threads`.
fn thread_counts(n_threads: usize) -> Vec<usize> {
    let powers = (0..usize::BITS).map(|bit| 1 << bit);
    let below = powers.take_while(|&power| power < n_threads);
    below.chain([n_threads]).collect()
}

/// Bytes per second that the plan's threads, pinned to their CPUs, read together from memory on
/// their nodes: the best of five passes over 1 GiB (less where memory is short).
///
/// Takes about half a second, and needs the optimisation of a release build to say something.
///
/// # Errors
/// There is not even 256 MiB of memory, or 64 on one of several NUMA nodes, or a thread cannot be started or pinned.
pub fn read_bandwidth(plan: &Plan) -> Result<f64, TopologyError> {
    let bytes = buffer_bytes(available_memory_bytes())?;
    let readers = Reader::of_plan(plan);
    let part = |numa: usize| {
        let there = readers.iter().filter(|reader| reader.numa == Some(numa));
        there.count() as f64 / readers.len().max(1) as f64
    };
    let bytes = bytes_within(&NodeRooms::read(plan)?, bytes, part)?;
    let found = speeds(
        &readers,
        plan.huge_pages,
        bytes,
        &[Pattern::Whole],
        N_PASSES,
    )?;
    Ok(found[0])
}

/// At most `bytes`, of which each NUMA node has `part`: so many that three quarters of what is free there do. Memory that is
/// bound to a node without room ends the program.
fn bytes_within(
    rooms: &NodeRooms,
    bytes: usize,
    part: impl Fn(usize) -> f64,
) -> Result<usize, TopologyError> {
    let mut fitting = bytes;
    for (numa, free_bytes) in rooms.iter() {
        let part = part(numa);
        let room = free_bytes / 4 * 3;
        let own = (bytes as f64 * part) as u64;
        if own > room && room < NODE_BYTES_MIN as u64 {
            return Err(TopologyError::NodeUnmeasured {
                numa,
                bytes: NODE_BYTES_MIN as u64 / 3 * 4,
                free_bytes,
            });
        }
        if own > room {
            fitting = fitting.min((room as f64 / part) as usize);
        }
    }
    Ok(fitting)
}

/// Bytes to read of one NUMA node's memory: a quarter of the smallest, as nobody knows how much of it is in use. Memory
/// that is bound to a node without room ends the program.
fn bytes_of_one_node(machine: &Machine) -> Result<usize, TopologyError> {
    let with_cpus = machine.nodes.iter().map(|node| node.memory_bytes);
    let without = machine.memory_nodes.iter().map(|node| node.memory_bytes);
    // 0: nobody knows
    let known = with_cpus.chain(without).filter(|&bytes| bytes > 0);
    let Some(smallest) = known.min() else {
        return Ok(BUFFER_BYTES);
    };
    // a machine with one node has no other to be short of
    if machine.numas().len() < 2 {
        return Ok(BUFFER_BYTES);
    }
    match usize::try_from(smallest / 4) {
        Ok(bytes) if bytes < NODE_BYTES_MIN => Err(TopologyError::NotEnoughMemory {
            purpose: "measuring the smallest NUMA node",
            bytes: NODE_BYTES_MIN as u64 * 4,
            available_bytes: smallest,
        }),
        Ok(bytes) => Ok(bytes),
        Err(_) => Ok(BUFFER_BYTES),
    }
}

/// Bytes to read, of the memory that is available.
fn buffer_bytes(available_bytes: Option<u64>) -> Result<usize, TopologyError> {
    // A quarter is left to others.
    let bytes = available_bytes.map_or(BUFFER_BYTES, |available_bytes| {
        usize::try_from(available_bytes / 4 * 3).unwrap_or(BUFFER_BYTES)
    });
    if bytes < BUFFER_BYTES_MIN {
        return Err(TopologyError::NotEnoughMemory {
            purpose: "measuring the memory bandwidth",
            bytes: BUFFER_BYTES_MIN as u64,
            available_bytes: available_bytes.unwrap_or(0),
        });
    }
    Ok(bytes.min(BUFFER_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TopologyConfig;

    #[test]
    fn every_team_and_every_numa_node_is_measured() {
        let machine = Machine::discover().unwrap();
        let plan = Plan::new(&TopologyConfig::default(), &machine, None).unwrap();
        let measuring = Measuring {
            huge_pages: HugePages::Try,
            bytes: 16 << 20,
            n_passes: 1,
        };
        let found = measuring.all(&plan, &machine, &|_| {}).unwrap();
        assert_eq!(found.teams.len(), plan.nodes.len());
        assert_eq!(found.across.len(), plan.nodes.len() * machine.numas().len());
        for (team, (speeds, node)) in found.teams.iter().zip(&plan.nodes).enumerate() {
            let threads = speeds.by_threads.iter().map(|speed| speed.n_threads);
            assert_eq!(
                threads.collect::<Vec<usize>>(),
                thread_counts(node.cpus.len())
            );
            assert_eq!(speeds.by_row_bytes.len(), ROW_BYTES.len());
            assert!(found.team_bytes_per_s(team).unwrap() > 1e7);
            for numa in machine.numas() {
                assert!(found.across_bytes_per_s(team, numa).unwrap() > 1e7);
            }
        }
        assert!(found.together_bytes_per_s > 1e7);
        assert_eq!(found.team_bytes_per_s(plan.nodes.len()), None);
    }

    #[test]
    fn made_up_machines_cannot_be_measured() {
        let machine = Machine::of_nodes(
            vec![],
            crate::machine::MachineSource::Synthetic("core:2".to_owned()),
        );
        let plan = Plan::of_nodes(vec![], HugePages::Off);
        let error = MemorySpeeds::measure(&plan, &machine, &|_| {}).unwrap_err();
        assert!(error.to_string().contains("core:2"), "{error}");
    }

    #[test]
    fn the_smallest_node_has_room() {
        let machine = |memory_bytes: &[u64]| {
            let nodes = memory_bytes.iter().enumerate();
            let nodes = nodes.map(|(index, &memory_bytes)| crate::machine::MachineNode {
                os_index: Some(index),
                memory_bytes,
                cores: vec![],
            });
            Machine::of_nodes(nodes.collect(), crate::machine::MachineSource::Hwloc)
        };
        let bytes = |sizes: &[u64]| bytes_of_one_node(&machine(sizes));
        assert_eq!(bytes(&[64 << 30, 1 << 30]).unwrap(), 256 << 20);
        assert_eq!(bytes(&[64 << 30, 0]).unwrap(), 16 << 30);
        assert_eq!(bytes(&[64 << 20]).unwrap(), BUFFER_BYTES);
        let error = bytes(&[64 << 30, 128 << 20]).unwrap_err().to_string();
        assert!(error.contains("the smallest NUMA node"), "{error}");
    }

    /// Buffers of 256 MiB, half of them bound to a node of 64, ended the program.
    #[test]
    fn a_small_node_bounds_what_is_read_of_all() {
        let within = |free: [u64; 2], part: [f64; 2]| {
            let rooms = NodeRooms::new([(0, free[0]), (1, free[1])]);
            bytes_within(&rooms, BUFFER_BYTES, |numa| part[numa])
        };
        assert_eq!(
            within([64 << 30, 64 << 30], [0.5, 0.5]).unwrap(),
            BUFFER_BYTES
        );
        assert_eq!(
            within([64 << 30, 400 << 20], [0.5, 0.5]).unwrap(),
            600 << 20
        );
        assert_eq!(
            within([64 << 30, 400 << 20], [0.75, 0.25]).unwrap(),
            BUFFER_BYTES
        );
        assert_eq!(within([64 << 30, 0], [1.0, 0.0]).unwrap(), BUFFER_BYTES);
        let error = within([64 << 30, 40 << 20], [0.5, 0.5]).unwrap_err();
        assert!(!error.is_environment());
        assert_eq!(
            error.to_string(),
            "measuring NUMA node 1 needs 89478484 bytes there, but 41943040 can be had: free memory there (numactl -H shows it), or leave the node out ([[host.node]] lists those that are used)"
        );
    }

    #[test]
    fn threads_are_doubled_up_to_all() {
        assert_eq!(thread_counts(1), [1]);
        assert_eq!(thread_counts(2), [1, 2]);
        assert_eq!(thread_counts(6), [1, 2, 4, 6]);
        assert_eq!(thread_counts(16), [1, 2, 4, 8, 16]);
    }

    #[test]
    fn the_buffer_fits_the_memory() {
        assert_eq!(buffer_bytes(None).unwrap(), 1 << 30);
        assert_eq!(buffer_bytes(Some(1 << 40)).unwrap(), 1 << 30);
        assert_eq!(buffer_bytes(Some(800 << 20)).unwrap(), 600 << 20);
        let error = buffer_bytes(Some(300 << 20)).unwrap_err();
        assert!(error.is_environment());
        assert_eq!(
            error.to_string(),
            "measuring the memory bandwidth needs 268435456 bytes of memory, but 314572800 are available: close other programs, raise the memory limit, or use a smaller model or context"
        );
    }
}
