//! What llama.cpp does with the same logits: its own tests' values, and draws that its library made.

use std::path::Path;

use super::candidates::Candidates;
use super::penalties::Penalties;
use super::*;

/// Candidates whose softmax is `probabilities`, as llama.cpp's tests make them.
fn of(probabilities: &[f32]) -> Candidates {
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
    let mut candidates = Candidates::with_capacity(logits.len());
    candidates.fill(&logits);
    candidates
}

/// The probabilities of what is left, checked as llama.cpp's `sampler_tester` checks them.
fn assert_left(mut candidates: Candidates, expected: &[f32]) {
    candidates.softmax();
    let left: Vec<f32> = candidates.items().iter().map(|c| c.p).collect();
    assert_eq!(left.len(), expected.len(), "{left:?}");
    for (p, expected) in left.iter().zip(expected) {
        assert!((p - expected).abs() < 1e-5, "{left:?}");
    }
}

#[test]
fn top_k_top_p_and_min_p_leave_its_probabilities() {
    let all = [0.1, 0.2, 0.3, 0.4];
    let top_k: [(usize, &[f32]); 4] = [
        (1, &[1.0]),
        (3, &[0.44444, 0.33333, 0.22222]),
        (4, &[0.4, 0.3, 0.2, 0.1]),
        (0, &all),
    ];
    for (k, left) in top_k {
        let mut candidates = of(&all);
        truncation::top_k(&mut candidates, k);
        assert_left(candidates, left);
    }
    let top_p: [(f32, &[f32]); 4] = [
        (0.0, &[1.0]),
        (0.7, &[0.571429, 0.428571]),
        (0.8, &[0.44444, 0.33333, 0.22222]),
        (1.0, &all),
    ];
    for (p, left) in top_p {
        let mut candidates = of(&all);
        truncation::top_p(&mut candidates, p);
        assert_left(candidates, left);
    }
    let min_p: [(f32, &[f32]); 4] = [
        (0.24, &all),
        (0.26, &[0.2 / 0.9, 0.3 / 0.9, 0.4 / 0.9]),
        (0.74, &[0.3 / 0.7, 0.4 / 0.7]),
        (1.0, &[1.0]),
    ];
    for (p, left) in min_p {
        let mut candidates = of(&all);
        truncation::min_p(&mut candidates, p);
        assert_left(candidates, left);
    }
}

#[test]
fn temperature_leaves_its_probabilities() {
    let mut candidates = of(&[0.1, 0.2, 0.3, 0.4]);
    temperature::temperature(&mut candidates, 1.0);
    assert_left(candidates, &[0.1, 0.2, 0.3, 0.4]);
    // it keeps the others with a probability of 0, here they are gone
    let mut candidates = of(&[0.1, 0.2, 0.3, 0.4]);
    temperature::temperature(&mut candidates, 0.0);
    assert_eq!(candidates.items()[0].id, 3);
    assert_left(candidates, &[1.0]);
}

#[test]
fn penalties_leave_its_probabilities() {
    let cases: [(&[u32], [f32; 5], f32, f32); 6] = [
        (&[0], [0.0, 0.25, 0.25, 0.25, 0.25], 50.0, 0.0),
        (&[0, 1, 2], [0.0, 0.0, 0.0, 0.5, 0.5], 50.0, 0.0),
        (&[0, 1, 2, 0, 0], [0.0, 0.0, 0.0, 0.5, 0.5], 50.0, 0.0),
        (
            &[0],
            [0.000011, 0.249997, 0.249997, 0.249997, 0.249997],
            1.0,
            5.0,
        ),
        (
            &[0, 1, 2],
            [0.000023, 0.000023, 0.000023, 0.499966, 0.499966],
            1.0,
            5.0,
        ),
        (
            &[0, 1, 2, 0, 0],
            [0.0, 0.000023, 0.000023, 0.499977, 0.499977],
            1.0,
            5.0,
        ),
    ];
    for (last, left, repeat_penalty, frequency_and_presence) in cases {
        let params = SamplerParams {
            repeat_penalty,
            frequency_penalty: frequency_and_presence,
            presence_penalty: frequency_and_presence,
            repeat_last_n: last.len() as i32,
            ..SamplerParams::default()
        };
        let mut penalties = Penalties::new(&params, 5);
        for id in last {
            penalties.accept(*id);
        }
        let mut candidates = of(&[0.2; 5]);
        penalties.apply(&mut candidates);
        assert_left(candidates, &left);
    }
}

/// Draws of one setting, by llama.cpp's library.
#[derive(serde::Deserialize)]
struct Draws {
    n_vocab: usize,
    params: SamplerParams,
    /// The ids, each accepted before the next is drawn.
    ids: Vec<u32>,
}

/// Logits of draw number `step`: 8·u³ of uniform values u in [−1, 1) from a linear congruential generator.
fn logits(n_vocab: usize, step: usize) -> Vec<f32> {
    let mut state = 100 + step as u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let u = f64::from(state >> 8) / f64::from(1 << 23) - 1.0;
        (8.0 * u * u * u) as f32
    };
    (0..n_vocab).map(|_| next()).collect()
}

/// The whole chain in llama.cpp's default order, each sampler alone and several together.
#[test]
fn the_chain_draws_what_its_chain_draws() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/sampler/draws.json");
    let cases: Vec<Draws> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert!(cases.len() >= 50);
    for case in cases {
        let mut sampler = Sampler::new(case.params.clone(), case.n_vocab).unwrap();
        for (step, expected) in case.ids.iter().enumerate() {
            let id = sampler.sample(&logits(case.n_vocab, step));
            assert_eq!(id, *expected, "draw {step} of {:?}", case.params);
            sampler.accept(id);
        }
    }
}
