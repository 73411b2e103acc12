//! Preparing a model with a GPU: hidden states, fits, and a sidecar as the host makes it. Where there is no GPU, tests say *skipped*.

mod common;

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::gpu::has_gpu;
use common::running::{Folder, run};
use common::tiny_model::TinyModel;
use common::{relative_error, tiny_synth};
use pi_actors::{Feed, Feeder, LayerTap, LogitsWanted, Next};
use pi_kernels::cuda::Device;
use pi_kernels::{ActBatch, ActivationMode, Cpu, QuantType};
use pi_runtime::gguf::GgufFile;
use pi_runtime::predictor::ahead_trained::Training;
use pi_runtime::predictor::thresholds::{Evaluation, Target};
use pi_runtime::predictor::{
    Ahead, FitGpu, FitOn, LayerSamples, Workers, ahead_svd, ahead_trained, low_rank,
};
use pi_runtime::session::{LoadedModel, ModelOptions, Silent};
use pi_topology::{GpuConfig, Machine, Plan, TopologyConfig};

/// What a tap was shown: residual stream and normed state of each layer, and what entered the head, by position.
#[derive(Debug, Default)]
struct Seen(Mutex<Vec<(usize, usize, Vec<f32>)>>);

/// Stands for the head where layers are told.
const HEAD: usize = usize::MAX;

impl Seen {
    fn add(&self, layer: usize, position: usize, rows: &[f32]) {
        let mut all = self.0.lock().unwrap();
        all.push((layer, position, rows.to_vec()));
    }

    fn sorted(&self) -> Vec<(usize, usize, Vec<f32>)> {
        let mut all = std::mem::take(&mut *self.0.lock().unwrap());
        all.sort_by_key(|(layer, position, _)| (*layer, *position));
        all
    }
}

impl LayerTap for Seen {
    fn ffn_input(&self, layer: usize, first_position: usize, residual: &[f32], normed: &ActBatch) {
        let n_embd = normed.n_cols();
        for (token, row) in residual.chunks_exact(n_embd).enumerate() {
            let both = [row, &normed.token(token).values[..n_embd]].concat();
            self.add(layer, first_position + token, &both);
        }
    }

    fn head_input(&self, first_position: usize, n_tokens: usize, normed: &ActBatch) {
        for token in 0..n_tokens {
            let row = &normed.token(token).values[..normed.n_cols()];
            self.add(HEAD, first_position + token, row);
        }
    }
}

/// Feeds 100 tokens.
struct Hundred(Option<Vec<u32>>, Vec<u32>);

impl Feeder for Hundred {
    fn next(&mut self) -> Next<'_> {
        let Some(tokens) = self.0.take() else {
            return Next::Done;
        };
        self.1 = tokens;
        Next::Feed(Feed {
            tokens: &self.1,
            position: 0,
            logits: LogitsWanted::From(50),
        })
    }

    fn logits(&mut self, _: usize, _: &[f32]) {}
}

/// A machine with so many GPUs of which each holds this many of a hundred neurons.
fn plan(percents: &[u8]) -> Plan {
    let gpu = |percent: &u8| GpuConfig {
        hot_percent_max: *percent,
        required: true,
        ..GpuConfig::default()
    };
    let config = TopologyConfig {
        gpus: percents.iter().map(gpu).collect(),
        ..TopologyConfig::default()
    };
    Plan::new(&config, &Machine::discover().unwrap(), None).unwrap()
}

/// All that a tap sees of 100 tokens, 33 at a time and one alone.
fn states(model: &Path, mode: ActivationMode, plan: &Plan) -> Vec<(usize, usize, Vec<f32>)> {
    let seen = Arc::new(Seen::default());
    let options = ModelOptions {
        cpu: Cpu::detect(mode),
        n_ctx: 128,
        n_batch: 33,
        tap: Some(seen.clone()),
        ..ModelOptions::new(model.to_owned())
    };
    let loaded = LoadedModel::open(&options, plan, &Silent).unwrap();
    assert_eq!(loaded.engine.gpu_names().len(), plan.gpus.len());
    let tokens = (0..100).map(|n| n * n % 4096).collect();
    let run = loaded.engine.run(Hundred(Some(tokens), vec![])).unwrap();
    run.outcome.unwrap();
    seen.sorted()
}

#[test]
fn hidden_states_are_the_host_s() {
    if !has_gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_synth::write(folder.path());
    for (mode, limit) in [(ActivationMode::F32, 1e-3), (ActivationMode::Q8, 3e-2)] {
        let host = states(&model, mode, &plan(&[]));
        // each layer sees all tokens, and the head the second half
        assert_eq!(host.len(), 4 * 100 + 50);
        for percent in [100, 50, 0] {
            let on_gpu = states(&model, mode, &plan(&[percent]));
            assert_eq!(on_gpu.len(), host.len());
            for (found, expected) in on_gpu.iter().zip(&host) {
                assert_eq!((found.0, found.1), (expected.0, expected.1));
                let error = relative_error(&found.2, &expected.2);
                assert!(
                    error <= limit,
                    "{mode}, {percent} %, layer {}, position {}: {error}",
                    found.0,
                    found.1
                );
            }
        }
    }
}

/// Gates that lie on both sides of some directions, so that a linear predictor sees half of each.
fn samples(n_tokens: usize) -> LayerSamples {
    let (n_embd, n_ff) = (96, 640);
    let mut state = 1u64;
    let mut draw = || {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let x: Vec<f32> = (0..n_tokens * n_embd).map(|_| draw()).collect();
    let gates: Vec<f32> = x
        .chunks_exact(n_embd)
        .flat_map(|x| {
            (0..n_ff)
                .map(|i| 2.0 * x[i % 24].abs() + x[24 + i % 72] - 1.9)
                .collect::<Vec<_>>()
        })
        .collect();
    LayerSamples {
        n_tokens,
        n_embd,
        n_ff,
        residual_before: Some(x.clone()),
        x,
        contributions: gates.iter().map(|gate| gate.max(0.0)).collect(),
        gates,
    }
}

#[test]
fn fits_are_the_host_s_but_for_rounding() {
    if !has_gpu() {
        return;
    }
    let samples = samples(2400);
    let workers = Workers::new(NonZeroUsize::new(2).unwrap());
    let gpu = FitGpu::new(Device::open(0).unwrap(), 1 << 30);
    let too_small = FitGpu::new(Device::open(0).unwrap(), 1 << 10);
    let cpu = Cpu::detect(ActivationMode::Q8);
    let on = |gpu| FitOn { workers, gpu };
    let training = Training {
        n_epochs: 6,
        rate: 1e-2,
        quant: QuantType::Q8_0,
        ..Training::default()
    };
    let near = |found: &[f32], expected: &[f32], limit: f32, what: &str| {
        let error = relative_error(found, expected);
        assert!(error <= limit, "{what}: {error}");
        assert!(error > 0.0, "{what}: the GPU took no part");
    };
    let kept = |mut ahead: Ahead| -> Evaluation {
        ahead.calibrate(cpu, workers, &samples, Target::MassKept(0.9))
    };
    let svd = |gpu| ahead_svd::fit(&samples, on(gpu), 32, QuantType::F32).unwrap();
    let [host, ours, fallen_back] = [None, Some(&gpu), Some(&too_small)].map(svd);
    let product = |ahead: &Ahead| ahead.products(cpu, workers, &samples.x);
    near(&product(&ours), &product(&host), 1e-3, "a linear predictor");
    assert_eq!(fallen_back, host, "what finds no room is the host's");
    let sketch = |gpu| {
        low_rank::fit(&samples, on(gpu), 32)
            .unwrap()
            .at(32, QuantType::F32)
            .unwrap()
    };
    let scores = |gpu| sketch(gpu).scores(cpu, workers, &samples.x);
    near(&scores(Some(&gpu)), &scores(None), 1e-3, "a sketch");
    let trained = |gpu| {
        let mut steps = vec![];
        let fitted = ahead_trained::fit(&samples, on(gpu), &training, |done, all| {
            steps.push((done, all));
        });
        assert_eq!(steps.last(), Some(&(6 * 7, 6 * 7)));
        fitted.unwrap()
    };
    let [host, ours, again, fallen_back] =
        [None, Some(&gpu), Some(&gpu), Some(&too_small)].map(trained);
    assert_eq!(ours, again, "the same bits every time");
    assert_eq!(fallen_back, host, "what finds no room is the host's");
    let [host, ours, linear] = [host, ours, svd(Some(&gpu))].map(kept);
    let difference = (ours.candidates - host.candidates).abs();
    assert!(difference < 0.01, "{ours:?} against {host:?}");
    assert!(
        ours.candidates < 0.95 * linear.candidates,
        "{ours:?} against {linear:?}"
    );
}

#[test]
fn a_model_is_prepared_on_a_gpu() {
    if !has_gpu() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let model = tiny_synth::write(folder.path());
    let name = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let topology = |keys: &str| {
        std::fs::write(
            name("t.toml"),
            format!("[[gpu]]\nrequired = true\n{keys}\n"),
        )
        .unwrap();
        name("t.toml")
    };
    let prepare = |output: &str, more: &[&str]| {
        let model = model.to_str().unwrap();
        let fixed = ["prepare", "-m", model, "-o", output, "--chunks", "8"];
        run(&[&fixed[..], more].concat())
    };
    let figures = |path: &str| {
        let file = GgufFile::open(path).unwrap();
        let of = |key: &str| {
            file.metadata()
                .require_f32(&format!("sparse.report.{key}"))
                .unwrap()
        };
        let modes = ["off", "exact", "predicted"];
        let perplexities = modes.map(|mode| of(&format!("perplexity.{mode}")));
        let kept = file
            .metadata()
            .get_array("sparse.report.mass_kept")
            .unwrap();
        let kept = kept.unwrap().to_f32s().unwrap();
        (perplexities, kept)
    };
    let host = prepare(&name("host.gguf"), &[]);
    assert_eq!(host.code, 0, "{}", host.err);
    let (host, host_kept) = figures(&name("host.gguf"));
    for keys in ["", "hot_percent_max = 40"] {
        let topology = topology(keys);
        let ran = prepare(&name("gpu.gguf"), &["--topology", &topology]);
        assert_eq!(ran.code, 0, "{}", ran.err);
        for words in ["in its place", "too much for the GPU"] {
            assert!(!ran.err.contains(words), "{}", ran.err);
        }
        let (found, kept) = figures(&name("gpu.gguf"));
        for (found, expected) in found.iter().zip(host) {
            assert!(
                (found / expected - 1.0).abs() < 0.02,
                "{found}, not {expected}"
            );
        }
        for (found, expected) in kept.iter().zip(&host_kept) {
            assert!((found - expected).abs() < 0.01, "{found}, not {expected}");
        }
        std::fs::remove_file(name("gpu.gguf")).unwrap();
    }
    let topology = topology("");
    let ran = prepare(&name("gpu.gguf"), &["--topology", &topology, "-b", "4"]);
    assert_eq!(ran.code, 2, "{}", ran.err);
    assert!(ran.err.contains("a larger -b"), "{}", ran.err);
    // of gates that never close nothing is found out on a GPU
    let silu = Folder::with(&TinyModel {
        gate: None,
        quant: QuantType::Q8_0,
        neuron_major: false,
        ..TinyModel::default()
    });
    let (model, output) = (silu.name("m.gguf"), silu.name("s.gguf"));
    let fixed = ["prepare", "-m", &model, "-o", &output, "--chunks", "8"];
    let ran = run(&[&fixed[..], &["--topology", &topology]].concat());
    assert_eq!(ran.code, 0, "{}", ran.err);
}
