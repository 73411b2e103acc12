//! `pi-runtime -p TEXT`: continues a text.

use std::process::ExitCode;
use std::time::Instant;

use serde_json::json;

use super::answer_args::AnswerArgs;
use super::args::RunArgs;
use super::chat;
use super::interrupt::Interrupt;
use super::output::Output;
use super::text_file;
use super::timings::Timings;
use super::trace::Tracer;
use crate::error::{INTERRUPTED_EXIT_CODE, RuntimeError};
use crate::session::{Answer, AnswerOptions, ContextShift, LoadedModel, Session, Stop, TextSink};
use crate::tokenizer::EncodeOptions;
use crate::trace::ControlLog;

/// Continues the prompt, or chats.
///
/// # Errors
/// The flags, the model, the prompt or the output.
pub fn run(args: &RunArgs, start: Instant, control: &ControlLog) -> Result<ExitCode, RuntimeError> {
    if args.print_config {
        let mut config = args.model.topology_file()?.config().clone();
        if let Some(predict) = &args.model.predictor {
            config.sparsity.predict = predict.clone();
        }
        if let Some(replan) = args.model.replan()? {
            config.gpus.iter_mut().for_each(|gpu| gpu.replan = replan);
        }
        Output::default().text(&config.to_toml())?;
        return Ok(ExitCode::SUCCESS);
    }
    args.sampler.validate()?;
    let interrupt = Interrupt::listen();
    if args.conversation {
        let tracer = Tracer::open(&args.trace, control, &interrupt)?;
        return tracer.close(chat::run(args, start, &interrupt, &tracer));
    }
    let prompt = args.text()?.ok_or(RuntimeError::NoPrompt)?;
    let tracer = Tracer::open(&args.trace, control, &interrupt)?;
    tracer.close(complete(args, &prompt, start, &interrupt, &tracer))
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
    session.check(&tokens)?;
    let answering = interrupt.answer();
    let sink: TextSink = if args.json {
        Box::new(|_| Ok(()))
    } else {
        let mut out = Output::default();
        if args.answer.display_prompt {
            out.text(prompt)?;
        }
        Box::new(move |text| out.text(text))
    };
    let options = args.answer_options(session.model(), interrupt, sink);
    let answer = session.answer(tokens, options)?;
    drop(answering);
    tracer.answered(&answer);
    session.model().verify_again()?;
    let lossy = session.model().lossy();
    let timings = Timings::of(&answer, start, load, lossy);
    if args.json {
        Output::default().line(&to_json(&answer, &timings, session.model()))?;
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
    /// The prompt, from wherever the flags say; none where they do not.
    ///
    /// # Errors
    /// Its file cannot be read or is not UTF-8.
    pub(super) fn text(&self) -> Result<Option<String>, RuntimeError> {
        let AnswerArgs {
            file, binary_file, ..
        } = &self.answer;
        match (&self.prompt, file, binary_file) {
            (Some(text), _, _) => Ok(Some(self.answer.read_escapes(text))),
            (None, Some(path), _) => text_file::read(path).map(Some),
            (None, None, Some(path)) => text_file::read_as_it_is(path).map(Some),
            (None, None, None) => Ok(None),
        }
    }

    /// Opens the model, which records its work if it is to be traced, and checks what only it knows.
    ///
    /// # Errors
    /// As [`ModelArgs::open`](super::args::ModelArgs::open); a logit bias for a token that it does not have.
    pub(super) fn open(&self) -> Result<LoadedModel, RuntimeError> {
        // a chat has several answers
        let n_predict = usize::try_from(self.n_predict).ok();
        let n_steps = n_predict.filter(|_| !self.conversation);
        let trace = self.trace.bounds(n_steps.unwrap_or(usize::MAX));
        let n_ctx = self.n_ctx as usize;
        let model = self.model.open(n_ctx, self.threads, trace)?;
        self.sampler.validate_biases(model.hyper.n_vocab)?;
        Ok(model)
    }

    /// How each answer is made.
    pub(super) fn answer_options(
        &self,
        model: &LoadedModel,
        interrupt: &Interrupt,
        sink: TextSink,
    ) -> AnswerOptions {
        let tokenizer = &model.tokenizer;
        let stop_texts = self.answer.reverse_prompt.iter();
        let n_bos = usize::from(tokenizer.adds_bos() && tokenizer.bos().is_some());
        let keep = usize::try_from(self.answer.keep);
        let shift = ContextShift {
            n_keep: keep.map_or(usize::MAX, |n_keep| n_keep + n_bos),
        };
        let shifts = self.answer.context_shift && self.n_predict != UNTIL_FULL;
        AnswerOptions {
            sampler: self.sampler.clone(),
            n_predict: usize::try_from(self.n_predict).ok(),
            ignore_eos: self.ignore_eos,
            shift: shifts.then_some(shift),
            stop_texts: stop_texts
                .map(|text| self.answer.read_escapes(text))
                .collect(),
            hash_logits: self.json,
            interrupt: interrupt.flag(),
            sink,
        }
    }
}

/// `-n` until the context is full, whatever `--context-shift` says.
const UNTIL_FULL: i32 = -2;

/// Says on stderr why an answer ended where that is not plain from its text.
pub(super) fn tell_stop(stop: Stop, model: &LoadedModel) {
    let n_ctx_max = model.hyper.n_ctx_max;
    match stop {
        Stop::ContextFull if model.n_ctx < n_ctx_max => eprintln!(
            "the context of {} tokens is full, and the answer ends here: raise it with -c (this model: up to {n_ctx_max}), or go on with --context-shift",
            model.n_ctx
        ),
        Stop::ContextFull => eprintln!(
            "the context of {} tokens, this model's longest, is full, and the answer ends here: go on with --context-shift",
            model.n_ctx
        ),
        Stop::Interrupted => eprintln!("interrupted"),
        Stop::EndOfText | Stop::Limit | Stop::StopText => {}
    }
}

fn to_json(answer: &Answer, timings: &Timings, model: &LoadedModel) -> String {
    let finished = &answer.finished;
    json!({
        "text": finished.text,
        "tokens": finished.tokens,
        "logits_hash": finished.logits_hash.map(|hash| format!("{hash:016x}")),
        "stop": finished.stop.name(),
        "timings": timings.to_json(),
        "placement": model.residence,
    })
    .to_string()
}
