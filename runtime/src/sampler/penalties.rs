//! Repetition, presence and frequency penalties over the last tokens.

use super::logit_bias::LogitsById;
use super::params::{REPEAT_LAST_N_MAX, SamplerParams};

/// The last `repeat_last_n` tokens and what they cost.
///
/// Source: llama.cpp's `penalties` sampler; the repetition penalty is CTRL's (Keskar et al.
/// 2019), multiplying where the logit is not positive.
#[derive(Debug, Clone)]
pub(super) struct Penalties {
    repeat: f32,
    presence: f32,
    frequency: f32,
    /// Ring of the last tokens; `next` is the oldest once it is full.
    last: Vec<u32>,
    next: usize,
    capacity: usize,
    /// How often each token is in the ring, `[n_vocab]`; empty where the penalties are off.
    counts: Vec<u32>,
    /// The tokens with a count, each once.
    distinct: Vec<u32>,
}

impl Penalties {
    /// Penalties that are off allocate nothing.
    pub fn new(params: &SamplerParams, n_vocab: usize) -> Self {
        let on = params.penalises();
        // a window without a context to bound it is the longest one
        let last_n = usize::try_from(params.repeat_last_n).unwrap_or(REPEAT_LAST_N_MAX as usize);
        let capacity = if on { last_n } else { 0 };
        Self {
            repeat: params.repeat_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
            last: Vec::with_capacity(capacity),
            next: 0,
            capacity,
            counts: vec![0; if on { n_vocab } else { 0 }],
            distinct: Vec::with_capacity(capacity.min(n_vocab) + 1),
        }
    }

    /// Records a token; the oldest leaves when `repeat_last_n` are there.
    pub fn accept(&mut self, id: u32) {
        if self.capacity == 0 || id as usize >= self.counts.len() {
            return;
        }
        if self.last.len() < self.capacity {
            self.last.push(id);
        } else {
            let oldest = std::mem::replace(&mut self.last[self.next], id);
            self.next = (self.next + 1) % self.capacity;
            self.forget(oldest);
        }
        let count = &mut self.counts[id as usize];
        *count += 1;
        if *count == 1 {
            self.distinct.push(id);
        }
    }

    fn forget(&mut self, id: u32) {
        let count = &mut self.counts[id as usize];
        *count -= 1;
        if *count == 0 {
            let at = self.distinct.iter().position(|&other| other == id);
            self.distinct
                .swap_remove(at.expect("every counted token is in `distinct`"));
        }
    }

    /// Lowers the logits of the recorded tokens.
    pub fn apply<L: LogitsById + ?Sized>(&self, logits: &mut L) {
        for &id in &self.distinct {
            let count = self.counts[id as usize] as f32;
            let Some(logit) = logits.logit_mut(id) else {
                continue;
            };
            if *logit <= 0.0 {
                *logit *= self.repeat;
            } else {
                *logit /= self.repeat;
            }
            *logit -= count * self.frequency + self.presence;
        }
    }

    /// Forgets all tokens.
    pub fn reset(&mut self) {
        for &id in &self.distinct {
            self.counts[id as usize] = 0;
        }
        self.distinct.clear();
        self.last.clear();
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn penalties(repeat: f32, frequency: f32, presence: f32, last_n: i32) -> Penalties {
        let params = SamplerParams {
            repeat_penalty: repeat,
            frequency_penalty: frequency,
            presence_penalty: presence,
            repeat_last_n: last_n,
            ..SamplerParams::default()
        };
        Penalties::new(&params, 5)
    }

    fn applied(penalties: &Penalties, logits: [f32; 5]) -> [f32; 5] {
        let mut logits = logits;
        penalties.apply(&mut logits[..]);
        logits
    }

    #[test]
    fn repetition_divides_positive_and_multiplies_other_logits_once_per_token() {
        let mut p = penalties(2.0, 0.0, 0.0, 64);
        for id in [0, 1, 1, 2] {
            p.accept(id);
        }
        assert_eq!(
            applied(&p, [4.0, -4.0, 0.0, 3.0, -3.0]),
            [2.0, -8.0, 0.0, 3.0, -3.0]
        );
    }

    #[test]
    fn frequency_counts_and_presence_does_not() {
        let mut p = penalties(1.0, 0.5, 0.25, 64);
        for id in [3, 3, 3, 1] {
            p.accept(id);
        }
        // 3 three times: 3·0.5 + 0.25; 1 once: 0.5 + 0.25
        assert_eq!(applied(&p, [1.0; 5]), [1.0, 0.25, 1.0, -0.75, 1.0]);
    }

    #[test]
    fn repetition_comes_before_the_subtraction() {
        let mut p = penalties(2.0, 0.0, 1.0, 64);
        p.accept(0);
        assert_eq!(applied(&p, [4.0, 0.0, 0.0, 0.0, 0.0])[0], 1.0);
    }

    #[test]
    fn only_the_last_n_tokens_count() {
        let mut p = penalties(1.0, 1.0, 0.0, 3);
        for id in [0, 0, 1, 2, 0, 4] {
            p.accept(id);
        }
        // the last three: 2, 0, 4
        assert_eq!(applied(&p, [0.0; 5]), [-1.0, 0.0, -1.0, 0.0, -1.0]);
        p.reset();
        assert_eq!(applied(&p, [0.0; 5]), [0.0; 5]);
        p.accept(3);
        assert_eq!(applied(&p, [0.0; 5]), [0.0, 0.0, 0.0, -1.0, 0.0]);
    }

    #[test]
    fn off_by_factors_or_by_length() {
        for p in [penalties(1.0, 0.0, 0.0, 64), penalties(2.0, 1.0, 1.0, 0)] {
            let mut p = p;
            p.accept(0);
            assert_eq!(applied(&p, [1.0; 5]), [1.0; 5]);
        }
    }

    #[test]
    fn a_token_outside_the_vocabulary_is_not_counted() {
        let mut p = penalties(1.0, 1.0, 0.0, 3);
        p.accept(99);
        assert_eq!(applied(&p, [0.0; 5]), [0.0; 5]);
    }
}
