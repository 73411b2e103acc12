//! What `bench` feeds: real text by default, because random ids make other neurons fire.

/// Text shipped with the program (origin and licence: tests/fixtures/README.md).
pub const TEXT: &str = include_str!("../../../tests/fixtures/text/bench.txt");

/// An endless supply of tokens, the same in every run.
#[derive(Debug, Clone)]
pub enum TokenSource {
    /// A text's tokens, over and over.
    Text(Vec<u32>),
    /// Any id of a vocabulary, from a fixed seed.
    Random {
        /// Tokens in the vocabulary.
        n_vocab: u32,
    },
}

impl TokenSource {
    /// The first `n` tokens; `bos` in front where the model wants one.
    pub fn take(&self, n: usize, bos: Option<u32>) -> Vec<u32> {
        let rest = n.saturating_sub(usize::from(bos.is_some()));
        let tokens: Vec<u32> = match self {
            TokenSource::Text(tokens) => tokens.iter().copied().cycle().take(rest).collect(),
            TokenSource::Random { n_vocab } => {
                let mut state = 0x9e37_79b9_7f4a_7c15_u64;
                (0..rest)
                    .map(|_| (split_mix(&mut state) % u64::from(*n_vocab)) as u32)
                    .collect()
            }
        };
        bos.into_iter().take(n).chain(tokens).collect()
    }

    /// The name in a row.
    pub fn name(&self) -> &'static str {
        match self {
            TokenSource::Text(_) => "text",
            TokenSource::Random { .. } => "random",
        }
    }
}

/// SplitMix64. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_round_and_bos_counts() {
        let source = TokenSource::Text(vec![5, 6, 7]);
        assert_eq!(source.take(5, None), [5, 6, 7, 5, 6]);
        assert_eq!(source.take(3, Some(1)), [1, 5, 6]);
        assert_eq!(source.take(0, Some(1)), [0u32; 0]);
    }

    #[test]
    fn random_ids_repeat_and_stay_in_the_vocabulary() {
        let source = TokenSource::Random { n_vocab: 10 };
        let ids = source.take(1000, None);
        assert_eq!(ids, source.take(1000, None));
        assert!((0..10).all(|id| ids.contains(&id)) && ids.iter().all(|id| *id < 10));
    }
}
