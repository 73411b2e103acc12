//! What thresholds cost a SiLU or GELU model: perplexity against the share of neurons skipped.
//!
//! `cargo run --release --example threshold_curve -- MODEL TEXT [OPTION=VALUE...] [WAY...]`, a way being `product`,
//! `gate`, and `:equal` or `:residual` behind it, then perhaps a type of down rows and how many fragile layers are
//! spared: `product:residual:Q5_0:2`.
//!
//! Options: `chunks=16`, `tokens=512` in each, `threads=N`, `activations=f32`, and `shares=0,30` in percent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pi_kernels::{ActivationMode, Cpu};
use pi_runtime::model::Sparsity;
use pi_runtime::model::sparsity::writable_type;
use pi_runtime::model::threshold::Criterion;
use pi_runtime::session::{ModelOptions, TopologyFile};
use pi_runtime::threshold::fragility::Fragility;
use pi_runtime::threshold::proposal::{Division, Way};
use pi_runtime::threshold::{CalibrateOptions, Calibration};

/// What the arguments ask for.
struct Asked {
    chunks: usize,
    tokens: usize,
    threads: Option<usize>,
    activations: ActivationMode,
    shares: Vec<f64>,
    ways: Vec<String>,
}

impl Asked {
    fn read(arguments: &[String]) -> Result<Self, Box<dyn std::error::Error>> {
        let mut asked = Self {
            chunks: 16,
            tokens: 512,
            threads: None,
            activations: ActivationMode::Q8,
            shares: vec![0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5],
            ways: vec![],
        };
        for argument in arguments {
            match argument.split_once('=') {
                None => asked.ways.push(argument.clone()),
                Some(("chunks", value)) => asked.chunks = value.parse()?,
                Some(("tokens", value)) => asked.tokens = value.parse()?,
                Some(("threads", value)) => asked.threads = Some(value.parse()?),
                Some(("activations", "f32")) => asked.activations = ActivationMode::F32,
                Some(("activations", "q8")) => asked.activations = ActivationMode::Q8,
                Some(("shares", value)) => {
                    let percent = value.split(',').map(str::parse::<f64>);
                    let shares = percent.map(|share| share.map(|share| share / 100.0));
                    asked.shares = shares.collect::<Result<_, _>>()?;
                }
                Some(_) => return Err(format!("what is {argument}?").into()),
            }
        }
        Ok(asked)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, rest @ ..] = &arguments[..] else {
        return Err("threshold_curve MODEL TEXT [OPTION=VALUE...] [WAY...]".into());
    };
    let asked = Asked::read(rest)?;
    let options = ModelOptions {
        sparsity: Some(Sparsity::Threshold),
        cpu: Cpu::detect(asked.activations),
        ..ModelOptions::new(PathBuf::from(model))
    };
    let how = CalibrateOptions {
        scored_chunks: asked.chunks,
        chunk_tokens: asked.tokens,
        ..CalibrateOptions::default()
    };
    let plan = TopologyFile::default().plan(asked.threads)?;
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
    let spares = |name: &String| name.split(':').count() > 3;
    let fragility = if asked.ways.iter().any(spares) {
        calibration.fragility()?
    } else {
        Fragility::default()
    };
    eprintln!("{fragility:?}");
    println!("| way | wanted | skipped | MB/token | perplexity | rise | error |");
    println!("|---|---|---|---|---|---|---|");
    for name in &asked.ways {
        let mut parts = name.split(':');
        let criterion = parts.next().and_then(Criterion::from_name);
        let criterion = criterion.ok_or("a way is product or gate")?;
        let division = match parts.next() {
            Some("equal") => Division::Equal,
            _ => Division::ByResidual,
        };
        let proposer = calibration.proposer(division)?.sparing(&fragility);
        let way = match parts.next() {
            Some(down) => Way {
                criterion,
                down: Some(writable_type(down)?),
                spared: parts.next().map_or(Ok(0), str::parse)?,
            },
            None => {
                let ways = proposer.ways().into_iter();
                ways.rev()
                    .find(|way| way.criterion == criterion)
                    .ok_or("no way")?
            }
        };
        for &share in &asked.shares {
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
