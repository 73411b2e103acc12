//! Bounded mailboxes between executors: flume's queue beside an atomic doorbell.
//!
//! flume locks a mutex in every call, and its blocking `recv` costs a change of threads (38 µs
//! where a spinning wait costs 1). So the receiver spins on the doorbell, which counts the messages
//! sent so far, and touches flume only when it has rung. A sender queues first and rings after, so
//! a receiver that sees n rings finds at least n messages, whoever sent them.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use crate::wait::{Patience, Waiter};

/// Keeps two counters that different threads write out of one cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Padded<T>(pub T);

#[derive(Debug)]
struct Doorbell {
    rung: Padded<AtomicU64>,
    waiter: OnceLock<Waiter>,
}

/// The receiving end; one thread owns it.
#[derive(Debug)]
pub(crate) struct Mailbox<T> {
    queue: flume::Receiver<T>,
    bell: Arc<Doorbell>,
    answered: u64,
}

/// The sending end.
#[derive(Debug)]
pub(crate) struct Outbox<T> {
    queue: flume::Sender<T>,
    bell: Arc<Doorbell>,
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Self {
        Self {
            queue: self.queue.clone(),
            bell: Arc::clone(&self.bell),
        }
    }
}

/// A message that could not be sent, given back.
pub(crate) struct Undelivered<T> {
    /// The message.
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "no sender repeats a message yet")
    )]
    pub message: T,
    /// Whether the receiver is gone: trying again is then of no use.
    pub gone: bool,
}

impl<T> fmt::Debug for Undelivered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.gone {
            "the receiver is gone"
        } else {
            "the mailbox is full"
        })
    }
}

/// A mailbox for `capacity` messages. Its queue is filled once with what `filler` gives, so that it
/// has all its memory before the first real message.
pub(crate) fn mailbox<T>(capacity: usize, filler: impl Fn() -> T) -> (Outbox<T>, Mailbox<T>) {
    let (sender, receiver) = flume::bounded(capacity);
    for _ in 0..capacity {
        assert!(sender.try_send(filler()).is_ok(), "room for the capacity");
    }
    while receiver.try_recv().is_ok() {}
    let bell = Arc::new(Doorbell {
        rung: Padded::default(),
        waiter: OnceLock::new(),
    });
    let outbox = Outbox {
        queue: sender,
        bell: Arc::clone(&bell),
    };
    (
        outbox,
        Mailbox {
            queue: receiver,
            bell,
            answered: 0,
        },
    )
}

impl<T> Outbox<T> {
    /// Sends without waiting.
    ///
    /// # Errors
    /// The mailbox is full or its receiver is gone; the message comes back.
    pub fn send(&self, message: T) -> Result<(), Undelivered<T>> {
        self.queue.try_send(message).map_err(|error| match error {
            flume::TrySendError::Full(message) => Undelivered {
                message,
                gone: false,
            },
            flume::TrySendError::Disconnected(message) => Undelivered {
                message,
                gone: true,
            },
        })?;
        self.bell.rung.0.fetch_add(1, Ordering::SeqCst);
        if let Some(waiter) = self.bell.waiter.get() {
            waiter.wake();
        }
        Ok(())
    }
}

impl<T> Mailbox<T> {
    /// Messages that have been sent and not received.
    pub fn waiting(&self) -> usize {
        (self.bell.rung.0.load(Ordering::Relaxed) - self.answered) as usize
    }

    /// The next message, for which the calling thread, always the same, waits; none when the limit
    /// has passed.
    pub fn receive(&mut self, patience: Patience) -> Option<T> {
        let waiter = self.bell.waiter.get_or_init(Waiter::current);
        let answered = self.answered;
        if !waiter.wait(patience, || {
            self.bell.rung.0.load(Ordering::Acquire) > answered
        }) {
            return None;
        }
        self.answered += 1;
        // there is one: at least as many were queued as have rung
        self.queue.try_recv().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const PATIENT: Patience = Patience {
        spin: Duration::from_micros(50),
        limit: Some(Duration::from_secs(60)),
    };

    #[test]
    fn messages_of_each_sender_arrive_in_order() {
        let (outbox, mut mailbox) = mailbox(64, || (0, 0));
        let senders: Vec<_> = (0..3)
            .map(|sender| {
                let outbox = outbox.clone();
                std::thread::spawn(move || {
                    for n in 0..1000 {
                        let mut message = (sender, n);
                        while let Err(undelivered) = outbox.send(message) {
                            assert!(!undelivered.gone);
                            message = undelivered.message;
                            std::thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let mut next = [0; 3];
        for _ in 0..3000 {
            let (sender, n) = mailbox.receive(PATIENT).unwrap();
            assert_eq!(n, next[sender]);
            next[sender] += 1;
        }
        senders
            .into_iter()
            .for_each(|sender| sender.join().unwrap());
    }

    #[test]
    fn a_full_or_ownerless_mailbox_gives_the_message_back() {
        let (outbox, mailbox) = mailbox(2, || 0);
        assert!(outbox.send(1).is_ok() && outbox.send(2).is_ok());
        let full = outbox.send(3).unwrap_err();
        assert!(full.message == 3 && !full.gone);
        drop(mailbox);
        let gone = outbox.send(4).unwrap_err();
        assert!(gone.message == 4 && gone.gone);
    }

    #[test]
    fn nothing_received_within_the_limit_is_nothing() {
        let (_outbox, mut mailbox) = mailbox(1, || 0);
        let patience = Patience {
            spin: Duration::ZERO,
            limit: Some(Duration::from_millis(5)),
        };
        assert_eq!(mailbox.receive(patience), None);
    }
}
