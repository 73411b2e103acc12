//! A node's team: pinned threads that work on one job at a time, with barriers inside the job.
//!
//! # Protocol
//! The leader writes the job, then raises `epoch` (release); a worker that sees the new epoch
//! (acquire) sees the job. Workers count themselves in `done` (release) when they have left the job;
//! the leader returns from [`Team::run`] only when all have (acquire), so the job's borrows end after
//! its last use, and everything that the threads wrote is visible to the leader. A thread that panics
//! poisons the team: threads at a barrier leave the job as well, so that `done` is always reached.
//! Between jobs all counters are still, and the leader resets them after a poisoned one.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::mailbox::Padded;
use crate::wait::{Patience, Waiter};

type Job<'a> = dyn Fn(Member<'_>) + Sync + 'a;

/// What the threads of a team share.
#[derive(Debug)]
struct Shared {
    name: String,
    n_threads: usize,
    patience: Patience,
    job: JobSlot,
    epoch: Padded<AtomicU64>,
    done: Padded<AtomicUsize>,
    arrived: Padded<AtomicUsize>,
    round: Padded<AtomicU64>,
    /// Barriers and jobs that each thread has reached, to name the late ones.
    reached: Vec<Padded<AtomicU64>>,
    poisoned: AtomicBool,
    /// Why; the first panic counts.
    reason: Mutex<Option<String>>,
    /// Thread that panics at the start of the next job, for tests; [`NO_THREAD`] otherwise.
    fault: AtomicUsize,
    stop: AtomicBool,
    waiters: OnceLock<Vec<Waiter>>,
}

const NO_THREAD: usize = usize::MAX;

/// The job under way.
#[derive(Debug)]
struct JobSlot(UnsafeCell<Option<*const Job<'static>>>);

// SAFETY: the leader writes it only while no worker is in a job (module docs), and a job is Sync.
unsafe impl Sync for JobSlot {}
// SAFETY: as above.
unsafe impl Send for JobSlot {}

/// Payload of the unwinding of threads that leave a job because another one panicked in it.
struct LeftPoisoned;

/// One thread's part of a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member<'a> {
    /// Counted from 0, the leader.
    pub thread: usize,
    /// Threads of the team.
    pub n_threads: usize,
    shared: &'a Shared,
}

impl Member<'_> {
    /// Waits until all threads of the team are here. What they wrote before is visible after.
    ///
    /// # Panics
    /// When another thread panicked in the job, or one does not come within the limit.
    pub fn barrier(&self) {
        let shared = self.shared;
        if shared.n_threads == 1 {
            return;
        }
        shared.count_reached(self.thread);
        let round = shared.round.0.load(Ordering::Acquire);
        if shared.arrived.0.fetch_add(1, Ordering::AcqRel) + 1 == shared.n_threads {
            shared.arrived.0.store(0, Ordering::Relaxed);
            shared.round.0.store(round + 1, Ordering::SeqCst);
            shared.wake_others(self.thread);
            return;
        }
        let in_time = shared.waiter(self.thread).wait(shared.patience, || {
            shared.round.0.load(Ordering::Acquire) != round
                || shared.poisoned.load(Ordering::Acquire)
        });
        if shared.round.0.load(Ordering::Acquire) != round {
            return;
        }
        if in_time {
            resume_unwind(Box::new(LeftPoisoned));
        }
        panic!(
            "{} did not come to a barrier of {}",
            shared.late(self.thread),
            shared.name
        );
    }

    /// The part of `0..count` that is this thread's when all get equal parts, in whole multiples of
    /// `multiple`; parts are consecutive.
    pub fn part(&self, count: usize, multiple: usize) -> Range<usize> {
        part_of(count, multiple, self.thread, self.n_threads)
    }
}

/// The part of `0..count` of `thread` of `n_threads`, as [`Member::part`] has it.
pub(crate) fn part_of(
    count: usize,
    multiple: usize,
    thread: usize,
    n_threads: usize,
) -> Range<usize> {
    let units = count.div_ceil(multiple);
    let bound = |thread: usize| (units * thread / n_threads * multiple).min(count);
    bound(thread)..bound(thread + 1)
}

impl Shared {
    fn waiter(&self, thread: usize) -> &Waiter {
        &self.waiters.get().expect("the team is complete")[thread]
    }

    fn wake_others(&self, thread: usize) {
        let waiters = self.waiters.get().expect("the team is complete");
        for (other, waiter) in waiters.iter().enumerate() {
            if other != thread {
                waiter.wake();
            }
        }
    }

    fn count_reached(&self, thread: usize) {
        let reached = &self.reached[thread].0;
        reached.store(reached.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// The threads that are behind `thread`, in words.
    fn late(&self, thread: usize) -> String {
        let reached = |thread: usize| self.reached[thread].0.load(Ordering::Relaxed);
        let mine = reached(thread);
        let late: Vec<String> = (0..self.n_threads)
            .filter(|&other| other != thread && reached(other) < mine)
            .map(|other| format!("thread {other}"))
            .collect();
        late.join(", ")
    }

    fn poison(&self, thread: usize, payload: &(dyn Any + Send)) {
        if !payload.is::<LeftPoisoned>() {
            let reason = format!("thread {thread} of {}: {}", self.name, panic_text(payload));
            let mut first = self
                .reason
                .lock()
                .unwrap_or_else(|broken| broken.into_inner());
            first.get_or_insert(reason);
        }
        self.poisoned.store(true, Ordering::SeqCst);
        self.wake_others(thread);
    }

    fn work(&self, thread: usize, job: &Job<'_>) {
        let member = Member {
            thread,
            n_threads: self.n_threads,
            shared: self,
        };
        let result = catch_unwind(AssertUnwindSafe(|| {
            if self.fault.load(Ordering::Relaxed) == thread {
                self.fault.store(NO_THREAD, Ordering::Relaxed);
                panic!("injected panic");
            }
            job(member);
        }));
        if let Err(payload) = result {
            self.poison(thread, payload.as_ref());
        }
        self.count_reached(thread);
    }
}

/// The words of a panic.
pub(crate) fn panic_text(payload: &(dyn Any + Send)) -> String {
    if let Some(text) = payload.downcast_ref::<&str>() {
        return (*text).to_owned();
    }
    match payload.downcast_ref::<String>() {
        Some(text) => text.clone(),
        None => "a panic without words".to_owned(),
    }
}

/// A team, as its leader has it.
#[derive(Debug)]
pub(crate) struct Team {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Team {
    /// Makes the calling thread the leader of a team of `n_threads`; each other one calls
    /// `prepare` with its number before anything else.
    ///
    /// # Errors
    /// A thread cannot be started, or what `prepare` says.
    pub fn start<E: Send + 'static>(
        name: &str,
        n_threads: usize,
        patience: Patience,
        prepare: impl Fn(usize) -> Result<(), E> + Clone + Send + 'static,
        cannot_start: impl Fn(std::io::Error) -> E,
    ) -> Result<Self, E> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            n_threads,
            patience,
            job: JobSlot(UnsafeCell::new(None)),
            epoch: Padded::default(),
            done: Padded::default(),
            arrived: Padded::default(),
            round: Padded::default(),
            reached: (0..n_threads).map(|_| Padded::default()).collect(),
            poisoned: AtomicBool::new(false),
            reason: Mutex::new(None),
            fault: AtomicUsize::new(NO_THREAD),
            stop: AtomicBool::new(false),
            waiters: OnceLock::new(),
        });
        let mut team = Self {
            shared,
            workers: Vec::with_capacity(n_threads),
        };
        let (tell, told) = sync_channel(n_threads);
        for thread in 1..n_threads {
            let (shared, prepare) = (Arc::clone(&team.shared), prepare.clone());
            let tell = tell.clone();
            let body = move || {
                let prepared = prepare(thread);
                let stop = prepared.is_err();
                // the leader waits for it, or has failed with another thread's error
                let _ = tell.send(prepared);
                if !stop {
                    work_until_stopped(&shared, thread);
                }
            };
            let builder = std::thread::Builder::new().name(format!("{name}-{thread}"));
            team.workers
                .push(builder.spawn(body).map_err(&cannot_start)?);
        }
        for _ in 1..n_threads {
            told.recv().expect("every worker tells")?;
        }
        let workers = team
            .workers
            .iter()
            .map(|worker| Waiter::new(worker.thread().clone()));
        let waiters = std::iter::once(Waiter::current()).chain(workers).collect();
        team.shared.waiters.set(waiters).expect("a new team");
        Ok(team)
    }

    /// Threads, the leader included.
    pub fn n_threads(&self) -> usize {
        self.shared.n_threads
    }

    /// Lets the given thread panic in the next job, for tests.
    pub fn inject_panic(&self, thread: usize) {
        self.shared
            .fault
            .store(thread.min(self.n_threads() - 1), Ordering::Relaxed);
    }

    /// Runs `job` on all threads, the calling leader included, until all have left it.
    ///
    /// # Panics
    /// With the first panic of any thread, once all have left the job.
    pub fn run(&mut self, job: &Job<'_>) {
        self.run_within(self.shared.patience, job);
    }

    /// As [`Team::run`] for jobs that may take any time, such as loading; they have no barriers.
    ///
    /// # Panics
    /// As [`Team::run`].
    pub fn run_long(&mut self, job: &Job<'_>) {
        self.run_within(
            Patience {
                limit: None,
                ..self.shared.patience
            },
            job,
        );
    }

    fn run_within(&mut self, patience: Patience, job: &Job<'_>) {
        let shared = &*self.shared;
        if shared.n_threads > 1 {
            // SAFETY: only the lifetime changes, and the job is not used after this function,
            // which waits for the last worker (module docs).
            let erased: *const Job<'static> =
                unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
            shared.done.0.store(0, Ordering::Relaxed);
            // SAFETY: all workers are between jobs.
            unsafe { *shared.job.0.get() = Some(erased) };
            shared.epoch.0.fetch_add(1, Ordering::SeqCst);
            shared.wake_others(0);
        }
        shared.work(0, job);
        if shared.n_threads > 1 {
            self.wait_for_workers(patience);
        }
        if shared.poisoned.load(Ordering::Acquire) {
            shared.arrived.0.store(0, Ordering::Relaxed);
            shared.poisoned.store(false, Ordering::Relaxed);
            let mut reason = shared
                .reason
                .lock()
                .unwrap_or_else(|broken| broken.into_inner());
            let reason = reason.take().unwrap_or_default();
            resume_unwind(Box::new(reason));
        }
    }

    /// A worker that stays in a job for ever holds the job's borrows, so there is no way on: after
    /// the limit the process ends, saying who is late.
    fn wait_for_workers(&self, patience: Patience) {
        let shared = &*self.shared;
        let all_done = || shared.done.0.load(Ordering::Acquire) == shared.n_threads - 1;
        if !shared.waiter(0).wait(patience, all_done) {
            let late = shared.late(0);
            eprintln!(
                "error: {late} of {} does not finish its work: giving up",
                shared.name
            );
            std::process::abort();
        }
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.0.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // it has caught its panics
            let _ = worker.join();
        }
    }
}

fn work_until_stopped(shared: &Shared, thread: usize) {
    let me = Waiter::current();
    let mut epoch = 0;
    // until the leader has published the waiters, nobody wakes this thread but the clock
    let patience = Patience {
        limit: Some(Duration::from_millis(1)),
        ..shared.patience
    };
    while shared.waiters.get().is_none() && !shared.stop.load(Ordering::Acquire) {
        me.wait(patience, || {
            shared.waiters.get().is_some() || shared.stop.load(Ordering::Acquire)
        });
    }
    let forever = Patience {
        limit: None,
        ..shared.patience
    };
    while !shared.stop.load(Ordering::Acquire) {
        let waiter = shared.waiter(thread);
        waiter.wait(forever, || shared.epoch.0.load(Ordering::Acquire) != epoch);
        epoch += 1;
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: the epoch was raised after the job was written, and the leader keeps it until
        // this thread has counted itself in `done`.
        let job = unsafe { (*shared.job.0.get()).map(|job| &*job) };
        if let Some(job) = job {
            shared.work(thread, job);
        }
        shared.done.0.fetch_add(1, Ordering::SeqCst);
        shared.waiter(0).wake();
    }
}

/// Runs `work` for tokens `0..n_tokens`: one on this thread, many on all of the team.
pub(crate) fn for_tokens(team: &mut Team, n_tokens: usize, work: impl Fn(usize) + Sync) {
    if n_tokens == 1 {
        return work(0);
    }
    team.run(&|member| member.part(n_tokens, 1).for_each(&work));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::SPIN;

    fn team(n_threads: usize, spin: Duration) -> Team {
        let patience = Patience {
            spin,
            limit: Some(Duration::from_secs(60)),
        };
        Team::start("test", n_threads, patience, |_| Ok::<(), ()>(()), |_| ()).unwrap()
    }

    #[test]
    fn every_thread_takes_part_and_barriers_order_their_writes() {
        for (n_threads, spin) in [(1, SPIN), (2, SPIN), (4, Duration::ZERO)] {
            let mut team = team(n_threads, spin);
            let cells: Vec<AtomicUsize> = (0..n_threads).map(|_| AtomicUsize::new(0)).collect();
            for round in 1..=200 {
                team.run(&|member| {
                    cells[member.thread].store(round, Ordering::Relaxed);
                    member.barrier();
                    assert!(
                        cells
                            .iter()
                            .all(|cell| cell.load(Ordering::Relaxed) == round)
                    );
                    member.barrier();
                });
            }
        }
    }

    #[test]
    fn a_panic_of_any_thread_reaches_the_leader_and_the_team_goes_on() {
        let mut team = team(3, SPIN);
        for culprit in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(&|member| {
                    assert_ne!(member.thread, culprit, "culprit {culprit}");
                    member.barrier();
                });
            }));
            let words = panic_text(result.unwrap_err().as_ref());
            assert!(
                words.contains(&format!("thread {culprit} of test")),
                "{words}"
            );
            let count = AtomicUsize::new(0);
            team.run(&|member| {
                member.barrier();
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.into_inner(), 3);
        }
    }

    #[test]
    fn parts_cover_everything_once_in_whole_multiples() {
        let mut team = team(3, SPIN);
        for (count, multiple) in [(0, 16), (5, 16), (576, 16), (577, 16), (48, 16), (7, 1)] {
            let parts = Mutex::new(vec![0..0; 3]);
            team.run(&|member| {
                parts.lock().unwrap()[member.thread] = member.part(count, multiple);
            });
            let parts = parts.into_inner().unwrap();
            assert_eq!((parts[0].start, parts[2].end), (0, count));
            for (a, b) in parts.iter().zip(&parts[1..]) {
                assert!(a.end == b.start && (a.end % multiple == 0 || a.end == count));
            }
        }
    }

    #[test]
    fn a_team_whose_thread_cannot_be_prepared_is_an_error() {
        let patience = Patience {
            spin: SPIN,
            limit: None,
        };
        let prepare = |thread| if thread == 2 { Err("no cpu") } else { Ok(()) };
        let error = Team::start("test", 3, patience, prepare, |_| "spawn").unwrap_err();
        assert_eq!(error, "no cpu");
    }
}
