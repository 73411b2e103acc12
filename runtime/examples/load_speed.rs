//! How fast a model is loaded, and the memory that it takes:
//! `cargo run --release -p pi-runtime --example load_speed -- MODEL THREADS [off|exact]`
//!
//! The file's pages should be in the page cache. Threads are not pinned; every round loads anew.

use std::time::Instant;

use pi_actors::{ActorError, TeamThread};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::node_memory::{HeapMemory, NodeThreads};
use pi_runtime::model::sparsity::SparsityPlan;
use pi_runtime::model::{Hyperparameters, Loader, ModelTensors, Sparsity};

const ROUNDS: usize = 7;

struct OneNode(usize);

impl NodeThreads for OneNode {
    fn n_threads(&self) -> Vec<usize> {
        vec![self.0]
    }

    fn run(&self, job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError> {
        std::thread::scope(|scope| {
            for thread in 0..self.0 {
                let n_threads = self.0;
                scope.spawn(move || {
                    job(TeamThread {
                        node: 0,
                        thread,
                        n_threads,
                    });
                });
            }
        });
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, threads, mode @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: load_speed MODEL THREADS [off|exact]");
    };
    let threads = OneNode(threads.parse()?);
    let mode = mode.first().map(|mode| match mode.as_str() {
        "off" => Sparsity::Off,
        _ => Sparsity::Exact,
    });
    for round in 0..ROUNDS {
        let start = Instant::now();
        let file = GgufFile::open(path)?;
        let hyper = Hyperparameters::read(&file)?;
        let tensors = ModelTensors::find(&file, &hyper)?;
        let plan = SparsityPlan::resolve(mode, hyper.gate, &tensors.stored_downs())?;
        let loader = Loader::new(&file, &hyper, &tensors, &plan, &threads.n_threads(), 512)?;
        let bytes = loader.copied_bytes();
        let opened = start.elapsed();
        let weights = loader.load(&threads, &HeapMemory, &|_| ())?;
        let total = start.elapsed();
        drop(weights);
        let speed = bytes as f64 / (total - opened).as_secs_f64() / 1e9;
        println!(
            "round {round}: {total:.1?} ({opened:.1?} before copying), {:.1} MB, {speed:.2} GB/s, peak {} MB",
            bytes as f64 / 1e6,
            peak_rss_mb()
        );
    }
    Ok(())
}

/// Most memory that the process has held at once; 0 where the system does not tell.
fn peak_rss_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse::<u64>().ok())
        .unwrap_or_default()
        * 1024
        / 1_000_000
}
