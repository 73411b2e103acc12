//! What is known of this system and of made-up machines.

#[cfg(target_os = "linux")]
use std::os::unix::process::CommandExt;
#[cfg(target_os = "linux")]
use std::process::Command;

use pi_topology::Machine;

#[cfg(feature = "hwloc")]
fn synthetic(description: &str) -> Machine {
    Machine::synthetic(description).unwrap()
}

/// CPUs of each core of each node.
fn cpus(machine: &Machine) -> Vec<Vec<Vec<usize>>> {
    let nodes = machine.nodes.iter();
    nodes
        .map(|node| node.cores.iter().map(|core| core.cpus.clone()).collect())
        .collect()
}

#[test]
fn this_system_has_what_the_kernel_allows() {
    let machine = Machine::discover().unwrap();
    assert!(machine.is_this_system());
    machine.require_this_system().unwrap();
    let n_allowed = std::thread::available_parallelism().unwrap().get();
    // A CPU quota can lower the standard library's answer.
    assert!(machine.n_cpus() >= n_allowed, "{machine}");
    assert!(machine.n_cores() <= machine.n_cpus());
    let mut seen: Vec<usize> = cpus(&machine).into_iter().flatten().flatten().collect();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), machine.n_cpus());
    if cfg!(target_os = "linux") {
        assert!(machine.memory_bytes() > 1 << 26, "{machine}");
    }
}

/// Run by the test below in a process of its own.
#[cfg(target_os = "linux")]
#[test]
#[ignore = "runs in a process with one CPU"]
fn child_with_one_cpu() {
    println!("child sees {:?}", cpus(&Machine::discover().unwrap()));
}

#[cfg(target_os = "linux")]
#[test]
fn the_affinity_mask_is_honoured() {
    for cpu in cpus(&Machine::discover().unwrap())
        .into_iter()
        .flatten()
        .flatten()
    {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--ignored", "--exact", "child_with_one_cpu", "--nocapture"]);
        // SAFETY: between fork and exec it makes one system call on its own stack.
        unsafe {
            command.pre_exec(move || {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(cpu, &mut set);
                match libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let seen = format!("child sees [[[{cpu}]]]");
        assert!(text.contains(&seen), "{text}");
    }
}

/// Run by the test below in a process where hwloc is told to make a machine up.
#[cfg(all(feature = "hwloc", target_os = "linux"))]
#[test]
#[ignore = "runs in a process with HWLOC_SYNTHETIC"]
fn child_with_another_machine() {
    let found = Machine::discover().map_err(|error| error.to_string());
    let pinned = pi_topology::pin_thread(0).map_err(|error| error.to_string());
    println!("child finds {found:?} and pins {pinned:?}");
}

#[cfg(all(feature = "hwloc", target_os = "linux"))]
#[test]
fn nothing_is_bound_to_another_machine() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--ignored",
            "--exact",
            "child_with_another_machine",
            "--nocapture",
        ])
        .env("HWLOC_SYNTHETIC", "Core:4 PU:2")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let refusal = format!(
        "{:?}",
        pi_topology::TopologyError::NotThisSystem.to_string()
    );
    let seen = format!("child finds Err({refusal}) and pins Err({refusal})");
    assert!(text.contains(&seen), "{text}");
}

#[cfg(feature = "hwloc")]
#[test]
fn made_up_machines_have_what_they_are_described_with() {
    let machine = synthetic("Package:2 [NUMANode(memory=64GiB)] Core:2 PU:2");
    assert_eq!(cpus(&machine), [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]);
    let numbers: Vec<Option<usize>> = machine.nodes.iter().map(|node| node.os_index).collect();
    assert_eq!(numbers, [Some(0), Some(1)]);
    assert_eq!(machine.nodes[1].memory_bytes, 64 << 30);
    assert_eq!(
        machine.to_string(),
        "2 NUMA nodes, 4 cores, 8 logical CPUs (0-7), 128.0 GiB of memory, made up"
    );

    let machine = synthetic("NUMANode:1(memory=1536MiB) Core:1 PU:1(indexes=5)");
    assert_eq!(
        machine.to_string(),
        "1 NUMA node, 1 core, 1 logical CPU (5), 1.5 GiB of memory, made up"
    );

    // Hyper-threads numbered after all cores, as most systems do.
    let machine = synthetic("Core:3 PU:2(indexes=0,3,1,4,2,5)");
    assert_eq!(cpus(&machine), [[[0, 3], [1, 4], [2, 5]]]);
}

#[cfg(feature = "hwloc")]
#[test]
fn memory_beside_a_node_adds_no_team() {
    // Each package has memory of its own, and a second node beside it shares the same cores.
    let machine =
        synthetic("Package:2 [NUMANode(memory=8GiB)] [NUMANode(memory=1GiB)] Core:2 PU:1");
    assert_eq!(cpus(&machine), [[[0], [1]], [[2], [3]]]);
}

#[cfg(feature = "hwloc")]
#[test]
fn made_up_machines_are_not_this_system() {
    let machine = synthetic("Core:2 PU:1");
    assert!(!machine.is_this_system());
    let error = machine.require_this_system().unwrap_err();
    assert!(!error.is_environment());
    assert_eq!(
        error.to_string(),
        "Core:2 PU:1: a made-up or saved machine can be planned for, but threads and memory cannot be bound to it: plan for the discovered one"
    );
}

#[cfg(feature = "hwloc")]
#[test]
fn a_description_that_is_none_is_refused() {
    for (description, problem) in [
        (
            "Sofa:3",
            "hwloc rejected the topology data string as invalid",
        ),
        (
            "package:100000 core:100000 pu:2",
            "it has more than 8192 CPUs",
        ),
        ("8193", "it has more than 8192 CPUs"),
        ("", "hwloc rejected the topology data string as invalid"),
        (
            "Core:2\0",
            "topology data string can't contain the NUL char",
        ),
    ] {
        let error = Machine::synthetic(description).unwrap_err();
        assert!(!error.is_environment());
        assert_eq!(
            error.to_string(),
            format!(
                "{description:?} does not describe a machine: {problem}; write it as in \"Package:2 [NUMANode(memory=64GiB)] Core:8 PU:2\""
            )
        );
    }
}

#[cfg(feature = "hwloc")]
#[test]
fn made_up_machines_may_be_large() {
    let machine =
        synthetic("package:2(indexes=1,0) [numanode(memory=99999999999999999999GiB)] core:64 pu:2");
    assert_eq!((machine.n_cpus(), machine.memory_bytes()), (256, u64::MAX));
    let machine = synthetic("numanode:16 core:256 pu:2");
    assert_eq!((machine.nodes.len(), machine.n_cpus()), (16, 8192));
}
