//! Each actor's own counters, asked through its mailbox, add up to what the pipeline reports.

mod common;

use common::{Collector, Form, N_FF, N_LAYER, PlainModel, Setup, engine, naive, run, tokens};
use pi_actors::counters::Counters;
use pi_actors::messages::ActorId;
use pi_actors::weights::{GateActivation, SparsityMode};

#[test]
fn counters_of_all_actors_are_the_run_s_totals() {
    let model = PlainModel::random(31, GateActivation::Relu);
    let tokens = tokens(60);
    for (n_nodes, form) in [
        (1, Form::Neurons(SparsityMode::Exact)),
        (2, Form::Neurons(SparsityMode::Exact)),
        (4, Form::Neurons(SparsityMode::Off)),
        (2, Form::Dense),
    ] {
        let engine = engine(
            &model,
            Setup {
                n_nodes,
                form,
                n_ubatch: 16,
                ..Setup::default()
            },
        );
        let mut sum_of_runs = Counters::default();
        for pieces in [vec![40, 1, 1, 1, 17], vec![1; 60]] {
            let run = run(&engine, Collector::in_pieces(&tokens, pieces));
            run.outcome.unwrap();
            sum_of_runs += run.totals.prefill + run.totals.decode;
            let all = engine.counters().unwrap();
            assert_eq!(all.len(), 1 + N_LAYER + N_LAYER * n_nodes);
            let sum = all
                .iter()
                .fold(Counters::default(), |sum, actor| sum + actor.counters);
            assert_eq!(sum, sum_of_runs, "{n_nodes} nodes, {form:?}");
        }
    }
}

#[test]
fn totals_tell_prefill_from_decode_and_count_what_is_read() {
    let model = PlainModel::random(32, GateActivation::Relu);
    let tokens = tokens(30);
    let exact = Form::Neurons(SparsityMode::Exact);
    let engine = engine(
        &model,
        Setup {
            form: exact,
            ..Setup::default()
        },
    );
    let totals = {
        let mut pieces = vec![20];
        pieces.extend([1; 10]);
        run(&engine, Collector::in_pieces(&tokens, pieces)).totals
    };
    assert_eq!((totals.prefill_tokens, totals.decode_tokens), (20, 10));
    assert_eq!(totals.decode.neurons, (10 * N_LAYER * N_FF) as u64);
    let (_, all) = naive::logits(&model, &tokens);
    let (_, first) = naive::logits(&model, &tokens[..20]);
    assert_eq!(totals.decode.active_neurons, (all - first) as u64);
    // an active neuron's up and down rows are read, another's are not
    let dense = {
        let off = Form::Neurons(SparsityMode::Off);
        let engine = crate::engine(
            &model,
            Setup {
                form: off,
                ..Setup::default()
            },
        );
        let mut pieces = vec![20];
        pieces.extend([1; 10]);
        run(&engine, Collector::in_pieces(&tokens, pieces)).totals
    };
    let skipped = totals.decode.neurons - totals.decode.active_neurons;
    let row_pair_bytes = 2 * 64 * 4;
    assert_eq!(
        dense.decode.weight_bytes - totals.decode.weight_bytes,
        skipped * row_pair_bytes
    );
}

#[test]
fn every_cold_layer_handles_three_messages_a_token_and_the_last_four() {
    let model = PlainModel::random(33, GateActivation::Relu);
    let engine = engine(
        &model,
        Setup {
            n_nodes: 2,
            ..Setup::default()
        },
    );
    run(&engine, Collector::new(&tokens(10), true))
        .outcome
        .unwrap();
    for counters in engine.counters().unwrap() {
        let messages = counters.counters.messages;
        match counters.actor {
            ActorId::Pipeline => assert_eq!(messages, 10 * (N_LAYER as u64 + 1)),
            ActorId::Predictor => panic!("nothing is predicted"),
            ActorId::DeviceLayer { layer: 2 } => assert_eq!(messages, 10 * 10),
            ActorId::DeviceLayer { .. } => assert_eq!(messages, 10 * 7),
            ActorId::ColdLayer { layer: 2, .. } => assert_eq!(messages, 10 * 4),
            ActorId::ColdLayer { .. } => assert_eq!(messages, 10 * 3),
        }
    }
}
