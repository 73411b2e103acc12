//! `pi-runtime -cnv`: one line of stdin a turn.

use std::io::{IsTerminal, stdin};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::args::RunArgs;
use super::generate::tell_stop;
use super::interrupt::Interrupt;
use super::output::Output;
use super::text_file;
use super::timings::Timings;
use super::trace::Tracer;
use crate::chat::{ChatError, ChatTemplate, Message, Role};
use crate::error::RuntimeError;
use crate::session::{LoadedModel, Session};
use crate::tokenizer::EncodeOptions;

/// Chats until stdin ends or the context is full.
///
/// # Errors
/// The flags, the model or its template, a first line that does not fit, or the output.
pub fn run(
    args: &RunArgs,
    start: Instant,
    interrupt: &Interrupt,
    tracer: &Tracer,
) -> Result<ExitCode, RuntimeError> {
    let model = args.open()?;
    tracer.loaded(&model, start)?;
    let mut conversation = Conversation::new(args, model, tracer)?;
    let load = start.elapsed();
    let mut total: Option<Timings> = None;
    while let Some(line) = next_line()? {
        match conversation.turn(line, interrupt, start, load)? {
            Some(timings) => match &mut total {
                Some(total) => total.add(&timings),
                None => total = Some(timings),
            },
            None => break,
        }
    }
    if let Some(total) = total {
        eprintln!("{total}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The next line that says something; none where stdin has ended.
fn next_line() -> Result<Option<String>, RuntimeError> {
    loop {
        if stdin().is_terminal() {
            eprint!("> ");
        }
        match text_file::read_line()? {
            Some(line) if line.trim().is_empty() => {}
            line => return Ok(line),
        }
    }
}

/// What has been said, and who answers.
struct Conversation<'a> {
    args: &'a RunArgs,
    session: Session,
    template: ChatTemplate,
    history: Vec<Message>,
    tracer: &'a Tracer,
}

impl<'a> Conversation<'a> {
    /// Begins with the system prompt, if there is one.
    fn new(
        args: &'a RunArgs,
        model: LoadedModel,
        tracer: &'a Tracer,
    ) -> Result<Self, RuntimeError> {
        let chat_error = |source| RuntimeError::Chat {
            path: model.path.clone(),
            source,
        };
        let source = model
            .chat_template
            .as_deref()
            .ok_or(ChatError::NoTemplate)
            .map_err(chat_error)?;
        let template = ChatTemplate::new(source, model.special_texts()).map_err(chat_error)?;
        let system = args
            .prompt
            .iter()
            .map(|prompt| Message::new(Role::System, prompt));
        Ok(Self {
            args,
            template,
            history: system.collect(),
            session: Session::new(model),
            tracer,
        })
    }

    /// Answers `line`; none when the context has no room for another turn.
    fn turn(
        &mut self,
        line: String,
        interrupt: &Interrupt,
        start: Instant,
        load: Duration,
    ) -> Result<Option<Timings>, RuntimeError> {
        let is_first = !self
            .history
            .iter()
            .any(|message| message.role == Role::User);
        self.history.push(Message::new(Role::User, line));
        let tokenise = Instant::now();
        let tokens = self.tokens()?;
        self.tracer.span("tokenise", tokenise);
        match self.session.check(&tokens) {
            Err(RuntimeError::PromptTooLong {
                n_prompt, n_ctx, ..
            }) if !is_first => {
                eprintln!(
                    "the context of {n_ctx} tokens is full ({n_prompt} with this turn), and the chat ends here: \
                     raise it with -c (this model: up to {})",
                    self.session.model().hyper.n_ctx_max
                );
                return Ok(None);
            }
            checked => checked?,
        }
        let mut out = Output::default();
        let sink = Box::new(move |text: &str| out.text(text));
        let answering = interrupt.answer();
        let options = self.args.answer_options(interrupt, sink);
        let answer = self.session.answer(tokens, options)?;
        drop(answering);
        self.tracer.answered(&answer);
        Output::default().line("")?;
        tell_stop(answer.finished.stop, self.session.model());
        let lossy = self.session.model().sparsity.lossy();
        let timings = Timings::of(&answer, start, load, lossy);
        let text = answer.finished.text;
        self.history.push(Message::new(Role::Assistant, text));
        Ok(Some(timings))
    }

    /// The whole conversation in the model's form.
    fn tokens(&self) -> Result<Vec<u32>, RuntimeError> {
        let model = self.session.model();
        let text = self
            .template
            .render(&self.history)
            .map_err(|source| RuntimeError::Chat {
                path: model.path.clone(),
                source,
            })?;
        let mut tokens = model.tokenizer.encode(&text, EncodeOptions::TEMPLATE)?;
        // most templates write it themselves
        if let Some(bos) = model.tokenizer.bos().filter(|_| model.tokenizer.adds_bos())
            && tokens.first() != Some(&bos)
        {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }
}
