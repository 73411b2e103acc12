//! Feeds a test's tokens and takes the time on the pipeline's own thread.

use std::time::{Duration, Instant};

use pi_actors::{Candidates, Feed, Feeder, HeadWanted, LogitsWanted, Next};

/// Feeds some tokens from a position on, some at a time.
#[derive(Debug)]
pub struct BenchFeeder {
    tokens: Vec<u32>,
    position: usize,
    n_given: usize,
    /// Tokens of a feed.
    step: usize,
    wanted: LogitsWanted,
    /// Whether a sketch picks whose logits are computed.
    sparse_head: bool,
    start: Option<Instant>,
    last_logits: Option<Instant>,
}

impl BenchFeeder {
    /// Fills the cache: all at once, and nobody wants the logits.
    pub fn fill(tokens: Vec<u32>) -> Self {
        let step = tokens.len();
        Self::new(tokens, 0, step, LogitsWanted::None)
    }

    /// A prompt: all at once, and the last token's logits.
    pub fn prefill(tokens: Vec<u32>, position: usize) -> Self {
        let step = tokens.len();
        Self::new(tokens, position, step, LogitsWanted::Last)
    }

    /// A text as it would be generated: token by token, each with its logits.
    pub fn decode(tokens: Vec<u32>, position: usize) -> Self {
        Self::new(tokens, position, 1, LogitsWanted::Last)
    }

    fn new(tokens: Vec<u32>, position: usize, step: usize, wanted: LogitsWanted) -> Self {
        Self {
            tokens,
            position,
            n_given: 0,
            step,
            wanted,
            sparse_head: false,
            start: None,
            last_logits: None,
        }
    }

    /// The same with the sparse head where `sparse` is true.
    pub fn with_sparse_head(self, sparse: bool) -> Self {
        Self {
            sparse_head: sparse,
            ..self
        }
    }

    /// From when the first token was given out to when the last logits came; zero without logits.
    pub fn elapsed(&self) -> Duration {
        self.start
            .zip(self.last_logits)
            .map_or(Duration::ZERO, |(start, end)| end.duration_since(start))
    }
}

impl Feeder for BenchFeeder {
    fn next(&mut self) -> Next<'_> {
        if self.n_given == self.tokens.len() {
            return Next::Done;
        }
        let given = self.n_given;
        self.n_given = (given + self.step).min(self.tokens.len());
        self.start.get_or_insert_with(Instant::now);
        Next::Feed(Feed {
            tokens: &self.tokens[given..self.n_given],
            position: self.position + given,
            logits: self.wanted,
        })
    }

    fn logits(&mut self, _position: usize, _logits: &[f32]) {
        self.last_logits = Some(Instant::now());
    }

    fn head(&self) -> HeadWanted<'_> {
        match self.sparse_head {
            true => HeadWanted::Sparse { biases: &[] },
            false => HeadWanted::Full,
        }
    }

    fn candidates(&mut self, _position: usize, _candidates: Candidates<'_>) {
        self.last_logits = Some(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes, positions and wanted logits of all feeds.
    fn feeds(mut feeder: BenchFeeder) -> Vec<(usize, usize, LogitsWanted)> {
        let mut feeds = Vec::new();
        while let Next::Feed(feed) = feeder.next() {
            feeds.push((feed.tokens.len(), feed.position, feed.logits));
            feeder.logits(0, &[]);
        }
        feeds
    }

    #[test]
    fn prompts_come_at_once_and_decoding_token_by_token() {
        let (none, last) = (LogitsWanted::None, LogitsWanted::Last);
        assert_eq!(feeds(BenchFeeder::fill(vec![1, 2, 3])), [(3, 0, none)]);
        assert_eq!(feeds(BenchFeeder::fill(vec![])), []);
        assert_eq!(feeds(BenchFeeder::prefill(vec![1, 2], 5)), [(2, 5, last)]);
        assert_eq!(
            feeds(BenchFeeder::decode(vec![1, 2], 5)),
            [(1, 5, last), (1, 6, last)]
        );
    }

    #[test]
    fn the_clock_runs_from_the_first_token_to_the_last_logits() {
        let mut feeder = BenchFeeder::prefill(vec![1], 0);
        assert_eq!(feeder.elapsed(), Duration::ZERO);
        feeder.next();
        let before = Instant::now();
        while before.elapsed() < Duration::from_millis(2) {}
        feeder.logits(0, &[]);
        assert!(feeder.elapsed() >= Duration::from_millis(2));
    }
}
