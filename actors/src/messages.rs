//! Who talks to whom: the actors' names and their messages.
//!
//! Messages carry steps, layers, slots and ranges, never data: data lies in [`crate::slots`]. A
//! *step* is one pass of some tokens through all layers; a step that is repeated gets a new number,
//! so that late messages of the first attempt are recognised and dropped.

use std::fmt;
use std::ops::Range;

use crate::counters::Counters;

/// An actor's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActorId {
    /// The token loop.
    Pipeline,
    /// Predicts one layer ahead.
    Predictor,
    /// The device's part of a layer.
    DeviceLayer {
        /// Counted from 0.
        layer: usize,
    },
    /// A node's part of a layer.
    ColdLayer {
        /// Counted from 0.
        layer: usize,
        /// Counted from 0.
        node: usize,
    },
}

impl ActorId {
    /// The node whose executor runs the actor. The host is the device, so that all but the cold
    /// layers live with node 0.
    pub fn executor(self) -> usize {
        match self {
            ActorId::Pipeline | ActorId::Predictor | ActorId::DeviceLayer { .. } => 0,
            ActorId::ColdLayer { node, .. } => node,
        }
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActorId::Pipeline => f.write_str("Pipeline"),
            ActorId::Predictor => f.write_str("Predictor"),
            ActorId::DeviceLayer { layer } => write!(f, "DeviceLayer {layer}"),
            ActorId::ColdLayer { layer, node } => write!(f, "ColdLayer {layer} on node {node}"),
        }
    }
}

/// Number of a step.
pub type Step = u64;

/// A message on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Envelope {
    /// Who shall handle it.
    pub to: ActorId,
    /// What it says.
    pub message: Message,
}

/// Everything that actors say to one another while a step runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message {
    /// `Pipeline` → `DeviceLayer`
    RunLayer(RunLayer),
    /// `DeviceLayer` → each `ColdLayer` of the layer, where the host is the device
    Share(Share),
    /// `ColdLayer` → `DeviceLayer`
    ShareDone(ShareDone),
    /// `DeviceLayer` on a GPU → itself
    AwaitHidden(AwaitHidden),
    /// `DeviceLayer` → `Predictor`
    Hidden(Hidden),
    /// `Predictor` → each `ColdLayer` of the next layer
    Prefetch(Prefetch),
    /// `DeviceLayer` or `Predictor` → each `ColdLayer` of the layer
    Compute(Compute),
    /// `DeviceLayer` → each `ColdLayer` of the layer, where `Compute` came from the `Predictor`
    Correct(Correct),
    /// `ColdLayer` → `DeviceLayer`
    Partial(Partial),
    /// `DeviceLayer` → `Pipeline`
    LayerDone(LayerDone),
    /// `Pipeline` → `DeviceLayer` of the last layer
    RunHead(RunHead),
    /// `DeviceLayer` of the last layer → `Pipeline`
    HeadDone(HeadDone),
}

impl Message {
    /// The step that the message belongs to.
    pub fn step(&self) -> Step {
        match self {
            Message::RunLayer(RunLayer { step, .. })
            | Message::Share(Share { step, .. })
            | Message::ShareDone(ShareDone { step, .. })
            | Message::AwaitHidden(AwaitHidden { step, .. })
            | Message::Hidden(Hidden { step, .. })
            | Message::Prefetch(Prefetch { step, .. })
            | Message::Compute(Compute { step, .. })
            | Message::Correct(Correct { step, .. })
            | Message::Partial(Partial { step, .. })
            | Message::LayerDone(LayerDone { step, .. })
            | Message::RunHead(RunHead { step, .. })
            | Message::HeadDone(HeadDone { step, .. }) => *step,
        }
    }
}

/// Take the residual stream through a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunLayer {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
}

/// Compute the node's share of something that the device would compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Of what.
    pub stage: Stage,
}

/// What a [`Share`] is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Queries, keys, values and attention of the node's heads.
    Attention,
    /// The node's rows of the attention's output projection.
    Output,
    /// The node's rows of the head, for this many tokens.
    Head {
        /// Tokens, rows `0..n_tokens` of the normed slot.
        n_tokens: usize,
    },
    /// Scores of the node's tokens by the sketch of the head, for row 0 of the normed slot.
    HeadSketch,
    /// The node's rows of the head whose scores reach the threshold, for row 0 of the normed slot.
    HeadRows,
}

/// A [`Share`] is in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareDone {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Of what.
    pub stage: Stage,
    /// Whose.
    pub node: usize,
    /// What it took.
    pub work: Counters,
}

/// What was predicted of the layer is under way: wait for its hidden state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AwaitHidden {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
}

/// The residual stream has passed the layer's attention: predict the next layer's neurons from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hidden {
    /// The step.
    pub step: Step,
    /// The layer that it is in; neurons of the next one are predicted.
    pub layer: usize,
}

/// Pull the bundles of neurons towards the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetch {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Which.
    pub ids: NeuronIds,
}

/// Compute the node's neurons: at once where the ids need no `Correct`, else when it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compute {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Which neurons are candidates.
    pub ids: NeuronIds,
    /// Where the normed hidden state is, or will be.
    pub x_slot: SlotId,
    /// What it took to predict the ids.
    pub work: Counters,
}

/// The hidden state is there: compute what `Compute` named, and these neurons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Correct {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Which neurons are candidates beside those of `Compute`.
    pub ids: NeuronIds,
}

/// Candidates of a [`Compute`] or [`Correct`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeuronIds {
    /// None.
    None,
    /// All neurons of the node, or those that its own sketch picks where the layer has one.
    All,
    /// Those that the `Predictor` wrote to the layer's slot.
    Predicted,
}

/// A slot for activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotId {
    /// The hidden state after a norm.
    Normed,
}

/// The node's partial sums of the FFN are in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Whose.
    pub node: usize,
    /// What it took.
    pub work: Counters,
}

/// The residual stream has passed a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerDone {
    /// The step.
    pub step: Step,
    /// The layer.
    pub layer: usize,
    /// Whether all of it is finite, and small enough to be normed.
    pub finite: bool,
    /// What it took all actors of the layer.
    pub work: Counters,
}

/// Compute logits of some tokens of the step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunHead {
    /// The step.
    pub step: Step,
    /// First token, counted within the step.
    pub first: usize,
    /// Tokens.
    pub n_tokens: usize,
    /// Whether a sketch picks whose logits are computed: one token only.
    pub sparse: bool,
}

impl RunHead {
    /// The tokens, counted within the step.
    pub fn tokens(&self) -> Range<usize> {
        self.first..self.first + self.n_tokens
    }
}

/// Logits are in their slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadDone {
    /// The step.
    pub step: Step,
    /// What it took.
    pub work: Counters,
}
