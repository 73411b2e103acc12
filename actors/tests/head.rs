//! The sparse head: the same candidates however the work is divided, with the full head's logits.

mod common;

use common::{
    Collector, N_EMBD, N_VOCAB, PlainModel, SKETCH_RANK, Setup, add_sketch, engine, plan, run,
    tokens, weights,
};
use pi_actors::trace::{Scorer, TraceBounds};
use pi_actors::weights::GateActivation;
use pi_actors::{
    ActorError, Candidates, Engine, EngineOptions, Feed, Feeder, HeadWanted, LogitsWanted, Next,
    Run, Teams,
};

/// Feeds tokens one by one after a first piece, and keeps the candidates of every one from `first` on.
struct Sparse {
    tokens: Vec<u32>,
    fed: usize,
    first: usize,
    biases: Vec<(u32, f32)>,
    candidates: Vec<(usize, Vec<u32>, Vec<f32>)>,
}

impl Sparse {
    fn new(biases: &[(u32, f32)]) -> Self {
        Self {
            tokens: tokens(40),
            fed: 0,
            first: 5,
            biases: biases.to_vec(),
            candidates: vec![],
        }
    }

    /// Positions, ids, and logits' bits.
    fn bits(&self) -> Vec<(usize, Vec<u32>, Vec<u32>)> {
        let bits = |logits: &[f32]| logits.iter().map(|logit| logit.to_bits()).collect();
        let each = self.candidates.iter();
        each.map(|(position, ids, logits)| (*position, ids.clone(), bits(logits)))
            .collect()
    }
}

impl Feeder for Sparse {
    fn next(&mut self) -> Next<'_> {
        let position = self.fed;
        let len = if position == 0 { 20 } else { 1 };
        if position + len > self.tokens.len() {
            return Next::Done;
        }
        self.fed += len;
        Next::Feed(Feed {
            tokens: &self.tokens[position..position + len],
            position,
            logits: LogitsWanted::From(if position == 0 { self.first } else { 0 }),
        })
    }

    fn logits(&mut self, _: usize, _: &[f32]) {
        panic!("candidates were asked for");
    }

    fn head(&self) -> HeadWanted<'_> {
        HeadWanted::Sparse {
            biases: &self.biases,
        }
    }

    fn candidates(&mut self, position: usize, candidates: Candidates<'_>) {
        let Candidates { ids, logits } = candidates;
        self.candidates
            .push((position, ids.to_vec(), logits.to_vec()));
    }
}

fn setup(n_nodes: usize, n_threads: usize, n_groups: usize) -> Setup {
    Setup {
        n_nodes,
        n_threads,
        sketch_groups: Some(n_groups),
        ..Setup::default()
    }
}

fn sparse(engine: &Engine, biases: &[(u32, f32)]) -> Run<Sparse> {
    let run = engine.run(Sparse::new(biases)).unwrap();
    if let Err(error) = &run.outcome {
        panic!("{error}");
    }
    run
}

/// Scores of the tokens by the sketch after some tokens: every other number of the normed state, which is not seen from
/// outside, so they are told from the full logits of a model whose head has nothing but these.
fn sketched(model: &PlainModel) -> PlainModel {
    let mut sketched = PlainModel::random(11, model.activation);
    let odd = sketched.head.iter_mut().skip(1).step_by(2);
    odd.for_each(|weight| *weight = 0.0);
    sketched
}

#[test]
fn candidates_are_the_best_by_the_sketch_and_have_the_full_head_s_logits() {
    let model = PlainModel::random(11, GateActivation::Relu);
    let full = run(
        &engine(&model, Setup::default()),
        Collector::new(&tokens(40), true),
    );
    let scores = run(
        &engine(&sketched(&model), Setup::default()),
        Collector::new(&tokens(40), true),
    );
    for n_groups in [1, 3, 7] {
        let found = sparse(&engine(&model, setup(1, 2, n_groups)), &[]);
        assert_eq!(found.feeder.candidates.len(), 35);
        for (position, ids, logits) in &found.feeder.candidates {
            let want = &full.feeder.logits[*position].1;
            for (id, logit) in ids.iter().zip(logits) {
                assert_eq!(logit.to_bits(), want[*id as usize].to_bits());
            }
            let scores = &scores.feeder.logits[*position].1;
            let best = |group: &[f32]| group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut maxima: Vec<f32> = scores.chunks(16).map(best).collect();
            maxima.sort_by(|a, b| b.total_cmp(a));
            // the sums' order differs: a score within rounding of the threshold may fall on either side
            let threshold = maxima[n_groups - 1];
            for (id, score) in scores.iter().enumerate() {
                let is_candidate = ids.contains(&(id as u32));
                let clear = (score - threshold).abs() > 1e-5;
                assert!(
                    !clear || is_candidate == (*score > threshold),
                    "{position}: {id}"
                );
            }
            assert!(ids.len() >= n_groups && ids.is_sorted());
        }
    }
}

#[test]
fn candidates_do_not_depend_on_nodes_or_threads() {
    let model = PlainModel::random(12, GateActivation::Relu);
    let biases = [(3, 0.5), (77, f32::NEG_INFINITY), (111, -2.0)];
    for n_groups in [2, 5] {
        let want = sparse(&engine(&model, setup(1, 1, n_groups)), &biases)
            .feeder
            .bits();
        for (n_nodes, n_threads) in [(1, 2), (1, 3), (2, 1), (2, 2), (4, 1)] {
            let engine = engine(&model, setup(n_nodes, n_threads, n_groups));
            let got = sparse(&engine, &biases);
            assert!(got.feeder.bits() == want, "{n_nodes} × {n_threads}");
        }
    }
}

#[test]
fn tokens_with_a_bias_are_candidates_and_forbidden_ones_take_nobody_s_place() {
    let model = PlainModel::random(13, GateActivation::Relu);
    let engine = engine(&model, setup(2, 1, 2));
    let free = sparse(&engine, &[]);
    // forbid what would be the candidates of one position
    let (at, ids, _) = &free.feeder.candidates[20];
    let forbidden: Vec<(u32, f32)> = ids.iter().map(|id| (*id, f32::NEG_INFINITY)).collect();
    let run = sparse(&engine, &forbidden);
    let (position, found, _) = &run.feeder.candidates[20];
    assert_eq!(position, at);
    let others = found.iter().filter(|id| !ids.contains(id)).count();
    assert!(
        others >= 2 && ids.iter().all(|id| found.contains(id)),
        "{ids:?} {found:?}"
    );
    // a token that is never a candidate by itself is one with a bias, whichever
    let never = (0..N_VOCAB as u32).find(|id| {
        let mut lists = free.feeder.candidates.iter();
        lists.all(|(_, ids, _)| !ids.contains(id))
    });
    let never = never.expect("2 of 7 groups leave some out");
    let run = sparse(&engine, &[(never, 0.0)]);
    let mut lists = run.feeder.candidates.iter();
    assert!(lists.all(|(_, ids, _)| ids.contains(&never)));
}

#[test]
fn the_full_head_has_the_same_bits_beside_a_sketch() {
    let model = PlainModel::random(14, GateActivation::Relu);
    let tokens = tokens(40);
    let want = run(
        &engine(&model, Setup::default()),
        Collector::new(&tokens, true),
    );
    for (n_nodes, one_by_one) in [(1, true), (2, false)] {
        let engine = engine(&model, setup(n_nodes, 2, 2));
        let got = run(&engine, Collector::new(&tokens, one_by_one));
        assert!(got.feeder.bits() == want.feeder.bits());
    }
}

#[test]
fn bytes_are_those_of_the_sketch_and_the_candidates() {
    let model = PlainModel::random(15, GateActivation::Relu);
    let setup = Setup {
        trace: Some(TraceBounds {
            n_steps: 0,
            node_bytes_max: 0,
        }),
        ..setup(1, 2, 2)
    };
    let engine = engine(&model, setup);
    let full = run(&engine, Collector::new(&tokens(40), true)).totals;
    let before: u64 = counted(&engine);
    let some = sparse(&engine, &[]);
    let decoded = some
        .feeder
        .candidates
        .iter()
        .filter(|(position, ..)| *position >= 20);
    let n_rows: usize = decoded.map(|(_, ids, _)| ids.len()).sum();
    let sketch = SKETCH_RANK * N_EMBD + N_VOCAB * SKETCH_RANK;
    let head = 4 * (20 * (N_VOCAB * N_EMBD - sketch) - n_rows * N_EMBD) as u64;
    // active neurons are those of positions 20 … 39 in the one and 1 … 39 in the other: compare what does not depend on
    // them
    let neurons = |active: u64| active * 2 * 4 * N_EMBD as u64;
    let bytes = |totals: pi_actors::counters::RunTotals| {
        let decode = totals.decode;
        decode.weight_bytes - neurons(decode.active_neurons)
    };
    let per_token = bytes(full) / full.decode_tokens as u64;
    assert_eq!(
        bytes(some.totals) + head,
        per_token * some.totals.decode_tokens as u64
    );
    let totals = some.totals.prefill + some.totals.decode;
    assert_eq!(counted(&engine) - before, totals.weight_bytes);
    // the full head's tokens have no scores
    let cost = engine.trace().unwrap().score_costs()[0][Scorer::Head as usize];
    let n_tokens = some.feeder.candidates.len();
    assert_eq!(cost.bytes, (4 * n_tokens * sketch) as u64);
    assert!(cost.ns > 0);
}

/// Bytes that all actors have counted.
fn counted(engine: &Engine) -> u64 {
    let actors = engine.counters().unwrap();
    actors.iter().map(|actor| actor.counters.weight_bytes).sum()
}

#[test]
fn what_cannot_be_asked_for_is_said() {
    let model = PlainModel::random(16, GateActivation::Relu);
    let outcome = |engine: &Engine, biases: &[(u32, f32)]| {
        let run = engine.run(Sparse::new(biases)).unwrap();
        run.outcome.unwrap_err()
    };
    let error = outcome(&engine(&model, Setup::default()), &[]);
    assert!(matches!(error, ActorError::NoHeadSketch), "{error}");
    let with_sketch = engine(&model, setup(1, 1, 2));
    let error = outcome(&with_sketch, &[(N_VOCAB as u32, 1.0)]);
    assert!(matches!(error, ActorError::UnknownToken { .. }), "{error}");
    drop(with_sketch);
    let error = outcome(&spoilt(&model), &[]);
    let text = error.to_string();
    assert!(
        text.contains("sketch of the head") && text.contains("position 5"),
        "{text}"
    );
}

/// An engine whose sketch has nothing but NaN.
fn spoilt(model: &PlainModel) -> Engine {
    let setup = setup(1, 1, 2);
    let mut weights = weights(model, 1, setup.form);
    add_sketch(&mut weights, model, 2);
    let sketch = weights.head_sketch.as_mut().unwrap();
    let scores = &mut sketch.shares[0].scores;
    scores.bytes = f32::NAN.to_le_bytes().repeat(scores.bytes.len() / 4).into();
    let options = EngineOptions {
        cpu: pi_kernels::Cpu::detect(pi_kernels::ActivationMode::F32),
        kv_type: pi_kernels::attention::KvType::F32,
        n_ubatch: setup.n_ubatch,
        wait_limit: setup.wait_limit,
        faults: setup.faults,
        trace: None,
        tap: None,
    };
    Engine::start(Teams::start(&plan(1, 1)).unwrap(), weights, options).unwrap()
}
