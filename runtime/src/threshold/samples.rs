//! What the neurons contribute on a sample of tokens: hidden states are watched while the model runs, and gates and
//! ups computed again from the file's matrices.

use std::sync::{Arc, Mutex, PoisonError};

use pi_actors::LayerTap;
use pi_kernels::elementwise::{gelu_in_place, mul, silu_in_place};
use pi_kernels::gemm::gemm;
use pi_kernels::{ActBatch, Cpu, Layout, MatrixRef, MatrixShape, StridedOut};

use super::distribution::{Distribution, down_norms};
use crate::model::tensors::{FileMatrix, LayerTensors};
use crate::model::threshold::Criterion;
use crate::model::{GateKind, ModelError};

/// Applies an activation to gates.
type Activate = fn(Cpu, &mut [f32]);

/// Keeps the normed input of every layer's FFN for some tokens.
#[derive(Debug)]
pub struct SampleTap {
    /// Every so many positions one is kept; the first ones of a text never, which are like no others.
    stride: usize,
    layers: Vec<Mutex<LayerSample>>,
}

/// What one layer saw.
#[derive(Debug, Default)]
struct LayerSample {
    /// `[n_sampled, n_embd]`
    normed: Vec<f32>,
    /// Length (L2) of the residual stream for each.
    lengths: Vec<f32>,
}

impl SampleTap {
    /// For a model of `n_layer` layers, one of `stride` tokens.
    pub fn new(n_layer: usize, stride: usize) -> Arc<Self> {
        Arc::new(Self {
            stride: stride.max(1),
            layers: (0..n_layer).map(|_| Mutex::default()).collect(),
        })
    }
}

impl LayerTap for SampleTap {
    fn ffn_input(&self, layer: usize, first_position: usize, residual: &[f32], normed: &ActBatch) {
        let n_embd = normed.n_cols();
        let mut sample = self.layers[layer]
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (token, residual) in residual.chunks_exact(n_embd).enumerate() {
            if (first_position + token + 1).is_multiple_of(self.stride) {
                sample
                    .normed
                    .extend_from_slice(&normed.token(token).values[..n_embd]);
                let square: f64 = residual.iter().map(|x| f64::from(*x).powi(2)).sum();
                sample.lengths.push(square.sqrt() as f32);
            }
        }
    }
}

/// What is known of one layer.
#[derive(Debug)]
pub struct LayerStatistics {
    /// Contributions by |act(gate)| · ‖down row‖.
    pub by_gate: Distribution,
    /// Contributions by |act(gate) · up| · ‖down row‖.
    pub by_product: Distribution,
    /// Length of each neuron's row of down, `[n_ff]`.
    pub down_norms: Vec<f32>,
    /// Median length of the residual stream that the layer adds to.
    pub residual_length: f32,
}

impl LayerStatistics {
    /// The distribution of a criterion.
    pub fn by(&self, criterion: Criterion) -> &Distribution {
        match criterion {
            Criterion::Gate => &self.by_gate,
            Criterion::Product => &self.by_product,
        }
    }

    fn of(cpu: Cpu, activate: Activate, tensors: &LayerTensors, sample: &LayerSample) -> Self {
        let down_norms = down_norms(&tensors.down);
        let mut gates = product(cpu, &tensors.gate, &sample.normed);
        let ups = product(cpu, &tensors.up, &sample.normed);
        let mut products = vec![0.0; gates.len()];
        activate(cpu, &mut gates);
        mul(cpu, &gates, &ups, &mut products);
        let weighted = |mut values: Vec<f32>| {
            for token in values.chunks_exact_mut(down_norms.len()) {
                for (value, norm) in token.iter_mut().zip(&down_norms) {
                    *value = value.abs() * norm;
                }
            }
            Distribution::of(values)
        };
        let (by_gate, by_product) = (weighted(gates), weighted(products));
        let mut lengths = sample.lengths.clone();
        lengths.sort_unstable_by(f32::total_cmp);
        Self {
            by_gate,
            by_product,
            residual_length: lengths.get(lengths.len() / 2).copied().unwrap_or(0.0),
            down_norms,
        }
    }

    /// The statistics of all layers of a model with such gates, on `n_threads` threads.
    ///
    /// # Errors
    /// [`ModelError::GatesClose`] for ReLU gates.
    pub fn of_all(
        cpu: Cpu,
        gate: GateKind,
        layers: &[LayerTensors],
        tap: &SampleTap,
        n_threads: usize,
    ) -> Result<Vec<Self>, ModelError> {
        let activate: Activate = match gate {
            GateKind::Silu => silu_in_place,
            GateKind::Gelu => gelu_in_place,
            GateKind::Relu => return Err(ModelError::GatesClose),
        };
        let share = layers.len().div_ceil(n_threads.max(1)).max(1);
        Ok(std::thread::scope(|scope| {
            let parts = layers.chunks(share).zip(tap.layers.chunks(share));
            let threads: Vec<_> = parts
                .map(|(layers, samples)| {
                    scope.spawn(move || {
                        let of = |(tensors, sample): (&LayerTensors, &Mutex<LayerSample>)| {
                            let sample = sample.lock().unwrap_or_else(PoisonError::into_inner);
                            Self::of(cpu, activate, tensors, &sample)
                        };
                        layers.iter().zip(samples).map(of).collect::<Vec<_>>()
                    })
                })
                .collect();
            let parts = threads.into_iter().map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            parts.flatten().collect()
        }))
    }
}

/// Products of all rows of `matrix` with tokens `x` `[n_tokens, n_cols]`: `[n_tokens, n_rows]`.
fn product(cpu: Cpu, matrix: &FileMatrix, x: &[f32]) -> Vec<f32> {
    let (n_rows, n_cols) = (matrix.n_rows(), matrix.n_cols());
    let n_tokens = x.len() / n_cols;
    if n_tokens == 0 {
        return vec![];
    }
    let shape = MatrixShape {
        quant: matrix.quant,
        n_rows,
        n_cols,
        layout: Layout::Interleaved,
    };
    let mut packed = vec![0; shape.packed_bytes()];
    shape.pack(&matrix.bytes, 0, &mut packed);
    let mut batch = ActBatch::new(cpu.mode(), n_cols, n_tokens);
    for (token, values) in x.chunks_exact(n_cols).enumerate() {
        batch.set(cpu, token, values);
    }
    let mut out = vec![0.0; n_tokens * n_rows];
    let rows = StridedOut::from_slice(&mut out, n_rows, n_tokens, 0..n_rows);
    gemm(
        cpu,
        MatrixRef::new(shape, &packed),
        &batch,
        0..n_tokens,
        0..n_rows,
        rows,
    );
    out
}
