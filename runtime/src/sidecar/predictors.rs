//! The predictors in a sidecar: a layer's own sketch, and what scores it one layer ahead.

use pi_kernels::QuantType;
use pi_kernels::ffn_sparse::sketch::planes::sums_are_exact;

use super::{Sidecar, SidecarError};
use crate::model::tensors::FileMatrix;
use crate::model::{Hyperparameters, ModelTensors};

/// Array of strings: each layer's kind of sketch.
pub const SKETCH_KIND_KEY: &str = "sparse.sketch.kind";
/// Kind of all predictors ahead.
pub const AHEAD_KIND_KEY: &str = "sparse.ahead.kind";
/// Name of a layer's biases of scores by two bits.
pub const TWO_BIT_BIAS: &str = "sketch.two_bit_bias";
/// Most values between the two matrices of a predictor.
const RANK_MAX: usize = 1 << 14;

/// What scores a layer's neurons from its own hidden state.
#[derive(Debug, Clone)]
pub struct Sketch {
    /// Which scores.
    pub kind: SketchKind,
    /// `[n_ff]`: a neuron is a candidate when score and bias are together above zero.
    pub bias: Vec<f32>,
    /// `[n_ff]`: a candidate is active when its gate is above that and above zero.
    pub floor: Option<Vec<f32>>,
}

/// Which scores a [`Sketch`] takes.
// one a layer
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone)]
pub enum SketchKind {
    /// `b · (a · x)`
    LowRank {
        /// `[rank, n_embd]`
        a: FileMatrix,
        /// `[n_ff, rank]`
        b: FileMatrix,
    },
    /// The first bits of the gate's own weights, in `Q4_0`.
    Bits {
        /// `[n_ff]`: of the neurons that signs name, those stay candidates whose score by two bits and this are
        /// together above zero. All without.
        two_bit_bias: Option<Vec<f32>>,
    },
}

impl SketchKind {
    /// The name in the file.
    pub fn name(&self) -> &'static str {
        match self {
            SketchKind::LowRank { .. } => "low_rank",
            SketchKind::Bits { two_bit_bias: None } => "signs",
            SketchKind::Bits { .. } => "two_bits",
        }
    }
}

/// What scores a layer's neurons from the residual stream of the layer before.
#[derive(Debug, Clone)]
pub struct Ahead {
    /// `[rank, n_embd]`
    pub a: FileMatrix,
    /// `[rank]`, of a predictor whose middle is rectified.
    pub a_bias: Option<Vec<f32>>,
    /// `[n_ff, rank]`
    pub b: FileMatrix,
    /// `[n_ff]`: predicted are neurons whose score and bias are together above zero.
    pub b_bias: Vec<f32>,
    /// Whether what it names is all that is computed, and no sketch adds anything; the run says, not the sidecar.
    pub alone: bool,
    /// Whether what it names is pulled towards the cache; likewise.
    pub prefetch: bool,
}

/// A layer's predictors.
#[derive(Debug, Clone, Default)]
pub struct LayerPredictors {
    /// From its own hidden state.
    pub sketch: Option<Sketch>,
    /// From the layer before.
    pub ahead: Option<Ahead>,
}

impl Sidecar {
    /// The predictors of all layers; none where the sidecar has none at all.
    ///
    /// # Errors
    /// A part is missing, of another shape or type, or has values that are not finite.
    pub fn predictors(
        &self,
        hyper: &Hyperparameters,
        tensors: &ModelTensors,
    ) -> Result<Option<Vec<LayerPredictors>>, SidecarError> {
        let metadata = self.file().metadata();
        let kinds = match metadata.get_array(SKETCH_KIND_KEY)? {
            Some(array) => array.to_strs()?,
            None => vec!["none"; hyper.n_layer],
        };
        if kinds.len() != hyper.n_layer {
            let problem = format!(
                "`{SKETCH_KIND_KEY}` has {} kinds for {} layers",
                kinds.len(),
                hyper.n_layer
            );
            return Err(self.bad_key(problem));
        }
        let ahead_kind = metadata.get_str(AHEAD_KIND_KEY)?;
        let mut layers = Vec::with_capacity(hyper.n_layer);
        for (layer, kind) in kinds.into_iter().enumerate() {
            let gate = tensors.layers[layer].gate.quant;
            layers.push(LayerPredictors {
                sketch: self.sketch(layer, kind, gate, hyper)?,
                ahead: match ahead_kind {
                    Some(kind) if layer > 0 => self.ahead(layer, kind, hyper)?,
                    _ => None,
                },
            });
        }
        let some = |layer: &LayerPredictors| layer.sketch.is_some() || layer.ahead.is_some();
        Ok(layers.iter().any(some).then_some(layers))
    }

    fn sketch(
        &self,
        layer: usize,
        kind: &str,
        gate: QuantType,
        hyper: &Hyperparameters,
    ) -> Result<Option<Sketch>, SidecarError> {
        let name = |tensor: &str| format!("blk.{layer}.{tensor}");
        let kind = match kind {
            "none" => return Ok(None),
            "signs" | "two_bits" if gate != QuantType::Q4_0 => {
                let problem = format!(
                    "layer {layer} is sketched by its weights' bits, but its gate is {} and not Q4_0",
                    gate.name()
                );
                return Err(self.bad_key(problem));
            }
            "signs" | "two_bits" if !sums_are_exact(hyper.n_embd) => {
                let problem = format!(
                    "layer {layer} is sketched by its weights' bits, of which rows of {} are too long",
                    hyper.n_embd
                );
                return Err(self.bad_key(problem));
            }
            "signs" => SketchKind::Bits { two_bit_bias: None },
            "two_bits" => SketchKind::Bits {
                two_bit_bias: Some(self.needed_vector(&name(TWO_BIT_BIAS), hyper.n_ff)?),
            },
            "low_rank" => {
                let (a, b) = self.pair(&name("sketch"), hyper)?;
                SketchKind::LowRank { a, b }
            }
            other => {
                let problem = format!("layer {layer} has a sketch of unknown kind `{other}`");
                return Err(self.bad_key(problem));
            }
        };
        Ok(Some(Sketch {
            kind,
            bias: self.needed_vector(&name("sketch.bias"), hyper.n_ff)?,
            floor: self.vector(&name("gate_floor"), hyper.n_ff)?,
        }))
    }

    fn ahead(
        &self,
        layer: usize,
        kind: &str,
        hyper: &Hyperparameters,
    ) -> Result<Option<Ahead>, SidecarError> {
        let name = |tensor: &str| format!("blk.{layer}.{tensor}");
        if self.file().tensor(&name("ahead_a.weight")).is_none() {
            return Ok(None);
        }
        let (a, b) = self.pair(&name("ahead"), hyper)?;
        let a_bias = match kind {
            "svd" => None,
            "trained" => Some(self.needed_vector(&name("ahead_a.bias"), a.n_rows())?),
            other => {
                let problem = format!("`{AHEAD_KIND_KEY}` is `{other}`, which is not known");
                return Err(self.bad_key(problem));
            }
        };
        Ok(Some(Ahead {
            a,
            a_bias,
            b,
            b_bias: self.needed_vector(&name("ahead_b.bias"), hyper.n_ff)?,
            alone: false,
            prefetch: false,
        }))
    }

    /// The two matrices of a predictor, which agree about its rank.
    fn pair(
        &self,
        name: &str,
        hyper: &Hyperparameters,
    ) -> Result<(FileMatrix, FileMatrix), SidecarError> {
        let (a, b) = (format!("{name}_a.weight"), format!("{name}_b.weight"));
        let rank = match self.file().tensor(&a) {
            Some(tensor) => tensor.n_rows(),
            None => return Err(self.missing(format!("`{a}`"))),
        };
        if rank == 0 || rank > RANK_MAX {
            return Err(self.bad_key(format!("`{a}` has {rank} rows")));
        }
        let needed = |name: &str, n_rows: usize, n_cols: usize| {
            let matrix = self.matrix(name, n_rows, n_cols)?;
            matrix.ok_or_else(|| self.missing(format!("`{name}`")))
        };
        Ok((
            needed(&a, rank, hyper.n_embd)?,
            needed(&b, hyper.n_ff, rank)?,
        ))
    }

    fn needed_vector(&self, name: &str, len: usize) -> Result<Vec<f32>, SidecarError> {
        let values = self.vector(name, len)?;
        values.ok_or_else(|| self.missing(format!("`{name}`")))
    }

    fn bad_key(&self, problem: String) -> SidecarError {
        SidecarError::BadKey {
            path: self.path().to_owned(),
            problem,
        }
    }
}
