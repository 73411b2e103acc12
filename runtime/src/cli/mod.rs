//! The command line: what was asked for, done, and the exit code.
//!
//! Text goes to stdout, everything else to stderr. Exit codes: 0,
//! [`BAD_INPUT_EXIT_CODE`](crate::error::BAD_INPUT_EXIT_CODE) for what the user can mend,
//! [`ENVIRONMENT_EXIT_CODE`](crate::error::ENVIRONMENT_EXIT_CODE) for what the machine refuses, 130
//! after Ctrl-C.

pub mod answer_args;
pub mod args;
mod bench;
mod chat;
mod completions;
mod demo_model;
mod doctor;
mod escapes;
mod generate;
mod interrupt;
mod numa_bench;
mod opening;
mod output;
mod pack;
mod perplexity;
mod plan;
mod prepare;
mod progress;
mod synth;
mod text_file;
mod timings;
mod tokenize;
mod topology;
mod topology_measure;
mod trace;
mod user_folder;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::prelude::*;
use tracing_subscriber::{EnvFilter, fmt};

use crate::error::{INTERRUPTED_EXIT_CODE, RuntimeError};
use crate::inspect;
use crate::trace::ControlLog;
use args::{Cli, Command};

pub use timings::Timings;

/// Runs the program with `arguments` (the first is its own name).
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let start = Instant::now();
    let cli = match Cli::try_parse_from(args::normalise(arguments)) {
        Ok(cli) => cli,
        Err(error) => {
            let error = args::led_to_a_key(error);
            // a closed stderr or stdout leaves nothing to say
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    let control = ControlLog::default();
    let logs = start_log(&cli.log_level, cli.is_traced().then_some(&control));
    match logs.and_then(|()| run(&cli, start, &control)) {
        Ok(code) => code,
        Err(RuntimeError::OutputClosed) => ExitCode::SUCCESS,
        Err(RuntimeError::Interrupted) => ExitCode::from(INTERRUPTED_EXIT_CODE),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Logs to stderr what `filter` lets pass, and to `control` what is for the timeline.
fn start_log(filter: &str, control: Option<&ControlLog>) -> Result<(), RuntimeError> {
    let refused = || RuntimeError::LogLevel {
        text: filter.to_owned(),
    };
    // a lone word that is no level would be taken for a module's name
    let is_word = filter.chars().all(char::is_alphanumeric);
    if is_word && filter.parse::<LevelFilter>().is_err() {
        return Err(refused());
    }
    let parsed = EnvFilter::try_new(filter).map_err(|_| refused())?;
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(progress::is_shown() && std::env::var_os("NO_COLOR").is_none())
        .with_filter(parsed);
    tracing_subscriber::registry()
        .with(lines)
        .with(control.map(ControlLog::layer))
        .init();
    Ok(())
}

fn run(cli: &Cli, start: Instant, control: &ControlLog) -> Result<ExitCode, RuntimeError> {
    match &cli.command {
        None => return generate::run(&cli.run, start, control),
        Some(Command::Inspect(args)) => inspect::run(args, &mut std::io::stdout().lock())?,
        Some(Command::Tokenize(args)) => tokenize::run(args)?,
        Some(Command::Pack(args)) => pack::run(args)?,
        Some(Command::Synth(args)) => synth::run(args)?,
        Some(Command::Perplexity(args)) => perplexity::run(args)?,
        Some(Command::Prepare(args)) => prepare::run(args)?,
        Some(Command::Bench(args)) => bench::run(args, control)?,
        Some(Command::NumaBench(args)) => numa_bench::run(args)?,
        Some(Command::Plan(args)) => plan::run(args)?,
        Some(Command::Topology(args)) => topology::run(args)?,
        Some(Command::Doctor(args)) => return doctor::run(args),
        Some(Command::Completions(args)) => completions::run(args)?,
        Some(Command::Man(args)) => completions::man(args)?,
    }
    Ok(ExitCode::SUCCESS)
}
