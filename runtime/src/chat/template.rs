//! A model's chat template: a conversation in, the prompt's text out.

use minijinja::{Environment, context};

use super::error::ChatError;
use super::{Message, functions};

/// Steps that a template may take: thousands of turns, but no endless loop.
const FUEL: u64 = 5_000_000;

/// Name in messages about the template.
const NAME: &str = "template";

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTexts,
}

/// Texts of the tokens that templates write themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpecialTexts {
    /// Begin of text; empty where the model has none.
    pub bos: String,
    /// End of text; empty where the model has none.
    pub eos: String,
}

impl ChatTemplate {
    /// Compiles `source`, the value of `tokenizer.chat_template`.
    ///
    /// # Errors
    /// [`ChatError::Syntax`] with the line.
    pub fn new(source: &str, special: SpecialTexts) -> Result<Self, ChatError> {
        let mut environment = Environment::new();
        // as Hugging Face sets it up
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        functions::add(&mut environment);
        environment
            .add_template_owned(NAME, without_generation_blocks(source))
            .map_err(|error| ChatError::Syntax {
                problem: error.to_string(),
            })?;
        Ok(Self {
            environment,
            special,
        })
    }

    /// The text of `messages`, up to where the model's answer begins.
    ///
    /// # Errors
    /// [`ChatError::Render`]: the template refuses the conversation (`raise_exception`), fails or does not end.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        let failed = |error: minijinja::Error| ChatError::Render {
            problem: error.to_string(),
        };
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let values = context! {
            messages => messages,
            bos_token => self.special.bos,
            eos_token => self.special.eos,
            add_generation_prompt => true,
        };
        template.render(values).map_err(failed)
    }
}

/// Makes plain blocks of `{% generation %}` … `{% endgeneration %}`, which mark what a model is trained on and change
/// no text.
fn without_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(end) = tag.find("%}").map(|end| end + 2) else {
            rest = tag;
            break;
        };
        out.push_str(&plain_tag(&tag[..end]));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

/// The tag `{% … %}`, or an `if` that always holds in place of a generation block's.
fn plain_tag(tag: &str) -> String {
    let inside = &tag[2..tag.len() - 2];
    let name = inside.trim_matches(['-', '+']).trim();
    let plain = match name {
        "generation" => "if true",
        "endgeneration" => "endif",
        _ => return tag.to_owned(),
    };
    format!("{{%{}%}}", inside.replacen(name, plain, 1))
}

#[cfg(test)]
mod tests {
    use super::super::Role;
    use super::*;

    fn special() -> SpecialTexts {
        SpecialTexts {
            bos: "<s>".into(),
            eos: "</s>".into(),
        }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, ChatError> {
        ChatTemplate::new(source, special())?.render(messages)
    }

    fn hello() -> Vec<Message> {
        vec![Message::new(Role::User, "Hello")]
    }

    #[test]
    fn the_demo_model_s_template_gives_its_format() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../models/smollm2-135m-reglu-q4_0.gguf");
        let file = crate::gguf::GgufFile::open(path).unwrap();
        let source = file
            .metadata()
            .require_str("tokenizer.chat_template")
            .unwrap();
        let system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face\
                      <|im_end|>\n";
        let question = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(
            render(source, &hello()).unwrap(),
            format!("{system}{question}")
        );
        let mut messages = hello();
        messages.insert(0, Message::new(Role::System, "Be brief."));
        messages.push(Message::new(Role::Assistant, "Hi."));
        messages.push(Message::new(Role::User, "Bye"));
        assert_eq!(
            render(source, &messages).unwrap(),
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n\
             <|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n\
             <|im_start|>assistant\n"
        );
    }

    #[test]
    fn blocks_are_trimmed_as_hugging_face_does() {
        let source = "{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m['content'] }}]\n    {% endif %}\n\
                      {% endfor %}\nend\n";
        assert_eq!(render(source, &hello()).unwrap(), "[Hello]\nend");
    }

    #[test]
    fn python_methods_special_tokens_and_history_work() {
        let source = "{{ bos_token }}{% for m in messages %}{{ m.role.upper() }}:{{ m.content.strip() }}\
                      {% if m.role == 'assistant' %}{{ eos_token }}{% endif %};{% endfor %}\
                      {% if add_generation_prompt %}ASSISTANT:{% endif %}";
        let messages = [
            Message::new(Role::System, "Be brief."),
            Message::new(Role::User, " Hi "),
            Message::new(Role::Assistant, "Yes?"),
            Message::new(Role::User, "Bye"),
        ];
        assert_eq!(
            render(source, &messages).unwrap(),
            "<s>SYSTEM:Be brief.;USER:Hi;ASSISTANT:Yes?</s>;USER:Bye;ASSISTANT:"
        );
    }

    #[test]
    fn generation_blocks_change_nothing() {
        let source = "a {%- generation %} b {% endgeneration -%}  c{% set x = 1 %}{{ x }}";
        assert_eq!(render(source, &[]).unwrap(), "a b c1");
        assert_eq!(without_generation_blocks("x {% if"), "x {% if");
    }

    #[test]
    fn refusals_and_failures_say_why() {
        let refused = render("{{ raise_exception('no system prompt here') }}", &hello());
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("no system prompt here") && text.contains("--chat-template"),
            "{text}"
        );
        let syntax = render("a\n{% if %}", &hello()).unwrap_err();
        assert!(
            matches!(&syntax, ChatError::Syntax { problem } if problem.contains("template:2")),
            "{syntax}"
        );
        let missing = render("{{ messages[9]['content'] }}", &hello()).unwrap_err();
        assert!(matches!(missing, ChatError::Render { .. }));
    }

    #[test]
    fn endless_templates_end() {
        let source =
            "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}";
        let error = render(source, &hello()).unwrap_err();
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn dates_can_be_asked_for() {
        let text = render("{{ strftime_now('%Y') }}", &hello()).unwrap();
        assert!(text.parse::<u32>().is_ok_and(|year| year >= 2024), "{text}");
    }
}
