//! Everything that can end the program, and the exit code that it ends with.

use std::io;
use std::path::{Path, PathBuf};

use pi_actors::ActorError;
use pi_kernels::KernelError;
use pi_topology::TopologyError;
use pi_topology::placement::PlacementError;
use thiserror::Error;

use crate::chat::ChatError;
use crate::gguf::GgufError;
use crate::head_sketch::HeadSketchError;
use crate::inspect::InspectError;
use crate::model::ModelError;
use crate::perplexity::PerplexityError;
use crate::prepare::PrepareError;
use crate::sampler::SamplerError;
use crate::sidecar::SidecarError;
use crate::synth::SynthError;
use crate::tokenizer::TokenizerError;
use crate::trace::TraceError;

/// Exit code of bad input: a file, flag, configuration or prompt.
pub const BAD_INPUT_EXIT_CODE: u8 = 2;

/// Exit code of a machine that does not do its part: memory, disk, threads.
pub const ENVIRONMENT_EXIT_CODE: u8 = 1;

/// Exit code of a program that Ctrl-C ended, as shells expect it.
pub const INTERRUPTED_EXIT_CODE: u8 = 130;

/// What ended the program.
#[derive(Debug, Error)]
pub enum RuntimeError {
    /// A GGUF file that cannot be read or written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A model that cannot be run.
    #[error("{}: {source}", path.display())]
    Model {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: ModelError,
    },
    /// Sampling parameters out of range.
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A vocabulary or text that cannot be tokenised.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A model whose vocabulary cannot be used.
    #[error("{}: {source}", path.display())]
    TokenizerOf {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: TokenizerError,
    },
    /// A type that packed rows cannot have.
    #[error(transparent)]
    DownType(ModelError),
    /// A conversation that cannot be put into the model's form.
    #[error("{}: {source}", path.display())]
    Chat {
        /// The model's file.
        path: PathBuf,
        /// Why.
        source: ChatError,
    },
    /// An instruction set that the machine lacks.
    #[error("--tier: {0}")]
    Tier(KernelError),
    /// A topology file that cannot be read.
    #[error("{}: cannot read the topology: {source}", path.display())]
    ReadTopology {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A topology file that says something wrong.
    #[error("{}, line {line}: {problem}", path.display())]
    TopologySyntax {
        /// The file.
        path: PathBuf,
        /// Where, counted from 1.
        line: usize,
        /// The key, and what is wrong with it.
        problem: String,
    },
    /// A topology file that asks for what the machine lacks.
    #[error("{}: {source}", path.display())]
    TopologyOf {
        /// The file.
        path: PathBuf,
        /// What.
        source: TopologyError,
    },
    /// A topology file for another machine.
    #[error("{}", lacking(path, differences, nearest))]
    Lacking {
        /// The file.
        path: PathBuf,
        /// What the machine lacks, a line each.
        differences: Vec<String>,
        /// The nearest file that would do.
        nearest: String,
    },
    /// Re-planning that would never change anything.
    #[error("--replan: {problem}: {cure}, or leave it out")]
    Replan {
        /// Why.
        problem: &'static str,
        /// What to do instead.
        cure: &'static str,
    },
    /// A saved machine that cannot be read.
    #[error("{}: cannot read the machine: {source}", path.display())]
    ReadMachine {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Measurements of a machine that cannot be kept.
    #[error(
        "{}: cannot keep what was measured: {source}: make room there, or name another folder in XDG_CACHE_HOME",
        path.display()
    )]
    WriteProfile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A machine that cannot be used as asked.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A model that has no place on the machine.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// A step that failed, or an engine that does not start.
    #[error(transparent)]
    Actor(#[from] ActorError),
    /// A step that failed because of what is in the model's file.
    #[error("{}: {source}", path.display())]
    StepOf {
        /// The model's file.
        path: PathBuf,
        /// Why.
        source: Box<ActorError>,
    },
    /// A synthetic model that cannot be made.
    #[error(transparent)]
    Synth(#[from] SynthError),
    /// `inspect` failed.
    #[error(transparent)]
    Inspect(InspectError),
    /// A log filter that cannot be parsed.
    #[error(
        "--log-level {text}: not a level (error, warn, info, debug, trace) or filter (pi_actors=debug)"
    )]
    LogLevel {
        /// As given.
        text: String,
    },
    /// A text that cannot be scored.
    #[error("{}: {source}", path.display())]
    Perplexity {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: PerplexityError,
    },
    /// No model named and none found.
    #[error(
        "no model: give one with -m FILE, or put the demo model into {folder}; from the source's folder: install -D -m 644 -t {folder} models/{name}",
        folder = folder.display()
    )]
    NoModel {
        /// The demo model's file name.
        name: &'static str,
        /// Where it would be found.
        folder: PathBuf,
    },
    /// Nothing to continue.
    #[error("no prompt: give one with -p TEXT or -f FILE, or chat with -cnv")]
    NoPrompt,
    /// An empty prompt for a model without a token to begin with.
    #[error(
        "the prompt is empty, and this model has no token that begins a text: give a prompt with -p TEXT"
    )]
    EmptyPrompt,
    /// A prompt that leaves no room.
    #[error(
        "the prompt has {n_prompt} tokens, but the context holds {n_ctx}: shorten it, or raise -c (this model: up to {n_ctx_max})"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        n_prompt: usize,
        /// Tokens of the context.
        n_ctx: usize,
        /// The model's longest context.
        n_ctx_max: usize,
    },
    /// A conversation that leaves no room for another turn.
    #[error(
        "with this turn the conversation has {n_tokens} tokens, but the context holds {n_ctx}: begin anew with /clear, or \
         start with --context-shift or a higher -c (this model: up to {n_ctx_max})"
    )]
    ConversationTooLong {
        /// Tokens of the conversation.
        n_tokens: usize,
        /// Tokens of the context.
        n_ctx: usize,
        /// The model's longest context.
        n_ctx_max: usize,
    },
    /// A line of a chat that begins with `/` and is no command.
    #[error("{name}: {problem}")]
    ChatCommand {
        /// The command, with its slash.
        name: String,
        /// What is wrong and what would do.
        problem: String,
    },
    /// A file that is no saved conversation.
    #[error("{}: this is no conversation that /save wrote: {problem}", path.display())]
    BadConversation {
        /// The file.
        path: PathBuf,
        /// Where and why.
        problem: String,
    },
    /// A conversation that cannot be written.
    #[error("{}: cannot write the conversation: {source}", path.display())]
    SaveConversation {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Manual pages that cannot be written.
    #[error("{}: cannot write manual pages: {source}", folder.display())]
    WritePages {
        /// The folder.
        folder: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A text file that cannot be read.
    #[error("{}: cannot read the text: {source}", path.display())]
    ReadText {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A text without end, or nearly.
    #[error("{}: the text has more than {bytes_max} bytes: give a part of it", path.display())]
    TextTooLong {
        /// The file.
        path: PathBuf,
        /// Bytes that are read at most.
        bytes_max: u64,
    },
    /// A text that is not UTF-8.
    #[error("{}: the text is not UTF-8 (byte {offset}): convert it", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// First bad byte.
        offset: usize,
    },
    /// A flag with a value that cannot be.
    #[error("{flag} {value}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What is wrong and what would do.
        problem: String,
    },
    /// Standard output's reader went away: an ordinary end.
    #[error("standard output is closed")]
    OutputClosed,
    /// Standard output failed otherwise.
    #[error("cannot write to standard output: {source}")]
    OutputFailed {
        /// Why.
        source: io::Error,
    },
    /// Ctrl-C ended it.
    #[error("interrupted")]
    Interrupted,
    /// A model that cannot be prepared.
    #[error(transparent)]
    Prepare(#[from] PrepareError),
    /// A sidecar that cannot be used.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// A sketch of the head that cannot be made.
    #[error(transparent)]
    HeadSketch(#[from] HeadSketchError),
    /// A trace that cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// Standard input failed.
    #[error("cannot read standard input: {source}")]
    InputFailed {
        /// Why.
        source: io::Error,
    },
}

fn lacking(path: &Path, differences: &[String], nearest: &str) -> String {
    let mut text = format!("{} asks for what this machine lacks:", path.display());
    for difference in differences {
        text.push_str(&format!("\n  {difference}"));
    }
    match nearest.is_empty() {
        true => text.push_str("\nthe nearest that fits is the default: leave --topology out"),
        false => text.push_str("\nthe nearest that fits:"),
    }
    for line in nearest.lines() {
        text.push_str(&format!("\n    {line}"));
    }
    text.push_str(
        "\nor run it on what there is, slower: --simulate. Results are the same, but for rounding where the host computes in \
         a GPU's place, and in mode `off` where ffn_down is not packed: there they depend on the teams",
    );
    text
}

impl RuntimeError {
    /// The code that the program ends with.
    pub fn exit_code(&self) -> u8 {
        if matches!(self, RuntimeError::Interrupted) {
            INTERRUPTED_EXIT_CODE
        } else if self.is_environment() {
            ENVIRONMENT_EXIT_CODE
        } else {
            BAD_INPUT_EXIT_CODE
        }
    }

    /// Whether a NUMA node, or what it has of huge pages, is too small for how a model was to lie.
    pub(crate) fn is_lack_of_room(&self) -> bool {
        let error = match self {
            RuntimeError::Topology(error) => error,
            RuntimeError::Model {
                source: ModelError::Memory(error),
                ..
            } => error,
            _ => return false,
        };
        matches!(
            error,
            TopologyError::NodeFull { .. } | TopologyError::HugePages { .. }
        )
    }

    fn is_environment(&self) -> bool {
        match self {
            RuntimeError::Gguf(error) => error.is_environment(),
            RuntimeError::Model { source, .. } => source.is_environment(),
            RuntimeError::Topology(error) => error.is_environment(),
            RuntimeError::Placement(_) => true,
            RuntimeError::Actor(error) => error.is_environment(),
            RuntimeError::Trace(error) => error.is_environment(),
            RuntimeError::Synth(error) => error.is_environment(),
            RuntimeError::Sidecar(error) => error.is_environment(),
            RuntimeError::Prepare(error) => error.is_environment(),
            RuntimeError::StepOf { source, .. } => source.is_environment(),
            RuntimeError::Inspect(InspectError::Gguf(error)) => error.is_environment(),
            RuntimeError::Inspect(InspectError::Output(_))
            | RuntimeError::OutputClosed
            | RuntimeError::OutputFailed { .. }
            | RuntimeError::InputFailed { .. }
            | RuntimeError::WriteProfile { .. } => true,
            _ => false,
        }
    }
}

impl From<InspectError> for RuntimeError {
    fn from(error: InspectError) -> Self {
        match error {
            InspectError::Output(source) if source.kind() == io::ErrorKind::BrokenPipe => {
                Self::OutputClosed
            }
            error => Self::Inspect(error),
        }
    }
}
