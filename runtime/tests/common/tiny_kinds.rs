//! Tiny models of every kind that files come in: types, layouts, versions, magics, vocabularies.

use std::path::Path;

use pi_kernels::QuantType;
use pi_runtime::gguf::OwnedValue;

use super::gguf_parts::Parts;
use super::tiny_model::TinyModel;

/// A template with loops, conditions, filters and methods.
const TEMPLATE: &str = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content.strip() | upper }}]\
                        {% else %}({{ m['content'] }}){% endif %}{% endfor %}{{ eos_token }}";

/// Every kind with its name, taken apart.
pub fn kinds(folder: &Path) -> Vec<(&'static str, Parts)> {
    let small = |quant: QuantType| TinyModel {
        n_layer: 1,
        n_embd: if quant.block_values() > 64 { 256 } else { 64 },
        n_ff: 256,
        n_ctx: 64,
        quant,
        keys: vec![("tokenizer.chat_template", TEMPLATE.into())],
        ..TinyModel::default()
    };
    let plain = |quant| TinyModel {
        neuron_major: false,
        ..small(quant)
    };
    let sentence_piece = |mut model: TinyModel| {
        model.keys.extend(sentence_piece_keys());
        model
    };
    let untied = TinyModel {
        tied: false,
        ..small(QuantType::F16)
    };
    let silu = TinyModel {
        gate: None,
        ..plain(QuantType::Q5_K)
    };
    let gemma = TinyModel {
        architecture: "gemma",
        n_head_kv: 1,
        head_dim: Some(32),
        gate: None,
        ..sentence_piece(plain(QuantType::Q4_0))
    };
    let kinds: [(_, TinyModel, &[u8; 4], u32); 9] = [
        ("F32", small(QuantType::F32), b"GGUF", 3),
        ("Q4_0, version 2", small(QuantType::Q4_0), b"GGUF", 2),
        ("plain Q4_K", plain(QuantType::Q4_K), b"GGUF", 3),
        ("PowerInfer, Q6_K", small(QuantType::Q6_K), b"PWRI", 3),
        (
            "plain Q8_0, SentencePiece",
            sentence_piece(plain(QuantType::Q8_0)),
            b"GGUF",
            3,
        ),
        (
            "untied F16, SentencePiece, version 2",
            sentence_piece(untied),
            b"GGUF",
            2,
        ),
        ("SiLU, Q5_K", silu, b"GGUF", 3),
        ("plain BF16", plain(QuantType::BF16), b"GGUF", 3),
        ("Gemma, plain Q4_0, SentencePiece", gemma, b"GGUF", 3),
    ];
    let path = folder.join("kind.gguf");
    let taken_apart = kinds.map(|(name, model, magic, version)| {
        model.write(&path);
        let mut parts = Parts::of(&std::fs::read(&path).unwrap());
        (parts.magic, parts.version) = (*magic, version);
        (name, parts)
    });
    taken_apart.into()
}

/// A vocabulary of three special tokens and all bytes, as many as the byte-pair one has.
fn sentence_piece_keys() -> Vec<(&'static str, OwnedValue)> {
    let special = ["<unk>", "<s>", "</s>"].map(String::from);
    let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
    let tokens: Vec<String> = special.into_iter().chain(bytes).collect();
    let kinds: Vec<i32> = (0..tokens.len())
        .map(|id| match id {
            0 => 2,
            1 | 2 => 3,
            _ => 6,
        })
        .collect();
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    vec![
        ("tokenizer.ggml.model", "llama".into()),
        ("tokenizer.ggml.tokens", tokens.into()),
        ("tokenizer.ggml.token_type", kinds.into()),
        ("tokenizer.ggml.scores", scores.into()),
        ("tokenizer.ggml.bos_token_id", 1u32.into()),
        ("tokenizer.ggml.eos_token_id", 2u32.into()),
    ]
}
