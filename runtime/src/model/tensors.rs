//! The tensors of a model: which there must be, of which type and shape.

use bytes::Bytes;
use pi_kernels::QuantType;

use super::error::ModelError;
use super::hyperparameters::Hyperparameters;
use super::quantize::dequantize_row;
use super::sparsity::DownStored;
use crate::gguf::{GgufError, GgufFile, TensorInfo};
use crate::head_sketch::SketchTensors;

/// A matrix in the file: type, shape and bytes, checked.
#[derive(Debug, Clone)]
pub struct FileMatrix {
    /// Its name and place.
    pub info: TensorInfo,
    /// Its type.
    pub quant: QuantType,
    /// Its rows one after the other, mapped.
    pub bytes: Bytes,
}

impl FileMatrix {
    /// Values in a row.
    pub fn n_cols(&self) -> usize {
        self.info.n_cols()
    }

    /// Rows.
    pub fn n_rows(&self) -> usize {
        self.info.n_rows()
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.quant.row_bytes(self.n_cols())
    }

    /// Bytes of `rows`.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> &[u8] {
        &self.bytes[rows.start * self.row_bytes()..rows.end * self.row_bytes()]
    }
}

/// A layer's down projection as the file has it.
#[derive(Debug, Clone)]
pub enum FileDown {
    /// `ffn_down_t` `[n_embd, n_ff]` in GGUF order: one row per neuron.
    NeuronMajor(FileMatrix),
    /// `ffn_down` `[n_ff, n_embd]` in GGUF order: one row per output.
    Plain(FileMatrix),
}

impl FileDown {
    /// The matrix, whichever way round.
    pub fn matrix(&self) -> &FileMatrix {
        match self {
            FileDown::NeuronMajor(matrix) | FileDown::Plain(matrix) => matrix,
        }
    }

    /// How it is stored.
    pub fn stored(&self) -> DownStored {
        match self {
            FileDown::NeuronMajor(matrix) => DownStored::NeuronMajor(matrix.quant),
            FileDown::Plain(matrix) => DownStored::Plain(matrix.quant),
        }
    }
}

/// Biases of query, key and value.
#[derive(Debug, Clone)]
pub struct QkvBias {
    /// `[n_head * head_dim]`
    pub q: Vec<f32>,
    /// `[n_head_kv * head_dim]`
    pub k: Vec<f32>,
    /// `[n_head_kv * head_dim]`
    pub v: Vec<f32>,
}

/// One layer's tensors.
#[derive(Debug, Clone)]
pub struct LayerTensors {
    /// `[n_embd]`
    pub attn_norm: Vec<f32>,
    /// `[n_head * head_dim, n_embd]`
    pub wq: FileMatrix,
    /// `[n_head_kv * head_dim, n_embd]`
    pub wk: FileMatrix,
    /// `[n_head_kv * head_dim, n_embd]`
    pub wv: FileMatrix,
    /// Where the architecture has them.
    pub qkv_bias: Option<QkvBias>,
    /// `[n_embd, n_head * head_dim]`
    pub wo: FileMatrix,
    /// `[n_embd]`
    pub ffn_norm: Vec<f32>,
    /// `[n_ff, n_embd]`
    pub gate: FileMatrix,
    /// `[n_ff, n_embd]`
    pub up: FileMatrix,
    /// Either way round.
    pub down: FileDown,
}

/// All tensors of a model.
#[derive(Debug, Clone)]
pub struct ModelTensors {
    /// Layers in order.
    pub layers: Vec<LayerTensors>,
    /// `[n_vocab, n_embd]`
    pub token_embd: FileMatrix,
    /// `[n_embd]`
    pub output_norm: Vec<f32>,
    /// `[n_vocab, n_embd]`; none where the head is the embedding.
    pub output: Option<FileMatrix>,
    /// The head's sketch, which comes from the sidecar and not from the model's file.
    pub head_sketch: Option<SketchTensors>,
    /// Llama 3's divisors of the rotary frequencies, `[n_rot / 2]`.
    pub rope_freqs: Option<Vec<f32>>,
}

impl ModelTensors {
    /// Finds and checks every tensor that the model needs.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape than the metadata say, or of a type that cannot be computed with.
    pub fn find(file: &GgufFile, hyper: &Hyperparameters) -> Result<Self, ModelError> {
        let find = Finder { file };
        let (n_embd, n_vocab) = (hyper.n_embd, hyper.n_vocab);
        let token_embd = find.matrix("token_embd.weight", n_vocab, n_embd)?;
        let output = match file.tensor("output.weight") {
            Some(_) => Some(find.matrix("output.weight", n_vocab, n_embd)?),
            None => None,
        };
        let rope_freqs = match file.tensor("rope_freqs.weight") {
            Some(_) => Some(find.rope_freqs(hyper.rope.n_rot / 2)?),
            None => None,
        };
        if file.tensor("output.bias").is_some() {
            let name = "output.bias".to_owned();
            return Err(ModelError::UnexpectedTensor { name });
        }
        let output_norm = find.vector("output_norm.weight", n_embd)?;
        let layers = (0..hyper.n_layer)
            .map(|layer| find.layer(layer, hyper))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            layers,
            token_embd,
            output_norm,
            output,
            head_sketch: None,
            rope_freqs,
        })
    }

    /// The matrix of the head.
    pub fn head(&self) -> &FileMatrix {
        self.output.as_ref().unwrap_or(&self.token_embd)
    }

    /// How each layer's down projection is stored.
    pub fn stored_downs(&self) -> Vec<DownStored> {
        self.layers
            .iter()
            .map(|layer| layer.down.stored())
            .collect()
    }
}

struct Finder<'a> {
    file: &'a GgufFile,
}

impl Finder<'_> {
    fn layer(&self, layer: usize, hyper: &Hyperparameters) -> Result<LayerTensors, ModelError> {
        let name = |tensor: &str| format!("blk.{layer}.{tensor}");
        let (n_embd, n_ff) = (hyper.n_embd, hyper.n_ff);
        let (n_q, n_kv) = (hyper.n_embd_q(), hyper.n_embd_kv());
        let qkv_bias = if hyper.architecture.qkv_bias {
            Some(QkvBias {
                q: self.vector(&name("attn_q.bias"), n_q)?,
                k: self.vector(&name("attn_k.bias"), n_kv)?,
                v: self.vector(&name("attn_v.bias"), n_kv)?,
            })
        } else {
            None
        };
        self.refuse_biases(layer, qkv_bias.is_some())?;
        let neuron_major = name("ffn_down_t.weight");
        let down = if self.file.tensor(&neuron_major).is_some() {
            FileDown::NeuronMajor(self.matrix(&neuron_major, n_ff, n_embd)?)
        } else {
            FileDown::Plain(self.matrix(&name("ffn_down.weight"), n_embd, n_ff)?)
        };
        Ok(LayerTensors {
            attn_norm: self.vector(&name("attn_norm.weight"), n_embd)?,
            wq: self.matrix(&name("attn_q.weight"), n_q, n_embd)?,
            wk: self.matrix(&name("attn_k.weight"), n_kv, n_embd)?,
            wv: self.matrix(&name("attn_v.weight"), n_kv, n_embd)?,
            qkv_bias,
            wo: self.matrix(&name("attn_output.weight"), n_embd, n_q)?,
            ffn_norm: self.vector(&name("ffn_norm.weight"), n_embd)?,
            gate: self.matrix(&name("ffn_gate.weight"), n_ff, n_embd)?,
            up: self.matrix(&name("ffn_up.weight"), n_ff, n_embd)?,
            down,
        })
    }

    /// A bias that would be left out changes the output silently.
    fn refuse_biases(&self, layer: usize, has_qkv: bool) -> Result<(), ModelError> {
        let qkv: &[&str] = if has_qkv {
            &[]
        } else {
            &["attn_q", "attn_k", "attn_v"]
        };
        let others = ["attn_output", "ffn_gate", "ffn_up", "ffn_down"];
        for tensor in qkv.iter().chain(&others) {
            let name = format!("blk.{layer}.{tensor}.bias");
            if self.file.tensor(&name).is_some() {
                return Err(ModelError::UnexpectedTensor { name });
            }
        }
        Ok(())
    }

    fn matrix(&self, name: &str, n_rows: usize, n_cols: usize) -> Result<FileMatrix, ModelError> {
        find_matrix(self.file, name, n_rows, n_cols)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        find_vector(self.file, name, len)
    }

    fn rope_freqs(&self, len: usize) -> Result<Vec<f32>, ModelError> {
        let name = "rope_freqs.weight";
        let factors = self.vector(name, len)?;
        match factors
            .iter()
            .find(|factor| !(factor.is_finite() && **factor > 0.0))
        {
            Some(factor) => Err(ModelError::BadValue {
                name: name.to_owned(),
                value: *factor,
                needed: "factors are positive numbers",
            }),
            None => Ok(factors),
        }
    }
}

/// The matrix called `name`, `[n_rows, n_cols]`.
pub(crate) fn find_matrix(
    file: &GgufFile,
    name: &str,
    n_rows: usize,
    n_cols: usize,
) -> Result<FileMatrix, ModelError> {
    let info = file.require_tensor(name)?;
    info.expect_shape(&[n_cols, n_rows])?;
    let quant = info.require_quant()?;
    if !n_cols.is_multiple_of(quant.block_values()) {
        return Err(ModelError::PartialBlock {
            n_values: n_cols,
            quant: quant.name(),
            block_values: quant.block_values(),
        });
    }
    Ok(FileMatrix {
        info: info.clone(),
        quant,
        bytes: file.tensor_data(info),
    })
}

/// The vector called `name`, `[len]`, as f32.
pub(crate) fn find_vector(file: &GgufFile, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
    let info = file.require_tensor(name)?;
    info.expect_shape(&[len])?;
    let quant = info.require_quant()?;
    if quant.is_quantised() {
        return Err(unsupported(
            info,
            &[QuantType::F32, QuantType::F16, QuantType::BF16],
        ));
    }
    let mut values = vec![0.0; len];
    dequantize_row(quant, &file.tensor_data(info), &mut values);
    Ok(values)
}

fn unsupported(info: &TensorInfo, supported: &[QuantType]) -> ModelError {
    let names: Vec<&str> = supported.iter().map(|quant| quant.name()).collect();
    ModelError::Gguf(GgufError::UnsupportedType {
        tensor: info.name().to_owned(),
        found: info.ggml_type(),
        supported: names.join(", "),
    })
}
