//! `pi-runtime pack`: what each type of down rows costs, then the file.

use std::path::Path;

use pi_actors::faults::Faults;
use pi_kernels::attention::KvType;
use pi_kernels::{ActivationMode, Cpu, QuantType};
use pi_topology::Plan;

use super::args::PackArgs;
use super::interrupt::Interrupt;
use super::output::Output;
use super::progress::LoadBar;
use super::{perplexity, text_file};
use crate::bench::BenchFeeder;
use crate::bench::token_source::TEXT;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::head_sketch::Head;
use crate::model::footprint::Footprint;
use crate::model::predicting::Predicting;
use crate::model::sparsity::{SparsityPlan, writable_type};
use crate::model::{ModelError, Sparsity};
use crate::pack::{PackedOutput, Packer};
use crate::perplexity::Estimate;
use crate::session::{LoadedModel, ModelOptions, N_UBATCH, ThresholdSource, TopologyFile};
use crate::tokenizer::EncodeOptions;
use crate::unfinished_file::UnfinishedFile;

/// Share of active neurons where it cannot be measured.
const ACTIVE_SHARE_ASSUMED: f64 = 0.15;

/// Tokens of text that the share is measured on.
const N_TOKENS_MEASURED: usize = 256;

/// Tokens of a chunk of perplexity.
const N_CTX_PERPLEXITY: usize = 512;

/// Prints the choices and writes the file.
///
/// # Errors
/// The flags, the model, the text or the file system.
pub fn run(args: &PackArgs) -> Result<(), RuntimeError> {
    refuse_input_as_output(&args.input, &args.output)?;
    let interrupt = Interrupt::listen();
    let _answering = interrupt.answer();
    let asked = args.down_type.as_deref().map(writable_type).transpose();
    let chosen = asked.map_err(RuntimeError::DownType)?;
    let file = GgufFile::open(&args.input)?;
    let in_file = |source: ModelError| RuntimeError::Model {
        path: args.input.clone(),
        source,
    };
    let packer = Packer::new(&file).map_err(in_file)?;
    let packing = Packing {
        args,
        chosen,
        packer,
        plan: TopologyFile::read(args.topology.as_deref())?
            .simulating(args.simulate)
            .plan(args.threads.map(usize::from))?,
        interrupt: &interrupt,
    };
    // before the measurements, which may take hours
    let output = packing.create(&args.output, packing.chosen)?;
    packing.print_choices()?;
    packing.write(output)?;
    eprintln!("wrote {}", args.output.display());
    Ok(())
}

/// Packing must not write over what it reads.
fn refuse_input_as_output(input: &Path, output: &Path) -> Result<(), RuntimeError> {
    let same = match (input.canonicalize(), output.canonicalize()) {
        (Ok(input), Ok(output)) => input == output,
        _ => input == output,
    };
    if !same {
        return Ok(());
    }
    Err(RuntimeError::Flag {
        flag: "-o",
        value: output.display().to_string(),
        problem: "that is the file to be read: give the packed model another name".into(),
    })
}

/// A packing on its way.
struct Packing<'a> {
    args: &'a PackArgs,
    packer: Packer<'a>,
    /// Type of all rows, if one was asked for.
    chosen: Option<QuantType>,
    plan: Plan,
    interrupt: &'a Interrupt,
}

impl Packing<'_> {
    /// Prints bytes per token of every choice, and with `-f` its perplexity.
    fn print_choices(&self) -> Result<(), RuntimeError> {
        let text = self.args.file.as_deref().map(text_file::read).transpose()?;
        let share = match self.active_share() {
            Ok(share) => {
                eprintln!(
                    "{:.1} % of the neurons are active on the built-in text",
                    share * 100.0
                );
                share
            }
            Err(error) => {
                let assumed = ACTIVE_SHARE_ASSUMED * 100.0;
                eprintln!(
                    "assuming that {assumed:.0} % of the neurons are active, as the model cannot be run: {error}"
                );
                ACTIVE_SHARE_ASSUMED
            }
        };
        let mut out = Output::default();
        out.line(&table_line(
            "down rows",
            "MB/token",
            text.as_ref().map(|_| "perplexity".into()),
        ))?;
        let dense = self.dense_plan()?;
        let unpacked = match &text {
            Some(text) => Some(self.perplexity(&self.args.input, Sparsity::Off, text)?),
            None => None,
        };
        out.line(&table_line(
            "as in the file (dense)",
            &self.megabytes(&dense, share),
            cell(unpacked),
        ))?;
        for choice in self.choices() {
            let estimate = match &text {
                Some(text) => Some(self.packed_perplexity(choice, text)?),
                None => None,
            };
            let mut name = choice.map_or("by layer", QuantType::name).to_owned();
            if choice == self.written() {
                name.push_str(" (written)");
            }
            let bytes = self.megabytes(&self.packer.plan(choice), share);
            out.line(&table_line(&name, &bytes, cell(estimate)))?;
        }
        Ok(())
    }

    /// The type that is written; none where layers differ.
    fn written(&self) -> Option<QuantType> {
        self.chosen.or_else(|| self.packer.default_type())
    }

    /// What is worth looking at, and what is written.
    fn choices(&self) -> Vec<Option<QuantType>> {
        let mut choices: Vec<Option<QuantType>> =
            self.packer.choices().into_iter().map(Some).collect();
        if !choices.contains(&self.written()) {
            choices.push(self.written());
        }
        choices
    }

    fn dense_plan(&self) -> Result<SparsityPlan, RuntimeError> {
        let (gate, stored) = (
            self.packer.hyperparameters().gate,
            self.packer.tensors().stored_downs(),
        );
        SparsityPlan::resolve(Some(Sparsity::Off), gate, &stored)
            .map_err(|source| self.model_error(source))
    }

    fn megabytes(&self, plan: &SparsityPlan, share: f64) -> String {
        let (hyper, tensors) = (self.packer.hyperparameters(), self.packer.tensors());
        let bytes = Footprint::of(hyper, tensors, plan).bytes(share);
        format!("{:.1}", bytes as f64 / 1e6)
    }

    fn model_error(&self, source: ModelError) -> RuntimeError {
        RuntimeError::Model {
            path: self.args.input.clone(),
            source,
        }
    }

    fn output_error(&self, source: std::io::Error) -> RuntimeError {
        RuntimeError::Flag {
            flag: "-o",
            value: self.args.output.display().to_string(),
            problem: format!("{source}: give the name of a file"),
        }
    }

    fn open(&self, path: &Path, mode: Sparsity, n_ctx: usize) -> Result<LoadedModel, RuntimeError> {
        let options = ModelOptions {
            head: Head::Full,
            path: path.to_path_buf(),
            n_ctx,
            sparsity: Some(mode),
            cpu: Cpu::detect(ActivationMode::Q8),
            kv_type: KvType::F16,
            trace: None,
            tap: None,
            faults: Faults::default(),
            sidecar: None,
            thresholds: ThresholdSource::default(),
            predicting: Predicting::default(),
            replan: None,
            counts: false,
            n_batch: N_UBATCH,
        };
        LoadedModel::open(&options, &self.plan, &LoadBar::default())
    }

    /// Share of neurons that the model activates on the built-in text.
    fn active_share(&self) -> Result<f64, RuntimeError> {
        let n_tokens = N_TOKENS_MEASURED.min(self.packer.hyperparameters().n_ctx_max);
        let model = self.open(&self.args.input, Sparsity::Off, n_tokens)?;
        let mut tokens = model.tokenizer.encode(TEXT, EncodeOptions::PROMPT)?;
        tokens.truncate(n_tokens);
        let run = model.engine.run(BenchFeeder::fill(tokens))?;
        run.outcome.map_err(|error| model.step_error(error))?;
        let share = (run.totals.prefill + run.totals.decode).active_share();
        Ok(share.unwrap_or(ACTIVE_SHARE_ASSUMED))
    }

    fn perplexity(
        &self,
        path: &Path,
        mode: Sparsity,
        text: &str,
    ) -> Result<Estimate, RuntimeError> {
        let n_ctx = N_CTX_PERPLEXITY.min(self.packer.hyperparameters().n_ctx_max);
        let model = self.open(path, mode, n_ctx)?;
        let text_path = self.args.file.as_deref().unwrap_or(Path::new(""));
        let limit = Some(self.args.chunks as usize);
        perplexity::score(&model, text, text_path, limit, &self.interrupt.flag())
    }

    /// Perplexity of the model packed with rows of `choice`, by way of a temporary file beside the output.
    fn packed_perplexity(
        &self,
        choice: Option<QuantType>,
        text: &str,
    ) -> Result<Estimate, RuntimeError> {
        let name = choice.map_or("by layer", QuantType::name);
        eprintln!("packing with {name} to measure it");
        let temporary = UnfinishedFile::named_beside(&self.args.output, name)
            .map_err(|source| self.output_error(source))?;
        self.write(self.create(temporary.path(), choice)?)?;
        self.perplexity(temporary.path(), Sparsity::Exact, text)
    }

    fn create(
        &self,
        path: &Path,
        choice: Option<QuantType>,
    ) -> Result<PackedOutput<'_>, RuntimeError> {
        let created = self.packer.create(path, choice);
        created.map_err(|error| self.write_error(error))
    }

    fn write(&self, output: PackedOutput<'_>) -> Result<(), RuntimeError> {
        match output.write(&|| self.interrupt.requested()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(RuntimeError::Interrupted),
            Err(error) => Err(self.write_error(error)),
        }
    }

    fn write_error(&self, error: ModelError) -> RuntimeError {
        match error {
            ModelError::Gguf(error) => RuntimeError::Gguf(error),
            source => self.model_error(source),
        }
    }
}

fn cell(estimate: Option<Estimate>) -> Option<String> {
    estimate.map(|estimate| format!("{:.4} +/- {:.5}", estimate.ppl, estimate.error))
}

fn table_line(name: &str, megabytes: &str, perplexity: Option<String>) -> String {
    let perplexity = perplexity.map_or_else(String::new, |text| format!("  {text}"));
    format!("{name:<24} {megabytes:>10}{perplexity}")
}
