//! Findings about the system, its processor, cores and NUMA nodes.

use pi_kernels::Tier;
use pi_topology::{ConflictSubject, MachineNode, SystemState, TopologyError};

use super::facts::Facts;
use super::findings::{Finding, size};

/// Governors that keep a busy core below its full speed, or are slow to raise it.
const SLOW_GOVERNORS: [&str; 3] = ["powersave", "conservative", "userspace"];

/// Busy threads of others from which on decoding suffers.
const BUSY_LOAD: f64 = 0.75;

pub(super) fn system(system: &SystemState) -> Finding {
    let mut parts = vec![match &system.kernel {
        Some(kernel) => format!("{} {kernel}", std::env::consts::OS),
        None => std::env::consts::OS.to_owned(),
    }];
    parts.extend(system.distribution.clone());
    if system.is_virtual_machine {
        parts.push("virtual machine".to_owned());
    }
    parts.extend(system.container.map(|kind| format!("{kind} container")));
    Finding::ok("system", parts.join(", "))
}

pub(super) fn instruction_set(facts: &Facts) -> Finding {
    let name = facts.system.cpu_name.as_deref();
    let name = name.unwrap_or(std::env::consts::ARCH);
    let best = facts.tiers.last().copied().unwrap_or(Tier::Scalar);
    let lower: Vec<&str> = facts
        .tiers
        .iter()
        .filter(|tier| **tier != best)
        .map(|tier| tier.name())
        .collect();
    if best != Tier::Scalar {
        let text = format!(
            "{name}: kernels for {best} (also there: {})",
            lower.join(", ")
        );
        return Finding::ok("processor", text);
    }
    let text = format!("{name}: only the scalar kernels, which are many times slower");
    match facts.has_faster_tiers {
        true => Finding::problem(
            "processor",
            format!("{text}, as it shows no AVX2, FMA and F16C"),
            "if this is a virtual machine, give it the host's processor: qemu -cpu host",
        ),
        false => Finding::note("processor", format!("{text}, exist for it so far")),
    }
}

pub(super) fn cores(facts: &Facts) -> Vec<Finding> {
    let machine = match &facts.machine {
        Ok(machine) => machine,
        Err(error) => {
            let cure = match error {
                TopologyError::NotThisSystem => "unset HWLOC_XMLFILE HWLOC_SYNTHETIC HWLOC_FSROOT",
                TopologyError::NoCpus => {
                    "taskset -cp $$ shows the CPUs of the shell: start it with more"
                }
                _ => "lstopo --no-io shows what hwloc finds",
            };
            let finding = Finding::problem("cores", error.to_string(), cure);
            return vec![finding.preventing()];
        }
    };
    let mut text = machine.to_string();
    let n_cpus = machine.n_cpus();
    let mut findings = vec![match facts.system.n_cpus_online {
        Some(n_online) if n_online > n_cpus => {
            text += &format!(
                "; an affinity mask or cpuset keeps {} more away",
                n_online - n_cpus
            );
            Finding::note("cores", text)
        }
        _ => Finding::ok("cores", text),
    }];
    findings.extend(conflicting(facts, ConflictSubject::Cpus, "cores"));
    if machine.nodes.len() > 1 {
        findings.extend(machine.nodes.iter().map(node));
    }
    findings
}

/// Conflicts about a subject, each with its cure.
fn conflicting(
    facts: &Facts,
    subject: ConflictSubject,
    name: &'static str,
) -> impl Iterator<Item = Finding> {
    let conflicts = facts.conflicts.iter();
    conflicts
        .filter(move |conflict| conflict.subject == subject)
        .map(move |conflict| {
            Finding::note(name, conflict.problem.clone()).cure(conflict.cure.clone())
        })
}

fn node(node: &MachineNode) -> Finding {
    let number = node.os_index.map_or("?".to_owned(), |n| n.to_string());
    let text = format!(
        "{number}: {} cores, {} logical CPUs, {} of memory",
        node.cores.len(),
        node.n_cpus(),
        size(node.memory_bytes)
    );
    match node.memory_bytes {
        0 => Finding::note(
            "NUMA node",
            format!("{text}: its cores read that of other nodes"),
        ),
        _ => Finding::ok("NUMA node", text),
    }
}

pub(super) fn processor_time(facts: &Facts) -> Finding {
    const SUBJECT: &str = "processor time";
    let Some(limit) = facts.system.cpu_limit else {
        return Finding::ok(SUBJECT, "no control group limits it");
    };
    let plan = facts.planned();
    let n_threads = plan.map_or(1, |plan| plan.n_threads);
    let n_nodes = plan.map_or(1, |plan| plan.n_nodes);
    if limit >= n_threads as f64 {
        let text = format!("control groups allow that of {limit:.1} CPUs");
        return Finding::ok(SUBJECT, text);
    }
    let text = format!(
        "control groups allow that of {limit:.1} CPUs, and {n_threads} threads would run: \
         they are stopped in the middle of tokens"
    );
    let raise = format!(
        "docker update --cpus {n_threads} CONTAINER, or sudo systemctl set-property UNIT CPUQuota={n_threads}00%"
    );
    let cure = match limit.floor() as usize {
        n_whole if n_whole >= n_nodes => format!("pi-runtime -t {n_whole}; or {raise}"),
        _ => raise,
    };
    Finding::problem(SUBJECT, text, cure)
}

pub(super) fn load(system: &SystemState) -> Finding {
    const SUBJECT: &str = "other load";
    match system.load {
        None => Finding::ok(SUBJECT, "the system does not tell"),
        Some(load) if load < BUSY_LOAD => Finding::ok(
            SUBJECT,
            format!("{load:.2} busy threads over the last minute"),
        ),
        Some(load) => Finding::note(
            SUBJECT,
            format!(
                "{load:.2} busy threads over the last minute: tokens wait for cores that others use"
            ),
        )
        .cure("top -o %CPU shows them"),
    }
}

pub(super) fn frequency(system: &SystemState) -> Finding {
    const SUBJECT: &str = "frequency";
    if system.governors.is_empty() {
        return Finding::ok(SUBJECT, "not governed by this system");
    }
    let counts: Vec<String> = system
        .governors
        .iter()
        .map(|(name, n_cpus)| format!("{name} on {n_cpus} CPUs"))
        .collect();
    let text = format!("governor {}", counts.join(", "));
    match SLOW_GOVERNORS
        .iter()
        .any(|&name| system.governors.contains_key(name))
    {
        true => Finding::note(
            SUBJECT,
            format!("{text}: cores may run below their full speed"),
        )
        .cure("sudo cpupower frequency-set -g performance"),
        false => Finding::ok(SUBJECT, text),
    }
}

pub(super) fn pinning(facts: &Facts) -> Option<Finding> {
    const SUBJECT: &str = "threads";
    let plan = match facts.plan.as_ref()? {
        Ok(plan) => plan,
        Err(error) => {
            let finding = Finding::problem(
                SUBJECT,
                error.to_string(),
                "pi-runtime --topology FILE, with fewer nodes in the file: [host] nodes = 1",
            );
            return Some(finding.preventing());
        }
    };
    Some(match &plan.pinning {
        Ok(()) => Finding::ok(
            SUBJECT,
            format!("{} in {}; each can be bound to its CPU", count(plan.n_threads, "thread"), count(plan.n_nodes, "team")),
        ),
        Err(error) => Finding::problem(
            SUBJECT,
            error.to_string(),
            "start it without a sandbox that forbids binding threads (docker run --security-opt seccomp=unconfined)",
        )
        .preventing(),
    })
}

fn count(n: usize, word: &str) -> String {
    match n {
        1 => format!("1 {word}"),
        n => format!("{n} {word}s"),
    }
}

pub(super) fn numa_memory(facts: &Facts) -> Vec<Finding> {
    const SUBJECT: &str = "NUMA memory";
    let Some(plan) = facts.planned().filter(|plan| plan.n_nodes > 1) else {
        return Vec::new();
    };
    let mut findings = vec![match &plan.memory_binding {
        Ok(None) => Finding::ok(SUBJECT, "can be bound to its node"),
        Ok(Some(problem)) => Finding::problem(
            SUBJECT,
            format!("cannot be bound to its node ({problem}): it may lie on the wrong one"),
            "in a container: docker run --cap-add SYS_NICE",
        ),
        Err(error) => Finding::problem(
            SUBJECT,
            error.to_string(),
            "grep Mems_allowed_list /proc/self/status shows the nodes of the cpuset: allow those that are missing",
        )
        .preventing(),
    }];
    findings.extend(conflicting(facts, ConflictSubject::Memory, SUBJECT));
    if facts.system.numa_balancing == Some(true) {
        findings.push(balanced(
            plan.memory_binding.as_ref().is_ok_and(Option::is_none),
        ));
    }
    findings
}

/// What the kernel's own moving of pages means where weights can be bound, and where not.
fn balanced(can_bind: bool) -> Finding {
    const SUBJECT: &str = "NUMA memory";
    match can_bind {
        true => Finding::ok(
            SUBJECT,
            "the kernel balances pages over nodes by itself, and leaves weights alone, which are bound",
        ),
        false => Finding::note(
            SUBJECT,
            "the kernel balances pages over nodes by itself: what cannot be bound is moved, and threads are stopped to see \
             what they read",
        )
        .cure("sudo sysctl kernel.numa_balancing=0"),
    }
}
