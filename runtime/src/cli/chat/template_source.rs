//! Which chat template to use: the model's, a built-in one, or one from the command line.

use std::path::{Path, PathBuf};

use crate::chat::{ChatError, ChatTemplate, builtin};
use crate::cli::answer_args::ChatArgs;
use crate::cli::text_file;
use crate::error::RuntimeError;
use crate::session::LoadedModel;

/// A template that was asked for.
pub struct TemplateSource {
    text: String,
    /// Where it comes from, for messages.
    origin: PathBuf,
}

impl TemplateSource {
    /// What the flags ask for; none: the model's own.
    ///
    /// # Errors
    /// No built-in template has the name, or the file cannot be read.
    pub fn chosen(args: &ChatArgs) -> Result<Option<Self>, RuntimeError> {
        if let Some(path) = &args.chat_template_file {
            return Ok(Some(Self {
                text: text_file::read(path)?,
                origin: path.clone(),
            }));
        }
        let Some(named) = &args.chat_template else {
            return Ok(None);
        };
        let text = match builtin::source(named) {
            Some(text) => text.to_owned(),
            None if named.contains("{{") || named.contains("{%") => named.clone(),
            None => {
                let names: Vec<&str> = builtin::names().collect();
                return Err(RuntimeError::Flag {
                    flag: "--chat-template",
                    value: named.clone(),
                    problem: format!(
                        "this is neither a template's text nor the name of a built-in one ({})",
                        names.join(", ")
                    ),
                });
            }
        };
        Ok(Some(Self {
            text,
            origin: "--chat-template".into(),
        }))
    }

    /// Compiles `chosen`, or the model's own template, and says where it comes from.
    ///
    /// # Errors
    /// The model has none, or it is no template.
    pub fn compile(
        chosen: Option<Self>,
        model: &LoadedModel,
    ) -> Result<(ChatTemplate, PathBuf), RuntimeError> {
        let (text, origin) = match (&chosen, &model.chat_template) {
            (Some(chosen), _) => (Some(&chosen.text), &*chosen.origin),
            (None, own) => (own.as_ref(), &*model.path),
        };
        let compile = || {
            let text = text.ok_or(ChatError::NoTemplate)?;
            ChatTemplate::new(text, model.special_texts())
        };
        let template = compile().map_err(|source| chat_error(origin, source))?;
        Ok((template, origin.to_path_buf()))
    }
}

/// What is wrong with the template from `origin`.
pub fn chat_error(origin: &Path, source: ChatError) -> RuntimeError {
    RuntimeError::Chat {
        path: origin.to_path_buf(),
        source,
    }
}
