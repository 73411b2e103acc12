//! `pi-runtime topology measure`: figures of this machine, kept for `plan`.

mod common;

use std::path::{Path, PathBuf};

use common::running::{Folder, Ran, run, tiny};
use common::tiny_model::TinyModel;
use pi_kernels::QuantType;
use pi_runtime::machine_profile::fingerprint;
use pi_runtime::session::TopologyFile;
use pi_topology::Machine;
use serde_json::Value;

/// Runs the program with `cache` as the user's folder for what can be made again.
fn run_caching(cache: &Path, args: &[&str]) -> Ran {
    let output = common::program()
        .env("XDG_CACHE_HOME", cache)
        .args(args)
        .output()
        .unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn json(ran: &Ran) -> Value {
    assert_eq!(ran.code, 0, "{}", ran.err);
    serde_json::from_str(&ran.out).unwrap()
}

fn kept(cache: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(cache.join("pi-runtime")) else {
        return vec![];
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

fn plan(cache: &Path, folder: &Folder, more: &[&str]) -> Ran {
    let model = folder.name("m.gguf");
    let args = ["plan", "-m", &model, "-o", "json", "--sparsity", "exact"];
    run_caching(cache, &[&args[..], more].concat())
}

/// Every figure is one that a machine can have, what is kept is what was printed, and `plan` takes it where the threads
/// are the same.
#[test]
fn what_was_measured_is_kept_and_planned_with() {
    let folder = tiny();
    let cache = folder.path("cache");
    assert_eq!(
        json(&plan(&cache, &folder, &[]))["bandwidth_measured"],
        Value::Null
    );
    let measured = json(&run_caching(&cache, &["topology", "measure", "--json"]));
    let speed = |value: &Value| {
        let bytes_per_s = value["bytes_per_s"].as_f64().unwrap();
        assert!((1e6..1e14).contains(&bytes_per_s), "{value}");
        bytes_per_s
    };
    let threads: Vec<u64> = (measured["threads"].as_array().unwrap().iter())
        .map(|n| n.as_u64().unwrap())
        .collect();
    let memory = &measured["memory"];
    let teams = memory["teams"].as_array().unwrap();
    assert_eq!(teams.len(), threads.len());
    for (team, n_threads) in teams.iter().zip(&threads) {
        let by_threads = team["by_threads"].as_array().unwrap();
        assert_eq!(by_threads[0]["n_threads"], 1);
        assert_eq!(by_threads.last().unwrap()["n_threads"], *n_threads);
        by_threads
            .iter()
            .for_each(|value| assert!(speed(value) > 0.0));
        let rows = team["by_row_bytes"].as_array().unwrap();
        assert!(rows.len() >= 4);
        rows.iter().for_each(|value| assert!(speed(value) > 0.0));
    }
    let across = memory["across"].as_array().unwrap();
    across.iter().for_each(|value| assert!(speed(value) > 0.0));
    for latency in [&measured["fork_join"][0], &measured["hops"][0]["time"]] {
        if threads[0] > 1 {
            let median = latency
                .get("median_ns")
                .or(latency["time"].get("median_ns"));
            assert!(median.unwrap().as_u64().unwrap() > 0, "{latency}");
        }
    }
    assert!(measured["idle_cpu_percent"].as_f64().unwrap() >= 0.0);

    let files = kept(&cache);
    assert_eq!(files.len(), 1);
    let name = format!("machine-{}.json", measured["fingerprint"].as_str().unwrap());
    assert!(files[0].ends_with(&name), "{files:?}");
    let text = std::fs::read_to_string(&files[0]).unwrap();
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), measured);

    let planned = json(&plan(&cache, &folder, &[]));
    assert_eq!(planned["bandwidth_measured"], measured["measured"]);
    let bandwidth = planned["bandwidth_gb_per_s"].as_f64().unwrap();
    let kept = memory["together_bytes_per_s"].as_f64().unwrap() / 1e9;
    // a number that is written and read again may differ in its last bit
    assert!(
        (bandwidth / kept - 1.0).abs() < 1e-12,
        "{bandwidth}, not {kept}"
    );
    // of other threads nothing was measured
    let two = folder.file("two.toml", "[host]\nnodes = 2\nthreads = 1\n");
    let planned = json(&plan(&cache, &folder, &["--topology", &two]));
    assert_eq!(planned["bandwidth_measured"], Value::Null);

    // a file that was changed is named and not used
    std::fs::write(&files[0], &text[..text.len() / 2]).unwrap();
    let ran = plan(&cache, &folder, &[]);
    assert!(
        ran.err.contains(&name) && ran.err.contains("topology measure"),
        "{}",
        ran.err
    );
    assert_eq!(json(&ran)["bandwidth_measured"], Value::Null);
}

/// Changes what was measured of two teams to 30 and 10 GB/s.
fn make_unequal(path: &Path) {
    let mut profile: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    for (team, gb_per_s) in [(0, 30.0), (1, 10.0)] {
        let speed = &mut profile["memory"]["teams"][team]["by_threads"][0];
        assert_eq!(speed["n_threads"], 1);
        speed["bytes_per_s"] = (gb_per_s * 1e9).into();
    }
    std::fs::write(path, profile.to_string()).unwrap();
}

/// Of two nodes the one that reads three times as much gets three times as much, and no bit of a result changes. A plain
/// `ffn_down` read whole keeps its neurons by threads, as its bits depend on them.
#[test]
fn shares_go_by_measured_bandwidth() {
    let folder = tiny();
    let plain = Folder::with(&TinyModel {
        neuron_major: false,
        quant: QuantType::Q4_0,
        ..TinyModel::default()
    });
    let two = folder.file("two.toml", "[host]\nnodes = 2\nthreads = 1\n");
    let (measured, nothing) = (folder.path("cache"), folder.path("nothing"));
    let topology = ["--topology", two.as_str(), "--json"];
    let measure = [&["topology", "measure"], &topology[..]].concat();
    json(&run_caching(&measured, &measure));
    make_unequal(&kept(&measured)[0]);

    let seen = |cache: &Path, folder: &Folder| {
        let model = folder.name("m.gguf");
        let args = [&["topology", "-m", &model], &topology[..]].concat();
        json(&run_caching(cache, &args))
    };
    let by_threads = seen(&nothing, &folder);
    assert_eq!(by_threads["plan"]["shares"]["by"], "threads");
    let by_bandwidth = seen(&measured, &folder);
    let shares = &by_bandwidth["plan"]["shares"];
    assert_eq!(shares["by"], "bandwidth");
    assert_eq!(shares["mb_per_s"], serde_json::json!([30_000, 10_000]));
    let weights = |node: usize| {
        let bytes = &by_bandwidth["plan"]["nodes"][node]["weights_bytes"];
        bytes.as_f64().unwrap()
    };
    assert!((2.0..4.0).contains(&(weights(0) / weights(1))));
    let planned = json(&plan(&measured, &folder, &["--topology", &two]));
    assert_eq!(planned["shares"], *shares);
    assert_eq!(planned["modes"][0]["notes"], serde_json::json!([]));
    let of_plain = seen(&measured, &plain);
    assert_eq!(of_plain["model"]["neurons_by_threads"], true);
    assert_eq!(by_bandwidth["model"]["neurons_by_threads"], false);

    for (folder, mode) in [(&folder, "off"), (&folder, "exact"), (&plain, "off")] {
        let model = folder.name("m.gguf");
        let greedy = ["-p", "Hello", "-n", "8", "--temp", "0", "--ignore-eos"];
        let args = [&["-m", &model, "--sparsity", mode], &greedy[..], &topology].concat();
        let hash = |cache: &Path| json(&run_caching(cache, &args))["logits_hash"].clone();
        assert_eq!(hash(&measured), hash(&nothing), "{mode}");
    }
    let text = run_caching(&measured, &["topology", "--topology", &two]).out;
    let line = "  shares by measured bandwidth, 30.0 + 10.0 GB/s\n";
    assert!(text.contains(line), "{text}");
}

/// `plan` reads what was measured once, however many nodes it divides by that: what is wrong with the file is said once.
#[test]
fn a_profile_is_looked_up_once() {
    let folder = tiny();
    let cache = folder.path("cache");
    for n_nodes in [1, 2] {
        let text = format!("[host]\nnodes = {n_nodes}\nthreads = 1\n");
        let topology = folder.file("nodes.toml", &text);
        let file = TopologyFile::read(Some(Path::new(&topology))).unwrap();
        let planned = file.plan(None).unwrap();
        let name = fingerprint(&Machine::discover().unwrap(), &planned);
        let name = format!("machine-{name}.json");
        std::fs::create_dir_all(cache.join("pi-runtime")).unwrap();
        std::fs::write(cache.join("pi-runtime").join(&name), "{}").unwrap();
        let ran = plan(&cache, &folder, &["--topology", &topology]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        let n_lookups = ran.err.matches(&name).count();
        assert_eq!(n_lookups, 1, "{n_nodes} nodes: {}", ran.err);
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    for (args, words) in [
        (&["--simulate"][..], "--topology"),
        (&["--topology", "/no/such.toml"], "/no/such.toml"),
        (&["-t", "99999"], "99999"),
        (&["-t", "9999"], "give -t"),
        (&["--synthetic", "core:2"], "--synthetic"),
    ] {
        let ran = run(&[&["topology", "measure"], args].concat());
        assert_eq!((ran.code, ran.out.as_str()), (2, ""), "{args:?}");
        assert!(ran.err.contains(words), "{args:?}: {}", ran.err);
        assert!(!ran.err.contains("panicked"), "{}", ran.err);
    }
    // the drawing's flags are the drawing's
    let ran = run(&["topology", "--json", "measure"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
}

/// A folder that cannot be written to ends it, after what was measured has been said.
#[test]
fn figures_that_cannot_be_kept_are_still_said() {
    let folder = tiny();
    let file = folder.file("file", "");
    let ran = run_caching(Path::new(&file), &["topology", "measure", "-t", "1"]);
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert!(ran.out.contains("GB/s read, by threads"), "{}", ran.out);
    assert!(
        ran.err.contains("cannot keep what was measured") && ran.err.contains("XDG_CACHE_HOME"),
        "{}",
        ran.err
    );
}
