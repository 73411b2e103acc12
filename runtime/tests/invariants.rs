//! Bits that must not depend on what else the machine does, on how the model is divided, or on the mode
//! (ARCHITECTURE.md, "Invariants", 1).

mod common;

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use common::demo_model;
use common::engine::{Forced, Greedy, Setup, hash_logits};
use pi_actors::Engine;
use pi_kernels::Tier;
use pi_runtime::model::Sparsity;
use xxhash_rust::xxh3::Xxh3;

/// `The capital of France is`
const FRANCE: [u32; 5] = [504, 3575, 282, 4649, 314];
/// ` Paris`
const PARIS: u32 = 7042;

/// Works on as many threads as given until it is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Load {
    fn start(n_threads: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let work = |stop: Arc<AtomicBool>| {
            let mut sum = 0u64;
            while !stop.load(Ordering::Relaxed) {
                for i in 0..1000u64 {
                    sum = black_box(sum.wrapping_mul(31) + i);
                }
            }
        };
        let threads = (0..n_threads).map(|_| {
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || work(stop))
        });
        Self {
            threads: threads.collect(),
            stop,
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().unwrap();
        }
    }
}

/// 1 (a), with engines started anew every ten runs.
#[test]
fn a_hundred_runs_beside_two_busy_threads_give_the_same_bits() {
    let quiet = Greedy::run(&Setup::q8().start(&demo_model()), &FRANCE, 2);
    assert_eq!(quiet.0[0], PARIS);
    for _ in 0..10 {
        let engine = Setup::q8().start(&demo_model());
        // not while other tests have their turn
        let _load = Load::start(2);
        for _ in 0..10 {
            assert_eq!(Greedy::run(&engine, &FRANCE, 2), quiet);
        }
    }
}

/// Tokens of some text: part of the model's vocabulary, in no order.
fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|i| i * 2_654_435 % 49_152).collect()
}

/// Hash of the logits of all positions of 21 tokens fed together, and of three more fed one by one.
fn hash(engine: &Engine) -> u64 {
    let hash = Arc::new(Mutex::new(Xxh3::new()));
    let noted = Arc::clone(&hash);
    let look = move |_: usize, _: usize, logits: &[f32]| {
        hash_logits(&mut noted.lock().unwrap(), logits);
    };
    Forced::new(vec![(tokens(21), 0)], look).run(engine);
    let (chosen, decoded) = Greedy::run(engine, &tokens(21), 4);
    assert_eq!(chosen.len(), 4);
    let mut hash = hash.lock().unwrap();
    hash.update(&decoded.to_le_bytes());
    hash.digest()
}

/// 1 (b): the same model, divided and fed in many ways.
fn assert_same_bits(setup: &Setup, threads: &[&[usize]], pieces: &[usize]) {
    let run = |sparsity, threads: &[usize], n_ubatch| {
        let (sparsity, threads) = (Some(sparsity), threads.to_vec());
        let setup = Setup {
            sparsity,
            threads,
            n_ubatch,
            n_ctx: 64,
            ..setup.clone()
        };
        hash(&setup.start(&demo_model()))
    };
    let expected = run(Sparsity::Off, &[1], 512);
    for sparsity in [Sparsity::Off, Sparsity::Exact] {
        for threads in threads {
            for n_ubatch in pieces {
                assert_eq!(
                    run(sparsity, threads, *n_ubatch),
                    expected,
                    "{sparsity:?}, threads {threads:?}, pieces of {n_ubatch}"
                );
            }
        }
    }
}

#[test]
fn modes_threads_nodes_and_pieces_give_the_same_bits() {
    let equal_nodes: [&[usize]; 6] = [&[1], &[2], &[1, 1], &[2, 2], &[1; 4], &[2; 4]];
    assert_same_bits(&Setup::q8(), &equal_nodes, &[512, 7, 1]);
}

#[test]
fn nodes_of_different_size_give_the_same_bits() {
    assert_same_bits(&Setup::q8(), &[&[2, 1], &[1, 1, 1], &[1, 3, 2, 1]], &[512]);
}

#[test]
fn f32_activations_give_the_same_bits_too() {
    assert_same_bits(&Setup::f32(), &[&[2], &[1, 1], &[1; 4]], &[7]);
}

/// 1 (c), and more than it asks for: not only the likeliest token, but every bit of the logits is the same.
#[test]
fn every_instruction_set_gives_the_same_bits() {
    for setup in [Setup::f32(), Setup::q8()] {
        let run = |tier: Tier| {
            let setup = Setup {
                tier,
                ..setup.clone()
            };
            Greedy::run(&setup.start(&demo_model()), &FRANCE, 2)
        };
        let expected = run(Tier::detect());
        assert_eq!(expected.0[0], PARIS);
        for tier in Tier::available() {
            assert_eq!(run(tier), expected, "{} {tier}", setup.activations);
        }
    }
}
