//! The tokens that are still in the race, with their logits and probabilities.

use std::cmp::Ordering;

use super::logit_bias::LogitsById;

/// A token that can still be chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub id: u32,
    /// Logit, after the samplers so far.
    pub logit: f32,
    /// Probability, valid after [`Candidates::softmax`].
    pub p: f32,
    /// What a sampler sorts by, where that is not the logit.
    pub(super) key: f32,
}

/// The candidates of one draw; its buffer is allocated once.
#[derive(Debug, Default)]
pub struct Candidates {
    items: Vec<Candidate>,
    /// Whether `items` is in descending order of logits, lower ids first among equals.
    sorted: bool,
}

/// A copy has the same room, where a copied list has none.
impl Clone for Candidates {
    fn clone(&self) -> Self {
        let mut items = Vec::with_capacity(self.items.capacity());
        items.extend_from_slice(&self.items);
        Self {
            items,
            sorted: self.sorted,
        }
    }
}

/// Descending logit, then ascending id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Candidates {
    /// An empty set with room for `n_vocab` candidates.
    pub fn with_capacity(n_vocab: usize) -> Self {
        Self {
            items: Vec::with_capacity(n_vocab),
            sorted: false,
        }
    }

    /// Takes every token of `logits` (f32, `[n_vocab]`) as a candidate; NaN becomes −∞.
    ///
    /// # Panics
    /// When there are more than the capacity (that would allocate).
    pub fn fill(&mut self, logits: &[f32]) {
        self.fill_with((0..).zip(logits.iter().copied()), logits.len());
    }

    /// Takes the tokens `ids`, which ascend, with their `logits`; NaN becomes −∞.
    ///
    /// # Panics
    /// As [`Candidates::fill`], or when the lengths differ.
    pub fn fill_some(&mut self, ids: &[u32], logits: &[f32]) {
        assert_eq!(ids.len(), logits.len(), "a logit for each token");
        self.fill_with(ids.iter().copied().zip(logits.iter().copied()), ids.len());
    }

    fn fill_with(&mut self, logits: impl Iterator<Item = (u32, f32)>, n: usize) {
        assert!(
            n <= self.items.capacity(),
            "more logits than the sampler was made for"
        );
        self.items.clear();
        self.items.extend(logits.map(|(id, logit)| Candidate {
            id,
            logit: if logit.is_nan() {
                f32::NEG_INFINITY
            } else {
                logit
            },
            p: 0.0,
            key: 0.0,
        }));
        self.sorted = false;
    }

    /// The candidates as they lie.
    pub fn items(&self) -> &[Candidate] {
        &self.items
    }

    /// The candidates, when their order is not to change.
    pub(super) fn items_mut(&mut self) -> &mut [Candidate] {
        &mut self.items
    }

    /// Whether the candidates lie in descending order of logits.
    pub fn is_sorted(&self) -> bool {
        self.sorted
    }

    /// Sorts all candidates by descending logit.
    pub(super) fn sort(&mut self) {
        if !self.sorted {
            self.items.sort_unstable_by(by_rank);
            self.sorted = true;
        }
    }

    /// Brings the `n` best to the front, in order, and leaves the others behind them in any order.
    pub(super) fn sort_front(&mut self, n: usize) {
        if self.sorted {
            return;
        }
        if n >= self.items.len() {
            return self.sort();
        }
        if n > 0 {
            self.items.select_nth_unstable_by(n - 1, by_rank);
            self.items[..n].sort_unstable_by(by_rank);
        }
    }

    /// Keeps the first `n`, which the caller has put in order (`sorted` says by logit).
    pub(super) fn truncate(&mut self, n: usize, sorted: bool) {
        self.items.truncate(n);
        self.sorted = sorted;
    }

    /// Keeps the candidates for which `keep` holds, in their order.
    pub(super) fn retain(&mut self, keep: impl FnMut(&Candidate) -> bool) {
        self.items.retain(keep);
    }

    /// Sorts by ascending `key` (then by rank); afterwards the order is not that of the logits.
    pub(super) fn sort_by_key_field(&mut self) {
        self.items
            .sort_unstable_by(|a, b| a.key.total_cmp(&b.key).then(by_rank(a, b)));
        self.sorted = false;
    }

    /// The highest logit.
    pub(super) fn highest_logit(&self) -> f32 {
        if self.sorted {
            return self.items[0].logit;
        }
        self.items
            .iter()
            .map(|c| c.logit)
            .fold(f32::NEG_INFINITY, f32::max)
    }

    /// Sets every `p` from the logits: `exp(logit − highest)` over their sum.
    ///
    /// Where the highest logit is infinite the candidates that have it share the mass equally.
    pub fn softmax(&mut self) {
        let highest = self.highest_logit();
        let mut sum = 0.0f32;
        for c in &mut self.items {
            c.p = weight(c.logit, highest);
            sum += c.p;
        }
        for c in &mut self.items {
            c.p /= sum;
        }
    }
}

/// `exp(logit − highest)`, also where both are infinite.
pub(super) fn weight(logit: f32, highest: f32) -> f32 {
    if highest.is_infinite() {
        f32::from(logit == highest)
    } else {
        (logit - highest).exp()
    }
}

/// By id right after they were filled in, while they lie in the order of the vocabulary.
impl LogitsById for Candidates {
    fn logit_mut(&mut self, id: u32) -> Option<&mut f32> {
        let all = self.items.get(id as usize).is_some_and(|c| c.id == id);
        let at = match all {
            true => id as usize,
            false => self.items.binary_search_by_key(&id, |c| c.id).ok()?,
        };
        Some(&mut self.items[at].logit)
    }
}
