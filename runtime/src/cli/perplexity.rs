//! `pi-runtime perplexity`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::args::{ModelArgs, PerplexityArgs};
use super::output::Output;
use super::text_file;
use crate::error::RuntimeError;
use crate::head_sketch::Head;
use crate::perplexity::{ChunkScorer, Chunks, Estimate, PerplexityError};
use crate::session::LoadedModel;
use crate::tokenizer::EncodeOptions;

/// Scores the text and prints the estimate.
///
/// # Errors
/// The flags, the model, the text or the output.
pub fn run(args: &PerplexityArgs) -> Result<(), RuntimeError> {
    let limit = chunk_limit(args.chunks)?;
    let text = text_file::read(&args.file)?;
    // scores need every token's logit
    let flags = ModelArgs {
        head: Head::Full,
        ..args.model.clone()
    };
    let model = flags.open(args.n_ctx as usize, args.threads, None)?;
    let estimate = score(&model, &text, &args.file, limit, &Arc::default())?;
    for lossy in model.lossy() {
        eprintln!("lossy: {lossy}");
    }
    Output::default().line(&estimate.to_string())
}

/// `--chunks`: -1 is all.
fn chunk_limit(chunks: i32) -> Result<Option<usize>, RuntimeError> {
    match chunks {
        -1 => Ok(None),
        1.. => Ok(usize::try_from(chunks).ok()),
        _ => Err(RuntimeError::Flag {
            flag: "--chunks",
            value: chunks.to_string(),
            problem: "give the number of chunks to score, from 1, or -1 for all".into(),
        }),
    }
}

/// Perplexity of `model` on `text`, from the file at `path`, in chunks of the model's context; running estimates go to
/// stderr.
///
/// # Errors
/// The text is too short, a step failed, or `interrupt` was set.
pub fn score(
    model: &LoadedModel,
    text: &str,
    path: &Path,
    limit: Option<usize>,
    interrupt: &Arc<AtomicBool>,
) -> Result<Estimate, RuntimeError> {
    let options = EncodeOptions {
        add_special: true,
        parse_special: false,
    };
    let in_text = |source: PerplexityError| RuntimeError::Perplexity {
        path: path.to_path_buf(),
        source,
    };
    let tokenizer = &model.tokenizer;
    let tokens = tokenizer.encode(text, options)?;
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let chunks = Chunks::new(tokens, model.n_ctx, limit, bos).map_err(in_text)?;
    eprintln!("{} chunks of {} tokens", chunks.len(), model.n_ctx);
    let report = Box::new(|chunk: usize, ppl: f64| eprint!("[{chunk}]{ppl:.4},"));
    let run = model
        .engine
        .run(ChunkScorer::new(chunks, report, Arc::clone(interrupt)))?;
    eprintln!();
    if run.totals.replans.times > 0 {
        eprintln!("{}", run.totals.replans);
    }
    run.outcome.map_err(|error| model.step_error(error))?;
    if interrupt.load(std::sync::atomic::Ordering::Acquire) {
        return Err(RuntimeError::Interrupted);
    }
    run.feeder.score().estimate().map_err(in_text)
}
