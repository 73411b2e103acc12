//! Threads that have nothing to do come to rest, and then use no CPU at all.

#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Collector, PlainModel, Setup, engine, run, tokens};
use pi_actors::weights::GateActivation;

/// Nanoseconds that each thread of the teams has run so far; none where the kernel does not count.
fn run_times() -> Option<BTreeMap<String, u64>> {
    let mut times = BTreeMap::new();
    for task in std::fs::read_dir("/proc/self/task").ok()? {
        let folder = task.ok()?.path();
        let name = std::fs::read_to_string(folder.join("comm")).ok()?;
        if name.starts_with("pi-node") {
            let schedstat = std::fs::read_to_string(folder.join("schedstat")).ok()?;
            let ran_ns = schedstat.split(' ').next()?.parse().ok()?;
            let id = folder.file_name()?.to_string_lossy().into_owned();
            times.insert(id, ran_ns);
        }
    }
    Some(times)
}

/// Waits until no thread runs any more between two looks.
fn at_rest() -> BTreeMap<String, u64> {
    let start = Instant::now();
    let mut before = run_times().unwrap();
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let now = run_times().unwrap();
        if now == before {
            return now;
        }
        let running = start.elapsed() < Duration::from_secs(60);
        assert!(running, "threads never come to rest: {before:?}, {now:?}");
        before = now;
    }
}

#[test]
fn threads_without_work_use_no_cpu() {
    if run_times().is_none() {
        eprintln!("skipped: the kernel does not count threads' time");
        return;
    }
    let model = PlainModel::random(5, GateActivation::Relu);
    for (n_nodes, n_threads) in [(1, 2), (2, 1), (2, 2)] {
        let engine = engine(
            &model,
            Setup {
                n_nodes,
                n_threads,
                ..Setup::default()
            },
        );
        for _ in 0..2 {
            let ran = run(&engine, Collector::new(&tokens(20), true));
            ran.outcome.unwrap();
            let rested = at_rest();
            assert_eq!(rested.len(), n_nodes * n_threads, "{rested:?}");
            assert!(rested.values().all(|&ns| ns > 0), "they have run");
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(run_times().unwrap(), rested);
        }
    }
}
