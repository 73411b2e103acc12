//! Flags of text generation that say where texts come from, what ends an answer, and how to chat.

use std::path::PathBuf;

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

use super::escapes::unescape;

/// Where texts come from, and what ends an answer.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Text")]
pub struct AnswerArgs {
    /// Read the prompt from a file, without one line end at its end
    #[arg(short = 'f', long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    /// Read the prompt from a file as it is, its last line end included; also -bf
    #[arg(
        long,
        alias = "bf",
        value_name = "FILE",
        conflicts_with_all = ["prompt", "file"],
        hide_short_help = true
    )]
    pub binary_file: Option<PathBuf>,
    /// Take backslashes in -p, -sys and -r as they are; llama.cpp reads \n, \r, \t and the like in them, and so does this
    #[arg(long, overrides_with = "escape", hide_short_help = true)]
    pub no_escape: bool,
    /// Read escape sequences (the default); also -e
    #[arg(
        short = 'e',
        long,
        overrides_with = "no_escape",
        hide_short_help = true
    )]
    pub escape: bool,
    /// Print the prompt before its continuation
    #[arg(long, overrides_with = "no_display_prompt", hide_short_help = true)]
    pub display_prompt: bool,
    /// Do not print the prompt (the default)
    #[arg(long, overrides_with = "display_prompt", hide_short_help = true)]
    pub no_display_prompt: bool,
    /// End the answer where it comes to this text, which is not printed; may be repeated
    #[arg(
        short = 'r',
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub reverse_prompt: Vec<String>,
    /// When the context is full go on with its beginning (--keep) and half of the rest
    ///
    /// The half that stays is fed again at its new positions, so that the answer goes on, bit by bit, as after a prompt
    /// of the tokens that are left. A chat whose next turn does not fit leaves its oldest turns out.
    #[arg(long, overrides_with = "no_context_shift")]
    pub context_shift: bool,
    /// End the answer when the context is full (the default)
    #[arg(long, overrides_with = "context_shift", hide_short_help = true)]
    pub no_context_shift: bool,
    /// Tokens of the prompt that --context-shift never drops, beside the one that begins a text; -1: all
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true,
        value_parser = clap::value_parser!(i32).range(-1..)
    )]
    pub keep: i32,
    /// Accepted as llama.cpp's: there is no warm-up, as loading already touches all weights where they are used
    #[arg(long, hide_short_help = true)]
    pub no_warmup: bool,
}

impl AnswerArgs {
    /// A text of the command line with its escape sequences read, if they are to be.
    pub(super) fn read_escapes(&self, text: &str) -> String {
        match self.no_escape {
            true => text.to_owned(),
            false => unescape(text),
        }
    }
}

/// How to chat.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Chat")]
pub struct ChatArgs {
    /// System prompt, where the template knows one; also -sys
    #[arg(
        long,
        alias = "sys",
        value_name = "TEXT",
        allow_hyphen_values = true,
        requires = "conversation"
    )]
    pub system_prompt: Option<String>,
    /// Read the system prompt from a file, without one line end at its end; also -sysf
    #[arg(
        long,
        alias = "sysf",
        value_name = "FILE",
        requires = "conversation",
        conflicts_with = "system_prompt",
        hide_short_help = true
    )]
    pub system_prompt_file: Option<PathBuf>,
    /// Template in place of the model's: a name that llama.cpp knows (chatml, llama3, ...), or a Jinja text
    #[arg(
        long,
        value_name = "NAME|TEXT",
        requires = "conversation",
        long_help = long_template_help()
    )]
    pub chat_template: Option<String>,
    /// Read the template from a file
    #[arg(
        long,
        value_name = "FILE",
        requires = "conversation",
        conflicts_with = "chat_template"
    )]
    pub chat_template_file: Option<PathBuf>,
    /// End after one answer; with -p nothing is read; also -st
    #[arg(long, alias = "st", requires = "conversation")]
    pub single_turn: bool,
}

fn long_template_help() -> String {
    let names: Vec<&str> = crate::chat::builtin::names().collect();
    format!(
        "Template in place of the model's: a Jinja text, or a name that llama.cpp knows: {}",
        names.join(", ")
    )
}
