//! Weights that make numbers that are not finite: the run ends with the first part whose output is
//! not, whatever the tensor, the mode, the instruction set and the arithmetic; the engine goes on.

mod common;

use std::path::Path;

use common::engine::{Greedy, Setup};
use common::gpu::has_gpu;
use common::running::{Folder, run};
use common::tiny_model::TinyModel;
use pi_actors::{ActorError, Feed, Feeder, LogitsWanted, ModelPart, Next};
use pi_kernels::{ActivationMode, Cpu, QuantType, Tier};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::Sparsity;
use pi_runtime::session::{LoadedModel, ModelOptions, Silent};
use pi_topology::{GpuConfig, Machine, Plan, TopologyConfig};

const LAYER: ModelPart = ModelPart::Layer { layer: 1 };

/// Tensors, each with the part that it spoils. Not in the file's order of use: the last layer's.
const TENSORS: [(&str, ModelPart); 12] = [
    ("token_embd.weight", ModelPart::Embedding),
    ("blk.1.attn_norm.weight", LAYER),
    ("blk.1.attn_q.weight", LAYER),
    ("blk.1.attn_k.weight", LAYER),
    ("blk.1.attn_v.weight", LAYER),
    ("blk.1.attn_output.weight", LAYER),
    ("blk.1.ffn_norm.weight", LAYER),
    ("blk.1.ffn_gate.weight", LAYER),
    ("blk.1.ffn_up.weight", LAYER),
    ("blk.1.ffn_down_t.weight", LAYER),
    ("output_norm.weight", ModelPart::Head),
    ("output.weight", ModelPart::Head),
];

fn q8_setup() -> Setup {
    Setup {
        n_ctx: 64,
        threads: vec![1],
        ..Setup::q8()
    }
}

fn f32_setup() -> Setup {
    Setup {
        n_ctx: 64,
        threads: vec![1],
        ..Setup::f32()
    }
}

fn untied(quant: QuantType) -> TinyModel {
    TinyModel {
        tied: false,
        quant,
        ..TinyModel::default()
    }
}

/// Writes `bytes` at `offset` of every row of `tensor` that `wanted` names.
fn plant(path: &Path, tensor: &str, offset: usize, bytes: &[u8], wanted: impl Fn(usize) -> bool) {
    let file = GgufFile::open(path).unwrap();
    let info = file.tensor(tensor).unwrap();
    let (range, n_rows) = (info.file_range(), info.n_rows());
    drop(file);
    let mut content = std::fs::read(path).unwrap();
    let row_bytes = range.len() / n_rows;
    for row in (0..n_rows).filter(|&row| wanted(row)) {
        let at = range.start + row * row_bytes + offset;
        content[at..at + bytes.len()].copy_from_slice(bytes);
    }
    std::fs::write(path, content).unwrap();
}

/// The first number of a row made `value`: of a quantised row, its first scale.
fn spoil(path: &Path, tensor: &str, quant: QuantType, value: f32) {
    let is_norm = tensor.contains("norm");
    if is_norm || quant == QuantType::F32 {
        return plant(path, tensor, 0, &value.to_le_bytes(), |_| true);
    }
    let scale = half::f16::from_f32(value).to_le_bytes();
    // every quantised type in use here begins with its scale, but Q6_K, which ends with it
    let offset = if quant == QuantType::Q6_K { 208 } else { 0 };
    plant(path, tensor, offset, &scale, |_| true);
}

/// Feeds tokens one by one or together, and wants the last one's logits.
struct Tokens {
    tokens: Vec<u32>,
    step: usize,
    given: usize,
    n_logits: usize,
}

impl Tokens {
    fn new(tokens: &[u32], step: usize) -> Self {
        Self {
            tokens: tokens.to_vec(),
            step,
            given: 0,
            n_logits: 0,
        }
    }
}

impl Feeder for Tokens {
    fn next(&mut self) -> Next<'_> {
        let position = self.given;
        self.given = (position + self.step).min(self.tokens.len());
        if position == self.given {
            return Next::Done;
        }
        Next::Feed(Feed {
            tokens: &self.tokens[position..self.given],
            position,
            logits: LogitsWanted::Last,
        })
    }

    fn logits(&mut self, _: usize, logits: &[f32]) {
        assert!(logits.iter().all(|logit| logit.is_finite()));
        self.n_logits += 1;
    }
}

fn tiers() -> Vec<Tier> {
    Tier::ALL
        .into_iter()
        .filter(|&tier| Cpu::new(tier, ActivationMode::F32).is_ok())
        .collect()
}

/// What `tokens` end with on a fresh engine, all in one step and one by one.
fn assert_ends_with(path: &Path, setup: &Setup, part: ModelPart, position: usize, what: &str) {
    let engine = setup.start(path);
    for step in [4, 1] {
        let outcome = engine.run(Tokens::new(&[70, 71, 72, 73], step)).unwrap();
        let error = outcome.outcome.expect_err(what);
        let ActorError::NotFinite {
            part: found,
            position: at,
        } = error
        else {
            panic!("{what}: {error}");
        };
        // the head is computed for the last token of a step only
        let at_head = if part == ModelPart::Head && step == 4 {
            3
        } else {
            position
        };
        assert_eq!((found, at), (part, at_head), "{what}, {step} at once");
    }
}

#[test]
fn nan_in_any_tensor_is_named_in_every_mode_and_tier() {
    let folder = Folder::with(&untied(QuantType::F32));
    let clean = std::fs::read(folder.path("m.gguf")).unwrap();
    let path = folder.path("nan.gguf");
    for (tensor, part) in TENSORS {
        std::fs::write(&path, &clean).unwrap();
        spoil(&path, tensor, QuantType::F32, f32::NAN);
        for sparsity in [Sparsity::Exact, Sparsity::Off] {
            for tier in tiers() {
                let setup = Setup {
                    sparsity: Some(sparsity),
                    tier,
                    ..f32_setup()
                };
                let what = format!("{tensor}, {sparsity:?}, {tier}");
                assert_ends_with(&path, &setup, part, 0, &what);
            }
        }
    }
}

/// One by one, on a GPU and in every division of neurons.
#[test]
fn nan_on_a_gpu_is_named_as_on_the_host() {
    if !has_gpu() {
        return;
    }
    let folder = Folder::with(&untied(QuantType::F32));
    let clean = std::fs::read(folder.path("m.gguf")).unwrap();
    let path = folder.path("nan.gguf");
    for (tensor, part) in TENSORS {
        std::fs::write(&path, &clean).unwrap();
        spoil(&path, tensor, QuantType::F32, f32::NAN);
        for (sparsity, percent) in [Sparsity::Exact, Sparsity::Off]
            .into_iter()
            .flat_map(|sparsity| [100, 50, 0].map(|percent| (sparsity, percent)))
        {
            let config = TopologyConfig {
                gpus: vec![GpuConfig {
                    hot_percent_max: percent,
                    required: true,
                    ..GpuConfig::default()
                }],
                ..TopologyConfig::default()
            };
            let plan = Plan::new(&config, &Machine::discover().unwrap(), None).unwrap();
            let options = ModelOptions {
                sparsity: Some(sparsity),
                n_ctx: 64,
                ..ModelOptions::new(path.clone())
            };
            let model = LoadedModel::open(&options, &plan, &Silent).unwrap();
            let what = format!("{tensor}, {sparsity:?}, {percent} % hot");
            for _ in 0..2 {
                let tokens = Tokens::new(&[70, 71, 72], 1);
                let error = model.engine.run(tokens).unwrap().outcome.expect_err(&what);
                let want = ActorError::NotFinite { part, position: 0 };
                assert_eq!(error.to_string(), want.to_string(), "{what}");
            }
        }
    }
}

#[test]
fn scales_that_are_not_finite_are_not_rounded_away() {
    for (quant, n_embd) in [
        (QuantType::Q4_0, 64),
        (QuantType::Q8_0, 64),
        (QuantType::Q6_K, 256),
    ] {
        let folder = Folder::with(&TinyModel {
            n_embd,
            ..untied(quant)
        });
        let clean = std::fs::read(folder.path("m.gguf")).unwrap();
        let path = folder.path("nan.gguf");
        for (tensor, part) in TENSORS {
            for value in [f32::NAN, f32::INFINITY] {
                // an infinite gate below zero is closed, as it should be
                if value.is_infinite() && tensor.contains("gate") {
                    continue;
                }
                std::fs::write(&path, &clean).unwrap();
                spoil(&path, tensor, quant, value);
                for sparsity in [Sparsity::Exact, Sparsity::Off] {
                    for tier in tiers() {
                        let setup = Setup {
                            sparsity: Some(sparsity),
                            tier,
                            ..q8_setup()
                        };
                        let what = format!("{tensor} {value}, {quant:?}, {sparsity:?}, {tier}");
                        assert_ends_with(&path, &setup, part, 0, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn plain_files_and_two_nodes_name_the_same_layer() {
    let plain = TinyModel {
        neuron_major: false,
        ..untied(QuantType::F32)
    };
    let folder = Folder::with(&plain);
    let path = folder.path("m.gguf");
    // whole rows: what belongs to closed neurons is not read in `exact`
    let row = f32::NAN.to_le_bytes().repeat(plain.n_ff);
    plant(&path, "blk.1.ffn_down.weight", 0, &row, |_| true);
    for sparsity in [Sparsity::Exact, Sparsity::Off] {
        let setup = Setup {
            sparsity: Some(sparsity),
            threads: vec![1, 1],
            ..q8_setup()
        };
        assert_ends_with(&path, &setup, LAYER, 0, "two nodes");
    }
}

#[test]
fn the_first_position_is_named_and_the_engine_goes_on() {
    let folder = Folder::with(&untied(QuantType::F32));
    let path = folder.path("m.gguf");
    let nan = f32::NAN.to_le_bytes();
    plant(&path, "token_embd.weight", 8, &nan, |row| row == 72);
    let setup = q8_setup();
    let want = {
        let clean = Folder::with(&untied(QuantType::F32));
        let engine = setup.start(&clean.path("m.gguf"));
        Greedy::run(&engine, &[70, 71, 73], 4)
    };
    assert_ends_with(&path, &setup, ModelPart::Embedding, 2, "the third token");
    let engine = setup.start(&path);
    let broken = engine.run(Tokens::new(&[70, 71, 72], 1)).unwrap();
    assert!(broken.outcome.is_err());
    assert_eq!(broken.feeder.n_logits, 2, "tokens before it are there");
    assert!(
        Greedy::run(&engine, &[70, 71, 73], 4) == want,
        "the same bits"
    );
}

#[test]
fn overflow_that_a_norm_would_turn_into_zeros_is_named() {
    let folder = Folder::with(&untied(QuantType::F32));
    let path = folder.path("m.gguf");
    // finite, but its square is not
    let huge = 1e25f32.to_le_bytes();
    plant(&path, "blk.0.attn_output.weight", 0, &huge, |_| true);
    let first = ModelPart::Layer { layer: 0 };
    assert_ends_with(&path, &f32_setup(), first, 0, "overflow");
}

#[test]
fn the_program_names_file_layer_and_cure_and_exits_with_2() {
    let folder = Folder::with(&untied(QuantType::F32));
    let path = folder.path("m.gguf");
    spoil(&path, "blk.1.ffn_up.weight", QuantType::F32, f32::NAN);
    let ran = run(&[
        "-m",
        &folder.name("m.gguf"),
        "-p",
        "Hello",
        "-n",
        "4",
        "-t",
        "1",
    ]);
    assert_eq!((ran.code, &*ran.out), (2, ""), "{}", ran.err);
    let error = ran.err.lines().find(|line| line.starts_with("error: "));
    let error = error.expect(&ran.err);
    for part in [
        "m.gguf: ",
        "layer 1 is not finite",
        "position 0",
        "get it again",
    ] {
        assert!(error.contains(part), "{error}");
    }
}
