//! Properties of plans on random machines.

use std::collections::HashSet;

use pi_topology::{
    Core, CoreChoice, HostConfig, Machine, MachineNode, MachineSource, NodeCount, Plan,
    ThreadsPerNode, TopologyConfig,
};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

/// A machine from each node's cores, given as numbers of hyper-threads.
fn machine(nodes: &[Vec<usize>]) -> Machine {
    let mut n_cpus = 0;
    let mut next_core = |n_hyperthreads: usize| {
        let first = n_cpus;
        n_cpus += n_hyperthreads;
        Core {
            cpus: (first..n_cpus).collect(),
            kind: 0,
        }
    };
    let nodes = nodes
        .iter()
        .enumerate()
        .map(|(index, cores)| MachineNode {
            // Numbers as after a node without CPUs: they are not positions.
            os_index: Some(index * 2 + 1),
            memory_bytes: 0,
            cores: cores
                .iter()
                .map(|&n_hyperthreads| next_core(n_hyperthreads))
                .collect(),
        })
        .collect();
    Machine::of_nodes(nodes, MachineSource::Synthetic("random".to_owned()))
}

fn any_machine() -> impl Strategy<Value = Machine> {
    vec(vec(1..=2usize, 1..=12), 1..=6).prop_map(|nodes| machine(&nodes))
}

fn any_host() -> impl Strategy<Value = HostConfig> {
    let nodes = prop_oneof![
        Just(NodeCount::All),
        (1..=16usize).prop_map(NodeCount::Number)
    ];
    let threads = prop_oneof![
        Just(ThreadsPerNode::Cores),
        Just(ThreadsPerNode::Hyperthreads),
        (1..=8usize).prop_map(ThreadsPerNode::Number),
    ];
    (nodes, threads, 0..=1usize).prop_map(|(nodes, threads, reserved_cores)| HostConfig::Divided {
        nodes,
        threads,
        reserved_cores: match threads {
            ThreadsPerNode::Number(_) => 0,
            _ => reserved_cores,
        },
        cores: CoreChoice::Fastest,
    })
}

/// Most teams on one of the NUMA nodes that are used, and whether each has cores for its teams.
fn has_core_per_team(machine: &Machine, n_teams: usize) -> bool {
    let n_homes = n_teams.min(machine.nodes.len());
    machine.nodes[..n_homes]
        .iter()
        .enumerate()
        .all(|(index, node)| {
            let n_here = n_teams / n_homes + usize::from(index < n_teams % n_homes);
            node.cores.len() >= n_here
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn plans_keep_to_the_machine(
        machine in any_machine(),
        host in any_host(),
        threads in option::of(1..=40usize),
    ) {
        let HostConfig::Divided { nodes, .. } = host else { unreachable!() };
        let n_teams = match nodes {
            NodeCount::All => machine.nodes.len(),
            NodeCount::Number(n_nodes) => n_nodes,
        };
        let config = TopologyConfig { host, ..TopologyConfig::default() };
        let Ok(plan) = Plan::new(&config, &machine, threads) else {
            // With a thread per team and nothing reserved there is always a plan.
            let config = TopologyConfig {
                host: HostConfig::Divided {
                    nodes,
                    threads: ThreadsPerNode::Cores,
                    reserved_cores: 0,
                    cores: CoreChoice::Fastest,
                },
                ..TopologyConfig::default()
            };
            prop_assert!(Plan::new(&config, &machine, None).is_ok());
            prop_assert!(Plan::new(&config, &machine, Some(n_teams)).is_ok());
            return Ok(());
        };
        prop_assert_eq!(plan.nodes.len(), n_teams);
        if let Some(threads) = threads {
            prop_assert_eq!(plan.n_threads(), threads);
            let counts: Vec<usize> = plan.nodes.iter().map(|node| node.cpus.len()).collect();
            prop_assert!(counts.is_sorted_by(|a, b| a >= b));
            prop_assert!(counts[0] - counts[counts.len() - 1] <= 1);
        }
        let mut all = HashSet::new();
        for node in &plan.nodes {
            prop_assert!(!node.cpus.is_empty());
            let home = machine.nodes.iter().find(|home| home.os_index == node.numa).unwrap();
            let own: HashSet<usize> = home.cores.iter().flat_map(|core| core.cpus.clone()).collect();
            let team: HashSet<usize> = node.cpus.iter().copied().collect();
            prop_assert!(team.is_subset(&own), "{:?} on {:?}", node, own);
            prop_assert_eq!(team.len(), node.cpus.len());
            all.extend(team);
        }
        if has_core_per_team(&machine, n_teams) {
            prop_assert_eq!(all.len(), plan.n_threads());
        }
    }

    #[test]
    fn the_number_that_an_error_names_does(
        machine in any_machine(),
        nodes in 1..=16usize,
        threads in 1..=400usize,
    ) {
        let config = TopologyConfig {
            host: HostConfig::Divided {
                nodes: NodeCount::Number(nodes),
                threads: ThreadsPerNode::Cores,
                reserved_cores: 0,
                cores: CoreChoice::Fastest,
            },
            ..TopologyConfig::default()
        };
        if let Err(error) = Plan::new(&config, &machine, Some(threads)) {
            let text = error.to_string();
            let cure = text.split("give -t ").nth(1).unwrap();
            let named: usize = cure.split(' ').next().unwrap().parse().unwrap();
            prop_assert!(Plan::new(&config, &machine, Some(named)).is_ok(), "{}", text);
        }
    }
}
