//! Findings of made-up machines.

use std::path::PathBuf;

use pi_kernels::Tier;
use pi_topology::{
    Conflict, ConflictSubject, Limit, Machine, NvidiaDriver, NvidiaGpu, Plan, SystemState,
    TopologyConfig, TopologyError,
};

use super::facts::{Facts, ModelFacts, PlanFacts};
use super::findings::{Finding, State, findings, size};
use super::model_needs::ModelNeeds;
use super::report;

const GIB: u64 = 1 << 30;

/// A machine that hwloc makes of a description, with nothing in the way and no model.
fn facts(description: &str) -> Facts {
    let machine = Machine::synthetic(description).unwrap();
    let plan = Plan::new(&TopologyConfig::default(), &machine, None).map(|plan| PlanFacts {
        n_threads: plan.n_threads(),
        n_nodes: plan.nodes.len(),
        pinning: Ok(()),
        memory_binding: Ok(None),
    });
    Facts {
        tiers: vec![Tier::Scalar, Tier::Avx2],
        has_faster_tiers: true,
        system: SystemState {
            n_cpus_online: Some(machine.n_cpus()),
            memory_bytes: Some(64 * GIB),
            available_bytes: Some(60 * GIB),
            address_space_bytes: Limit::Unlimited,
            memlock_bytes: Limit::Unlimited,
            transparent_huge_pages: Some("madvise".to_owned()),
            ..SystemState::default()
        },
        machine: Ok(machine),
        plan: Some(plan),
        conflicts: Vec::new(),
        model: ModelFacts::None("no model".to_owned()),
        bandwidth: None,
    }
}

fn one_node() -> Facts {
    facts("Package:1 [NUMANode(memory=64GiB)] Core:8 PU:2")
}

fn model(weights_bytes: u64, cache_bytes: u64) -> ModelFacts {
    ModelFacts::Usable(ModelNeeds {
        path: "m.gguf".to_owned(),
        name: "llama 7B Q4_0".to_owned(),
        sparsity: "exact",
        hint: None,
        weights_bytes,
        cache_bytes,
        full_node: None,
        n_ctx: 4096,
        token_bytes: weights_bytes,
    })
}

/// The findings about a subject.
fn about(facts: &Facts, subject: &str) -> Vec<Finding> {
    let mut found = findings(facts);
    for finding in &found {
        assert!(
            finding.state != State::Problem || finding.cure.is_some(),
            "a problem has a cure: {finding:?}"
        );
        assert!(
            finding.state == State::Problem || !finding.prevents_running,
            "what prevents running is a problem: {finding:?}"
        );
    }
    found.retain(|finding| finding.subject == subject);
    found
}

/// The finding about a subject that has one.
#[track_caller]
fn the(facts: &Facts, subject: &str) -> Finding {
    let mut found = about(facts, subject);
    assert_eq!(found.len(), 1, "{subject}: {found:?}");
    found.remove(0)
}

#[track_caller]
fn assert_cured(finding: &Finding, state: State, words: &str, cure: &str) {
    assert_eq!(finding.state, state, "{finding:?}");
    assert!(finding.text.contains(words), "{finding:?}");
    assert!(
        finding
            .cure
            .as_deref()
            .is_some_and(|text| text.contains(cure)),
        "{finding:?}"
    );
}

#[test]
fn a_good_machine_has_nothing_to_mend() {
    let mut facts = one_node();
    facts.model = model(4 * GIB, GIB);
    let found = findings(&facts);
    for finding in &found {
        assert_eq!(
            (finding.state, &finding.cure),
            (State::Ok, &None),
            "{finding:?}"
        );
    }
    assert!(report::can_run(&found));
    let text = report::text(&found);
    let n_lines = found.len() + 2;
    assert_eq!(text.lines().count(), n_lines, "{text}");
    assert!(text.ends_with(&format!(
        "can run here: {} ok, 0 to note, 0 to mend\n",
        found.len()
    )));
}

#[test]
fn a_model_that_fits_the_machine_may_not_fit_a_node() {
    let mut facts = one_node();
    facts.model = model(4 * GIB, GIB);
    if let ModelFacts::Usable(needs) = &mut facts.model {
        needs.full_node = Some("NUMA node 1 would have to hold 5".to_owned());
    }
    let words = "NUMA node 1 would have to hold 5";
    assert_cured(
        &the(&facts, "model"),
        State::Problem,
        words,
        "pi-runtime topology -m",
    );
    assert!(!report::can_run(&findings(&facts)));
}

#[test]
fn huge_pages_that_are_off_cost_speed() {
    let mut facts = one_node();
    facts.system.transparent_huge_pages = Some("never".to_owned());
    let cure = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled";
    assert_cured(&the(&facts, "huge pages"), State::Problem, "off", cure);
    assert!(report::can_run(&findings(&facts)));
    facts.system.container = Some("docker");
    assert_cured(
        &the(&facts, "huge pages"),
        State::Problem,
        "off",
        "on the host",
    );
    facts.system.transparent_huge_pages = None;
    assert_eq!(the(&facts, "huge pages").state, State::Note);
    facts.system.transparent_huge_pages = Some("always".to_owned());
    facts.system.reserved_huge_bytes = 2 * GIB;
    let found = about(&facts, "huge pages");
    assert_eq!(found[0].state, State::Ok);
    assert_cured(
        &found[1],
        State::Note,
        "2.0 GiB",
        "sudo sysctl vm.nr_hugepages=0",
    );
}

fn a_gpu() -> NvidiaGpu {
    NvidiaGpu {
        pci_address: "0000:41:00.0".to_owned(),
        pci_device: 0x2330,
        numa: Some(1),
    }
}

#[test]
fn little_memory_may_be_locked() {
    let mut facts = one_node();
    facts.system.memlock_bytes = Limit::Bytes(64 << 10);
    let finding = the(&facts, "locked memory");
    assert_eq!(finding.state, State::Ok);
    assert!(finding.text.ends_with("nothing is locked without a GPU"));
    facts.system.nvidia_gpus = vec![a_gpu()];
    let finding = the(&facts, "locked memory");
    assert_cured(&finding, State::Note, "64.0 KiB", "ulimit -l unlimited");
    facts.system.memlock_bytes = Limit::Bytes(8 << 20);
    assert_eq!(the(&facts, "locked memory").state, State::Ok);
}

#[test]
fn a_control_group_stops_threads_that_are_too_many() {
    let mut facts = one_node();
    facts.system.cpu_limit = Some(1.0);
    let finding = the(&facts, "processor time");
    assert_cured(&finding, State::Problem, "8 threads", "pi-runtime -t 1;");
    facts.system.cpu_limit = Some(2.5);
    let finding = the(&facts, "processor time");
    assert_cured(&finding, State::Problem, "2.5 CPUs", "pi-runtime -t 2;");
    facts.system.cpu_limit = Some(8.0);
    assert_eq!(the(&facts, "processor time").state, State::Ok);
    // -t 1 cannot be had with a team on each of four nodes
    let mut facts = self::facts("Package:4 [NUMANode(memory=16GiB)] Core:4 PU:1");
    facts.system.cpu_limit = Some(1.0);
    let finding = the(&facts, "processor time");
    assert_cured(&finding, State::Problem, "16 threads", "--cpus 16");
    assert!(!finding.cure.unwrap().contains("-t"));
}

#[test]
fn four_nodes_are_named_one_by_one() {
    let mut facts = facts("Package:4 [NUMANode(memory=16GiB)] Core:4 PU:2");
    let nodes = about(&facts, "NUMA node");
    assert_eq!(nodes.len(), 4);
    assert_eq!(
        nodes[3].text,
        "3: 4 cores, 8 logical CPUs, 16.0 GiB of memory"
    );
    assert!(
        the(&facts, "cores")
            .text
            .starts_with("4 NUMA nodes, 16 cores")
    );
    assert!(
        the(&facts, "threads")
            .text
            .starts_with("16 threads in 4 teams")
    );
    assert_eq!(the(&facts, "NUMA memory").state, State::Ok);
    facts.system.numa_balancing = Some(true);
    let found = about(&facts, "NUMA memory");
    assert_eq!(found[1].state, State::Ok, "bound memory is left alone");
    assert!(found[1].text.contains("balances") && found[1].cure.is_none());
    if let Some(Ok(plan)) = &mut facts.plan {
        plan.memory_binding = Ok(Some("Operation not permitted".to_owned()));
    }
    let found = about(&facts, "NUMA memory");
    assert_cured(
        &found[1],
        State::Note,
        "balances",
        "sudo sysctl kernel.numa_balancing=0",
    );
    assert_cured(
        &found[0],
        State::Problem,
        "not permitted",
        "--cap-add SYS_NICE",
    );
    assert!(about(&one_node(), "NUMA memory").is_empty());
}

#[test]
fn more_nodes_than_a_layer_has_groups_need_a_topology() {
    let facts = facts("Package:17 [NUMANode(memory=16GiB)] Core:1 PU:1");
    let finding = the(&facts, "threads");
    assert_cured(&finding, State::Problem, "17 nodes", "--topology FILE");
    assert!(finding.prevents_running && !report::can_run(&findings(&facts)));
}

#[test]
fn without_cpus_or_bindings_nothing_runs() {
    let mut facts = one_node();
    (facts.machine, facts.plan) = (Err(TopologyError::NoCpus), None);
    let finding = the(&facts, "cores");
    assert_cured(&finding, State::Problem, "no CPU", "taskset");
    assert!(finding.prevents_running);
    let mut facts = one_node();
    if let Some(Ok(plan)) = &mut facts.plan {
        plan.pinning = Err(TopologyError::Pin {
            cpu: 3,
            problem: "Operation not permitted".to_owned(),
        });
    }
    let finding = the(&facts, "threads");
    assert_cured(&finding, State::Problem, "CPU 3", "seccomp=unconfined");
    assert!(finding.prevents_running);
}

#[test]
fn a_gpu_is_named_with_what_keeps_it_from_being_used() {
    let mut facts = one_node();
    assert_eq!(the(&facts, "GPU").state, State::Ok);
    facts.system.nvidia_gpus = vec![a_gpu()];
    let finding = the(&facts, "GPU");
    assert_cured(
        &finding,
        State::Note,
        "driver is not loaded",
        "nvidia-driver",
    );
    assert!(
        finding
            .text
            .contains("0000:41:00.0 (10de:2330) at NUMA node 1")
    );
    facts.system.nvidia_driver = NvidiaDriver {
        version: Some("550.1".to_owned()),
        libcuda: None,
    };
    assert_cured(
        &the(&facts, "GPU"),
        State::Note,
        "no libcuda.so.1",
        "libcuda1",
    );
    facts.system.nvidia_driver.libcuda = Some(PathBuf::from("/usr/lib/libcuda.so.1"));
    let finding = the(&facts, "GPU");
    assert_eq!((finding.state, &finding.cure), (State::Ok, &None));
    assert!(finding.text.ends_with("has [[gpu]]"), "{finding:?}");
}

#[test]
fn a_model_is_held_against_the_memory() {
    let mut facts = one_node();
    facts.system.available_bytes = Some(6 * GIB);
    facts.model = model(4 * GIB, GIB);
    assert_eq!(the(&facts, "model").state, State::Ok);
    facts.model = model(4 * GIB, 4 * GIB);
    let finding = the(&facts, "model");
    assert_cured(
        &finding,
        State::Problem,
        "once the context is full",
        "pi-runtime -c 2048",
    );
    assert!(!finding.prevents_running);
    facts.model = model(7 * GIB, GIB);
    let finding = the(&facts, "model");
    assert_cured(
        &finding,
        State::Problem,
        "more than the 6.0 GiB",
        "close what is not needed",
    );
    assert!(finding.prevents_running);
    facts.system.memory_limit_bytes = Some(6 * GIB);
    assert_cured(
        &the(&facts, "model"),
        State::Problem,
        "more than",
        "docker run --memory",
    );
    facts.model = ModelFacts::Unusable("m.gguf: broken".to_owned());
    assert!(the(&facts, "model").prevents_running);
    facts.model = ModelFacts::None("no model: give one with -m FILE".to_owned());
    assert_eq!(the(&facts, "model").state, State::Note);
    assert!(report::can_run(&findings(&facts)));
}

#[test]
fn promised_memory_and_address_space_may_not_do() {
    let mut facts = one_node();
    facts.model = model(4 * GIB, GIB);
    facts.system.promisable_bytes = Some(3 * GIB);
    let finding = the(&facts, "overcommit");
    assert_cured(
        &finding,
        State::Problem,
        "3.0 GiB",
        "vm.overcommit_memory=0",
    );
    assert!(finding.prevents_running);
    facts.system.promisable_bytes = Some(6 * GIB);
    assert_eq!(the(&facts, "overcommit").state, State::Note);
    facts.system.address_space_bytes = Limit::Bytes(8 * GIB);
    let finding = the(&facts, "address space");
    assert_cured(&finding, State::Problem, "8.0 GiB", "ulimit -v unlimited");
    facts.system.address_space_bytes = Limit::Bytes(32 * GIB);
    assert_eq!(the(&facts, "address space").state, State::Note);
}

#[test]
fn slow_processors_and_busy_ones_are_told() {
    let mut facts = one_node();
    facts.tiers = vec![Tier::Scalar];
    assert_cured(
        &the(&facts, "processor"),
        State::Problem,
        "no AVX2",
        "-cpu host",
    );
    facts.has_faster_tiers = false;
    assert_eq!(the(&facts, "processor").state, State::Note);
    facts.system.load = Some(2.0);
    assert_cured(&the(&facts, "other load"), State::Note, "2.00", "top");
    facts.system.governors = [("powersave".to_owned(), 16)].into();
    let cure = "sudo cpupower frequency-set -g performance";
    assert_cured(
        &the(&facts, "frequency"),
        State::Note,
        "powersave on 16",
        cure,
    );
    facts.system.governors = [("performance".to_owned(), 16)].into();
    assert_eq!(the(&facts, "frequency").state, State::Ok);
    facts.system.n_cpus_online = Some(32);
    let finding = the(&facts, "cores");
    assert_eq!(finding.state, State::Note);
    assert!(finding.text.contains("keeps 16 more away"), "{finding:?}");
}

#[test]
fn a_measured_bandwidth_bounds_the_speed() {
    let mut facts = one_node();
    assert!(about(&facts, "memory bandwidth").is_empty());
    facts.bandwidth = Some(Ok(40e9));
    assert_eq!(
        the(&facts, "memory bandwidth").text,
        "40.0 GB/s read by 8 threads"
    );
    facts.model = model(4_000_000_000, GIB);
    let text = the(&facts, "memory bandwidth").text;
    assert!(text.contains("at most 10.0 tokens a second"), "{text}");
}

#[test]
fn json_has_the_same_findings() {
    let mut facts = one_node();
    facts.system.memlock_bytes = Limit::Bytes(64 << 10);
    facts.system.nvidia_gpus = vec![a_gpu()];
    let found = findings(&facts);
    let json: serde_json::Value = serde_json::from_str(&report::json(&found).unwrap()).unwrap();
    assert_eq!(json["can_run"], true);
    assert_eq!(json["version"], env!("CARGO_PKG_VERSION"));
    let list = json["findings"].as_array().unwrap();
    assert_eq!(list.len(), found.len());
    let locked = list
        .iter()
        .find(|f| f["subject"] == "locked memory")
        .unwrap();
    assert_eq!(
        (&locked["state"], &locked["prevents_running"]),
        (&"note".into(), &false.into())
    );
    assert_eq!(locked["cure"], "ulimit -l unlimited");
}

#[test]
fn sizes_have_readable_units() {
    assert_eq!(size(0), "0.0 KiB");
    assert_eq!(size(64 << 10), "64.0 KiB");
    assert_eq!(size(3 << 20), "3.0 MiB");
    assert_eq!(size(GIB), "1.0 GiB");
}

#[test]
fn who_keeps_cpus_and_memory_away_is_told_with_the_cure() {
    let mut facts = facts("Package:2 [NUMANode(memory=32GiB)] Core:8 PU:1");
    let conflict = |subject, problem: &str, cure: &str| Conflict {
        subject,
        problem: problem.to_owned(),
        cure: cure.to_owned(),
    };
    facts.conflicts = vec![
        conflict(ConflictSubject::Cpus, "CPU 3: taskset", "taskset -c 0-3"),
        conflict(ConflictSubject::Time, "too little time", "more of it"),
        conflict(
            ConflictSubject::Memory,
            "NUMA node 1: a cpuset",
            "--cpuset-mems 0-1",
        ),
    ];
    let found = findings(&facts);
    let find = |subject: &str, text: &str| {
        let mut all = found.iter();
        all.find(|f| f.subject == subject && f.text == text)
            .cloned()
    };
    let cpus = find("cores", "CPU 3: taskset").unwrap();
    assert_cured(&cpus, State::Note, "CPU 3", "taskset -c 0-3");
    let memory = find("NUMA memory", "NUMA node 1: a cpuset").unwrap();
    assert_cured(&memory, State::Note, "NUMA node 1", "--cpuset-mems 0-1");
    // the quota has a finding of its own
    assert!(
        found
            .iter()
            .all(|finding| finding.text != "too little time")
    );
}
