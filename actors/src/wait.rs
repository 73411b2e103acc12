//! Waiting: spin for as long as a token's stages last, then park.
//!
//! A waiter never misses a wake-up: it says that it parks *before* it looks at the condition once
//! more, and whoever makes the condition true does so *before* looking whether it is parked. Both
//! pairs are sequentially consistent, so at least one of the two sees the other.

use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience {
    /// Time on the processor before the thread parks.
    pub spin: Duration,
    /// Time after which the wait fails; none: never.
    pub limit: Option<Duration>,
}

/// Spinning of threads that have a CPU to themselves: longer than the longest pause within a token.
pub(crate) const SPIN: Duration = Duration::from_millis(2);

/// Spinning of threads that share their CPU with others that they wait for.
pub(crate) const SPIN_SHARED: Duration = Duration::from_micros(5);

/// Looks at the condition between two looks at the clock.
const LOOKS: usize = 64;

/// A thread that waits, as others see it.
#[derive(Debug)]
pub(crate) struct Waiter {
    parked: AtomicBool,
    thread: Thread,
}

impl Waiter {
    /// Of the calling thread.
    pub fn current() -> Self {
        Self::new(std::thread::current())
    }

    /// Of `thread`.
    pub fn new(thread: Thread) -> Self {
        Self {
            parked: AtomicBool::new(false),
            thread,
        }
    }

    /// Waits on the waiter's own thread until `ready`; false when the limit has passed.
    pub fn wait(&self, patience: Patience, ready: impl Fn() -> bool) -> bool {
        let mut start = None;
        loop {
            for _ in 0..LOOKS {
                if ready() {
                    return true;
                }
                std::hint::spin_loop();
            }
            let start = *start.get_or_insert_with(Instant::now);
            let elapsed = start.elapsed();
            if patience.limit.is_some_and(|limit| elapsed >= limit) {
                return false;
            }
            if elapsed >= patience.spin {
                self.park(patience.limit.map(|limit| limit - elapsed), &ready);
            }
        }
    }

    fn park(&self, limit: Option<Duration>, ready: &impl Fn() -> bool) {
        debug_assert_eq!(
            std::thread::current().id(),
            self.thread.id(),
            "only for its own thread"
        );
        self.parked.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if !ready() {
            match limit {
                Some(limit) => std::thread::park_timeout(limit),
                None => std::thread::park(),
            }
        }
        self.parked.store(false, Ordering::SeqCst);
    }

    /// Wakes the thread if it is parked. The condition that it waits for has been made true before.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    fn ping_pong(spin: Duration) {
        const ROUNDS: usize = 2_000;
        let turn = Arc::new(AtomicUsize::new(0));
        let patience = Patience {
            spin,
            limit: Some(Duration::from_secs(60)),
        };
        let main = Arc::new(Waiter::current());
        let (theirs, to_main) = (Arc::clone(&turn), Arc::clone(&main));
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        let other = std::thread::spawn(move || {
            let me = Arc::new(Waiter::current());
            tell.send(Arc::clone(&me)).unwrap();
            for round in 0..ROUNDS {
                assert!(me.wait(patience, || theirs.load(Ordering::Acquire) == 2 * round + 1));
                theirs.store(2 * round + 2, Ordering::Release);
                to_main.wake();
            }
        });
        let other_waiter = told.recv().unwrap();
        for round in 0..ROUNDS {
            turn.store(2 * round + 1, Ordering::Release);
            other_waiter.wake();
            assert!(main.wait(patience, || turn.load(Ordering::Acquire) == 2 * round + 2));
        }
        other.join().unwrap();
    }

    #[test]
    fn no_wake_up_is_lost_spinning_or_parked() {
        ping_pong(SPIN);
        ping_pong(Duration::ZERO);
    }

    #[test]
    fn a_wait_that_is_never_answered_ends_at_its_limit() {
        let limit = Duration::from_millis(20);
        let start = Instant::now();
        let patience = Patience {
            spin: Duration::from_millis(1),
            limit: Some(limit),
        };
        assert!(!Waiter::current().wait(patience, || false));
        assert!(start.elapsed() >= limit);
    }
}
