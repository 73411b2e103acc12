//! Where an actor's messages go: its executor's own queue, or another executor's mailbox.

use std::collections::VecDeque;

use crate::executor::{Letter, MAILBOX_CAPACITY};
use crate::mailbox::Outbox;
use crate::messages::{ActorId, Envelope, Message};
use crate::trace::Recorder;

/// Where actors post their messages.
pub(crate) struct Posts<'a> {
    node: usize,
    local: &'a mut VecDeque<Envelope>,
    outboxes: &'a [Outbox<Letter>],
    recorder: Option<&'a mut Recorder>,
}

impl<'a> Posts<'a> {
    /// For actors of `node`.
    pub fn new(
        node: usize,
        local: &'a mut VecDeque<Envelope>,
        outboxes: &'a [Outbox<Letter>],
        recorder: Option<&'a mut Recorder>,
    ) -> Self {
        Self {
            node,
            local,
            outboxes,
            recorder,
        }
    }

    /// Where the thread's work is recorded, if it is.
    pub fn recorder(&mut self) -> Option<&mut Recorder> {
        self.recorder.as_deref_mut()
    }

    /// Posts a message.
    ///
    /// # Panics
    /// When a mailbox is full or its executor gone: neither happens while the engine runs.
    pub fn post(&mut self, to: ActorId, message: Message) {
        let envelope = Envelope { to, message };
        if let Some(recorder) = self.recorder() {
            recorder.post(&envelope);
        }
        if to.executor() == self.node {
            assert!(
                self.local.len() < MAILBOX_CAPACITY,
                "the queue of node {} is full",
                self.node
            );
            self.local.push_back(envelope);
        } else if let Err(undelivered) =
            self.outboxes[to.executor()].send(Letter::Message(envelope))
        {
            panic!("a message to {to} cannot be delivered: {undelivered:?}");
        }
    }
}
