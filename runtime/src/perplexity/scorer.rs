//! Feeds a text's chunks to the pipeline and scores what comes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pi_actors::{Feed, Feeder, LogitsWanted, Next};

use super::{Chunks, Score};

/// Hears of each finished chunk: its number, counted from 1, and the perplexity so far.
pub type Report = Box<dyn FnMut(usize, f64) + Send>;

/// Scores chunk after chunk, each in an empty context.
pub struct ChunkScorer {
    chunks: Chunks,
    /// Chunks given out.
    n_given: usize,
    fed: Vec<u32>,
    score: Score,
    report: Report,
    interrupt: Arc<AtomicBool>,
}

impl ChunkScorer {
    /// Scores `chunks` until `interrupt` is set.
    pub fn new(chunks: Chunks, report: Report, interrupt: Arc<AtomicBool>) -> Self {
        Self {
            chunks,
            n_given: 0,
            fed: Vec::new(),
            score: Score::default(),
            report,
            interrupt,
        }
    }

    /// The score of all chunks so far.
    pub fn score(&self) -> &Score {
        &self.score
    }
}

impl Feeder for ChunkScorer {
    fn next(&mut self) -> Next<'_> {
        if self.n_given == self.chunks.len() || self.interrupt.load(Ordering::Acquire) {
            return Next::Done;
        }
        self.fed = self.chunks.fed(self.n_given);
        self.n_given += 1;
        Next::Feed(Feed {
            tokens: &self.fed,
            position: 0,
            logits: LogitsWanted::From(self.chunks.first_scored()),
        })
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        match self.fed.get(position + 1) {
            Some(next) => self.score.add(logits, *next),
            None => (self.report)(self.n_given, self.score.ppl()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Serves a feeder with logits that are certain of `(token + 1) % 4`.
    fn serve(scorer: &mut ChunkScorer) -> Vec<(usize, usize)> {
        let mut fed = Vec::new();
        while let Next::Feed(feed) = scorer.next() {
            let tokens = feed.tokens.to_vec();
            let (position, wanted) = (feed.position, feed.logits.range(tokens.len()));
            fed.push((tokens.len(), wanted.start));
            for index in wanted {
                let mut logits = [0.0; 4];
                logits[(tokens[index] as usize + 1) % 4] = 100.0;
                scorer.logits(position + index, &logits);
            }
        }
        fed
    }

    fn scorer(reports: &Arc<Mutex<Vec<(usize, f64)>>>, interrupted: bool) -> ChunkScorer {
        let chunks = Chunks::new((0..24).map(|i| i % 4).collect(), 8, None, None).unwrap();
        let reports = Arc::clone(reports);
        let report = move |chunk, ppl| reports.lock().unwrap().push((chunk, ppl));
        ChunkScorer::new(
            chunks,
            Box::new(report),
            Arc::new(AtomicBool::new(interrupted)),
        )
    }

    #[test]
    fn second_halves_are_scored_against_the_token_that_follows() {
        let reports = Arc::default();
        let mut scorer = scorer(&reports, false);
        assert_eq!(serve(&mut scorer), [(8, 4); 3]);
        // positions 4, 5 and 6 of each chunk, all foretold
        assert_eq!(scorer.score().count(), 9);
        assert!((scorer.score().ppl() - 1.0).abs() < 1e-6);
        let numbers: Vec<usize> = reports
            .lock()
            .unwrap()
            .iter()
            .map(|report| report.0)
            .collect();
        assert_eq!(numbers, [1, 2, 3]);
    }

    #[test]
    fn an_interrupt_ends_it_before_the_next_chunk() {
        let mut scorer = scorer(&Arc::default(), true);
        assert_eq!(serve(&mut scorer), []);
    }
}
