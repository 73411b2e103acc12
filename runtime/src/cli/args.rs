//! The command line: flags with llama.cpp's names, their defaults and ranges.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use pi_kernels::{ActivationMode, Tier};

use super::doctor::DoctorArgs;
use crate::inspect::InspectArgs;
use crate::sampler::SamplerParams;
use crate::tokenizer::TokenizeArgs;

/// Runs sparse language models on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "pi-runtime",
    version,
    about = "Run language models whose neurons mostly sleep, touching only those that fire",
    after_help = "Text goes to stdout, everything else to stderr. Without -m the demo model is used.",
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do instead of generating text.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Text generation, when no subcommand is named.
    #[command(flatten)]
    pub run: RunArgs,
    /// What to log on stderr: error, warn, info, debug, trace, or a filter such as pi_actors=debug
    #[arg(long, value_name = "LEVEL", default_value = "warn", global = true)]
    pub log_level: String,
}

/// What else the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a GGUF file's metadata and tensors
    Inspect(InspectArgs),
    /// Print the token ids of a text
    Tokenize(TokenizeArgs),
    /// Write a neuron-major copy of a model, for sparse running
    Pack(PackArgs),
    /// Measure perplexity on a text, chunked and scored as llama.cpp does
    Perplexity(PerplexityArgs),
    /// Measure prefill and decode speed
    Bench(BenchArgs),
    /// Say what this machine has, what stands in the way of speed, and how to mend it
    Doctor(DoctorArgs),
}

/// Flags shared by everything that loads a model.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Model file (GGUF); default: the demo model in models/ or the user's data folder
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Topology file (TOML) with the teams to use; default: the discovered machine
    #[arg(long, value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// off: dense; exact: skip neurons whose ReLU gate is closed (same result). Default: exact where it is free
    #[arg(long, value_enum, value_name = "MODE")]
    pub sparsity: Option<SparsityArg>,
    /// Precision of the activations in dot products
    #[arg(long, value_name = "f32|q8", default_value_t = ActivationMode::Q8)]
    pub activations: ActivationMode,
    /// Force a lower instruction set than the machine's best: scalar, avx2, avx512 or avx512-vnni
    #[arg(long, value_name = "TIER")]
    pub tier: Option<Tier>,
    /// Type of the key-value cache
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvArg::F16)]
    pub kv: KvArg,
}

/// Flags of text generation.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue; with -cnv the system prompt
    #[arg(short = 'p', long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Tokens to generate; -1: until the model ends or the context is full
    #[arg(
        short = 'n',
        long = "predict",
        value_name = "N",
        default_value_t = -1,
        allow_hyphen_values = true,
        value_parser = clap::value_parser!(i32).range(-1..)
    )]
    pub n_predict: i32,
    /// Context in tokens; 0: the model's own, at most 4096
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 0)]
    pub n_ctx: u32,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Choice of each token.
    #[command(flatten)]
    pub sampler: SamplerParams,
    /// Never choose a token that ends the text, so that the answer goes on
    #[arg(long)]
    pub ignore_eos: bool,
    /// Print one JSON object instead of streaming text
    #[arg(long, conflicts_with = "conversation")]
    pub json: bool,
    /// Chat: one line of stdin a turn, with the model's own template
    #[arg(long, visible_alias = "cnv")]
    pub conversation: bool,
}

/// Flags of `pack`.
#[derive(Debug, Clone, Args)]
pub struct PackArgs {
    /// GGUF file to read
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// GGUF file to write
    #[arg(short = 'o', long, value_name = "OUT")]
    pub output: PathBuf,
    /// Type of the transposed down rows; default: lossless where possible, else what makes the bytes read fall
    #[arg(long = "type", value_name = "TYPE")]
    pub down_type: Option<String>,
    /// Also measure each choice's perplexity on this text
    #[arg(short = 'f', long, value_name = "TEXT")]
    pub file: Option<PathBuf>,
    /// Chunks of the perplexity
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub chunks: u32,
}

/// Flags of `perplexity`.
#[derive(Debug, Clone, Args)]
pub struct PerplexityArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text file to score
    #[arg(short = 'f', long, value_name = "TEXT")]
    pub file: PathBuf,
    /// Tokens in a chunk
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(4..))]
    pub n_ctx: u32,
    /// Score the first N chunks; default: all
    #[arg(long, value_name = "N", default_value_t = -1, allow_hyphen_values = true)]
    pub chunks: i32,
    /// Threads, over all nodes
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

/// Flags of `bench`.
#[derive(Debug, Clone, Args)]
pub struct BenchArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Prompt lengths to test (0: none)
    #[arg(
        short = 'p',
        long = "n-prompt",
        value_name = "N",
        value_delimiter = ',',
        default_value = "512"
    )]
    pub n_prompt: Vec<u32>,
    /// Numbers of decoded tokens to test (0: none)
    #[arg(
        short = 'n',
        long = "n-gen",
        value_name = "N",
        value_delimiter = ',',
        default_value = "128"
    )]
    pub n_gen: Vec<u32>,
    /// Tokens already in the context
    #[arg(
        short = 'd',
        long = "n-depth",
        value_name = "N",
        value_delimiter = ',',
        default_value = "0"
    )]
    pub n_depth: Vec<u32>,
    /// Repetitions of each test
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub repetitions: u16,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Vec<u16>,
    /// Output format
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t = OutputFormat::Md)]
    pub output: OutputFormat,
    /// Feed random token ids, as llama-bench does, instead of real text
    #[arg(long)]
    pub random_ids: bool,
}

/// `--sparsity`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SparsityArg {
    /// Dense
    Off,
    /// Neurons whose ReLU gate is closed are skipped
    Exact,
}

/// `--kv`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvArg {
    /// Half precision
    F16,
    /// Single precision
    F32,
}

/// `-o` of `bench`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Markdown table
    Md,
    /// List of rows
    Json,
    /// Comma-separated values
    Csv,
}

/// Rewrites llama.cpp's single-dash long flags (`-cnv`), which clap would take for a cluster of short ones.
pub fn normalise(arguments: impl Iterator<Item = std::ffi::OsString>) -> Vec<std::ffi::OsString> {
    arguments
        .map(|argument| {
            if argument == "-cnv" {
                "--cnv".into()
            } else {
                argument
            }
        })
        .collect()
}
