//! What the planned threads can read from memory at best.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, yield_now};
use std::time::{Duration, Instant};

use crate::arena::Arena;
use crate::config::HugePages;
use crate::error::TopologyError;
use crate::memory::available_memory_bytes;
use crate::pin::pin_thread;
use crate::plan::Plan;

/// Bytes read per pass where there is memory for it: far more than any cache.
const BUFFER_BYTES: usize = 1 << 30;

/// Fewest bytes for a measurement that says something.
const BUFFER_BYTES_MIN: usize = 256 << 20;

/// Passes of which the best counts.
const N_PASSES: usize = 5;

/// Value of the pass counter that sends threads home.
const STOP: usize = usize::MAX;

/// Spins between two looks at whether another thread wants the CPU.
const SPINS_PER_YIELD: usize = 1000;

/// Bytes per second that the plan's threads, pinned to their CPUs, read together from memory on
/// their nodes: the best of five passes over 1 GiB (less where memory is short).
///
/// Takes about half a second, and needs the optimisation of a release build to say something.
///
/// # Errors
/// There is not even 256 MiB of memory, or a thread cannot be started or pinned.
pub fn read_bandwidth(plan: &Plan) -> Result<f64, TopologyError> {
    let bytes = buffer_bytes(available_memory_bytes())?;
    measure(plan, bytes, N_PASSES)
}

/// Bytes to read, of the memory that is available.
fn buffer_bytes(available_bytes: Option<u64>) -> Result<usize, TopologyError> {
    // A quarter is left to others.
    let bytes = available_bytes.map_or(BUFFER_BYTES, |available_bytes| {
        usize::try_from(available_bytes / 4 * 3).unwrap_or(BUFFER_BYTES)
    });
    if bytes < BUFFER_BYTES_MIN {
        return Err(TopologyError::NotEnoughMemory {
            purpose: "measuring the memory bandwidth",
            bytes: BUFFER_BYTES_MIN as u64,
            available_bytes: available_bytes.unwrap_or(0),
        });
    }
    Ok(bytes.min(BUFFER_BYTES))
}

/// What a thread tells the one that waits for it.
enum Report {
    /// Its part of the buffer is ready.
    Ready(Result<(), TopologyError>),
    /// It has read its part.
    Pass { start: Instant, end: Instant },
}

fn measure(plan: &Plan, bytes: usize, n_passes: usize) -> Result<f64, TopologyError> {
    let n_threads = plan.n_threads();
    let part_bytes = bytes / n_threads.max(1);
    let pass = AtomicUsize::new(0);
    // No thread reports again before all reports of the pass before are taken.
    let (sender, receiver) = sync_channel(n_threads);
    std::thread::scope(|scope| {
        // Whatever happens, no thread may be left waiting.
        let _stop = StopOnDrop(&pass);
        for node in &plan.nodes {
            for &cpu in &node.cpus {
                let (sender, pass) = (sender.clone(), &pass);
                let memory = (node.numa, plan.huge_pages);
                Builder::new()
                    .name(format!("measure-{cpu}"))
                    .spawn_scoped(scope, move || read(cpu, part_bytes, memory, pass, &sender))
                    .map_err(|source| TopologyError::Thread { source })?;
            }
        }
        drop(sender);
        for _ in 0..n_threads {
            if let Ok(Report::Ready(ready)) = receiver.recv() {
                ready?;
            }
        }
        let mut best_bytes_per_second: f64 = 0.0;
        for number in 1..=n_passes {
            pass.store(number, Ordering::Release);
            let elapsed = pass_time(&receiver, n_threads).as_secs_f64();
            let bytes_per_second = (part_bytes * n_threads) as f64 / elapsed;
            best_bytes_per_second = best_bytes_per_second.max(bytes_per_second);
        }
        Ok(best_bytes_per_second)
    })
}

struct StopOnDrop<'a>(&'a AtomicUsize);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(STOP, Ordering::Release);
    }
}

/// From the first start to the last end.
fn pass_time(receiver: &Receiver<Report>, n_threads: usize) -> Duration {
    let reports: Vec<(Instant, Instant)> = (0..n_threads)
        .filter_map(|_| match receiver.recv() {
            Ok(Report::Pass { start, end }) => Some((start, end)),
            _ => None,
        })
        .collect();
    let start = reports.iter().map(|(start, _)| *start).min();
    let end = reports.iter().map(|(_, end)| *end).max();
    match (start, end) {
        (Some(start), Some(end)) => end - start,
        _ => Duration::MAX,
    }
}

/// One thread: prepares its part, then reads it whenever the pass counter moves on.
fn read(
    cpu: usize,
    bytes: usize,
    (numa, huge_pages): (Option<usize>, HugePages),
    pass: &AtomicUsize,
    reports: &SyncSender<Report>,
) {
    let prepared = pin_thread(cpu).and_then(|()| Arena::new(bytes, numa, huge_pages));
    let mut arena = match prepared {
        Ok(arena) => arena,
        Err(error) => {
            // Nobody listens once another thread has failed.
            let _ = reports.send(Report::Ready(Err(error)));
            return;
        }
    };
    // Written, not just read: unwritten pages are all one page of zeros in the cache.
    arena.as_mut_slice().fill(1);
    let _ = reports.send(Report::Ready(Ok(())));
    let mut done = 0;
    loop {
        done = wait_for_next(pass, done);
        if done == STOP {
            return;
        }
        let start = Instant::now();
        black_box(sum_words(black_box(arena.as_slice())));
        let end = Instant::now();
        let _ = reports.send(Report::Pass { start, end });
    }
}

/// Spins until the pass counter is no longer `done`, and returns it.
fn wait_for_next(pass: &AtomicUsize, done: usize) -> usize {
    loop {
        for _ in 0..SPINS_PER_YIELD {
            let number = pass.load(Ordering::Acquire);
            if number != done {
                return number;
            }
            spin_loop();
        }
        // Teams that share a CPU need it for others.
        yield_now();
    }
}

/// Words added up side by side, which makes sums of independent vector loads.
const N_LANES: usize = 32;

/// Sum of all 64-bit words; bytes after the last full group of words are added as they are.
fn sum_words(bytes: &[u8]) -> u64 {
    // 16-byte loads leave an eighth of one thread's bandwidth unused.
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 has just been detected.
        return unsafe { sum_words_avx2(bytes) };
    }
    sum_lanes(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_words_avx2(bytes: &[u8]) -> u64 {
    sum_lanes(bytes)
}

#[inline(always)]
fn sum_lanes(bytes: &[u8]) -> u64 {
    let mut sums = [0u64; N_LANES];
    let (groups, rest) = bytes.as_chunks::<{ 8 * N_LANES }>();
    for group in groups {
        let (words, _) = group.as_chunks::<8>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum = sum.wrapping_add(u64::from_ne_bytes(*word));
        }
    }
    let rest = rest
        .iter()
        .fold(0u64, |sum, &byte| sum.wrapping_add(byte.into()));
    sums.into_iter().fold(rest, u64::wrapping_add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::TopologyConfig;
    use crate::machine::Machine;
    use crate::plan::NodePlan;

    #[test]
    fn every_byte_is_read() {
        for n_bytes in [0, 1, 255, 256, 257, 4096 + 13] {
            let mut bytes = vec![0u8; n_bytes];
            let mut expected = 0u64;
            assert_eq!(sum_words(&bytes), 0);
            for index in 0..n_bytes {
                bytes[index] = 1;
                let word_index = index % 8;
                expected = expected.wrapping_add(match index < n_bytes / 256 * 256 {
                    true => u64::from_ne_bytes(std::array::from_fn(|i| (i == word_index).into())),
                    false => 1,
                });
            }
            assert_eq!(sum_words(&bytes), expected);
            assert_eq!(sum_lanes(&bytes), expected);
        }
    }

    #[test]
    fn the_plans_threads_read_memory() {
        let machine = Machine::discover().unwrap();
        let plan = Plan::new(&TopologyConfig::default(), &machine, None).unwrap();
        let bytes_per_second = measure(&plan, 64 << 20, 2).unwrap();
        assert!(
            (1e8..1e13).contains(&bytes_per_second),
            "{bytes_per_second} bytes per second"
        );
    }

    #[test]
    fn teams_that_share_a_cpu_can_be_measured() {
        let cpu = Machine::discover().unwrap().cpus()[0];
        let node = NodePlan {
            numa: None,
            cpus: vec![cpu, cpu],
        };
        let plan = Plan::of_nodes(vec![node.clone(), node], HugePages::Try);
        assert!(measure(&plan, 16 << 20, 2).unwrap() > 1e7);
    }

    #[test]
    fn one_thread_that_fails_ends_the_others() {
        let cpu = Machine::discover().unwrap().cpus()[0];
        let plan = Plan::of_nodes(
            vec![NodePlan {
                numa: None,
                cpus: vec![cpu, 1 << 20, cpu],
            }],
            HugePages::Off,
        );
        let error = measure(&plan, 1 << 20, 2).unwrap_err();
        assert!(
            matches!(error, TopologyError::Pin { cpu: 1_048_576, .. }),
            "{error}"
        );
    }

    #[test]
    fn the_buffer_fits_the_memory() {
        assert_eq!(buffer_bytes(None).unwrap(), 1 << 30);
        assert_eq!(buffer_bytes(Some(1 << 40)).unwrap(), 1 << 30);
        assert_eq!(buffer_bytes(Some(800 << 20)).unwrap(), 600 << 20);
        let error = buffer_bytes(Some(300 << 20)).unwrap_err();
        assert!(error.is_environment());
        assert_eq!(
            error.to_string(),
            "measuring the memory bandwidth needs 268435456 bytes of memory, but 314572800 are available: close other programs, raise the memory limit, or use a smaller model or context"
        );
    }
}
