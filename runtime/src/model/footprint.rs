//! How many bytes of weights a decoded token reads.

use super::hyperparameters::Hyperparameters;
use super::sparsity::{DownPlan, Skipping, SparsityPlan};
use super::tensors::ModelTensors;

/// Weight bytes of a decoded token, in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Read for every token: attention, biases, gates, norms, thresholds, head, the embedding row, and all that is
    /// not skipped.
    pub always: u64,
    /// Up and down rows of all neurons, where only active ones are read.
    pub if_all_active: u64,
}

impl Footprint {
    /// The footprint of a model under a plan.
    pub fn of(hyper: &Hyperparameters, tensors: &ModelTensors, plan: &SparsityPlan) -> Self {
        let head = head_bytes(tensors);
        let norms = (2 * hyper.n_layer + 1) * hyper.n_embd * size_of::<f32>();
        let mut footprint = Self {
            always: (head + tensors.token_embd.row_bytes() + norms) as u64,
            if_all_active: 0,
        };
        for (index, (layer, down)) in tensors.layers.iter().zip(&plan.down).enumerate() {
            let attention = [&layer.wq, &layer.wk, &layer.wv, &layer.wo];
            footprint.always += attention
                .iter()
                .map(|matrix| matrix.bytes.len() as u64)
                .sum::<u64>();
            footprint.always += layer.qkv_bias.as_ref().map_or(0, |bias| {
                let values = bias.q.len() + bias.k.len() + bias.v.len();
                (values * size_of::<f32>()) as u64
            });
            footprint.always += layer.gate.bytes.len() as u64;
            let (up, down) = (layer.up.bytes.len() as u64, down_bytes(*down, hyper));
            let (always, if_active) = match plan.skipping(index) {
                Skipping::Nothing => (up + down, 0),
                Skipping::Down => (up, down),
                Skipping::UpAndDown => (0, up + down),
            };
            footprint.always += always;
            footprint.if_all_active += if_active;
        }
        if let Some(thresholds) = &plan.thresholds {
            let n_layers = thresholds.layers.iter().flatten().count();
            footprint.always += (n_layers * hyper.n_ff * size_of::<f32>()) as u64;
        }
        footprint
    }

    /// Bytes of a token that activates this share of the neurons.
    pub fn bytes(self, active_share: f64) -> u64 {
        self.always + (self.if_all_active as f64 * active_share).round() as u64
    }
}

/// What a head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeadBytes {
    /// Bytes of a token's row.
    pub row: usize,
    /// Bytes of the sketch; 0 where there is none.
    pub sketch: usize,
}

impl HeadBytes {
    /// What the head of these tensors reads.
    pub fn of(tensors: &ModelTensors) -> Self {
        let sketch = tensors.head_sketch.as_ref();
        Self {
            row: tensors.head().row_bytes(),
            sketch: sketch.map_or(0, |sketch| {
                sketch.project.bytes.len() + sketch.scores.bytes.len()
            }),
        }
    }
}

/// Bytes of the head: all of it, or its sketch and as many candidates as there were when it was made.
fn head_bytes(tensors: &ModelTensors) -> usize {
    let HeadBytes { row, sketch } = HeadBytes::of(tensors);
    match &tensors.head_sketch {
        None => tensors.head().bytes.len(),
        Some(made) => sketch + (made.mean_candidates * row as f32) as usize,
    }
}

fn down_bytes(down: DownPlan, hyper: &Hyperparameters) -> u64 {
    let bytes = match down {
        DownPlan::NeuronRows(quant) | DownPlan::Transposed { to: quant, .. } => {
            hyper.n_ff * quant.row_bytes(hyper.n_embd)
        }
        DownPlan::Dense(quant) => hyper.n_embd * quant.row_bytes(hyper.n_ff),
    };
    bytes as u64
}
