//! What executors record: all that happened, in order, whatever failed meanwhile.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use common::{Collector, N_LAYER, PlainModel, Setup, engine, error_text, run, tokens};
use pi_actors::counters::RunTotals;
use pi_actors::faults::{Fault, FaultPlace, Faults};
use pi_actors::messages::ActorId;
use pi_actors::trace::{Event, Label, MessageKind, NodeEvents, Phase, TraceBounds};
use pi_actors::weights::GateActivation;

const N_TOKENS: usize = 12;

fn bounds() -> TraceBounds {
    TraceBounds {
        n_steps: 4 * N_TOKENS,
        node_bytes_max: 1 << 24,
    }
}

/// Runs some tokens, the first three in one piece, and reads what was recorded.
fn recorded(setup: Setup) -> (Vec<NodeEvents>, RunTotals) {
    let model = PlainModel::random(51, GateActivation::Relu);
    let engine = engine(&model, setup);
    let pieces = std::iter::once(3).chain([1; N_TOKENS - 3]).collect();
    let run = run(&engine, Collector::in_pieces(&tokens(N_TOKENS), pieces));
    assert_eq!(error_text(&run), "no error");
    let trace = Arc::clone(engine.trace().expect("it is traced"));
    // a node writes its last span when it has answered: it has when its thread has ended
    drop(engine);
    (trace.read(), run.totals)
}

/// Start, end and name of a thread's spans.
fn spans(events: &[Event]) -> Vec<(u64, u64, String)> {
    let span = |event: &Event| match *event {
        Event::Handled {
            label,
            start_t,
            end_t,
            ..
        } => Some((start_t, end_t, format!("{label:?}"))),
        Event::Step {
            step,
            start_t,
            end_t,
            ..
        } => Some((start_t, end_t, format!("step {step}"))),
        Event::Phase {
            phase,
            start_t,
            end_t,
            ..
        } => Some((start_t, end_t, phase.name().to_owned())),
        Event::Posted { .. } | Event::Gpu { .. } => None,
    };
    events.iter().filter_map(span).collect()
}

/// No two spans of a thread overlap in part.
fn assert_nested(events: &[Event]) {
    let mut spans = spans(events);
    spans.sort_by_key(|(start, end, _)| (*start, u64::MAX - end));
    let mut open: Vec<(u64, u64, String)> = vec![];
    for span in spans {
        assert!(span.0 <= span.1, "{span:?}");
        while open.last().is_some_and(|outer| outer.1 <= span.0) {
            open.pop();
        }
        if let Some(outer) = open.last() {
            assert!(span.1 <= outer.1, "{span:?} is not inside {outer:?}");
        }
        open.push(span);
    }
}

fn count(events: &[NodeEvents], what: impl Fn(&Event) -> Option<Label>) -> HashMap<Label, usize> {
    let mut counts = HashMap::new();
    for label in events.iter().flat_map(|node| &node.events).filter_map(what) {
        *counts.entry(label).or_default() += 1;
    }
    counts
}

fn posted(event: &Event) -> Option<Label> {
    match event {
        Event::Posted { label, .. } => Some(*label),
        _ => None,
    }
}

fn handled(event: &Event) -> Option<Label> {
    match event {
        Event::Handled { label, .. } => Some(*label),
        _ => None,
    }
}

#[test]
fn every_message_is_recorded_once_where_it_is_posted_and_once_where_it_is_handled() {
    for n_nodes in [1, 2] {
        let (nodes, totals) = recorded(Setup {
            n_nodes,
            trace: Some(bounds()),
            ..Setup::default()
        });
        assert_eq!(nodes.len(), n_nodes);
        let posts = count(&nodes, posted);
        // the three tokens of the first piece have one head
        let n_steps = N_TOKENS - 2;
        let per_step = N_LAYER * (3 * n_nodes * 2 + 2) + n_nodes * 2 + 2;
        assert_eq!(posts.len(), n_steps * per_step);
        assert!(posts.values().all(|n| *n == 1));
        assert_eq!(posts, count(&nodes, handled));
        let (mut neurons, mut active, mut steps) = (0, 0, vec![]);
        for node in &nodes {
            assert_eq!(node.lost, 0);
            assert_nested(&node.events);
            for event in &node.events {
                match *event {
                    Event::Posted {
                        label,
                        neurons: more,
                        active_neurons,
                        ..
                    } => {
                        assert_eq!(more > 0, label.kind == MessageKind::Partial);
                        neurons += u64::from(more);
                        active += u64::from(active_neurons);
                    }
                    Event::Step {
                        position,
                        n_tokens,
                        decode,
                        failed,
                        ..
                    } => steps.push((position, n_tokens, decode, failed)),
                    _ => {}
                }
            }
        }
        let want = (totals.prefill + totals.decode, totals.decode_tokens);
        assert_eq!((neurons, active), (want.0.neurons, want.0.active_neurons));
        let decoded = (3..N_TOKENS).map(|position| (position as u32, 1, true, false));
        let want: Vec<_> = std::iter::once((0, 3, false, false))
            .chain(decoded)
            .collect();
        assert_eq!(steps, want);
    }
}

#[test]
fn steps_follow_one_another_without_a_gap_and_hold_their_phases() {
    let (nodes, _) = recorded(Setup {
        trace: Some(bounds()),
        ..Setup::default()
    });
    let mut steps = vec![];
    let mut phases: HashMap<(Phase, u32), usize> = HashMap::new();
    for event in &nodes[0].events {
        match *event {
            Event::Step {
                step,
                start_t,
                end_t,
                ..
            } => steps.push((step, start_t, end_t)),
            Event::Phase { phase, step, .. } => *phases.entry((phase, step)).or_default() += 1,
            _ => {}
        }
    }
    assert!(
        steps.windows(2).all(|two| two[0].2 == two[1].1),
        "{steps:?}"
    );
    for (step, ..) in steps {
        for phase in [Phase::Start, Phase::Feed, Phase::Embed] {
            assert_eq!(phases[&(phase, step)], 1, "{phase:?} of step {step}");
        }
        assert!(phases[&(Phase::Sample, step)] >= 1, "step {step}");
    }
}

#[test]
fn a_step_that_is_given_up_ends_where_it_failed_and_is_repeated() {
    for (actor, place) in [
        (ActorId::Pipeline, FaultPlace::Handler),
        (ActorId::DeviceLayer { layer: 1 }, FaultPlace::Handler),
        (
            ActorId::ColdLayer { layer: 1, node: 0 },
            FaultPlace::Worker { thread: 1 },
        ),
        (
            ActorId::ColdLayer { layer: 2, node: 1 },
            FaultPlace::Handler,
        ),
    ] {
        let faults = Faults::new([Fault {
            actor,
            after_messages: 14,
            place,
            once: true,
        }]);
        let (nodes, _) = recorded(Setup {
            n_nodes: 2,
            faults: faults.clone(),
            trace: Some(bounds()),
            ..Setup::default()
        });
        assert!(faults.all_happened());
        let (mut steps, mut failed_handlers) = (vec![], 0);
        for node in &nodes {
            assert_nested(&node.events);
            for event in &node.events {
                match *event {
                    Event::Step {
                        position, failed, ..
                    } => steps.push((position, failed)),
                    Event::Handled { failed, .. } => failed_handlers += usize::from(failed),
                    _ => {}
                }
            }
        }
        assert_eq!(failed_handlers, 1, "{actor}");
        let failed: Vec<u32> = steps.iter().filter(|s| s.1).map(|s| s.0).collect();
        assert_eq!(failed.len(), 1, "{actor}: {steps:?}");
        let complete: Vec<u32> = steps.iter().filter(|s| !s.1).map(|s| s.0).collect();
        assert_eq!(complete.len(), N_TOKENS - 2);
        assert!(complete.contains(&failed[0]), "{actor}: {steps:?}");
        // nobody handles what was not posted
        let (posts, handles) = (count(&nodes, posted), count(&nodes, handled));
        assert!(handles.iter().all(|(label, n)| posts.get(label) == Some(n)));
    }
}

#[test]
fn a_full_ring_says_how_many_events_it_lost() {
    let all = recorded(Setup {
        trace: Some(bounds()),
        ..Setup::default()
    });
    let few = recorded(Setup {
        trace: Some(TraceBounds {
            node_bytes_max: 100 * 32 + 31,
            ..bounds()
        }),
        ..Setup::default()
    });
    let (all, few) = (&all.0[0], &few.0[0]);
    assert_eq!(few.events.len(), 100);
    assert_eq!(few.events.len() + few.lost as usize, all.events.len());
    assert_nested(&few.events);
}
