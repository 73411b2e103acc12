//! How fast a model is loaded, and the memory that it takes:
//! `cargo run --release -p pi-runtime --example load_speed -- MODEL THREADS [off|exact]`
//!
//! The file's pages should be in the page cache. Every round loads anew.

use std::time::Instant;

use pi_actors::Teams;
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::sparsity::SparsityPlan;
use pi_runtime::model::{Hyperparameters, Loader, ModelTensors, Sparsity};
use pi_topology::{Machine, Plan, TopologyConfig, peak_rss_bytes};

const ROUNDS: usize = 7;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, threads, mode @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: load_speed MODEL THREADS [off|exact]");
    };
    let plan = Plan::new(
        &TopologyConfig::default(),
        &Machine::discover()?,
        Some(threads.parse()?),
    )?;
    let teams = Teams::start(&plan)?;
    let mode = mode.first().map(|mode| match mode.as_str() {
        "off" => Sparsity::Off,
        _ => Sparsity::Exact,
    });
    for round in 0..ROUNDS {
        let start = Instant::now();
        let file = GgufFile::open(path)?;
        let hyper = Hyperparameters::read(&file)?;
        let tensors = ModelTensors::find(&file, &hyper)?;
        let sparsity = SparsityPlan::resolve(mode, hyper.gate, &tensors.stored_downs())?;
        let loader = Loader::new(&file, &hyper, &tensors, &sparsity, &teams.n_threads(), 512)?;
        let bytes = loader.copied_bytes();
        let opened = start.elapsed();
        let weights = loader.load(&teams, &plan, &|_| ())?;
        let total = start.elapsed();
        drop(weights);
        let speed = bytes as f64 / (total - opened).as_secs_f64() / 1e9;
        println!(
            "round {round}: {total:.1?} ({opened:.1?} before copying), {:.1} MB, {speed:.2} GB/s, peak {} MB",
            bytes as f64 / 1e6,
            peak_rss_bytes().unwrap_or_default() / 1_000_000
        );
    }
    Ok(())
}
