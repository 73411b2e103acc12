//! `pi-runtime prepare`: stages with their bars, then what they found.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::args::ModelArgs;
use super::interrupt::Interrupt;
use super::output::Output;
use super::{progress, text_file};
use pi_topology::Predict;

use crate::error::RuntimeError;
use crate::head_sketch::Head;
use crate::prepare::{
    AheadKind, DENSITY_MAX, N_PASSAGES_MIN, Observer, Preparation, PrepareOptions, Prepared, Stage,
    plots, profile_table, report_table,
};
use crate::sidecar;

/// Flags of `prepare`.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct PrepareArgs {
    /// One stage alone.
    #[command(subcommand)]
    pub stage: Option<PrepareStage>,
    /// All stages, when none is named.
    #[command(flatten)]
    pub all: StageArgs,
}

/// A stage alone: it makes its part of the sidecar anew, and leaves the others
#[derive(Debug, Clone, Subcommand)]
pub enum PrepareStage {
    /// Count how often each neuron fires
    Profile(StageArgs),
    /// Fit predictors of the neurons that fire (ReLU models)
    Predictors(StageArgs),
    /// Choose thresholds that keep the wanted quality
    Thresholds(StageArgs),
    /// Fit the sketch of the output head
    Head(StageArgs),
    /// Measure on held-out text what the sidecar gives
    Report(StageArgs),
}

/// Flags of every stage.
#[derive(Debug, Clone, Args)]
pub struct StageArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to learn from; may be repeated; default: the built-in one
    #[arg(short = 'f', long = "file", value_name = "TEXT")]
    pub files: Vec<PathBuf>,
    /// Sidecar to write; default: the model's name with .sparse.gguf for .gguf
    #[arg(short = 'o', long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Passages of 512 tokens to learn from, evenly over the text; default: 40, fewer for large models
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(N_PASSAGES_MIN as i64..))]
    pub chunks: Option<u32>,
    /// How much higher than that of `exact` (`off` for SiLU and GELU models) the perplexity may be
    #[arg(long, value_name = "PERCENT", default_value = "0.5%", value_parser = percent)]
    pub quality: f64,
    /// Predictors one layer ahead: trained, or the best linear map of low rank, which is fitted faster
    #[arg(long, value_enum, value_name = "KIND", default_value_t = AheadArg::Trained)]
    pub ahead: AheadArg,
    /// Seed of what is drawn; the same seed, model and text give the same sidecar
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u32,
    /// Folder to draw the profile into, as SVG
    #[arg(long, value_name = "DIR")]
    pub plot: Option<PathBuf>,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
}

/// `--ahead`
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AheadArg {
    /// fc2·relu(fc1·h)
    Trained,
    /// Linear
    Svd,
}

/// A share, given in percent with or without the sign.
fn percent(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    match number.parse::<f64>() {
        Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(percent / 100.0),
        _ => Err("give a percentage above 0, such as 0.5%".into()),
    }
}

impl PrepareArgs {
    fn stages(&self) -> (Vec<Stage>, &StageArgs) {
        match &self.stage {
            None => (Stage::ALL.to_vec(), &self.all),
            Some(PrepareStage::Profile(args)) => (vec![Stage::Profile], args),
            Some(PrepareStage::Predictors(args)) => (vec![Stage::Predictors], args),
            Some(PrepareStage::Thresholds(args)) => (vec![Stage::Thresholds], args),
            Some(PrepareStage::Head(args)) => (vec![Stage::Head], args),
            Some(PrepareStage::Report(args)) => (vec![Stage::Report], args),
        }
    }
}

/// Runs the stages and prints what they found.
///
/// # Errors
/// The flags, the model, the text, the machine or the file system.
pub fn run(args: &PrepareArgs) -> Result<(), RuntimeError> {
    let start = Instant::now();
    let interrupt = Interrupt::listen();
    let _answering = interrupt.answer();
    let (stages, args) = args.stages();
    let options = options(args, stages)?;
    let partial = options.output.clone();
    let observer = Arc::new(Bars::default());
    let preparation = Preparation::open(options, observer.clone(), interrupt.flag())?;
    let prepared = preparation.run().inspect_err(|error| {
        observer.end();
        if matches!(error, RuntimeError::Interrupted) {
            eprintln!(
                "interrupted: what is done is kept in {}.partial, and the same command goes on from there",
                partial.display()
            );
        }
    })?;
    print(&prepared, args)?;
    let megabytes = prepared.size_bytes as f64 / 1e6;
    let seconds = start.elapsed().as_secs_f64();
    let path = prepared.path.display();
    eprintln!("wrote {path} ({megabytes:.1} MB) in {seconds:.0} s");
    Ok(())
}

fn options(args: &StageArgs, stages: Vec<Stage>) -> Result<PrepareOptions, RuntimeError> {
    let read = |path: &PathBuf| {
        let text = text_file::read_as_it_is(path)?;
        Ok::<_, RuntimeError>((path.display().to_string(), text))
    };
    let texts = args.files.iter().map(read).collect::<Result<_, _>>()?;
    refuse_modes(&args.model)?;
    let mut model = args.model.options(0)?;
    // what is prepared depends on the model, texts and the seed alone
    model.predicting.by = Predict::Auto;
    let output = match &args.output {
        Some(path) => path.clone(),
        None => sidecar::default_path(&model.path),
    };
    Ok(PrepareOptions {
        plan: args.model.plan(args.threads)?,
        model,
        output,
        texts,
        n_passages: args.chunks.map(|n| n as usize),
        seed: args.seed,
        ahead: match args.ahead {
            AheadArg::Trained => AheadKind::Trained,
            AheadArg::Svd => AheadKind::Svd,
        },
        quality: args.quality,
        stages,
    })
}

/// Flags of running that mean nothing here.
fn refuse_modes(model: &ModelArgs) -> Result<(), RuntimeError> {
    let refused = |flag, value, problem: &str| {
        Err(RuntimeError::Flag {
            flag,
            value,
            problem: problem.into(),
        })
    };
    if let Some(mode) = model.sparsity {
        let problem = "prepare runs each mode that it needs: leave it out";
        return refused("--sparsity", format!("{mode:?}").to_lowercase(), problem);
    }
    if model.head == Head::Sparse {
        let problem = "prepare makes its sketch: leave it out";
        return refused("--head", "sparse".into(), problem);
    }
    if let Some(path) = &model.sidecar {
        let problem = "prepare makes the sidecar: name it with -o";
        return refused("--sidecar", path.display().to_string(), problem);
    }
    Ok(())
}

fn print(prepared: &Prepared, args: &StageArgs) -> Result<(), RuntimeError> {
    let mut out = Output::default();
    if let Some(profile) = &prepared.profile {
        out.line(&profile_table(profile))?;
        if let Some(folder) = &args.plot {
            let names = plots::write_profile(folder, profile)?;
            eprintln!("drew {} in {}", names.join(" and "), folder.display());
        }
        if prepared.is_relu && profile.density() > DENSITY_MAX {
            eprintln!(
                "more than {:.0} % of the neurons are active: there is nothing to skip, so that the sidecar holds the profile only; run the model dense (--sparsity off)",
                DENSITY_MAX * 100.0
            );
        }
    }
    if let Some(report) = &prepared.report {
        out.line(&report_table(report))?;
    }
    Ok(())
}

/// A bar for the part under way, and a line for each part that has ended.
#[derive(Debug, Default)]
struct Bars {
    part: Mutex<Option<Part>>,
}

#[derive(Debug)]
struct Part {
    what: String,
    start: Instant,
    bar: ProgressBar,
}

impl Bars {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Part>> {
        self.part.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Bars {
    fn begin(&self, what: &str, total: usize) {
        let target = match progress::is_shown() {
            true => ProgressDrawTarget::stderr_with_hz(10),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(total as u64), target);
        let style = ProgressStyle::with_template("{msg:24} {bar:40} {pos} of {len}, {eta} left");
        let bar = match style {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        };
        bar.set_message(what.to_owned());
        *self.lock() = Some(Part {
            what: what.to_owned(),
            start: Instant::now(),
            bar,
        });
    }

    fn at(&self, done: usize) {
        if let Some(part) = &*self.lock() {
            part.bar.set_position(done as u64);
        }
    }

    fn end(&self) {
        if let Some(Part { what, start, bar }) = self.lock().take() {
            // finishing would set the position to the end
            let (done, total) = (bar.position(), bar.length().unwrap_or(0));
            bar.finish_and_clear();
            let seconds = start.elapsed().as_secs_f64();
            eprintln!("{what}: {done} of {total} in {seconds:.1} s");
        }
    }

    fn say(&self, line: &str) {
        match &*self.lock() {
            Some(part) => part.bar.suspend(|| eprintln!("{line}")),
            None => eprintln!("{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quality_is_a_percentage_above_zero() {
        assert_eq!(percent("0.5%"), Ok(0.005));
        assert_eq!(percent("1"), Ok(0.01));
        for bad in ["0", "-1%", "x", "nan", "101%", ""] {
            assert!(percent(bad).is_err(), "{bad}");
        }
    }
}
