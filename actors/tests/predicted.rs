//! Predicted neurons: equal to plain loops that leave out the same ones, and the same bits however the
//! work is divided.

mod common;

use std::time::Instant;

use common::naive::{self, Counts};
use common::sketches::RANK;
use common::{Collector, Form, N_EMBD, N_FF, N_LAYER, PlainModel, Predictors, Setup, SketchForm};
use common::{engine, error_text, run, tokens};
use pi_actors::counters::Counters;
use pi_actors::faults::{Fault, FaultPlace, Faults};
use pi_actors::messages::ActorId;
use pi_actors::trace::{ScoreCost, TraceBounds};
use pi_actors::weights::GateActivation;
use pi_kernels::ActivationMode;
use pi_kernels::ffn_sparse::sketch::planes::PlanesShape;

const IN_LAYER: Predictors = Predictors {
    sketch: SketchForm::LowRank,
    ahead: false,
    alone: false,
};
const BOTH: Predictors = Predictors {
    ahead: true,
    ..IN_LAYER
};
const AHEAD: Predictors = Predictors {
    alone: true,
    ..BOTH
};

fn model() -> PlainModel {
    PlainModel::random(47, GateActivation::Relu)
}

fn bits(sketch: SketchForm) -> Predictors {
    Predictors { sketch, ..IN_LAYER }
}

#[test]
fn logits_and_counts_are_those_of_plain_loops_that_leave_out_the_same_neurons() {
    let (model, tokens) = (model(), tokens(40));
    for who in [IN_LAYER, BOTH, AHEAD] {
        let (want, counts) = naive::predicted(&model, &tokens, Some(who));
        assert!(
            counts.candidates < 40 * N_LAYER * N_FF * 9 / 10,
            "{counts:?}"
        );
        for n_nodes in [1, 2] {
            let setup = Setup {
                n_nodes,
                form: Form::Predicted(who),
                ..Setup::default()
            };
            let run = run(&engine(&model, setup), Collector::new(&tokens, true));
            assert_eq!(error_text(&run), "no error");
            let total = run.totals.prefill + run.totals.decode;
            let got = Counts {
                candidates: total.candidates as usize,
                active: total.active_neurons as usize,
            };
            assert_eq!(got, counts, "{who:?} on {n_nodes} nodes");
            for (position, logits) in &run.feeder.logits {
                for (got, want) in logits.iter().zip(&want[*position]) {
                    let close = (f64::from(*got) - want).abs() < 2e-4;
                    assert!(close, "{who:?}, position {position}: {got} is not {want}");
                }
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_nodes_threads_or_batch() {
    let (model, tokens) = (model(), tokens(150));
    for (who, pieces) in [
        (IN_LAYER, vec![1, 60, 1, 1, 87]),
        (bits(SketchForm::Signs), vec![1, 60, 1, 1, 87]),
        (bits(SketchForm::TwoBits), vec![1, 60, 1, 1, 87]),
        // only decoding is predicted ahead
        (BOTH, vec![1; 150]),
        (AHEAD, vec![1; 150]),
    ] {
        for activations in [ActivationMode::F32, ActivationMode::Q8] {
            let setup = || Setup {
                form: Form::Predicted(who),
                activations,
                ..Setup::default()
            };
            let one_by_one = Collector::new(&tokens, true);
            let want = run(&engine(&model, setup()), one_by_one).feeder.bits();
            for (n_nodes, n_threads) in [(1, 1), (1, 3), (2, 1), (2, 2), (4, 1)] {
                let setup = Setup {
                    n_nodes,
                    n_threads,
                    n_ubatch: 23,
                    ..setup()
                };
                let feeder = Collector::in_pieces(&tokens, pieces.clone());
                let run = run(&engine(&model, setup), feeder);
                assert_eq!(error_text(&run), "no error");
                let same = run.feeder.bits() == want;
                assert!(same, "{who:?}, {activations}, {n_nodes} × {n_threads}");
            }
        }
    }
}

#[test]
fn planes_of_all_candidates_give_the_bits_of_the_whole_gate() {
    let (model, tokens) = (model(), tokens(70));
    for activations in [ActivationMode::F32, ActivationMode::Q8] {
        let of = |sketch| {
            let setup = Setup {
                form: Form::Predicted(bits(sketch)),
                activations,
                ..Setup::default()
            };
            let feeder = Collector::in_pieces(&tokens, vec![33, 1, 1, 35]);
            let run = run(&engine(&model, setup), feeder);
            let bytes = (run.totals.prefill + run.totals.decode).weight_bytes;
            (run.feeder.bits(), bytes)
        };
        let same = of(SketchForm::TwoBitsOfAll) == of(SketchForm::RoundedGates);
        assert!(same, "{activations}: bits and bytes");
    }
}

#[test]
fn the_second_bit_leaves_out_more() {
    let (model, tokens) = (model(), tokens(40));
    let totals = |sketch| {
        let setup = Setup {
            form: Form::Predicted(bits(sketch)),
            ..Setup::default()
        };
        let run = run(&engine(&model, setup), Collector::new(&tokens, true));
        assert_eq!(error_text(&run), "no error");
        run.totals.prefill + run.totals.decode
    };
    let (one, two) = (totals(SketchForm::Signs), totals(SketchForm::TwoBits));
    let (all, named, kept) = (one.neurons, one.candidates, two.candidates);
    assert!(
        0 < kept && kept < named && named < all,
        "{kept} of {named} of {all}"
    );
    assert!(two.weight_bytes < one.weight_bytes, "{two:?} after {one:?}");
}

#[test]
fn counters_of_all_actors_with_the_predictor_s_are_the_run_s_totals() {
    let (model, tokens) = (model(), tokens(40));
    for (who, n_nodes) in [(IN_LAYER, 1), (BOTH, 2), (AHEAD, 1)] {
        let setup = Setup {
            n_nodes,
            form: Form::Predicted(who),
            ..Setup::default()
        };
        let engine = engine(&model, setup);
        let run = run(&engine, Collector::in_pieces(&tokens, vec![20, 1, 1, 18]));
        let all = engine.counters().unwrap();
        let predictors = all.iter().filter(|c| c.actor == ActorId::Predictor);
        assert_eq!(predictors.count(), usize::from(who.ahead));
        let sum = (all.iter()).fold(Counters::default(), |sum, actor| sum + actor.counters);
        assert_eq!(sum, run.totals.prefill + run.totals.decode, "{who:?}");
    }
}

/// Tokens of a run that counts what scores take.
const N_SCORED: usize = 24;

/// Bytes and time of each scorer, in the order of [`Scorer::ALL`], and the run's work.
fn score_costs(who: Predictors, n_nodes: usize) -> ([ScoreCost; 5], Counters) {
    let setup = Setup {
        n_nodes,
        form: Form::Predicted(who),
        trace: Some(TraceBounds {
            n_steps: 0,
            node_bytes_max: 0,
        }),
        ..Setup::default()
    };
    let engine = engine(&model(), setup);
    let start = Instant::now();
    let run = run(&engine, Collector::new(&tokens(N_SCORED), true));
    let elapsed_ns = start.elapsed().as_nanos() as u64;
    assert_eq!(error_text(&run), "no error");
    let nodes = engine.trace().unwrap().score_costs();
    assert_eq!(nodes.len(), n_nodes);
    for (scorer, cost) in nodes.iter().flatten().enumerate() {
        // bytes are told where time is, and no time is more than there was
        assert_eq!(cost.ns > 0, cost.bytes > 0, "{who:?}, {scorer}: {cost:?}");
        assert!(cost.ns < elapsed_ns, "{who:?}, {scorer}: {cost:?}");
    }
    let sum = std::array::from_fn(|scorer| ScoreCost {
        bytes: nodes.iter().map(|node| node[scorer].bytes).sum(),
        ns: nodes.iter().map(|node| node[scorer].ns).sum(),
    });
    (sum, run.totals.prefill + run.totals.decode)
}

#[test]
fn bytes_of_scores_and_of_all_else_add_up() {
    let planes = PlanesShape {
        n_rows: N_FF,
        n_cols: N_EMBD,
    };
    let float = size_of::<f32>();
    let (a, b) = (float * RANK * N_EMBD, float * N_FF * RANK);
    let per_run = |layer_bytes: usize, n_layer: usize| (N_SCORED * n_layer * layer_bytes) as u64;
    for n_nodes in [1, 2] {
        // what is read of a candidate's gate beside what scores have read
        let mut rest = Vec::new();
        for (who, gate_bytes) in [
            (IN_LAYER, float * N_EMBD),
            (bits(SketchForm::Signs), planes.rest_row_bytes()),
            (
                bits(SketchForm::TwoBits),
                planes.rest_row_bytes() - planes.high_row_bytes(),
            ),
            (BOTH, float * N_EMBD),
        ] {
            let (costs, work) = score_costs(who, n_nodes);
            let [signs, second_bits, low_rank, ahead, head] = costs.map(|cost| cost.bytes);
            let is_low_rank = who.sketch == SketchForm::LowRank;
            // each node reads all of a
            let map = per_run(n_nodes * a + b, N_LAYER);
            assert_eq!(low_rank, if is_low_rank { map } else { 0 });
            let top = per_run(planes.top_bytes(), N_LAYER);
            assert_eq!(signs, if is_low_rank { 0 } else { top });
            let row_bytes = planes.high_row_bytes() as u64;
            let named = second_bits / row_bytes;
            assert!(second_bits.is_multiple_of(row_bytes) && named < work.neurons);
            let has_two = who.sketch == SketchForm::TwoBits;
            assert_eq!(named > work.candidates, has_two, "{named} in {work:?}");
            let next_layers = if who.ahead { N_LAYER - 1 } else { 0 };
            assert_eq!(ahead, per_run(a + b, next_layers));
            assert_eq!(head, 0);
            let neurons = work.active_neurons as usize * 2 * float * N_EMBD;
            let gates = work.candidates as usize * gate_bytes;
            let scores = signs + second_bits + low_rank + ahead;
            rest.push(work.weight_bytes - scores - (neurons + gates) as u64);
        }
        // attention and head: the same whatever predicts
        assert!(
            rest[0] > 0 && rest.iter().all(|bytes| *bytes == rest[0]),
            "{rest:?}"
        );
    }
}

#[test]
fn a_panic_of_the_predictor_or_between_its_messages_changes_no_bit() {
    let (model, tokens) = (model(), tokens(12));
    let setup = || Setup {
        n_nodes: 2,
        form: Form::Predicted(BOTH),
        ..Setup::default()
    };
    let want = run(&engine(&model, setup()), Collector::new(&tokens, true))
        .feeder
        .bits();
    let cold = ActorId::ColdLayer { layer: 1, node: 1 };
    for (actor, per_token) in [(ActorId::Predictor, 2), (cold, 5)] {
        for nth in 0..per_token {
            let fault = Fault {
                actor,
                after_messages: 5 * per_token + nth,
                place: FaultPlace::Handler,
                once: true,
            };
            let faults = Faults::new([fault]);
            let setup = Setup {
                faults: faults.clone(),
                ..setup()
            };
            let run = run(&engine(&model, setup), Collector::new(&tokens, true));
            assert_eq!(error_text(&run), "no error", "{fault:?}");
            assert!(faults.all_happened(), "{fault:?}");
            assert!(run.feeder.bits() == want, "{fault:?}");
        }
    }
}
