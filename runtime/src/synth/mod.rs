//! Synthetic models: llama-family files of any shape and type whose ReLU gates fire as planned, with their sidecars.
//!
//! Weights are random bytes. What is planted, and why it is what really runs, is in `docs/synth.md`.

mod blocks;
mod error;
mod frequencies;
mod gates;
mod gaussian;
mod layout;
mod output;
mod plan;
mod random;
mod recency;
mod rows;
mod shape;
mod sidecar;
mod stream;
mod vocabulary;

use std::fs;
use std::path::Path;

use pi_kernels::QuantType;

pub use error::SynthError;
pub use shape::{PRESETS, Preset, SynthOptions, SynthShape};

use crate::gguf::{GgufError, GgufFile, GgufWriter};
use crate::model::Hyperparameters;
use crate::session::LoadObserver;
use crate::sidecar::{default_path, sidecar_header};
use crate::unfinished_file::UnfinishedFile;
use plan::{Plan, SynthTensor};

/// A synthetic model that can be written.
#[derive(Debug)]
pub struct Synthesis {
    plan: Plan,
}

impl Synthesis {
    /// Plans the model that `options` ask for.
    ///
    /// # Errors
    /// [`SynthError::Shape`] names the flag that has to be changed.
    pub fn new(options: &SynthOptions) -> Result<Self, SynthError> {
        options.check()?;
        let Some(recency) = options.recency() else {
            unreachable!("checked")
        };
        Ok(Self {
            plan: Plan::new(options, &recency),
        })
    }

    /// Bytes of the model's tensors.
    pub fn model_bytes(&self) -> u64 {
        self.plan.bytes()
    }

    /// Writes the model to `path` and its sidecar beside it, with `n_threads` threads; both appear when they are whole.
    /// `stop` is asked now and then whether to give up; the answer is whether the files were written.
    ///
    /// # Errors
    /// What the file system refuses; then no file is left, and what was at the paths before stays.
    pub fn write(
        &self,
        path: &Path,
        n_threads: usize,
        observer: &dyn LoadObserver,
        stop: &dyn Fn() -> bool,
    ) -> Result<bool, SynthError> {
        let sidecar_path = default_path(path);
        for target in [path, &sidecar_path] {
            refuse_irregular(target)?;
        }
        let unfinished = |path: &Path| {
            UnfinishedFile::named_beside(path, "synth").map_err(|cause| GgufError::Write {
                path: path.to_owned(),
                action: "create a file in its folder",
                cause,
            })
        };
        let (model_file, sidecar_file) = (unfinished(path)?, unfinished(&sidecar_path)?);
        let output = Output {
            seed: self.plan.options.seed,
            n_threads: n_threads.max(1),
            observer,
            stop,
        };
        let model_bytes = self.plan.bytes();
        observer.begin(model_bytes);
        let mut header = self.model_header()?;
        for tensor in &self.plan.tensors {
            header.add_tensor(&tensor.name, tensor.quant.into(), &tensor.shape())?;
        }
        let named = |error| renamed(error, path);
        let written = output.write(header, model_file.path(), &self.plan.tensors, 0);
        if !written.map_err(named)? {
            return Ok(false);
        }
        let model = GgufFile::open(model_file.path())?;
        let hyper = Hyperparameters::read(&model)?;
        let mut header = sidecar_header(&model, &hyper)?;
        let tensors = self.plan.sidecar(&mut header)?;
        let bytes: u64 = tensors.iter().map(SynthTensor::bytes).sum();
        observer.begin(model_bytes + bytes);
        let named = |error| renamed(error, &sidecar_path);
        let written = output.write(header, sidecar_file.path(), &tensors, model_bytes);
        if !written.map_err(named)? {
            return Ok(false);
        }
        observer.end();
        let rename = |file: UnfinishedFile, path: &Path| {
            file.rename_to(path).map_err(|cause| GgufError::Write {
                path: path.to_owned(),
                action: "give the finished file its name",
                cause,
            })
        };
        // a sidecar without its model is refused by every other one
        rename(sidecar_file, &sidecar_path)?;
        rename(model_file, path)?;
        Ok(true)
    }

    fn model_header(&self) -> Result<GgufWriter, GgufError> {
        let options = &self.plan.options;
        let shape = &options.shape;
        let mut header = GgufWriter::new();
        header.put("general.architecture", "llama")?;
        header.put("general.type", "model")?;
        header.put("general.name", options.name.as_str())?;
        let description = format!(
            "random weights; {:.1} % of the FFN neurons are active per token, skew {}, seed {}",
            options.active * 100.0,
            options.skew,
            options.seed
        );
        header.put("general.description", description.as_str())?;
        header.put("general.quantization_version", 2u32)?;
        if let Some(file_type) = file_type(options.quant) {
            header.put("general.file_type", file_type)?;
        }
        for (key, value) in [
            ("llama.block_count", shape.n_layer),
            ("llama.context_length", shape.n_ctx),
            ("llama.embedding_length", shape.n_embd),
            ("llama.feed_forward_length", shape.n_ff),
            ("llama.attention.head_count", shape.n_head),
            ("llama.attention.head_count_kv", shape.n_head_kv),
            ("llama.rope.dimension_count", shape.n_embd / shape.n_head),
            ("llama.vocab_size", shape.n_vocab),
        ] {
            header.put(key, value as u32)?;
        }
        header.put("llama.rope.freq_base", shape.rope_base as f32)?;
        header.put("llama.attention.layer_norm_rms_epsilon", 1e-5f32)?;
        header.put("llama.hidden_activation", "relu")?;
        vocabulary::put(&mut header, shape.n_vocab)?;
        Ok(header)
    }
}

/// How files are written.
struct Output<'a> {
    seed: u64,
    n_threads: usize,
    observer: &'a dyn LoadObserver,
    stop: &'a dyn Fn() -> bool,
}

impl Output<'_> {
    fn write(
        &self,
        header: GgufWriter,
        path: &Path,
        tensors: &[SynthTensor],
        before: u64,
    ) -> Result<bool, GgufError> {
        let mut stream = header.create(path)?;
        let observed = (before, self.observer);
        if !output::write(
            &mut stream,
            tensors,
            self.seed,
            self.n_threads,
            observed,
            self.stop,
        )? {
            return Ok(false);
        }
        stream.finish().map(|()| true)
    }
}

/// Errors name the file that was asked for, not the one that is on its way.
fn renamed(error: GgufError, asked: &Path) -> GgufError {
    match error {
        GgufError::Write { action, cause, .. } => GgufError::Write {
            path: asked.to_owned(),
            action,
            cause,
        },
        error => error,
    }
}

fn refuse_irregular(path: &Path) -> Result<(), GgufError> {
    match fs::metadata(path) {
        Ok(facts) if !facts.is_file() => Err(GgufError::NotReplaceable {
            path: path.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// llama.cpp's number for files whose matrices are all of one type.
fn file_type(quant: QuantType) -> Option<u32> {
    Some(match quant {
        QuantType::F32 => 0,
        QuantType::F16 => 1,
        QuantType::Q4_0 => 2,
        QuantType::Q4_1 => 3,
        QuantType::Q8_0 => 7,
        QuantType::Q5_0 => 8,
        QuantType::Q5_1 => 9,
        QuantType::Q2_K => 10,
        QuantType::Q6_K => 18,
        QuantType::BF16 => 32,
        QuantType::Q3_K | QuantType::Q4_K | QuantType::Q5_K => return None,
    })
}
