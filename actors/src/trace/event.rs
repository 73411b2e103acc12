//! What is recorded, and how it is packed into an event's words.

use crate::messages::{
    ActorId, Compute, Envelope, Message, NeuronIds, Partial, Share, ShareDone, Stage,
};

use super::clock::Scale;
use super::ring::WORDS;

/// What a message is, its stage included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum MessageKind {
    RunLayer,
    ShareAttention,
    ShareOutput,
    ShareHead,
    ShareHeadSketch,
    ShareHeadRows,
    ShareDoneAttention,
    ShareDoneOutput,
    ShareDoneHead,
    ShareDoneHeadSketch,
    ShareDoneHeadRows,
    Hidden,
    Prefetch,
    /// From the `DeviceLayer`.
    Compute,
    /// From the `Predictor`.
    ComputeAhead,
    Correct,
    Partial,
    LayerDone,
    RunHead,
    HeadDone,
    AwaitHidden,
}

/// A kind of actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum ActorKind {
    Pipeline,
    DeviceLayer,
    ColdLayer,
    Predictor,
}

impl MessageKind {
    /// All of them, in the order of their codes.
    pub const ALL: [MessageKind; 21] = [
        MessageKind::RunLayer,
        MessageKind::ShareAttention,
        MessageKind::ShareOutput,
        MessageKind::ShareHead,
        MessageKind::ShareHeadSketch,
        MessageKind::ShareHeadRows,
        MessageKind::ShareDoneAttention,
        MessageKind::ShareDoneOutput,
        MessageKind::ShareDoneHead,
        MessageKind::ShareDoneHeadSketch,
        MessageKind::ShareDoneHeadRows,
        MessageKind::Hidden,
        MessageKind::Prefetch,
        MessageKind::Compute,
        MessageKind::ComputeAhead,
        MessageKind::Correct,
        MessageKind::Partial,
        MessageKind::LayerDone,
        MessageKind::RunHead,
        MessageKind::HeadDone,
        MessageKind::AwaitHidden,
    ];

    fn of(message: &Message) -> Self {
        match message {
            Message::RunLayer(_) => MessageKind::RunLayer,
            Message::Share(Share { stage, .. }) => match stage {
                Stage::Attention => MessageKind::ShareAttention,
                Stage::Output => MessageKind::ShareOutput,
                Stage::Head { .. } => MessageKind::ShareHead,
                Stage::HeadSketch => MessageKind::ShareHeadSketch,
                Stage::HeadRows => MessageKind::ShareHeadRows,
            },
            Message::ShareDone(ShareDone { stage, .. }) => match stage {
                Stage::Attention => MessageKind::ShareDoneAttention,
                Stage::Output => MessageKind::ShareDoneOutput,
                Stage::Head { .. } => MessageKind::ShareDoneHead,
                Stage::HeadSketch => MessageKind::ShareDoneHeadSketch,
                Stage::HeadRows => MessageKind::ShareDoneHeadRows,
            },
            Message::AwaitHidden(_) => MessageKind::AwaitHidden,
            Message::Hidden(_) => MessageKind::Hidden,
            Message::Prefetch(_) => MessageKind::Prefetch,
            Message::Compute(Compute {
                ids: NeuronIds::Predicted,
                ..
            }) => MessageKind::ComputeAhead,
            Message::Compute(_) => MessageKind::Compute,
            Message::Correct(_) => MessageKind::Correct,
            Message::Partial(_) => MessageKind::Partial,
            Message::LayerDone(_) => MessageKind::LayerDone,
            Message::RunHead(_) => MessageKind::RunHead,
            Message::HeadDone(_) => MessageKind::HeadDone,
        }
    }

    /// The message's name.
    pub fn name(self) -> &'static str {
        match self {
            MessageKind::RunLayer => "RunLayer",
            MessageKind::ShareAttention
            | MessageKind::ShareOutput
            | MessageKind::ShareHead
            | MessageKind::ShareHeadSketch
            | MessageKind::ShareHeadRows => "Share",
            MessageKind::ShareDoneAttention
            | MessageKind::ShareDoneOutput
            | MessageKind::ShareDoneHead
            | MessageKind::ShareDoneHeadSketch
            | MessageKind::ShareDoneHeadRows => "ShareDone",
            MessageKind::AwaitHidden => "AwaitHidden",
            MessageKind::Hidden => "Hidden",
            MessageKind::Prefetch => "Prefetch",
            MessageKind::Compute | MessageKind::ComputeAhead => "Compute",
            MessageKind::Correct => "Correct",
            MessageKind::Partial => "Partial",
            MessageKind::LayerDone => "LayerDone",
            MessageKind::RunHead => "RunHead",
            MessageKind::HeadDone => "HeadDone",
        }
    }

    /// The part of the layer that it is about; none where it is about all of it.
    pub fn stage(self) -> Option<&'static str> {
        match self {
            MessageKind::ShareAttention | MessageKind::ShareDoneAttention => Some("attention"),
            MessageKind::ShareOutput | MessageKind::ShareDoneOutput => Some("output"),
            MessageKind::Compute
            | MessageKind::ComputeAhead
            | MessageKind::Correct
            | MessageKind::Partial => Some("ffn"),
            MessageKind::AwaitHidden => Some("ffn"),
            MessageKind::Hidden => Some("predict"),
            MessageKind::Prefetch => Some("prefetch"),
            MessageKind::ShareHead
            | MessageKind::ShareDoneHead
            | MessageKind::RunHead
            | MessageKind::HeadDone => Some("head"),
            MessageKind::ShareHeadSketch | MessageKind::ShareDoneHeadSketch => Some("head sketch"),
            MessageKind::ShareHeadRows | MessageKind::ShareDoneHeadRows => Some("head rows"),
            MessageKind::RunLayer | MessageKind::LayerDone => None,
        }
    }

    /// Whether it is about the head.
    pub fn is_head(self) -> bool {
        matches!(self.stage(), Some("head" | "head sketch" | "head rows"))
    }

    /// Who handles it.
    pub fn handler(self) -> ActorKind {
        match self {
            MessageKind::LayerDone | MessageKind::HeadDone => ActorKind::Pipeline,
            MessageKind::ShareAttention
            | MessageKind::ShareOutput
            | MessageKind::ShareHead
            | MessageKind::ShareHeadSketch
            | MessageKind::ShareHeadRows
            | MessageKind::Prefetch
            | MessageKind::Compute
            | MessageKind::ComputeAhead
            | MessageKind::Correct => ActorKind::ColdLayer,
            MessageKind::Hidden => ActorKind::Predictor,
            _ => ActorKind::DeviceLayer,
        }
    }

    /// Who posts it.
    pub fn poster(self) -> ActorKind {
        match self {
            MessageKind::RunLayer | MessageKind::RunHead => ActorKind::Pipeline,
            MessageKind::ShareDoneAttention
            | MessageKind::ShareDoneOutput
            | MessageKind::ShareDoneHead
            | MessageKind::ShareDoneHeadSketch
            | MessageKind::ShareDoneHeadRows
            | MessageKind::Partial => ActorKind::ColdLayer,
            MessageKind::Prefetch | MessageKind::ComputeAhead => ActorKind::Predictor,
            _ => ActorKind::DeviceLayer,
        }
    }
}

/// What marks a message: the same where it is posted and where it is handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Label {
    /// Its step, modulo 2³².
    pub step: u32,
    /// What it is.
    pub kind: MessageKind,
    /// Its layer; 0 for what has none.
    pub layer: u16,
    /// The node that it is for or, an answer, from.
    pub node: u16,
}

impl Label {
    /// Of a message on its way.
    #[inline]
    pub(crate) fn of(envelope: &Envelope) -> Self {
        let Envelope { to, message } = envelope;
        let layer = match (to, message) {
            (ActorId::DeviceLayer { layer } | ActorId::ColdLayer { layer, .. }, _) => *layer,
            (ActorId::Pipeline, Message::LayerDone(done)) => done.layer,
            (ActorId::Predictor, Message::Hidden(hidden)) => hidden.layer,
            (ActorId::Pipeline | ActorId::Predictor, _) => 0,
        };
        let node = match message {
            Message::ShareDone(ShareDone { node, .. }) | Message::Partial(Partial { node, .. }) => {
                *node
            }
            _ => to.executor(),
        };
        Self {
            step: message.step() as u32,
            kind: MessageKind::of(message),
            layer: layer as u16,
            node: node as u16,
        }
    }
}

/// What node 0's executor does beside the actors' messages, and within some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// A step is started: all that is done before its first message.
    Start,
    /// The feeder is asked for tokens.
    Feed,
    /// Embeddings and rotations of the step's tokens.
    Embed,
    /// The feeder takes logits: it samples, and gives text out.
    Sample,
    /// Neurons change between GPU and host.
    Replan,
}

impl Phase {
    /// All of them, in the order of their codes.
    pub const ALL: [Phase; 5] = [
        Phase::Start,
        Phase::Feed,
        Phase::Embed,
        Phase::Sample,
        Phase::Replan,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Start => "start",
            Phase::Feed => "feed",
            Phase::Embed => "embed",
            Phase::Sample => "sample",
            Phase::Replan => "replan",
        }
    }
}

/// What a GPU does in a token, and the host about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum GpuPart {
    /// Up to the layer's hidden state, which the host needs: attention, and layers before that are on the GPU alone.
    Layers,
    /// Hot neurons, and the next layer's predictor, until nothing is left but to wait.
    Hot,
    /// The host's part is waited for, and added.
    Wait,
    /// The layer's neurons are predicted, beside the layer before.
    Predict,
    /// What is behind the last wait for the host; all where there is none.
    Rest,
    /// The host sees the hidden state.
    Seen,
    /// The host has written its part.
    Told,
    /// The GPU has taken it.
    Taken,
}

impl GpuPart {
    /// All of them, in the order of their codes.
    pub const ALL: [GpuPart; 8] = [
        GpuPart::Layers,
        GpuPart::Hot,
        GpuPart::Wait,
        GpuPart::Predict,
        GpuPart::Rest,
        GpuPart::Seen,
        GpuPart::Told,
        GpuPart::Taken,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            GpuPart::Layers => "attention",
            GpuPart::Hot => "hot neurons",
            GpuPart::Wait => "wait for the host",
            GpuPart::Predict => "predict",
            GpuPart::Rest => "to the token's end",
            GpuPart::Seen => "hidden state seen",
            GpuPart::Told => "answered",
            GpuPart::Taken => "answer taken",
        }
    }

    /// Whether the host did it.
    pub fn is_host(self) -> bool {
        matches!(self, GpuPart::Seen | GpuPart::Told)
    }

    /// Whether it takes no time.
    pub fn is_moment(self) -> bool {
        self.is_host() || self == GpuPart::Taken
    }
}

/// Something that an executor's thread did.
///
/// Times (`_t`) are ticks of the clock in a ring, and ns from [`super::Trace::started`] in what
/// [`super::Trace::read`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// An actor handled a message.
    Handled {
        /// Which.
        label: Label,
        /// When its handler was called.
        start_t: u64,
        /// When the handler returned, or panicked.
        end_t: u64,
        /// Messages that waited for the executor when it took this one.
        waiting: u16,
        /// Whether the handler panicked.
        failed: bool,
    },
    /// An actor posted a message.
    Posted {
        /// Which.
        label: Label,
        /// When.
        at_t: u64,
        /// Neurons that the answer is about.
        neurons: u32,
        /// Active ones among them.
        active_neurons: u32,
    },
    /// A step, from its start to its last logits' sampling.
    Step {
        /// Its number, modulo 2³².
        step: u32,
        /// Position of its first token.
        position: u32,
        /// Tokens.
        n_tokens: u16,
        /// Whether its tokens count as decoded, and not as part of a prompt.
        decode: bool,
        /// When it began.
        start_t: u64,
        /// When it ended.
        end_t: u64,
        /// Whether it was given up, and is repeated or the run has ended.
        failed: bool,
    },
    /// Part of a step, on node 0.
    Phase {
        /// Which.
        phase: Phase,
        /// The step, modulo 2³².
        step: u32,
        /// When it began.
        start_t: u64,
        /// When it ended.
        end_t: u64,
    },
    /// Part of a token on a GPU; on node 0. Its times are ns already.
    Gpu {
        /// Which.
        part: GpuPart,
        /// Number of the GPU.
        gpu: u16,
        /// The layer.
        layer: u16,
        /// The step, modulo 2³².
        step: u32,
        /// When it began.
        start_t: u64,
        /// When it ended.
        end_t: u64,
        /// How far off the GPU's clock may be against the host's.
        error_ns: u32,
    },
}

const HANDLED: u8 = 0;
const POSTED: u8 = 1;
const STEP: u8 = 2;
const PHASE: u8 = 3;
const GPU: u8 = 4;

#[inline]
fn what(tag: u8, code: u8, layer: u16, node: u16, count: u16) -> u64 {
    u64::from(tag)
        | u64::from(code) << 8
        | u64::from(layer) << 16
        | u64::from(node) << 32
        | u64::from(count) << 48
}

#[inline]
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Event {
    /// Packs the event: its time; its end or counts; what, flags, layer, node and a count; the step
    /// and another count.
    #[inline]
    pub(super) fn words(self) -> [u64; WORDS] {
        match self {
            Event::Handled {
                label,
                start_t,
                end_t,
                waiting,
                failed,
            } => {
                let what = what(HANDLED, label.kind as u8, label.layer, label.node, waiting);
                [start_t, end_t, what, pair(label.step, failed.into())]
            }
            Event::Posted {
                label,
                at_t,
                neurons,
                active_neurons,
            } => {
                let what = what(POSTED, label.kind as u8, label.layer, label.node, 0);
                let counts = pair(neurons, active_neurons);
                [at_t, counts, what, pair(label.step, 0)]
            }
            Event::Step {
                step,
                position,
                n_tokens,
                decode,
                start_t,
                end_t,
                failed,
            } => {
                let flags = u8::from(failed) | u8::from(decode) << 1;
                let what = what(STEP, flags, 0, 0, n_tokens);
                [start_t, end_t, what, pair(step, position)]
            }
            Event::Phase {
                phase,
                step,
                start_t,
                end_t,
            } => {
                let what = what(PHASE, phase as u8, 0, 0, 0);
                [start_t, end_t, what, pair(step, 0)]
            }
            Event::Gpu {
                part,
                gpu,
                layer,
                step,
                start_t,
                end_t,
                error_ns,
            } => {
                let what = what(GPU, part as u8, layer, gpu, 0);
                [start_t, end_t, what, pair(step, error_ns)]
            }
        }
    }

    /// Unpacks an event and converts its times; none for words that are not one.
    pub(super) fn read(words: [u64; WORDS], scale: Scale) -> Option<Self> {
        let [first, second, what, last] = words;
        let [tag, code] = [what as u8, (what >> 8) as u8];
        let (start_t, end_t) = (scale.ns(first), scale.ns(second));
        let (step, high) = (last as u32, (last >> 32) as u32);
        let count = (what >> 48) as u16;
        let label = |code: u8| {
            Some(Label {
                step,
                kind: *MessageKind::ALL.get(usize::from(code))?,
                layer: (what >> 16) as u16,
                node: (what >> 32) as u16,
            })
        };
        Some(match tag {
            HANDLED => Event::Handled {
                label: label(code)?,
                start_t,
                end_t,
                waiting: count,
                failed: high != 0,
            },
            POSTED => Event::Posted {
                label: label(code)?,
                at_t: start_t,
                neurons: second as u32,
                active_neurons: (second >> 32) as u32,
            },
            STEP => Event::Step {
                step,
                position: high,
                n_tokens: count,
                decode: code & 2 != 0,
                start_t,
                end_t,
                failed: code & 1 != 0,
            },
            PHASE => Event::Phase {
                phase: *Phase::ALL.get(usize::from(code))?,
                step,
                start_t,
                end_t,
            },
            GPU => Event::Gpu {
                part: *GpuPart::ALL.get(usize::from(code))?,
                gpu: (what >> 32) as u16,
                layer: (what >> 16) as u16,
                step,
                start_t: first,
                end_t: second,
                error_ns: high,
            },
            _ => return None,
        })
    }
}
