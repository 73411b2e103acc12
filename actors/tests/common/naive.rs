//! The model computed by plain loops in f64: no kernel of the project takes part.

use pi_actors::weights::GateActivation;

use super::sketches::RANK;
use super::{
    HEAD_DIM, N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_VOCAB, PlainLayer, PlainModel, Predictors, Skip,
};

type Rows = Vec<Vec<f64>>;

/// Logits of every position, and how many neurons are active in all.
pub fn logits(model: &PlainModel, tokens: &[u32]) -> (Rows, usize) {
    let (logits, counts) = predicted(model, tokens, None);
    (logits, counts.active)
}

/// The same without the neurons that contribute little.
pub fn logits_without(model: &PlainModel, tokens: &[u32], skip: Option<Skip>) -> (Rows, usize) {
    let (logits, counts) = compute(model, tokens, None, skip);
    (logits, counts.active)
}

/// Neurons of all tokens and layers.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub candidates: usize,
    pub active: usize,
}

/// The same with low-rank predictors, all of them for every token.
pub fn predicted(
    model: &PlainModel,
    tokens: &[u32],
    predictors: Option<Predictors>,
) -> (Rows, Counts) {
    compute(model, tokens, predictors, None)
}

fn compute(
    model: &PlainModel,
    tokens: &[u32],
    predictors: Option<Predictors>,
    skip: Option<Skip>,
) -> (Rows, Counts) {
    let mut caches: Vec<(Rows, Rows)> = model.layers.iter().map(|_| (vec![], vec![])).collect();
    let (mut all, mut counts) = (vec![], Counts::default());
    for (position, &token) in tokens.iter().enumerate() {
        let at = token as usize * N_EMBD;
        let mut x: Vec<f64> = model.embedding[at..at + N_EMBD]
            .iter()
            .map(|&v| f64::from(v) * f64::from(model.embedding_scale))
            .collect();
        let mut before: Option<Vec<f64>> = None;
        for (layer, cache) in model.layers.iter().zip(&mut caches) {
            let first = model
                .window
                .map_or(0, |window| (position + 1).saturating_sub(window));
            attention(layer, cache, first, &mut x);
            let after_attention = norm(&x, &vec![1.0; N_EMBD]);
            let named = predictors.map(|who| candidates(layer, who, before.as_deref(), &x));
            ffn(
                layer,
                model.activation,
                named.as_deref(),
                skip,
                &mut x,
                &mut counts,
            );
            before = Some(after_attention);
        }
        let x = norm(&x, &model.output_norm);
        all.push(product(&model.head, &x, N_VOCAB));
    }
    (all, counts)
}

/// Which neurons are looked at; `before` is the normed residual stream after the attention of the
/// layer before.
fn candidates(layer: &PlainLayer, who: Predictors, before: Option<&[f64]>, x: &[f64]) -> Vec<bool> {
    let plain = &layer.predictors;
    let mut named = vec![false; N_FF];
    let ahead = before.filter(|_| who.ahead);
    if !(who.alone && ahead.is_some()) {
        let h = product(&plain.sketch_a, &norm(x, &layer.ffn_norm), RANK);
        let scores = with_bias(product(&plain.sketch_b, &h, N_FF), &plain.bias);
        named
            .iter_mut()
            .zip(scores)
            .for_each(|(n, s)| *n |= s > 0.0);
    }
    if let Some(before) = ahead {
        let mut h = with_bias(product(&plain.ahead_a, before, RANK), &plain.ahead_a_bias);
        h.iter_mut().for_each(|h| *h = h.max(0.0));
        let scores = with_bias(product(&plain.ahead_b, &h, N_FF), &plain.ahead_b_bias);
        named
            .iter_mut()
            .zip(scores)
            .for_each(|(n, s)| *n |= s > 0.0);
    }
    named
}

fn norm(x: &[f64], weight: &[f32]) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + 1e-5).sqrt();
    x.iter()
        .zip(weight)
        .map(|(v, &w)| v * scale * f64::from(w))
        .collect()
}

fn product(matrix: &[f32], x: &[f64], n_rows: usize) -> Vec<f64> {
    let row = |r: usize| &matrix[r * x.len()..(r + 1) * x.len()];
    (0..n_rows)
        .map(|r| row(r).iter().zip(x).map(|(&w, v)| f64::from(w) * v).sum())
        .collect()
}

fn with_bias(mut values: Vec<f64>, bias: &[f32]) -> Vec<f64> {
    values
        .iter_mut()
        .zip(bias)
        .for_each(|(v, &b)| *v += f64::from(b));
    values
}

fn rotate(heads: &mut [f64], position: usize) {
    for head in heads.chunks_exact_mut(HEAD_DIM) {
        for pair in 0..HEAD_DIM / 2 {
            let frequency = 10_000f64.powf(-2.0 * pair as f64 / HEAD_DIM as f64);
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            let (a, b) = (head[2 * pair], head[2 * pair + 1]);
            head[2 * pair] = a * cos - b * sin;
            head[2 * pair + 1] = a * sin + b * cos;
        }
    }
}

/// Attention of the next position, which sees those from `first` on.
fn attention(layer: &PlainLayer, cache: &mut (Rows, Rows), first: usize, x: &mut [f64]) {
    let position = cache.0.len();
    let h = norm(x, &layer.attn_norm);
    let mut q = with_bias(product(&layer.wq, &h, N_HEAD * HEAD_DIM), &layer.bq);
    let mut k = with_bias(product(&layer.wk, &h, N_HEAD_KV * HEAD_DIM), &layer.bk);
    let v = with_bias(product(&layer.wv, &h, N_HEAD_KV * HEAD_DIM), &layer.bv);
    rotate(&mut q, position);
    rotate(&mut k, position);
    cache.0.push(k);
    cache.1.push(v);
    let mut heads = vec![0.0; N_HEAD * HEAD_DIM];
    for head in 0..N_HEAD {
        let kv = head / (N_HEAD / N_HEAD_KV) * HEAD_DIM;
        let query = &q[head * HEAD_DIM..(head + 1) * HEAD_DIM];
        let score = |k: &Vec<f64>| {
            let key = &k[kv..kv + HEAD_DIM];
            let dot: f64 = query.iter().zip(key).map(|(a, b)| a * b).sum();
            dot / (HEAD_DIM as f64).sqrt()
        };
        let scores: Vec<f64> = cache.0[first..].iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (weight, value) in weights.iter().zip(&cache.1[first..]) {
            for d in 0..HEAD_DIM {
                heads[head * HEAD_DIM + d] += weight / sum * value[kv + d];
            }
        }
    }
    let out = product(&layer.wo, &heads, N_EMBD);
    x.iter_mut().zip(out).for_each(|(x, o)| *x += o);
}

fn gelu(x: f64) -> f64 {
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
    0.5 * x * (1.0 + u.tanh())
}

fn ffn(
    layer: &PlainLayer,
    activation: GateActivation,
    named: Option<&[bool]>,
    skip: Option<Skip>,
    x: &mut [f64],
    counts: &mut Counts,
) {
    let h = norm(x, &layer.ffn_norm);
    let gate = product(&layer.gate, &h, N_FF);
    let up = product(&layer.up, &h, N_FF);
    for neuron in 0..N_FF {
        let floor = named.map_or(f64::NEG_INFINITY, |_| {
            f64::from(layer.predictors.floor[neuron]).max(0.0)
        });
        if named.is_some_and(|named| !named[neuron]) {
            continue;
        }
        counts.candidates += 1;
        if gate[neuron] <= floor {
            continue;
        }
        let a = match activation {
            GateActivation::Relu => gate[neuron].max(0.0),
            GateActivation::Silu => gate[neuron] / (1.0 + (-gate[neuron]).exp()),
            GateActivation::Gelu => gelu(gate[neuron]),
        };
        let row = &layer.down_t[neuron * N_EMBD..(neuron + 1) * N_EMBD];
        let small = skip.is_some_and(|skip| {
            let value = if skip.by_gate { a } else { a * up[neuron] };
            value.abs() <= f64::from(skip.threshold(row))
        });
        if small {
            continue;
        }
        counts.active += usize::from(a != 0.0);
        for (x, &w) in x.iter_mut().zip(row) {
            *x += a * up[neuron] * f64::from(w);
        }
    }
}
