//! A vocabulary that needs no file: bytes, and merges of frequent English letters.
//!
//! Text becomes tokens of about three letters, so that a synthetic model meets as many different tokens in a text as a
//! real one.

use crate::gguf::{GgufError, GgufWriter};
use crate::tokenizer::byte_to_char;

/// Letters, the most frequent first.
const LETTERS: &str = "etaoinshrdlucmfwypvbgkjqxz";
const N_LETTERS: usize = 26;
/// Tokens that steer.
const CONTROL: [&str; 4] = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"];
/// Bytes and tokens that steer: none of them is ever the likeliest.
pub(super) const N_NEVER_SAID: usize = 256 + CONTROL.len();
/// Merges of two symbols: a space and a letter, or two letters.
const N_PAIRS: usize = N_LETTERS + N_LETTERS * N_LETTERS;
/// Vocabularies that can be made.
pub(super) const N_VOCAB: std::ops::RangeInclusive<usize> =
    N_NEVER_SAID + 64..=N_NEVER_SAID + N_PAIRS + N_PAIRS * N_LETTERS * N_LETTERS;

const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
    message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// Puts a tokenizer of `n_vocab` tokens into `header`.
pub(super) fn put(header: &mut GgufWriter, n_vocab: usize) -> Result<(), GgufError> {
    let merges = merges(n_vocab - N_NEVER_SAID);
    let bytes = (0..=255).map(|byte| byte_to_char(byte).to_string());
    let tokens: Vec<String> = bytes
        .chain(CONTROL.map(String::from))
        .chain(merges.iter().map(|(left, right)| format!("{left}{right}")))
        .collect();
    let kind = |id: usize| {
        if (256..N_NEVER_SAID).contains(&id) {
            3
        } else {
            1
        }
    };
    header.put("tokenizer.ggml.model", "gpt2")?;
    header.put("tokenizer.ggml.pre", "gpt-2")?;
    header.put("tokenizer.ggml.tokens", tokens)?;
    let kinds: Vec<i32> = (0..n_vocab).map(kind).collect();
    header.put("tokenizer.ggml.token_type", kinds)?;
    let merges: Vec<String> = merges
        .iter()
        .map(|(left, right)| format!("{left} {right}"))
        .collect();
    header.put("tokenizer.ggml.merges", merges)?;
    header.put("tokenizer.ggml.bos_token_id", 256u32)?;
    header.put("tokenizer.ggml.eos_token_id", 257u32)?;
    header.put("tokenizer.ggml.add_bos_token", true)?;
    header.put("tokenizer.chat_template", CHAT_TEMPLATE)
}

/// The first `n` merges: of a space and a letter, of two letters, then of two of those, frequent ones first.
fn merges(n: usize) -> Vec<(String, String)> {
    let space = byte_to_char(b' ');
    let starts = LETTERS
        .chars()
        .map(|letter| (space.to_string(), letter.to_string()));
    let letters: Vec<String> = LETTERS.chars().map(String::from).collect();
    let pairs = products(N_LETTERS, N_LETTERS)
        .into_iter()
        .map(|(left, right)| (letters[left].clone(), letters[right].clone()));
    let mut merges: Vec<(String, String)> = starts.chain(pairs).collect();
    if n > merges.len() {
        let symbols: Vec<String> = merges
            .iter()
            .map(|(left, right)| format!("{left}{right}"))
            .collect();
        let pairs = &symbols[N_LETTERS..];
        let longer = products(symbols.len(), pairs.len())
            .into_iter()
            .take(n - merges.len())
            .map(|(left, right)| (symbols[left].clone(), pairs[right].clone()));
        merges.extend(longer);
    }
    merges.truncate(n);
    merges
}

/// All pairs below `n_left` and `n_right`, those with the smallest product of ranks first.
fn products(n_left: usize, n_right: usize) -> Vec<(usize, usize)> {
    let mut pairs: Vec<(usize, usize)> = (0..n_left)
        .flat_map(|left| (0..n_right).map(move |right| (left, right)))
        .collect();
    pairs.sort_by_key(|(left, right)| (left + 1) * (right + 1));
    pairs
}
