//! Which neurons change places: pure functions over counts.

use super::Swap;

/// Whether a cold neuron fired so much more often than a hot one that they should change places: by more than three times what the
/// difference varies by chance, the root of both counts together. Of two neurons that fire equally often either is ahead at times;
/// moving them costs something, and gains nothing.
fn is_worth(cold: u32, hot: u32) -> bool {
    let ahead = u64::from(cold.saturating_sub(hot));
    ahead * ahead > 9 * (u64::from(cold) + u64::from(hot))
}

/// Two neurons of a layer that should change places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wish {
    pub swap: Swap,
    /// How much more often the cold one fired.
    pub gain: u32,
}

/// The swaps of a layer that are worth it, those that gain most first: `hot` and `cold` say how often the neurons fired, `[n_hot]`
/// and `[n_ff - n_hot]`. Of equal ones those at the front move first. Each neuron moves once at most, and after all of these swaps
/// no further one is worth it.
pub(crate) fn wishes(hot: &[u32], cold: &[u32]) -> Vec<Wish> {
    let (Some(least), Some(most)) = (hot.iter().min(), cold.iter().max()) else {
        return vec![];
    };
    // few pass, mostly: what is left is sorted
    let mut leaving = places(hot, |count| is_worth(*most, count));
    let mut coming = places(cold, |count| is_worth(count, *least));
    leaving.sort_unstable();
    coming.sort_unstable_by_key(|(count, place)| (std::cmp::Reverse(*count), *place));
    let n_hot = hot.len() as u32;
    let pairs = coming.into_iter().zip(leaving);
    let worth = pairs.take_while(|((cold, _), (hot, _))| is_worth(*cold, *hot));
    worth
        .map(|((cold, from), (hot, to))| Wish {
            swap: Swap {
                hot: to,
                cold: n_hot + from,
            },
            gain: cold - hot,
        })
        .collect()
}

/// Counts that `pass`, each with its place.
fn places(counts: &[u32], pass: impl Fn(u32) -> bool) -> Vec<(u32, u32)> {
    let numbered = counts.iter().zip(0u32..);
    let passing = numbered.filter(|(count, _)| pass(**count));
    passing.map(|(count, place)| (*count, place)).collect()
}

/// What is done of these wishes, by layer, of which a swap in layer l moves `swap_bytes[l]`: those that gain most a byte, as many
/// as `bytes_max` allow. Of equal ones the first layer's come first.
pub(crate) fn bounded(
    wishes: &[Vec<Wish>],
    swap_bytes: &[usize],
    bytes_max: usize,
) -> Vec<Vec<Swap>> {
    assert_eq!(wishes.len(), swap_bytes.len(), "bytes of each layer");
    let in_layers = wishes.iter().zip(swap_bytes).enumerate();
    let mut all: Vec<(u64, usize, Swap)> = in_layers
        .flat_map(|(layer, (wishes, bytes))| {
            // in whole numbers, so that nothing depends on rounding
            let worth = move |gain: u32| (u64::from(gain) << 32) / (*bytes).max(1) as u64;
            wishes
                .iter()
                .map(move |wish| (worth(wish.gain), layer, wish.swap))
        })
        .collect();
    // stable: a layer's stay in their order
    all.sort_by_key(|(worth, layer, _)| (std::cmp::Reverse(*worth), *layer));
    let mut swaps = vec![Vec::new(); wishes.len()];
    let mut left = bytes_max;
    for (_, layer, swap) in all {
        let Some(rest) = left.checked_sub(swap_bytes[layer]) else {
            break;
        };
        left = rest;
        swaps[layer].push(swap);
    }
    swaps
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SplitMix64.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u32) -> u32 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            ((z ^ (z >> 31)) % u64::from(n)) as u32
        }

        fn counts(&mut self, n: usize, below: u32) -> Vec<u32> {
            (0..n).map(|_| self.below(below)).collect()
        }
    }

    /// The counts after all `swaps`.
    fn after(hot: &[u32], cold: &[u32], swaps: &[Swap]) -> (Vec<u32>, Vec<u32>) {
        let mut all = [hot, cold].concat();
        for swap in swaps {
            all.swap(swap.hot as usize, swap.cold as usize);
        }
        let cold = all.split_off(hot.len());
        (all, cold)
    }

    fn sum(counts: &[u32]) -> u64 {
        counts.iter().map(|count| u64::from(*count)).sum()
    }

    fn swaps(wishes: &[Wish]) -> Vec<Swap> {
        wishes.iter().map(|wish| wish.swap).collect()
    }

    #[test]
    fn those_that_fired_most_take_the_places_of_those_that_fired_least() {
        let wishes = wishes(&[9, 0, 5, 0], &[1, 40, 7, 40, 6]);
        let swap = |hot, cold, gain| Wish {
            swap: Swap { hot, cold },
            gain,
        };
        // 7 in place of 5 may be chance
        let want = [swap(1, 5, 40), swap(3, 7, 40)];
        assert_eq!(wishes, want, "of equal ones those at the front");
    }

    #[test]
    fn what_may_be_chance_moves_nothing() {
        assert_eq!(wishes(&[10, 100, 11], &[11, 13, 1]), []);
        for (hot, cold) in [(0, 9), (1, 11), (4, 18), (100, 147)] {
            assert_eq!(wishes(&[hot], &[cold]), [], "{cold} for {hot}");
            assert_eq!(wishes(&[hot], &[cold + 1]).len(), 1, "{cold} + 1 for {hot}");
        }
        assert_eq!(wishes(&[u32::MAX], &[u32::MAX]), []);
        assert_eq!(wishes(&[], &[7]), []);
        assert_eq!(wishes(&[7], &[]), []);
    }

    #[test]
    fn moves_raise_the_hits_and_are_done_once() {
        let mut random = Random(1);
        for n in 0..200 {
            let below = [3, 40, 1000][n % 3];
            let (n_hot, n_cold) = (1 + random.below(90) as usize, 1 + random.below(90) as usize);
            let (hot, cold) = (random.counts(n_hot, below), random.counts(n_cold, below));
            let wishes_now = wishes(&hot, &cold);
            assert_eq!(wishes(&hot, &cold), wishes_now, "the same every time");
            assert!(wishes_now.is_sorted_by_key(|wish| std::cmp::Reverse(wish.gain)));
            let swaps = swaps(&wishes_now);
            let mut moved: Vec<u32> = swaps
                .iter()
                .flat_map(|swap| [swap.hot, swap.cold])
                .collect();
            for swap in &swaps {
                assert!((swap.hot as usize) < n_hot && swap.cold as usize >= n_hot);
            }
            moved.sort_unstable();
            moved.dedup();
            assert_eq!(moved.len(), 2 * swaps.len(), "each moves once");
            let (hot_after, cold_after) = after(&hot, &cold, &swaps);
            let gain: u64 = wishes_now.iter().map(|wish| u64::from(wish.gain)).sum();
            assert_eq!(sum(&hot_after), sum(&hot) + gain);
            assert_eq!(wishes(&hot_after, &cold_after), [], "{hot:?} {cold:?}");
        }
    }

    #[test]
    fn a_wrong_profile_is_mended_by_the_first_moves() {
        // neuron i fires i times: the hot ones are those that fire least
        let hot: Vec<u32> = (0..500).collect();
        let cold: Vec<u32> = (500..1000).collect();
        let (hot, cold) = after(&hot, &cold, &swaps(&wishes(&hot, &cold)));
        let best = sum(&(500..1000).collect::<Vec<u32>>());
        assert!(sum(&hot) as f64 > 0.97 * best as f64);
        assert!(cold.iter().max() > hot.iter().min(), "but not for chance");
    }

    #[test]
    fn no_more_bytes_move_than_are_allowed_and_the_best_move_first() {
        let mut random = Random(2);
        let layers: Vec<Vec<Wish>> = (0..6)
            .map(|_| wishes(&random.counts(60, 30), &random.counts(80, 40)))
            .collect();
        let bytes = [10, 30, 10, 20, 7, 10];
        let moved = |swaps: &[Vec<Swap>]| -> usize {
            swaps
                .iter()
                .zip(bytes)
                .map(|(swaps, bytes)| swaps.len() * bytes)
                .sum()
        };
        let all: Vec<Vec<Swap>> = layers.iter().map(|wishes| swaps(wishes)).collect();
        assert_eq!(bounded(&layers, &bytes, usize::MAX), all);
        assert!(bounded(&layers, &bytes, 6).iter().all(Vec::is_empty));
        let mut before = 0;
        for bytes_max in (0..moved(&all)).step_by(97) {
            let some = bounded(&layers, &bytes, bytes_max);
            let now = moved(&some);
            assert!(
                now <= bytes_max && now + 30 > bytes_max,
                "{now} of {bytes_max}"
            );
            assert!(now >= before);
            before = now;
            let least_done = least_worth(&layers, &some, &bytes, true);
            let most_left = least_worth(&layers, &some, &bytes, false);
            assert!(least_done.is_none_or(|done| most_left.is_none_or(|left| done >= left)));
            for (some, all) in some.iter().zip(&all) {
                assert_eq!(*some, all[..some.len()], "a layer's best first");
            }
        }
    }

    /// Gain a byte: the least of what was done, or the most of what was left.
    fn least_worth(
        layers: &[Vec<Wish>],
        done: &[Vec<Swap>],
        bytes: &[usize],
        of_done: bool,
    ) -> Option<u64> {
        let of_layer = layers
            .iter()
            .zip(done)
            .zip(bytes)
            .filter_map(|((wishes, done), bytes)| {
                let wish = match of_done {
                    true => done.len().checked_sub(1).map(|last| &wishes[last]),
                    false => wishes.get(done.len()),
                };
                wish.map(|wish| (u64::from(wish.gain) << 32) / *bytes as u64)
            });
        match of_done {
            true => of_layer.min(),
            false => of_layer.max(),
        }
    }
}
