//! Logit bias: a constant added to the logits of chosen tokens.

use super::params::LogitBias;

/// A place where logits lie by token id, so that a few of them can be changed.
pub(super) trait LogitsById {
    /// The logit of token `id`, which is below the vocabulary's size; none where it is no candidate.
    fn logit_mut(&mut self, id: u32) -> Option<&mut f32>;
}

impl LogitsById for [f32] {
    fn logit_mut(&mut self, id: u32) -> Option<&mut f32> {
        Some(&mut self[id as usize])
    }
}

/// Logits of some tokens, whose ids ascend.
pub(super) struct SomeLogits<'a> {
    pub ids: &'a [u32],
    pub logits: &'a mut [f32],
}

impl LogitsById for SomeLogits<'_> {
    fn logit_mut(&mut self, id: u32) -> Option<&mut f32> {
        let at = self.ids.binary_search(&id).ok()?;
        Some(&mut self.logits[at])
    }
}

/// Adds each bias to its token's logit; biases of one token add up.
pub(super) fn apply<L: LogitsById + ?Sized>(logits: &mut L, biases: &[LogitBias]) {
    for bias in biases {
        if let Some(logit) = logits.logit_mut(bias.id) {
            *logit += bias.bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_to_the_named_tokens_only() {
        let mut logits = [1.0f32, 2.0, 3.0, 4.0];
        let biases = [
            LogitBias {
                id: 3,
                bias: f32::NEG_INFINITY,
            },
            LogitBias { id: 1, bias: 2.5 },
            LogitBias { id: 1, bias: -0.5 },
        ];
        apply(&mut logits[..], &biases);
        assert_eq!(logits, [1.0, 4.0, 3.0, f32::NEG_INFINITY]);
    }
}
