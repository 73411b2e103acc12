//! `pi-runtime numa-bench`: what it prints and writes, and what it refuses.

mod common;

use common::running::{Folder, Ran, run, tiny};
use pi_topology::{ColdPolicy, HugePages, Machine, Plan, SystemState, TopologyConfig};

fn bench(folder: &Folder, more: &[&str]) -> Ran {
    let (model, prefix) = (folder.name("m.gguf"), folder.name("out"));
    let args = ["numa-bench", "-m", &model, "-o", &prefix, "-n", "8"];
    // what is asked for comes in place of these
    let own = args[1..].chunks(2).filter(|pair| !more.contains(&pair[0]));
    let own: Vec<&str> = own.flatten().copied().collect();
    run(&[&args[..1], &own, more].concat())
}

fn read(folder: &Folder, name: &str) -> String {
    std::fs::read_to_string(folder.path(name)).unwrap()
}

#[test]
fn every_setting_is_measured_in_every_round() {
    let folder = tiny();
    let ran = bench(&folder, &["-r", "2"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let table: Vec<&str> = ran.out.lines().collect();
    let settings = table
        .iter()
        .position(|line| line.starts_with("medians of 2 rounds"));
    let n_settings = settings.unwrap() - 1;
    assert!(n_settings >= 2, "{}", ran.out);
    assert_eq!(ran.out.matches("  fastest\n").count(), 1, "{}", ran.out);

    let csv = read(&folder, "out.csv");
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(lines.len(), 1 + 2 * n_settings, "{csv}");
    for line in &lines[1..] {
        assert_eq!(line.len(), lines[0].len(), "{csv}");
        let tokens_per_s: f64 = line[5].parse().unwrap();
        assert!(tokens_per_s > 0.0, "{csv}");
        let node0_gb_per_s: f64 = line[8].parse().unwrap();
        assert!(node0_gb_per_s > 0.0, "{csv}");
    }
    let svg = read(&folder, "out.svg");
    assert!(svg.starts_with("<svg"));
    assert_eq!(svg.matches("<circle").count(), 2 * n_settings);

    let machine = Machine::discover().unwrap();
    let is_numa = machine.numas().len() > 1;
    let is_virtual = SystemState::read().is_virtual_machine;
    let is_said = ran.out.contains("not measured on real NUMA hardware");
    assert_eq!(is_said, !is_numa || is_virtual, "{}", ran.out);
    let is_predicted = ran.out.contains("PREDICTED, not measured");
    assert_eq!(
        is_predicted,
        !is_numa && machine.n_cores() > 1,
        "{}",
        ran.out
    );
    // the lines that won are a topology, and one for this machine
    let (_, rest) = ran.out.split_once("to use it (").unwrap();
    let toml = rest.split("\n\n").nth(1).unwrap();
    let config: TopologyConfig = toml::from_str(toml).unwrap();
    Plan::new(&config, &machine, None).unwrap();
}

#[test]
fn what_is_asked_for_is_measured() {
    let folder = tiny();
    let two = folder.file("two.toml", "[host]\nnodes = 2\nthreads = 1\n");
    let asked = [
        "-r",
        "1",
        "--cold",
        "single:1,replicate",
        "--huge-pages",
        "off",
        "--topology",
        &two,
    ];
    let ran = bench(&folder, &asked);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let csv = read(&folder, "out.csv");
    let settings: Vec<String> = (csv.lines().skip(1))
        .map(|line| line.split(',').take(5).collect::<Vec<&str>>().join(","))
        .collect();
    // half of the two threads would be one for two teams
    assert_eq!(settings, ["1,single:1,2,2,off", "1,replicate,2,2,off"]);
    assert!(
        ran.out.contains("one round tells nothing of noise"),
        "{}",
        ran.out
    );
    let (_, rest) = ran.out.split_once("to use it (").unwrap();
    let config: TopologyConfig = toml::from_str(rest.split("\n\n").nth(1).unwrap()).unwrap();
    // nothing is known of noise, and this is nearer to the default, though named last
    assert_eq!(config.memory.cold, ColdPolicy::Replicate);
    assert_eq!(config.memory.huge_pages, HugePages::Off);
    // the same teams as the file's, without the file
    let machine = Machine::discover().unwrap();
    let plan = Plan::new(&config, &machine, None).unwrap();
    assert_eq!(plan.team_sizes(), [1, 1]);
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let folder = tiny();
    let listed = folder.file("listed.toml", "[[host.node]]\ncpus = [0]\n");
    for (args, words) in [
        (&["--cold", "everywhere"][..], "\"replicate\""),
        (&["--cold", "single:7"], "single:7"),
        (&["--huge-pages", "large"], "large"),
        (&["--teams", "17"], "17"),
        (&["--teams", "0"], "0"),
        (&["--teams", "1", "--topology", &listed], "--teams"),
        (&["-t", "9999"], "-t 9999"),
        (&["-r", "0"], "0"),
        (&["--remote-speed", "1.5"], "at most 1"),
        (&["--remote-speed", "NaN"], "at most 1"),
        (&["-o", "/no/such/folder/x"], "/no/such/folder/x"),
        (&["-n", "5000"], "5001"),
    ] {
        let ran = bench(&folder, args);
        assert_eq!(
            (ran.code, ran.out.as_str()),
            (2, ""),
            "{args:?}: {}",
            ran.err
        );
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
    }
    let files = std::fs::read_dir(folder.0.path()).unwrap();
    let left: Vec<String> = files
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.contains("out"))
        .collect();
    assert_eq!(left, [""; 0], "nothing is left behind");
}
