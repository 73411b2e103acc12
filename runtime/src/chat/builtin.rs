//! Templates for models that bring none: those of llama.cpp, under its names.

/// Pairs each name with the file of that name in `builtin/`.
macro_rules! templates {
    ($($name:literal),* $(,)?) => {
        [$(($name, include_str!(concat!("builtin/", $name, ".jinja")))),*]
    };
}

/// Name and source of every built-in template, by name.
const TEMPLATES: [(&str, &str); 33] = templates![
    "chatglm3",
    "chatglm4",
    "chatml",
    "command-r",
    "deepseek",
    "deepseek2",
    "deepseek3",
    "exaone3",
    "falcon3",
    "gemma",
    "glmedge",
    "granite",
    "llama2",
    "llama2-sys",
    "llama2-sys-bos",
    "llama2-sys-strip",
    "llama3",
    "llama4",
    "minicpm",
    "mistral-v1",
    "mistral-v3",
    "mistral-v3-tekken",
    "mistral-v7",
    "mistral-v7-tekken",
    "monarch",
    "openchat",
    "orion",
    "phi3",
    "phi4",
    "smolvlm",
    "vicuna",
    "vicuna-orca",
    "zephyr",
];

/// Names of the built-in templates, in order.
pub fn names() -> impl Iterator<Item = &'static str> {
    TEMPLATES.iter().map(|(name, _)| *name)
}

/// The template that llama.cpp knows as `name`.
pub fn source(name: &str) -> Option<&'static str> {
    let index = TEMPLATES.binary_search_by_key(&name, |(name, _)| name);
    index.ok().map(|index| TEMPLATES[index].1)
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use std::collections::BTreeMap;

    use super::super::{ChatTemplate, Message, SpecialTexts};
    use super::*;

    /// What llama.cpp's `llama_chat_apply_template` makes of some conversations.
    #[derive(Deserialize)]
    struct Expected {
        conversations: Vec<Vec<Message>>,
        texts: BTreeMap<String, Vec<String>>,
    }

    #[test]
    fn every_template_writes_what_llama_cpp_writes() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../tests/fixtures/chat/templates.json");
        let expected: Expected = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(expected.texts.keys().eq(names()), "one for each name");
        for (name, texts) in expected.texts {
            let template =
                ChatTemplate::new(source(&name).unwrap(), SpecialTexts::default()).unwrap();
            assert_eq!(texts.len(), expected.conversations.len());
            for (conversation, text) in expected.conversations.iter().zip(texts) {
                assert_eq!(template.render(conversation).unwrap(), text, "{name}");
            }
        }
    }

    #[test]
    fn other_names_are_none() {
        assert!(source("chatML").is_none() && source("").is_none());
    }
}
