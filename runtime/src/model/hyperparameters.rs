//! The numbers that describe a model, read from GGUF metadata and checked against one another.

use pi_kernels::attention::HEAD_DIM_MAX;

use super::architecture::Architecture;
use super::error::ModelError;
use super::rope::Rope;
use crate::gguf::{GgufFile, Metadata};

/// Most layers, heads or values in any dimension that is believed: keeps products inside 64 bits.
const MAX_COUNT: usize = 1 << 24;

/// The FFN gate's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateKind {
    /// x · sigmoid(x)
    Silu,
    /// x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))
    Gelu,
    /// max(x, 0)
    Relu,
}

impl GateKind {
    /// The name in metadata.
    pub fn name(self) -> &'static str {
        match self {
            GateKind::Silu => "silu",
            GateKind::Gelu => "gelu",
            GateKind::Relu => "relu",
        }
    }
}

/// A model's sizes and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct Hyperparameters {
    /// What computes it.
    pub architecture: &'static Architecture,
    /// Layers.
    pub n_layer: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Neurons of a layer.
    pub n_ff: usize,
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; a divisor of `n_head`.
    pub n_head_kv: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Tokens in the vocabulary.
    pub n_vocab: usize,
    /// Longest context that the model knows.
    pub n_ctx_max: usize,
    /// Added to the mean square in RMS norms.
    pub rms_eps: f32,
    /// Activation of the FFN gate.
    pub gate: GateKind,
    /// Factor of the embeddings.
    pub embedding_scale: f32,
    /// Position embedding.
    pub rope: Rope,
    /// Sliding window: a token sees the last so many positions, its own included.
    pub window: Option<usize>,
}

impl Hyperparameters {
    /// Reads and checks the metadata of `file`.
    ///
    /// # Errors
    /// An unsupported architecture or feature, or a key that is missing or cannot be: the message names it.
    pub fn read(file: &GgufFile) -> Result<Self, ModelError> {
        let metadata = file.metadata();
        let architecture = Architecture::find(metadata.require_str("general.architecture")?)?;
        let keys = Keys {
            metadata,
            prefix: architecture.name,
        };
        refuse_unknown_features(&keys)?;
        let n_embd = keys.count("embedding_length")?;
        let n_head = keys.count("attention.head_count")?;
        let n_head_kv = keys.count_or("attention.head_count_kv", n_head)?;
        if n_head % n_head_kv != 0 {
            let needed = format!("it must divide the {n_head} query heads");
            return Err(keys.bad("attention.head_count_kv", n_head_kv, needed));
        }
        let head_dim = keys.count_or("attention.key_length", n_embd / n_head)?;
        if head_dim > HEAD_DIM_MAX {
            let needed = format!("heads of more than {HEAD_DIM_MAX} values are not supported");
            return Err(keys.bad("attention.key_length", head_dim, needed));
        }
        let value_length = keys.count_or("attention.value_length", head_dim)?;
        if value_length != head_dim {
            let needed = format!("only the key's length, {head_dim}, is supported");
            return Err(keys.bad("attention.value_length", value_length, needed));
        }
        let rms_eps = keys.positive("attention.layer_norm_rms_epsilon")?;
        let n_ctx = keys.count("context_length")?;
        let rope = Rope::read(&keys, architecture, head_dim, n_ctx)?;
        let n_ctx_max = rope.stretched_context(n_ctx);
        Ok(Self {
            architecture,
            n_layer: keys.count("block_count")?,
            n_embd,
            n_ff: keys.count("feed_forward_length")?,
            n_head,
            n_head_kv,
            head_dim,
            n_vocab: n_vocab(file, &keys)?,
            n_ctx_max,
            rms_eps,
            gate: gate_kind(&keys, architecture)?,
            embedding_scale: match architecture.scaled_embeddings {
                true => (n_embd as f32).sqrt(),
                false => 1.0,
            },
            rope,
            window: window(&keys, architecture, n_ctx_max)?,
        })
    }

    /// Values in all keys (or all values) of one position.
    pub fn n_embd_kv(&self) -> usize {
        self.n_head_kv * self.head_dim
    }

    /// Values in all queries of one position.
    pub fn n_embd_q(&self) -> usize {
        self.n_head * self.head_dim
    }
}

/// Keys under the architecture's prefix.
pub(super) struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'static str,
}

impl Keys<'_> {
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    pub(super) fn bad(&self, key: &str, value: impl ToString, needed: String) -> ModelError {
        ModelError::BadKey {
            key: self.name(key),
            value: value.to_string(),
            needed,
        }
    }

    fn in_range(&self, key: &str, value: usize) -> Result<usize, ModelError> {
        if (1..=MAX_COUNT).contains(&value) {
            return Ok(value);
        }
        Err(self.bad(key, value, format!("it must be from 1 to {MAX_COUNT}")))
    }

    fn count(&self, key: &str) -> Result<usize, ModelError> {
        self.in_range(key, self.metadata.require_usize(&self.name(key))?)
    }

    pub(super) fn count_or(&self, key: &str, default: usize) -> Result<usize, ModelError> {
        self.in_range(
            key,
            self.metadata.get_usize(&self.name(key))?.unwrap_or(default),
        )
    }

    fn positive(&self, key: &str) -> Result<f32, ModelError> {
        self.positive_or(key, self.metadata.require_f32(&self.name(key))?)
    }

    pub(super) fn positive_or(&self, key: &str, default: f32) -> Result<f32, ModelError> {
        let value = self.metadata.get_f32(&self.name(key))?.unwrap_or(default);
        if value > 0.0 && value.is_finite() {
            return Ok(value);
        }
        Err(self.bad(key, value, "it must be a positive number".into()))
    }

    pub(super) fn number_or(&self, key: &str, default: f32) -> Result<f32, ModelError> {
        let value = self.metadata.get_f32(&self.name(key))?.unwrap_or(default);
        if value.is_finite() {
            return Ok(value);
        }
        Err(self.bad(key, value, "it must be a number".into()))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, ModelError> {
        Ok(self.metadata.get_str(&self.name(key))?)
    }
}

/// Features of llama-like files that change what is computed and are not implemented.
fn refuse_unknown_features(keys: &Keys<'_>) -> Result<(), ModelError> {
    let unsupported = |feature, key: &str, value: String| ModelError::UnsupportedFeature {
        feature,
        key: keys.name(key),
        value,
        cure: "use a dense llama-like model",
    };
    let experts = keys
        .metadata
        .get_usize(&keys.name("expert_count"))?
        .unwrap_or(0);
    if experts > 0 {
        return Err(unsupported(
            "a mixture of experts",
            "expert_count",
            experts.to_string(),
        ));
    }
    for (feature, key) in [
        ("scaled logits", "logit_scale"),
        ("scaled embeddings", "embedding_scale"),
        ("scaled residuals", "residual_scale"),
        ("scaled attention", "attention.scale"),
    ] {
        match keys.metadata.get_f32(&keys.name(key))? {
            Some(scale) if scale != 0.0 && scale != 1.0 => {
                return Err(unsupported(feature, key, scale.to_string()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// The activation that the file names, else the architecture's. As in ggml, `gelu` is the tanh form.
fn gate_kind(keys: &Keys<'_>, architecture: &Architecture) -> Result<GateKind, ModelError> {
    match keys.text("hidden_activation")? {
        None => Ok(architecture.gate),
        Some("silu") => Ok(GateKind::Silu),
        Some("gelu" | "gelu_pytorch_tanh") => Ok(GateKind::Gelu),
        Some("relu") => Ok(GateKind::Relu),
        Some(other) => Err(keys.bad(
            "hidden_activation",
            format!("{other:?}"),
            "only silu, relu and gelu are supported".into(),
        )),
    }
}

/// The last so many positions that a token sees, where it does not see all.
///
/// A token sees itself and `window` - 1 positions before it, in every layer: so transformers run
/// Mistral. llama.cpp ignores the key in `llama` files, which makes no difference in contexts that
/// fit the window.
fn window(
    keys: &Keys<'_>,
    architecture: &Architecture,
    n_ctx_max: usize,
) -> Result<Option<usize>, ModelError> {
    let key = "attention.sliding_window";
    let pattern = "attention.sliding_window_pattern";
    let window = keys.metadata.get_usize(&keys.name(key))?.unwrap_or(0);
    if window == 0 || window >= n_ctx_max {
        return Ok(None);
    }
    let unsupported = |feature, key: &str, value: String| ModelError::UnsupportedFeature {
        feature,
        key: keys.name(key),
        value,
        cure: "use a model whose layers are all alike",
    };
    if keys.metadata.contains(&keys.name(pattern)) {
        let value = "set".to_owned();
        return Err(unsupported("windows in some layers only", pattern, value));
    }
    if !architecture.window {
        let value = window.to_string();
        return Err(unsupported("windows in some layers only", key, value));
    }
    Ok(Some(window))
}

/// Rows of the embedding, which the metadata may state and the vocabulary has to match.
fn n_vocab(file: &GgufFile, keys: &Keys<'_>) -> Result<usize, ModelError> {
    let rows = file.require_tensor("token_embd.weight")?.n_rows();
    let stated = keys.count_or("vocab_size", rows)?;
    if stated != rows {
        let needed = format!("token_embd.weight has {rows} rows");
        return Err(keys.bad("vocab_size", stated, needed));
    }
    Ok(rows)
}
