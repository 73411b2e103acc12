//! Configuration files: what is read, and what an error says about line and key.

use std::collections::BTreeSet;
use std::path::Path;

use pi_topology::{
    ByteSize, ColdPolicy, CoreChoice, GpuConfig, GpuSync, HostConfig, HugePages, ListedTeam,
    MachineNeeds, MemoryConfig, NodeCount, SparsityConfig, ThreadsPerNode, TopologyConfig,
    VramBudget,
};

/// The error that a file gives.
fn error(text: &str) -> String {
    toml::from_str::<TopologyConfig>(text)
        .unwrap_err()
        .to_string()
}

/// Checks that an error shows `line`, points at `column`, and says `message`.
fn assert_error(text: &str, line: usize, column: usize, message: &str) {
    let error = error(text);
    let position = format!("line {line}, column {column}\n");
    assert!(error.contains(&position), "{error}");
    assert!(
        error.contains(text.lines().nth(line - 1).unwrap()),
        "{error}"
    );
    assert!(error.contains(message), "{error}");
}

#[test]
fn an_empty_file_is_the_default() {
    let config: TopologyConfig = toml::from_str("").unwrap();
    assert_eq!(config, TopologyConfig::default());
    let default = TopologyConfig {
        sparsity: SparsityConfig::default(),
        name: None,
        machine: MachineNeeds {
            numa_nodes: None,
            cores_per_node: None,
            memory_per_node: None,
        },
        memory: MemoryConfig {
            cold: ColdPolicy::Shard,
            huge_pages: HugePages::Try,
            strict: false,
        },
        host: HostConfig::Divided {
            nodes: NodeCount::All,
            threads: ThreadsPerNode::Cores,
            reserved_cores: 0,
            cores: CoreChoice::Fastest,
        },
        gpus: Vec::new(),
    };
    assert_eq!(config, default);
    let config: TopologyConfig = toml::from_str("[memory]\n[host]\n").unwrap();
    assert_eq!(config, default);
}

#[test]
fn every_key_is_read() {
    let text = "name = \"x\"\n[memory]\nhuge_pages = \"require\"\n[host]\nnodes = 3\nthreads = \"hyperthreads\"\nreserved_cores = 2\n";
    let config: TopologyConfig = toml::from_str(text).unwrap();
    assert_eq!(config.name.as_deref(), Some("x"));
    assert_eq!(config.memory.huge_pages, HugePages::Require);
    assert_eq!(
        config.host,
        HostConfig::Divided {
            nodes: NodeCount::Number(3),
            threads: ThreadsPerNode::Hyperthreads,
            reserved_cores: 2,
            cores: CoreChoice::Fastest,
        }
    );
    let text = "[machine]\nnuma_nodes = 2\nmemory_per_node = \"64GiB\"\n[memory]\ncold = \"single:1\"\nstrict = true\n[host]\ncores = \"all\"\n[[gpu]]\n[[gpu]]\npci_address = \"0000:01:00.0\"\nvram_budget = \"22GiB\"\nhot_percent_max = 50\nsync = \"events\"\nreplan = 64\nrequired = true\n";
    let config: TopologyConfig = toml::from_str(text).unwrap();
    let needs = MachineNeeds {
        numa_nodes: Some(2),
        cores_per_node: None,
        memory_per_node: Some(ByteSize(64 << 30)),
    };
    assert_eq!(config.machine, needs);
    assert_eq!(config.memory.cold, ColdPolicy::Single(1));
    assert!(config.memory.strict);
    let HostConfig::Divided { cores, .. } = config.host else {
        panic!("no teams are listed")
    };
    assert_eq!(cores, CoreChoice::All);
    let gpu = GpuConfig {
        pci_address: Some("0000:01:00.0".to_owned()),
        vram_budget: VramBudget::Bytes(ByteSize(22 << 30)),
        hot_percent_max: 50,
        sync: GpuSync::Events,
        replan: 64,
        required: true,
    };
    assert_eq!(config.gpus, [GpuConfig::default(), gpu]);
    let text = "[memory]\nhuge_pages = \"off\"\n[[host.node]]\nnuma = 1\ncpus = [3, 2]\n[[host.node]]\ncpus = \"0,8-9\"\n";
    let config: TopologyConfig = toml::from_str(text).unwrap();
    assert_eq!(config.memory.huge_pages, HugePages::Off);
    let teams = vec![
        ListedTeam {
            numa: Some(1),
            cpus: vec![3, 2],
        },
        ListedTeam {
            numa: None,
            cpus: vec![0, 8, 9],
        },
    ];
    assert_eq!(config.host, HostConfig::Listed(teams));
}

#[test]
fn unknown_keys_are_refused_where_they_stand() {
    assert_error(
        "name = \"x\"\n[host]\nthread = 2\n",
        3,
        1,
        "unknown field `thread`",
    );
    assert_error(
        "[memory]\nhugepages = \"try\"\n",
        2,
        1,
        "unknown field `hugepages`, expected one of `cold`, `huge_pages`, `strict`",
    );
    assert_error("[gpus]\n", 1, 2, "unknown field `gpus`");
    assert_error(
        "[[host.node]]\ncpus = [0]\ncores = [1]\n",
        3,
        1,
        "unknown field `cores`",
    );
}

#[test]
fn values_are_refused_where_they_stand() {
    let nodes = "expected \"all\" or a number of nodes from 1 to 16";
    assert_error("[host]\nnodes = 0\n", 2, 9, nodes);
    assert_error("[host]\nnodes = 17\n", 2, 9, nodes);
    assert_error("[host]\nnodes = -1\n", 2, 9, nodes);
    assert_error("[host]\nnodes = \"some\"\n", 2, 9, nodes);
    assert_error("[host]\nnodes = 1.5\n", 2, 9, nodes);
    let threads = "expected \"cores\", \"hyperthreads\" or a number of threads from 1";
    assert_error("[host]\nthreads = 0\n", 2, 11, threads);
    assert_error("[host]\nthreads = \"all\"\n", 2, 11, threads);
    assert_error("[host]\nthreads = true\n", 2, 11, threads);
    let number = "expected a whole number from 0";
    assert_error("[host]\nreserved_cores = -1\n", 2, 18, number);
    assert_error("[machine]\nnuma_nodes = \"two\"\n", 2, 14, number);
    assert_error("[machine]\ncores_per_node = 1.5\n", 2, 18, number);
    assert_error("[[host.node]]\nnuma = -1\n", 2, 8, number);
    for value in ["\"yes\"", "true", "1"] {
        let text = format!("[memory]\nhuge_pages = {value}\n");
        assert_error(&text, 2, 14, "expected \"try\", \"require\" or \"off\"");
    }
    assert_error(
        "[host]\ncores = 2\n",
        2,
        9,
        "expected \"fastest\" or \"all\"",
    );
    assert_error("[[host.node]]\nnuma = 0\ncpus = [0, -1]\n", 3, 12, number);
    assert_error(
        "[[host.node]]\ncpus = \"3-1\"\n",
        2,
        8,
        "expected a list of logical CPUs, such as [0, 1, 2] or \"0-15,32-47\"",
    );
    let policy = "expected \"shard\", \"replicate\", \"interleave\" or \"single:N\" with N a node from 0 to 15";
    assert_error("[memory]\ncold = \"single\"\n", 2, 8, policy);
    assert_error("[memory]\ncold = \"single:16\"\n", 2, 8, policy);
    assert_error("[memory]\ncold = \"single:+1\"\n", 2, 8, policy);
    assert_error("[memory]\ncold = 1\n", 2, 8, policy);
    let size = "expected a size with its unit, such as \"22GiB\" or \"512 MB\"";
    assert_error("[machine]\nmemory_per_node = 64\n", 2, 19, size);
    assert_error("[machine]\nmemory_per_node = \"all\"\n", 2, 19, size);
    assert_error("[[gpu]]\nvram_budget = \"22G\"\n", 2, 15, size);
    assert_error("[[gpu]]\nhot_percent_max = 101\n", 2, 19, "from 0 to 100");
    assert_error("[[gpu]]\nreplan = -1\n", 2, 10, "from 0");
    assert_error(
        "[[gpu]]\nsync = \"spin\"\n",
        2,
        8,
        "expected \"flags\" or \"events\"",
    );
    for address in ["banana", "01:00.0", "00000000:01:00.0", "0000.01:00:0", ""] {
        let text = format!("[[gpu]]\npci_address = \"{address}\"\n");
        assert_error(&text, 2, 15, "such as \"0000:01:00.0\"");
    }
    assert_error("memory = 3\n", 1, 10, "expected a table");
    assert_error("name = 3\n", 1, 8, "expected a string");
}

#[test]
fn contradictions_are_refused_in_their_table() {
    let two_ways = |key: &str| {
        format!(
            "[host] has {key} and [[host.node]], which says the same another way: remove one of them"
        )
    };
    for (key, value) in [("nodes", "2"), ("threads", "1"), ("reserved_cores", "0")] {
        let text = format!("[host]\n{key} = {value}\n[[host.node]]\ncpus = [0]\n");
        assert_error(&text, 1, 1, &two_ways(key));
    }
    assert_error(
        "name = \"x\"\n\n[host]\nthreads = 4\nreserved_cores = 1\n",
        3,
        1,
        "reserved_cores = 1 goes with threads = \"cores\" or \"hyperthreads\", not with a number: lower the number instead",
    );
    assert_error(
        "[[host.node]]\ncpus = [0, 5]\n[[host.node]]\ncpus = [5]\n",
        1,
        3,
        "CPU 5 is listed twice, in host.node 0 and host.node 1: a CPU runs one thread, list it once",
    );
    assert_error(
        "[[host.node]]\ncpus = []\n",
        1,
        3,
        "host.node 0 lists no CPU: name at least one in cpus = […]",
    );
    assert_error(
        "[[host.node]]\nnuma = 0\n",
        1,
        3,
        "host.node 0 lists no CPU: name at least one in cpus = […]",
    );
    let many = "[[host.node]]\ncpus = [0]\n".repeat(17);
    assert_error(
        &many,
        1,
        3,
        "17 nodes: a layer's neurons are divided over 1 to 16 nodes; set host.nodes to a number in that range",
    );
    assert_error("[host]\nnode = []\n", 1, 1, "0 nodes: ");
}

#[test]
fn every_file_that_comes_along_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            let text = std::fs::read_to_string(&path).unwrap();
            let config: TopologyConfig = toml::from_str(&text).unwrap();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            assert_eq!(config.name.as_ref(), Some(&name));
            if name == "cpu-only" {
                let default = TopologyConfig {
                    name: Some(name.clone()),
                    ..TopologyConfig::default()
                };
                assert_eq!(config, default);
            }
            names.push(name);
        }
    }
    names.sort();
    assert_eq!(
        names,
        [
            "2x4090",
            "4090-ddr5",
            "cpu-only",
            "dual-socket",
            "dual-socket-4090",
            "four-nodes",
            "h100-24g",
            "laptop-6gb",
            "two-nodes"
        ]
    );
}

/// Every key that `--print-config` knows stands in the file that explains them all, set or as a comment.
#[test]
fn the_default_file_has_every_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/cpu-only.toml");
    let file = std::fs::read_to_string(path).unwrap();
    let keys = |text: &str| -> BTreeSet<String> {
        let lines = text.lines().map(|line| line.trim_start_matches("# "));
        let keys = lines.filter_map(|line| Some(line.split_once(" = ")?.0.to_owned()));
        keys.collect()
    };
    let file = keys(&file);
    let teams = "[[host.node]]\ncpus = [0]\n[[gpu]]\n";
    for config in [TopologyConfig::default(), toml::from_str(teams).unwrap()] {
        let printed = keys(&config.to_toml());
        let missing: Vec<&String> = printed.difference(&file).collect();
        assert_eq!(missing, Vec::<&String>::new());
        assert!(printed.len() > 9, "{printed:?}");
    }
}

/// Configurations with about every key at another value than its default.
fn odd_configs() -> Vec<TopologyConfig> {
    [
        "",
        "name = \"a \\\"b\\\" \\\\ \\n\"\n",
        "[machine]\ncores_per_node = 3\n[memory]\nhuge_pages = \"off\"\n",
        "[machine]\nnuma_nodes = 2\nmemory_per_node = \"1.5GiB\"\n[memory]\ncold = \"interleave\"\nstrict = true\n[sparsity]\npredict = \"0-3: exact, 4: both\"\n[host]\nnodes = 2\nthreads = \"hyperthreads\"\nreserved_cores = 1\ncores = \"all\"\n",
        "[host]\nthreads = 3\n[[gpu]]\n[[gpu]]\nvram_budget = \"512MB\"\nhot_percent_max = 0\nsync = \"events\"\nreplan = 7\nrequired = true\npci_address = \"0000:01:00.0\"\n",
        "[memory]\ncold = \"single:3\"\n[[host.node]]\nnuma = 1\ncpus = [4, 2]\n[[host.node]]\ncpus = [0]\n[[gpu]]\nrequired = true\n",
    ]
    .into_iter()
    .map(|text| toml::from_str(text).unwrap())
    .collect()
}

#[test]
fn what_is_printed_is_read_back() {
    for config in odd_configs() {
        for text in [config.to_toml(), config.to_short_toml()] {
            let again: TopologyConfig = toml::from_str(&text).unwrap_or_else(|error| {
                panic!("{error}\n{text}");
            });
            assert_eq!(again, config, "{text}");
        }
    }
}

#[test]
fn every_default_is_printed_and_explained() {
    let text = TopologyConfig::default().to_toml();
    for line in [
        "# name = \"x\"                    # for logs",
        "# numa_nodes = 2                # NUMA nodes with cores",
        "cold = \"shard\"                  # cold neurons: shard, replicate, interleave or single:N",
        "huge_pages = \"try\"              # try, require or off",
        "strict = false                  # whether memory elsewhere than planned is an error",
        "predict = \"auto\"                # with --sparsity predicted: auto, or who predicts in which layer, as `plan` prints it",
        "nodes = \"all\"                   # teams: all (one per NUMA node), or 1 to 16",
        "threads = \"cores\"               # of each team: cores, hyperthreads, or a number",
        "reserved_cores = 0              # cores of each team left to others",
        "cores = \"fastest\"               # of hybrid processors: fastest or all",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert_eq!(TopologyConfig::default().to_short_toml(), "");
    let one: TopologyConfig =
        toml::from_str("[[gpu]]\nrequired = true\n[host]\nnodes = 2\n").unwrap();
    assert_eq!(
        one.to_short_toml(),
        "[host]\nnodes = 2\n[[gpu]]\nrequired = true\n"
    );
}
