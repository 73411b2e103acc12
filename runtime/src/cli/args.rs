//! The command line: flags with llama.cpp's names, their defaults and ranges.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Args, Parser, Subcommand, ValueEnum};
use pi_kernels::{ActivationMode, Tier};
use pi_topology::{Predict, TopologyConfig};

use super::answer_args::{AnswerArgs, ChatArgs};
use super::doctor::DoctorArgs;
use super::numa_bench::NumaBenchArgs;
use super::plan::PlanArgs;
use super::prepare::PrepareArgs;
use super::synth::SynthArgs;
use super::topology::TopologyArgs;
use super::trace::TraceArgs;
use crate::head_sketch::Head;
use crate::inspect::InspectArgs;
use crate::sampler::SamplerParams;
use crate::session::{N_UBATCH, TopologyFile};
use crate::tokenizer::TokenizeArgs;

/// What `--help` ends with.
const AFTER_LONG_HELP: &str = "\
Examples:
  pi-runtime -p 'The capital of France is' -n 16 --temp 0
          the likeliest continuation, with the demo model
  pi-runtime -m FILE -f prompt.txt -n -1 --context-shift --keep -1
          go on without end, with the whole prompt always in sight
  pi-runtime -m FILE -cnv -sys 'You answer in one sentence.'
          chat
  pi-runtime -m FILE -cnv --chat-template chatml -st -p 'What is a neuron?'
          one question and its answer
  pi-runtime -p 'Q: 1+1? A:' -r 'Q:' --json
          one object with the text up to the next question

Flags of one dash and several letters (-cnv, -sys, -st, ...) are llama.cpp's. Text goes to stdout, everything else to
stderr. The exit code is 0, 2 for something to mend (file, flag, prompt), 1 for what the machine refuses, 130 after
Ctrl-C.";

/// Runs sparse language models on this machine.
#[derive(Debug, Parser)]
#[command(
    name = "pi-runtime",
    version,
    about = "Run language models whose neurons mostly sleep, touching only those that fire",
    after_help = "Text goes to stdout, everything else to stderr. --help says more than -h.",
    after_long_help = AFTER_LONG_HELP,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
pub struct Cli {
    /// What to do instead of generating text.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// What to log on stderr: error, warn, info, debug, trace, or a filter such as pi_actors=debug
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "warn",
        global = true,
        help_heading = "Timeline and log"
    )]
    pub log_level: String,
    /// Text generation, when no subcommand is named.
    #[command(flatten)]
    pub run: RunArgs,
}

impl Cli {
    /// Whether a timeline is to be written.
    pub(super) fn is_traced(&self) -> bool {
        match &self.command {
            None => self.run.trace.trace.is_some(),
            Some(Command::Bench(args)) => args.trace.trace.is_some(),
            Some(_) => false,
        }
    }
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
    /// Find out which neurons fire when, for sparse running: makes the model's sidecar
    Prepare(Box<PrepareArgs>),
    /// Write a model of random weights, of any shape and type, whose neurons fire as planned
    Synth(SynthArgs),
    /// Measure perplexity on a text, chunked and scored as llama.cpp does
    Perplexity(PerplexityArgs),
    /// Measure prefill and decode speed
    Bench(BenchArgs),
    /// Find the teams, threads, pages and places of cold neurons that are fastest for a model
    NumaBench(NumaBenchArgs),
    /// Say where a model goes on this machine, and what a token will cost
    Plan(PlanArgs),
    /// Draw this machine, a saved or a made-up one, with the threads and bytes that are planned on it
    Topology(TopologyArgs),
    /// Say what this machine has, what stands in the way of speed, and how to mend it
    Doctor(DoctorArgs),
    /// Print a script that completes the flags in a shell
    Completions(CompletionsArgs),
    /// Print the manual page, or write one for every subcommand
    Man(ManArgs),
}

/// Flags of `completions`.
#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

/// Flags of `man`.
#[derive(Debug, Clone, Args)]
pub struct ManArgs {
    /// Folder to write a page for every subcommand into; default: the program's page to stdout
    #[arg(value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

/// Flags shared by everything that loads a model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model and machine")]
pub struct ModelArgs {
    /// The topology file, when it has been read.
    #[arg(skip)]
    pub topology_read: std::sync::Arc<std::sync::OnceLock<TopologyFile>>,
    /// Model file (GGUF); default: the demo model in models/ or the user's data folder
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Topology file (TOML) with the teams to use; default: the discovered machine
    #[arg(long, value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// Run the topology on what there is: missing NUMA nodes as extra teams, missing GPUs on the host
    #[arg(long, requires = "topology")]
    pub simulate: bool,
    /// off: dense; exact: skip neurons whose ReLU gate is closed (same result); predicted: look only at neurons that
    /// predictors pick; threshold: skip neurons of SiLU and GELU gates that contribute little (both need what `prepare`
    /// makes). Default: exact where it is free
    #[arg(long, value_enum, value_name = "MODE")]
    pub sparsity: Option<SparsityArg>,
    /// sparse: a sketch picks the tokens whose logits are computed, so that most of the head is not read (needs the sidecar)
    #[arg(long, value_enum, value_name = "HEAD", default_value_t = Head::Full)]
    pub head: Head,
    /// What `prepare` made for the model [default: the file beside it with .sparse.gguf for .gguf, where it is needed]
    #[arg(long, value_name = "FILE")]
    pub sidecar: Option<PathBuf>,
    /// Run --sparsity threshold also where `prepare` found that it gains nothing
    #[arg(long, hide_short_help = true)]
    pub force_threshold: bool,
    /// Who predicts with --sparsity predicted: auto, exact (nobody: all gates are computed), in-layer, ahead or both; or layer
    /// by layer, as in "0-3: exact, 4-29: in-layer", which `plan` prints [default: the topology file's, else auto]
    #[arg(long, value_name = "WHO", value_parser = PredictParser, hide_possible_values = true)]
    pub predictor: Option<Predict>,
    /// Whether what is predicted one layer ahead is prefetched
    #[arg(long, value_enum, value_name = "on|off", default_value_t = PrefetchArg::On)]
    pub prefetch: PrefetchArg,
    /// With a GPU: after every N decoded tokens neurons that fired most lately become hot, in exchange for hot ones that fired
    /// less; 0: never [default: the topology's gpu.replan]
    #[arg(long, value_name = "N")]
    pub replan: Option<u32>,
    /// Precision of the activations in dot products
    #[arg(long, value_name = "f32|q8", default_value_t = ActivationMode::Q8)]
    pub activations: ActivationMode,
    /// Force a lower instruction set than the machine's best: scalar, avx2, avx512, avx512-vnni or avx512-amx
    #[arg(long, value_name = "TIER")]
    pub tier: Option<Tier>,
    /// Type of the key-value cache
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvArg::F16)]
    pub kv: KvArg,
    /// Tokens of a prompt that go through the layers together; more than 512 are taken as 512; changes no result; also -ub
    #[arg(
        short = 'b',
        long,
        aliases = ["ubatch-size", "ub"],
        value_name = "N",
        default_value_t = N_UBATCH as u16,
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    pub batch_size: u16,
}

/// Flags of text generation.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to continue; with -cnv the first message
    #[arg(
        short = 'p',
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        help_heading = "Text"
    )]
    pub prompt: Option<String>,
    /// Tokens to generate; -1: until the model ends or the context is full; -2: as -1, also with --context-shift
    #[arg(
        short = 'n',
        long = "predict",
        alias = "n-predict",
        value_name = "N",
        default_value_t = -1,
        allow_hyphen_values = true,
        help_heading = "Text",
        value_parser = clap::value_parser!(i32).range(-2..)
    )]
    pub n_predict: i32,
    /// Where texts come from, and what ends an answer.
    #[command(flatten)]
    pub answer: AnswerArgs,
    /// Context in tokens; 0: the model's own, at most 4096
    #[arg(
        short = 'c',
        long = "ctx-size",
        value_name = "N",
        default_value_t = 0,
        help_heading = "Model and machine"
    )]
    pub n_ctx: u32,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(
        short = 't',
        long,
        value_name = "N",
        help_heading = "Model and machine",
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    pub threads: Option<u16>,
    /// Print the topology with every key and its default, or what --predictor and --replan say in its place, and end
    #[arg(long, help_heading = "Model and machine")]
    pub print_config: bool,
    /// Choice of each token.
    #[command(flatten)]
    pub sampler: SamplerParams,
    /// Never choose a token that ends the text, so that the answer goes on
    #[arg(long, help_heading = "Choice of tokens")]
    pub ignore_eos: bool,
    /// Print one JSON object instead of streaming text
    #[arg(long, conflicts_with = "conversation", help_heading = "Text")]
    pub json: bool,
    /// Chat, with the model's own template; also -cnv
    ///
    /// At a terminal lines can be edited, and up and down go through those said before; a line that ends in \ goes on
    /// in the next one. /help lists the commands. Ctrl-C ends the answer, and at an empty line the chat, as does Ctrl-D.
    #[arg(
        long,
        alias = "cnv",
        overrides_with = "no_conversation",
        help_heading = "Chat"
    )]
    pub conversation: bool,
    /// Do not chat (the default); also -no-cnv
    #[arg(
        long,
        alias = "no-cnv",
        overrides_with = "conversation",
        hide_short_help = true,
        help_heading = "Chat"
    )]
    pub no_conversation: bool,
    /// How to chat.
    #[command(flatten)]
    pub chat: ChatArgs,
    /// Timeline.
    #[command(flatten)]
    pub trace: TraceArgs,
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
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: u32,
    /// Topology file (TOML) with the teams that measure; default: the discovered machine
    #[arg(long, value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// Run the topology on what there is: missing NUMA nodes as extra teams, missing GPUs on the host
    #[arg(long, requires = "topology")]
    pub simulate: bool,
    /// Threads that measure, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
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
    /// Timeline.
    #[command(flatten)]
    pub trace: TraceArgs,
}

/// `--sparsity`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SparsityArg {
    /// Dense
    Off,
    /// Neurons whose ReLU gate is closed are skipped
    Exact,
    /// Neurons that contribute little are skipped, where gates never close
    Threshold,
    /// Only neurons that predictors pick are looked at
    Predicted,
}

/// `--prefetch`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrefetchArg {
    /// What is predicted ahead is pulled towards the cache
    On,
    /// It is not
    Off,
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

/// llama.cpp's flags of one dash and several letters, which clap would take for clusters of short ones.
const SINGLE_DASH: [&str; 7] = ["-bf", "-cnv", "-no-cnv", "-st", "-sys", "-sysf", "-ub"];

/// Rewrites llama.cpp's single-dash long flags.
///
/// What follows `--` stays as it is, and so does the value of a flag that takes any text (`-p -st` continues "-st").
pub fn normalise(arguments: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut as_it_is = false;
    let mut is_text = false;
    let rewrite = |argument: OsString| {
        as_it_is |= !is_text && argument == "--";
        let flag = (!as_it_is && !is_text)
            .then(|| SINGLE_DASH.iter().find(|flag| argument == **flag))
            .flatten();
        is_text = !is_text && TAKES_ANY_TEXT.iter().any(|flag| argument == **flag);
        match flag {
            Some(flag) => format!("-{flag}").into(),
            None => argument,
        }
    };
    arguments.map(rewrite).collect()
}

/// Flags whose value may look like a flag.
const TAKES_ANY_TEXT: [&str; 7] = [
    "-p",
    "--prompt",
    "-sys",
    "--sys",
    "--system-prompt",
    "-r",
    "--reverse-prompt",
];

/// The same error, and for an unknown flag that a topology file has a key for, where that is.
pub fn led_to_a_key(mut error: clap::Error) -> clap::Error {
    let key = match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(flag))) => {
            let name = flag.split('=').next().unwrap_or_default();
            name.trim_start_matches('-').replace('-', "_")
        }
        _ => return error,
    };
    let keys = TopologyConfig::keys();
    let found = keys
        .iter()
        .find(|(table, known)| *known == key && !table.is_empty());
    if let Some((table, key)) = found {
        let hint = format!("`{key}` is a key of {table} in a topology file (--topology FILE)");
        // clap would guess at a flag that has nothing to do with it
        error.remove(ContextKind::SuggestedArg);
        let hints = ContextValue::StyledStrs(vec![hint.into()]);
        error.insert(ContextKind::Suggested, hints);
    }
    error
}

/// Reads `--predictor`: words that shells complete, or a list of layers.
#[derive(Debug, Clone, Copy)]
struct PredictParser;

impl TypedValueParser for PredictParser {
    type Value = Predict;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&Arg>,
        value: &OsStr,
    ) -> Result<Predict, clap::Error> {
        str::parse::<Predict>.parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let words = ["auto", "exact", "in-layer", "ahead", "both"];
        Some(Box::new(words.into_iter().map(PossibleValue::new)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalised(arguments: &[&str]) -> Vec<OsString> {
        normalise(arguments.iter().map(OsString::from))
    }

    #[test]
    fn only_flags_are_rewritten() {
        assert_eq!(
            normalised(&["pi", "-cnv", "-sys", "-st", "-st", "-b", "7", "-ub", "8"]),
            [
                "pi", "--cnv", "--sys", "-st", "--st", "-b", "7", "--ub", "8"
            ]
        );
        assert_eq!(normalised(&["-p", "-cnv", "-cnv"]), ["-p", "-cnv", "--cnv"]);
        assert_eq!(normalised(&["--", "-cnv"]), ["--", "-cnv"]);
    }

    #[test]
    fn the_flags_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        for flag in SINGLE_DASH {
            let name = flag.trim_start_matches('-');
            let command = Cli::command();
            let known = command.get_arguments().any(|argument| {
                argument
                    .get_all_aliases()
                    .is_some_and(|names| names.contains(&name))
            });
            assert!(known, "{flag}");
        }
    }
}
