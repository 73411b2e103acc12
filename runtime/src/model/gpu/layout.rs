//! What lies where in a GPU's arena.

use pi_actors::gpu::weights::{GpuAhead, GpuDown, GpuFfn, GpuHead, GpuLayer, GpuRows, GpuValues};
use pi_kernels::QuantType;
use pi_kernels::cuda::{DeviceRows, SUPPORTED, is_supported};

use super::choice::{GpuRequest, HotLayer};
use super::error::GpuModelError;
use crate::model::ModelTensors;
use crate::model::shares::neuron_groups;
use crate::model::sparsity::{DownPlan, Sparsity};
use crate::model::tensors::FileMatrix;

/// Every piece starts at a multiple of this.
const ALIGNMENT_BYTES: usize = 256;

/// Something that goes into the arena.
#[derive(Debug, Clone)]
pub(super) struct Piece<'a> {
    /// Byte of the arena.
    pub at: usize,
    pub source: PieceSource<'a>,
}

/// Where it comes from.
#[derive(Debug, Clone)]
pub(super) enum PieceSource<'a> {
    /// f32 values.
    Values(Vec<f32>),
    /// The first `n_rows` rows of a matrix, in `order` where there is one.
    Rows {
        matrix: &'a FileMatrix,
        order: Option<&'a [u32]>,
        n_rows: usize,
    },
    /// The first `n_rows` columns of a plain down projection, as rows of type `to`.
    Columns {
        matrix: &'a FileMatrix,
        to: QuantType,
        n_rows: usize,
    },
}

/// See the module.
#[derive(Debug)]
pub struct GpuLayout<'a> {
    pub(super) pieces: Vec<Piece<'a>>,
    pub(in crate::model) layers: Vec<GpuLayer>,
    pub(super) first_layer: usize,
    pub(super) head: Option<GpuHead>,
    /// Whether neurons are computed whether or not they fire.
    pub(super) is_dense: bool,
    /// Bytes of norms, projections and head.
    pub dense_bytes: usize,
    /// Bytes of predictors.
    pub predictor_bytes: usize,
    /// Bytes of a neuron of each layer.
    pub bundle_bytes: Vec<usize>,
    /// Bytes of the largest gate, up and down row, of all layers.
    pub largest_bytes: [usize; 3],
    /// Bytes of the arena.
    pub bytes: usize,
}

/// Says which of a model's tensors the kernels do not run, if there is one.
///
/// # Errors
/// [`GpuModelError::Format`].
pub(super) fn check_formats(
    tensors: &ModelTensors,
    down: &[DownPlan],
) -> Result<(), GpuModelError> {
    let layers = tensors.layers.iter().zip(down);
    let matrices = layers.flat_map(|(layer, down)| {
        let down = match down {
            DownPlan::Transposed { to, .. } => (layer.down.matrix(), *to),
            DownPlan::NeuronRows(_) | DownPlan::Dense(_) => {
                (layer.down.matrix(), layer.down.matrix().quant)
            }
        };
        let own = [
            &layer.wq,
            &layer.wk,
            &layer.wv,
            &layer.wo,
            &layer.gate,
            &layer.up,
        ];
        own.map(|matrix| (matrix, matrix.quant))
            .into_iter()
            .chain([down])
    });
    let head = tensors.head();
    for (matrix, quant) in matrices.chain([(head, head.quant)]) {
        if !is_supported(quant) {
            return Err(GpuModelError::Format {
                tensor: matrix.info.name().to_owned(),
                quant: quant.name(),
                supported: SUPPORTED.map(|quant| quant.name()).join(", "),
            });
        }
    }
    Ok(())
}

impl<'a> GpuLayout<'a> {
    /// Places the GPU's layers with these hot neurons, by layer.
    pub fn new(request: &GpuRequest<'a>, hot: &'a [HotLayer]) -> Self {
        let (shape, tensors) = (request.shape, request.tensors);
        let mut placing = Placing::default();
        let ends = neuron_groups(
            shape.n_ff,
            crate::model::layout::neuron_multiple(request.sparsity),
        );
        let mut bundle_bytes = Vec::new();
        let mut largest_bytes = [0; 3];
        let mut predictor_bytes = 0;
        let mut neuron_bytes = 0;
        let layers = request.layers.clone().zip(hot);
        let layers: Vec<GpuLayer> = layers
            .map(|(index, hot)| {
                let layer = &tensors.layers[index];
                let down = request.sparsity.down[index];
                let row = |quant, n_cols| DeviceRows {
                    quant,
                    n_rows: 1,
                    n_cols,
                };
                let n_embd = shape.n_embd;
                let neuron = [
                    row(layer.gate.quant, n_embd).row_bytes(),
                    row(layer.up.quant, n_embd).row_bytes(),
                    match down {
                        // a plain column is no row: its part of all rows
                        DownPlan::Dense(quant) => {
                            let rows = row(quant, shape.n_ff).row_bytes() * n_embd;
                            rows.div_ceil(shape.n_ff)
                        }
                        DownPlan::NeuronRows(quant) | DownPlan::Transposed { to: quant, .. } => {
                            row(quant, n_embd).row_bytes()
                        }
                    },
                ];
                bundle_bytes.push(neuron.iter().sum());
                for (largest, bytes) in largest_bytes.iter_mut().zip(neuron) {
                    *largest = bytes.max(*largest);
                }
                let order = hot.order.as_deref();
                let n_hot = ends[hot.groups];
                let attn_norm = placing.values(layer.attn_norm.clone());
                let ffn_norm = placing.values(layer.ffn_norm.clone());
                let qkv = placing.joined(&[&layer.wq, &layer.wk, &layer.wv]);
                let qkv_bias = (layer.qkv_bias.as_ref())
                    .map(|bias| placing.values([&bias.q[..], &bias.k, &bias.v].concat()));
                let wo = placing.rows(&layer.wo, None, layer.wo.n_rows());
                let before = placing.end;
                let ffn = (n_hot > 0).then(|| GpuFfn {
                    gate: placing.rows(&layer.gate, order, n_hot),
                    up: placing.rows(&layer.up, order, n_hot),
                    down: match down {
                        DownPlan::NeuronRows(_) => {
                            GpuDown::Neurons(placing.rows(layer.down.matrix(), order, n_hot))
                        }
                        DownPlan::Transposed { to, .. } => {
                            GpuDown::Neurons(placing.columns(layer.down.matrix(), to, n_hot))
                        }
                        DownPlan::Dense(_) => {
                            let matrix = layer.down.matrix();
                            GpuDown::Plain(placing.rows(matrix, None, matrix.n_rows()))
                        }
                    },
                });
                neuron_bytes += placing.end - before;
                let before = placing.end;
                let ahead = request.ahead(index).map(|ahead| GpuAhead {
                    a: placing.rows(&ahead.a, None, ahead.a.n_rows()),
                    a_bias: (ahead.a_bias.as_ref()).map(|bias| placing.values(bias.clone())),
                    b: placing.rows(&ahead.b, order, ahead.b.n_rows()),
                    b_bias: placing.values(match order {
                        None => ahead.b_bias.clone(),
                        Some(order) => order.iter().map(|&id| ahead.b_bias[id as usize]).collect(),
                    }),
                    alone: ahead.alone,
                    prefetch: ahead.prefetch,
                });
                predictor_bytes += placing.end - before;
                GpuLayer {
                    attn_norm,
                    ffn_norm,
                    qkv,
                    qkv_bias,
                    wo,
                    ffn,
                    has_cold: n_hot < shape.n_ff,
                    ahead,
                }
            })
            .collect();
        let head = (request.layers.end == shape.n_layer).then(|| {
            let head = tensors.head();
            GpuHead {
                norm: placing.values(tensors.output_norm.clone()),
                rows: placing.rows(head, None, head.n_rows()),
            }
        });
        Self {
            pieces: placing.pieces,
            layers,
            first_layer: request.layers.start,
            is_dense: request.sparsity.mode == Sparsity::Off,
            head,
            dense_bytes: placing.end - predictor_bytes - neuron_bytes,
            predictor_bytes,
            bundle_bytes,
            largest_bytes,
            bytes: placing.end,
        }
    }
}

/// Hands out the arena from its start to its end.
#[derive(Default)]
struct Placing<'a> {
    pieces: Vec<Piece<'a>>,
    end: usize,
}

impl<'a> Placing<'a> {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.end.next_multiple_of(ALIGNMENT_BYTES);
        self.end = at + bytes;
        at
    }

    fn values(&mut self, values: Vec<f32>) -> GpuValues {
        let bytes = size_of_val(&values[..]);
        let at = self.take(bytes);
        self.pieces.push(Piece {
            at,
            source: PieceSource::Values(values),
        });
        at..at + bytes
    }

    fn rows(&mut self, matrix: &'a FileMatrix, order: Option<&'a [u32]>, n_rows: usize) -> GpuRows {
        let rows = device_rows(matrix, n_rows);
        let at = self.take(rows.bytes());
        self.pieces.push(Piece {
            at,
            source: PieceSource::Rows {
                matrix,
                order,
                n_rows,
            },
        });
        GpuRows { rows, at }
    }

    fn columns(&mut self, matrix: &'a FileMatrix, to: QuantType, n_rows: usize) -> GpuRows {
        let rows = DeviceRows {
            quant: to,
            n_rows,
            n_cols: matrix.n_rows(),
        };
        let at = self.take(rows.bytes());
        self.pieces.push(Piece {
            at,
            source: PieceSource::Columns { matrix, to, n_rows },
        });
        GpuRows { rows, at }
    }

    /// Matrices one behind the other, joined where neighbours are of one format.
    fn joined(&mut self, matrices: &[&'a FileMatrix]) -> Vec<GpuRows> {
        let mut joined: Vec<GpuRows> = Vec::new();
        for matrix in matrices {
            let rows = device_rows(matrix, matrix.n_rows());
            match joined.last_mut() {
                Some(last) if last.rows.quant == matrix.quant => {
                    // rows are multiples of 16 bytes: no gap
                    let at = self.end;
                    self.end += rows.bytes();
                    last.rows.n_rows += rows.n_rows;
                    self.pieces.push(Piece {
                        at,
                        source: PieceSource::Rows {
                            matrix,
                            order: None,
                            n_rows: rows.n_rows,
                        },
                    });
                }
                _ => joined.push(self.rows(matrix, None, matrix.n_rows())),
            }
        }
        joined
    }
}

pub(super) fn device_rows(matrix: &FileMatrix, n_rows: usize) -> DeviceRows {
    DeviceRows {
        quant: matrix.quant,
        n_rows,
        n_cols: matrix.n_cols(),
    }
}
