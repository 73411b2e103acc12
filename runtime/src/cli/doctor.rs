//! `pi-runtime doctor`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::demo_model;
use super::output::Output;
use crate::doctor::{self, Facts};
use crate::error::{BAD_INPUT_EXIT_CODE, RuntimeError};

/// Flags of `doctor`.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// Model file (GGUF) to hold against the machine; default: the demo model, where there is one
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Also measure the memory bandwidth
    #[arg(long)]
    pub measure: bool,
    /// Print one JSON object instead of lines
    #[arg(long)]
    pub json: bool,
}

/// Prints what was found; the exit code says whether the program can run.
///
/// # Errors
/// The output.
pub fn run(args: &DoctorArgs) -> Result<ExitCode, RuntimeError> {
    let model = demo_model::or_demo(args.model.as_deref());
    let facts = Facts::gather(model.as_deref(), args.measure);
    let findings = doctor::findings(&facts);
    let mut output = Output::default();
    if args.json {
        let json = doctor::json(&findings).map_err(|error| RuntimeError::OutputFailed {
            source: error.into(),
        })?;
        output.line(&json)?;
    } else {
        output.text(&doctor::text(&findings))?;
    }
    Ok(
        match findings.iter().any(|finding| finding.prevents_running) {
            true => ExitCode::from(BAD_INPUT_EXIT_CODE),
            false => ExitCode::SUCCESS,
        },
    )
}
