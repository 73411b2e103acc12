//! Invariant 6: a dead actor is restarted and its step repeated, and the logits do not change; and
//! invariant 3: whoever cannot answer is named, and nobody waits for ever.

mod common;

use std::time::Duration;

use common::{Collector, PlainModel, Setup, engine, error_text, run, tokens};
use pi_actors::engine::ControlActor;
use pi_actors::faults::{Fault, FaultPlace, Faults};
use pi_actors::messages::ActorId;
use pi_actors::weights::GateActivation;
use pi_actors::{Feed, Feeder, LogitsWanted, Next};

const PIPELINE: ActorId = ActorId::Pipeline;

fn device(layer: usize) -> ActorId {
    ActorId::DeviceLayer { layer }
}

fn cold(layer: usize, node: usize) -> ActorId {
    ActorId::ColdLayer { layer, node }
}

fn model() -> PlainModel {
    PlainModel::random(21, GateActivation::Relu)
}

/// Messages that an actor handles for one token, with two nodes.
fn messages_per_token(actor: ActorId) -> u64 {
    match actor {
        ActorId::Pipeline => 4,
        ActorId::Predictor => 0,
        ActorId::DeviceLayer { layer } => {
            if layer == 2 {
                10
            } else {
                7
            }
        }
        ActorId::ColdLayer { layer, .. } => {
            if layer == 2 {
                4
            } else {
                3
            }
        }
    }
}

#[test]
fn a_panic_anywhere_in_a_token_changes_no_bit() {
    let (model, tokens) = (model(), tokens(12));
    let setup = || Setup {
        n_nodes: 2,
        ..Setup::default()
    };
    let want = run(&engine(&model, setup()), Collector::new(&tokens, true))
        .feeder
        .bits();
    let handler = FaultPlace::Handler;
    for (actor, place) in [
        (PIPELINE, handler),
        (device(0), handler),
        (device(2), handler),
        (cold(0, 0), handler),
        (cold(1, 1), handler),
        (cold(2, 1), handler),
        (cold(1, 0), FaultPlace::Worker { thread: 0 }),
        (cold(1, 1), FaultPlace::Worker { thread: 1 }),
    ] {
        // each message of the sixth token, one run each
        for nth in 0..messages_per_token(actor) {
            let after_messages = 5 * messages_per_token(actor) + nth;
            let fault = Fault {
                actor,
                after_messages,
                place,
                once: true,
            };
            let faults = Faults::new([fault]);
            let engine = engine(
                &model,
                Setup {
                    faults: faults.clone(),
                    ..setup()
                },
            );
            let run = run(&engine, Collector::new(&tokens, true));
            assert_eq!(error_text(&run), "no error", "{fault:?}");
            assert!(faults.all_happened(), "{fault:?}");
            assert!(run.feeder.bits() == want, "{fault:?}");
            let counters = engine.counters().unwrap();
            let restarted: Vec<_> = counters.iter().filter(|c| c.restarts > 0).collect();
            assert_eq!(restarted.len(), 1, "{fault:?}");
            assert_eq!((restarted[0].actor, restarted[0].restarts), (actor, 1));
        }
    }
}

#[test]
fn a_panic_in_a_prompt_and_two_at_once_change_no_bit() {
    let (model, tokens) = (model(), tokens(50));
    let setup = || Setup {
        n_nodes: 2,
        n_ubatch: 16,
        ..Setup::default()
    };
    let want = run(&engine(&model, setup()), Collector::new(&tokens, false))
        .feeder
        .bits();
    let fault = |actor, after_messages| Fault {
        actor,
        after_messages,
        place: FaultPlace::Handler,
        once: true,
    };
    let faults = Faults::new([
        fault(cold(1, 0), 4),
        fault(cold(1, 1), 4),
        fault(device(1), 9),
    ]);
    let engine = engine(
        &model,
        Setup {
            faults: faults.clone(),
            ..setup()
        },
    );
    let run = run(&engine, Collector::new(&tokens, false));
    assert_eq!(error_text(&run), "no error");
    assert!(faults.all_happened());
    let positions: Vec<usize> = run
        .feeder
        .logits
        .iter()
        .map(|(position, _)| *position)
        .collect();
    assert_eq!(
        positions,
        (0..50).collect::<Vec<_>>(),
        "no logits are given twice"
    );
    assert!(run.feeder.bits() == want);
}

#[test]
fn actors_of_the_control_plane_go_on_after_a_panic() {
    let model = model();
    let engine = engine(&model, Setup::default());
    for actor in [ControlActor::Stats, ControlActor::Supervisor] {
        engine.panic_control_actor(actor);
        run(&engine, Collector::new(&tokens(3), true))
            .outcome
            .unwrap();
        assert_eq!(engine.counters().unwrap().len(), 1 + 3 + 3);
    }
}

#[test]
fn the_supervisor_restarts_actors_after_its_own_panic() {
    let model = model();
    let fault = Fault {
        actor: cold(0, 0),
        after_messages: 2,
        place: FaultPlace::Handler,
        once: true,
    };
    let faults = Faults::new([fault]);
    let engine = engine(
        &model,
        Setup {
            faults: faults.clone(),
            ..Setup::default()
        },
    );
    engine.panic_control_actor(ControlActor::Supervisor);
    run(&engine, Collector::new(&tokens(3), true))
        .outcome
        .unwrap();
    assert!(faults.all_happened());
}

#[test]
fn an_actor_that_keeps_failing_ends_the_token_with_its_name_and_reason() {
    let model = model();
    let fault = Fault {
        actor: cold(1, 1),
        after_messages: 9,
        place: FaultPlace::Handler,
        once: false,
    };
    let setup = Setup {
        n_nodes: 2,
        faults: Faults::new([fault]),
        ..Setup::default()
    };
    let engine = engine(&model, setup);
    let run = run(&engine, Collector::new(&tokens(8), true));
    let text = error_text(&run);
    assert!(
        text.contains("ColdLayer 1 on node 1 failed 4 times in one step"),
        "{text}"
    );
    assert!(text.contains("injected panic"), "{text}");
    assert_eq!(run.feeder.logits.len(), 3, "tokens before it are there");
}

#[test]
fn every_run_hears_why_the_pipeline_keeps_failing() {
    let fault = Fault {
        actor: PIPELINE,
        after_messages: 2,
        place: FaultPlace::Handler,
        once: false,
    };
    let setup = Setup {
        faults: Faults::new([fault]),
        ..Setup::default()
    };
    let engine = engine(&model(), setup);
    // each starts while the pipeline of the one before may still be away
    for _ in 0..20 {
        let text = error_text(&run(&engine, Collector::new(&tokens(2), true)));
        assert!(
            text.contains("Pipeline failed 4 times in one step"),
            "{text}"
        );
    }
}

#[test]
fn a_stopped_cold_layer_ends_the_token_with_its_name() {
    let model = model();
    for stopped in [cold(0, 0), cold(2, 0), cold(1, 1)] {
        let engine = engine(
            &model,
            Setup {
                n_nodes: 2,
                ..Setup::default()
            },
        );
        run(&engine, Collector::new(&tokens(2), true))
            .outcome
            .unwrap();
        engine.stop_actor(stopped).unwrap();
        for _ in 0..2 {
            let text = error_text(&run(&engine, Collector::new(&tokens(2), true)));
            assert!(text.contains(&format!("{stopped} is stopped")), "{text}");
        }
        let counted = engine.counters().unwrap();
        assert!(counted.iter().all(|counters| counters.actor != stopped));
    }
    let engine = engine(&model, Setup::default());
    let error = engine.stop_actor(cold(0, 5)).unwrap_err().to_string();
    assert!(
        error.contains("there is no ColdLayer 0 on node 5"),
        "{error}"
    );
}

#[test]
fn a_late_node_is_named_and_the_engine_goes_on_once_it_answers() {
    let model = model();
    let fault = Fault {
        actor: cold(1, 1),
        after_messages: 3,
        place: FaultPlace::Delay(Duration::from_millis(1500)),
        once: true,
    };
    let setup = Setup {
        n_nodes: 2,
        faults: Faults::new([fault]),
        wait_limit: Duration::from_millis(500),
        ..Setup::default()
    };
    let engine = engine(&model, setup);
    let text = error_text(&run(&engine, Collector::new(&tokens(5), true)));
    assert!(
        text.contains("no answer within 0.5 s from ColdLayer 1 on node 1"),
        "{text}"
    );
    // a run that finds the node still at work waits for it to be quiet, and touches nothing
    let second = run(&engine, Collector::new(&tokens(5), true));
    if second.outcome.is_err() {
        let text = error_text(&second);
        assert!(text.contains(", node 1:"), "{text}");
    }
    // at last one succeeds
    let want = {
        let engine = crate::engine(
            &model,
            Setup {
                n_nodes: 2,
                ..Setup::default()
            },
        );
        run(&engine, Collector::new(&tokens(5), true)).feeder.bits()
    };
    let last = (0..10)
        .map(|_| run(&engine, Collector::new(&tokens(5), true)))
        .find(|run| run.outcome.is_ok())
        .expect("the engine goes on");
    assert!(last.feeder.bits() == want);
}

/// A feeder that panics.
struct Panics;

impl Feeder for Panics {
    fn next(&mut self) -> Next<'_> {
        Next::Feed(Feed {
            tokens: &[1],
            position: 0,
            logits: LogitsWanted::Last,
        })
    }

    fn logits(&mut self, _: usize, _: &[f32]) {
        panic!("cannot bear these logits");
    }
}

#[test]
fn a_panic_of_the_feeder_ends_its_run_only() {
    let model = model();
    let engine = engine(&model, Setup::default());
    let outcome = engine.run(Panics).unwrap().outcome;
    let text = outcome.unwrap_err().to_string();
    assert!(text.contains("cannot bear these logits"), "{text}");
    run(&engine, Collector::new(&tokens(2), true))
        .outcome
        .unwrap();
    assert!(
        engine
            .counters()
            .unwrap()
            .iter()
            .all(|counters| counters.restarts == 0)
    );
}
