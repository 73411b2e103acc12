//! How many bytes of weights a decoded token reads.

use super::hyperparameters::Hyperparameters;
use super::sparsity::{DownPlan, Sparsity, SparsityPlan};
use super::tensors::ModelTensors;

/// Weight bytes of a decoded token, in parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Read for every token: attention, biases, gates, norms, head, the embedding row, and in `off` all neurons.
    pub always: u64,
    /// Up and down rows of all neurons, where only active ones are read.
    pub if_all_active: u64,
}

impl Footprint {
    /// The footprint of a model under a plan.
    pub fn of(hyper: &Hyperparameters, tensors: &ModelTensors, plan: &SparsityPlan) -> Self {
        let head = tensors.output.as_ref().unwrap_or(&tensors.token_embd);
        let norms = (2 * hyper.n_layer + 1) * hyper.n_embd * size_of::<f32>();
        let mut footprint = Self {
            always: (head.bytes.len() + tensors.token_embd.row_bytes() + norms) as u64,
            if_all_active: 0,
        };
        for (layer, down) in tensors.layers.iter().zip(&plan.down) {
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
            let neurons = layer.up.bytes.len() as u64 + down_bytes(*down, hyper);
            match plan.mode {
                Sparsity::Off => footprint.always += neurons,
                // what a predictor leaves out of the gates is not known here
                Sparsity::Exact | Sparsity::Predicted => footprint.if_all_active += neurons,
            }
        }
        footprint
    }

    /// Bytes of a token that activates this share of the neurons.
    pub fn bytes(self, active_share: f64) -> u64 {
        self.always + (self.if_all_active as f64 * active_share).round() as u64
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
