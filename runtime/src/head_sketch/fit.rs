//! Fitting a sketch to the hidden states that a head sees.
//!
//! With C the second moments of the hidden states, `C = L·Lᵀ`, the product `B·A` of rank r nearest to W in the mean over
//! them is the truncated singular value decomposition of `W·L`. Its right vectors V are the leading eigenvectors of
//! `Lᵀ·(Wᵀ·W)·L`, so that `B = W·L·V`. W is taken less its mean row: what all logits have in common picks nobody. B's
//! blocks are turned by a Hadamard matrix and rounded to 4 bits; A is then the least-squares fit to W for the rounded B,
//! `A = (Bᵀ·B)⁻¹·Bᵀ·W`, rounded to 8 bits.
//!
//! Columns of B do not depend on the rank, so one fit of the highest rank has all others in it; [`super::quality`]
//! chooses between them.
//!
//! Source: activation-aware low rank as in Chen et al. 2021, "DRONE: Data-aware Low-rank Compression for Large NLP
//! Models".

use std::num::NonZeroUsize;
use std::ops::Range;

use nalgebra::{Cholesky, DMatrix};
use pi_kernels::quant::BLOCK;

use super::blocks::{BLOCK_BYTES, each, quantize, spread};
use super::quality::{self, Offer};
use super::{HeadSamples, HeadSketch, HeadSketchError, PROJECT_TYPE, SCORES_TYPE};
use crate::linear_algebra::{Lower, Workers, leading_directions, product, transposed, whole};
use crate::model::quantize::{dequantize_row, quantize_row};
use crate::model::tensors::FileMatrix;

/// Hidden states that a fit needs.
const N_TOKENS_MIN: usize = 512;
/// Share of the hidden states that the choice is made on; the fit does not see them.
const HELD_BACK: f64 = 0.2;
/// Hidden states that the choice is made on at most.
const N_HELD_BACK_MAX: usize = 2048;
/// Rows or hidden states that are multiplied at a time, and blocks of them that are added up in f32 side by side.
const BLOCK_ROWS: usize = 1024;
const WAVE: usize = 8;
/// Share of the hidden states' mean square that is added to each of their moments, so that none has none.
const RIDGE: f64 = 1e-3;
/// Passes of the subspace iteration.
const N_PASSES: usize = 12;

/// How a sketch is fitted.
#[derive(Debug, Clone, PartialEq)]
pub struct FitOptions {
    /// Ranks to choose from: multiples of 32.
    pub ranks: Vec<usize>,
    /// Share of tokens whose likeliest token may be missing among the candidates, and mean share of the probability that
    /// a default draw may miss.
    pub miss_max: f64,
    /// Tokens of text to read at most.
    pub n_tokens_max: usize,
    /// Threads, one unless more are given; the result is the same for any number of them.
    pub n_threads: NonZeroUsize,
    /// Where the search for directions starts.
    pub seed: u32,
}

impl Default for FitOptions {
    fn default() -> Self {
        Self {
            ranks: vec![64, 96, 128, 160, 192, 256, 320, 384, 512],
            miss_max: 0.0005,
            n_tokens_max: 16 * 1024,
            n_threads: NonZeroUsize::MIN,
            seed: 0,
        }
    }
}

/// Fits sketches of `head` `[n_vocab, n_embd]` to `samples`, and gives the one that reads the least of those that
/// `options.miss_max` allows; none where it would save less than a third. `progress` hears the share that is done.
///
/// # Errors
/// Too few samples, a width that is not whole blocks, or numbers that are not finite.
pub fn fit(
    samples: &HeadSamples,
    head: &FileMatrix,
    options: &FitOptions,
    progress: &(dyn Fn(f64) + Sync),
) -> Result<Option<HeadSketch>, HeadSketchError> {
    let (n_embd, n_tokens) = (head.n_cols(), samples.n_tokens());
    if !n_embd.is_multiple_of(BLOCK) || n_embd < 2 * BLOCK {
        return Err(HeadSketchError::Width { n_embd });
    }
    if n_tokens < N_TOKENS_MIN {
        return Err(HeadSketchError::TooFewTokens {
            n_tokens,
            needed: N_TOKENS_MIN,
        });
    }
    let n_held = ((n_tokens as f64 * HELD_BACK) as usize).min(N_HELD_BACK_MAX);
    let fitting = 0..n_tokens - n_held;
    let mut ranks: Vec<usize> = options.ranks.clone();
    ranks.retain(|rank| *rank > 0 && rank.is_multiple_of(BLOCK) && *rank <= n_embd / 2);
    ranks.sort_unstable();
    if ranks.is_empty() {
        ranks.push(BLOCK);
    }
    let rank_max = ranks[ranks.len() - 1];

    let n_threads = options.n_threads.get();
    let rows = CentredRows::new(head, n_threads);
    progress(0.05);
    let directions = directions(samples, fitting, &rows, rank_max, options)?;
    progress(0.3);
    let widest = Rounded::new(&rows, &directions, n_threads);
    progress(0.5);
    let offers = ranks.iter().map(|&rank| widest.offer(rank));
    let offers: Vec<Offer> = offers.collect::<Result<_, _>>()?;
    let held_back = n_tokens - n_held..n_tokens;
    let chosen = quality::choose(samples, held_back, head, &offers, options, &|share| {
        progress(0.5 + 0.5 * share)
    });
    Ok(chosen.map(|chosen| {
        let offer = &offers[chosen.offer];
        HeadSketch {
            n_embd,
            n_vocab: head.n_rows(),
            rank: offer.rank,
            n_groups: chosen.n_groups,
            mean_candidates: chosen.mean_candidates as f32,
            project: offer.project.clone(),
            scores: offer.scores.clone(),
        }
    }))
}

/// The head's rows less their mean.
struct CentredRows<'a> {
    head: &'a FileMatrix,
    mean: Vec<f32>,
}

impl<'a> CentredRows<'a> {
    fn new(head: &'a FileMatrix, n_threads: usize) -> Self {
        let mut rows = Self {
            head,
            mean: vec![0.0; head.n_cols()],
        };
        let sums = each(rows.n_blocks(), n_threads, |block| {
            rows.block(block).column_sum().cast::<f64>()
        });
        let total = sums.into_iter().reduce(|a, b| a + b);
        if let Some(total) = total {
            let mean = total / head.n_rows() as f64;
            rows.mean = mean.iter().map(|value| *value as f32).collect();
        }
        rows
    }

    fn n_blocks(&self) -> usize {
        self.head.n_rows().div_ceil(BLOCK_ROWS)
    }

    /// A block of rows, one to a column: `[n_embd, n_rows]`.
    fn block(&self, block: usize) -> DMatrix<f32> {
        let first = block * BLOCK_ROWS;
        let end = (first + BLOCK_ROWS).min(self.head.n_rows());
        let n_embd = self.head.n_cols();
        let mut values = vec![0.0; (end - first) * n_embd];
        for (row, out) in (first..end).zip(values.chunks_exact_mut(n_embd)) {
            dequantize_row(self.head.quant, self.head.rows(row..row + 1), out);
            for (value, mean) in out.iter_mut().zip(&self.mean) {
                *value -= mean;
            }
        }
        DMatrix::from_vec(n_embd, end - first, values)
    }
}

/// The sum of `work` over blocks, in f64; in the same order for any number of threads.
fn sum(
    n_blocks: usize,
    n_threads: usize,
    work: impl Fn(usize) -> DMatrix<f32> + Sync,
) -> DMatrix<f64> {
    let mut total: Option<DMatrix<f64>> = None;
    for first in (0..n_blocks).step_by(WAVE) {
        let n = WAVE.min(n_blocks - first);
        for part in each(n, n_threads, |block| work(first + block)) {
            let part = part.cast::<f64>();
            total = Some(match total.take() {
                None => part,
                Some(total) => total + part,
            });
        }
    }
    total.unwrap_or_default()
}

/// `L·V`, `[n_embd, rank]`: what a row is multiplied with for its numbers in the sketch, the most telling first.
fn directions(
    samples: &HeadSamples,
    fitting: Range<usize>,
    rows: &CentredRows<'_>,
    rank: usize,
    options: &FitOptions,
) -> Result<DMatrix<f32>, HeadSketchError> {
    let (n_embd, n_threads) = (samples.n_embd, options.n_threads.get());
    let mut moments = sum(fitting.len().div_ceil(BLOCK_ROWS), n_threads, |block| {
        let first = fitting.start + block * BLOCK_ROWS;
        let end = (first + BLOCK_ROWS).min(fitting.end);
        let values = &samples.values[first * n_embd..end * n_embd];
        let x = DMatrix::from_column_slice(n_embd, end - first, values);
        &x * x.transpose()
    });
    moments /= fitting.len() as f64;
    let ridge = RIDGE * moments.trace() / n_embd as f64;
    for n in 0..n_embd {
        moments[(n, n)] += ridge;
    }
    let workers = Workers::new(options.n_threads);
    let lower = Lower::new(workers, moments)
        .ok_or(HeadSketchError::Degenerate)?
        .into_matrix();
    let gram = sum(rows.n_blocks(), n_threads, |block| {
        let rows = rows.block(block);
        &rows * rows.transpose()
    });
    let target = product(workers, whole(&gram), whole(&lower));
    let target = product(workers, transposed(&lower), whole(&target));
    if target.iter().any(|value| !value.is_finite()) {
        return Err(HeadSketchError::Degenerate);
    }
    let leading = leading_directions(workers, n_embd, rank, N_PASSES, options.seed, |rows| {
        product(workers, whole(rows), whole(&target))
    });
    Ok(product(workers, whole(&lower), transposed(&leading)).cast::<f32>())
}

/// B of the highest rank, rounded, with what A of any rank is solved from.
struct Rounded {
    rank: usize,
    /// `[n_vocab, rank]` in Q4_0.
    scores: Vec<u8>,
    /// `Bᵀ·B`, `[rank, rank]`.
    gram: DMatrix<f64>,
    /// `Bᵀ·W`, `[rank, n_embd]`.
    cross: DMatrix<f64>,
}

impl Rounded {
    fn new(rows: &CentredRows<'_>, directions: &DMatrix<f32>, n_threads: usize) -> Self {
        let rank = directions.ncols();
        let to_numbers = directions.transpose();
        let row_bytes = rank / BLOCK * BLOCK_BYTES;
        let rounded = each(rows.n_blocks(), n_threads, |block| {
            let mut numbers = &to_numbers * rows.block(block);
            let mut bytes = vec![0; numbers.ncols() * row_bytes];
            let each_row = numbers.as_mut_slice().chunks_exact_mut(rank);
            for (row, out) in each_row.zip(bytes.chunks_exact_mut(row_bytes)) {
                spread(row);
                quantize(row, out);
            }
            bytes
        });
        let values = |block: usize| {
            let bytes = &rounded[block];
            let mut values = vec![0.0; bytes.len() / row_bytes * rank];
            dequantize_row(SCORES_TYPE, bytes, &mut values);
            DMatrix::from_vec(rank, bytes.len() / row_bytes, values)
        };
        let gram = sum(rounded.len(), n_threads, |block| {
            let b = values(block);
            &b * b.transpose()
        });
        let cross = sum(rounded.len(), n_threads, |block| {
            values(block) * rows.block(block).transpose()
        });
        Self {
            rank,
            scores: rounded.concat(),
            gram,
            cross,
        }
    }

    /// The sketch of rank `rank`: the first numbers of every row, and the A that fits them.
    fn offer(&self, rank: usize) -> Result<Offer, HeadSketchError> {
        let n_embd = self.cross.ncols();
        let mut gram = self.gram.view((0, 0), (rank, rank)).into_owned();
        let ridge = 1e-9 * gram.trace() / rank as f64;
        for n in 0..rank {
            gram[(n, n)] += ridge;
        }
        let factor = Cholesky::new(gram).ok_or(HeadSketchError::Degenerate)?;
        let a = factor.solve(&self.cross.view((0, 0), (rank, n_embd)).into_owned());
        let mut project = vec![0; rank * PROJECT_TYPE.row_bytes(n_embd)];
        let each_row = project.chunks_exact_mut(PROJECT_TYPE.row_bytes(n_embd));
        for (row, out) in a.row_iter().zip(each_row) {
            let row: Vec<f32> = row.iter().map(|value| *value as f32).collect();
            quantize_row(PROJECT_TYPE, &row, out);
        }
        let bytes = |rank: usize| rank / BLOCK * BLOCK_BYTES;
        let each_row = self.scores.chunks_exact(bytes(self.rank));
        let scores = each_row.flat_map(|row| &row[..bytes(rank)]);
        Ok(Offer {
            rank,
            project,
            scores: scores.copied().collect(),
        })
    }
}
