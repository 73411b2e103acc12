//! Work on all layers, several at a time where the machine has cores and memory for them: much of what is fitted to a layer is one
//! thread's.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use pi_topology::available_memory_bytes;

use super::preparation::Preparation;
use super::thresholds::TARGETS;
use crate::error::RuntimeError;
use crate::model::Hyperparameters;

/// Cores that a layer keeps busy.
const CORES_PER_LAYER: usize = 4;
/// One of so many bytes of the memory that is free may be taken.
const MEMORY_PART: u64 = 2;
/// Lists of scores or masses, of a quarter of the tokens, that each thread has of a layer: of a sketch, or of one of the targets, which
/// are more.
const LISTS: usize = 2;

impl Preparation {
    /// What `work` makes of each layer, in their order; `what` names the bar.
    pub(super) fn each_layer<T: Send>(
        &self,
        what: &str,
        n_tokens: usize,
        work: impl Fn(usize) -> Result<T, RuntimeError> + Sync,
    ) -> Result<Vec<T>, RuntimeError> {
        let hyper = &self.subject.hyper;
        let n_threads = self.subject.plan.n_threads();
        let bytes = bytes_of_layer(hyper, n_tokens, n_threads);
        let n_together = n_together(n_threads, bytes, available_memory_bytes());
        self.observer.begin(what, hyper.n_layer);
        let all = each(
            hyper.n_layer,
            n_together,
            |layer| self.check_stop().and_then(|()| work(layer)),
            |done| self.observer.at(done),
        )?;
        self.observer.end();
        Ok(all)
    }
}

/// Bytes that are there at a time while predictors or thresholds are fitted to a layer: what it saw and did, covariances of two
/// regressions, and lists of each thread.
fn bytes_of_layer(hyper: &Hyperparameters, n_tokens: usize, n_threads: usize) -> u64 {
    let Hyperparameters { n_embd, n_ff, .. } = *hyper;
    let states = 2 * n_tokens * (n_ff + n_embd) * size_of::<f32>();
    let covariances = 2 * (n_ff + 4 * n_embd) * n_embd * size_of::<f64>();
    let lists = LISTS * n_threads.min(TARGETS.len()) * n_tokens / 4 * n_ff * size_of::<f32>();
    (states + covariances + lists) as u64
}

/// How many layers are worked on at a time.
fn n_together(n_threads: usize, bytes: u64, available: Option<u64>) -> usize {
    let room = available.map_or(1, |available| available / MEMORY_PART / bytes.max(1));
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    (n_threads / CORES_PER_LAYER).min(room).max(1)
}

/// What `work` makes of `0..n`, `n_together` at a time, in their order; `done` hears how many are. An error ends it as soon as what is
/// under way has ended; of several the first one's is given.
fn each<T: Send, E: Send>(
    n: usize,
    n_together: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
    done: impl Fn(usize) + Sync,
) -> Result<Vec<T>, E> {
    let next = AtomicUsize::new(0);
    // parts that have ended, in any order
    let made: Mutex<Vec<(usize, Result<T, E>)>> = Mutex::default();
    let take = || loop {
        let part = next.fetch_add(1, Ordering::Relaxed);
        if part >= n {
            return;
        }
        let result = work(part);
        if result.is_err() {
            next.store(n, Ordering::Relaxed);
        }
        let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
        made.push((part, result));
        done(made.len());
    };
    std::thread::scope(|scope| {
        for _ in 1..n_together.min(n) {
            scope.spawn(take);
        }
        take();
    });
    let mut made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
    made.sort_by_key(|(part, _)| *part);
    made.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn results_come_in_the_order_of_layers() {
        for n_together in [1, 3, 20] {
            let told = Mutex::new(vec![]);
            let all = each::<_, ()>(
                7,
                n_together,
                |n| Ok(n * n),
                |done| told.lock().unwrap().push(done),
            );
            assert_eq!(all.unwrap(), [0, 1, 4, 9, 16, 25, 36]);
            assert_eq!(told.into_inner().unwrap(), [1, 2, 3, 4, 5, 6, 7]);
        }
    }

    /// Two wait for each other.
    #[test]
    fn layers_go_together() {
        let both = Barrier::new(2);
        let all = each::<_, ()>(
            2,
            2,
            |n| {
                both.wait();
                Ok(n)
            },
            |_| (),
        );
        assert_eq!(all.unwrap(), [0, 1]);
    }

    #[test]
    fn an_error_ends_it() {
        let seen = Mutex::new(vec![]);
        let work = |n: usize| {
            seen.lock().unwrap().push(n);
            if n < 2 { Ok(()) } else { Err(n) }
        };
        assert_eq!(each(1000, 1, work, |_| ()), Err(2));
        assert_eq!(seen.into_inner().unwrap(), [0, 1, 2]);
        let error = each(1000, 4, |n| if n == 5 { Err(n) } else { Ok(()) }, |_| ());
        assert_eq!(error, Err(5));
    }

    #[test]
    fn cores_and_memory_bound_them() {
        const GIB: u64 = 1 << 30;
        assert_eq!(n_together(2, 1, Some(64 * GIB)), 1);
        assert_eq!(n_together(16, GIB, Some(64 * GIB)), 4);
        assert_eq!(n_together(16, 10 * GIB, Some(64 * GIB)), 3);
        assert_eq!(n_together(16, 100 * GIB, Some(64 * GIB)), 1);
        assert_eq!(n_together(16, 1, None), 1);
    }
}
