//! What an independent implementation computes: the files of `tests/fixtures/reference`.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

#[derive(Deserialize)]
pub struct Reference {
    variants: HashMap<String, Variant>,
}

#[derive(Deserialize)]
struct Variant {
    prompts: Vec<Prompt>,
}

/// A prompt, what comes after each of its tokens, and its greedy continuation.
#[derive(Deserialize)]
pub struct Prompt {
    pub prompt: String,
    pub prompt_tokens: Vec<u32>,
    /// After each token of the prompt: the likeliest one.
    prompt_argmax: Vec<u32>,
    /// How far its logit is above the second.
    prompt_argmax_margin: Vec<f32>,
    pub first_token_top10: Vec<Candidate>,
    generated_tokens: Vec<u32>,
    greedy_margin_top1_minus_top2: Vec<f32>,
}

#[derive(Deserialize)]
pub struct Candidate {
    pub id: u32,
    pub logit: f32,
}

impl Reference {
    pub fn read(path: &Path) -> Self {
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    /// The prompts, computed from weights dequantised to f32: nothing is rounded.
    pub fn prompts(&self) -> &[Prompt] {
        &self.variants["F32_dequant"].prompts
    }
}

impl Prompt {
    /// The tokens to feed: the prompt and its continuation, but for the last token.
    pub fn fed(&self) -> Vec<u32> {
        let generated = &self.generated_tokens[..self.generated_tokens.len() - 1];
        [&self.prompt_tokens, generated].concat()
    }

    /// After each token fed: the likeliest one, and its margin.
    pub fn expected(&self) -> Vec<(u32, f32)> {
        let prompt = self.prompt_argmax.iter().zip(&self.prompt_argmax_margin);
        let generated = self
            .generated_tokens
            .iter()
            .zip(&self.greedy_margin_top1_minus_top2);
        let expected = prompt.chain(generated.skip(1));
        expected.map(|(id, margin)| (*id, *margin)).collect()
    }
}
