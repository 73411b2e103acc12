//! `pi-runtime -cnv`: a conversation, one entry a turn.

mod command;
mod conversation;
mod input;
mod saved;
mod template_source;

use std::process::ExitCode;
use std::time::Instant;

use super::args::RunArgs;
use super::interrupt::Interrupt;
use super::text_file;
use super::trace::Tracer;
use crate::error::{BAD_INPUT_EXIT_CODE, RuntimeError};
use command::{ChatCommand, HELP};
use conversation::Conversation;
use input::ChatInput;
use template_source::TemplateSource;

/// Chats until the input ends or `/exit`.
///
/// A turn that is refused leaves the conversation as it was. At a terminal the user has read why; from a pipe the
/// program goes on too, and says by its exit code that there was something to mend.
///
/// # Errors
/// The flags, the model or its template, the output, or a step that failed.
pub fn run(
    args: &RunArgs,
    start: Instant,
    interrupt: &Interrupt,
    tracer: &Tracer,
) -> Result<ExitCode, RuntimeError> {
    let chosen = TemplateSource::chosen(&args.chat)?;
    let system = match (&args.chat.system_prompt, &args.chat.system_prompt_file) {
        (Some(text), _) => Some(args.answer.read_escapes(text)),
        (None, Some(path)) => Some(text_file::read(path)?),
        (None, None) => None,
    };
    let mut first = args.text()?;
    let model = args.open()?;
    tracer.loaded(&model, start)?;
    let conversation = Conversation::new(args, model, chosen, system, start, tracer)?;
    let mut input = ChatInput::open();
    let mut chat = Chat {
        conversation,
        interrupt,
    };
    let mut refused = false;
    let is_single = args.chat.single_turn;
    loop {
        let given = first.take();
        let is_given = given.is_some();
        let entry = match given {
            Some(text) => text,
            None => match input.next()? {
                Some(entry) => entry,
                None => break,
            },
        };
        let taken = if is_given {
            chat.say(entry)
        } else {
            chat.take(&entry)
        };
        match taken {
            Ok(Taken::Ended) => break,
            Ok(Taken::Answered) if is_single => break,
            Ok(_) => {}
            Err(error) if error.exit_code() == BAD_INPUT_EXIT_CODE => {
                eprintln!("error: {error}");
                refused = !input.is_terminal();
                if is_single && is_given {
                    break;
                }
            }
            Err(error) => return Err(error),
        }
    }
    if let Some(timings) = chat.conversation.timings() {
        eprintln!("{timings}");
    }
    Ok(ExitCode::from(if refused {
        BAD_INPUT_EXIT_CODE
    } else {
        0
    }))
}

/// What became of an entry.
enum Taken {
    /// It was a message, and has its answer.
    Answered,
    /// It was a command, and is done.
    Done,
    /// It ends the chat.
    Ended,
}

/// A chat under way.
struct Chat<'a> {
    conversation: Conversation<'a>,
    interrupt: &'a Interrupt,
}

impl Chat<'_> {
    fn take(&mut self, entry: &str) -> Result<Taken, RuntimeError> {
        match ChatCommand::parse(entry)? {
            Some(command) => self.obey(command),
            None => self.say(entry.to_owned()),
        }
    }

    fn say(&mut self, text: String) -> Result<Taken, RuntimeError> {
        self.conversation.say(text, self.interrupt)?;
        Ok(Taken::Answered)
    }

    fn obey(&mut self, command: ChatCommand<'_>) -> Result<Taken, RuntimeError> {
        let conversation = &mut self.conversation;
        match command {
            ChatCommand::Help => eprintln!("{HELP}"),
            ChatCommand::Clear => {
                conversation.clear();
                eprintln!("the conversation is forgotten");
            }
            ChatCommand::Regen => {
                conversation.regenerate(self.interrupt)?;
                return Ok(Taken::Answered);
            }
            ChatCommand::Read(path) => {
                let n_characters = conversation.read(path)?;
                eprintln!("{n_characters} characters go before the next message");
            }
            ChatCommand::System(None) => match conversation.system() {
                Some(text) => eprintln!("{text}"),
                None => eprintln!("there is no system prompt: set one with /system TEXT"),
            },
            ChatCommand::System(Some(text)) => {
                conversation.set_system(text);
                eprintln!("the system prompt is set");
            }
            ChatCommand::Stats => match conversation.timings() {
                Some(timings) => eprintln!("{timings}"),
                None => eprintln!("nothing has been computed yet"),
            },
            ChatCommand::Save(path) => {
                conversation.save(path)?;
                eprintln!("wrote {}", path.display());
            }
            ChatCommand::Load(path) => {
                let n_messages = conversation.load(path)?;
                eprintln!("{n_messages} messages are loaded");
            }
            ChatCommand::Exit => return Ok(Taken::Ended),
        }
        Ok(Taken::Done)
    }
}
