//! Which layers bear it badly that their rows of down are quantised again.
//!
//! A few layers move all logits by small errors of their rows, whereas the others bear them. A likely reason: in models
//! with an attention sink a few neurons write nearly all of the first token's stream, where every later token looks.

/// A layer is fragile that disturbs logits so many times as much as the median layer.
const FRAGILE: f64 = 1.5;

/// The layers whose rows of down would be quantised again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Fragility {
    /// Those first that bear it worst.
    order: Vec<usize>,
    /// How many of them are fragile.
    n_fragile: usize,
}

impl Fragility {
    /// From (layer, by how much quantising that layer alone again moves the tokens' log-likelihoods, root mean square).
    pub fn of(mut disturbances: Vec<(usize, f64)>) -> Self {
        // what is no number is worst
        disturbances.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
        let median = disturbances
            .get(disturbances.len() / 2)
            .map_or(0.0, |of| of.1);
        let is_fragile = |of: &&(usize, f64)| of.1.is_nan() || of.1 > FRAGILE * median;
        Self {
            n_fragile: disturbances.iter().take_while(is_fragile).count(),
            order: disturbances.into_iter().map(|(layer, _)| layer).collect(),
        }
    }

    /// The `n` layers that bear it worst.
    pub fn worst(&self, n: usize) -> &[usize] {
        &self.order[..n.min(self.order.len())]
    }

    /// How many layers may be spared, ascending: the fragile ones, or half of all.
    pub fn counts(&self) -> Vec<usize> {
        let mut counts = vec![self.n_fragile];
        let half = self.order.len().div_ceil(2);
        if half > self.n_fragile && half < self.order.len() {
            counts.push(half);
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_far_above_the_median_are_fragile_and_the_worst_come_first() {
        let usual = (0..8).map(|layer| (layer, 0.1 + 0.005 * layer as f64));
        let all = usual.chain([(8, 0.3), (9, 0.9), (10, f64::NAN)]).collect();
        let fragility = Fragility::of(all);
        assert_eq!(fragility.counts(), [3, 6]);
        assert_eq!(fragility.worst(4), [10, 9, 8, 7]);
    }

    #[test]
    fn models_without_such_layers_spare_none_or_half() {
        let alike = (0..4).map(|layer| (layer, 0.1)).collect();
        assert_eq!(Fragility::of(alike).counts(), [0, 2]);
        let none = Fragility::default();
        assert_eq!((none.counts(), none.worst(3)), (vec![0], &[][..]));
    }
}
