//! What actors count, each for itself.

use std::ops::{Add, AddAssign, Sub};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::messages::ActorId;
use crate::replan::Replans;

/// Work that has been done: by one actor, or by all of them in some steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Messages handled.
    pub messages: u64,
    /// Neurons that had to be decided on, counted once per token.
    pub neurons: u64,
    /// Neurons among them whose gate was computed: all but where a predictor picks candidates.
    pub candidates: u64,
    /// Neurons among them whose up and down rows were computed: those with an open gate in
    /// `exact`, and in `off` those that had one.
    pub active_neurons: u64,
    /// Bytes of weights read; a batch of tokens reads a matrix once.
    pub weight_bytes: u64,
    /// Bytes of cached keys and values read.
    pub kv_bytes: u64,
    /// Those bytes, of both kinds, that GPUs read.
    pub gpu_bytes: u64,
}

impl Counters {
    /// Share of neurons that were active; none where no neuron was computed.
    pub fn active_share(&self) -> Option<f64> {
        (self.neurons > 0).then(|| self.active_neurons as f64 / self.neurons as f64)
    }

    /// Share of neurons whose gate was computed; none where no neuron was decided on.
    pub fn candidate_share(&self) -> Option<f64> {
        (self.neurons > 0).then(|| self.candidates as f64 / self.neurons as f64)
    }
}

impl Add for Counters {
    type Output = Counters;

    fn add(self, other: Counters) -> Counters {
        Counters {
            messages: self.messages + other.messages,
            neurons: self.neurons + other.neurons,
            candidates: self.candidates + other.candidates,
            active_neurons: self.active_neurons + other.active_neurons,
            weight_bytes: self.weight_bytes + other.weight_bytes,
            kv_bytes: self.kv_bytes + other.kv_bytes,
            gpu_bytes: self.gpu_bytes + other.gpu_bytes,
        }
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Counters) {
        *self = *self + other;
    }
}

impl Sub for Counters {
    type Output = Counters;

    fn sub(self, other: Counters) -> Counters {
        Counters {
            messages: self.messages - other.messages,
            neurons: self.neurons - other.neurons,
            candidates: self.candidates - other.candidates,
            active_neurons: self.active_neurons - other.active_neurons,
            weight_bytes: self.weight_bytes - other.weight_bytes,
            kv_bytes: self.kv_bytes - other.kv_bytes,
            gpu_bytes: self.gpu_bytes - other.gpu_bytes,
        }
    }
}

/// One actor's counters since the engine started, restarts included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, kameo::Reply)]
pub struct ActorCounters {
    /// Whose.
    pub actor: ActorId,
    /// How often it was restarted.
    pub restarts: u32,
    /// What it did.
    pub counters: Counters,
}

/// An actor's counters where its executor counts and its control plane reads. They outlive the
/// actor's incarnations.
#[derive(Debug, Default)]
pub(crate) struct Cell {
    starts: AtomicU32,
    messages: AtomicU64,
    neurons: AtomicU64,
    candidates: AtomicU64,
    active_neurons: AtomicU64,
    weight_bytes: AtomicU64,
    kv_bytes: AtomicU64,
    gpu_bytes: AtomicU64,
}

impl Cell {
    /// Counts work. Only the actor's executor does, so no addition is lost.
    pub fn add(&self, work: Counters) {
        for (counter, more) in [
            (&self.messages, work.messages),
            (&self.neurons, work.neurons),
            (&self.candidates, work.candidates),
            (&self.active_neurons, work.active_neurons),
            (&self.weight_bytes, work.weight_bytes),
            (&self.kv_bytes, work.kv_bytes),
            (&self.gpu_bytes, work.gpu_bytes),
        ] {
            counter.store(counter.load(Ordering::Relaxed) + more, Ordering::Relaxed);
        }
    }

    /// Counts a start; returns how many there were before.
    pub fn count_start(&self) -> u32 {
        self.starts.fetch_add(1, Ordering::Relaxed)
    }

    /// Messages handled so far.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Relaxed)
    }

    /// All counters.
    pub fn read(&self, actor: ActorId) -> ActorCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = Counters {
            messages: get(&self.messages),
            neurons: get(&self.neurons),
            candidates: get(&self.candidates),
            active_neurons: get(&self.active_neurons),
            weight_bytes: get(&self.weight_bytes),
            kv_bytes: get(&self.kv_bytes),
            gpu_bytes: get(&self.gpu_bytes),
        };
        let restarts = self.starts.load(Ordering::Relaxed).saturating_sub(1);
        ActorCounters {
            actor,
            restarts,
            counters,
        }
    }
}

/// What a run of the pipeline did, failed attempts at a step not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunTotals {
    /// Tokens of feeds of several tokens, and of a run's first feed.
    pub prefill_tokens: usize,
    /// Their work.
    pub prefill: Counters,
    /// Tokens fed one by one after that.
    pub decode_tokens: usize,
    /// Their work.
    pub decode: Counters,
    /// Neurons that changed between GPU and host.
    pub replans: Replans,
}
