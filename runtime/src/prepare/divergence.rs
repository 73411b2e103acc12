//! How far what a run foretells is from what another one does: the mean Kullback-Leibler divergence of their next tokens.
//!
//! A rise of perplexity is this divergence and what the text's own tokens happen to add, which over a few thousand
//! of them is as large; so a mode's quality is chosen by the divergence.

use std::sync::Arc;

use super::trials::Visit;
use crate::perplexity::{Score, log_normaliser};

/// Likeliest tokens that are told apart; all others count as one, so that the divergence is a little too small.
const N_APART: usize = 512;

/// What one run foretold: of each position the likeliest tokens and their log-probabilities.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Foretold {
    /// Perplexity of the tokens that came.
    pub score: Score,
    /// Tokens of each position that are told apart.
    n_apart: usize,
    /// `[n_positions, n_apart]`
    tokens: Vec<(u32, f32)>,
}

impl Visit for Foretold {
    fn visit(&mut self, logits: &[f32], next: Option<u32>) {
        self.score.visit(logits, next);
        let normaliser = log_normaliser(logits);
        self.n_apart = N_APART.min(logits.len());
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let of = |id: &u32| logits[*id as usize];
        if self.n_apart < ids.len() {
            // equal logits in order of ids, so that the choice is one
            ids.select_nth_unstable_by(self.n_apart, |a, b| of(b).total_cmp(&of(a)).then(a.cmp(b)));
            ids.truncate(self.n_apart);
        }
        ids.sort_unstable();
        let with = |id: u32| (id, (f64::from(of(&id)) - normaliser) as f32);
        self.tokens.extend(ids.into_iter().map(with));
    }
}

/// What another run foretold of the same positions, beside it.
#[derive(Debug)]
pub(super) struct Beside {
    reference: Arc<Foretold>,
    /// Perplexity of the tokens that came.
    pub score: Score,
    n_positions: usize,
    sum: f64,
}

impl Beside {
    /// Compares with what `reference` foretold.
    pub fn new(reference: Arc<Foretold>) -> Self {
        Self {
            reference,
            score: Score::default(),
            n_positions: 0,
            sum: 0.0,
        }
    }

    /// Mean over positions of Σ p·ln(p/q), with p the reference's probabilities and q this run's; in nats. NaN of none.
    pub fn divergence(&self) -> f64 {
        self.sum / self.n_positions as f64
    }
}

impl Visit for Beside {
    /// # Panics
    /// When the reference has no such position.
    fn visit(&mut self, logits: &[f32], next: Option<u32>) {
        self.score.visit(logits, next);
        let normaliser = log_normaliser(logits);
        let n_apart = self.reference.n_apart;
        let tokens = &self.reference.tokens[self.n_positions * n_apart..][..n_apart];
        let (mut p_all, mut q_all) = (0.0, 0.0);
        for (id, log_p) in tokens {
            let (log_p, log_q) = (
                f64::from(*log_p),
                f64::from(logits[*id as usize]) - normaliser,
            );
            let p = log_p.exp();
            self.sum += p * (log_p - log_q);
            p_all += p;
            q_all += log_q.exp();
        }
        if n_apart < logits.len() {
            let (p, q) = (1.0 - p_all, 1.0 - q_all);
            // what rounding leaves of nothing
            if p > 1e-6 && q > 1e-6 {
                self.sum += p * (p / q).ln();
            }
        }
        self.n_positions += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn divergence(p: &[f32], q: &[f32]) -> f64 {
        let logits = |p: &[f32]| p.iter().map(|p| p.ln() + 1.5).collect::<Vec<f32>>();
        let mut reference = Foretold::default();
        reference.visit(&logits(p), Some(0));
        let mut beside = Beside::new(Arc::new(reference));
        beside.visit(&logits(q), Some(0));
        let ppl = beside.score.ppl();
        assert!((ppl - 1.0 / f64::from(q[0])).abs() < 1e-4, "{ppl}");
        beside.divergence()
    }

    #[test]
    fn it_is_the_sum_of_p_ln_p_over_q() {
        let (p, q) = ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25]);
        let expected = 0.5 * 2f64.ln() + 0.25 * 0.5f64.ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-6);
        assert!(divergence(&p, &p).abs() < 1e-6);
    }

    #[test]
    fn tokens_that_are_not_told_apart_count_as_one() {
        let n_tail = 100;
        let all = |first: f32, tail: f32| {
            let mut p = vec![first / N_APART as f32; N_APART];
            p.extend(vec![tail / n_tail as f32; n_tail]);
            p
        };
        let (p, q) = (all(0.9, 0.1), all(0.8, 0.2));
        let expected = 0.9 * (0.9f64 / 0.8).ln() + 0.1 * (0.1f64 / 0.2).ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-5);
    }

    #[test]
    fn logits_that_are_no_numbers_make_it_none() {
        let mut reference = Foretold::default();
        reference.visit(&[0.0, 1.0], None);
        let mut beside = Beside::new(Arc::new(reference));
        beside.visit(&[f32::NAN, 1.0], None);
        assert!(beside.divergence().is_nan());
        assert!(Beside::new(Arc::default()).divergence().is_nan());
    }
}
