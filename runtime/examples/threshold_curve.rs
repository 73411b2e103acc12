//! What thresholds cost a SiLU model: perplexity against the share of neurons skipped.
//!
//! `cargo run --release --example threshold_curve -- MODEL TEXT [CHUNKS] [WAY...]`, a way being `product`, `gate`, and
//! `:equal` or `:residual` behind it, then perhaps a type of down rows: `product:residual:Q5_0`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pi_kernels::attention::KvType;
use pi_kernels::{ActivationMode, Cpu};
use pi_runtime::model::Sparsity;
use pi_runtime::model::predicting::Predicting;
use pi_runtime::model::sparsity::writable_type;
use pi_runtime::model::threshold::Criterion;
use pi_runtime::session::{ModelOptions, N_UBATCH, ThresholdSource, TopologyFile};
use pi_runtime::threshold::proposal::{Division, Way};
use pi_runtime::threshold::{CalibrateOptions, Calibration};

const SHARES: [f64; 7] = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, rest @ ..] = &arguments[..] else {
        return Err("threshold_curve MODEL TEXT [CHUNKS] [WAY...]".into());
    };
    let options = ModelOptions {
        path: PathBuf::from(model),
        n_ctx: 0,
        sparsity: Some(Sparsity::Threshold),
        cpu: Cpu::detect(ActivationMode::Q8),
        kv_type: KvType::F16,
        trace: None,
        n_batch: N_UBATCH,
        tap: None,
        sidecar: None,
        head: Default::default(),
        thresholds: ThresholdSource::default(),
        predicting: Predicting::default(),
    };
    let how = CalibrateOptions {
        scored_chunks: rest.first().map_or(Ok(16), |chunks| chunks.parse())?,
        ..CalibrateOptions::default()
    };
    let plan = TopologyFile::default().plan(None)?;
    let words = std::fs::read_to_string(text)?;
    let interrupt = Arc::default();
    let calibration = Calibration::begin(
        &options,
        &plan,
        &words,
        Path::new(text),
        &how,
        &mut |step| eprintln!("{step:?}"),
        &interrupt,
    )?;
    println!("| way | wanted | skipped | MB/token | perplexity | rise | error |");
    println!("|---|---|---|---|---|---|---|");
    for name in rest.iter().skip(1) {
        let mut parts = name.split(':');
        let criterion = parts.next().and_then(Criterion::from_name);
        let criterion = criterion.ok_or("a way is product or gate")?;
        let division = match parts.next() {
            Some("equal") => Division::Equal,
            _ => Division::ByResidual,
        };
        let proposer = calibration.proposer(division)?;
        let way = match parts.next() {
            Some(down) => Way {
                criterion,
                down: Some(writable_type(down)?),
            },
            None => {
                let ways = proposer.ways().into_iter();
                ways.rev()
                    .find(|way| way.criterion == criterion)
                    .ok_or("no way")?
            }
        };
        for share in SHARES {
            let proposal = proposer.propose_all(way, share);
            let (rise, error, ppl) = calibration.try_out(&proposal.thresholds)?;
            println!(
                "| {name} {} | {:.0} % | {:.1} % | {:.1} | {ppl:.4} | {:+.2} % | {:.2} % |",
                way.down.map_or("", |down| down.name()),
                share * 100.0,
                proposal.thresholds.skipped * 100.0,
                proposal.bytes / 1e6,
                rise * 100.0,
                error * 100.0
            );
        }
    }
    Ok(())
}
