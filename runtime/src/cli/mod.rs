//! The command line: what was asked for, done, and the exit code.
//!
//! Text goes to stdout, everything else to stderr. Exit codes: 0, [`BAD_INPUT_EXIT_CODE`] for what the user can
//! mend, [`ENVIRONMENT_EXIT_CODE`] for what the machine refuses, 130 after Ctrl-C.

pub mod args;
mod demo_model;
mod interrupt;
mod output;
mod text_file;
mod timings;
mod tokenize;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use crate::error::RuntimeError;
use crate::inspect;
use args::{Cli, Command};

pub use timings::Timings;

/// Runs the program with `arguments` (the first is its own name).
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args::normalise(arguments)) {
        Ok(cli) => cli,
        Err(error) => {
            // a closed stderr or stdout leaves nothing to say
            let _ = error.print();
            return ExitCode::from(error.exit_code() as u8);
        }
    };
    match start_log(&cli.log_level).and_then(|()| run(cli)) {
        Ok(code) => code,
        Err(RuntimeError::OutputClosed) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn start_log(filter: &str) -> Result<(), RuntimeError> {
    let parsed = EnvFilter::try_new(filter).map_err(|_| RuntimeError::LogLevel {
        text: filter.to_owned(),
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}

fn run(cli: Cli) -> Result<ExitCode, RuntimeError> {
    match cli.command {
        Some(Command::Inspect(args)) => inspect::run(&args, &mut std::io::stdout().lock())?,
        Some(Command::Tokenize(args)) => tokenize::run(&args)?,
        _ => todo!(),
    }
    Ok(ExitCode::SUCCESS)
}
