//! Plans: what is asked, on machines that are made up of data.

use pi_topology::{
    Core, CoreChoice, HostConfig, HugePages, ListedTeam, Machine, MachineNode, MachineSource,
    MemoryConfig, N_NODES_MAX, NodeCount, NodePlan, Plan, ThreadsPerNode, TopologyConfig,
    TopologyError,
};

use NodeCount::{All, Number as Nodes};
use ThreadsPerNode::{Cores, Hyperthreads, Number as Threads};

/// `n_nodes` nodes of `n_cores` cores; hyper-threads are numbered after all first threads.
fn machine(n_nodes: usize, n_cores: usize, n_hyperthreads: usize) -> Machine {
    let n_all_cores = n_nodes * n_cores;
    let core = |core: usize| Core {
        cpus: (0..n_hyperthreads)
            .map(|rank| core + rank * n_all_cores)
            .collect(),
        kind: 0,
    };
    let node = |node: usize| MachineNode {
        os_index: Some(node),
        memory_bytes: 1 << 30,
        cores: (node * n_cores..(node + 1) * n_cores).map(core).collect(),
    };
    let source = MachineSource::Synthetic("test".to_owned());
    Machine::of_nodes((0..n_nodes).map(node).collect(), source)
}

fn divided(nodes: NodeCount, threads: ThreadsPerNode, reserved_cores: usize) -> TopologyConfig {
    TopologyConfig {
        host: HostConfig::Divided {
            nodes,
            threads,
            reserved_cores,
            cores: CoreChoice::Fastest,
        },
        ..TopologyConfig::default()
    }
}

fn listed(teams: &[(Option<usize>, &[usize])]) -> TopologyConfig {
    let team = |&(numa, cpus): &(Option<usize>, &[usize])| ListedTeam {
        numa,
        cpus: cpus.to_vec(),
    };
    TopologyConfig {
        host: HostConfig::Listed(teams.iter().map(team).collect()),
        ..TopologyConfig::default()
    }
}

fn cpus(plan: &Plan) -> Vec<Vec<usize>> {
    plan.nodes.iter().map(|node| node.cpus.clone()).collect()
}

fn numas(plan: &Plan) -> Vec<Option<usize>> {
    plan.nodes.iter().map(|node| node.numa).collect()
}

/// CPUs of each team.
fn plan(config: &TopologyConfig, machine: &Machine, threads: Option<usize>) -> Vec<Vec<usize>> {
    let plan = Plan::new(config, machine, threads).unwrap();
    assert_eq!(plan.n_threads(), cpus(&plan).concat().len());
    cpus(&plan)
}

/// The text of an error that is not the machine's fault.
fn refused(config: &TopologyConfig, machine: &Machine, threads: Option<usize>) -> String {
    let error = Plan::new(config, machine, threads).unwrap_err();
    assert!(!error.is_environment(), "{error}");
    error.to_string()
}

#[test]
fn by_default_every_core_has_a_thread() {
    let default = TopologyConfig::default();
    let found = Plan::new(&default, &machine(2, 2, 2), None).unwrap();
    let node = |numa, cpus: [usize; 2]| NodePlan {
        numa: Some(numa),
        cpus: cpus.to_vec(),
    };
    assert_eq!(found.nodes, [node(0, [0, 1]), node(1, [2, 3])]);
    assert_eq!(found.huge_pages, HugePages::Try);
    assert_eq!(plan(&default, &machine(1, 3, 1), None), [[0, 1, 2]]);
    assert_eq!(
        plan(&default, &machine(4, 1, 2), None),
        [[0], [1], [2], [3]]
    );
}

#[test]
fn huge_pages_are_passed_on() {
    let config = TopologyConfig {
        memory: MemoryConfig {
            huge_pages: HugePages::Off,
            ..MemoryConfig::default()
        },
        ..TopologyConfig::default()
    };
    let plan = Plan::new(&config, &machine(1, 1, 1), None).unwrap();
    assert_eq!(plan.huge_pages, HugePages::Off);
}

#[test]
fn threads_per_node_take_cores_before_hyperthreads() {
    let machine = machine(2, 2, 2);
    assert_eq!(
        plan(&divided(All, Hyperthreads, 0), &machine, None),
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    );
    assert_eq!(
        plan(&divided(All, Threads(1), 0), &machine, None),
        [[0], [2]]
    );
    assert_eq!(
        plan(&divided(All, Threads(3), 0), &machine, None),
        [[0, 1, 4], [2, 3, 6]]
    );
}

#[test]
fn reserved_cores_are_the_last_of_each_node() {
    let machine = machine(2, 2, 2);
    assert_eq!(plan(&divided(All, Cores, 1), &machine, None), [[0], [2]]);
    assert_eq!(
        plan(&divided(All, Hyperthreads, 1), &machine, None),
        [[0, 4], [2, 6]]
    );
    // -t takes them last.
    assert_eq!(
        plan(&divided(All, Cores, 1), &machine, Some(6)),
        [[0, 4, 1], [2, 6, 3]]
    );
    for reserved_cores in [2, 3, usize::MAX] {
        assert_eq!(
            refused(&divided(All, Cores, reserved_cores), &machine, None),
            format!(
                "node 0 has 2 cores and leaves {reserved_cores} to others, so that none is left: set host.reserved_cores to at most 1"
            )
        );
    }
    assert_eq!(
        refused(&divided(All, Threads(1), 1), &machine, None),
        "reserved_cores = 1 goes with threads = \"cores\" or \"hyperthreads\", not with a number: lower the number instead"
    );
}

#[test]
fn fewer_nodes_than_the_machine_has_are_its_first() {
    let found = Plan::new(&divided(Nodes(1), Cores, 0), &machine(2, 2, 1), None).unwrap();
    assert_eq!(cpus(&found), [[0, 1]]);
    assert_eq!(numas(&found), [Some(0)]);
}

#[test]
fn more_nodes_than_the_machine_has_divide_its_cores() {
    assert_eq!(
        plan(&divided(Nodes(2), Cores, 0), &machine(1, 5, 1), None),
        [vec![0, 1, 2], vec![3, 4]]
    );
    let found = Plan::new(&divided(Nodes(3), Cores, 0), &machine(2, 4, 2), None).unwrap();
    assert_eq!(cpus(&found), [vec![0, 1], vec![2, 3], vec![4, 5, 6, 7]]);
    assert_eq!(numas(&found), [Some(0), Some(0), Some(1)]);
    assert_eq!(
        plan(&divided(Nodes(4), Hyperthreads, 0), &machine(2, 2, 2), None),
        [[0, 4], [1, 5], [2, 6], [3, 7]]
    );
}

#[test]
fn more_nodes_than_cores_share_them_in_turn() {
    let machine_of_two = machine(1, 2, 1);
    let four = divided(Nodes(4), Threads(1), 0);
    assert_eq!(plan(&four, &machine_of_two, None), [[0], [1], [0], [1]]);
    assert_eq!(
        plan(&four, &machine_of_two, Some(8)),
        [[0, 1], [1, 0], [0, 1], [1, 0]]
    );
    assert_eq!(
        plan(&four, &machine_of_two, Some(5)),
        [vec![0, 1], vec![1], vec![0], vec![1]]
    );
    assert_eq!(
        plan(&divided(Nodes(4), Cores, 0), &machine(1, 2, 2), None),
        [[0], [1], [2], [3]]
    );
    assert_eq!(
        refused(&four, &machine_of_two, Some(9)),
        "-t 9: node 0 would run 3 threads but has 2 logical CPUs; give -t 8 or fewer"
    );
}

#[test]
fn threads_of_the_command_line_are_a_total() {
    let machine = machine(2, 3, 2);
    let default = TopologyConfig::default();
    assert_eq!(plan(&default, &machine, Some(2)), [[0], [3]]);
    assert_eq!(
        plan(&default, &machine, Some(5)),
        [vec![0, 1, 2], vec![3, 4]]
    );
    assert_eq!(
        plan(&default, &machine, Some(8)),
        [[0, 1, 2, 6], [3, 4, 5, 9]]
    );
    assert_eq!(plan(&default, &machine, Some(12)).concat().len(), 12);
    for threads in [0, 1] {
        assert_eq!(
            refused(&default, &machine, Some(threads)),
            format!(
                "-t {threads}: each of the 2 nodes needs a thread; give -t 2 or more, or configure fewer nodes"
            )
        );
    }
    assert_eq!(
        refused(&default, &machine, Some(13)),
        "-t 13: node 0 would run 7 threads but has 6 logical CPUs; give -t 12 or fewer"
    );
    assert!(refused(&default, &machine, Some(usize::MAX)).ends_with("give -t 12 or fewer"));
    assert_eq!(
        refused(&divided(All, Threads(7), 0), &machine, None),
        "host.threads = 7: node 0 would run 7 threads but has 6 logical CPUs; set it to 6 or fewer"
    );
}

#[test]
fn an_unequal_machine_says_what_fits() {
    let mut machine = machine(2, 2, 1);
    machine.nodes[1].cores.truncate(1);
    assert_eq!(
        refused(&TopologyConfig::default(), &machine, Some(4)),
        "-t 4: node 1 would run 2 threads but has 1 logical CPUs; give -t 3 or fewer"
    );
}

#[test]
fn listed_teams_run_where_they_are_listed() {
    let machine = machine(2, 2, 2);
    let config = listed(&[(Some(1), &[6, 3]), (Some(0), &[1])]);
    let found = Plan::new(&config, &machine, None).unwrap();
    assert_eq!(cpus(&found), [vec![6, 3], vec![1]]);
    assert_eq!(numas(&found), [Some(1), Some(0)]);
    // -t takes the first ones, then others of the node.
    assert_eq!(plan(&config, &machine, Some(2)), [[6], [1]]);
    assert_eq!(
        plan(&config, &machine, Some(7)),
        [vec![6, 3, 2, 7], vec![1, 0, 4]]
    );
    // Two teams of one node never take the same one.
    let config = listed(&[(Some(0), &[0]), (Some(0), &[1])]);
    assert_eq!(plan(&config, &machine, Some(4)), [[0, 4], [1, 5]]);
    assert_eq!(
        refused(&config, &machine, Some(5)),
        "-t 5: node 1 would run 2 threads but has 1 logical CPUs; give -t 4 or fewer"
    );
    // Without a NUMA node the memory is anywhere.
    let found = Plan::new(&listed(&[(None, &[3, 0])]), &machine, Some(3)).unwrap();
    assert_eq!(cpus(&found), [[3, 0, 2]]);
    assert_eq!(numas(&found), [None]);
}

#[test]
fn listed_teams_need_what_they_name() {
    let machine = machine(2, 2, 2);
    for (teams, text) in [
        (
            listed(&[(Some(0), &[0, 8])]),
            "host.node 0 wants CPU 8, but this process may use CPUs 0-7: use these, or widen the affinity mask or cpuset",
        ),
        (
            listed(&[(None, &[usize::MAX])]),
            "host.node 0 wants CPU 18446744073709551615, but this process may use CPUs 0-7: use these, or widen the affinity mask or cpuset",
        ),
        (
            listed(&[(Some(0), &[0]), (Some(2), &[2])]),
            "host.node 1 wants NUMA node 2, but the machine has NUMA nodes 0-1: use one of these, or leave numa out",
        ),
        (
            listed(&[(Some(0), &[0, 2])]),
            "host.node 0 is on NUMA node 0, but its CPU 2 is not (that node has CPUs 0-1,4-5): move the CPU to another team, or leave numa out",
        ),
        (
            listed(&[(Some(0), &[0, 1]), (None, &[1])]),
            "CPU 1 is listed twice, in host.node 0 and host.node 1: a CPU runs one thread, list it once",
        ),
        (
            listed(&[(Some(0), &[0, 0])]),
            "CPU 0 is listed twice, in host.node 0 and host.node 0: a CPU runs one thread, list it once",
        ),
        (
            listed(&[(None, &[0]), (None, &[])]),
            "host.node 1 lists no CPU: name at least one in cpus = […]",
        ),
    ] {
        assert_eq!(refused(&teams, &machine, None), text);
        assert_eq!(refused(&teams, &machine, Some(2)), text);
    }
}

#[test]
fn a_machine_without_numa_nodes_has_teams_all_the_same() {
    let mut machine = machine(1, 2, 1);
    assert_eq!(
        refused(&listed(&[(Some(3), &[0])]), &machine, None),
        "host.node 0 wants NUMA node 3, but the machine has only NUMA node 0: use one of these, or leave numa out"
    );
    machine.nodes[0].os_index = None;
    let found = Plan::new(&divided(Nodes(2), Cores, 0), &machine, None).unwrap();
    assert_eq!(numas(&found), [None, None]);
    assert_eq!(
        refused(&listed(&[(Some(0), &[0])]), &machine, None),
        "host.node 0 wants NUMA node 0, but the machine has no numbered NUMA node: use one of these, or leave numa out"
    );
}

#[test]
fn there_are_at_most_as_many_nodes_as_groups_of_neurons() {
    let text = |n_nodes: usize| {
        format!(
            "{n_nodes} nodes: a layer's neurons are divided over 1 to 16 nodes; set host.nodes to a number in that range"
        )
    };
    let large = machine(17, 1, 1);
    assert_eq!(refused(&TopologyConfig::default(), &large, None), text(17));
    assert_eq!(
        plan(&divided(Nodes(16), Cores, 0), &large, None).len(),
        N_NODES_MAX
    );
    for n_nodes in [0, 17, usize::MAX] {
        assert_eq!(
            refused(&divided(Nodes(n_nodes), Cores, 0), &large, None),
            text(n_nodes)
        );
    }
    assert_eq!(refused(&listed(&[]), &large, None), text(0));
}

#[test]
fn a_machine_without_cpus_is_refused() {
    let empty = Machine::of_nodes(Vec::new(), MachineSource::AffinityMask);
    let error = Plan::new(&TopologyConfig::default(), &empty, None).unwrap_err();
    assert!(error.is_environment());
    assert_eq!(
        error.to_string(),
        "the machine has no CPU that this process may use: widen its affinity mask or cpuset"
    );
}

#[test]
fn failures_of_the_machine_name_a_cure() {
    let errors = [
        (
            TopologyError::Discovery {
                problem: "no /sys".to_owned(),
            },
            "cannot discover the CPUs of this machine: no /sys; compare with `lstopo`, or build without the feature hwloc",
        ),
        (
            TopologyError::Pin {
                cpu: 3,
                problem: "refused".to_owned(),
            },
            "cannot bind a thread to CPU 3: refused; check the affinity mask and cpuset of this process",
        ),
        (
            TopologyError::Thread {
                source: std::io::Error::from_raw_os_error(11),
            },
            "cannot start a thread: Resource temporarily unavailable (os error 11); raise the limit of processes (ulimit -u)",
        ),
        (
            TopologyError::Map {
                bytes: 5,
                source: std::io::Error::from_raw_os_error(12),
            },
            "the system refuses 5 bytes of memory: Cannot allocate memory (os error 12); close other programs, or raise the limit (ulimit -v)",
        ),
        (
            TopologyError::NotEnoughMemory {
                purpose: "an arena",
                bytes: 9,
                available_bytes: 8,
            },
            "an arena needs 9 bytes of memory, but 8 are available: close other programs, raise the memory limit, or use a smaller model or context",
        ),
    ];
    for (error, text) in errors {
        assert!(error.is_environment());
        assert_eq!(error.to_string(), text);
    }
    assert!(!TopologyError::NotThisSystem.is_environment());
    assert_eq!(
        TopologyError::NotThisSystem.to_string(),
        "hwloc describes another machine than this one, and threads cannot be bound to it: unset HWLOC_XMLFILE, HWLOC_SYNTHETIC and HWLOC_FSROOT"
    );
}
