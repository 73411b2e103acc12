//! What predictors take: bytes that their scores read, and time.
//!
//! Scores are a part of a message's handler, and an event for each would fill the ring. They are summed, for tokens that go
//! one by one: bytes as a handler counts them, time on the node's first thread, whose part of a team's job is as large as
//! any other's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::clock::{Clock, Scale};

/// What scores neurons, or tokens of the vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Scorer {
    /// The sketch in the layer: signs of all neurons' gates.
    Signs,
    /// The same: the next bit of those that signs named.
    SecondBits,
    /// The same: a map of low rank.
    LowRank,
    /// The predictor one layer ahead.
    Ahead,
    /// The sketch of the head.
    Head,
}

impl Scorer {
    /// All of them, in the order of their codes.
    pub const ALL: [Scorer; 5] = [
        Scorer::Signs,
        Scorer::SecondBits,
        Scorer::LowRank,
        Scorer::Ahead,
        Scorer::Head,
    ];
}

/// What scores took since the engine started, repeated steps included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScoreCost {
    /// Bytes of weights read.
    pub bytes: u64,
    /// Time of the node's first thread, waiting for its team's others included where scores need all of theirs.
    pub ns: u64,
}

/// One node's sums.
#[derive(Debug)]
pub(crate) struct ScoreSums {
    clock: Clock,
    bytes: [AtomicU64; Scorer::ALL.len()],
    ticks: [AtomicU64; Scorer::ALL.len()],
}

impl ScoreSums {
    /// All zero, timed by `clock`.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            bytes: Default::default(),
            ticks: Default::default(),
        }
    }

    /// What was summed up, in the order of [`Scorer::ALL`].
    pub fn costs(&self, scale: Scale) -> [ScoreCost; Scorer::ALL.len()] {
        std::array::from_fn(|scorer| ScoreCost {
            bytes: self.bytes[scorer].load(Ordering::Relaxed),
            ns: scale.duration_ns(self.ticks[scorer].load(Ordering::Relaxed)),
        })
    }
}

/// A node's way to its sums, if it is traced.
#[derive(Debug, Default)]
pub(crate) struct Scores(Option<Arc<ScoreSums>>);

impl Scores {
    /// Into `sums`, or nowhere.
    pub fn new(sums: Option<Arc<ScoreSums>>) -> Self {
        Self(sums)
    }

    /// Scores have read `bytes`.
    pub fn read(&self, scorer: Scorer, bytes: usize) {
        if let Some(sums) = &self.0 {
            sums.bytes[scorer as usize].fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }

    /// A watch that starts now, for the team's first thread; others' stand still.
    #[inline]
    pub fn watch(&self, thread: usize) -> Watch<'_> {
        let sums = self.0.as_deref().filter(|_| thread == 0);
        Watch(sums.map(|sums| (sums, sums.clock.ticks())))
    }
}

/// Runs while scores are made.
pub(crate) struct Watch<'a>(Option<(&'a ScoreSums, u64)>);

impl Watch<'_> {
    /// What was done since the start, or the lap before, was the work of `scorer`.
    #[inline]
    pub fn lap(&mut self, scorer: Scorer) {
        if let Some((sums, since)) = &mut self.0 {
            let now = sums.clock.ticks();
            let ticks = now.saturating_sub(*since);
            sums.ticks[scorer as usize].fetch_add(ticks, Ordering::Relaxed);
            *since = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn laps_are_summed_for_the_first_thread_alone() {
        let clock = Clock::start();
        let sums = Arc::new(ScoreSums::new(clock));
        let scores = Scores::new(Some(Arc::clone(&sums)));
        let (mut first, mut second) = (scores.watch(0), scores.watch(1));
        for scorer in [Scorer::Signs, Scorer::Head, Scorer::Signs] {
            std::thread::sleep(Duration::from_millis(2));
            first.lap(scorer);
            second.lap(scorer);
            second.lap(Scorer::Ahead);
        }
        scores.read(Scorer::LowRank, 7);
        scores.read(Scorer::LowRank, 5);
        let all_ns = u64::try_from(clock.started().elapsed().as_nanos()).unwrap();
        let [signs, second_bits, low_rank, ahead, head] = sums.costs(clock.scale());
        let zero = ScoreCost::default();
        assert_eq!([second_bits, ahead], [zero, zero]);
        assert_eq!((low_rank.bytes, low_rank.ns), (12, 0));
        // the clocks agree to within a few µs
        assert!(
            signs.ns > 3_900_000 && head.ns > 1_900_000,
            "{signs:?} {head:?}"
        );
        assert!(signs.ns + head.ns < all_ns + 100_000, "{all_ns} ns in all");
        assert_eq!(signs.bytes, 0);
    }
}
