//! What was measured of a machine once, kept for planning: `pi-runtime topology measure`.
//!
//! A profile belongs to one machine and the threads of one plan: its fingerprint is a hash of both, and names its file.

mod gpu_link;
mod report;
mod store;

use std::time::Duration;

use pi_actors::Teams;
use pi_actors::latency::{Latency, fork_join, hop, join};
use pi_topology::{Machine, MemorySpeeds, NodePlan, Plan, pin_thread};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::bench::environment::cpu_name;
use crate::calendar::DateTime;
use crate::error::RuntimeError;

pub use gpu_link::{GpuLink, memory_bandwidth};
pub use store::ProfileStore;

/// Of the file's form, and of what is measured how: another version is another fingerprint.
const VERSION: u32 = 2;

/// Forks and joins, and messages, that are timed.
const N_ROUNDS: usize = 20_000;

/// Joins of sums that are timed.
const N_JOINS: usize = 2000;

/// Equal nodes whose sums are joined: one sum of each.
const JOINED_SUMS: [usize; 4] = [1, 2, 4, 8];

/// Values of a sum: a model of 70 B has as many.
const JOINED_WIDTH: usize = 8192;

/// Time after the last job at which threads have to be at rest.
const AT_REST: Duration = Duration::from_millis(50);

/// For how long it is watched that they are.
const WATCHED: Duration = Duration::from_secs(1);

/// What a machine gives the threads of a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MachineProfile {
    /// Of the machine and the plan, see [`fingerprint`].
    pub fingerprint: String,
    /// When it was measured, UTC.
    pub measured: String,
    /// The processor's name.
    pub cpu: String,
    /// The machine in a line.
    pub machine: String,
    /// Threads of each team.
    pub threads: Vec<usize>,
    /// Bandwidths.
    pub memory: MemorySpeeds,
    /// A team's job without work, by team.
    pub fork_join: Vec<Nanoseconds>,
    /// Messages between threads: inside a team, and between the teams' leaders.
    pub hops: Vec<Hop>,
    /// Sums of so many nodes joined by the device's node; none in files of earlier versions.
    #[serde(default)]
    pub joins: Vec<Join>,
    /// What passes between host and GPUs; likewise.
    #[serde(default)]
    pub gpus: Vec<GpuLink>,
    /// Why GPUs were not measured.
    #[serde(default)]
    pub gpu_problems: Vec<String>,
    /// What idle teams use of a CPU, percent, from 50 ms after their last job on.
    pub idle_cpu_percent: f64,
}

/// A time that varies, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nanoseconds {
    /// Half of the times are no longer.
    pub median_ns: u64,
    /// 99 of 100 are no longer.
    pub p99_ns: u64,
}

impl From<Latency> for Nanoseconds {
    fn from(latency: Latency) -> Self {
        Self {
            median_ns: latency.median_ns,
            p99_ns: latency.p99_ns,
        }
    }
}

/// Partial sums of an FFN joined into one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// How many.
    pub n_sums: usize,
    /// Values of each.
    pub width: usize,
    /// How long it takes.
    pub time: Nanoseconds,
}

impl Join {
    /// Measures 1, 2, 4 and 8 sums on the team of `node`.
    ///
    /// # Errors
    /// A thread cannot be started or pinned.
    pub fn measure(node: &NodePlan) -> Result<Vec<Self>, RuntimeError> {
        (JOINED_SUMS.iter())
            .map(|&n_sums| {
                Ok(Self {
                    n_sums,
                    width: JOINED_WIDTH,
                    time: join(node, n_sums, JOINED_WIDTH, N_JOINS)?.into(),
                })
            })
            .collect()
    }

    /// What joining `n_sums` sums of `width` values takes longer than taking one, ns; 0 where it was not measured.
    pub fn more_ns(joins: &[Self], n_sums: usize, width: usize) -> f64 {
        let value_ns = |n_sums: usize| {
            let found = joins.iter().find(|join| join.n_sums == n_sums)?;
            Some(found.time.median_ns as f64 / found.width.max(1) as f64)
        };
        match (value_ns(n_sums), value_ns(1)) {
            (Some(several), Some(one)) => (several - one).max(0.0) * width as f64,
            _ => 0.0,
        }
    }
}

/// A message from one thread to another that spins for it, one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// Teams of both.
    pub teams: [usize; 2],
    /// Their logical CPUs.
    pub cpus: [usize; 2],
    /// How long it takes.
    pub time: Nanoseconds,
}

impl MachineProfile {
    /// Measures `machine`, which must be this system, with the threads of `plan`; `said` is told of each part before it
    /// is measured.
    ///
    /// # Errors
    /// Threads or memory that cannot be had.
    pub fn measure(
        machine: &Machine,
        plan: &Plan,
        said: &dyn Fn(&str),
    ) -> Result<Self, RuntimeError> {
        let memory = MemorySpeeds::measure(plan, machine, said)?;
        let mut fork_joins = Vec::with_capacity(plan.nodes.len());
        for (team, node) in plan.nodes.iter().enumerate() {
            said(&format!("team {team}: fork and join"));
            fork_joins.push(fork_join(node, N_ROUNDS)?.into());
        }
        let mut hops = Vec::new();
        for (teams, cpus) in pairs(plan) {
            said(&format!("messages from CPU {} to {}", cpus[0], cpus[1]));
            let time = hop(cpus[0], cpus[1], N_ROUNDS)?.into();
            hops.push(Hop { teams, cpus, time });
        }
        let device_node = &plan.nodes[0];
        said("team 0: joining sums");
        let joins = Join::measure(device_node)?;
        let (gpus, gpu_problems) = gpu_links(device_node, said);
        said("teams at rest");
        let idle_cpu_percent = idle_cpu_percent(plan)?;
        Ok(Self {
            fingerprint: fingerprint(machine, plan),
            measured: DateTime::now().iso(),
            cpu: cpu_name(),
            machine: machine.to_string(),
            threads: plan.team_sizes(),
            memory,
            fork_join: fork_joins,
            hops,
            joins,
            gpus,
            gpu_problems,
            idle_cpu_percent,
        })
    }

    /// Whether all numbers are such as a measurement gives: what is kept in a file may have been changed.
    fn is_sane(&self) -> bool {
        let teams = &self.memory.teams;
        let by_threads = teams.iter().flat_map(|team| &team.by_threads);
        let by_row_bytes = teams.iter().flat_map(|team| &team.by_row_bytes);
        let speeds = (by_threads.map(|speed| speed.bytes_per_s))
            .chain(by_row_bytes.map(|speed| speed.bytes_per_s))
            .chain(self.memory.across.iter().map(|speed| speed.bytes_per_s))
            .chain([self.memory.together_bytes_per_s]);
        let n_teams = self.threads.len();
        n_teams > 0
            && [teams.len(), self.fork_join.len()] == [n_teams; 2]
            && teams.iter().all(|team| !team.by_threads.is_empty())
            && speeds
                .into_iter()
                .all(|speed| speed.is_finite() && speed > 0.0)
            && self.gpus.iter().all(GpuLink::is_sane)
            && self.idle_cpu_percent.is_finite()
    }

    /// The median time of a message between the leaders of two teams; inside a team where there is one only.
    pub fn hop_ns(&self) -> Option<u64> {
        let between = self.hops.iter().find(|hop| hop.teams[0] != hop.teams[1]);
        let hop = between.or(self.hops.first())?;
        Some(hop.time.median_ns)
    }
}

/// What passes between host and GPUs, from the leader's CPU of `node`; and why that is not known.
fn gpu_links(node: &NodePlan, said: &dyn Fn(&str)) -> (Vec<GpuLink>, Vec<String>) {
    let cpu = node.cpus[0];
    let (say, heard) = std::sync::mpsc::channel::<String>();
    std::thread::scope(|scope| {
        let measured = scope.spawn(move || match pin_thread(cpu) {
            Ok(()) => GpuLink::measure_all(&|part| {
                // who asked waits for all of it
                let _ = say.send(part.to_owned());
            }),
            Err(error) => (vec![], vec![error.to_string()]),
        });
        heard.iter().for_each(|part| said(&part));
        let measured = measured.join();
        measured.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The pairs of threads between which messages are timed.
fn pairs(plan: &Plan) -> Vec<([usize; 2], [usize; 2])> {
    let inside = plan.nodes.iter().enumerate().filter_map(|(team, node)| {
        let [first, second] = node.cpus.first_chunk()?;
        Some(([team, team], [*first, *second]))
    });
    let leaders = plan.nodes.iter().map(|node| node.cpus[0]).enumerate();
    let between = leaders.skip(1);
    let between = between.map(|(team, cpu)| ([0, team], [plan.nodes[0].cpus[0], cpu]));
    // threads that share a CPU cannot spin for one another
    inside
        .chain(between)
        .filter(|(_, [from, to])| from != to)
        .collect()
}

/// What the threads of `plan` use of a CPU, percent, when they have nothing to do any more.
fn idle_cpu_percent(plan: &Plan) -> Result<f64, RuntimeError> {
    let teams = Teams::start(plan)?;
    teams.run(&|_| {})?;
    std::thread::sleep(AT_REST);
    let before = process_cpu_time();
    std::thread::sleep(WATCHED);
    let used = process_cpu_time().saturating_sub(before);
    Ok(used.as_secs_f64() / WATCHED.as_secs_f64() * 100.0)
}

/// CPU time of all threads of this process so far.
fn process_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    // neither is ever below 0
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Of the machine's packages, nodes, memory and caches, the processor, and the plan's threads and kind of pages: what is
/// the same gives the same figures. 16 hexadecimal digits.
pub fn fingerprint(machine: &Machine, plan: &Plan) -> String {
    let text = serde_json::json!([
        VERSION,
        cpu_name(),
        machine.packages,
        machine.nodes,
        machine.memory_nodes,
        machine.distances,
        machine.caches,
        plan.nodes,
        plan.huge_pages,
    ])
    .to_string();
    format!("{:016x}", xxh3_64(text.as_bytes()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use pi_topology::{
        AcrossSpeed, HugePages, MachineNode, MachineSource, NodePlan, RowsSpeed, TeamSpeeds,
        ThreadsSpeed,
    };

    /// A profile of one team on a machine with one node that reads `bytes_per_s`.
    pub(crate) fn profile(bytes_per_s: f64) -> MachineProfile {
        let time = Nanoseconds {
            median_ns: 1000,
            p99_ns: 2000,
        };
        MachineProfile {
            fingerprint: "0123456789abcdef".to_owned(),
            measured: "2026-01-02T03:04:05Z".to_owned(),
            cpu: "Some Processor".to_owned(),
            machine: "1 NUMA node".to_owned(),
            threads: vec![2],
            memory: MemorySpeeds {
                teams: vec![TeamSpeeds {
                    numa: Some(0),
                    by_threads: vec![
                        ThreadsSpeed {
                            n_threads: 1,
                            bytes_per_s: bytes_per_s / 2.0,
                        },
                        ThreadsSpeed {
                            n_threads: 2,
                            bytes_per_s,
                        },
                    ],
                    by_row_bytes: vec![RowsSpeed {
                        row_bytes: 648,
                        bytes_per_s,
                    }],
                }],
                across: vec![AcrossSpeed {
                    team: 0,
                    numa: 0,
                    bytes_per_s,
                }],
                together_bytes_per_s: bytes_per_s,
            },
            fork_join: vec![time],
            hops: vec![Hop {
                teams: [0, 0],
                cpus: [0, 1],
                time,
            }],
            joins: [1, 2]
                .map(|n_sums| Join {
                    n_sums,
                    width: 1000,
                    time: Nanoseconds {
                        median_ns: 500 * n_sums as u64,
                        p99_ns: 3000,
                    },
                })
                .to_vec(),
            gpus: vec![],
            gpu_problems: vec!["no driver".to_owned()],
            idle_cpu_percent: 0.0,
        }
    }

    fn machine(n_cores: usize) -> Machine {
        let core = |cpu| pi_topology::Core {
            cpus: vec![cpu],
            kind: 0,
        };
        let node = MachineNode {
            os_index: Some(0),
            memory_bytes: 1 << 30,
            cores: (0..n_cores).map(core).collect(),
        };
        Machine::of_nodes(vec![node], MachineSource::Hwloc)
    }

    fn plan(nodes: &[&[usize]]) -> Plan {
        let node = |cpus: &&[usize]| NodePlan {
            numa: Some(0),
            cpus: cpus.to_vec(),
        };
        Plan::of_nodes(nodes.iter().map(node).collect(), HugePages::Try)
    }

    #[test]
    fn a_fingerprint_is_of_machine_and_threads() {
        let same = fingerprint(&machine(2), &plan(&[&[0, 1]]));
        assert_eq!(same, fingerprint(&machine(2), &plan(&[&[0, 1]])));
        assert_eq!(same.len(), 16);
        let policy = Plan {
            cold: pi_topology::ColdPolicy::Interleave,
            strict: true,
            ..plan(&[&[0, 1]])
        };
        assert_eq!(same, fingerprint(&machine(2), &policy), "nothing measured");
        let small_pages = Plan {
            huge_pages: HugePages::Off,
            ..plan(&[&[0, 1]])
        };
        for (machine, plan) in [
            (machine(3), plan(&[&[0, 1]])),
            (machine(2), plan(&[&[0]])),
            (machine(2), plan(&[&[0], &[1]])),
            (machine(2), small_pages),
        ] {
            assert_ne!(same, fingerprint(&machine, &plan));
        }
    }

    #[test]
    fn messages_go_inside_teams_and_between_leaders() {
        assert_eq!(
            pairs(&plan(&[&[0, 1, 2], &[3, 4], &[5]])),
            [
                ([0, 0], [0, 1]),
                ([1, 1], [3, 4]),
                ([0, 1], [0, 3]),
                ([0, 2], [0, 5]),
            ]
        );
        assert_eq!(pairs(&plan(&[&[0]])), []);
        // teams on the same CPU
        assert_eq!(pairs(&plan(&[&[0], &[0]])), []);
    }

    #[test]
    fn joining_costs_in_proportion_to_the_width() {
        let joins = profile(1e10).joins;
        assert_eq!(Join::more_ns(&joins, 2, 4000), 2000.0);
        assert_eq!(Join::more_ns(&joins, 1, 4000), 0.0);
        assert_eq!(Join::more_ns(&joins, 8, 4000), 0.0, "not measured");
        assert_eq!(Join::more_ns(&[], 2, 4000), 0.0);
    }

    #[test]
    fn numbers_that_no_machine_has_are_noticed() {
        assert!(profile(1e10).is_sane());
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(!profile(bad).is_sane(), "{bad}");
        }
        let mut teamless = profile(1e10);
        teamless.threads = vec![2, 2];
        assert!(!teamless.is_sane());
    }
}
