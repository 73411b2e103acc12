//! What keeps threads and memory from where they would go, and from being alone there: taskset, control groups,
//! `isolcpus=`, CPUs that are switched off.
//!
//! Facts in, sentences out: everything is read by [`SystemState`], so that tests make systems up.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::machine::{Machine, ranges};
use crate::neighbours::BoundProcess;
use crate::plan::Plan;
use crate::system::SystemState;

/// What a conflict is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConflictSubject {
    /// CPUs that cannot be had, or not alone.
    Cpus,
    /// Time on the CPUs.
    Time,
    /// Memory of NUMA nodes.
    Memory,
}

/// Something that stands in the way, and what mends it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Conflict {
    /// What it is about.
    pub subject: ConflictSubject,
    /// What it is, with numbers.
    pub problem: String,
    /// What to do.
    pub cure: String,
}

/// What the `system` keeps from this process, and what disturbs the `plan` that was made for `machine`.
///
/// Only for this system: a made-up or saved machine has none.
pub fn conflicts(machine: &Machine, plan: Option<&Plan>, system: &SystemState) -> Vec<Conflict> {
    match machine.is_this_system() {
        true => conflicts_here(plan, system),
        false => Vec::new(),
    }
}

/// The same of a `plan` that was made for this system.
pub fn conflicts_here(plan: Option<&Plan>, system: &SystemState) -> Vec<Conflict> {
    let mut conflicts = missing_cpus(system);
    if let Some(plan) = plan {
        conflicts.extend(shared_cores(plan, system));
        conflicts.extend(bound_neighbours(plan, system));
        conflicts.extend(short_quota(plan, system));
        conflicts.extend(forbidden_memory(plan, system));
    }
    conflicts
}

fn without(cpus: &[usize], taken: &[usize]) -> Vec<usize> {
    let left = cpus.iter().filter(|cpu| !taken.contains(cpu));
    left.copied().collect()
}

/// CPUs that the machine has and this process may not use, by who keeps them away.
fn missing_cpus(system: &SystemState) -> Vec<Conflict> {
    let mut conflicts = Vec::new();
    let mut add = |cpus: Vec<usize>, problem: &str, cure: &dyn Fn(&str) -> String| {
        if !cpus.is_empty() {
            let cpus = ranges(cpus);
            let problem = format!("CPU {cpus}: {problem}");
            conflicts.push(Conflict {
                subject: ConflictSubject::Cpus,
                problem,
                cure: cure(&cpus),
            });
        }
    };
    let online = &system.online_cpus;
    add(
        without(&system.present_cpus, online),
        "switched off",
        &|_| "as root, echo 1 > /sys/devices/system/cpu/cpuN/online for each N of them".to_owned(),
    );
    let in_cpuset = system.cpuset_cpus.as_ref().unwrap_or(online);
    add(
        without(online, in_cpuset),
        "a control group's cpuset keeps them from this process",
        &|cpus| {
            format!(
                "docker run --cpuset-cpus, or sudo systemctl set-property UNIT AllowedCPUs=, with {cpus} added"
            )
        },
    );
    if system.affinity_cpus.is_empty() {
        return conflicts;
    }
    let masked = without(in_cpuset, &system.affinity_cpus);
    let (isolated, masked): (Vec<usize>, Vec<usize>) = masked
        .into_iter()
        .partition(|cpu| system.isolated_cpus.contains(cpu));
    let all_of = |more: &str| format!("{},{more}", ranges(system.affinity_cpus.clone()));
    add(
        isolated,
        "isolated by the kernel (isolcpus=), which gives them only to who asks by number",
        &|cpus| format!("start it with taskset -c {}", all_of(cpus)),
    );
    add(
        masked,
        "the affinity mask that this process was started with (taskset, numactl, a batch system) leaves them out",
        &|cpus| format!("start it with taskset -c {}", all_of(cpus)),
    );
    conflicts
}

/// Planned CPUs whose core has a hyper-thread that others can have and this process cannot.
fn shared_cores(plan: &Plan, system: &SystemState) -> Option<Conflict> {
    if system.affinity_cpus.is_empty() {
        return None;
    }
    let planned: Vec<usize> = (plan.nodes.iter())
        .flat_map(|node| node.cpus.clone())
        .collect();
    let mut halves = Vec::new();
    let mut others = Vec::new();
    for cpus in system.core_cpus.values() {
        let foreign = without(cpus, &system.affinity_cpus);
        let ours = cpus.iter().filter(|cpu| planned.contains(cpu));
        let ours: Vec<usize> = ours.copied().collect();
        if !ours.is_empty() && !foreign.is_empty() {
            halves.extend(ours);
            others.extend(foreign);
        }
    }
    (!halves.is_empty()).then(|| Conflict {
        subject: ConflictSubject::Cpus,
        problem: format!(
            "CPU {}: whoever runs on CPU {}, which this process may not use, shares their cores",
            ranges(halves),
            ranges(others.clone())
        ),
        cure: format!("allow CPU {} too, or take whole cores", ranges(others)),
    })
}

/// Planned CPUs that other processes have bound threads to: to one, or to several of which none is left to go to.
fn bound_neighbours(plan: &Plan, system: &SystemState) -> Vec<Conflict> {
    let planned = |cpu: &usize| plan.nodes.iter().any(|node| node.cpus.contains(cpu));
    let conflict = |process: &BoundProcess| {
        let masks = process.masks.iter();
        let inside = masks.filter(|mask| mask.iter().all(planned)).flatten();
        let single = process.cpus.iter().filter(|cpu| planned(cpu));
        let cpus: BTreeSet<usize> = single.chain(inside).copied().collect();
        (!cpus.is_empty()).then(|| Conflict {
            subject: ConflictSubject::Cpus,
            problem: format!(
                "CPU {}: {} (process {}) has bound threads to it too, and where both work each waits for the other",
                ranges(cpus.into_iter().collect()),
                process.program,
                process.pid
            ),
            cure: format!(
                "end process {}, or give each its own CPUs: [[host.node]] cpus in a topology file, or taskset -c",
                process.pid
            ),
        })
    };
    system.bound_processes.iter().filter_map(conflict).collect()
}

/// A time quota below the number of threads: the kernel stops them in the middle of tokens.
fn short_quota(plan: &Plan, system: &SystemState) -> Option<Conflict> {
    let limit = system.cpu_limit?;
    let n_threads = plan.n_threads();
    (limit < n_threads as f64).then(|| Conflict {
        subject: ConflictSubject::Time,
        problem: format!(
            "a control group allows the time of {limit:.1} CPUs, and {n_threads} threads would run: \
             they are stopped in the middle of tokens"
        ),
        cure: format!(
            "-t {}, or docker run --cpus {n_threads}",
            (limit as usize).max(plan.nodes.len())
        ),
    })
}

/// NUMA nodes of the plan whose memory a cpuset forbids.
fn forbidden_memory(plan: &Plan, system: &SystemState) -> Option<Conflict> {
    if system.memory_numas.is_empty() {
        return None;
    }
    let forbidden = without(&plan.numas(), &system.memory_numas);
    (!forbidden.is_empty()).then(|| Conflict {
        subject: ConflictSubject::Memory,
        problem: format!(
            "NUMA node {}: a cpuset (or numactl --membind) keeps their memory from this process",
            ranges(forbidden.clone())
        ),
        cure: format!("docker run --cpuset-mems with {} added", ranges(forbidden)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::HugePages;
    use crate::machine::MachineSource;
    use crate::plan::NodePlan;

    /// Eight CPUs, two to a core, numbered N and N + 4; everything allowed.
    fn system() -> SystemState {
        SystemState {
            online_cpus: (0..8).collect(),
            present_cpus: (0..8).collect(),
            affinity_cpus: (0..8).collect(),
            memory_numas: vec![0, 1],
            core_cpus: (0..4).map(|cpu| (cpu, vec![cpu, cpu + 4])).collect(),
            ..SystemState::default()
        }
    }

    fn plan(cpus: &[usize]) -> Plan {
        let team = NodePlan {
            numa: Some(1),
            cpus: cpus.to_vec(),
        };
        Plan::of_nodes(vec![team], HugePages::Try)
    }

    fn found(system: &SystemState, cpus: &[usize]) -> Vec<String> {
        let machine = Machine::of_nodes(Vec::new(), MachineSource::AffinityMask);
        conflicts(&machine, Some(&plan(cpus)), system)
            .into_iter()
            .map(|conflict| format!("{} => {}", conflict.problem, conflict.cure))
            .collect()
    }

    #[test]
    fn nothing_stands_in_the_way_of_a_process_that_may_do_all() {
        assert_eq!(found(&system(), &[0, 1, 2, 3]), Vec::<String>::new());
        assert_eq!(
            found(&SystemState::default(), &[0]),
            Vec::<String>::new(),
            "a system that tells nothing"
        );
    }

    #[test]
    fn who_keeps_cpus_away_is_told_apart() {
        let system = SystemState {
            present_cpus: (0..10).collect(),
            cpuset_cpus: Some(vec![0, 1, 2, 4, 5, 6]),
            isolated_cpus: vec![2, 6],
            affinity_cpus: vec![0, 4],
            ..system()
        };
        assert_eq!(
            found(&system, &[0]),
            [
                "CPU 8-9: switched off => as root, echo 1 > /sys/devices/system/cpu/cpuN/online for each N of them",
                "CPU 3,7: a control group's cpuset keeps them from this process => docker run --cpuset-cpus, or sudo systemctl set-property UNIT AllowedCPUs=, with 3,7 added",
                "CPU 2,6: isolated by the kernel (isolcpus=), which gives them only to who asks by number => start it with taskset -c 0,4,2,6",
                "CPU 1,5: the affinity mask that this process was started with (taskset, numactl, a batch system) leaves them out => start it with taskset -c 0,4,1,5",
            ]
        );
    }

    #[test]
    fn half_a_core_is_shared_with_others() {
        let system = SystemState {
            affinity_cpus: vec![0, 1, 5],
            ..system()
        };
        let text = &found(&system, &[0, 1])[1];
        assert_eq!(
            text,
            "CPU 0: whoever runs on CPU 4, which this process may not use, shares their cores => allow CPU 4 too, or take whole cores"
        );
    }

    #[test]
    fn processes_bound_to_the_same_cpus_are_named() {
        let process = |pid, cpus: &[usize]| BoundProcess {
            pid,
            program: "poller".to_owned(),
            cpus: cpus.to_vec(),
            masks: vec![],
        };
        let round = |pid, mask: &[usize]| BoundProcess {
            masks: vec![mask.to_vec()],
            ..process(pid, &[])
        };
        let system = SystemState {
            bound_processes: vec![
                process(7, &[1, 2, 3]),
                process(8, &[6]),
                round(9, &[0, 1]),
                // has a CPU to itself
                round(10, &[2, 3]),
            ],
            ..system()
        };
        assert_eq!(
            found(&system, &[0, 1, 2]),
            [
                "CPU 1-2: poller (process 7) has bound threads to it too, and where both work each waits for the other => end process 7, or give each its own CPUs: [[host.node]] cpus in a topology file, or taskset -c",
                "CPU 0-1: poller (process 9) has bound threads to it too, and where both work each waits for the other => end process 9, or give each its own CPUs: [[host.node]] cpus in a topology file, or taskset -c",
            ]
        );
    }

    #[test]
    fn quotas_and_memory_nodes_are_held_against_the_plan() {
        let system = SystemState {
            cpu_limit: Some(1.5),
            memory_numas: vec![0],
            ..system()
        };
        assert_eq!(
            found(&system, &[0, 1]),
            [
                "a control group allows the time of 1.5 CPUs, and 2 threads would run: they are stopped in the middle of tokens => -t 1, or docker run --cpus 2",
                "NUMA node 1: a cpuset (or numactl --membind) keeps their memory from this process => docker run --cpuset-mems with 1 added",
            ]
        );
        let machine = Machine::of_nodes(Vec::new(), MachineSource::Xml("x".to_owned()));
        assert_eq!(conflicts(&machine, Some(&plan(&[0, 1])), &system), []);
    }
}
