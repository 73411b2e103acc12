//! The timeline: what each executor's thread did, and when.
//!
//! A recorder on the executor's thread writes events of four words into a ring that is allocated
//! before the first token: a store or two beside reading the clock, no allocation, no system call, no
//! lock. Whoever holds the [`Trace`] reads all rings at any time. Without a trace an executor has no
//! recorder, and each hook is a branch on that.

mod clock;
mod event;
mod recorder;
mod ring;
mod scores;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

pub use event::{ActorKind, Event, GpuPart, Label, MessageKind, Phase};
pub use scores::{ScoreCost, Scorer};

pub(crate) use recorder::{GpuEvent, Recorder};
pub(crate) use scores::{ScoreSums, Scores, Watch};

use clock::Clock;
use ring::{EVENT_BYTES, Ring};

/// How much a trace may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceBounds {
    /// Steps that are expected: tokens one by one, and pieces of prompts.
    pub n_steps: usize,
    /// Most memory of a node's events.
    pub node_bytes_max: usize,
}

/// All that has been recorded of an engine.
#[derive(Debug)]
pub struct Trace {
    clock: Clock,
    capacity: usize,
    /// By node; each is made by the node's executor, on its own thread.
    rings: Vec<OnceLock<Arc<Ring>>>,
    /// By node.
    scores: Vec<Arc<ScoreSums>>,
}

/// What one executor's thread did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeEvents {
    /// In the order in which they ended.
    pub events: Vec<Event>,
    /// Later ones that there was no room for.
    pub lost: u64,
}

impl Trace {
    /// With room for the steps of `bounds` through `n_layer` layers on `n_nodes` nodes, predicted ahead
    /// or not, with or without GPUs.
    pub(crate) fn new(
        bounds: TraceBounds,
        n_layer: usize,
        n_nodes: usize,
        ahead: bool,
        gpu: bool,
    ) -> Self {
        let on_gpu = if gpu {
            GpuPart::ALL.len() * n_layer + n_layer
        } else {
            0
        };
        let events = step_events(n_layer, n_nodes, ahead || gpu) + on_gpu;
        let wanted = bounds.n_steps.saturating_mul(events);
        let clock = Clock::start();
        Self {
            clock,
            capacity: wanted.min(bounds.node_bytes_max / EVENT_BYTES),
            rings: (0..n_nodes).map(|_| OnceLock::new()).collect(),
            scores: (0..n_nodes)
                .map(|_| Arc::new(ScoreSums::new(clock)))
                .collect(),
        }
    }

    /// The moment from which events are timed.
    pub fn started(&self) -> Instant {
        self.clock.started()
    }

    /// A recorder of `node`, made by its executor's thread.
    pub(crate) fn recorder(&self, node: usize) -> Recorder {
        let ring = self.rings[node].get_or_init(|| Arc::new(Ring::new(self.capacity)));
        Recorder::new(self.clock, Arc::clone(ring))
    }

    /// Where `node` sums up what its scores take.
    pub(crate) fn scores(&self, node: usize) -> Arc<ScoreSums> {
        Arc::clone(&self.scores[node])
    }

    /// What scores took each node so far, in the order of [`Scorer::ALL`]. A GPU's are not among them.
    pub fn score_costs(&self) -> Vec<[ScoreCost; Scorer::ALL.len()]> {
        let scale = self.clock.scale();
        self.scores.iter().map(|sums| sums.costs(scale)).collect()
    }

    /// What each node's executor did so far.
    pub fn read(&self) -> Vec<NodeEvents> {
        let scale = self.clock.scale();
        let read = |ring: &Arc<Ring>| NodeEvents {
            events: ring
                .events()
                .filter_map(|words| Event::read(words, scale))
                .collect(),
            lost: ring.lost(),
        };
        let nothing = || NodeEvents {
            events: Vec::new(),
            lost: 0,
        };
        self.rings
            .iter()
            .map(|ring| ring.get().map_or_else(nothing, read))
            .collect()
    }
}

/// Events of one step of few logits on node 0, which has most: every message that it posts or
/// handles, and the step's phases.
fn step_events(n_layer: usize, n_nodes: usize, ahead: bool) -> usize {
    let predicted = if ahead { 2 * n_nodes + 4 } else { 0 };
    let layer = 6 * n_nodes + 10 + predicted;
    // a sparse one has two stages
    let head = 4 * n_nodes + 10;
    n_layer * layer + head + 1 + Phase::ALL.len()
}
