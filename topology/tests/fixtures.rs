//! Machines saved as lstopo's XML that nobody here has: what is found in them, and what is planned for them.
//! `tests/fixtures/topology/make.py` writes them.

use std::path::Path;

use pi_topology::placement::{ColdShare, LayerLoad, MachineSpeed, NodeSpeed, solve};
use pi_topology::{Backends, Fit, Machine, Plan, TopologyConfig};

fn machine(name: &str) -> Machine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/topology");
    let xml = std::fs::read_to_string(folder.join(format!("{name}.xml"))).unwrap();
    Machine::from_xml(&format!("{name}.xml"), &xml).unwrap()
}

fn config(text: &str) -> TopologyConfig {
    toml::from_str(text).unwrap()
}

fn plan(text: &str, machine: &Machine, threads: Option<usize>) -> Plan {
    Plan::new(&config(text), machine, threads).unwrap()
}

/// NUMA node and CPUs of each team.
fn teams(plan: &Plan) -> Vec<(Option<usize>, Vec<usize>)> {
    let nodes = plan.nodes.iter();
    nodes.map(|node| (node.numa, node.cpus.clone())).collect()
}

fn range(first: usize, end: usize) -> Vec<usize> {
    (first..end).collect()
}

#[test]
fn one_node_with_a_gpu() {
    let machine = machine("one-node");
    assert_eq!(
        machine.to_string(),
        "1 NUMA node, 8 cores, 16 logical CPUs (0-15), 64.0 GiB of memory, saved in one-node.xml"
    );
    assert!(!machine.is_this_system());
    machine.require_this_system().unwrap_err();
    assert_eq!(machine.packages.len(), 1);
    assert_eq!(
        machine.packages[0].name.as_deref(),
        Some("Desktop, 8 cores")
    );
    let levels: Vec<(usize, u64)> = machine.caches.iter().map(|c| (c.level, c.bytes)).collect();
    assert_eq!(
        (levels.len(), levels[0], levels[8]),
        (9, (3, 32 << 20), (2, 1 << 20))
    );
    let gpu = &machine.gpus[0];
    assert_eq!(
        (gpu.pci_address.as_str(), gpu.pci_device, gpu.numa),
        ("0000:01:00.0", 0x2684, Some(0))
    );
    assert_eq!(gpu.name.as_deref(), Some("NVIDIA GeForce RTX 4090"));
    assert_eq!(gpu.memory_bytes, Some(24 << 30));
    assert_eq!(teams(&plan("", &machine, None)), [(Some(0), range(0, 8))]);
}

#[test]
fn two_nodes_with_a_gpu_on_the_second() {
    let machine = machine("two-nodes");
    assert_eq!(machine.gpus[0].numa, Some(1));
    let distances = machine.distances.as_ref().unwrap();
    assert_eq!(distances.between(0, 1), Some(21));
    assert_eq!(distances.between(1, 1), Some(10));
    assert_eq!(distances.between(0, 2), None);
    let all_cores = [(Some(0), range(0, 16)), (Some(1), range(16, 32))];
    assert_eq!(teams(&plan("", &machine, None)), all_cores);
    let both = plan(
        "[host]\nthreads = \"hyperthreads\"\nreserved_cores = 1\n",
        &machine,
        None,
    );
    let first: Vec<usize> = (0..15).chain(32..47).collect();
    assert_eq!(both.nodes[0].cpus, first);
}

#[test]
fn what_is_used_of_a_gpu_stands_on_its_line() {
    let machine = machine("two-nodes");
    let line = |toml: &str| {
        let text = machine.draw(Some(&plan(toml, &machine, None)), &[]);
        let line = text.lines().find(|line| line.contains("GPU ")).unwrap();
        line.to_owned()
    };
    assert!(!line("").contains("used"), "{}", line(""));
    let all = line("[[gpu]]\n");
    assert!(all.ends_with("  used: all that is free"), "{all}");
    let some = line("[[gpu]]\nvram_budget = \"22GiB\"\n");
    assert!(some.ends_with("  used: at most 22GiB"), "{some}");
    let address = &machine.gpus[0].pci_address;
    let named = line(&format!(
        "[[gpu]]\nvram_budget = \"1GiB\"\npci_address = \"{address}\"\n"
    ));
    assert!(named.ends_with("  used: at most 1GiB"), "{named}");
}

#[test]
fn four_and_eight_nodes() {
    let quarters = machine("four-nodes");
    let quarter = |n: usize| (Some(n), range(4 * n, 4 * n + 4));
    assert_eq!(teams(&plan("", &quarters, None)), [0, 1, 2, 3].map(quarter));
    let eight = machine("eight-nodes");
    assert_eq!(eight.packages.len(), 2);
    let eighth = |n: usize| (Some(n), vec![2 * n, 2 * n + 1]);
    assert_eq!(
        teams(&plan("", &eight, None)),
        [0, 1, 2, 3, 4, 5, 6, 7].map(eighth)
    );
    assert_eq!(plan("", &eight, Some(8)).team_sizes(), [1; 8]);
    assert_eq!(plan("", &eight, Some(32)).team_sizes(), [4; 8]);
    let error = Plan::new(&config(""), &eight, Some(33)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "-t 33: node 0 would run 5 threads but has 4 logical CPUs; give -t 32 or fewer"
    );
    let error = Plan::new(&config("[host]\nthreads = 5\n"), &eight, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "host.threads = 5: node 0 would run 5 threads but has 4 logical CPUs; set it to 4 or fewer"
    );
    assert_eq!(eight.distances.unwrap().between(0, 7), Some(32));
}

/// Cold neurons go to nodes as their memory allows: the half-empty node gets fewer than its speed alone would give it.
#[test]
fn unequal_memory_limits_the_smaller_nodes_share() {
    let machine = machine("unequal-memory");
    let memory: Vec<u64> = machine.nodes.iter().map(|node| node.memory_bytes).collect();
    assert_eq!(memory, [96 << 30, 24 << 30]);
    let layer = LayerLoad {
        fixed_bytes: 0,
        scanned_bytes: 1 << 10,
        active_bytes: 0,
        // 16 groups of 8 neurons: 96 GiB of a layer
        bundle_bytes: 768 << 20,
        frequencies: vec![0.5; 128],
    };
    let speed = |budget_bytes: u64| NodeSpeed {
        bytes_per_s: 1e10,
        budget_bytes,
        granule_bytes: 2 << 20,
    };
    let ends: Vec<usize> = (0..=16).map(|group| 8 * group).collect();
    let shares = |budgets: &[u64]| {
        let machine = MachineSpeed {
            devices: Vec::new(),
            nodes: budgets.iter().map(|&bytes| speed(bytes)).collect(),
            hand_off_s: 0.0,
        };
        solve(std::slice::from_ref(&layer), &machine, &ends).map(|layers| layers[0].cold.clone())
    };
    assert_eq!(
        shares(&[96 << 30, 96 << 30]).unwrap(),
        [ColdShare::Groups(0..8), ColdShare::Groups(8..16)]
    );
    assert_eq!(
        shares(&memory).unwrap(),
        [ColdShare::Groups(0..12), ColdShare::Groups(12..16)]
    );
    let error = shares(&[24 << 30, 24 << 30]).unwrap_err().to_string();
    assert!(
        error.contains("25769803776 are left") || error.contains("of 25769803776"),
        "{error}"
    );
}

#[test]
fn memory_without_cores_has_no_team() {
    let machine = machine("cxl");
    let numas: Vec<Option<usize>> = machine.nodes.iter().map(|node| node.os_index).collect();
    assert_eq!(numas, [Some(0), Some(1)]);
    let [memory] = machine.memory_nodes.as_slice() else {
        panic!("one node: {:?}", machine.memory_nodes);
    };
    assert_eq!((memory.os_index, memory.memory_bytes), (Some(2), 256 << 30));
    assert_eq!(memory.kind.as_deref(), Some("CXL"));
    assert_eq!(machine.numas(), [0, 1, 2]);
    assert_eq!(machine.memory_bytes(), 64 << 30);
    assert_eq!(plan("", &machine, None).numas(), [0, 1]);
    let error = Plan::new(
        &config("[[host.node]]\nnuma = 2\ncpus = [0]\n"),
        &machine,
        None,
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "host.node 0 wants NUMA node 2, but the machine has NUMA nodes 0-1: use one of these, or leave numa out"
    );
}

#[test]
fn cores_without_memory_join_the_nearest_node_that_has_some() {
    let machine = machine("cores-without-memory");
    assert_eq!(
        teams(&plan("", &machine, None)),
        [(Some(0), range(0, 4)), (Some(2), range(4, 8))]
    );
    assert!(machine.memory_nodes.is_empty());
}

#[test]
fn clusters_of_one_package_are_nodes() {
    let machine = machine("snc");
    assert_eq!(machine.packages.len(), 1);
    assert_eq!(
        teams(&plan("", &machine, None)),
        [(Some(0), range(0, 4)), (Some(1), range(4, 8))]
    );
}

#[test]
fn slow_cores_of_a_hybrid_processor_are_left_out_until_asked_for() {
    let machine = machine("hybrid");
    assert_eq!(machine.core_kinds, ["IntelAtom", "IntelCore"]);
    assert_eq!(machine.n_cores(), 12);
    let team = |text: &str, threads| plan(text, &machine, threads).nodes[0].cpus.clone();
    assert_eq!(team("", None), [0, 2, 4, 6]);
    assert_eq!(
        team("[host]\nthreads = \"hyperthreads\"\n", None),
        [0, 2, 4, 6, 1, 3, 5, 7]
    );
    assert_eq!(
        team("[host]\ncores = \"all\"\n", None),
        [0, 2, 4, 6, 8, 9, 10, 11, 12, 13, 14, 15]
    );
    // a number beyond the fast cores takes their hyper-threads, then slow cores
    assert_eq!(team("", Some(3)), [0, 2, 4]);
    assert_eq!(team("", Some(10)), [0, 2, 4, 6, 1, 3, 5, 7, 8, 9]);
    assert_eq!(team("", Some(16)).len(), 16);
    // two teams divide the fast cores, and neither is slow
    let two = plan("[host]\nnodes = 2\n", &machine, None);
    assert_eq!(two.nodes[0].cpus, [0, 2]);
    assert_eq!(two.nodes[1].cpus, [4, 6]);
}

#[test]
fn what_a_cpuset_keeps_away_is_not_planned_for() {
    let machine = machine("cpuset");
    assert_eq!(machine.withheld.cpus, [2, 3, 6, 7, 10, 11, 12, 13, 14, 15]);
    assert_eq!(machine.withheld.numas, [1]);
    // cores of node 1 are allowed, its memory is not: they use node 0's
    assert_eq!(
        teams(&plan("", &machine, None)),
        [(Some(0), vec![0, 1, 4, 5])]
    );
    let error = Plan::new(&config("[[host.node]]\ncpus = [2]\n"), &machine, None);
    assert_eq!(
        error.unwrap_err().to_string(),
        "host.node 0 wants CPU 2, but this process may use CPUs 0-1,4-5,8-9: use these, or widen the affinity mask or cpuset"
    );
}

#[test]
fn text_that_is_no_machine_is_refused() {
    let with = |attributes: &str| {
        format!("<topology version=\"2.0\"><object type=\"Machine\" {attributes}/></topology>")
    };
    let deep = format!("<topology version=\"2.0\">{}", "<object>".repeat(100_000));
    let long = format!("cpuset=\"{}\"", ",".repeat(3000));
    for (xml, problem) in [
        ("", "does not have a root node"),
        ("not xml at all", "unknown token"),
        ("<topology version=\"2.0\"></topology>", "it has no machine"),
        (
            "<topology version=\"1.0\"/>",
            "it is no topology of hwloc 2 (version 1.0)",
        ),
        ("<html/>", "it is no topology of hwloc 2 (version none)"),
        (&deep, "more than 256 elements are within one another"),
        (&with(""), "the machine has no CPU"),
        (
            &with("cpuset=\"0xf...f\""),
            "cpuset is \"0xf...f\", which is no finite set",
        ),
        (&with(&long), "which is no finite set"),
    ] {
        let error = Machine::from_xml("x.xml", xml).unwrap_err();
        assert!(!error.is_environment());
        let text = error.to_string();
        assert!(
            text.starts_with("x.xml: this ") && text.contains(problem),
            "{text}"
        );
        assert!(text.ends_with("save one with `lstopo FILE.xml`"), "{text}");
    }
}

/// Files that are nearly machines end as an error or as a machine that can be planned for or not, and in no other way.
#[test]
fn broken_machines_do_no_harm() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/topology");
    let mut state = 1u64;
    let mut random = |below: usize| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut n_machines = 0;
    for name in ["two-nodes", "cores-without-memory", "hybrid", "cxl"] {
        let xml = std::fs::read(folder.join(format!("{name}.xml"))).unwrap();
        for _ in 0..300 {
            let mut broken = xml.clone();
            for _ in 0..1 + random(4) {
                let at = random(broken.len());
                match random(4) {
                    0 => broken[at] = b"0123456789x-\"<>/ "[random(17)],
                    1 => drop(broken.drain(at..(at + 1 + random(40)).min(broken.len()))),
                    2 => broken.truncate(at.max(1)),
                    _ => {
                        let end = (at + 1 + random(200)).min(broken.len());
                        let piece = broken[at..end].to_vec();
                        broken.splice(at..at, piece);
                    }
                }
            }
            let text = String::from_utf8_lossy(&broken);
            if let Ok(machine) = Machine::from_xml("broken.xml", &text) {
                n_machines += 1;
                assert!(!machine.draw(None, &[]).is_empty());
                if let Ok(plan) = Plan::new(&config(""), &machine, None) {
                    assert!(plan.n_threads() > 0);
                    assert!(!machine.draw(Some(&plan), &[]).is_empty());
                }
            }
        }
    }
    assert!(n_machines > 0, "some are not broken enough");
}

/// What a machine lacks, and what fits it.
fn lacks(text: &str, machine: &Machine, cuda: bool) -> (Vec<String>, Vec<String>, String, String) {
    let fit = Fit::new(&config(text), machine, Backends { cuda });
    let words = |list: &[pi_topology::Difference]| list.iter().map(|d| d.to_string()).collect();
    for fitting in [&fit.nearest, &fit.simulated] {
        Plan::new(fitting, machine, None).unwrap();
        let again = Fit::new(fitting, machine, Backends { cuda });
        assert_eq!(again.lacks, [], "what is said to fit fits");
    }
    (
        words(&fit.lacks),
        words(&fit.fallbacks),
        fit.nearest.to_short_toml(),
        fit.simulated.to_short_toml(),
    )
}

#[test]
fn a_configuration_that_fits_stays_as_it_is() {
    let text = "[machine]\nnuma_nodes = 2\ncores_per_node = 16\nmemory_per_node = \"64GiB\"\n[host]\nthreads = 8\n[[gpu]]\nvram_budget = \"22GiB\"\nrequired = true\n";
    let (lacks, fallbacks, nearest, simulated) = lacks(text, &machine("two-nodes"), true);
    assert!(
        lacks.is_empty() && fallbacks.is_empty(),
        "{lacks:?} {fallbacks:?}"
    );
    assert_eq!(nearest, config(text).to_short_toml());
    assert_eq!(simulated, nearest);
}

#[test]
fn differences_are_listed_with_what_fits() {
    let text = "[machine]\nnuma_nodes = 4\ncores_per_node = 32\nmemory_per_node = \"256GiB\"\n[host]\nnodes = 4\nthreads = 40\n[[gpu]]\nvram_budget = \"22GiB\"\nrequired = true\n[[gpu]]\nrequired = true\n[[gpu]]\n";
    let (lacks, fallbacks, nearest, simulated) = lacks(text, &machine("two-nodes"), true);
    assert_eq!(
        lacks,
        [
            "machine.numa_nodes = 4: the machine has 2 NUMA nodes with cores",
            "machine.cores_per_node = 32: a node has 16 cores that may be used",
            "machine.memory_per_node = \"256GiB\": a node has 64.0 GiB of memory",
            "gpu 1: the machine has 1 NVIDIA GPU",
            "[host]: host.threads = 40: node 0 would run 40 threads but has 16 logical CPUs; set it to 16 or fewer",
        ]
    );
    assert_eq!(fallbacks, ["gpu 2: the machine has 1 NVIDIA GPU"]);
    let gpu = "[[gpu]]\nvram_budget = \"22GiB\"\nrequired = true\n";
    assert_eq!(nearest, format!("[host]\nnodes = 2\nthreads = 32\n{gpu}"));
    assert_eq!(simulated, format!("[host]\nnodes = 4\nthreads = 16\n{gpu}"));
}

#[test]
fn gpus_need_memory_an_address_and_a_back_end() {
    let (two, one) = (machine("two-nodes"), machine("snc"));
    let gpu = |keys: &str| format!("[[gpu]]\nrequired = true\n{keys}");
    let first = |text: &str, machine: &Machine, cuda| lacks(text, machine, cuda).0.join("; ");
    assert_eq!(
        first(&gpu("vram_budget = \"40GiB\"\n"), &two, true),
        "gpu 0 with 40GiB: NVIDIA GeForce RTX 4090 at 0000:41:00.0 has 24.0 GiB of memory"
    );
    assert_eq!(
        first(&gpu("pci_address = \"0000:01:00.0\"\n"), &two, true),
        "gpu 0: the machine has no NVIDIA GPU at 0000:01:00.0, but at 0000:41:00.0"
    );
    assert_eq!(
        first(&gpu("pci_address = \"0000:41:00.0\"\n"), &two, true),
        ""
    );
    assert_eq!(
        first(&gpu(""), &two, false),
        "gpu 0: NVIDIA GeForce RTX 4090 at 0000:41:00.0 is there, but this program has no CUDA back end yet"
    );
    assert_eq!(
        first(&gpu(""), &one, true),
        "gpu 0: the machine has no NVIDIA GPU"
    );
    // a GPU that is named later is not given to an entry that takes any
    let both = "[[gpu]]\n[[gpu]]\npci_address = \"0000:41:00.0\"\nrequired = true\n";
    let (lacking, fallbacks, ..) = lacks(both, &two, true);
    assert!(lacking.is_empty());
    assert_eq!(fallbacks, ["gpu 0: the machine has 1 NVIDIA GPU"]);
}

#[test]
fn missing_nodes_are_simulated_as_extra_teams() {
    let one = machine("one-node");
    let text = "[machine]\nnuma_nodes = 2\n";
    let (lacking, _, nearest, simulated) = lacks(text, &one, false);
    assert_eq!(
        lacking,
        ["machine.numa_nodes = 2: the machine has 1 NUMA node with cores"]
    );
    assert_eq!(
        (nearest.as_str(), simulated.as_str()),
        ("", "[host]\nnodes = 2\n")
    );
    // listed teams that are not there: the nearest keeps what is, a simulation their number
    let text =
        "[[host.node]]\nnuma = 0\ncpus = \"0-3\"\n[[host.node]]\nnuma = 1\ncpus = \"16-19\"\n";
    let (lacking, _, nearest, simulated) = lacks(text, &one, false);
    assert_eq!(
        lacking,
        [
            "[host]: host.node 1 wants CPU 16, but this process may use CPUs 0-15: use these, or widen the affinity mask or cpuset"
        ]
    );
    assert_eq!(nearest, "[[host.node]]\nnuma = 0\ncpus = [0, 1, 2, 3]\n");
    assert_eq!(simulated, "[host]\nnodes = 2\n");
    // cold bundles on a team that there is not
    let text = "[memory]\ncold = \"single:1\"\n";
    let (lacking, _, nearest, _) = lacks(text, &one, false);
    assert_eq!(
        lacking,
        [
            "[host]: memory.cold = \"single:1\", but the nodes are counted from 0, and the last one is 0: name one of them"
        ]
    );
    assert_eq!(nearest, "");
    let two = config("[machine]\nnuma_nodes = 2\n[memory]\ncold = \"single:1\"\n");
    let fit = Fit::new(&two, &one, Backends::default());
    assert_eq!(
        fit.simulated.to_short_toml(),
        "[memory]\ncold = \"single:1\"\n[host]\nnodes = 2\n"
    );
}

/// Not written by `make.py`: by lstopo 2.9, of a virtual machine and of `package:2 [numa] l3:1 core:4 pu:2`.
#[test]
fn what_lstopo_itself_wrote_is_read() {
    let one = machine("lstopo-one-node");
    assert_eq!(
        one.to_string(),
        "1 NUMA node, 2 cores, 2 logical CPUs (0-1), 23.5 GiB of memory, saved in lstopo-one-node.xml"
    );
    assert_eq!(teams(&plan("", &one, None)), [(Some(0), vec![0, 1])]);
    let two = machine("lstopo-two-nodes");
    assert_eq!(
        two.to_string(),
        "2 NUMA nodes, 8 cores, 16 logical CPUs (0-15), 64.0 GiB of memory, saved in lstopo-two-nodes.xml"
    );
    let teams = teams(&plan("", &two, None));
    assert_eq!(
        teams,
        [(Some(0), vec![0, 2, 4, 6]), (Some(1), vec![8, 10, 12, 14])]
    );
}
