//! An executor's pen: what is under way on its thread, and the ring that takes what has ended.
//!
//! Spans are written when they end, so that none is ever open in a ring. A step ends, and the next
//! one begins, in the middle of the handler that takes its logits: [`Recorder::end_step`] divides the
//! handler's span there, so that everything nests.

use std::sync::Arc;
use std::time::Instant;

use super::clock::Clock;
use super::event::{Event, GpuPart, Label, Phase};
use super::ring::Ring;
use crate::messages::{Envelope, Message, Partial, Step};

/// What a GPU did, or the host about it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GpuEvent {
    pub part: GpuPart,
    /// Number of the GPU.
    pub gpu: usize,
    pub layer: usize,
    pub step: Step,
    /// In ns from [`super::Trace::started`].
    pub start_ns: u64,
    pub end_ns: u64,
    /// How far off the GPU's clock may be.
    pub error_ns: u64,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Recorder {
    clock: Clock,
    ring: Arc<Ring>,
    /// What the thread is at.
    doing: Doing,
    /// The step under way; known on node 0 only.
    step: Option<OpenStep>,
    /// When the step before ended, or the run began.
    boundary: u64,
}

#[derive(Debug, Clone, Copy)]
enum Doing {
    Nothing,
    /// Handling a message.
    Message {
        label: Label,
        start: u64,
        waiting: u16,
    },
    /// Starting a step.
    Start {
        start: u64,
    },
}

#[derive(Debug, Clone, Copy)]
struct OpenStep {
    step: u32,
    position: u32,
    n_tokens: u16,
    decode: bool,
    start: u64,
}

impl Recorder {
    /// Writes into `ring`.
    pub fn new(clock: Clock, ring: Arc<Ring>) -> Self {
        Self {
            clock,
            ring,
            doing: Doing::Nothing,
            step: None,
            boundary: 0,
        }
    }

    /// Now, for [`Recorder::phase`].
    #[inline]
    pub fn now(&self) -> u64 {
        self.clock.ticks()
    }

    /// A moment, in ns from [`super::Trace::started`].
    pub fn ns(&self, at: Instant) -> u64 {
        let since = at.saturating_duration_since(self.clock.started());
        u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
    }

    /// A GPU has done something.
    pub fn gpu(&self, event: GpuEvent) {
        self.push(Event::Gpu {
            part: event.part,
            gpu: event.gpu as u16,
            layer: event.layer as u16,
            step: event.step as u32,
            start_t: event.start_ns,
            end_t: event.end_ns,
            error_ns: u32::try_from(event.error_ns).unwrap_or(u32::MAX),
        });
    }

    fn push(&self, event: Event) {
        self.ring.push(event.words());
    }

    /// A handler is about to be called, while `waiting` more messages wait.
    pub fn begin_message(&mut self, envelope: &Envelope, waiting: usize) {
        self.doing = Doing::Message {
            label: Label::of(envelope),
            start: self.now(),
            waiting: u16::try_from(waiting).unwrap_or(u16::MAX),
        };
    }

    /// Whatever starts or repeats a step outside a handler is about to be called.
    pub fn begin_start(&mut self) {
        self.boundary = self.now();
        self.doing = Doing::Start {
            start: self.boundary,
        };
    }

    /// What was begun has returned, or `failed`.
    pub fn end(&mut self, failed: bool) {
        let now = self.now();
        self.end_at(now, failed);
        self.doing = Doing::Nothing;
    }

    fn end_at(&mut self, end: u64, failed: bool) {
        match (self.doing, self.step) {
            (Doing::Nothing, _) => {}
            (
                Doing::Message {
                    label,
                    start,
                    waiting,
                },
                _,
            ) => self.push(Event::Handled {
                label,
                start_t: start,
                end_t: end,
                waiting,
                failed,
            }),
            (Doing::Start { start }, Some(step)) if step.start == start => {
                self.push(Event::Phase {
                    phase: Phase::Start,
                    step: step.step,
                    start_t: start,
                    end_t: end,
                });
            }
            // no step was started
            (Doing::Start { .. }, _) => {}
        }
    }

    /// A message is about to be posted.
    pub fn post(&mut self, envelope: &Envelope) {
        let (neurons, active_neurons) = match &envelope.message {
            Message::Partial(Partial { work, .. }) => (work.neurons, work.active_neurons),
            _ => (0, 0),
        };
        self.push(Event::Posted {
            label: Label::of(envelope),
            at_t: self.now(),
            neurons: neurons as u32,
            active_neurons: active_neurons as u32,
        });
    }

    /// A step starts: its time is counted from the end of the one before.
    pub fn begin_step(&mut self, step: Step, position: usize, n_tokens: usize, decode: bool) {
        self.step = Some(OpenStep {
            step: step as u32,
            position: position as u32,
            n_tokens: n_tokens as u16,
            decode,
            start: self.boundary,
        });
    }

    /// The step is complete, its logits included. What the handler does from here on is the next
    /// step's start.
    pub fn end_step(&mut self) {
        let now = self.now();
        self.end_at(now, false);
        self.close_step(now, false);
        self.boundary = now;
        self.doing = Doing::Start { start: now };
    }

    /// The step, if one is under way, is given up.
    pub fn fail_step(&mut self) {
        if self.step.is_some() {
            self.close_step(self.now(), true);
        }
    }

    fn close_step(&mut self, end: u64, failed: bool) {
        let Some(open) = self.step.take() else {
            return;
        };
        self.push(Event::Step {
            step: open.step,
            position: open.position,
            n_tokens: open.n_tokens,
            decode: open.decode,
            start_t: open.start,
            end_t: end,
            failed,
        });
    }

    /// Part of a step has been done since `start`.
    pub fn phase(&mut self, phase: Phase, step: Step, start: u64) {
        self.push(Event::Phase {
            phase,
            step: step as u32,
            start_t: start,
            end_t: self.now(),
        });
    }
}
