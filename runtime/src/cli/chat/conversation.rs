//! What has been said, who answers, and what the commands do to it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::saved;
use super::template_source::{TemplateSource, chat_error};
use crate::chat::{ChatTemplate, Message, Role};
use crate::cli::args::RunArgs;
use crate::cli::generate::tell_stop;
use crate::cli::interrupt::Interrupt;
use crate::cli::output::Output;
use crate::cli::text_file;
use crate::cli::timings::Timings;
use crate::cli::trace::Tracer;
use crate::error::RuntimeError;
use crate::session::{LoadedModel, Session};
use crate::tokenizer::EncodeOptions;

/// A conversation; what fails leaves it as it was.
pub struct Conversation<'a> {
    args: &'a RunArgs,
    session: Session,
    template: ChatTemplate,
    /// Where the template comes from.
    template_origin: PathBuf,
    messages: Vec<Message>,
    /// Texts read from files, which go before the next message.
    read: String,
    start: Instant,
    load: Duration,
    timings: Option<Timings>,
    tracer: &'a Tracer,
}

impl<'a> Conversation<'a> {
    /// Begins with the system prompt, if there is one; the program began at `start`.
    ///
    /// # Errors
    /// The model has no template and none was chosen, or it is no template.
    pub fn new(
        args: &'a RunArgs,
        model: LoadedModel,
        chosen: Option<TemplateSource>,
        system: Option<String>,
        start: Instant,
        tracer: &'a Tracer,
    ) -> Result<Self, RuntimeError> {
        let (template, template_origin) = TemplateSource::compile(chosen, &model)?;
        let system = system.map(|text| Message::new(Role::System, text));
        Ok(Self {
            args,
            template,
            template_origin,
            messages: system.into_iter().collect(),
            read: String::new(),
            session: Session::new(model),
            start,
            load: start.elapsed(),
            timings: None,
            tracer,
        })
    }

    /// Work and times of all answers; none before the first.
    pub fn timings(&self) -> Option<&Timings> {
        self.timings.as_ref()
    }

    /// Answers a message.
    ///
    /// # Errors
    /// It does not fit into the context, the template refuses it, what [`Session::answer`] refuses, or weights that are
    /// elsewhere than a strict plan has them.
    pub fn say(&mut self, text: String, interrupt: &Interrupt) -> Result<(), RuntimeError> {
        let mut messages = self.messages.clone();
        messages.push(Message::new(Role::User, format!("{}{text}", self.read)));
        self.answer(messages, interrupt)?;
        self.read.clear();
        Ok(())
    }

    /// Answers the last message again.
    ///
    /// # Errors
    /// There is none; else as [`Conversation::say`].
    pub fn regenerate(&mut self, interrupt: &Interrupt) -> Result<(), RuntimeError> {
        let last = self.messages.iter().rposition(|m| m.role == Role::User);
        let last = last.ok_or_else(|| RuntimeError::ChatCommand {
            name: "/regen".into(),
            problem: "nothing has been said yet".into(),
        })?;
        self.answer(self.messages[..=last].to_vec(), interrupt)
    }

    /// Forgets everything but the system prompt.
    pub fn clear(&mut self) {
        self.messages.retain(|message| message.role == Role::System);
        self.read.clear();
    }

    /// The system prompt, if there is one.
    pub fn system(&self) -> Option<&str> {
        let first = self.messages.first();
        first
            .filter(|message| message.role == Role::System)
            .map(|message| message.content.as_str())
    }

    /// Sets the system prompt of the turns to come.
    pub fn set_system(&mut self, text: &str) {
        if self.system().is_some() {
            self.messages[0].content = text.into();
        } else {
            self.messages.insert(0, Message::new(Role::System, text));
        }
    }

    /// Puts a file's text before the next message; the answer is its number of characters.
    ///
    /// # Errors
    /// The file cannot be read or is not UTF-8.
    pub fn read(&mut self, path: &std::path::Path) -> Result<usize, RuntimeError> {
        let text = text_file::read(path)?;
        self.read.push_str(&text);
        self.read.push_str("\n\n");
        Ok(text.chars().count())
    }

    /// Writes the conversation to a file.
    ///
    /// # Errors
    /// As [`saved::save`].
    pub fn save(&self, path: &std::path::Path) -> Result<(), RuntimeError> {
        saved::save(&self.messages, path)
    }

    /// Goes on with the conversation in a file; the answer is its number of messages.
    ///
    /// # Errors
    /// As [`saved::load`].
    pub fn load(&mut self, path: &std::path::Path) -> Result<usize, RuntimeError> {
        self.messages = saved::load(path)?;
        self.read.clear();
        Ok(self.messages.len())
    }

    fn answer(
        &mut self,
        mut messages: Vec<Message>,
        interrupt: &Interrupt,
    ) -> Result<(), RuntimeError> {
        let tokenise = Instant::now();
        let tokens = self.fitting_tokens(&mut messages)?;
        self.tracer.span("tokenise", tokenise);
        let mut out = Output::default();
        let sink = Box::new(move |text: &str| out.text(text));
        let answering = interrupt.answer();
        let model = self.session.model();
        let options = self.args.answer_options(model, interrupt, sink);
        let answer = self.session.answer(tokens, options)?;
        drop(answering);
        self.tracer.answered(&answer);
        Output::default().line("")?;
        self.session.model().verify_again()?;
        tell_stop(answer.finished.stop, self.session.model());
        let lossy = self.session.model().lossy();
        let timings = Timings::of(&answer, self.start, self.load, lossy);
        match &mut self.timings {
            Some(total) => total.add(&timings),
            None => self.timings = Some(timings),
        }
        messages.push(Message::new(Role::Assistant, answer.finished.text));
        self.messages = messages;
        Ok(())
    }

    /// The conversation's tokens; with `--context-shift` the oldest turns are left out until they fit.
    fn fitting_tokens(&self, messages: &mut Vec<Message>) -> Result<Vec<u32>, RuntimeError> {
        let mut n_left_out = 0;
        loop {
            let tokens = self.tokens(messages)?;
            let refused = match self.session.check(&tokens) {
                Ok(()) => {
                    if n_left_out > 0 {
                        eprintln!(
                            "the context is full: the oldest {n_left_out} of the turns are left out"
                        );
                    }
                    return Ok(tokens);
                }
                Err(refused) => refused,
            };
            let n_users = messages.iter().filter(|m| m.role == Role::User).count();
            if n_users < 2 {
                return Err(refused);
            }
            if !self.args.answer.context_shift {
                return Err(RuntimeError::ConversationTooLong {
                    n_tokens: tokens.len(),
                    n_ctx: self.session.model().n_ctx,
                    n_ctx_max: self.session.model().hyper.n_ctx_max,
                });
            }
            leave_out_oldest(messages);
            n_left_out += 1;
        }
    }

    /// The conversation in the model's form.
    fn tokens(&self, messages: &[Message]) -> Result<Vec<u32>, RuntimeError> {
        let model = self.session.model();
        let text = self
            .template
            .render(messages)
            .map_err(|source| chat_error(&self.template_origin, source))?;
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

/// Removes the oldest turn: a message of the user and what was answered.
fn leave_out_oldest(messages: &mut Vec<Message>) {
    let is_user = |message: &Message| message.role == Role::User;
    let Some(first) = messages.iter().position(is_user) else {
        return;
    };
    let next = messages[first + 1..].iter().position(is_user);
    let end = next.map_or(messages.len(), |next| first + 1 + next);
    messages.drain(first..end);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_turn_goes_with_its_answer_and_the_system_prompt_stays() {
        let say = |role| Message::new(role, "");
        let (system, user, assistant) = (say(Role::System), say(Role::User), say(Role::Assistant));
        let mut messages = vec![
            system.clone(),
            user.clone(),
            assistant.clone(),
            Message::new(Role::User, "2"),
        ];
        leave_out_oldest(&mut messages);
        assert_eq!(messages, [system, Message::new(Role::User, "2")]);
    }
}
