//! What actors count, each for itself.

use std::ops::{Add, AddAssign, Sub};

use crate::messages::ActorId;

/// Work that has been done: by one actor, or by all of them in some steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Messages handled.
    pub messages: u64,
    /// Neurons whose gate was computed, counted once per token.
    pub neurons: u64,
    /// Neurons among them whose up and down rows were computed: those with an open gate in
    /// `exact`, and in `off` those that had one.
    pub active_neurons: u64,
    /// Bytes of weights read; a batch of tokens reads a matrix once.
    pub weight_bytes: u64,
    /// Bytes of cached keys and values read.
    pub kv_bytes: u64,
}

impl Counters {
    /// Share of neurons that were active; none where no neuron was computed.
    pub fn active_share(&self) -> Option<f64> {
        (self.neurons > 0).then(|| self.active_neurons as f64 / self.neurons as f64)
    }
}

impl Add for Counters {
    type Output = Counters;

    fn add(self, other: Counters) -> Counters {
        Counters {
            messages: self.messages + other.messages,
            neurons: self.neurons + other.neurons,
            active_neurons: self.active_neurons + other.active_neurons,
            weight_bytes: self.weight_bytes + other.weight_bytes,
            kv_bytes: self.kv_bytes + other.kv_bytes,
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
            active_neurons: self.active_neurons - other.active_neurons,
            weight_bytes: self.weight_bytes - other.weight_bytes,
            kv_bytes: self.kv_bytes - other.kv_bytes,
        }
    }
}

/// One actor's counters since the engine started, restarts included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ActorCounters {
    /// Whose.
    pub actor: ActorId,
    /// How often it was restarted.
    pub restarts: u32,
    /// What it did.
    pub counters: Counters,
}

/// What a run of the pipeline did, steps that failed and were repeated included.
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
}
