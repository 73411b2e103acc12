//! Collecting what enters the head while a model reads a text.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pi_actors::{Feed, Feeder, LayerTap, LogitsWanted, Next};
use pi_kernels::ActBatch;

use super::{FitOptions, HeadSketch, HeadSketchError, fit};
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::{Hyperparameters, ModelTensors};
use crate::session::LoadedModel;

/// Tokens of a piece of text that is read with an empty context.
const CHUNK_TOKENS: usize = 512;

/// Normed hidden states, as they enter a head.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HeadSamples {
    /// Values of each.
    pub n_embd: usize,
    /// `[n_tokens, n_embd]` f32.
    pub values: Vec<f32>,
}

impl HeadSamples {
    /// Hidden states.
    pub fn n_tokens(&self) -> usize {
        self.values.len().checked_div(self.n_embd).unwrap_or(0)
    }

    /// Hidden state `token`.
    pub fn token(&self, token: usize) -> &[f32] {
        &self.values[token * self.n_embd..(token + 1) * self.n_embd]
    }
}

/// Keeps the hidden states that enter the head.
#[derive(Debug, Default)]
pub struct HeadTap {
    samples: Mutex<HeadSamples>,
}

impl HeadTap {
    /// Takes out what has been collected.
    pub fn take(&self) -> HeadSamples {
        std::mem::take(&mut self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, HeadSamples> {
        // samples are whole after every token
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LayerTap for HeadTap {
    fn ffn_input(&self, _: usize, _: usize, _: &[f32], _: &ActBatch) {}

    fn head_input(&self, _first_position: usize, n_tokens: usize, normed: &ActBatch) {
        let mut samples = self.lock();
        samples.n_embd = normed.n_cols();
        for token in 0..n_tokens {
            let values = &normed.token(token).values[..normed.n_cols()];
            samples.values.extend_from_slice(values);
        }
    }
}

/// Reads a piece of text in an empty context, and has the head computed for every token.
struct Reader(Option<Vec<u32>>, Vec<u32>);

impl Feeder for Reader {
    fn next(&mut self) -> Next<'_> {
        let Some(tokens) = self.0.take() else {
            return Next::Done;
        };
        self.1 = tokens;
        Next::Feed(Feed {
            tokens: &self.1,
            position: 0,
            logits: LogitsWanted::From(0),
        })
    }

    fn logits(&mut self, _: usize, _: &[f32]) {}
}

/// Makes a sketch of the head of `model`, which was opened with `tap`, from what enters the head while it reads `tokens`.
///
/// The tokens are cut into chunks of 512 (or the context), evenly over the text where there are more than
/// `options.n_tokens_max`. None where a sketch would save too little. `progress` hears the share that is done.
///
/// # Errors
/// A step that failed, an interrupt, or a text that is too short.
pub fn prepare_head(
    model: &LoadedModel,
    tap: &HeadTap,
    tokens: &[u32],
    options: &FitOptions,
    interrupt: &Arc<AtomicBool>,
    progress: &(dyn Fn(f64) + Sync),
) -> Result<Option<HeadSketch>, RuntimeError> {
    let _ = tap.take();
    let chunk = CHUNK_TOKENS.min(model.n_ctx);
    let whole = tokens.len() / chunk;
    let wanted = (options.n_tokens_max / chunk).clamp(1, whole.max(1));
    let chunks = (0..wanted.min(whole)).map(|n| {
        let first = n * whole / wanted * chunk;
        let mut chunk = tokens[first..first + chunk].to_vec();
        if let Some(bos) = model.tokenizer.bos().filter(|_| model.tokenizer.adds_bos()) {
            chunk[0] = bos;
        }
        chunk
    });
    let chunks: Vec<Vec<u32>> = chunks.collect();
    for (n, chunk) in chunks.iter().enumerate() {
        read(model, chunk)?;
        if interrupt.load(Ordering::Acquire) {
            return Err(RuntimeError::Interrupted);
        }
        progress(0.5 * (n + 1) as f64 / chunks.len() as f64);
    }
    let samples = tap.take();
    if samples.n_tokens() == 0 && !chunks.is_empty() {
        return Err(HeadSketchError::NoTap.into());
    }
    let file = GgufFile::open(&model.path)?;
    let in_file = |source| RuntimeError::Model {
        path: model.path.clone(),
        source,
    };
    let hyper = Hyperparameters::read(&file).map_err(in_file)?;
    let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
    let sketch = fit(&samples, tensors.head(), options, &|share| {
        progress(0.5 + 0.5 * share)
    })?;
    Ok(sketch)
}

fn read(model: &LoadedModel, chunk: &[u32]) -> Result<(), RuntimeError> {
    let run = model.engine.run(Reader(Some(chunk.to_vec()), Vec::new()))?;
    run.outcome.map_err(|error| model.step_error(error))
}
