//! Fits to planted data: what was planted is found, targets hold, and threads change nothing.

use std::num::NonZeroUsize;

use pi_kernels::{ActivationMode, Cpu, QuantType};

use super::ahead_trained::Training;
use super::thresholds::{Evaluation, Masses, Target, evaluate, fit, fit_floor};
use super::*;
use crate::linear_algebra::times_transposed;
use crate::sampler::Mt19937;

fn cpu() -> Cpu {
    Cpu::detect(ActivationMode::Q8)
}

fn workers(n_threads: usize) -> Workers {
    Workers::new(NonZeroUsize::new(n_threads).unwrap())
}

/// Nearly normal numbers of deviation `size`.
fn normal(rng: &mut Mt19937, n: usize, size: f32) -> Vec<f32> {
    let mut draw = || ((0..6).map(|_| rng.next_f64()).sum::<f64>() - 3.0) as f32 * 1.414;
    (0..n).map(|_| draw() * size).collect()
}

fn product(x: &[f32], w: &[f32], n_in: usize) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / n_in * (w.len() / n_in)];
    times_transposed(x, w, n_in, &mut out);
    out
}

/// Gates of rank 8 with noise over inputs that have all directions; one neuron in six or so is active.
fn low_rank_samples(n_tokens: usize) -> LayerSamples {
    let (n_embd, n_ff, rank) = (64, 96, 8);
    let mut rng = Mt19937::new(11);
    let x = normal(&mut rng, n_tokens * n_embd, 1.0);
    let a = normal(&mut rng, rank * n_embd, 0.125);
    let b = normal(&mut rng, n_ff * rank, 0.35);
    let noise = normal(&mut rng, n_tokens * n_ff, 0.05);
    let gates: Vec<f32> = product(&product(&x, &a, n_embd), &b, rank)
        .iter()
        .zip(noise)
        .map(|(gate, noise)| gate - 1.0 + noise)
        .collect();
    let up = normal(&mut rng, n_tokens * n_ff, 1.0);
    let contributions = gates
        .iter()
        .zip(up)
        .map(|(gate, up)| gate.max(0.0) * up.abs())
        .collect();
    LayerSamples {
        n_tokens,
        n_embd,
        n_ff,
        residual_before: Some(x.clone()),
        x,
        gates,
        contributions,
    }
}

/// Gates that only the size of a direction decides, not its sign: no linear predictor sees them.
fn nonlinear_samples(n_tokens: usize) -> LayerSamples {
    let (n_embd, n_ff, n_features) = (32, 64, 8);
    let mut rng = Mt19937::new(12);
    let x = normal(&mut rng, n_tokens * n_embd, 1.0);
    let features = normal(&mut rng, n_features * n_embd, 0.18);
    let seen = product(&x, &features, n_embd);
    let mut gates = Vec::with_capacity(n_tokens * n_ff);
    for row in seen.chunks_exact(n_features) {
        gates.extend((0..n_ff).map(|i| {
            let other = row[(i / n_features + 1 + i) % n_features];
            row[i % n_features].abs() - 1.3 + 0.2 * other
        }));
    }
    let contributions = gates.iter().map(|gate| gate.max(0.0)).collect();
    let residual = Some(x.clone());
    LayerSamples {
        n_tokens,
        n_embd,
        n_ff,
        residual_before: residual,
        x,
        gates,
        contributions,
    }
}

#[test]
fn a_planted_low_rank_is_found() {
    let samples = low_rank_samples(1200);
    samples.check().unwrap();
    let tokens = samples.calibrating();
    let masses = samples.masses(tokens.clone());
    let at = |rank: usize| -> Evaluation {
        let sketch = low_rank::fit(&samples, workers(2), 32)
            .unwrap()
            .at(rank, QuantType::Q8_0)
            .unwrap();
        assert_eq!((sketch.rank(), sketch.b.n_rows), (rank, samples.n_ff));
        let scores = sketch.scores(cpu(), workers(2), samples.x(tokens.clone()));
        let found = fit(&scores, &masses, Target::MassKept(0.99));
        evaluate(&scores, &found.bias, None, &masses)
    };
    let found = at(32);
    assert!(found.lost.mean <= 0.01 + 1e-9, "{found:?}");
    assert!(found.found > 0.9 && found.precision > 0.8, "{found:?}");
    assert!(found.candidates < 1.15 * found.density, "{found:?}");
    assert!((0.05..0.3).contains(&found.density), "{found:?}");
}

#[test]
fn training_beats_the_linear_fit_and_chance_where_gates_are_not_linear() {
    let samples = nonlinear_samples(6000);
    let target = Target::MassKept(0.9);
    let mut linear = ahead_svd::fit(&samples, workers(2), 32, QuantType::Q8_0).unwrap();
    let linear = linear.calibrate(cpu(), workers(2), &samples, target);
    let training = Training {
        n_epochs: 20,
        rate: 1e-2,
        quant: QuantType::Q8_0,
        ..Training::default()
    };
    let mut steps = Vec::new();
    let mut trained = ahead_trained::fit(&samples, workers(2), &training, |done, all| {
        steps.push((done, all))
    })
    .unwrap();
    assert_eq!(
        (steps[0].0, steps.len()),
        (1, steps.last().unwrap().1),
        "progress is told"
    );
    let trained = trained.calibrate(cpu(), workers(2), &samples, target);
    for evaluation in [&linear, &trained] {
        assert!(evaluation.lost.mean <= 0.1 + 1e-9, "{evaluation:?}");
    }
    // by chance 90 % of the mass takes 90 % of the neurons
    assert!(
        trained.candidates < 0.6 * linear.candidates,
        "{trained:?} against {linear:?}"
    );
    assert!(trained.candidates < 0.45, "{trained:?}");
}

#[test]
fn scores_by_bits_are_of_the_weights_first_bits() {
    let (n_tokens, n_embd, n_ff) = (70, 96, 37);
    let mut rng = Mt19937::new(2);
    let gate = normal(&mut rng, n_ff * n_embd, 0.1);
    let gate = QuantisedMatrix::round(QuantType::Q4_0, &gate, n_embd);
    let x = normal(&mut rng, n_tokens * n_embd, 1.0);
    let scores = bits::scores(cpu(), workers(2), &gate, &x, true);
    let values = gate.values();
    let sketched = |token: usize, row: usize, sketch: &dyn Fn(usize, f32) -> f64| -> f64 {
        let (x, w) = (&x[token * n_embd..], &values[row * n_embd..]);
        let products = (0..n_embd).map(|k| sketch(row * n_embd + k, w[k]) * f64::from(x[k]));
        products.sum()
    };
    // the largest of a block is −8 scales
    let largest = |block: &[f32]| {
        let max = block
            .iter()
            .copied()
            .max_by(|a, b| a.abs().total_cmp(&b.abs()));
        max.expect("32 values")
    };
    let scales: Vec<f32> = values
        .chunks_exact(32)
        .map(|block| largest(block) / -8.0)
        .collect();
    for (token, row) in (0..n_tokens).flat_map(|t| (0..n_ff).map(move |r| (t, r))) {
        let sketch = |small: f64, large: f64| {
            sketched(token, row, &|at, w| {
                let scale = scales[at / 32];
                let code = (w / scale).round() as i32;
                let size = if (-4..4).contains(&code) {
                    small
                } else {
                    large
                };
                let positive = (code >= 0) == (scale > 0.0);
                if positive { size } else { -size }
            })
        };
        let at = token * n_ff + row;
        for (got, want) in [
            (scores.one[at], sketch(1.0, 1.0)),
            (scores.two[at], sketch(1.0, 3.0)),
        ] {
            // what rounding 96 inputs to 8 bits adds up to
            assert!((f64::from(got) - want).abs() < 1.5, "{got} is not {want}");
        }
    }
    let signs = bits::scores(cpu(), workers(1), &gate, &x, false);
    assert_eq!((signs.one, signs.two), (scores.one, vec![]));
}

#[test]
fn thresholds_meet_their_target_and_nearly_so_on_fresh_tokens() {
    let samples = low_rank_samples(4000);
    let sketch = low_rank::fit(&samples, workers(2), 32)
        .unwrap()
        .at(32, QuantType::Q4_0)
        .unwrap();
    let scores = sketch.scores(cpu(), workers(2), &samples.x);
    let all = samples.masses(0..samples.n_tokens);
    let split = |from: usize, to: usize| -> (&[f32], Masses<'_>) {
        (
            &scores[from * samples.n_ff..to * samples.n_ff],
            samples.masses(from..to),
        )
    };
    let (seen, seen_masses) = split(3000, 3500);
    let (fresh, fresh_masses) = split(3500, 4000);
    for target in [
        Target::MassKept(0.95),
        Target::MassKept(0.99),
        Target::LostRms(0.02),
    ] {
        let found = fit(seen, &seen_masses, target);
        let on_seen = evaluate(seen, &found.bias, None, &seen_masses);
        assert!(target.is_met(on_seen.lost), "{target:?}: {on_seen:?}");
        let on_fresh = evaluate(fresh, &found.bias, None, &fresh_masses);
        assert!(
            on_fresh.lost.mean < 1.5 * on_seen.lost.mean + 0.002,
            "{on_seen:?} {on_fresh:?}"
        );
        assert!(on_fresh.candidates < 0.5, "{on_fresh:?}");
    }
    // all of it is everything that fires, and little more is asked for than with less
    let found = fit(&scores, &all, Target::MassKept(1.0));
    let whole = evaluate(&scores, &found.bias, None, &all);
    assert_eq!((whole.lost.mean, whole.found), (0.0, 1.0), "{whole:?}");
}

/// Neurons whose scores are good for different things: own thresholds need fewer candidates than one.
#[test]
fn a_threshold_per_neuron_beats_one_for_all() {
    let (n_tokens, n_ff) = (1000, 64);
    let mut rng = Mt19937::new(9);
    let gates: Vec<f32> = normal(&mut rng, n_tokens * n_ff, 1.0)
        .iter()
        .map(|gate| gate - 1.2)
        .collect();
    let noise = normal(&mut rng, n_tokens * n_ff, 1.0);
    let scale = |at: usize| {
        if at % n_ff < 32 {
            (0.05, 0.3)
        } else {
            (0.8, 5.0)
        }
    };
    let scores: Vec<f32> = (0..gates.len())
        .map(|at| (gates[at] + noise[at] * scale(at).0) * scale(at).1)
        .collect();
    let contributions: Vec<f32> = gates.iter().map(|gate| gate.max(0.0)).collect();
    let masses = Masses::new(&gates, &contributions, n_ff);
    let target = Target::MassKept(0.98);
    let found = fit(&scores, &masses, target);
    assert_eq!(found.rule, thresholds::Rule::PerNeuron);
    let own = evaluate(&scores, &found.bias, None, &masses);
    assert!(target.is_met(own.lost), "{own:?}");
    // the least single threshold that does as well
    let mut one = -20.0f32;
    while target.is_met(evaluate(&scores, &vec![-one - 0.05; n_ff], None, &masses).lost) {
        one += 0.05;
    }
    let single = evaluate(&scores, &vec![-one; n_ff], None, &masses);
    assert!(
        own.candidates < 0.8 * single.candidates,
        "{own:?} against {single:?}"
    );
}

#[test]
fn floors_drop_small_contributions_and_no_more_than_asked_for() {
    let samples = low_rank_samples(2000);
    let masses = samples.masses(0..samples.n_tokens);
    let floor = fit_floor(&masses, 0.01);
    let everything = vec![1.0; samples.gates.len()];
    let bias = vec![0.0; samples.n_ff];
    let dropped = evaluate(&everything, &bias, Some(&floor), &masses);
    assert!((0.005..0.012).contains(&dropped.lost.mean), "{dropped:?}");
    assert!(dropped.computed < 0.95 * dropped.density, "{dropped:?}");
    assert_eq!(dropped.candidates, 1.0);
    let none = evaluate(&everything, &bias, Some(&fit_floor(&masses, 0.0)), &masses);
    assert!(none.lost.mean < 1e-4, "{none:?}");
    let above = masses.above(&floor);
    let rest = evaluate(&everything, &bias, Some(&floor), &above);
    assert_eq!(
        rest.lost.mean, 0.0,
        "what floors drop isn't missed: {rest:?}"
    );
}

#[test]
fn threads_change_no_bit() {
    let samples = low_rank_samples(600);
    let training = Training {
        rank: 32,
        n_epochs: 1,
        ..Training::default()
    };
    let all = |n_threads: usize| {
        let workers = workers(n_threads);
        let low_rank = low_rank::fit(&samples, workers, 32)
            .unwrap()
            .at(32, QuantType::Q4_0)
            .unwrap();
        let mut svd = ahead_svd::fit(&samples, workers, 32, QuantType::Q4_0).unwrap();
        svd.calibrate(cpu(), workers, &samples, Target::MassKept(0.9));
        let mut trained = ahead_trained::fit(&samples, workers, &training, |_, _| ()).unwrap();
        trained.calibrate(cpu(), workers, &samples, Target::MassKept(0.9));
        (low_rank, svd, trained)
    };
    let one = all(1);
    for n_threads in [2, 3] {
        assert!(all(n_threads) == one, "{n_threads} threads");
    }
}

#[test]
fn samples_that_nothing_can_be_fitted_to_are_refused() {
    let samples = low_rank_samples(64);
    let few = LayerSamples {
        n_tokens: 2,
        x: samples.x[..2 * 64].to_vec(),
        residual_before: None,
        gates: samples.gates[..2 * 96].to_vec(),
        contributions: samples.contributions[..2 * 96].to_vec(),
        ..samples
    };
    let message = few.check().unwrap_err().to_string();
    assert!(
        message.contains("2 tokens") && message.contains("64"),
        "{message}"
    );
    let mut broken = low_rank_samples(64);
    broken.gates[5] = f32::NAN;
    let message = broken.check().unwrap_err().to_string();
    assert!(message.contains("gates"), "{message}");
    broken.residual_before = None;
    let error = ahead_svd::fit(&broken, workers(1), 32, QuantType::Q8_0).unwrap_err();
    assert_eq!(error, PredictorError::NoResidual);
}
