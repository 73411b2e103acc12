//! `pi-runtime -p TEXT`: continues a text.

use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;

use super::args::RunArgs;
use super::chat;
use super::interrupt::Interrupt;
use super::output::Output;
use super::timings::Timings;
use super::trace::Tracer;
use crate::error::{INTERRUPTED_EXIT_CODE, RuntimeError};
use crate::session::{Answer, AnswerOptions, LoadedModel, Session, Stop, TextSink};
use crate::tokenizer::EncodeOptions;
use crate::trace::ControlLog;

/// Continues the prompt, or chats.
///
/// # Errors
/// The flags, the model, the prompt or the output.
pub fn run(args: &RunArgs, start: Instant, control: &ControlLog) -> Result<ExitCode, RuntimeError> {
    args.sampler.validate()?;
    let interrupt = Interrupt::listen();
    if args.conversation {
        let tracer = Tracer::open(&args.trace, control, &interrupt)?;
        return tracer.close(chat::run(args, start, &interrupt, &tracer));
    }
    let prompt = args.prompt.as_deref().ok_or(RuntimeError::NoPrompt)?;
    let tracer = Tracer::open(&args.trace, control, &interrupt)?;
    tracer.close(complete(args, prompt, start, &interrupt, &tracer))
}

/// Continues `prompt`.
fn complete(
    args: &RunArgs,
    prompt: &str,
    start: Instant,
    interrupt: &Interrupt,
    tracer: &Tracer,
) -> Result<ExitCode, RuntimeError> {
    let mut session = Session::new(args.open()?);
    let load = start.elapsed();
    tracer.loaded(session.model(), start)?;
    let tokenise = Instant::now();
    let tokens = session
        .model()
        .tokenizer
        .encode(prompt, EncodeOptions::PROMPT)?;
    tracer.span("tokenise", tokenise);
    let answering = interrupt.answer();
    let sink: TextSink = if args.json {
        Box::new(|_| Ok(()))
    } else {
        let mut out = Output::default();
        Box::new(move |text| out.text(text))
    };
    let answer = session.answer(tokens, args.answer_options(interrupt, sink))?;
    drop(answering);
    tracer.answered(&answer);
    let lossy = session.model().sparsity.lossy();
    let timings = Timings::of(&answer, start, load, lossy);
    if args.json {
        Output::default().line(&to_json(&answer, &timings))?;
    } else if answer
        .finished
        .text
        .chars()
        .next_back()
        .is_some_and(|last| last != '\n')
    {
        Output::default().line("")?;
    }
    tell_stop(answer.finished.stop, session.model());
    eprintln!("{timings}");
    Ok(match answer.finished.stop {
        Stop::Interrupted => ExitCode::from(INTERRUPTED_EXIT_CODE),
        _ => ExitCode::SUCCESS,
    })
}

impl RunArgs {
    /// Opens the model, which records its work if it is to be traced.
    ///
    /// # Errors
    /// As [`ModelArgs::open`](super::args::ModelArgs::open).
    pub(super) fn open(&self) -> Result<LoadedModel, RuntimeError> {
        // a chat has several answers
        let n_predict = usize::try_from(self.n_predict).ok();
        let n_steps = n_predict.filter(|_| !self.conversation);
        let trace = self.trace.bounds(n_steps.unwrap_or(usize::MAX));
        self.model.open(self.n_ctx as usize, self.threads, trace)
    }

    /// How each answer is made.
    pub(super) fn answer_options(&self, interrupt: &Interrupt, sink: TextSink) -> AnswerOptions {
        AnswerOptions {
            sampler: self.sampler.clone(),
            n_predict: usize::try_from(self.n_predict).ok(),
            ignore_eos: self.ignore_eos,
            hash_logits: self.json,
            interrupt: interrupt.flag(),
            sink,
        }
    }
}

/// Says on stderr why an answer ended where that is not plain from its text.
pub(super) fn tell_stop(stop: Stop, model: &LoadedModel) {
    let n_ctx_max = model.hyper.n_ctx_max;
    match stop {
        Stop::ContextFull if model.n_ctx < n_ctx_max => eprintln!(
            "the context of {} tokens is full, and the answer ends here: raise it with -c (this model: up to {n_ctx_max})",
            model.n_ctx
        ),
        Stop::ContextFull => eprintln!(
            "the context of {} tokens, this model's longest, is full, and the answer ends here",
            model.n_ctx
        ),
        Stop::Interrupted => eprintln!("interrupted"),
        Stop::EndOfText | Stop::Limit => {}
    }
}

fn to_json(answer: &Answer, timings: &Timings) -> String {
    let finished = &answer.finished;
    json!({
        "text": finished.text,
        "tokens": finished.tokens,
        "logits_hash": finished.logits_hash.map(|hash| format!("{hash:016x}")),
        "stop": finished.stop.name(),
        "timings": timings.to_json(),
    })
    .to_string()
}
