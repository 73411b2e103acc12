//! Re-planning: every so many tokens neurons that fired most lately become hot, in exchange for hot ones that fired less.
//!
//! Two neurons of a layer change places: sizes, shares, lists and graphs stay, and only the contents of rows change. Both sides
//! count which neurons fire (`counts` on the host, `gpu/hot_counts` on a GPU), token by token; `decision` says which are worth it; a
//! [`NeuronSource`] has their weights; `gpu/moving` puts these in place, between two tokens, when nobody reads them.

mod counts;
mod decision;
mod neuron_values;

use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;

use pi_topology::ArenaWriter;

pub(crate) use counts::ColdCounts;
pub(crate) use decision::{Wish, bounded, wishes};
pub use neuron_values::NeuronValues;

/// What is moved at a time at most, in bytes, of GPU and host together: so much is packed in some tens of milliseconds.
pub(crate) const MOVED_BYTES_MAX: usize = 64 << 20;

/// Two neurons of a layer that change places, by their places in the layer's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Swap {
    /// Of a hot one.
    pub hot: u32,
    /// Of a cold one.
    pub cold: u32,
}

/// Where something of a neuron goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// To this byte of the GPU's arena.
    Gpu {
        /// A multiple of 4.
        at: usize,
    },
    /// To this byte of a node's arena.
    Host {
        /// The node.
        node: usize,
        /// Counted from the arena's start.
        at: usize,
    },
    /// A node's value of a neuron for its sketch: 4 bytes, an f32.
    Sketch {
        /// The node.
        node: usize,
        /// Counted from the share's first one.
        neuron: usize,
        /// Which.
        value: SketchValue,
    },
}

/// Values of a [`crate::weights::SketchShare`], by neuron.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SketchValue {
    /// `bias`
    Bias,
    /// `floor`
    Floor,
    /// `two_bit_bias`
    TwoBitBias,
}

/// Who has all neurons' weights, and knows which neuron is where.
pub trait NeuronSource: fmt::Debug + Send + Sync {
    /// Bytes that a swap in a layer moves; none where its neurons stay where they are.
    fn swap_bytes(&self, layer: usize) -> Option<usize>;

    /// Lets neurons of a layer change places: calls `put` with everything that has to be where, on GPU and host. No two of the
    /// places overlap, and those of different layers do not either, so that layers may be asked for by several threads. Of the
    /// neurons of `swaps` none is there twice.
    fn swap(&self, layer: usize, swaps: &[Swap], put: &mut dyn FnMut(Place, &[u8]));
}

/// How a GPU's neurons are re-planned.
#[derive(Debug, Clone)]
pub struct Replan {
    /// After so many tokens, of those that go one by one.
    pub every: usize,
    /// Where weights come from.
    pub source: Arc<dyn NeuronSource>,
    /// What writes to each node's arena.
    pub host: Vec<ArenaWriter>,
}

/// What re-planning did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Replans {
    /// How often it looked.
    pub times: u64,
    /// Neurons that became hot; as many became cold.
    pub moved: u64,
    /// Bytes that were written for it, on GPU and host.
    pub bytes: u64,
    /// Time that it took, in nanoseconds.
    pub ns: u64,
    /// How often neurons fired between the times.
    pub fired: u64,
    /// How often of these they were hot.
    pub fired_hot: u64,
}

impl Replans {
    /// Share of the firings that were hot ones'; none before the first time.
    pub fn hot_share(&self) -> Option<f64> {
        (self.fired > 0).then(|| self.fired_hot as f64 / self.fired as f64)
    }
}

impl fmt::Display for Replans {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (times, moved) = (self.times, self.moved);
        let plural = if times == 1 { "" } else { "s" };
        let mib = self.bytes as f64 / f64::from(1 << 20);
        let ms = self.ns as f64 / 1e6;
        write!(
            f,
            "re-planned {times} time{plural}: {moved} neurons, {mib:.1} MiB, {ms:.1} ms"
        )?;
        match self.hot_share() {
            Some(share) => write!(f, ", {:.1} % of firings hot", share * 100.0),
            None => Ok(()),
        }
    }
}

impl AddAssign for Replans {
    fn add_assign(&mut self, other: Self) {
        self.times += other.times;
        self.moved += other.moved;
        self.bytes += other.bytes;
        self.ns += other.ns;
        self.fired += other.fired;
        self.fired_hot += other.fired_hot;
    }
}
