//! The search for the thresholds that save most within a budget.

use super::proposal::{Proposal, Way};

/// Largest share of the neurons that is tried.
const SHARE_MAX: f64 = 0.95;
/// The lowest share that saves enough is looked for in these steps.
const SHARE_STEP: f64 = 0.01;
/// The search ends where it is as near as this.
const NEAR_ENOUGH: f64 = 0.02;
/// What a proposal has to save at least over the best so far, of all bytes, to be worth a trial.
const WORTH: f64 = 0.002;

/// A proposal that was tried.
#[derive(Debug, Clone)]
pub struct Tried {
    /// What was tried.
    pub proposal: Proposal,
    /// How much perplexity rose: 0.01 is one percent.
    pub rise: f64,
    /// Standard error of that.
    pub error: f64,
}

impl Tried {
    /// Whether the rise is within `budget`, also if it were a standard error greater.
    pub fn within(&self, budget: f64) -> bool {
        within(self.rise, self.error, budget)
    }
}

/// Whether a rise of perplexity is within `budget`, also if it were its standard error greater.
pub fn within(rise: f64, error: f64, budget: f64) -> bool {
    rise + error <= budget
}

/// The proposal with the fewest bytes whose rise is [`within`] `budget`; where there is none, the one that rose least; none
/// where nothing saves bytes.
///
/// Each way is first tried where it saves more than the best so far, so that most cost one trial.
///
/// # Errors
/// What `rise` returns, which gives a proposal's rise and its standard error.
pub fn search<E>(
    ways: &[Way],
    bytes_off: f64,
    budget: f64,
    propose: impl Fn(Way, f64) -> Proposal,
    mut rise: impl FnMut(&Proposal) -> Result<(f64, f64), E>,
) -> Result<Option<Tried>, E> {
    let (mut best, mut nearest): (Option<Tried>, Option<Tried>) = (None, None);
    for &way in ways {
        let limit = best.as_ref().map_or(bytes_off, |best| best.proposal.bytes) - WORTH * bytes_off;
        let mut attempt = |share: f64| -> Result<bool, E> {
            let proposal = propose(way, share);
            let (rise, error) = rise(&proposal)?;
            let tried = Tried {
                proposal,
                rise,
                error,
            };
            let within = tried.within(budget);
            if within {
                best = Some(tried);
            } else if nearest.as_ref().is_none_or(|nearest| rise < nearest.rise) {
                nearest = Some(tried);
            }
            Ok(within)
        };
        let Some(first) = first_below(limit, |share| propose(way, share).bytes) else {
            continue;
        };
        if !attempt(first)? {
            continue;
        }
        let (mut low, mut high) = (first, SHARE_MAX);
        while high - low > NEAR_ENOUGH {
            let middle = (low + high) / 2.0;
            if attempt(middle)? {
                low = middle;
            } else {
                high = middle;
            }
        }
    }
    Ok(best.or(nearest))
}

/// The lowest share with fewer bytes than `limit`, if there is one.
fn first_below(limit: f64, bytes: impl Fn(f64) -> f64) -> Option<f64> {
    let steps = (SHARE_MAX / SHARE_STEP).round() as usize;
    let mut shares = (1..=steps).map(|step| step as f64 * SHARE_STEP);
    shares.find(|share| bytes(*share) < limit)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;

    use pi_kernels::QuantType;

    use super::*;
    use crate::model::threshold::{Criterion, Thresholds};

    /// Standard error of every rise.
    const ERROR: f64 = 0.001;

    fn way(criterion: Criterion, down: QuantType) -> Way {
        Way {
            criterion,
            down: Some(down),
            spared: 0,
        }
    }

    /// 100 bytes in `off`, of which skipping saves a part, less what the way costs.
    fn propose(way: Way, wanted: f64) -> Proposal {
        let cost = if way.down == Some(QuantType::Q8_0) {
            12.0
        } else {
            3.0
        };
        let layers = vec![];
        Proposal {
            way,
            wanted,
            thresholds: Arc::new(Thresholds {
                layers,
                skipped: wanted,
            }),
            bytes: 100.0 + cost - 30.0 * wanted,
        }
    }

    /// Rises with the square of the share; `floor` before anything is skipped.
    fn run(ways: &[Way], budget: f64, floor: impl Fn(Way) -> f64) -> (Option<Tried>, usize) {
        let mut n = 0;
        let found = search(ways, 100.0, budget, propose, |proposal| {
            n += 1;
            let floor = floor(proposal.way);
            Ok::<_, Infallible>((floor + 0.04 * proposal.wanted.powi(2), ERROR))
        });
        (found.unwrap(), n)
    }

    #[test]
    fn the_largest_share_within_the_budget_is_found() {
        let ways = [way(Criterion::Product, QuantType::Q5_0)];
        let (found, n) = run(&ways, 0.005, |_| 0.0);
        let found = found.unwrap();
        // 0.04 · share² + 0.001 = 0.005
        assert!((found.proposal.wanted - 0.3162).abs() < 0.02, "{found:?}");
        assert!(found.rise + ERROR <= 0.005 && n <= 9, "{n} trials");
    }

    #[test]
    fn ways_that_cannot_save_more_cost_one_trial_or_none() {
        let good = way(Criterion::Product, QuantType::Q5_0);
        let dear = way(Criterion::Gate, QuantType::Q8_0);
        let (_, alone) = run(&[good], 0.005, |_| 0.0);
        let (found, both) = run(&[good, dear], 0.005, |_| 0.0);
        assert_eq!((found.unwrap().proposal.way, both), (good, alone + 1));
    }

    #[test]
    fn without_anything_within_the_budget_the_nearest_is_given() {
        let ways = [
            way(Criterion::Gate, QuantType::Q5_0),
            way(Criterion::Product, QuantType::Q5_0),
        ];
        let floor = |way: Way| {
            if way.criterion == Criterion::Gate {
                0.1
            } else {
                0.02
            }
        };
        let (found, n) = run(&ways, 0.005, floor);
        let found = found.unwrap();
        assert_eq!(found.proposal.way.criterion, Criterion::Product);
        assert!(found.rise > 0.005 && n == 2);
    }

    #[test]
    fn nothing_is_tried_where_no_share_saves_bytes() {
        let ways = [way(Criterion::Gate, QuantType::Q5_0)];
        let nothing = |way, wanted| Proposal {
            bytes: 101.0,
            ..propose(way, wanted)
        };
        let found = search(
            &ways,
            100.0,
            0.005,
            nothing,
            |_| -> Result<(f64, f64), Infallible> { panic!("a trial for nothing") },
        );
        assert!(found.unwrap().is_none());
    }
}
