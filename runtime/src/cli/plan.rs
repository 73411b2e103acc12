//! `pi-runtime plan`.

use clap::{Args, ValueEnum};

use super::args::ModelArgs;
use super::output::Output;
use crate::error::RuntimeError;
use crate::plan::{PlanRequest, PlannedGpu, plan};

/// Flags of `plan`.
#[derive(Debug, Clone, Args)]
pub struct PlanArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Context in tokens; 0: the model's own, at most 4096
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 0)]
    pub n_ctx: u32,
    /// Tokens already in the context
    #[arg(short = 'd', long = "n-depth", value_name = "N", default_value_t = 0)]
    pub n_depth: u32,
    /// Per cent of neurons that a token activates: texts differ [default: what the sidecar's profile says]
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub active: Option<f64>,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Output format
    #[arg(short = 'o', long, value_enum, value_name = "FORMAT", default_value_t = PlanFormat::Text)]
    pub output: PlanFormat,
}

/// A share in per cent.
fn percent(text: &str) -> Result<f64, String> {
    let percent = text.trim_end_matches('%').trim().parse().ok();
    let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
    percent.ok_or_else(|| "not from 0 to 100".to_owned())
}

/// `-o` of `plan`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PlanFormat {
    /// Tables
    Text,
    /// One object
    Json,
}

/// Plans, measures, and prints.
///
/// # Errors
/// The flags, the model, its sidecar, the machine or the output.
pub fn run(args: &PlanArgs) -> Result<(), RuntimeError> {
    let (plan_of_threads, profile) = args.model.plan_with_profile(args.threads)?;
    let model = args.model.options(args.n_ctx as usize)?;
    let gpus = PlannedGpu::open_all(&plan_of_threads).map_err(|source| RuntimeError::Model {
        path: model.path.clone(),
        source: source.into(),
    })?;
    let request = PlanRequest {
        model,
        plan: plan_of_threads,
        profile,
        gpus,
        depth: args.n_depth as usize,
        active: args.active.map(|percent| percent / 100.0),
    };
    let report = plan(&request)?;
    let mut output = Output::default();
    match args.output {
        PlanFormat::Text => output.text(&report.text()),
        PlanFormat::Json => output.line(&format!("{:#}", report.json())),
    }
}
