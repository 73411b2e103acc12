//! A model's chat template: a conversation in, the prompt's text out.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use minijinja::{Environment, context};

use super::error::ChatError;
use super::{Message, functions};
use crate::heap_limit::{Unfinished, run_limited};

/// Steps that a template may take: thousands of turns, but no endless loop. Values that it nests in
/// one another cannot be deeper either, and the stack they are printed and dropped on is made for it.
const FUEL: u64 = 500_000;

/// Memory that a template may take beside [`BYTES_PER_BYTE`].
const BYTES_MIN: usize = 64 << 20;

/// Memory that it may take for each byte of its source and of what was said.
const BYTES_PER_BYTE: usize = 32;

/// Longest that it may work: a step over a long text takes time, but not fuel.
const PATIENCE: Duration = Duration::from_secs(30);

/// Name in messages about the template.
const NAME: &str = "template";

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    source_bytes: usize,
    special: SpecialTexts,
    patience: Duration,
    /// Why it is not tried any more.
    given_up: OnceLock<ChatError>,
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
    /// [`ChatError::Syntax`] with the line; [`ChatError::Explodes`].
    pub fn new(source: &str, special: SpecialTexts) -> Result<Self, ChatError> {
        let owned = source.to_owned();
        let environment = limited(source.len(), PATIENCE, move || compile(&owned))??;
        Ok(Self {
            environment: Arc::new(environment),
            source_bytes: source.len(),
            special,
            patience: PATIENCE,
            given_up: OnceLock::new(),
        })
    }

    /// The text of `messages`, up to where the model's answer begins.
    ///
    /// # Errors
    /// [`ChatError::Render`]: the template refuses the conversation (`raise_exception`), fails or does not end.
    /// [`ChatError::Explodes`]: it takes too much memory or time, and is not tried again.
    pub fn render(&self, messages: &[Message]) -> Result<String, ChatError> {
        if let Some(error) = self.given_up.get() {
            return Err(error.clone());
        }
        let said: usize = messages.iter().map(|message| message.content.len()).sum();
        let environment = Arc::clone(&self.environment);
        let (messages, special) = (messages.to_vec(), self.special.clone());
        let render = move || {
            let values = context! {
                messages => messages,
                bos_token => special.bos,
                eos_token => special.eos,
                add_generation_prompt => true,
            };
            let template = environment.get_template(NAME);
            let text = template.and_then(|template| template.render(values));
            text.map_err(|error| ChatError::Render {
                problem: error.to_string(),
            })
        };
        limited(self.source_bytes + said, self.patience, render).unwrap_or_else(|error| {
            // what an exploding template took is lost: once is enough
            Err(self.given_up.get_or_init(|| error).clone())
        })
    }
}

/// Does `work` on `n_bytes` of text within limits of memory and time.
fn limited<T: Send + 'static>(
    n_bytes: usize,
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, ChatError> {
    let limit_bytes = BYTES_MIN.saturating_add(n_bytes.saturating_mul(BYTES_PER_BYTE));
    run_limited(limit_bytes, patience, work).map_err(|error| match error {
        Unfinished::Memory | Unfinished::Time => ChatError::Explodes {
            limit_mib: limit_bytes >> 20,
            seconds: PATIENCE.as_secs(),
            n_bytes,
        },
        Unfinished::Panic(problem) => ChatError::Render { problem },
        Unfinished::Thread(error) => ChatError::Thread {
            problem: error.to_string(),
        },
    })
}

/// The template with everything that Hugging Face gives it.
fn compile(source: &str) -> Result<Environment<'static>, ChatError> {
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
    Ok(environment)
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
    fn texts_that_double_explode_cleanly_and_only_once() {
        let source = "{% set ns = namespace(s='xy') %}{% for i in range(60) %}\
                      {% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}";
        let template = ChatTemplate::new(source, special()).unwrap();
        let first = template.render(&hello()).unwrap_err();
        assert!(matches!(first, ChatError::Explodes { limit_mib: 64, .. }));
        let text = first.to_string();
        assert!(text.contains("more than 64 MiB"), "{text}");
        assert_eq!(template.render(&hello()).unwrap_err(), first);
    }

    #[test]
    fn endless_steps_end() {
        // lists that are joined lazily, and counted in one step
        let source = "{% set ns = namespace(s=[1, 2]) %}{% for i in range(60) %}\
                      {% set ns.s = ns.s + ns.s %}{% endfor %}{% for x in ns.s %}{% endfor %}\
                      {{ ns.s | list | length }}";
        let mut template = ChatTemplate::new(source, special()).unwrap();
        template.patience = Duration::from_millis(50);
        let error = template.render(&hello()).unwrap_err();
        assert!(!error.to_string().is_empty());
        assert!(template.render(&hello()).is_err());
    }

    /// Expressions and statements that grow, each with what the error says.
    const HOSTILE: [(&str, &str); 18] = [
        ("{{ 'x' * 10**10 }}", "too large"),
        ("{{ 'x' * 9**9 * 9**9 }}", "too large"),
        ("{{ ([0] * 10**9) | list | length }}", ""),
        ("{{ range(10**12) | list }}", "too many"),
        ("{{ 'a' | indent(10**11, true) }}", ""),
        ("{{ '%099999999999d' | format(1) }}", ""),
        ("{{ [1] | batch(10**10, 'x') | list }}", ""),
        (
            "{% set ns = namespace(s='aa') %}{% for i in range(99) %}\
          {% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}",
            "MiB",
        ),
        (
            "{% set ns = namespace(s='aa') %}{% for i in range(99) %}\
          {% set ns.s = [ns.s, ns.s] | join %}{% endfor %}",
            "MiB",
        ),
        (
            "{% set ns = namespace(s='aa') %}{% for i in range(99) %}\
          {% set ns.s = ns.s.replace('a', 'aa') %}{% endfor %}",
            "MiB",
        ),
        (
            "{% set ns = namespace(s='aa') %}{% for i in range(99) %}\
          {% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}{% endfor %}",
            "MiB",
        ),
        (
            "{% set ns = namespace(s='aa') %}{% for i in range(99) %}\
          {% set ns.s = [ns.s, ns.s] | tojson %}{% endfor %}",
            "MiB",
        ),
        (
            "{% for i in range(99999) %}{{ 'x' * 90000 }}{% endfor %}",
            "MiB",
        ),
        (
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "recursion",
        ),
        (
            "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
            "fuel",
        ),
        (
            "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
            "recursion",
        ),
        ("{% include 'template' %}", "include"),
        (
            "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
            "fuel",
        ),
    ];

    #[test]
    fn whatever_grows_is_refused() {
        for (source, said) in HOSTILE {
            let error = render(source, &hello()).expect_err(source).to_string();
            assert!(error.contains(said), "{source}: {error}");
            assert!(error.contains("the chat template"), "{error}");
        }
    }

    /// Nested as deep as the fuel allows, then used in every way that follows the nesting.
    #[test]
    fn nested_values_do_not_overflow_the_stack() {
        for (use_it, nested) in [
            ("", "[ns.x]"),
            ("{{ ns.x }}", "[ns.x]"),
            ("{{ ns.x | tojson }}", "[ns.x]"),
            ("{{ ns.x | tojson }}", "{'a': ns.x}"),
            ("{{ ns.x | pprint }}", "[ns.x]"),
            ("{{ ns.x == [ns.x] }}", "[ns.x]"),
            ("{{ [ns.x, ns.x] | unique | list | length }}", "[ns.x]"),
            ("{{ [ns.x, ns.x] | sort | length }}", "{'a': ns.x}"),
            ("{{ ns.x | string | length }}", "(ns.x, 1)"),
        ] {
            let source = format!(
                "{{% set ns = namespace(x=1) %}}{{% for i in range(45000) %}}{{% set ns.x = {nested} %}}\
                 {{% endfor %}}{use_it}"
            );
            // a text or an error: what counts is that there is one, and that the fuel sufficed
            let mut template = ChatTemplate::new(&source, special()).unwrap();
            template.patience = Duration::from_secs(1);
            let outcome = template.render(&hello()).map(|text| text.len());
            println!("{nested} {use_it}: {outcome:?}");
            assert!(!format!("{outcome:?}").contains("fuel"), "{source}");
        }
    }

    #[test]
    fn nested_sources_do_not_overflow_the_stack() {
        let n = 20_000;
        for source in [
            format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n)),
            format!("{{{{ {}1{} }}}}", "[".repeat(n), "]".repeat(n)),
            format!("{{{{ {}1 }}}}", "not ".repeat(n)),
            format!("{{{{ {}1 }}}}", "-".repeat(n)),
            format!("{{{{ 1{} }}}}", " ~ 1".repeat(n)),
            format!("{{{{ 1{} }}}}", " ** 1".repeat(n)),
            format!("{{{{ x{} }}}}", ".a".repeat(n)),
            format!("{{{{ x{} }}}}", "|string".repeat(n)),
            format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(n)),
            format!("{}{}", "{% if 1 %}".repeat(n), "{% endif %}".repeat(n)),
            format!(
                "{}{}",
                "{% for a in b %}".repeat(n),
                "{% endfor %}".repeat(n)
            ),
        ] {
            let outcome = render(&source, &hello());
            println!("{:.20}: {:?}", source, outcome.map(|text| text.len()));
        }
    }

    #[test]
    fn dates_can_be_asked_for() {
        let text = render("{{ strftime_now('%Y') }}", &hello()).unwrap();
        assert!(text.parse::<u32>().is_ok_and(|year| year >= 2024), "{text}");
    }
}
