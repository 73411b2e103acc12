//! Which sketch a layer gets: the cheapest that meets the target.

use super::thresholds::{Evaluation, Target};

/// What parts of a layer cost, in units of one whole scan of its gates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Costs {
    /// Scores of all neurons by signs.
    pub signs: f64,
    /// The score by the next bit of a neuron that signs named, for the share 1 of all neurons.
    pub second_bit: f64,
    /// Exact gate of a candidate that bits named, for the share 1 of all neurons.
    pub bits_candidate: f64,
    /// A low-rank map with as many weights as the gates.
    pub low_rank: f64,
    /// Exact gate of any other candidate, for the share 1 of all neurons.
    pub candidate: f64,
}

/// A way to name candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// By the gates' own signs.
    Signs,
    /// By signs, and of those that these name, by the next bit too.
    TwoBits,
    /// By a low-rank map.
    LowRank {
        /// Numbers between input and scores.
        rank: usize,
    },
}

impl Costs {
    /// Cost of scores and exact gates of candidates, in units of one whole scan of the gates `[n_ff, n_embd]`.
    pub fn of(&self, kind: Kind, found: &Evaluation, n_embd: usize, n_ff: usize) -> f64 {
        let candidates = found.candidates;
        match kind {
            Kind::Signs => self.signs + self.bits_candidate * candidates,
            Kind::TwoBits => {
                self.signs + self.second_bit * found.named + self.bits_candidate * candidates
            }
            Kind::LowRank { rank } => {
                let weights = (rank * (n_embd + n_ff)) as f64 / (n_embd * n_ff) as f64;
                self.low_rank * weights + self.candidate * candidates
            }
        }
    }
}

/// Index of the cheapest of `sketches` that meets `target` and costs less than all gates; `None`
/// where none does, and the layer is best left to `exact`.
pub fn cheapest(
    sketches: &[(Kind, Evaluation)],
    costs: &Costs,
    target: Target,
    n_embd: usize,
    n_ff: usize,
) -> Option<usize> {
    let cost = |(kind, evaluation): &(Kind, Evaluation)| costs.of(*kind, evaluation, n_embd, n_ff);
    let meets = |(_, sketch): &(usize, &(Kind, Evaluation))| {
        target.is_met(sketch.1.lost) && cost(sketch) < 1.0
    };
    let meeting = sketches.iter().enumerate().filter(meets);
    let best = meeting.min_by(|a, b| cost(a.1).total_cmp(&cost(b.1)))?;
    Some(best.0)
}

#[cfg(test)]
mod tests {
    use super::super::thresholds::Lost;
    use super::*;

    const COSTS: Costs = Costs {
        signs: 0.5,
        second_bit: 0.4,
        bits_candidate: 1.0,
        low_rank: 1.0,
        candidate: 2.0,
    };

    fn sketch(kind: Kind, mass_kept: f64, candidates: f64) -> (Kind, Evaluation) {
        let lost = Lost {
            mean: 1.0 - mass_kept,
            rms: 1.0 - mass_kept,
        };
        (
            kind,
            Evaluation {
                lost,
                candidates,
                named: 2.0 * candidates,
                ..Evaluation::default()
            },
        )
    }

    #[test]
    fn the_cheapest_that_meets_the_target_is_taken() {
        let rank = |rank| Kind::LowRank { rank };
        let sketches = [
            sketch(Kind::Signs, 0.99, 0.25),    // 0.75
            sketch(Kind::TwoBits, 0.995, 0.15), // 0.5 + 0.12 + 0.15
            sketch(rank(64), 0.99, 0.35),       // 0.15 + 0.7
            sketch(rank(32), 0.97, 0.1),        // cheap, misses the target
            sketch(rank(128), 0.985, 0.15),     // 0.31 + 0.3
            sketch(rank(192), 0.999, 0.3),      // over 1
        ];
        assert_eq!(
            cheapest(&sketches, &COSTS, Target::MassKept(0.985), 576, 1536),
            Some(4)
        );
        assert_eq!(
            cheapest(&sketches, &COSTS, Target::MassKept(0.99), 576, 1536),
            Some(0)
        );
        assert_eq!(
            cheapest(&sketches, &COSTS, Target::MassKept(0.995), 576, 1536),
            Some(1)
        );
        assert_eq!(
            cheapest(&sketches, &COSTS, Target::MassKept(0.999), 576, 1536),
            None
        );
    }
}
