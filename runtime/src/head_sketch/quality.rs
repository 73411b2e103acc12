//! How many candidates each of several sketches needs, and which sketch reads the least.

use std::ops::Range;

use pi_kernels::gemm::{gemm, gemv};
use pi_kernels::head_sparse::{group_maxima, kth_largest};
use pi_kernels::{
    ActBatch, ActivationMode, Cpu, Layout, MatrixRef, MatrixShape, QuantType, ROW_GROUP, StridedOut,
};

use super::blocks::each;
use super::{FitOptions, HeadSamples, PROJECT_TYPE, SCORES_TYPE};
use crate::model::tensors::FileMatrix;
use crate::sampler::argmax;

/// A sketch to choose from.
pub(super) struct Offer {
    pub rank: usize,
    /// `[rank, n_embd]` in [`PROJECT_TYPE`].
    pub project: Vec<u8>,
    /// `[n_vocab, rank]` in [`SCORES_TYPE`].
    pub scores: Vec<u8>,
}

/// The sketch that was chosen.
pub(super) struct Chosen {
    /// Which offer.
    pub offer: usize,
    pub n_groups: usize,
    pub mean_candidates: f64,
}

/// Tokens whose logits are this far below the highest, or further, are not drawn by default (min-p of 0.05).
const NEAR: f32 = 3.0;
/// Hidden states that are judged together.
const BATCH: usize = 32;
/// Of how many hidden states one has its candidates counted.
const COUNTED: usize = 8;
/// What a row read by itself costs, relative to its bytes in a stream.
const ROW_COST: f64 = 1.5;
/// A sketch that costs more of the head's bytes is not worth its loss.
const COST_MAX: f64 = 2.0 / 3.0;

/// Numbers of groups to choose from: two between powers of two.
fn group_numbers(n_groups: usize) -> Vec<usize> {
    let powers = (3..).map(|power| 1usize << power);
    let numbers = powers.flat_map(|power| [power, power + power / 2]);
    let mut numbers: Vec<usize> = numbers.take_while(|n| *n < n_groups).collect();
    numbers.push(n_groups);
    numbers
}

/// What was seen of one offer with one number of groups.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// Hidden states whose likeliest token is no candidate.
    missed: usize,
    /// Sum over hidden states: share of the near tokens' probability that is lost.
    lost: f64,
    candidates: usize,
    counted: usize,
}

/// Judges `offers` on samples `held_back`; none where none is worth it.
pub(super) fn choose(
    samples: &HeadSamples,
    held_back: Range<usize>,
    head: &FileMatrix,
    offers: &[Offer],
    options: &FitOptions,
    progress: &(dyn Fn(f64) + Sync),
) -> Option<Chosen> {
    let (n_vocab, n_embd) = (head.n_rows(), head.n_cols());
    let numbers = group_numbers(n_vocab.div_ceil(ROW_GROUP));
    let judge = Judge::new(head, offers, &numbers);
    let n_batches = held_back.len().div_ceil(BATCH);
    let done = std::sync::atomic::AtomicUsize::new(0);
    let parts = each(n_batches, options.n_threads.get(), |batch| {
        let first = held_back.start + batch * BATCH;
        let seen = judge.batch(samples, first..(first + BATCH).min(held_back.end));
        let done = 1 + done.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        progress(done as f64 / n_batches as f64);
        seen
    });
    let mut totals = vec![Seen::default(); offers.len() * numbers.len()];
    for part in parts {
        for (total, seen) in totals.iter_mut().zip(part) {
            total.missed += seen.missed;
            total.lost += seen.lost;
            total.candidates += seen.candidates;
            total.counted += seen.counted;
        }
    }
    let allowed = options.miss_max * held_back.len() as f64;
    let fits = |seen: &Seen| seen.missed as f64 <= allowed && seen.lost <= allowed;
    let full = (n_vocab * head.row_bytes()) as f64;
    let mut best: Option<(f64, Chosen)> = None;
    for (offer, seen) in totals.chunks_exact(numbers.len()).enumerate() {
        let Some(first) = seen.iter().position(fits) else {
            continue;
        };
        // one step more than what these few hidden states need
        let at = (first + 1).min(numbers.len() - 1);
        let mean_candidates = seen[at].candidates as f64 / seen[at].counted.max(1) as f64;
        let sketch = n_vocab * SCORES_TYPE.row_bytes(offers[offer].rank)
            + offers[offer].rank * PROJECT_TYPE.row_bytes(n_embd);
        let cost = sketch as f64 + ROW_COST * mean_candidates * head.row_bytes() as f64;
        if cost < COST_MAX * full && best.as_ref().is_none_or(|(least, _)| cost < *least) {
            let chosen = Chosen {
                offer,
                n_groups: numbers[at],
                mean_candidates,
            };
            best = Some((cost, chosen));
        }
    }
    best.map(|(_, chosen)| chosen)
}

/// A packed matrix with its bytes.
struct Packed {
    shape: MatrixShape,
    bytes: Vec<u8>,
}

impl Packed {
    fn new(quant: QuantType, n_cols: usize, rows: &[u8]) -> Self {
        let shape = MatrixShape {
            quant,
            n_rows: rows.len() / quant.row_bytes(n_cols),
            n_cols,
            layout: Layout::Interleaved,
        };
        let mut bytes = vec![0; shape.packed_bytes()];
        shape.pack(rows, 0, &mut bytes);
        Self { shape, bytes }
    }

    fn view(&self) -> MatrixRef<'_> {
        MatrixRef::new(self.shape, &self.bytes)
    }
}

/// The head and the offers as kernels take them.
struct Judge<'a> {
    cpu: Cpu,
    head: Packed,
    offers: Vec<[Packed; 2]>,
    numbers: &'a [usize],
}

impl<'a> Judge<'a> {
    fn new(head: &FileMatrix, offers: &[Offer], numbers: &'a [usize]) -> Self {
        let offer = |offer: &Offer| {
            [
                Packed::new(PROJECT_TYPE, head.n_cols(), &offer.project),
                Packed::new(SCORES_TYPE, offer.rank, &offer.scores),
            ]
        };
        Self {
            cpu: Cpu::detect(ActivationMode::Q8),
            head: Packed::new(head.quant, head.n_cols(), &head.bytes),
            offers: offers.iter().map(offer).collect(),
            numbers,
        }
    }

    /// What is seen of hidden states `tokens`, for every offer and number of groups.
    fn batch(&self, samples: &HeadSamples, tokens: Range<usize>) -> Vec<Seen> {
        let (cpu, n_vocab, n) = (self.cpu, self.head.shape.n_rows, tokens.len());
        let mut x = ActBatch::new(cpu.mode(), samples.n_embd, n);
        for (at, token) in tokens.clone().enumerate() {
            x.set(cpu, at, samples.token(token));
        }
        let mut logits = vec![0.0; n * n_vocab];
        let out = StridedOut::from_slice(&mut logits, n_vocab, n, 0..n_vocab);
        gemm(cpu, self.head.view(), &x, 0..n, 0..n_vocab, out);
        let mut seen = vec![Seen::default(); self.offers.len() * self.numbers.len()];
        let mut scores = vec![0.0; n_vocab];
        let mut maxima = vec![0.0; n_vocab.div_ceil(ROW_GROUP)];
        let each_offer = self
            .offers
            .iter()
            .zip(seen.chunks_exact_mut(self.numbers.len()));
        for ([project, rows], seen) in each_offer {
            let rank = project.shape.n_rows;
            let mut projected = vec![0.0; rank];
            let mut sketched = ActBatch::new(cpu.mode(), rank, 1);
            for (at, token) in tokens.clone().enumerate() {
                gemv(cpu, project.view(), x.token(at), 0..rank, &mut projected);
                sketched.set(cpu, 0, &projected);
                gemv(cpu, rows.view(), sketched.token(0), 0..n_vocab, &mut scores);
                group_maxima(cpu, &scores, &mut maxima);
                let logits = &logits[at * n_vocab..(at + 1) * n_vocab];
                self.judge(logits, &scores, &maxima, seen);
                if token % COUNTED == 0 {
                    self.count(&scores, &maxima, seen);
                }
            }
        }
        seen
    }

    fn judge(&self, logits: &[f32], scores: &[f32], maxima: &[f32], seen: &mut [Seen]) {
        let best = argmax(logits) as usize;
        let near = |id: &usize| logits[*id] >= logits[best] - NEAR;
        let needed = |id: usize| 1 + maxima.iter().filter(|most| **most > scores[id]).count();
        let near: Vec<(usize, f64)> = (0..logits.len())
            .filter(near)
            .map(|id| (needed(id), f64::from((logits[id] - logits[best]).exp())))
            .collect();
        let total: f64 = near.iter().map(|(_, weight)| weight).sum();
        let best_needed = needed(best);
        for (&n_groups, seen) in self.numbers.iter().zip(seen) {
            seen.missed += usize::from(best_needed > n_groups);
            let missing = near.iter().filter(|(needed, _)| *needed > n_groups);
            seen.lost += missing.map(|(_, weight)| weight).sum::<f64>() / total;
        }
    }

    fn count(&self, scores: &[f32], maxima: &[f32], seen: &mut [Seen]) {
        for (&n_groups, seen) in self.numbers.iter().zip(seen) {
            let threshold = kth_largest(self.cpu, maxima, n_groups);
            seen.candidates += scores.iter().filter(|score| **score >= threshold).count();
            seen.counted += 1;
        }
    }
}
