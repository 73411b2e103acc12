//! Answers without a model: what is fed, what ends them, and what comes out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use pi_actors::{Feeder, LogitsWanted, Next};
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::error::RuntimeError;
use crate::sampler::{Sampler, SamplerParams};
use crate::tokenizer::{Tokenizer, VocabData};

/// Token ids of the vocabulary below.
const A: u32 = 0;
const B: u32 = 1;
const END: u32 = 3;
const N_VOCAB: usize = 4;

fn tokenizer() -> Tokenizer {
    Tokenizer::new(&VocabData {
        model: "gpt2",
        pre: Some("gpt-2"),
        tokens: vec!["a", "b", "ab", "<|endoftext|>"],
        token_types: vec![1, 1, 1, 3],
        merges: vec!["a b"],
        eos: Some(END),
        ..VocabData::default()
    })
    .unwrap()
}

fn options(sink: TextSink) -> GenerationOptions {
    GenerationOptions {
        n_predict: None,
        n_ctx: 100,
        n_reused: 0,
        shift: None,
        stop_texts: vec![],
        hash_logits: true,
        sparse_head: false,
        interrupt: Arc::default(),
        sink,
    }
}

fn silent() -> TextSink {
    Box::new(|_| Ok(()))
}

fn generation(prompt: Vec<u32>, options: GenerationOptions) -> Generation {
    let sampler = Sampler::new(SamplerParams::greedy(), N_VOCAB).unwrap();
    Generation::new(prompt, sampler, &tokenizer(), options)
}

/// A feed: position, number of tokens, whether logits were wanted.
type Fed = (usize, usize, bool);

/// Serves a generation with logits that make it say `script`, over and over.
fn serve(mut generation: Generation, script: &[u32]) -> (Finished, Vec<Fed>) {
    let mut fed = Vec::new();
    let mut said = script.iter().cycle();
    while let Next::Feed(feed) = generation.next() {
        let (position, n_tokens) = (feed.position, feed.tokens.len());
        let wanted = feed.logits == LogitsWanted::Last;
        fed.push((position, n_tokens, wanted));
        if wanted {
            generation.logits(position + n_tokens - 1, &logits_of(*said.next().unwrap()));
        }
    }
    (generation.finish(), fed)
}

fn logits_of(token: u32) -> [f32; N_VOCAB] {
    std::array::from_fn(|id| if id as u32 == token { 1.0 } else { 0.0 })
}

#[test]
fn an_end_token_ends_the_answer_and_is_not_shown() {
    let heard = Arc::new(Mutex::new(String::new()));
    let ear = Arc::clone(&heard);
    let sink = Box::new(move |text: &str| {
        ear.lock().unwrap().push_str(text);
        Ok(())
    });
    let (finished, fed) = serve(generation(vec![A, B], options(sink)), &[A, B, END]);
    assert_eq!(finished.stop, Stop::EndOfText);
    assert_eq!(
        (finished.text.as_str(), &finished.tokens[..]),
        ("ab", &[A, B, END][..])
    );
    assert_eq!(*heard.lock().unwrap(), "ab");
    assert_eq!(fed, [(0, 2, true), (2, 1, true), (3, 1, true)]);
    assert_eq!(finished.fed, [A, B, A, B]);
    assert_eq!((finished.n_prompt, finished.n_decoded), (2, 2));
}

#[test]
fn the_limit_counts_generated_tokens() {
    let limited = |n_predict| GenerationOptions {
        n_predict: Some(n_predict),
        ..options(silent())
    };
    let (finished, fed) = serve(generation(vec![A], limited(3)), &[B]);
    assert_eq!(
        (finished.stop, finished.tokens.len(), fed.len()),
        (Stop::Limit, 3, 3)
    );
    let (finished, fed) = serve(generation(vec![A], limited(0)), &[B]);
    assert_eq!(
        (finished.stop, finished.tokens.len(), fed.len()),
        (Stop::Limit, 0, 0)
    );
    assert_eq!(finished.logits_hash, Some(xxh3_64(&[])));
}

#[test]
fn the_context_is_used_to_its_last_position() {
    let small = GenerationOptions {
        n_ctx: 5,
        ..options(silent())
    };
    let (finished, fed) = serve(generation(vec![A, A, A], small), &[B]);
    assert_eq!(finished.stop, Stop::ContextFull);
    // the last token needs no position, as nothing follows it
    assert_eq!(finished.tokens.len(), 3);
    assert_eq!(fed.last(), Some(&(4, 1, true)));
}

#[test]
fn a_full_context_goes_on_with_its_beginning_and_half_of_the_rest() {
    let shifting = GenerationOptions {
        n_ctx: 9,
        n_predict: Some(9),
        shift: Some(ContextShift { n_keep: 2 }),
        ..options(silent())
    };
    let (finished, fed) = serve(generation(vec![A, B, B, A], shifting), &[A, B]);
    assert_eq!(finished.stop, Stop::Limit);
    assert_eq!(finished.tokens, [A, B, A, B, A, B, A, B, A]);
    // full are: A B | B A A B A B A; of the seven behind the bar three go, and the sixth token of the answer comes
    let before = [
        (0, 4, true),
        (4, 1, true),
        (5, 1, true),
        (6, 1, true),
        (7, 1, true),
        (8, 1, true),
    ];
    assert_eq!(fed[..6], before);
    assert_eq!(fed[6..], [(2, 5, true), (7, 1, true), (8, 1, true)]);
    assert_eq!(finished.fed, [A, B, B, A, B, A, B, A, B]);
    assert_eq!((finished.n_prompt, finished.n_refed), (4, 4));
}

#[test]
fn a_context_of_nothing_but_what_stays_cannot_go_on() {
    let full = GenerationOptions {
        n_ctx: 3,
        shift: Some(ContextShift { n_keep: usize::MAX }),
        ..options(silent())
    };
    let (finished, _) = serve(generation(vec![A, A, A], full), &[B]);
    assert_eq!(
        (finished.stop, finished.tokens.len()),
        (Stop::ContextFull, 1)
    );
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_shown() {
    let stopping = |text: &str| GenerationOptions {
        stop_texts: vec![text.into()],
        n_predict: Some(5),
        ..options(silent())
    };
    let (finished, fed) = serve(generation(vec![A], stopping("bab")), &[A, B]);
    assert_eq!(
        (finished.stop, finished.text.as_str()),
        (Stop::StopText, "a")
    );
    assert_eq!((finished.tokens.len(), fed.len()), (4, 4));
    // held back until nothing follows it
    let (finished, _) = serve(generation(vec![A], stopping("abb")), &[A, B]);
    assert_eq!(
        (finished.stop, finished.text.as_str()),
        (Stop::Limit, "ababa")
    );
    let (finished, _) = serve(generation(vec![A], stopping("abb")), &[A, B, END]);
    assert_eq!(
        (finished.stop, finished.text.as_str()),
        (Stop::EndOfText, "ab")
    );
}

#[test]
fn an_interrupt_ends_the_answer_with_what_there_is() {
    let interrupt = Arc::new(AtomicBool::new(false));
    let pressed = Arc::clone(&interrupt);
    let mut n_heard = 0;
    let sink: TextSink = Box::new(move |_| {
        n_heard += 1;
        pressed.store(n_heard == 2, Ordering::Release);
        Ok(())
    });
    let interrupted = GenerationOptions {
        interrupt,
        ..options(sink)
    };
    let (finished, fed) = serve(generation(vec![A], interrupted), &[B]);
    assert_eq!(
        (finished.stop, finished.text.as_str()),
        (Stop::Interrupted, "bb")
    );
    assert_eq!((fed.len(), &finished.fed[..]), (2, &[A, B][..]));
}

#[test]
fn a_reader_that_went_away_ends_the_answer() {
    let sink: TextSink = Box::new(|_| Err(RuntimeError::OutputClosed));
    let (finished, fed) = serve(generation(vec![A], options(sink)), &[B]);
    assert!(matches!(finished.failure, Some(RuntimeError::OutputClosed)));
    assert_eq!(fed.len(), 1);
}

#[test]
fn what_the_cache_holds_is_not_fed_again() {
    let reused = GenerationOptions {
        n_reused: 3,
        ..options(silent())
    };
    let (finished, fed) = serve(generation(vec![A, B, A, B, B], reused), &[END]);
    assert_eq!(fed, [(3, 2, true)]);
    assert_eq!((finished.n_reused, finished.n_prompt), (3, 2));
    assert_eq!(finished.fed, [A, B, A, B, B]);
}

#[test]
fn long_prompts_come_in_steps_that_leave_no_single_token() {
    let long = |n: usize| {
        let options = GenerationOptions {
            n_ctx: 2000,
            ..options(silent())
        };
        serve(generation(vec![A; n], options), &[END]).1
    };
    assert_eq!(long(512), [(0, 512, true)]);
    assert_eq!(long(513), [(0, 511, false), (511, 2, true)]);
    assert_eq!(
        long(1030),
        [(0, 512, false), (512, 512, false), (1024, 6, true)]
    );
}

#[test]
fn the_hash_covers_the_bytes_of_all_logits() {
    let (finished, _) = serve(generation(vec![A], options(silent())), &[B, END]);
    let bytes: Vec<u8> = [logits_of(B), logits_of(END)]
        .iter()
        .flatten()
        .flat_map(|logit| logit.to_le_bytes())
        .collect();
    assert_eq!(finished.logits_hash, Some(xxh3_64(&bytes)));
}
