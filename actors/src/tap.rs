//! Looking at what passes through the layers, to profile a model.

use std::fmt::Debug;

use pi_kernels::ActBatch;

/// Sees every step's hidden states on their way. For profiling: it may allocate and take its time.
///
/// A step that fails is repeated, and seen again.
pub trait LayerTap: Debug + Send + Sync {
    /// What enters the FFN of `layer`, for the tokens at positions `first_position..`: the residual
    /// stream after attention, `[n_tokens, n_embd]` f32, and the same normed for the FFN, the first
    /// `n_tokens` rows of `normed`. Called on node 0's thread, in the order of layers.
    fn ffn_input(&self, layer: usize, first_position: usize, residual: &[f32], normed: &ActBatch);

    /// What enters the head, for the `n_tokens` tokens at positions `first_position..`: the residual stream normed for
    /// the head, the first `n_tokens` rows of `normed`. Only tokens whose logits are wanted come here.
    fn head_input(&self, first_position: usize, n_tokens: usize, normed: &ActBatch) {
        let _ = (first_position, n_tokens, normed);
    }
}
