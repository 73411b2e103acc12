//! `pi-runtime topology`, `--topology`, `--simulate` and `--print-config`: what a user sees of machines and plans.

mod common;

use std::path::Path;

use common::running::{Folder, Ran, json_of, run, text_of, tiny};
use common::tiny_model::TinyModel;
use common::{demo_model, workspace};
use pi_kernels::QuantType;
use pi_topology::{Machine, TopologyConfig};
use serde_json::{Value, json};

fn fixture(name: &str) -> String {
    let path = workspace().join(format!("tests/fixtures/topology/{name}.xml"));
    path.to_str().unwrap().to_owned()
}

fn shipped(name: &str) -> String {
    let path = workspace().join(format!("configs/{name}.toml"));
    path.to_str().unwrap().to_owned()
}

/// Checks a refusal: nothing on stdout, exit code 2, all words on stderr.
fn assert_refused(ran: &Ran, words: &[&str]) {
    assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{}", ran.err);
    assert!(!ran.err.contains("panicked"), "{}", ran.err);
    for word in words {
        assert!(ran.err.contains(word), "{word}: {}", ran.err);
    }
}

#[test]
fn this_machine_is_shown_as_it_is_found() {
    let machine = Machine::discover().unwrap();
    let json = json_of(&["topology", "--json"]);
    assert_eq!(json["machine"]["nodes"], json!(machine.nodes));
    assert_eq!(json["machine"]["caches"], json!(machine.caches));
    let cpus = |value: &Value| value["cpus"].as_array().unwrap().len();
    let teams = json["plan"]["nodes"].as_array().unwrap();
    assert_eq!(teams.len(), machine.nodes.len());
    assert!(teams.iter().all(|team| cpus(team) > 0));
    assert!(
        !json["limits"]["affinity_cpus"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert_eq!(json["model"], Value::Null);
    let text = text_of(&["topology"]);
    assert!(text.starts_with(&format!("{machine}\n")), "{text}");
    assert!(text.contains("team 0: "), "{text}");
}

#[test]
fn a_made_up_machine_is_planned_for() {
    let made_up = "package:2 [numanode] core:16 pu:2";
    let json = json_of(&["topology", "--json", "--synthetic", made_up]);
    assert_eq!(json["machine"]["source"], json!({ "synthetic": made_up }));
    assert_eq!(json["limits"], Value::Null);
    let first_of_each = |first: usize| (first..first + 32).step_by(2).collect::<Vec<usize>>();
    assert_eq!(
        json["plan"]["nodes"],
        json!([
            { "numa": 0, "cpus": first_of_each(0) },
            { "numa": 1, "cpus": first_of_each(32) },
        ])
    );
    let json = json_of(&["topology", "--json", "--synthetic", made_up, "-t", "3"]);
    assert_eq!(json["plan"]["nodes"][1]["cpus"], json!([32]));
}

#[test]
fn a_saved_machine_is_drawn_with_the_models_bytes() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let xml = fixture("two-nodes");
    let args = ["topology", "--xml", &xml, "-m", &model, "-t", "4"];
    let text = text_of(&args);
    let expected = format!(
        "\
2 NUMA nodes, 32 cores, 64 logical CPUs (0-63), 128.0 GiB of memory, saved in {xml}

Package 0  Server, 16 cores
└─ NUMA node 0  64.0 GiB
   └─ L3 32.0 MiB
         [ 0A 32 ][ 1a 33 ][ 2  34 ][ 3  35 ][ 4  36 ][ 5  37 ][ 6  38 ][ 7  39 ][ 8  40 ][ 9  41 ][10  42 ]
         [11  43 ][12  44 ][13  45 ][14  46 ][15  47 ]

Package 1  Server, 16 cores
└─ NUMA node 1  64.0 GiB
   ├─ L3 32.0 MiB
   │     [16B 48 ][17b 49 ][18  50 ][19  51 ][20  52 ][21  53 ][22  54 ][23  55 ][24  56 ][25  57 ][26  58 ]
   │     [27  59 ][28  60 ][29  61 ][30  62 ][31  63 ]
   └─ GPU 0000:41:00.0  NVIDIA GeForce RTX 4090  24.0 GiB

Caches: L3 2 × 32.0 MiB, L2 32 × 1.0 MiB
Distances from NUMA node 0: 10 21, from 1: 21 10

Teams (letters beside CPUs above; a capital where the leader runs)
  a  team 0: 2 threads on CPUs 0-1, memory on NUMA node 0: "
    );
    assert!(text.starts_with(&expected), "{text}\n---\n{expected}");
    assert!(
        text.ends_with(
            "  cold neurons: shard\n  shares by threads\n  mode exact, a context of 256 tokens\n"
        ),
        "{text}"
    );

    let json = json_of(&[&args[..], &["--json"]].concat());
    let bytes = |json: &Value, key: &str| -> Vec<u64> {
        let nodes = json["plan"]["nodes"].as_array().unwrap();
        nodes
            .iter()
            .map(|node| node[key].as_u64().unwrap())
            .collect()
    };
    let whole = json_of(&[
        "topology",
        "--xml",
        &fixture("one-node"),
        "-m",
        &model,
        "--json",
    ]);
    let (halves, whole_cache) = (bytes(&json, "cache_bytes"), bytes(&whole, "cache_bytes"));
    assert_eq!(halves.iter().sum::<u64>(), whole_cache[0]);
    let halves_of_cache = halves;
    let halves = bytes(&json, "weights_bytes");
    let whole = bytes(&whole, "weights_bytes");
    assert!(
        halves.iter().all(|&half| half > whole[0] / 4),
        "{halves:?} of {whole:?}"
    );
    // the gaps between matrices are all that a division adds
    let sum: u64 = halves.iter().sum();
    assert!(
        (whole[0]..whole[0] + 64 * 100).contains(&sum),
        "{halves:?} of {whole:?}"
    );
    // one of them has all cold neurons
    let single = folder.file("single.toml", "[memory]\ncold = \"single:1\"\n");
    let json = json_of(&[&args[..], &["--json", "--topology", &single]].concat());
    let single = bytes(&json, "weights_bytes");
    assert!(
        single[0] < halves[0] && single[1] > halves[1],
        "{single:?} for {halves:?}"
    );
    assert_eq!(json["plan"]["cold"], "single:1");
    // each has them all: what node 1 has alone with single:1, but for gaps between matrices
    let all = folder.file("all.toml", "[memory]\ncold = \"replicate\"\n");
    let json = json_of(&[&args[..], &["--json", "--topology", &all]].concat());
    let all = bytes(&json, "weights_bytes");
    assert!(
        (single[1]..single[1] + 64 * 100).contains(&all[1]),
        "{all:?} for {single:?}"
    );
    let cold = single[1] - halves[1] + (halves[0] - single[0]);
    assert!(
        (single[0] + cold..single[0] + cold + 2 * 64 * 100).contains(&all[0]),
        "{all:?} with {cold} cold bytes"
    );
    assert_eq!(bytes(&json, "cache_bytes"), halves_of_cache);
}

/// The loader's own division where one node has less memory than half of the model.
#[test]
fn neurons_go_where_there_is_memory_for_them() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let xml = std::fs::read_to_string(fixture("unequal-memory")).unwrap();
    let with_memory = |bytes: u64| {
        let xml = xml.replace("25769803776", &bytes.to_string());
        folder.file("machine.xml", &xml)
    };
    let shown = |bytes: u64, more: &[&str]| {
        let xml = with_memory(bytes);
        let args = ["topology", "--json", "--xml", &xml, "-m", &model, "-t", "4"];
        let json = json_of(&[&args[..], more].concat());
        let nodes = json["plan"]["nodes"].as_array().unwrap().clone();
        let held = |node: &Value| {
            let of = |key: &str| node[key].as_u64().unwrap();
            of("weights_bytes") + of("cache_bytes")
        };
        let held: Vec<u64> = nodes.iter().map(held).collect();
        (held, json["model"]["too_much"].clone())
    };
    let (halves, problem) = shown(24 << 30, &[]);
    assert_eq!(problem, Value::Null);
    let (held, problem) = shown(halves[1] - 1, &[]);
    assert_eq!(problem, Value::Null);
    assert!(held[1] < halves[1] && held[0] > halves[0], "{held:?}");
    // whole groups move: nearly as much as before is in memory
    let (sum, before) = (held[0] + held[1], halves[0] + halves[1]);
    assert!(sum.abs_diff(before) < 64 * 100, "{sum} for {before}");

    // heads and rows do not fit either
    let (_, problem) = shown(1000, &[]);
    let problem = problem.as_str().unwrap();
    assert!(
        problem.starts_with("NUMA node 1 would have to hold ")
            && problem.contains("but 1000 can be had there: set memory.cold = \"single:0\""),
        "{problem}"
    );
    // copies are what the policy is for
    for cold in ["replicate", "interleave", "single:1"] {
        let policy = folder.file("policy.toml", &format!("[memory]\ncold = \"{cold}\"\n"));
        let (_, problem) = shown(halves[1] / 4, &["--topology", &policy]);
        assert!(problem.is_string(), "{cold}");
        let xml = with_memory(halves[1] / 4);
        let args = ["topology", "--xml", &xml, "-m", &model, "-t", "4"];
        let text = text_of(&[&args[..], &["--topology", &policy]].concat());
        assert!(text.contains("\nDoes not fit: NUMA node 1 would"), "{text}");
    }
}

#[test]
fn a_gpus_budget_is_in_the_json() {
    let folder = tiny();
    let gpus = |toml: &str| {
        let toml = folder.file("gpu.toml", toml);
        let xml = fixture("two-nodes");
        let args = ["topology", "--json", "--xml", &xml, "--topology", &toml];
        json_of(&args)["plan"]["gpus"].clone()
    };
    let entry = |bytes: u64| json!([{ "pci_address": "0000:41:00.0", "vram_budget_bytes": bytes }]);
    assert_eq!(gpus(""), json!([]));
    assert_eq!(gpus("[[gpu]]\n"), entry(24 << 30));
    assert_eq!(gpus("[[gpu]]\nvram_budget = \"2GiB\"\n"), entry(2 << 30));
}

#[test]
fn every_saved_machine_is_drawn() {
    for (name, line) in [
        (
            "one-node",
            "   └─ GPU 0000:01:00.0  NVIDIA GeForce RTX 4090  24.0 GiB",
        ),
        ("four-nodes", "├─ NUMA node 2  32.0 GiB"),
        (
            "eight-nodes",
            "  h  team 7: 2 threads on CPUs 14-15, memory on NUMA node 7",
        ),
        ("unequal-memory", "└─ NUMA node 1  24.0 GiB"),
        ("cxl", "NUMA node 2  256.0 GiB  CXL"),
        (
            "cores-without-memory",
            "  b  team 1: 4 threads on CPUs 4-7, memory on NUMA node 2",
        ),
        (
            "snc",
            "Package 0  Two clusters, one L3  L3 60.0 MiB for all nodes",
        ),
        (
            "hybrid",
            "         IntelAtom: [ 8 ][ 9 ][10 ][11 ][12 ][13 ][14 ][15 ]",
        ),
        ("cpuset", "Not for this process: memory of NUMA node 1"),
    ] {
        let text = text_of(&["topology", "--xml", &fixture(name)]);
        assert!(
            text.lines().any(|found| found == line),
            "{name}: {line}\n{text}"
        );
    }
}

#[test]
fn machines_that_are_none_are_refused() {
    let folder = tiny();
    let bad = folder.file("bad.xml", "<topology>");
    let missing = folder.name("missing.xml");
    let topology = |more: &[&str]| run(&[&["topology"], more].concat());
    assert_refused(
        &topology(&["--synthetic", "sofa:2"]),
        &["\"sofa:2\"", "write it as in"],
    );
    assert_refused(&topology(&["--xml", &bad]), &["bad.xml", "lstopo FILE.xml"]);
    assert_refused(
        &topology(&["--xml", &missing]),
        &["missing.xml", "No such file"],
    );
    assert_refused(
        &topology(&["--xml", &bad, "--synthetic", "core:2"]),
        &["cannot be used with"],
    );
    assert_refused(&topology(&["-m", &bad]), &["bad.xml"]);
    assert_refused(
        &topology(&["--synthetic", "core:2 pu:1", "-t", "3"]),
        &["-t 3", "give -t 2 or fewer"],
    );
}

#[test]
fn every_key_is_printed() {
    let default: TopologyConfig = toml::from_str(&text_of(&["--print-config"])).unwrap();
    assert_eq!(default, TopologyConfig::default());
    assert_eq!(
        text_of(&["topology", "--print-config"]),
        text_of(&["--print-config"])
    );
    for entry in std::fs::read_dir(workspace().join("configs")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            let path = path.to_str().unwrap();
            let printed = text_of(&["--print-config", "--topology", path]);
            let again: TopologyConfig = toml::from_str(&printed).unwrap();
            let file: TopologyConfig =
                toml::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
            assert_eq!(again, file, "{path}");
        }
    }
}

#[test]
fn flags_that_come_before_keys_are_printed_in_their_place() {
    let folder = tiny();
    let file = folder.file(
        "keys.toml",
        "[sparsity]\npredict = \"ahead\"\n[[gpu]]\nreplan = 5\n[[gpu]]\n",
    );
    let list = "0-3: exact, 4-29: in-layer";
    let printed = text_of(&[
        "--topology",
        &file,
        "--print-config",
        "--predictor",
        list,
        "--replan",
        "64",
    ]);
    let config: TopologyConfig = toml::from_str(&printed).unwrap();
    assert_eq!(config.sparsity.predict.to_string(), list);
    let replans: Vec<usize> = config.gpus.iter().map(|gpu| gpu.replan).collect();
    assert_eq!(replans, [64, 64]);
}

#[test]
fn unknown_keys_are_named_with_line_and_suggestion() {
    let folder = tiny();
    let typo = folder.file(
        "typo.toml",
        "name = \"x\"\n\n[memory]\nhuge_pagse = \"try\"\n",
    );
    assert_refused(
        &run(&["--topology", &typo, "--print-config"]),
        &[
            "typo.toml, line 4",
            "`huge_pagse`",
            "did you mean `huge_pages`?",
        ],
    );
}

#[test]
fn keys_that_are_given_as_flags_are_led_to_their_table() {
    for (args, hint) in [
        (
            &["--nodes", "2"][..],
            "`nodes` is a key of [host] in a topology file (--topology FILE)",
        ),
        (&["--nodes=2", "-p", "x"], "`nodes` is a key of [host]"),
        (
            &["bench", "--huge-pages", "off"],
            "`huge_pages` is a key of [memory]",
        ),
        (&["topology", "--strict"], "`strict` is a key of [memory]"),
    ] {
        let ran = run(args);
        assert_refused(&ran, &["unexpected argument", hint]);
        assert!(!ran.err.contains("--model"), "{}", ran.err);
    }
    assert_refused(&run(&["--topolgy", "x"]), &["'--topology'"]);
}

#[test]
fn nothing_can_be_simulated_without_a_topology() {
    for args in [
        &["--simulate", "-p", "x"][..],
        &["topology", "--simulate"],
        &["bench", "--simulate"],
    ] {
        assert_refused(&run(args), &["--topology"]);
    }
}

/// What docs/numa.md promises of bits, and what not.
#[test]
fn teams_change_bits_only_where_each_has_one_sum() {
    for neuron_major in [true, false] {
        let folder = Folder::with(&TinyModel {
            quant: QuantType::Q4_0,
            neuron_major,
            ..TinyModel::default()
        });
        let model = folder.name("m.gguf");
        let hash = |cold: &str, nodes: usize| {
            let text =
                format!("[memory]\ncold = \"{cold}\"\n[host]\nnodes = {nodes}\nthreads = 1\n");
            let file = folder.file("x.toml", &text);
            let args = [
                "-m", &model, "-p", "Hello", "-n", "8", "--temp", "0", "--json",
            ];
            let how = ["--sparsity", "off", "--topology", &file];
            json_of(&[&args[..], &how].concat())["logits_hash"].clone()
        };
        let (one, two) = (hash("shard", 1), hash("shard", 2));
        assert_eq!(hash("replicate", 2), two);
        assert_eq!(hash("interleave", 2), two);
        assert_eq!(hash("single:1", 2), one);
        assert_eq!(one == two, neuron_major);
    }
}

/// A configuration for a machine that nobody has.
const TOO_LARGE: &str = "[machine]\nnuma_nodes = 12\nmemory_per_node = \"900TiB\"\n[host]\nnodes = 3\nthreads = 70000\n[[gpu]]\nvram_budget = \"900GiB\"\nrequired = true\n";

#[test]
fn what_the_machine_lacks_is_listed_and_can_be_simulated() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let too_large = folder.file("too-large.toml", TOO_LARGE);
    let args = [
        "-m", &model, "-p", "Hello", "-n", "4", "--temp", "0", "--json",
    ];
    let asked = [&args[..], &["--topology", &too_large]].concat();
    let refused = run(&asked);
    assert_refused(
        &refused,
        &[
            "too-large.toml asks for what this machine lacks:\n",
            "\n  machine.numa_nodes = 12: the machine has ",
            // who runs `off` on a file as it comes may not count on the same bits
            "--simulate. Results are the same, but for rounding where",
            "\n  machine.memory_per_node = \"900TiB\": a node has ",
            "\n  gpu 0 with 900GiB: ",
            "\n  [host]: host.threads = 70000: node 0 would run 70000 threads but has ",
            "\nthe nearest that fits:\n    [host]\n    nodes = ",
            "--simulate",
        ],
    );
    // the nearest does run
    let nearest = refused
        .err
        .lines()
        .filter_map(|line| line.strip_prefix("    "));
    let nearest = nearest.collect::<Vec<&str>>().join("\n");
    let nearest = folder.file("nearest.toml", &nearest);
    let plain = json_of(&args)["logits_hash"].clone();
    let ran = json_of(&[&args[..], &["--topology", &nearest]].concat());
    assert_eq!(ran["logits_hash"], plain);
    // and so does the whole, with the teams that it asks for
    let simulated = run(&[&asked[..], &["--simulate"]].concat());
    assert_eq!(simulated.code, 0, "{}", simulated.err);
    assert!(
        simulated.err.contains("simulated, gpu 0 with 900GiB"),
        "{}",
        simulated.err
    );
    let simulated: Value = serde_json::from_str(&simulated.out).unwrap();
    assert_eq!(simulated["logits_hash"], plain);
    assert_eq!(simulated["placement"]["nodes"].as_array().unwrap().len(), 3);
}

#[test]
fn shipped_configurations_run_or_say_what_is_lacking() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = [
        "-m", &model, "-p", "Hello", "-n", "2", "--temp", "0", "--json",
    ];
    let plain = json_of(&args)["logits_hash"].clone();
    for (name, n_teams) in [
        ("cpu-only", None),
        ("laptop-6gb", None),
        ("4090-ddr5", None),
        ("2x4090", None),
        ("h100-24g", None),
        ("dual-socket", Some(2)),
        ("dual-socket-4090", Some(2)),
    ] {
        let topology = shipped(name);
        let asked = [&args[..], &["--topology", &topology]].concat();
        let ran = run(&asked);
        let is_for_gpus = std::fs::read_to_string(&topology)
            .unwrap()
            .contains("\n[[gpu]]\n");
        match ran.code {
            0 => assert!(!is_for_gpus, "{name}: there is no back end for GPUs"),
            _ => assert_refused(
                &ran,
                &[name, "asks for what this machine lacks", "--simulate"],
            ),
        }
        let ran = json_of(&[&asked[..], &["--simulate"]].concat());
        assert_eq!(ran["logits_hash"], plain, "{name}");
        let nodes = ran["placement"]["nodes"].as_array().map_or(0, Vec::len);
        let at_least = n_teams.unwrap_or(1);
        assert!(
            nodes >= at_least || ran["placement"]["nodes"].is_null(),
            "{name}"
        );
    }
}

#[test]
fn the_host_computes_for_a_gpu_that_is_not_required() {
    let folder = tiny();
    let model = folder.name("m.gguf");
    let args = [
        "-m", &model, "-p", "Hello", "-n", "2", "--temp", "0", "--json",
    ];
    let gpu = folder.file("gpu.toml", "[[gpu]]\nvram_budget = \"1GiB\"\n");
    let ran = run(&[&args[..], &["--topology", &gpu]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.err.contains("gpu 0 with 1GiB: "), "{}", ran.err);
    assert!(
        ran.err.contains("; the host computes in its place"),
        "{}",
        ran.err
    );
    // where weights lie is said whenever a topology is asked for
    let said = ["weights: node 0: ", "weights: not known"];
    assert!(
        said.iter().any(|words| ran.err.contains(words)),
        "{}",
        ran.err
    );
    let found: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(found["logits_hash"], json_of(&args)["logits_hash"]);
    let required = folder.file("required.toml", "[[gpu]]\nrequired = true\n");
    let ran = run(&[&args[..], &["--topology", &required]].concat());
    assert_refused(&ran, &["gpu 0: ", "--simulate"]);
}

/// Logits' hash of a run in which `topology` divides the model.
fn hash(folder: &Folder, model: &str, topology: &str, more: &[&str]) -> String {
    let topology = folder.file("t.toml", topology);
    let args = [
        "-m",
        model,
        "-p",
        "The capital of France is",
        "-n",
        "6",
        "--temp",
        "0",
        "--json",
    ];
    let json = json_of(&[&args[..], &["--topology", &topology], more].concat());
    assert_eq!(json["placement"]["problem"], Value::Null);
    json["logits_hash"].as_str().unwrap().to_owned()
}

/// Invariant 1 (b) for every policy: where cold neurons lie, and who computes them, changes no bit.
#[test]
fn policies_give_the_same_bits() {
    let folder = tiny();
    let demo = demo_model();
    for model in [demo.to_str().unwrap(), &folder.name("m.gguf")] {
        for sparsity in ["exact", "off"] {
            let more = ["--sparsity", sparsity];
            let one = hash(&folder, model, "[host]\nnodes = 1\n", &more);
            for (nodes, policies) in [
                (
                    2,
                    &["shard", "replicate", "interleave", "single:0", "single:1"][..],
                ),
                (
                    4,
                    &["shard", "replicate", "interleave", "single:0", "single:3"][..],
                ),
                (3, &["replicate", "single:1"][..]),
            ] {
                for policy in policies {
                    let topology = format!(
                        "[memory]\ncold = \"{policy}\"\nstrict = true\n[host]\nnodes = {nodes}\nthreads = 1\n"
                    );
                    let found = hash(&folder, model, &topology, &more);
                    assert_eq!(found, one, "{model} {sparsity} {nodes} {policy}");
                }
            }
        }
    }
}

/// Copies beside a node's own neurons, and beside its part of the sketch, are not in the way in `predicted` either, nor
/// those of a plain `ffn_down`, whose columns are divided.
#[test]
fn copies_of_every_kind_change_no_bit() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    });
    let demo = demo_model();
    // sketches of signs are part of the gate; those of low rank, which F16 has, are matrices of their own
    let low_rank = folder.name("synth.gguf");
    let shape = "--layers 2 --embd 128 --ff 512 --heads 4 --kv-heads 4 --vocab 324 --type F16";
    let shape: Vec<&str> = shape.split(' ').collect();
    text_of(&[&["synth", "-o", &low_rank][..], &shape].concat());
    for (model, sparsity) in [
        (demo.to_str().unwrap(), "predicted"),
        (&low_rank, "predicted"),
        (&folder.name("m.gguf"), "off"),
    ] {
        let bits = |policy: &str| {
            let topology =
                format!("[memory]\ncold = \"{policy}\"\n[host]\nnodes = 2\nthreads = 1\n");
            hash(&folder, model, &topology, &["--sparsity", sparsity])
        };
        assert_eq!(bits("replicate"), bits("shard"), "{model} {sparsity}");
    }
}

/// A plain `ffn_down` in `off` is summed node by node; on one node alone the sum is that of one team.
#[test]
fn a_plain_down_projection_on_a_single_node_gives_the_bits_of_one_team() {
    let folder = Folder::with(&TinyModel {
        neuron_major: false,
        ..TinyModel::default()
    });
    let model = folder.name("m.gguf");
    let more = ["--sparsity", "off"];
    let one = hash(&folder, &model, "[host]\nnodes = 1\n", &more);
    for policy in ["single:0", "single:1"] {
        let topology = format!("[memory]\ncold = \"{policy}\"\n[host]\nnodes = 2\n");
        assert_eq!(hash(&folder, &model, &topology, &more), one, "{policy}");
    }
}

/// What NVIDIA's driver says is shown and counted, here with a library in its place.
#[cfg(target_os = "linux")]
#[test]
fn the_gpu_driver_is_asked_where_there_is_one() {
    let folder = tiny();
    let source = workspace().join("tests/fixtures/fake-libcuda.c");
    let compiled = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-o", &folder.name("libcuda.so")])
        .arg(source)
        .status();
    if !compiled.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no C compiler");
        return;
    }
    let run = |args: &[&str]| {
        let mut command = common::program();
        let output = (command.env("LD_LIBRARY_PATH", folder.0.path()).args(args))
            .output()
            .unwrap();
        Ran {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    };
    let drawn = run(&["topology", "--json"]);
    assert_eq!(drawn.code, 0, "{}", drawn.err);
    let json: Value = serde_json::from_str(&drawn.out).unwrap();
    let gpu = |address: &str, name: &str, gib: u64, minor: u32| {
        json!({
            "pci_address": address,
            "pci_device": 0,
            "name": name,
            "memory_bytes": gib << 30,
            "compute_capability": [8, minor],
            "numa": null,
        })
    };
    let gpus = json["machine"]["gpus"].as_array().unwrap();
    let fakes: Vec<&Value> = gpus
        .iter()
        .filter(|gpu| gpu["pci_address"].as_str().unwrap().starts_with("fedc:"))
        .collect();
    assert_eq!(
        fakes,
        [
            &gpu("fedc:0a:00.0", "Fake GPU A", 24, 9),
            &gpu("fedc:ba:00.0", "Fake GPU B", 8, 6),
        ]
    );
    let text = run(&["topology"]).out;
    assert!(
        text.contains("GPU fedc:0a:00.0  Fake GPU A  24.0 GiB\n"),
        "{text}"
    );
    let config = "[[gpu]]\npci_address = \"FEDC:BA:00.0\"\nrequired = true\n";
    let config = folder.file("gpu.toml", config);
    let ran = run(&["topology", "--topology", &config]);
    assert_eq!(ran.code, 0, "it is there: {}", ran.err);
    let config =
        "[[gpu]]\npci_address = \"FEDC:BA:00.0\"\nvram_budget = \"16GiB\"\nrequired = true\n";
    let config = folder.file("gpu.toml", config);
    assert_refused(
        &run(&["topology", "--topology", &config]),
        &["gpu 0", "Fake GPU B", "8.0 GiB of memory"],
    );
}

/// A library in the driver's place that is none.
#[cfg(target_os = "linux")]
#[test]
fn a_gpu_driver_that_lacks_functions_does_no_harm() {
    let folder = tiny();
    let source = folder.file("empty.c", "int nothing;\n");
    let compiled = std::process::Command::new("cc")
        .args([
            "-shared",
            "-fPIC",
            "-o",
            &folder.name("libcuda.so"),
            &source,
        ])
        .status();
    if !compiled.is_ok_and(|status| status.success()) {
        eprintln!("skipped: no C compiler");
        return;
    }
    let mut command = common::program();
    let output = command
        .env("LD_LIBRARY_PATH", folder.0.path())
        .args(["topology", "--json"])
        .output()
        .unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{err}");
    assert!(
        err.contains("NVIDIA's driver is too old to tell its GPUs"),
        "{err}"
    );
    assert!(!err.contains("panicked"), "{err}");
}

/// Ends a process that a test has started.
#[cfg(target_os = "linux")]
struct Ended(std::process::Child);

#[cfg(target_os = "linux")]
impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A busy process that is bound to a planned CPU, such as another pi-runtime, is named.
#[cfg(target_os = "linux")]
#[test]
fn a_process_that_is_bound_to_the_same_cpu_is_named() {
    let cpu = Machine::discover().unwrap().nodes[0].cores[0].cpus[0];
    if !Path::new("/usr/bin/taskset").exists() {
        eprintln!("skipped: no taskset");
        return;
    }
    let mut command = std::process::Command::new("/usr/bin/taskset");
    // says that it runs, on that CPU, and then goes on and on
    command.args([
        "-c",
        &cpu.to_string(),
        "sh",
        "-c",
        "echo; while :; do :; done",
    ]);
    let mut busy = Ended(
        command
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap(),
    );
    let mut line = [0u8];
    std::io::Read::read_exact(&mut busy.0.stdout.take().unwrap(), &mut line).unwrap();
    let json = json_of(&["topology", "--json"]);
    let named = format!("(process {}) has bound threads to it too", busy.0.id());
    let mut conflicts = json["conflicts"].as_array().unwrap().iter();
    assert!(
        conflicts.any(|conflict| conflict["problem"].as_str().unwrap().contains(&named)),
        "{json}"
    );
}

/// A process that is started with one CPU of several says so where more are asked for.
#[cfg(target_os = "linux")]
#[test]
fn an_affinity_mask_is_named_as_the_cause() {
    let cpus: Vec<usize> = (Machine::discover().unwrap().nodes.iter())
        .flat_map(|node| node.cores.iter().flat_map(|core| core.cpus.clone()))
        .collect();
    if cpus.len() < 2 || !Path::new("/usr/bin/taskset").exists() {
        eprintln!("skipped: one CPU, or no taskset");
        return;
    }
    let program = assert_cmd::cargo::cargo_bin("pi-runtime");
    let limited = |args: &[&str]| {
        let output = std::process::Command::new("/usr/bin/taskset")
            .args(["-c", &cpus[0].to_string()])
            .arg(&program)
            .args(args)
            .output()
            .unwrap();
        Ran {
            code: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    };
    let kept_away = |text: &str| {
        text.contains("the affinity mask that this process was started with (taskset, numactl, a batch system) leaves them out")
            || text.contains("isolated by the kernel")
    };
    let drawn = limited(&["topology"]);
    assert!(drawn.code == 0 && kept_away(&drawn.out), "{}", drawn.out);
    let json: Value = serde_json::from_str(&limited(&["topology", "--json"]).out).unwrap();
    assert_eq!(json["limits"]["affinity_cpus"], json!([cpus[0]]));
    assert_eq!(
        json["plan"]["nodes"],
        json!([{ "numa": json["machine"]["nodes"][0]["os_index"], "cpus": [cpus[0]] }])
    );
    let folder = tiny();
    let other = folder.file(
        "other.toml",
        &format!("[[host.node]]\ncpus = [{}]\n", cpus[1]),
    );
    let refused = limited(&[
        "-m",
        &folder.name("m.gguf"),
        "-p",
        "x",
        "--topology",
        &other,
    ]);
    assert_refused(
        &refused,
        &["host.node 0 wants CPU", "start it with taskset -c"],
    );
    // and a run that goes on with what there is says it in the log, once
    let model = folder.name("m.gguf");
    let ran = limited(&["-m", &model, "-p", "x", "-n", "1"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let said = ran.err.lines().filter(|line| kept_away(line));
    let said: Vec<&str> = said.collect();
    assert_eq!(said.len(), 1, "{}", ran.err);
    assert!(
        said[0].contains(" WARN ") && said[0].contains("start it with taskset -c"),
        "{}",
        ran.err
    );
    let quiet = limited(&["-m", &model, "-p", "x", "-n", "1", "--log-level", "error"]);
    assert!(!kept_away(&quiet.err), "{}", quiet.err);
}
