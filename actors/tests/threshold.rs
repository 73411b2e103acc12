//! Neurons that contribute little are left out, of gates that never close: equal to plain loops, and
//! the same bits however the work is divided.

mod common;

use common::{
    Collector, Form, N_FF, N_LAYER, PlainModel, Setup, Skip, engine, error_text, naive, run, tokens,
};
use pi_actors::weights::{GateActivation, SparsityMode};

const OFF: Form = Form::Neurons(SparsityMode::Off);

/// Both criteria, each with a tau that leaves out about half of the neurons.
const SKIPS: [Skip; 2] = [
    Skip {
        by_gate: true,
        tau: 0.17,
    },
    Skip {
        by_gate: false,
        tau: 0.08,
    },
];

/// Gates that never close.
const OPEN: [GateActivation; 2] = [GateActivation::Silu, GateActivation::Gelu];

fn with(skip: Skip) -> Setup {
    Setup {
        form: Form::Threshold(skip),
        ..Setup::default()
    }
}

#[test]
fn logits_and_neurons_kept_are_those_of_plain_loops() {
    for activation in OPEN {
        are_those_of_plain_loops(activation);
    }
}

fn are_those_of_plain_loops(activation: GateActivation) {
    let tokens = tokens(40);
    let model = PlainModel::random(5, activation);
    let off = Setup {
        form: OFF,
        ..Setup::default()
    };
    let off = run(&engine(&model, off), Collector::new(&tokens, true));
    let off_bytes = off.totals.decode.weight_bytes;
    for skip in SKIPS {
        let (want, kept) = naive::logits_without(&model, &tokens, Some(skip));
        let share = kept as f64 / (tokens.len() * N_LAYER * N_FF) as f64;
        assert!((0.3..0.7).contains(&share), "{skip:?} keeps {share}");
        for one_by_one in [true, false] {
            let run = run(
                &engine(&model, with(skip)),
                Collector::new(&tokens, one_by_one),
            );
            run.outcome.unwrap();
            let total = run.totals.prefill + run.totals.decode;
            assert_eq!(total.active_neurons, kept as u64, "{skip:?}");
            assert_eq!(run.feeder.logits.len(), tokens.len());
            for (position, logits) in &run.feeder.logits {
                for (got, want) in logits.iter().zip(&want[*position]) {
                    let close = (f64::from(*got) - want).abs() < 2e-4;
                    assert!(close, "{skip:?}, position {position}: {got} is not {want}");
                }
            }
            assert!(!one_by_one || run.totals.decode.weight_bytes < off_bytes);
        }
    }
}

#[test]
fn nothing_left_out_is_off() {
    for activation in OPEN {
        is_off(activation);
    }
}

fn is_off(activation: GateActivation) {
    let tokens = tokens(60);
    let model = PlainModel::random(6, activation);
    let off = Setup {
        form: OFF,
        ..Setup::default()
    };
    let off = run(&engine(&model, off), Collector::new(&tokens, true));
    for by_gate in [true, false] {
        for one_by_one in [true, false] {
            let engine = engine(&model, with(Skip { by_gate, tau: 0.0 }));
            let all = run(&engine, Collector::new(&tokens, one_by_one));
            assert!(all.feeder.bits() == off.feeder.bits(), "by gate: {by_gate}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_nodes_threads_or_batch() {
    for activation in OPEN {
        bits_do_not_depend(activation);
    }
}

fn bits_do_not_depend(activation: GateActivation) {
    let model = PlainModel::random(7, activation);
    let tokens = tokens(120);
    for skip in SKIPS {
        let want = run(&engine(&model, with(skip)), Collector::new(&tokens, true));
        for (n_nodes, n_threads) in [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1)] {
            for n_ubatch in [7, 64] {
                let setup = Setup {
                    n_nodes,
                    n_threads,
                    n_ubatch,
                    ..with(skip)
                };
                let pieces = vec![1, 40, 1, 1, 37, 40];
                let run = run(
                    &engine(&model, setup),
                    Collector::in_pieces(&tokens, pieces),
                );
                run.outcome.unwrap();
                let same = run.feeder.bits() == want.feeder.bits();
                assert!(same, "{n_nodes} × {n_threads}, {skip:?}, {n_ubatch}");
            }
        }
    }
}

#[test]
fn a_weight_that_is_no_number_surfaces() {
    for skip in SKIPS {
        let mut model = PlainModel::random(8, GateActivation::Silu);
        model.layers[1].gate[5] = f32::NAN;
        for one_by_one in [true, false] {
            let engine = engine(&model, with(skip));
            let text = error_text(&run(&engine, Collector::new(&tokens(3), one_by_one)));
            assert!(text.contains("layer 1"), "{skip:?}: {text}");
        }
    }
}
