//! Random models of a few kilobytes, with a byte tokenizer: fast enough to run in every combination.

use std::path::Path;

use pi_kernels::QuantType;
use pi_runtime::gguf::{GgmlType, GgufError, GgufWriter, OwnedValue};
use pi_runtime::model::quantize::quantize_row;

/// Sizes, types and keys of a model; the default is a ReLU model whose file is neuron-major.
#[derive(Clone)]
pub struct TinyModel {
    pub architecture: &'static str,
    pub n_layer: usize,
    pub n_embd: usize,
    pub n_ff: usize,
    pub n_head: usize,
    pub n_head_kv: usize,
    /// None: the heads share the width.
    pub head_dim: Option<usize>,
    pub n_ctx: usize,
    pub quant: QuantType,
    pub neuron_major: bool,
    pub tied: bool,
    pub gate: Option<&'static str>,
    /// Keys to set last, and tensors to leave out.
    pub keys: Vec<(&'static str, OwnedValue)>,
    pub without_tensors: Vec<&'static str>,
    pub seed: u32,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self {
            architecture: "llama",
            n_layer: 2,
            n_embd: 64,
            n_ff: 512,
            n_head: 4,
            n_head_kv: 2,
            head_dim: None,
            n_ctx: 256,
            quant: QuantType::F32,
            neuron_major: true,
            tied: true,
            gate: Some("relu"),
            keys: vec![],
            without_tensors: vec![],
            seed: 1,
        }
    }
}

/// Tokens: 256 bytes, these, and the result of the one merge that a vocabulary has to have.
const SPECIAL: [&str; 2] = ["<|bos|>", "<|eos|>"];
const MERGE: (&str, &str) = ("q z", "qz");
/// Tokens in the vocabulary.
pub const N_VOCAB: usize = 256 + SPECIAL.len() + 1;

impl TinyModel {
    /// A neuron-major one with GELU gates, one key/value head, and heads of 32 values where 16 would be their share.
    pub fn gemma() -> Self {
        Self {
            architecture: "gemma",
            gate: None,
            n_head_kv: 1,
            head_dim: Some(32),
            ..Self::default()
        }
    }

    /// Writes the model's file.
    pub fn write(&self, path: &Path) {
        self.try_write(path).unwrap();
    }

    fn try_write(&self, path: &Path) -> Result<(), GgufError> {
        let mut header = GgufWriter::new();
        self.put_keys(&mut header)?;
        let mut tensors = self.tensors();
        tensors.retain(|tensor| !self.without_tensors.contains(&tensor.name.as_str()));
        for tensor in &tensors {
            header.add_tensor(&tensor.name, GgmlType::from(tensor.quant), &tensor.shape)?;
        }
        let mut stream = header.create(path)?;
        for tensor in &tensors {
            let mut row_bytes = vec![0; tensor.quant.row_bytes(tensor.shape[0])];
            for row in tensor.values.chunks(tensor.shape[0]) {
                write_row(tensor.quant, row, &mut row_bytes);
                stream.write(&tensor.name, &row_bytes)?;
            }
        }
        stream.finish()
    }

    fn put_keys(&self, header: &mut GgufWriter) -> Result<(), GgufError> {
        let prefixed = |key: &str| format!("{}.{key}", self.architecture);
        header.put("general.architecture", self.architecture)?;
        header.put("general.name", "tiny")?;
        for (key, value) in [
            ("block_count", self.n_layer),
            ("embedding_length", self.n_embd),
            ("feed_forward_length", self.n_ff),
            ("attention.head_count", self.n_head),
            ("attention.head_count_kv", self.n_head_kv),
            ("context_length", self.n_ctx),
        ] {
            header.put(&prefixed(key), value as u32)?;
        }
        header.put(&prefixed("attention.layer_norm_rms_epsilon"), 1e-5f32)?;
        if let Some(head_dim) = self.head_dim {
            header.put(&prefixed("attention.key_length"), head_dim as u32)?;
            header.put(&prefixed("attention.value_length"), head_dim as u32)?;
        }
        if let Some(gate) = self.gate {
            header.put(&prefixed("hidden_activation"), gate)?;
        }
        header.put("tokenizer.ggml.model", "gpt2")?;
        header.put("tokenizer.ggml.pre", "gpt-2")?;
        let tokens: Vec<String> = byte_tokens()
            .into_iter()
            .chain(SPECIAL.map(String::from))
            .chain([MERGE.1.to_owned()])
            .collect();
        header.put("tokenizer.ggml.tokens", tokens)?;
        let kinds: Vec<i32> = (0..N_VOCAB)
            .map(|id| {
                if (256..256 + SPECIAL.len()).contains(&id) {
                    3
                } else {
                    1
                }
            })
            .collect();
        header.put("tokenizer.ggml.token_type", kinds)?;
        header.put("tokenizer.ggml.merges", vec![MERGE.0.to_owned()])?;
        header.put("tokenizer.ggml.bos_token_id", 256u32)?;
        header.put("tokenizer.ggml.eos_token_id", 257u32)?;
        for (key, value) in &self.keys {
            header.put(key, value.clone())?;
        }
        Ok(())
    }

    fn tensors(&self) -> Vec<Tensor> {
        let mut random = Random(self.seed);
        let (n_embd, n_ff) = (self.n_embd, self.n_ff);
        let head_dim = self.head_dim.unwrap_or(n_embd / self.n_head);
        let (n_q, n_kv) = (self.n_head * head_dim, self.n_head_kv * head_dim);
        let mut tensors = vec![];
        let mut add = |name: String, n_rows: usize, n_cols: usize, quant: QuantType| {
            let values = if n_rows == 1 {
                (0..n_cols).map(|_| 1.0 + 0.1 * random.next()).collect()
            } else {
                let scale = 1.5 / (n_cols as f32).sqrt();
                (0..n_rows * n_cols)
                    .map(|_| scale * random.next())
                    .collect()
            };
            let shape = if n_rows == 1 {
                vec![n_cols]
            } else {
                vec![n_cols, n_rows]
            };
            tensors.push(Tensor {
                name,
                shape,
                quant,
                values,
            });
        };
        add("token_embd.weight".into(), N_VOCAB, n_embd, self.quant);
        for layer in 0..self.n_layer {
            let name = |tensor: &str| format!("blk.{layer}.{tensor}.weight");
            add(name("attn_norm"), 1, n_embd, QuantType::F32);
            add(name("attn_q"), n_q, n_embd, self.quant);
            add(name("attn_k"), n_kv, n_embd, self.quant);
            add(name("attn_v"), n_kv, n_embd, self.quant);
            add(name("attn_output"), n_embd, n_q, self.quant);
            add(name("ffn_norm"), 1, n_embd, QuantType::F32);
            add(name("ffn_gate"), n_ff, n_embd, self.quant);
            add(name("ffn_up"), n_ff, n_embd, self.quant);
            add(name("ffn_down_t"), n_ff, n_embd, self.quant);
        }
        add("output_norm.weight".into(), 1, n_embd, QuantType::F32);
        if !self.tied {
            add("output.weight".into(), N_VOCAB, n_embd, self.quant);
        }
        if !self.neuron_major {
            for tensor in tensors
                .iter_mut()
                .filter(|tensor| tensor.name.contains("ffn_down_t"))
            {
                tensor.name = tensor.name.replace("ffn_down_t", "ffn_down");
                tensor.values = transposed(&tensor.values, n_embd);
                tensor.shape = vec![n_ff, n_embd];
            }
        }
        tensors
    }
}

/// Packs a row; types that nothing rounds to get blocks of any bits with small scales.
fn write_row(quant: QuantType, row: &[f32], out: &mut [u8]) {
    // where the f16 scales of a block are
    let scales = match quant {
        QuantType::Q4_K | QuantType::Q5_K => 0..4,
        QuantType::Q6_K => 208..210,
        _ => return quantize_row(quant, row, out),
    };
    let mut random = Random(row[0].to_bits());
    for block in out.chunks_exact_mut(quant.block_bytes()) {
        for byte in &mut *block {
            *byte = (random.next() * 128.0) as i8 as u8;
        }
        for scale in block[scales.clone()].chunks_exact_mut(2) {
            let value = half::f16::from_f32(1e-4);
            scale.copy_from_slice(&value.to_le_bytes());
        }
    }
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    quant: QuantType,
    values: Vec<f32>,
}

fn transposed(values: &[f32], n_cols: usize) -> Vec<f32> {
    let n_rows = values.len() / n_cols;
    (0..values.len())
        .map(|i| values[i % n_rows * n_cols + i / n_rows])
        .collect()
}

/// GPT-2's printable stand-in for each byte.
fn byte_tokens() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    (0..256u32)
        .map(|byte| {
            if printable(byte) {
                return char::from_u32(byte).unwrap().to_string();
            }
            next += 1;
            char::from_u32(next - 1).unwrap().to_string()
        })
        .collect()
}

/// A linear congruential generator; values in [−1, 1).
struct Random(u32);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}
