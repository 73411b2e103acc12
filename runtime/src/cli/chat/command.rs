//! What a line that begins with `/` asks of the chat.

use std::path::Path;

use crate::error::RuntimeError;

/// What `/help` prints.
pub const HELP: &str = "\
/help           this list
/clear, /reset  forget the conversation, but not the system prompt
/regen          answer the last message again
/read FILE      put the file's text before the next message
/system TEXT    set the system prompt; without a text show it
/stats          what the chat has computed so far
/save FILE      write the conversation as JSON
/load FILE      go on with a conversation that was saved
/exit, /quit    end the chat
A line that ends in \\ goes on in the next one. A message that begins with / takes a space before it. Ctrl-C ends an
answer, and at an empty line the chat, as does Ctrl-D.";

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatCommand<'a> {
    /// List the commands.
    Help,
    /// Forget all but the system prompt.
    Clear,
    /// Answer the last message again.
    Regen,
    /// Put a file's text before the next message.
    Read(&'a Path),
    /// Set the system prompt; none: show it.
    System(Option<&'a str>),
    /// Show the timings so far.
    Stats,
    /// Write the conversation.
    Save(&'a Path),
    /// Take up a conversation that was written.
    Load(&'a Path),
    /// End the chat.
    Exit,
}

impl<'a> ChatCommand<'a> {
    /// The command of `entry`; none where it is a message.
    ///
    /// # Errors
    /// There is no such command, or its file is missing.
    pub fn parse(entry: &'a str) -> Result<Option<Self>, RuntimeError> {
        if !entry.starts_with('/') {
            return Ok(None);
        }
        let (name, value) = entry.split_once(char::is_whitespace).unwrap_or((entry, ""));
        let value = value.trim();
        let refused = |problem: &str| RuntimeError::ChatCommand {
            name: name.to_owned(),
            problem: problem.to_owned(),
        };
        let file = || match value {
            "" => Err(refused("name a file after it")),
            _ => Ok(Path::new(value)),
        };
        Ok(Some(match name {
            "/help" => Self::Help,
            "/clear" | "/reset" => Self::Clear,
            "/regen" => Self::Regen,
            "/read" => Self::Read(file()?),
            "/system" => Self::System((!value.is_empty()).then_some(value)),
            "/stats" | "/timings" => Self::Stats,
            "/save" => Self::Save(file()?),
            "/load" => Self::Load(file()?),
            "/exit" | "/quit" => Self::Exit,
            _ => {
                return Err(refused(
                    "there is no such command: /help lists them (a message that begins with / takes a space before it)",
                ));
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(entry: &str) -> Option<ChatCommand<'_>> {
        ChatCommand::parse(entry).unwrap()
    }

    #[test]
    fn names_and_values_are_told_apart() {
        assert_eq!(parsed("Hello /help"), None);
        assert_eq!(parsed(" /help"), None);
        assert_eq!(parsed("/help"), Some(ChatCommand::Help));
        assert_eq!(parsed("/reset "), Some(ChatCommand::Clear));
        let file = Path::new("a b.txt");
        assert_eq!(parsed("/read  a b.txt"), Some(ChatCommand::Read(file)));
        assert_eq!(parsed("/system"), Some(ChatCommand::System(None)));
        assert_eq!(
            parsed("/system Be brief.\nBe kind."),
            Some(ChatCommand::System(Some("Be brief.\nBe kind.")))
        );
    }

    #[test]
    fn what_is_wrong_is_named_with_its_cure() {
        let problem = |entry| ChatCommand::parse(entry).unwrap_err().to_string();
        let unknown = problem("/hlep me");
        assert!(
            unknown.starts_with("/hlep: ") && unknown.contains("/help"),
            "{unknown}"
        );
        assert!(problem("/save").contains("name a file"));
    }
}
