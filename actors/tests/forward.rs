//! What the actors compute: equal to plain loops, and the same bits however the work is divided.

mod common;

use common::{Collector, Form, N_CTX, N_EMBD, PlainModel, Setup, engine, naive, run, tokens};
use pi_actors::LogitsWanted;
use pi_actors::weights::{GateActivation, SparsityMode};

const EXACT: Form = Form::Neurons(SparsityMode::Exact);
const OFF: Form = Form::Neurons(SparsityMode::Off);

#[test]
fn logits_and_active_neurons_are_those_of_plain_loops() {
    let tokens = tokens(40);
    for (activation, forms) in [
        (GateActivation::Relu, vec![EXACT, OFF, Form::Dense]),
        (GateActivation::Silu, vec![OFF, Form::Dense]),
        (GateActivation::Gelu, vec![OFF, Form::Dense]),
    ] {
        let model = PlainModel::random(5, activation);
        let (want, active) = naive::logits(&model, &tokens);
        for form in forms {
            for one_by_one in [true, false] {
                let engine = engine(
                    &model,
                    Setup {
                        form,
                        ..Setup::default()
                    },
                );
                let run = run(&engine, Collector::new(&tokens, one_by_one));
                run.outcome.unwrap();
                let total = run.totals.prefill + run.totals.decode;
                assert_eq!(total.active_neurons, active as u64, "{form:?}");
                assert_eq!(run.feeder.logits.len(), tokens.len());
                for (position, logits) in &run.feeder.logits {
                    for (got, want) in logits.iter().zip(&want[*position]) {
                        let close = (f64::from(*got) - want).abs() < 2e-4;
                        assert!(close, "{form:?}, position {position}: {got} is not {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn embeddings_are_scaled() {
    let tokens = tokens(20);
    let model = PlainModel {
        embedding_scale: (N_EMBD as f32).sqrt(),
        ..PlainModel::random(10, GateActivation::Gelu)
    };
    let (want, _) = naive::logits(&model, &tokens);
    let off = Setup {
        form: OFF,
        ..Setup::default()
    };
    let run = run(&engine(&model, off), Collector::new(&tokens, false));
    run.outcome.unwrap();
    for (position, logits) in &run.feeder.logits {
        for (got, want) in logits.iter().zip(&want[*position]) {
            let close = (f64::from(*got) - want).abs() < 2e-4;
            assert!(close, "position {position}: {got} is not {want}");
        }
    }
}

#[test]
fn bits_do_not_depend_on_nodes_threads_mode_or_batch() {
    let model = PlainModel::random(6, GateActivation::Relu);
    let tokens = tokens(300);
    let reference = run(
        &engine(&model, Setup::default()),
        Collector::new(&tokens, true),
    );
    let want = reference.feeder.bits();
    for (n_nodes, n_threads) in [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (4, 1)] {
        for form in [EXACT, OFF] {
            for n_ubatch in [7, 64] {
                let setup = Setup {
                    n_nodes,
                    n_threads,
                    form,
                    n_ubatch,
                    ..Setup::default()
                };
                let engine = engine(&model, setup);
                let pieces = vec![1, 100, 1, 1, 97, 100];
                let run = run(&engine, Collector::in_pieces(&tokens, pieces));
                run.outcome.unwrap();
                let same = run.feeder.bits() == want;
                assert!(
                    same,
                    "{n_nodes} × {n_threads}, {form:?}, batches of {n_ubatch}"
                );
            }
        }
    }
}

#[test]
fn a_plain_down_gives_the_same_bits_for_any_number_of_threads() {
    let model = PlainModel::random(7, GateActivation::Silu);
    let tokens = tokens(30);
    let bits = |n_threads, one_by_one| {
        let setup = Setup {
            n_threads,
            form: Form::Dense,
            ..Setup::default()
        };
        run(&engine(&model, setup), Collector::new(&tokens, one_by_one))
            .feeder
            .bits()
    };
    assert_eq!(bits(1, true), bits(3, true));
    assert_eq!(bits(1, true), bits(2, false));
}

#[test]
fn many_positions_cross_chunks_of_the_cache() {
    let model = PlainModel::random(8, GateActivation::Relu);
    let tokens = tokens(N_CTX);
    let one = run(
        &engine(&model, Setup::default()),
        Collector::new(&tokens, true),
    );
    // three threads and two heads: a head's chunks are on several threads
    let three = Setup {
        n_threads: 3,
        ..Setup::default()
    };
    let three = run(&engine(&model, three), Collector::new(&tokens, true));
    assert!(three.feeder.bits() == one.feeder.bits());
    let many = run(
        &engine(
            &model,
            Setup {
                n_nodes: 2,
                ..Setup::default()
            },
        ),
        Collector::new(&tokens, false),
    );
    assert!(one.feeder.bits() == many.feeder.bits());
    let (want, _) = naive::logits(&model, &tokens);
    let (position, logits) = one.feeder.logits.last().unwrap();
    for (got, want) in logits.iter().zip(&want[*position]) {
        assert!((f64::from(*got) - want).abs() < 2e-4, "{got} is not {want}");
    }
}

#[test]
fn a_window_hides_what_lies_before_however_tokens_are_fed_and_divided() {
    let tokens = tokens(600);
    for window in [1, 90, 256, 300] {
        let model = PlainModel {
            window: Some(window),
            ..PlainModel::random(8, GateActivation::Relu)
        };
        let (want, _) = naive::logits(&model, &tokens);
        let decode = run(
            &engine(&model, Setup::default()),
            Collector::new(&tokens, true),
        );
        for (position, logits) in &decode.feeder.logits {
            for (got, want) in logits.iter().zip(&want[*position]) {
                let close = (f64::from(*got) - want).abs() < 2e-4;
                assert!(close, "window {window}, {position}: {got} is not {want}");
            }
        }
        for (n_nodes, n_threads, n_ubatch) in [(1, 3, 64), (2, 1, 7), (2, 2, 64), (4, 1, 50)] {
            let setup = Setup {
                n_nodes,
                n_threads,
                n_ubatch,
                ..Setup::default()
            };
            let pieces = vec![1, 250, 1, 1, 97, 250];
            let run = run(
                &engine(&model, setup),
                Collector::in_pieces(&tokens, pieces),
            );
            run.outcome.unwrap();
            let same = run.feeder.bits() == decode.feeder.bits();
            assert!(same, "window {window}, {n_nodes} × {n_threads}, {n_ubatch}");
        }
    }
}

#[test]
fn a_window_bounds_what_is_read_of_the_cache() {
    let n_tokens = 500;
    let read = |window| {
        let model = PlainModel {
            window,
            ..PlainModel::random(8, GateActivation::Relu)
        };
        let run = run(
            &engine(&model, Setup::default()),
            Collector::new(&tokens(n_tokens), true),
        );
        (run.totals.prefill + run.totals.decode).kv_bytes
    };
    let positions = |window: usize| (1..=n_tokens).map(|n| n.min(window) as u64).sum::<u64>();
    let whole = read(None);
    assert!(whole > 0);
    for window in [1, 90, 500] {
        let expected = whole / positions(n_tokens) * positions(window);
        assert_eq!(read(Some(window)), expected, "window {window}");
    }
}

#[test]
fn going_back_forgets_what_lay_behind() {
    let model = PlainModel::random(9, GateActivation::Relu);
    let engine = engine(&model, Setup::default());
    let tokens = tokens(20);
    let first = run(&engine, Collector::new(&tokens, true));
    let mut other = tokens.clone();
    other[10..].reverse();
    run(&engine, Collector::new(&other, false)).outcome.unwrap();
    let mut again = Collector::in_pieces(&tokens, vec![10]);
    again.position = 10;
    let again = run(&engine, again);
    again.outcome.unwrap();
    assert_eq!(again.feeder.logits[..], first.feeder.logits[10..]);
}

#[test]
fn only_the_logits_that_are_wanted_are_given() {
    let model = PlainModel::random(9, GateActivation::Relu);
    let engine = engine(
        &model,
        Setup {
            n_ubatch: 8,
            ..Setup::default()
        },
    );
    let tokens = tokens(30);
    for (wanted, positions) in [
        (LogitsWanted::None, vec![]),
        (LogitsWanted::Last, vec![29]),
        (LogitsWanted::From(6), (6..30).collect()),
    ] {
        let collector = Collector {
            wanted,
            ..Collector::new(&tokens, false)
        };
        let run = run(&engine, collector);
        let got: Vec<usize> = run
            .feeder
            .logits
            .iter()
            .map(|(position, _)| *position)
            .collect();
        assert_eq!(got, positions, "{wanted:?}");
    }
}

#[test]
fn impossible_feeds_end_the_run_with_the_reason_and_the_engine_goes_on() {
    let model = PlainModel::random(9, GateActivation::Relu);
    let engine = engine(&model, Setup::default());
    let cases: Vec<(Vec<u32>, Vec<usize>, usize, &str)> = vec![
        (
            vec![1; N_CTX + 1],
            vec![N_CTX + 1],
            0,
            "context of 700 tokens is full",
        ),
        (
            vec![1; 10],
            vec![4],
            6,
            "starts at position 6, but the cache ends at 0",
        ),
        (
            vec![5000],
            vec![1],
            0,
            "token 5000 is not in the model's vocabulary of 112",
        ),
        (vec![1], vec![0], 0, "a feed has no tokens"),
    ];
    for (tokens, pieces, position, words) in cases {
        let mut collector = Collector::in_pieces(&tokens, pieces);
        collector.position = position;
        let run = run(&engine, collector);
        let text = common::error_text(&run);
        assert!(text.contains(words), "{text}");
    }
    run(&engine, Collector::new(&tokens(3), true))
        .outcome
        .unwrap();
}
