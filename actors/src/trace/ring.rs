//! Where an executor's events lie until they are read: memory that is taken before the first token.
//!
//! # Protocol
//! One thread writes, any thread may read at any time. An event is four words, stored before
//! `written` is raised (release); a reader that sees `written` (acquire) sees the words of all events
//! below it, and they never change again: a full ring takes no more events and counts them as lost.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::mailbox::Padded;

/// Words of an event.
pub(crate) const WORDS: usize = 4;

/// Bytes of an event.
pub(crate) const EVENT_BYTES: usize = WORDS * size_of::<u64>();

/// Events of one thread.
#[derive(Debug)]
pub(crate) struct Ring {
    words: Box<[AtomicU64]>,
    written: Padded<AtomicUsize>,
    lost: Padded<AtomicU64>,
}

impl Ring {
    /// For so many events. The calling thread touches all its memory: it should be the writer, so
    /// that the pages are its node's and none is missing later.
    pub fn new(capacity: usize) -> Self {
        Self {
            words: (0..capacity * WORDS).map(|_| AtomicU64::new(0)).collect(),
            written: Padded::default(),
            lost: Padded::default(),
        }
    }

    /// Adds an event. Only one thread does.
    #[inline]
    pub fn push(&self, event: [u64; WORDS]) {
        let written = self.written.0.load(Ordering::Relaxed);
        let Some(words) = self.words.get(written * WORDS..(written + 1) * WORDS) else {
            let lost = self.lost.0.load(Ordering::Relaxed);
            return self.lost.0.store(lost + 1, Ordering::Relaxed);
        };
        for (place, word) in words.iter().zip(event) {
            place.store(word, Ordering::Relaxed);
        }
        self.written.0.store(written + 1, Ordering::Release);
    }

    /// The events so far.
    pub fn events(&self) -> impl Iterator<Item = [u64; WORDS]> + '_ {
        let written = self.written.0.load(Ordering::Acquire);
        let events = self.words[..written * WORDS].chunks_exact(WORDS);
        events.map(|words| std::array::from_fn(|n| words[n].load(Ordering::Relaxed)))
    }

    /// Events that there was no room for.
    pub fn lost(&self) -> u64 {
        self.lost.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_keeps_what_it_has_and_counts_the_rest() {
        let ring = Ring::new(3);
        for n in 0..5 {
            ring.push([n, 10 * n, 0, n]);
        }
        let events: Vec<_> = ring.events().collect();
        assert_eq!(events, [[0, 0, 0, 0], [1, 10, 0, 1], [2, 20, 0, 2]]);
        assert_eq!(ring.lost(), 2);
    }

    #[test]
    fn a_reader_beside_the_writer_sees_whole_events_only() {
        const EVENTS: u64 = 200_000;
        let ring = Ring::new(EVENTS as usize);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..EVENTS).for_each(|n| ring.push([n, n + 1, n + 2, n + 3])));
            let mut seen = 0;
            while seen < EVENTS as usize {
                seen = 0;
                for (n, event) in ring.events().enumerate() {
                    let n = n as u64;
                    assert_eq!(event, [n, n + 1, n + 2, n + 3]);
                    seen += 1;
                }
            }
        });
        assert_eq!(ring.lost(), 0);
    }
}
