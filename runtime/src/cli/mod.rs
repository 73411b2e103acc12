//! The command line: what was asked for, done, and the exit code.
//!
//! Text goes to stdout, everything else to stderr. Exit codes: 0,
//! [`BAD_INPUT_EXIT_CODE`](crate::error::BAD_INPUT_EXIT_CODE) for what the user can mend,
//! [`ENVIRONMENT_EXIT_CODE`](crate::error::ENVIRONMENT_EXIT_CODE) for what the machine refuses, 130
//! after Ctrl-C.

pub mod args;
mod bench;
mod chat;
mod demo_model;
mod doctor;
mod generate;
mod interrupt;
mod opening;
mod output;
mod pack;
mod perplexity;
mod progress;
mod text_file;
mod timings;
mod tokenize;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

use crate::error::{INTERRUPTED_EXIT_CODE, RuntimeError};
use crate::inspect;
use args::{Cli, Command};

pub use timings::Timings;

/// Runs the program with `arguments` (the first is its own name).
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let start = Instant::now();
    let cli = match Cli::try_parse_from(args::normalise(arguments)) {
        Ok(cli) => cli,
        Err(error) => {
            // a closed stderr or stdout leaves nothing to say
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match start_log(&cli.log_level).and_then(|()| run(&cli, start)) {
        Ok(code) => code,
        Err(RuntimeError::OutputClosed) => ExitCode::SUCCESS,
        Err(RuntimeError::Interrupted) => ExitCode::from(INTERRUPTED_EXIT_CODE),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn start_log(filter: &str) -> Result<(), RuntimeError> {
    let refused = || RuntimeError::LogLevel {
        text: filter.to_owned(),
    };
    // a lone word that is no level would be taken for a module's name
    let is_word = filter.chars().all(char::is_alphanumeric);
    if is_word && filter.parse::<LevelFilter>().is_err() {
        return Err(refused());
    }
    let parsed = EnvFilter::try_new(filter).map_err(|_| refused())?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none())
        .init();
    Ok(())
}

fn run(cli: &Cli, start: Instant) -> Result<ExitCode, RuntimeError> {
    match &cli.command {
        None => return generate::run(&cli.run, start),
        Some(Command::Inspect(args)) => inspect::run(args, &mut std::io::stdout().lock())?,
        Some(Command::Tokenize(args)) => tokenize::run(args)?,
        Some(Command::Pack(args)) => pack::run(args)?,
        Some(Command::Perplexity(args)) => perplexity::run(args)?,
        Some(Command::Bench(args)) => bench::run(args)?,
        Some(Command::Doctor(args)) => return doctor::run(args),
    }
    Ok(ExitCode::SUCCESS)
}
