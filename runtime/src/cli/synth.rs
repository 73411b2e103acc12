//! `pi-runtime synth`: a model of random weights and planned activity, for measuring shapes that cannot be had.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use pi_kernels::QuantType;
use pi_topology::Machine;

use super::interrupt::Interrupt;
use super::progress::LoadBar;
use crate::error::RuntimeError;
use crate::sidecar::default_path;
use crate::synth::{PRESETS, SynthOptions, Synthesis};

/// Flags of `synth`.
#[derive(Debug, Clone, Args)]
pub struct SynthArgs {
    /// GGUF file to write; its sidecar NAME.sparse.gguf comes beside it
    #[arg(short = 'o', long, value_name = "FILE")]
    pub output: PathBuf,
    /// A model's sizes by name: 2b, 7b, 13b, 34b, 70b or falcon-40b
    #[arg(long, value_name = "NAME", default_value = PRESETS[0].name)]
    pub preset: String,
    /// Layers; default: the preset's, as of all sizes
    #[arg(long, value_name = "N")]
    pub layers: Option<usize>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    pub embd: Option<usize>,
    /// FFN neurons of a layer
    #[arg(long, value_name = "N")]
    pub ff: Option<usize>,
    /// Query heads
    #[arg(long, value_name = "N")]
    pub heads: Option<usize>,
    /// Key and value heads
    #[arg(long, value_name = "N")]
    pub kv_heads: Option<usize>,
    /// Tokens in the vocabulary
    #[arg(long, value_name = "N")]
    pub vocab: Option<usize>,
    /// Context that the model states, in tokens
    #[arg(long, value_name = "N")]
    pub ctx: Option<usize>,
    /// Type of all matrices: Q4_0, Q8_0, F16, Q4_K, ...
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_0")]
    pub quant: String,
    /// Share of the neurons that fire
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.10,
        allow_negative_numbers = true
    )]
    pub active: f64,
    /// How much frequencies differ: the neuron one standard deviation above the median one fires e^X times as often
    #[arg(
        long,
        value_name = "X",
        default_value_t = 2.4,
        allow_negative_numbers = true
    )]
    pub skew: f64,
    /// Other weights for another number
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Threads that make weights; default: one for every CPU. They change no byte
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

/// Writes the model and its sidecar.
///
/// # Errors
/// A flag, or what the file system refuses.
pub fn run(args: &SynthArgs) -> Result<(), RuntimeError> {
    let synthesis = Synthesis::new(&options(args)?)?;
    let interrupt = Interrupt::listen();
    let _answering = interrupt.answer();
    let n_threads = match args.threads {
        Some(n_threads) => n_threads.into(),
        None => Machine::discover()?.n_cpus(),
    };
    let start = Instant::now();
    let bar = LoadBar::new("writing");
    let written = synthesis.write(&args.output, n_threads, &bar, &|| interrupt.requested())?;
    if !written {
        return Err(RuntimeError::Interrupted);
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes = synthesis.model_bytes() as f64;
    eprintln!(
        "wrote {} ({:.2} GB) and {} in {seconds:.1} s ({:.2} GB/s)",
        args.output.display(),
        bytes / 1e9,
        default_path(&args.output).display(),
        bytes / 1e9 / seconds
    );
    Ok(())
}

fn options(args: &SynthArgs) -> Result<SynthOptions, RuntimeError> {
    let refused = |flag, value: &str, names: Vec<&str>| RuntimeError::Flag {
        flag,
        value: value.to_owned(),
        problem: format!("give one of {}", names.join(", ")),
    };
    let preset = PRESETS
        .iter()
        .find(|preset| preset.name.eq_ignore_ascii_case(&args.preset))
        .ok_or_else(|| {
            let names = PRESETS.iter().map(|preset| preset.name).collect();
            refused("--preset", &args.preset, names)
        })?;
    let quant = QuantType::ALL
        .into_iter()
        .find(|quant| quant.name().eq_ignore_ascii_case(&args.quant))
        .ok_or_else(|| {
            let names = QuantType::ALL.map(QuantType::name).to_vec();
            refused("--type", &args.quant, names)
        })?;
    let mut shape = preset.shape;
    for (size, given) in [
        (&mut shape.n_layer, args.layers),
        (&mut shape.n_embd, args.embd),
        (&mut shape.n_ff, args.ff),
        (&mut shape.n_head, args.heads),
        (&mut shape.n_head_kv, args.kv_heads),
        (&mut shape.n_vocab, args.vocab),
        (&mut shape.n_ctx, args.ctx),
    ] {
        *size = given.unwrap_or(*size);
    }
    let name = match shape == preset.shape {
        true => format!("Synthetic {}", preset.name),
        false => format!(
            "Synthetic {}x{}x{}",
            shape.n_layer, shape.n_embd, shape.n_ff
        ),
    };
    Ok(SynthOptions {
        name,
        shape,
        quant,
        active: args.active,
        skew: args.skew,
        seed: args.seed,
    })
}
