//! How often the sparse head chooses what the full one does.

use pi_actors::{Candidates, Feed, Feeder, HeadWanted, LogitsWanted, Next};

use super::Head;
use crate::error::RuntimeError;
use crate::sampler::{Sampler, SamplerParams, argmax};
use crate::session::LoadedModel;

/// The sparse head beside the full one, on a text that both see word for word.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Agreement {
    /// Positions compared.
    pub n_positions: usize,
    /// Share of them where the likeliest token is the same.
    pub greedy: f64,
    /// Share of them where the token drawn with the same random number is the same.
    pub sampled: f64,
    /// Mean total-variation distance between what tokens are drawn from: half the sum of differences of probabilities.
    pub total_variation: f64,
    /// Mean number of candidates.
    pub candidates: f64,
    /// Mean bytes that the sparse head reads for a token.
    pub sparse_bytes: f64,
    /// Bytes that the full head reads for a token.
    pub full_bytes: f64,
}

/// What one head chose at a position.
struct Choice {
    best: u32,
    drawn: u32,
    /// What was drawn from: ids, ascending, with probabilities.
    from: Vec<(u32, f32)>,
    n_candidates: usize,
}

/// Feeds a piece of text in an empty context, and chooses at each of its positions.
struct Chooser {
    tokens: Vec<u32>,
    sparse: bool,
    given: bool,
    sampler: Sampler,
    choices: Vec<Choice>,
}

impl Chooser {
    fn choose(&mut self, ids: Option<&[u32]>, logits: &[f32]) {
        let best = argmax(logits);
        let from = self.sampler.distribution(ids, logits).iter();
        let mut from: Vec<(u32, f32)> = from.map(|token| (token.id, token.p)).collect();
        from.sort_unstable_by_key(|(id, _)| *id);
        let drawn = match ids {
            None => self.sampler.sample(logits),
            Some(ids) => self.sampler.sample_candidates(ids, logits),
        };
        self.choices.push(Choice {
            best: ids.map_or(best, |ids| ids[best as usize]),
            drawn,
            from,
            n_candidates: logits.len(),
        });
    }
}

impl Feeder for Chooser {
    fn next(&mut self) -> Next<'_> {
        if std::mem::replace(&mut self.given, true) {
            return Next::Done;
        }
        Next::Feed(Feed {
            tokens: &self.tokens,
            position: 0,
            logits: LogitsWanted::From(0),
        })
    }

    fn logits(&mut self, _position: usize, logits: &[f32]) {
        self.choose(None, logits);
    }

    fn head(&self) -> HeadWanted<'_> {
        match self.sparse {
            true => HeadWanted::Sparse { biases: &[] },
            false => HeadWanted::Full,
        }
    }

    fn candidates(&mut self, _position: usize, candidates: Candidates<'_>) {
        self.choose(Some(candidates.ids), candidates.logits);
    }
}

/// Compares the heads of `model`, which was opened with [`Head::Sparse`], over `chunks` of a text, each in an empty
/// context. `params` says how tokens are drawn; both heads draw with the same random numbers.
///
/// # Errors
/// A step that failed, or parameters out of range.
///
/// # Panics
/// When the model was opened with the full head, or `params` draw nothing.
pub fn agreement(
    model: &LoadedModel,
    chunks: &[Vec<u32>],
    params: &SamplerParams,
    seed: u32,
) -> Result<Agreement, RuntimeError> {
    assert_eq!(model.head, Head::Sparse, "the model has a sketch");
    let params = SamplerParams {
        seed: Some(seed.into()),
        ..params.clone()
    };
    let n_vocab = model.hyper.n_vocab;
    let mut samplers = [
        Sampler::new(params.clone(), n_vocab)?,
        Sampler::new(params, n_vocab)?,
    ];
    let mut sum = Agreement::default();
    for chunk in chunks {
        let mut choose = |sparse: bool| {
            let sampler = &mut samplers[usize::from(sparse)];
            let chooser = Chooser {
                tokens: chunk.clone(),
                sparse,
                given: false,
                sampler: sampler.clone(),
                choices: Vec::with_capacity(chunk.len()),
            };
            let run = model.engine.run(chooser)?;
            run.outcome.map_err(|error| model.step_error(error))?;
            *sampler = run.feeder.sampler;
            Ok::<_, RuntimeError>(run.feeder.choices)
        };
        let (full, sparse) = (choose(false)?, choose(true)?);
        for (full, sparse) in full.iter().zip(&sparse) {
            sum.n_positions += 1;
            sum.greedy += f64::from(full.best == sparse.best);
            sum.sampled += f64::from(full.drawn == sparse.drawn);
            sum.total_variation += total_variation(&full.from, &sparse.from);
            sum.candidates += sparse.n_candidates as f64;
        }
    }
    let n = sum.n_positions.max(1) as f64;
    let bytes = model.head_bytes;
    let candidates = sum.candidates / n;
    Ok(Agreement {
        n_positions: sum.n_positions,
        greedy: sum.greedy / n,
        sampled: sum.sampled / n,
        total_variation: sum.total_variation / n,
        candidates,
        sparse_bytes: bytes.sketch as f64 + candidates * bytes.row as f64,
        full_bytes: (bytes.row * n_vocab) as f64,
    })
}

/// Half the sum of differences between two distributions whose ids ascend.
fn total_variation(mut a: &[(u32, f32)], mut b: &[(u32, f32)]) -> f64 {
    let mut sum = 0.0;
    while let (Some(&(id_a, p_a)), Some(&(id_b, p_b))) = (a.first(), b.first()) {
        let (p_a, p_b) = (f64::from(p_a), f64::from(p_b));
        match id_a.cmp(&id_b) {
            std::cmp::Ordering::Less => {
                sum += p_a;
                a = &a[1..];
            }
            std::cmp::Ordering::Greater => {
                sum += p_b;
                b = &b[1..];
            }
            std::cmp::Ordering::Equal => {
                sum += (p_a - p_b).abs();
                (a, b) = (&a[1..], &b[1..]);
            }
        }
    }
    let rest = a.iter().chain(b).map(|(_, p)| f64::from(*p));
    (sum + rest.sum::<f64>()) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_is_the_probability_that_has_to_move() {
        let a = [(1, 0.5), (4, 0.25), (9, 0.25)];
        assert_eq!(total_variation(&a, &a), 0.0);
        assert_eq!(total_variation(&a, &[(2, 1.0)]), 1.0);
        assert_eq!(total_variation(&a, &[(1, 0.75), (4, 0.25)]), 0.25);
        assert_eq!(total_variation(&[(1, 1.0)], &a), 0.5);
    }
}
