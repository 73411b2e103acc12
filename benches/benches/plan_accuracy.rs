//! How near `plan` comes: its forecast of a decoded token beside what `bench` measures, in turns.
//!
//! `cargo bench -p pi-benches --bench plan_accuracy -- [MODEL…]`; without a model the demo model. Fails where a median
//! is off by more than 15 %.
//!
//! The text that is decoded is not the one that was profiled: its own share of open gates, counted in `exact`, is what is
//! planned for.

use std::path::{Path, PathBuf};

use pi_runtime::bench::{BenchTest, Runner, TokenSource};
use pi_runtime::model::Sparsity;
use pi_runtime::model::predicting::{Predict, PredictBy, Predicting};
use pi_runtime::plan::{FrequencySource, PlanRequest, plan};
use pi_runtime::session::{LoadedModel, ModelOptions, Silent, TopologyFile};
use pi_runtime::tokenizer::EncodeOptions;

const DEMO: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../models/smollm2-135m-reglu-q4_0.gguf"
);
const N_TOKENS: usize = 128;
const N_CTX: usize = 512;
const ROUNDS: usize = 7;
const TOLERANCE: f64 = 0.15;

fn main() {
    // flags are cargo's
    let mut models: Vec<PathBuf> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .map(PathBuf::from)
        .collect();
    if models.is_empty() {
        models.push(DEMO.into());
    }
    println!("ms a token, decode of {N_TOKENS} tokens of text, {ROUNDS} rounds in turns, medians");
    println!("model | threads | mode | open gates | candidates | planned | measured | off by");
    let mut far = 0;
    for model in &models {
        for threads in [1, 2] {
            let mut active = None;
            for mode in [Sparsity::Exact, Sparsity::Off, Sparsity::Predicted] {
                far += usize::from(!compare(model, threads, mode, &mut active));
            }
        }
    }
    if far > 0 {
        eprintln!(
            "{far} plans are off by more than {:.0} %",
            TOLERANCE * 100.0
        );
        std::process::exit(1);
    }
}

/// Prints a row; whether the plan is near enough. `active` is what `exact` found of the text.
fn compare(model: &Path, threads: usize, mode: Sparsity, active: &mut Option<f64>) -> bool {
    let Ok(machine) = TopologyFile::default().plan(Some(threads)) else {
        println!("skipped: {threads} threads cannot be had here");
        return true;
    };
    let options = ModelOptions {
        n_ctx: N_CTX,
        sparsity: Some(mode),
        // as the program runs it where nothing is said
        predicting: Predicting {
            by: Predict::All(PredictBy::InLayer),
            prefetch: true,
        },
        ..ModelOptions::new(model.to_path_buf())
    };
    let loaded = match LoadedModel::open(&options, &machine, &Silent) {
        Ok(loaded) => loaded,
        Err(error) => {
            println!("skipped: {error}");
            return true;
        }
    };
    let text = loaded
        .tokenizer
        .encode(pi_runtime::bench::token_source::TEXT, EncodeOptions::TEXT)
        .expect("a text");
    let source = TokenSource::Text(text);
    let mut runner = Runner::new(&loaded, &source);
    let test = BenchTest {
        n_prompt: 0,
        n_gen: N_TOKENS,
        n_depth: 0,
        n_threads: threads,
    };
    let warm_up = runner.run(test, 1).expect("it decodes");
    if mode == Sparsity::Exact {
        *active = warm_up.work.active_share();
    }
    let candidates = warm_up.work.candidate_share().unwrap_or(1.0);
    let request = PlanRequest {
        model: options.clone(),
        plan: machine,
        depth: 0,
        active: *active,
        profile: None,
        gpus: vec![],
    };
    let (mut planned, mut measured) = (Vec::new(), Vec::new());
    let mut assumed = "";
    for _ in 0..ROUNDS {
        let run = runner.run(test, 1).expect("it decodes");
        measured.push(run.samples.ns[0] as f64 / N_TOKENS as f64 / 1e6);
        let report = plan(&request).expect("it plans");
        if report.frequency_source == FrequencySource::Assumed && mode != Sparsity::Off {
            assumed = " (frequencies assumed)";
        }
        planned.push(report.modes[0].token_ms());
    }
    let (planned, measured) = (median(planned), median(measured));
    let off = planned / measured - 1.0;
    println!(
        "{} | {threads} | {} | {:.1} % | {:.1} % | {planned:.3} | {measured:.3} | {:+.1} %{assumed}",
        model.file_name().unwrap_or_default().display(),
        mode.name(),
        active.unwrap_or(1.0) * 100.0,
        candidates * 100.0,
        off * 100.0,
    );
    off.abs() <= TOLERANCE
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
