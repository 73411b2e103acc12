//! One answer, token by token: feeds the prompt, then what it samples, until something stops it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pi_actors::{Candidates, Feed, Feeder, HeadWanted, LogitsWanted, Next};
use xxhash_rust::xxh3::Xxh3;

use super::stop_texts::StopTexts;
use crate::error::RuntimeError;
use crate::sampler::Sampler;
use crate::tokenizer::{TokenStream, Tokenizer, Vocabulary};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The model's end-of-text or end-of-turn token.
    EndOfText,
    /// As many tokens as were asked for.
    Limit,
    /// A text that was to end it.
    StopText,
    /// No room for another token.
    ContextFull,
    /// Ctrl-C.
    Interrupted,
}

impl Stop {
    /// The name in `--json`.
    pub fn name(self) -> &'static str {
        match self {
            Stop::EndOfText => "eos",
            Stop::Limit => "limit",
            Stop::StopText => "word",
            Stop::ContextFull => "context",
            Stop::Interrupted => "interrupted",
        }
    }
}

/// Takes an answer's text as it grows.
pub type TextSink = Box<dyn FnMut(&str) -> Result<(), RuntimeError> + Send>;

/// What an answer is made with.
pub struct GenerationOptions {
    /// Tokens at most; none: until something else stops it.
    pub n_predict: Option<usize>,
    /// Positions of the context.
    pub n_ctx: usize,
    /// Tokens at the prompt's beginning that the cache holds already; fewer than the prompt has.
    pub n_reused: usize,
    /// What to do when the context is full; none: the answer ends.
    pub shift: Option<ContextShift>,
    /// Texts that end the answer where it comes to them; none of them is empty.
    pub stop_texts: Vec<String>,
    /// Whether to hash all logits.
    pub hash_logits: bool,
    /// Whether a sketch of the head picks whose logits are computed.
    pub sparse_head: bool,
    /// Set by Ctrl-C.
    pub interrupt: Arc<AtomicBool>,
    /// Where the text goes.
    pub sink: TextSink,
}

/// Going on in a full context: some tokens at its beginning stay, and half of the others go.
///
/// What stays behind the gap is fed again at its new positions, and nothing in the cache is rotated: the result is, bit
/// by bit, that of a fresh prompt of the tokens that are left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextShift {
    /// Tokens of the prompt that always stay, from its beginning; at most all of them.
    pub n_keep: usize,
}

/// An answer on its way.
pub struct Generation {
    /// Tokens in the context by position: the prompt, then the answer; after a shift what is left of them.
    context: Vec<u32>,
    /// Tokens of the context that are in the cache or given out.
    n_given: usize,
    /// Tokens of the prompt that have been given out.
    n_prompt: usize,
    /// Tokens that were fed again because the context was full.
    n_refed: usize,
    sampler: Sampler,
    vocabulary: Arc<Vocabulary>,
    stream: TokenStream,
    stop_texts: StopTexts,
    options: GenerationOptions,
    hash: Option<Box<Xxh3>>,
    clock: Clock,
    text: String,
    tokens: Vec<u32>,
    stop: Option<Stop>,
    failure: Option<RuntimeError>,
}

/// When what happened.
#[derive(Debug, Clone, Copy, Default)]
struct Clock {
    start: Option<Instant>,
    first_logits: Option<Instant>,
    last_logits: Option<Instant>,
    n_logits: usize,
}

impl Clock {
    fn logits_came(&mut self) {
        let now = Instant::now();
        self.first_logits.get_or_insert(now);
        self.last_logits = Some(now);
        self.n_logits += 1;
    }
}

/// Most tokens of a prompt fed in one step, so that Ctrl-C is noticed in between.
const PROMPT_STEP: usize = 512;

impl Generation {
    /// An answer to `prompt`, which must not be empty and must fit into the context.
    pub fn new(
        prompt: Vec<u32>,
        sampler: Sampler,
        tokenizer: &Tokenizer,
        mut options: GenerationOptions,
    ) -> Self {
        if let Some(shift) = &mut options.shift {
            shift.n_keep = shift.n_keep.min(prompt.len());
        }
        assert!(
            options.n_reused < prompt.len() && prompt.len() <= options.n_ctx,
            "a prompt of {} tokens with {} reused in a context of {}",
            prompt.len(),
            options.n_reused,
            options.n_ctx
        );
        let mut generation = Self {
            n_given: options.n_reused,
            n_prompt: 0,
            n_refed: 0,
            sampler,
            vocabulary: Arc::clone(tokenizer.vocabulary()),
            stream: tokenizer.stream(),
            stop_texts: StopTexts::new(std::mem::take(&mut options.stop_texts)),
            hash: options.hash_logits.then(|| Box::new(Xxh3::new())),
            clock: Clock::default(),
            text: String::new(),
            tokens: Vec::with_capacity(options.n_predict.unwrap_or(0).min(options.n_ctx) + 1),
            stop: (options.n_predict == Some(0)).then_some(Stop::Limit),
            failure: None,
            context: prompt,
            options,
        };
        for id in &generation.context {
            generation.sampler.accept(*id);
        }
        generation
    }

    /// Whether there is nothing more to compute.
    pub fn is_done(&self) -> bool {
        self.stop.is_some() || self.failure.is_some()
    }

    /// How many tokens of the context come next: never one of several alone at its end, which would count as decoded.
    fn next_step(&self) -> usize {
        let left = self.context.len() - self.n_given;
        if left == PROMPT_STEP + 1 {
            PROMPT_STEP - 1
        } else {
            left.min(PROMPT_STEP)
        }
    }

    /// Takes all logits, or those of `ids`.
    fn take_logits(&mut self, ids: Option<&[u32]>, logits: &[f32]) {
        if let Some(hash) = &mut self.hash {
            for id in ids.into_iter().flatten() {
                hash.update(&id.to_le_bytes());
            }
            hash_floats(hash, logits);
        }
        if self.options.interrupt.load(Ordering::Acquire) {
            self.stop = Some(Stop::Interrupted);
            return;
        }
        let id = match ids {
            None => self.sampler.sample(logits),
            Some(ids) => self.sampler.sample_candidates(ids, logits),
        };
        self.sampler.accept(id);
        self.tokens.push(id);
        if self.vocabulary.is_end(id) {
            self.stop = Some(Stop::EndOfText);
            return;
        }
        if self.options.n_predict == Some(self.tokens.len()) {
            self.stop = Some(Stop::Limit);
        } else if !self.make_room() {
            self.stop = Some(Stop::ContextFull);
        } else {
            self.context.push(id);
        }
        if let Some(text) = self.stream.push(id) {
            let decided = self.stop_texts.push(text);
            if decided.stopped {
                self.stop = Some(Stop::StopText);
            }
            self.give_out(&decided.text);
        }
    }

    /// Sees to it that the context has a position for another token; the answer is whether it has.
    fn make_room(&mut self) -> bool {
        let n_used = self.context.len();
        if n_used < self.options.n_ctx {
            return true;
        }
        let Some(ContextShift { n_keep }) = self.options.shift else {
            return false;
        };
        let n_discarded = n_used.saturating_sub(n_keep) / 2;
        if n_discarded == 0 {
            return false;
        }
        self.context.drain(n_keep..n_keep + n_discarded);
        self.n_given = n_keep;
        self.n_refed += self.context.len() - n_keep;
        true
    }

    fn give_out(&mut self, text: &str) {
        if !text.is_empty() && self.failure.is_none() {
            self.text.push_str(text);
            self.failure = (self.options.sink)(text).err();
        }
    }

    /// Ends the answer: gives out what is left of its text.
    pub fn finish(mut self) -> Finished {
        if self.stop != Some(Stop::StopText) {
            let mut rest = match self.stream.flush() {
                Some(text) => self.stop_texts.push(text).text,
                None => String::new(),
            };
            rest.push_str(&self.stop_texts.flush());
            self.give_out(&rest);
        }
        let between = |from: Option<Instant>, to: Option<Instant>| {
            from.zip(to)
                .map_or(Duration::ZERO, |(from, to)| to.duration_since(from))
        };
        Finished {
            fed: self.context[..self.n_given].to_vec(),
            n_prompt: self.n_prompt,
            n_refed: self.n_refed,
            n_reused: self.options.n_reused,
            prompt: between(self.clock.start, self.clock.first_logits),
            first_logits: self.clock.first_logits,
            n_decoded: self.clock.n_logits.saturating_sub(1),
            decode: between(self.clock.first_logits, self.clock.last_logits),
            logits_hash: self.hash.map(|hash| hash.digest()),
            stop: self.stop.unwrap_or(Stop::Interrupted),
            text: self.text,
            tokens: self.tokens,
            failure: self.failure,
        }
    }
}

impl Feeder for Generation {
    fn next(&mut self) -> Next<'_> {
        self.clock.start.get_or_insert_with(Instant::now);
        if !self.is_done() && self.options.interrupt.load(Ordering::Acquire) {
            self.stop = Some(Stop::Interrupted);
        }
        if self.is_done() {
            return Next::Done;
        }
        let start = self.n_given;
        let n_tokens = self.next_step();
        self.n_given += n_tokens;
        if self.tokens.is_empty() {
            self.n_prompt += n_tokens;
        }
        Next::Feed(Feed {
            tokens: &self.context[start..self.n_given],
            position: start,
            logits: if self.n_given == self.context.len() {
                LogitsWanted::Last
            } else {
                LogitsWanted::None
            },
        })
    }

    fn logits(&mut self, _position: usize, logits: &[f32]) {
        self.clock.logits_came();
        self.take_logits(None, logits);
    }

    fn head(&self) -> HeadWanted<'_> {
        match self.options.sparse_head {
            true => HeadWanted::Sparse {
                biases: self.sampler.biases(),
            },
            false => HeadWanted::Full,
        }
    }

    fn candidates(&mut self, _position: usize, candidates: Candidates<'_>) {
        self.clock.logits_came();
        self.take_logits(Some(candidates.ids), candidates.logits);
    }
}

/// Adds the values' bytes, in little-endian order, to `hash`.
pub fn hash_floats(hash: &mut Xxh3, values: &[f32]) {
    let mut bytes = [0u8; 4096];
    for part in values.chunks(bytes.len() / 4) {
        for (value, place) in part.iter().zip(bytes.chunks_exact_mut(4)) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        hash.update(&bytes[..part.len() * 4]);
    }
}

/// An answer that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Its text.
    pub text: String,
    /// Its tokens, an end token included.
    pub tokens: Vec<u32>,
    /// What is in the key-value cache now: the prompt, and the tokens but the last.
    pub fed: Vec<u32>,
    /// xxh3 of the bytes of all logits that tokens were sampled from; with a sparse head each time behind their ids'.
    pub logits_hash: Option<u64>,
    /// Why it ended.
    pub stop: Stop,
    /// What failed while giving it out.
    pub failure: Option<RuntimeError>,
    /// Tokens of the prompt that were computed.
    pub n_prompt: usize,
    /// Tokens of the prompt that were in the cache already.
    pub n_reused: usize,
    /// Tokens that were computed again because the context was full.
    pub n_refed: usize,
    /// Time that the prompt took.
    pub prompt: Duration,
    /// When the first token's logits came.
    pub first_logits: Option<Instant>,
    /// Tokens computed after the prompt.
    pub n_decoded: usize,
    /// Time that these took.
    pub decode: Duration,
}
