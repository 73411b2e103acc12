//! A context that is full goes on as a fresh prompt of what is left would, bit by bit.

mod common;

use common::demo_model;
use common::engine::Setup;
use common::running::{TEXT, tiny};
use pi_actors::{Engine, Feeder, Next};
use pi_runtime::gguf::GgufFile;
use pi_runtime::sampler::{LogitBias, Sampler, SamplerParams};
use pi_runtime::session::{ContextShift, Generation, GenerationOptions, Stop, hash_floats};
use pi_runtime::tokenizer::{EncodeOptions, Tokenizer};
use xxhash_rust::xxh3::Xxh3;

/// A generation, and the hash of each token's logits.
struct Watched {
    generation: Generation,
    hashes: Vec<u64>,
}

impl Feeder for Watched {
    fn next(&mut self) -> Next<'_> {
        self.generation.next()
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        let mut hash = Xxh3::new();
        hash_floats(&mut hash, logits);
        self.hashes.push(hash.digest());
        self.generation.logits(position, logits);
    }
}

#[expect(clippy::result_large_err, reason = "the sink's type is the library's")]
/// Tokens and logit hashes of a likeliest continuation by `n_predict` tokens.
fn answer(
    engine: &Engine,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    n_predict: usize,
    shift: Option<ContextShift>,
) -> (Vec<u32>, Vec<u64>) {
    let n_vocab = tokenizer.n_vocab();
    let never = |id: &u32| LogitBias {
        id: *id,
        bias: f32::NEG_INFINITY,
    };
    let params = SamplerParams {
        logit_bias: tokenizer.vocabulary().end_ids().iter().map(never).collect(),
        ..SamplerParams::greedy()
    };
    let sampler = Sampler::new(params, n_vocab).unwrap();
    let options = GenerationOptions {
        n_predict: Some(n_predict),
        n_ctx: engine.shape().n_ctx,
        n_reused: 0,
        shift,
        stop_texts: vec![],
        hash_logits: false,
        sparse_head: false,
        interrupt: Default::default(),
        sink: Box::new(|_| Ok(())),
    };
    let run = engine
        .run(Watched {
            generation: Generation::new(prompt.to_vec(), sampler, tokenizer, options),
            hashes: vec![],
        })
        .unwrap();
    run.outcome.unwrap();
    let Watched { generation, hashes } = run.feeder;
    let finished = generation.finish();
    assert_eq!(finished.stop, Stop::Limit);
    (finished.tokens, hashes)
}

#[test]
fn the_continuation_is_that_of_a_fresh_prompt_of_what_is_left() {
    let n_ctx = 48;
    let folder = tiny();
    for (path, keeps) in [
        (folder.path("m.gguf"), &[0, 5, 15][..]),
        (demo_model(), &[1]),
    ] {
        let file = GgufFile::open(&path).unwrap();
        let tokenizer = Tokenizer::from_metadata(file.metadata()).unwrap();
        let engine = Setup {
            n_ctx,
            ..Setup::q8()
        }
        .start(&path);
        let mut prompt = tokenizer.encode(TEXT, EncodeOptions::PROMPT).unwrap();
        assert!(prompt.len() >= 15);
        prompt.truncate(15);
        for &n_keep in keeps {
            let shift = Some(ContextShift { n_keep });
            // the token that comes when all positions are used is the first that needs room
            let n_before = n_ctx - prompt.len() + 1;
            let n_after = 12;
            let (tokens, hashes) = answer(&engine, &tokenizer, &prompt, n_before + n_after, shift);
            let full = [&prompt[..], &tokens[..n_before - 1]].concat();
            assert_eq!(full.len(), n_ctx);
            let n_discarded = (n_ctx - n_keep) / 2;
            let left = [
                &full[..n_keep],
                &full[n_keep + n_discarded..],
                &tokens[n_before - 1..n_before],
            ]
            .concat();
            let (fresh_tokens, fresh_hashes) = answer(&engine, &tokenizer, &left, n_after, None);
            assert_eq!(tokens[n_before..], fresh_tokens, "keep {n_keep}");
            assert_eq!(hashes[n_before..], fresh_hashes, "keep {n_keep}");
        }
    }
}
