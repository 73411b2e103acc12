//! `pi-runtime bench`.

use std::collections::HashSet;
use std::time::Instant;

use pi_topology::{Plan, read_bandwidth};

use super::args::{BenchArgs, OutputFormat};
use super::interrupt::Interrupt;
use super::output::{Output, output_error};
use super::progress::LoadBar;
use super::trace::Tracer;
use crate::bench::environment::cpu_name;
use crate::bench::table::{Csv, Json, Markdown, RowWriter};
use crate::bench::token_source::TEXT;
use crate::bench::{BenchRow, BenchTest, Measured, Runner, TokenSource};
use crate::calendar::DateTime;
use crate::error::RuntimeError;
use crate::machine_profile::memory_bandwidth;
use crate::session::{LoadedModel, ModelOptions, open_all};
use crate::tokenizer::EncodeOptions;
use crate::trace::ControlLog;

/// Runs every test and prints its row when it is done.
///
/// # Errors
/// The flags, the model, the machine or the output.
pub fn run(args: &BenchArgs, control: &ControlLog) -> Result<(), RuntimeError> {
    if args.trace.trace.is_none() {
        return run_tests(args, &Tracer::default());
    }
    let interrupt = Interrupt::listen();
    let tracer = Tracer::open(&args.trace, control, &interrupt)?;
    tracer.close(run_tests(args, &tracer))
}

fn run_tests(args: &BenchArgs, tracer: &Tracer) -> Result<(), RuntimeError> {
    let plans = plans(args)?;
    let n_threads: Vec<usize> = plans.iter().map(Plan::n_threads).collect();
    let tests = BenchTest::matrix(&args.n_prompt, &args.n_gen, &args.n_depth, &n_threads);
    let n_ctx = tests
        .iter()
        .map(|test| test.n_depth + test.n_prompt + test.n_gen)
        .max()
        .ok_or_else(|| RuntimeError::Flag {
            flag: "-p and -n",
            value: "0".into(),
            problem: "there is nothing to measure: give one of them more than 0".into(),
        })?;
    let mut options = args.model.options(n_ctx)?;
    options.counts = true;
    options.trace = args
        .trace
        .bounds(n_steps(&tests, options.n_batch, args.repetitions));
    let mut writer: Box<dyn RowWriter> = match args.output {
        OutputFormat::Md => Box::new(Markdown),
        OutputFormat::Json => Box::new(Json::default()),
        OutputFormat::Csv => Box::new(Csv::default()),
    };
    let mut out = Output::default();
    for (index, plan) in plans.iter().enumerate() {
        let tests = tests
            .iter()
            .filter(|test| test.n_threads == plan.n_threads());
        let load = Instant::now();
        let bench = PlanBench::open(args, &options, plan, tests.clone())?;
        tracer.loaded(&bench.model, load)?;
        let mut runner = Runner::new(&bench.model, &bench.source);
        if index == 0 {
            writer.header(out.stream()).map_err(output_error)?;
        }
        for &test in tests {
            let time = DateTime::now().iso();
            let start = Instant::now();
            let measured = runner.run(test, args.repetitions.into())?;
            tracer.span("test", start);
            let row = bench.row(test, &measured, time);
            writer.row(out.stream(), &row).map_err(output_error)?;
            if measured.replans.times > 0 {
                eprintln!("{}: {}", test.name(), measured.replans);
            }
        }
        bench.model.verify_again()?;
        for times in bench.model.engine.gpu_times() {
            eprintln!("{times}");
        }
    }
    writer.footer(out.stream()).map_err(output_error)
}

/// Steps of all tests, with one repetition to warm up and one in which GPUs count.
fn n_steps(tests: &[BenchTest], n_batch: usize, repetitions: u16) -> usize {
    let pieces = |n: usize| n.div_ceil(n_batch);
    let steps = tests
        .iter()
        .map(|test| pieces(test.n_depth) + pieces(test.n_prompt) + test.n_gen);
    (usize::from(repetitions) + 2) * steps.sum::<usize>()
}

/// A plan for each number of threads asked for, each once.
fn plans(args: &BenchArgs) -> Result<Vec<Plan>, RuntimeError> {
    if args.threads.is_empty() {
        return Ok(vec![args.model.plan(None)?]);
    }
    let mut seen = HashSet::new();
    args.threads
        .iter()
        .filter(|threads| seen.insert(**threads))
        .map(|threads| args.model.plan(Some(*threads)))
        .collect()
}

/// A model on the threads of one plan.
struct PlanBench {
    model: LoadedModel,
    source: TokenSource,
    options: ModelOptions,
    /// What can be read; none where no test needs it.
    bandwidth: Option<Bandwidth>,
    cpu_name: String,
}

impl PlanBench {
    fn open<'t>(
        args: &BenchArgs,
        options: &ModelOptions,
        plan: &Plan,
        mut tests: impl Iterator<Item = &'t BenchTest>,
    ) -> Result<Self, RuntimeError> {
        // before the engine has the threads
        let bandwidth = match tests.any(|test| test.n_gen > 0) {
            true => Some(Bandwidth::measure(plan)?),
            false => None,
        };
        let model = LoadedModel::open(options, plan, &LoadBar::default())?;
        let source = if args.random_ids {
            TokenSource::Random {
                n_vocab: model.tokenizer.n_vocab() as u32,
            }
        } else {
            TokenSource::Text(model.tokenizer.encode(TEXT, EncodeOptions::TEXT)?)
        };
        Ok(Self {
            model,
            source,
            options: options.clone(),
            bandwidth,
            cpu_name: cpu_name(),
        })
    }

    fn row(&self, test: BenchTest, measured: &Measured, test_time: String) -> BenchRow {
        let work = measured.work;
        let (avg_ns, stddev_ns) = measured.samples.ns_summary();
        let (avg_ts, stddev_ts) = measured.samples.ts_summary();
        let all_bytes = work.weight_bytes + work.kv_bytes;
        let bytes_per_token = all_bytes
            .checked_div(measured.n_tokens as u64)
            .filter(|_| test.n_gen > 0);
        let gb_per_s = bytes_per_token.map(|bytes| bytes as f64 * avg_ts / 1e9);
        let bandwidth = self
            .bandwidth
            .and_then(|bandwidth| bandwidth.of(all_bytes, work.gpu_bytes))
            .map(|bytes| bytes / 1e9)
            .filter(|_| test.n_gen > 0);
        let kv_type = self.options.kv_type.to_string();
        BenchRow {
            build_commit: env!("CARGO_PKG_VERSION").into(),
            build_number: 0,
            cpu_info: self.cpu_name.clone(),
            gpu_info: self.model.engine.gpu_names().join(", "),
            backends: match &self.model.engine.gpu_bytes()[..] {
                [] => "CPU".into(),
                _ => "CUDA".into(),
            },
            model_filename: self.model.path.display().to_string(),
            model_type: self.model.description.name.clone(),
            model_size: self.model.description.size_bytes,
            model_n_params: self.model.description.n_params,
            n_batch: self.model.n_ctx,
            n_ubatch: self.options.n_batch,
            n_threads: test.n_threads,
            type_k: kv_type.clone(),
            type_v: kv_type,
            n_gpu_layers: 0,
            n_prompt: test.n_prompt,
            n_gen: test.n_gen,
            n_depth: test.n_depth,
            test_time,
            avg_ns,
            stddev_ns,
            avg_ts,
            stddev_ts,
            samples_ns: measured.samples.ns.clone(),
            samples_ts: measured.samples.ts.clone(),
            tier: self.options.cpu.tier().name().into(),
            activations: self.options.cpu.mode().to_string(),
            sparsity: self.model.sparsity.mode.name().into(),
            head: self.model.head.name().into(),
            token_source: self.source.name().into(),
            active_share: work.active_share().unwrap_or(0.0),
            bytes_per_token,
            gb_per_s,
            bandwidth_gb_per_s: bandwidth,
            percent_of_byte_limit: gb_per_s
                .zip(bandwidth)
                .map(|(used, limit)| used / limit * 100.0),
        }
    }
}

/// Bytes per second that can be read.
#[derive(Debug, Clone, Copy)]
struct Bandwidth {
    /// By the plan's threads together.
    host: f64,
    /// By the slowest of its GPUs; none where there is none, or it cannot be used.
    gpu: Option<f64>,
}

impl Bandwidth {
    fn measure(plan: &Plan) -> Result<Self, RuntimeError> {
        let gpu = || -> Option<f64> {
            let gpus = open_all(&plan.gpus).ok()?;
            let speeds = gpus.iter().map(|gpu| memory_bandwidth(&gpu.device).ok());
            speeds
                .collect::<Option<Vec<f64>>>()?
                .into_iter()
                .reduce(f64::min)
        };
        Ok(Self {
            host: read_bandwidth(plan)?,
            gpu: gpu(),
        })
    }

    /// At which `bytes` could be read of which GPUs read `gpu_bytes`, one behind the other, and the host the others meanwhile.
    /// None where it is not known.
    fn of(self, bytes: u64, gpu_bytes: u64) -> Option<f64> {
        let host_s = (bytes - gpu_bytes) as f64 / self.host;
        let gpu_s = match gpu_bytes {
            0 => 0.0,
            _ => gpu_bytes as f64 / self.gpu?,
        };
        let seconds = host_s.max(gpu_s);
        (seconds > 0.0).then(|| bytes as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_that_of_the_slower_side() {
        let host = Bandwidth {
            host: 10.0,
            gpu: None,
        };
        assert_eq!(host.of(100, 0), Some(10.0));
        assert_eq!(host.of(0, 0), None);
        let both = Bandwidth {
            host: 10.0,
            gpu: Some(50.0),
        };
        // 2 s beside 4 s
        assert_eq!(both.of(140, 100), Some(35.0));
        // 4 s beside 2 s
        assert_eq!(both.of(220, 200), Some(55.0));
        assert_eq!(both.of(100, 100), Some(50.0));
        assert_eq!(host.of(100, 1), None, "a GPU of unknown speed");
    }
}
