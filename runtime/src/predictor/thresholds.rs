//! One bias per neuron, so that candidates keep a target share of what the neurons contribute.
//!
//! Contributions are counted as shares of their token's: a token with a large hidden state is no more important.

use super::bits::BitScores;
use super::neuron_model::NeuronModel;

/// Halvings of the range in which the least expected mass of a candidate is looked for.
const N_HALVINGS: usize = 40;

/// Row-major `[n_tokens, n_ff]` gates of a layer, and each neuron's share of its token's contributions.
#[derive(Debug, Clone)]
pub struct Masses<'a> {
    n_ff: usize,
    gates: &'a [f32],
    shares: Vec<f32>,
}

impl<'a> Masses<'a> {
    /// From gates and contributions, row-major `[n_tokens, n_ff]`.
    ///
    /// # Panics
    /// When the lengths differ or aren't whole rows.
    pub fn new(gates: &'a [f32], contributions: &[f32], n_ff: usize) -> Self {
        assert_eq!(gates.len(), contributions.len(), "a contribution per gate");
        assert_eq!(gates.len() % n_ff, 0, "whole rows");
        let mut shares = contributions.to_vec();
        for row in shares.chunks_exact_mut(n_ff) {
            let total: f64 = row.iter().map(|mass| f64::from(*mass)).sum();
            if total > 0.0 {
                let scale = (1.0 / total) as f32;
                row.iter_mut().for_each(|mass| *mass *= scale);
            }
        }
        Self {
            n_ff,
            gates,
            shares,
        }
    }

    /// Tokens.
    pub fn n_tokens(&self) -> usize {
        self.gates.len() / self.n_ff
    }

    /// Neurons.
    pub fn n_ff(&self) -> usize {
        self.n_ff
    }

    /// The same without what neurons contribute whose gate is at or below their `floor` `[n_ff]`.
    pub fn above(&self, floor: &[f32]) -> Masses<'a> {
        let mut shares = self.shares.clone();
        let rows = shares
            .chunks_exact_mut(self.n_ff)
            .zip(self.gates.chunks_exact(self.n_ff));
        for (shares, gates) in rows {
            for ((share, gate), floor) in shares.iter_mut().zip(gates).zip(floor) {
                if gate <= floor {
                    *share = 0.0;
                }
            }
        }
        Masses {
            n_ff: self.n_ff,
            gates: self.gates,
            shares,
        }
    }

    pub(super) fn gates(&self) -> &[f32] {
        self.gates
    }

    /// Row-major `[n_tokens, n_ff]` shares.
    pub(super) fn all_shares(&self) -> &[f32] {
        &self.shares
    }

    /// `[n_ff]` shares of a token's mass.
    pub(super) fn shares(&self, token: usize) -> &[f32] {
        &self.shares[token * self.n_ff..(token + 1) * self.n_ff]
    }

    fn total(&self) -> f64 {
        self.shares.iter().map(|share| f64::from(*share)).sum()
    }
}

/// What candidates must keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// Mean over tokens of the share of a token's mass that is kept, at least.
    MassKept(f64),
    /// Root mean square over tokens of the share that is lost, at most: a few tokens that lose much do more harm than
    /// many that lose little.
    LostRms(f64),
}

impl Target {
    /// A target of which so much may be lost.
    fn share(self, share: f64) -> Self {
        match self {
            Target::MassKept(kept) => Target::MassKept(1.0 - (1.0 - kept) * share),
            Target::LostRms(rms) => Target::LostRms(rms * share),
        }
    }

    /// Whether candidates with these losses do.
    pub fn is_met(self, lost: Lost) -> bool {
        // what rounding adds to a sum
        const SLACK: f64 = 1e-9;
        match self {
            Target::MassKept(kept) => 1.0 - lost.mean >= kept - SLACK,
            Target::LostRms(rms) => lost.rms <= rms + SLACK,
        }
    }
}

/// Shares of their mass that tokens lose.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Lost {
    /// Mean over tokens.
    pub mean: f64,
    /// Root mean square over tokens.
    pub rms: f64,
}

impl Lost {
    fn of(tokens: &[f64]) -> Self {
        let n = tokens.len().max(1) as f64;
        let squares: f64 = tokens.iter().map(|lost| lost * lost).sum();
        Self {
            mean: tokens.iter().sum::<f64>() / n,
            rms: (squares / n).sqrt(),
        }
    }
}

/// How the biases were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// Each neuron's from what its score says of its gate: the same expected mass for the last candidate of all.
    PerNeuron,
    /// One for all, beside biases that the scores have already.
    OneShift,
}

/// Biases that were fitted: a neuron is a candidate where `score + bias > 0`.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// `[n_ff]`
    pub bias: Vec<f32>,
    /// How they were found.
    pub rule: Rule,
}

/// Finds biases for row-major `scores` `[n_tokens, n_ff]` with which candidates meet `target`, by the rule that needs
/// fewer candidates.
///
/// # Panics
/// When there isn't one score per gate.
pub fn fit(scores: &[f32], masses: &Masses<'_>, target: Target) -> Thresholds {
    fit_of(scores, scores, masses, target)
}

/// The same where some neurons are no candidates with any bias: their `possible` score is −∞, and `scores` say what it
/// would be.
fn fit_of(scores: &[f32], possible: &[f32], masses: &Masses<'_>, target: Target) -> Thresholds {
    assert_eq!(scores.len(), masses.gates.len(), "a score per gate");
    let active = ActiveScores::new(possible, masses);
    let models = NeuronModel::fit_all(scores, masses.gates, &masses.shares, masses.n_ff);
    let per_neuron = per_neuron(&models, &active, target).0;
    let one_shift = one_shift(&active, masses.n_ff, target);
    // the models' deviations end somewhere: a target near 1 can be out of their reach
    let reached = target.is_met(active.lost(&per_neuron));
    if reached && count_candidates(possible, &per_neuron) <= count_candidates(possible, &one_shift)
    {
        Thresholds {
            bias: per_neuron,
            rule: Rule::PerNeuron,
        }
    } else {
        Thresholds {
            bias: one_shift,
            rule: Rule::OneShift,
        }
    }
}

/// Share of the target that signs may lose where the next bit is looked at too.
const FIRST_SHARE: f64 = 0.3;

/// Biases for scores by signs and, of the neurons that these name, by two bits.
#[derive(Debug, Clone, PartialEq)]
pub struct TwoBitThresholds {
    /// `[n_ff]`, of the signs.
    pub signs: Vec<f32>,
    /// `[n_ff]`, of both bits.
    pub two_bits: Vec<f32>,
}

impl TwoBitThresholds {
    /// Finds those with which candidates of both together meet `target`.
    ///
    /// # Panics
    /// When there isn't one score of each kind per gate.
    pub fn fit(scores: &BitScores, masses: &Masses<'_>, target: Target) -> Self {
        let signs = fit(&scores.one, masses, target.share(FIRST_SHARE)).bias;
        let named = scores.named(&signs);
        let two_bits = fit_of(&scores.two, &named, masses, target).bias;
        Self { signs, two_bits }
    }
}

impl BitScores {
    /// Scores by two bits of neurons that their signs name, row-major; all others have −∞.
    pub fn named(&self, bias: &[f32]) -> Vec<f32> {
        let both = self.one.iter().zip(&self.two).enumerate();
        both.map(|(at, (one, two))| {
            let is_named = one + bias[at % bias.len()] > 0.0;
            if is_named { *two } else { f32::NEG_INFINITY }
        })
        .collect()
    }
}

/// The least gates `[n_ff]` worth an active neuron's up and down: those below it hold `dropped` (0 to 1) of the mass.
///
/// A candidate is active where its exact gate is above its floor.
pub fn fit_floor(masses: &Masses<'_>, dropped: f64) -> Vec<f32> {
    let models = NeuronModel::fit_all(masses.gates, masses.gates, &masses.shares, masses.n_ff);
    let mut active = Vec::new();
    let rows = masses
        .gates
        .chunks_exact(masses.n_ff)
        .zip(masses.shares.chunks_exact(masses.n_ff));
    for (gates, shares) in rows {
        for ((gate, share), model) in gates.iter().zip(shares).zip(&models) {
            if *share > 0.0 {
                active.push((f64::from(*gate) * model.mass_per_gate(), f64::from(*share)));
            }
        }
    }
    active.sort_by(|a, b| a.0.total_cmp(&b.0));
    let allowed = dropped.clamp(0.0, 1.0) * masses.total();
    let (mut below, mut mass) = (0.0, 0.0);
    for (expected, share) in active {
        mass += share;
        if mass > allowed {
            break;
        }
        below = expected;
    }
    models
        .iter()
        .map(|model| (below / model.mass_per_gate()) as f32)
        .collect()
}

fn count_candidates(scores: &[f32], bias: &[f32]) -> usize {
    let rows = scores.chunks_exact(bias.len());
    rows.map(|row| {
        row.iter()
            .zip(bias)
            .filter(|(score, bias)| *score + *bias > 0.0)
            .count()
    })
    .sum()
}

/// Biases `[n_ff]` that meet `target` by the models' word, and the expected mass of the last candidate.
pub(super) fn per_neuron_at(
    scores: &[f32],
    masses: &Masses<'_>,
    models: &[NeuronModel],
    target: Target,
) -> (Vec<f32>, f64) {
    per_neuron(models, &ActiveScores::new(scores, masses), target)
}

fn per_neuron(models: &[NeuronModel], active: &ActiveScores, target: Target) -> (Vec<f32>, f64) {
    let bias =
        |mass_min: f64| -> Vec<f32> { models.iter().map(|model| model.bias(mass_min)).collect() };
    // in logarithms: shares of one token's mass
    let (mut all, mut none) = (1e-12f64.ln(), 1f64.ln());
    for _ in 0..N_HALVINGS {
        let middle = (all + none) / 2.0;
        if target.is_met(active.lost(&bias(middle.exp()))) {
            all = middle;
        } else {
            none = middle;
        }
    }
    (bias(all.exp()), all.exp())
}

fn one_shift(active: &ActiveScores, n_ff: usize, target: Target) -> Vec<f32> {
    let mut scores: Vec<f32> = active.entries.iter().map(|entry| entry.score).collect();
    scores.sort_by(|a, b| b.total_cmp(a));
    let bias = |last: usize| vec![scores.get(last).map_or(0.0, |score| bias_to_keep(*score)); n_ff];
    let (mut too_few, mut enough) = (0, scores.len().saturating_sub(1));
    if target.is_met(active.lost(&bias(0))) {
        return bias(0);
    }
    while enough - too_few > 1 {
        let middle = usize::midpoint(too_few, enough);
        if target.is_met(active.lost(&bias(middle))) {
            enough = middle;
        } else {
            too_few = middle;
        }
    }
    bias(enough)
}

/// The least bias with which `score + bias > 0` in f32.
fn bias_to_keep(score: f32) -> f32 {
    let bias = -score;
    if score + bias > 0.0 {
        bias
    } else {
        bias.next_up()
    }
}

/// Scores of active neurons with their shares of mass, neuron after neuron, highest first.
struct ActiveScores {
    n_tokens: usize,
    /// Where each neuron's entries start, `[n_ff + 1]`.
    starts: Vec<usize>,
    entries: Vec<ActiveScore>,
}

#[derive(Debug, Clone, Copy, Default)]
struct ActiveScore {
    score: f32,
    share: f32,
    token: usize,
}

impl ActiveScores {
    fn new(scores: &[f32], masses: &Masses<'_>) -> Self {
        let n_ff = masses.n_ff;
        let mut starts = vec![0; n_ff + 1];
        for (at, share) in masses.shares.iter().enumerate() {
            starts[at % n_ff + 1] += usize::from(*share > 0.0);
        }
        for i in 0..n_ff {
            starts[i + 1] += starts[i];
        }
        let mut next = starts.clone();
        let mut entries = vec![ActiveScore::default(); starts[n_ff]];
        for (at, (score, share)) in scores.iter().zip(&masses.shares).enumerate() {
            if *share > 0.0 {
                let next = &mut next[at % n_ff];
                entries[*next] = ActiveScore {
                    score: *score,
                    share: *share,
                    token: at / n_ff,
                };
                *next += 1;
            }
        }
        for i in 0..n_ff {
            entries[starts[i]..starts[i + 1]].sort_by(|a, b| b.score.total_cmp(&a.score));
        }
        Self {
            n_tokens: masses.n_tokens(),
            starts,
            entries,
        }
    }

    /// What tokens lose with the candidates of `bias` `[n_ff]`.
    fn lost(&self, bias: &[f32]) -> Lost {
        let mut tokens = vec![0.0; self.n_tokens];
        for (i, bias) in bias.iter().enumerate() {
            let entries = &self.entries[self.starts[i]..self.starts[i + 1]];
            let n_candidates = entries.partition_point(|entry| entry.score + bias > 0.0);
            for entry in &entries[n_candidates..] {
                tokens[entry.token] += f64::from(entry.share);
            }
        }
        Lost::of(&tokens)
    }
}

/// How well candidates did on tokens, shares of 1.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Evaluation {
    /// Shares of their mass that tokens lost.
    pub lost: Lost,
    /// Active neurons that were candidates, by count.
    pub found: f64,
    /// Candidates that were active.
    pub precision: f64,
    /// Candidates of all neurons.
    pub candidates: f64,
    /// Neurons of all that were looked at a second time to see whether they are candidates.
    pub named: f64,
    /// Active neurons of all neurons.
    pub density: f64,
    /// Candidates whose gate is above their floor, of all neurons: those computed in full.
    pub computed: f64,
}

/// Counts what candidates of row-major `scores` `[n_tokens, n_ff]` keep and cost. `floor` `[n_ff]` leaves out neurons
/// with gates at or below it; 0 where there is none.
///
/// # Panics
/// When a list has another length.
pub fn evaluate(
    scores: &[f32],
    bias: &[f32],
    floor: Option<&[f32]>,
    masses: &Masses<'_>,
) -> Evaluation {
    let n_ff = masses.n_ff;
    assert_eq!(scores.len(), masses.gates.len(), "a score per gate");
    assert_eq!(bias.len(), n_ff, "a bias per neuron");
    assert!(
        floor.is_none_or(|floor| floor.len() == n_ff),
        "a floor per neuron"
    );
    let (mut n_active, mut n_candidates, mut n_found, mut n_computed) = (0, 0, 0, 0);
    let mut lost = Vec::with_capacity(masses.n_tokens());
    let rows = scores
        .chunks_exact(n_ff)
        .zip(masses.gates.chunks_exact(n_ff));
    for ((scores, gates), shares) in rows.zip(masses.shares.chunks_exact(n_ff)) {
        let (mut kept, mut total) = (0.0, 0.0);
        for i in 0..n_ff {
            let candidate = scores[i] + bias[i] > 0.0;
            let active = gates[i] > 0.0;
            let computed = candidate && gates[i] > floor.map_or(0.0, |floor| floor[i].max(0.0));
            n_active += usize::from(active);
            n_candidates += usize::from(candidate);
            n_found += usize::from(active && candidate);
            n_computed += usize::from(computed);
            total += f64::from(shares[i]);
            kept += if computed { f64::from(shares[i]) } else { 0.0 };
        }
        lost.push(if total > 0.0 { 1.0 - kept / total } else { 0.0 });
    }
    let n_all = scores.len().max(1) as f64;
    Evaluation {
        lost: Lost::of(&lost),
        found: n_found as f64 / n_active.max(1) as f64,
        precision: n_found as f64 / n_candidates.max(1) as f64,
        candidates: n_candidates as f64 / n_all,
        named: 0.0,
        density: n_active as f64 / n_all,
        computed: n_computed as f64 / n_all,
    }
}

/// The same for scores by signs and two bits, with biases `[n_ff]` of each.
///
/// # Panics
/// As [`evaluate`].
pub fn evaluate_two_bits(
    scores: &BitScores,
    signs: &[f32],
    two_bits: &[f32],
    floor: Option<&[f32]>,
    masses: &Masses<'_>,
) -> Evaluation {
    let named = scores.named(signs);
    let n_named = named.iter().filter(|score| **score > f32::NEG_INFINITY);
    Evaluation {
        named: n_named.count() as f64 / named.len().max(1) as f64,
        ..evaluate(&named, two_bits, floor, masses)
    }
}
