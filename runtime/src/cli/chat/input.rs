//! What the user says: edited lines at a terminal, plain ones from a pipe.

use std::fs;
use std::io::{self, IsTerminal, stdin};
use std::path::PathBuf;

use rustyline::config::{Behavior, Config};
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{
    Cmd, ConditionalEventHandler, Editor, Event, EventContext, EventHandler, KeyEvent, Movement,
    RepeatCount,
};

use crate::cli::text_file;
use crate::cli::user_folder;
use crate::error::RuntimeError;

/// Entries that the history keeps.
const N_HISTORY: usize = 1000;

/// Before an entry, and before its further lines.
const PROMPTS: [&str; 2] = ["> ", ". "];

/// Where entries come from.
pub enum ChatInput {
    /// A terminal.
    Terminal(Box<Terminal>),
    /// Anything else.
    Plain,
}

/// A terminal with an editor and a history.
pub struct Terminal {
    editor: Editor<(), FileHistory>,
    /// Where the history is kept; none where the user has no such folder.
    history: Option<PathBuf>,
}

/// A line, or what came instead.
enum Line {
    Text(String),
    /// Ctrl-C at an empty line.
    Cancelled,
    Ended,
}

impl ChatInput {
    /// Standard input.
    pub fn open() -> Self {
        if !stdin().is_terminal() {
            return Self::Plain;
        }
        match Terminal::new() {
            Ok(terminal) => Self::Terminal(Box::new(terminal)),
            Err(error) => {
                tracing::warn!("lines cannot be edited: {error}");
                Self::Plain
            }
        }
    }

    /// Whether somebody sits there.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next entry that says something; none where the input has ended.
    ///
    /// A line that ends in a backslash goes on in the next one, and keeps its line end.
    ///
    /// # Errors
    /// The input fails or is not UTF-8; Ctrl-C at an empty line.
    pub fn next(&mut self) -> Result<Option<String>, RuntimeError> {
        let mut entry = String::new();
        let mut is_open = false;
        loop {
            match self.line(PROMPTS[usize::from(is_open)])? {
                Line::Text(line) => {
                    let continued = line.strip_suffix('\\');
                    is_open = continued.is_some();
                    entry.push_str(continued.unwrap_or(&line));
                    if is_open {
                        entry.push('\n');
                        continue;
                    }
                }
                Line::Cancelled if is_open => {
                    is_open = false;
                    entry.clear();
                }
                Line::Cancelled => return Err(RuntimeError::Interrupted),
                Line::Ended if entry.trim().is_empty() => return Ok(None),
                Line::Ended => {}
            }
            if !entry.trim().is_empty() {
                self.remember(&entry);
                return Ok(Some(entry));
            }
            entry.clear();
        }
    }

    fn line(&mut self, prompt: &str) -> Result<Line, RuntimeError> {
        match self {
            Self::Terminal(terminal) => terminal.line(prompt),
            Self::Plain => {
                if stdin().is_terminal() {
                    eprint!("{prompt}");
                }
                Ok(text_file::read_line()?.map_or(Line::Ended, Line::Text))
            }
        }
    }

    fn remember(&mut self, entry: &str) {
        if let Self::Terminal(terminal) = self {
            terminal.remember(entry);
        }
    }
}

impl Terminal {
    fn new() -> rustyline::Result<Self> {
        let config = Config::builder()
            .max_history_size(N_HISTORY)?
            // the terminal itself, wherever the answers go
            .behavior(Behavior::PreferTerm)
            .build();
        let mut editor = Editor::with_config(config)?;
        editor.bind_sequence(
            KeyEvent::ctrl('C'),
            EventHandler::Conditional(Box::new(ClearOrInterrupt)),
        );
        let history = user_folder::state().map(|folder| folder.join("history"));
        if let Some(path) = history.as_ref().filter(|path| path.exists())
            && let Err(error) = editor.load_history(path)
        {
            tracing::warn!("{}: the history cannot be read: {error}", path.display());
        }
        Ok(Self { editor, history })
    }

    fn line(&mut self, prompt: &str) -> Result<Line, RuntimeError> {
        loop {
            return match self.editor.readline(prompt) {
                Ok(line) => Ok(Line::Text(line)),
                Err(ReadlineError::Eof) => Ok(Line::Ended),
                Err(ReadlineError::Interrupted) => Ok(Line::Cancelled),
                Err(ReadlineError::Signal(_)) => continue,
                Err(ReadlineError::Io(source)) => Err(RuntimeError::InputFailed { source }),
                Err(error) => Err(RuntimeError::InputFailed {
                    source: io::Error::other(error),
                }),
            };
        }
    }

    /// Adds an entry to the history, here and in its file.
    fn remember(&mut self, entry: &str) {
        if !matches!(self.editor.add_history_entry(entry), Ok(true)) {
            return;
        }
        let Some(path) = &self.history else {
            return;
        };
        let folder = path.parent().map_or(Ok(()), fs::create_dir_all);
        let saved = folder
            .map_err(ReadlineError::from)
            .and_then(|()| self.editor.append_history(path));
        if let Err(error) = saved {
            tracing::warn!("{}: the history cannot be kept: {error}", path.display());
            self.history = None;
        }
    }
}

/// Ctrl-C: clears the line, or interrupts where there is nothing to clear.
struct ClearOrInterrupt;

impl ConditionalEventHandler for ClearOrInterrupt {
    fn handle(
        &self,
        _event: &Event,
        _n: RepeatCount,
        _positive: bool,
        context: &EventContext<'_>,
    ) -> Option<Cmd> {
        Some(if context.line().is_empty() {
            Cmd::Interrupt
        } else {
            Cmd::Kill(Movement::WholeBuffer)
        })
    }
}
