//! Why a conversation cannot be put into a model's form.

use thiserror::Error;

/// What is wrong with a chat template.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChatError {
    /// The file has none.
    #[error(
        "the model has no chat template (metadata key tokenizer.chat_template): it was not made for chat; use -p without \
         -cnv, or name a template with --chat-template"
    )]
    NoTemplate,
    /// The template is no template.
    #[error(
        "the chat template cannot be parsed: {problem}: mend it, or name another with --chat-template"
    )]
    Syntax {
        /// Where and why.
        problem: String,
    },
    /// The template makes more of the conversation than any template should.
    #[error(
        "the chat template wants more than {limit_mib} MiB of memory, or {seconds} s, for {n_bytes} bytes: it is \
         damaged or hostile; name another with --chat-template, or use -p without -cnv"
    )]
    Explodes {
        /// Memory that it may have.
        limit_mib: usize,
        /// Time that it may take.
        seconds: u64,
        /// Bytes of the template and what was said.
        n_bytes: usize,
    },
    /// No thread to render on.
    #[error("cannot start a thread for the chat template: {problem}")]
    Thread {
        /// Why.
        problem: String,
    },
    /// The template refuses the conversation, or fails at it.
    #[error(
        "the chat template fails: {problem}: chat as it allows (does it know a system prompt?), or name another with \
         --chat-template"
    )]
    Render {
        /// Where and why.
        problem: String,
    },
}
