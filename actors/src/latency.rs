//! What the actors' ways of working together cost on a machine: a team's fork and join, a message between two executors,
//! and joining what several nodes have summed.

use std::hint::black_box;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use pi_kernels::ffn_sparse::{FFN_GROUPS, join_subtrees};
use pi_topology::{NodePlan, pin_thread};

use crate::error::ActorError;
use crate::mailbox::mailbox;
use crate::teams::{TEAM_LIMIT, start_team};
use crate::wait::{Patience, SPIN};

/// Rounds before anything counts: caches, clocks and branches settle.
const N_WARM_UP: usize = 1000;

/// How long something takes, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latency {
    /// Half of the rounds take no longer.
    pub median_ns: u64,
    /// 99 of 100 rounds take no longer.
    pub p99_ns: u64,
}

impl Latency {
    /// Of rounds that took so long.
    ///
    /// # Panics
    /// Without rounds.
    pub fn of(mut rounds_ns: Vec<u64>) -> Self {
        rounds_ns.sort_unstable();
        let at = |percent: usize| rounds_ns[(rounds_ns.len() - 1) * percent / 100];
        Self {
            median_ns: at(50),
            p99_ns: at(99),
        }
    }
}

const PATIENCE: Patience = Patience {
    spin: SPIN,
    limit: Some(TEAM_LIMIT),
};

/// How long a job without work takes a team of the threads of `node`: from the leader's call to its return, one job
/// after the other, `n_rounds` of them.
///
/// # Errors
/// A thread cannot be started or pinned.
///
/// # Panics
/// With 0 rounds.
pub fn fork_join(node: &NodePlan, n_rounds: usize) -> Result<Latency, ActorError> {
    assert!(n_rounds > 0, "a round");
    // the leader is pinned, which the caller's thread must not be
    on_a_thread(|| {
        let mut team = start_team(0, node, PATIENCE)?;
        let mut round = || {
            let start = Instant::now();
            team.run(&|member| {
                black_box(member.thread);
            });
            nanoseconds(start.elapsed())
        };
        (0..N_WARM_UP).for_each(|_| {
            round();
        });
        Ok(Latency::of((0..n_rounds).map(|_| round()).collect()))
    })
}

/// How long the leader of `node`'s team takes to join `n_sums` partial sums of an FFN, `[width]` f32 each, as for a token on so
/// many equal nodes: `n_rounds` times. Another thread of the team, if it has one, has just written them, as another node's
/// would.
///
/// # Errors
/// A thread cannot be started or pinned.
///
/// # Panics
/// With 0 rounds, or when so many nodes cannot be equal.
pub fn join(
    node: &NodePlan,
    n_sums: usize,
    width: usize,
    n_rounds: usize,
) -> Result<Latency, ActorError> {
    assert!(n_rounds > 0, "a round");
    assert!(
        n_sums > 0 && FFN_GROUPS.is_multiple_of(n_sums),
        "{n_sums} equal nodes"
    );
    on_a_thread(|| {
        let mut team = start_team(0, node, PATIENCE)?;
        let n_groups = FFN_GROUPS / n_sums;
        let subtrees: Vec<Range<usize>> = (0..n_sums)
            .map(|n| n * n_groups..(n + 1) * n_groups)
            .collect();
        let sums = Mutex::new(vec![vec![0.0f32; width]; n_sums]);
        let mut joined = vec![0.0f32; width];
        let mut round = || {
            team.run(&|member| {
                if member.thread + 1 == member.n_threads {
                    let mut sums = sums.lock().expect("nobody panics with it");
                    sums.iter_mut().for_each(|sum| sum.fill(black_box(1.0)));
                }
            });
            let sums = sums.lock().expect("nobody panics with it");
            let start = Instant::now();
            join_subtrees(&subtrees, |n| &sums[n], &mut joined);
            black_box(&joined);
            nanoseconds(start.elapsed())
        };
        (0..N_WARM_UP).for_each(|_| {
            round();
        });
        Ok(Latency::of((0..n_rounds).map(|_| round()).collect()))
    })
}

/// How long a message takes from a thread on CPU `from` to one on CPU `to` that spins for it: half of the way there and
/// back, `n_rounds` times.
///
/// # Errors
/// A thread cannot be started or pinned.
///
/// # Panics
/// With 0 rounds.
pub fn hop(from: usize, to: usize, n_rounds: usize) -> Result<Latency, ActorError> {
    assert!(n_rounds > 0, "a round");
    let (to_echo, mut for_echo) = mailbox(1, || 0u64);
    let (to_sender, mut for_sender) = mailbox(1, || 0u64);
    let (tell, told) = sync_channel(1);
    std::thread::scope(|scope| {
        let echo = std::thread::Builder::new().name("hop-echo".to_owned());
        let echo = echo.spawn_scoped(scope, move || {
            let pinned = pin_thread(to);
            let failed = pinned.is_err();
            // the sender waits for it
            let _ = tell.send(pinned);
            if failed {
                return;
            }
            // 0 ends it; so does a sender that is gone for so long
            while let Some(message @ 1..) = for_echo.receive(PATIENCE) {
                if to_sender.send(message).is_err() {
                    return;
                }
            }
        });
        echo.map_err(|source| ActorError::Thread { node: 0, source })?;
        on_a_thread(move || {
            let ready = told.recv().map_err(|_| ActorError::Gone)?;
            ready?;
            let measured = pin_thread(from).map_err(ActorError::from).and_then(|()| {
                let mut round = || {
                    let start = Instant::now();
                    to_echo.send(1).map_err(|_| ActorError::Gone)?;
                    for_sender.receive(PATIENCE).ok_or(ActorError::Gone)?;
                    Ok(nanoseconds(start.elapsed()) / 2)
                };
                for _ in 0..N_WARM_UP {
                    round()?;
                }
                let rounds: Result<Vec<u64>, ActorError> = (0..n_rounds).map(|_| round()).collect();
                Ok(Latency::of(rounds?))
            });
            // an echo that is gone needs no end
            let _ = to_echo.send(0);
            measured
        })
    })
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Runs `work` on a thread of its own.
fn on_a_thread<T: Send>(
    work: impl FnOnce() -> Result<T, ActorError> + Send,
) -> Result<T, ActorError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("measure".to_owned());
        let thread = thread
            .spawn_scoped(scope, work)
            .map_err(|source| ActorError::Thread { node: 0, source })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use pi_topology::Machine;

    fn cpus() -> Vec<usize> {
        let machine = Machine::discover().unwrap();
        let cores = machine.nodes.iter().flat_map(|node| &node.cores);
        cores.flat_map(|core| core.cpus.clone()).collect()
    }

    #[test]
    fn rounds_are_counted_from_the_fastest() {
        let latency = Latency::of((1..=200).rev().collect());
        assert_eq!((latency.median_ns, latency.p99_ns), (100, 198));
        let one = Latency::of(vec![7]);
        assert_eq!((one.median_ns, one.p99_ns), (7, 7));
    }

    #[test]
    fn a_team_of_any_size_is_measured() {
        for cpus in [cpus()[..1].to_vec(), cpus()] {
            let node = NodePlan { numa: None, cpus };
            let latency = fork_join(&node, 100).unwrap();
            assert!(0 < latency.median_ns && latency.median_ns <= latency.p99_ns);
        }
    }

    #[test]
    fn joining_any_number_of_sums_is_measured() {
        for cpus in [cpus()[..1].to_vec(), cpus()] {
            let node = NodePlan { numa: None, cpus };
            for n_sums in [1, 2, 16] {
                let latency = join(&node, n_sums, 1000, 50).unwrap();
                assert!(0 < latency.median_ns && latency.median_ns <= latency.p99_ns);
            }
        }
    }

    #[test]
    fn messages_between_any_two_cpus_are_measured() {
        let cpus = cpus();
        let latency = hop(cpus[0], cpus[cpus.len() - 1], 100).unwrap();
        assert!(0 < latency.median_ns && latency.median_ns <= latency.p99_ns);
    }

    #[test]
    fn a_cpu_that_is_not_there_is_an_error() {
        let (there, missing) = (cpus()[0], 1 << 20);
        let node = NodePlan {
            numa: None,
            cpus: vec![there, missing],
        };
        for error in [
            fork_join(&node, 1).unwrap_err(),
            hop(there, missing, 1).unwrap_err(),
            hop(missing, there, 1).unwrap_err(),
        ] {
            assert!(error.to_string().contains("1048576"), "{error}");
        }
    }
}
