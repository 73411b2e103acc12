//! Pinned threads that read memory together, pass after pass, and how fast.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{Builder, yield_now};
use std::time::{Duration, Instant};

use crate::arena::Arena;
use crate::config::HugePages;
use crate::error::TopologyError;
use crate::pin::pin_thread;
use crate::plan::Plan;

/// Value of the pass counter that sends threads home.
const STOP: usize = usize::MAX;

/// Spins between two looks at whether another thread wants the CPU.
const SPINS_PER_YIELD: usize = 1000;

/// Of a thread's part, the share that a pass over random rows reads: 1 in so many rows.
const ROWS_SKIPPED: usize = 4;

/// A thread that reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reader {
    /// Logical CPU that it is pinned to.
    pub cpu: usize,
    /// NUMA node whose memory it reads; none: where the system puts it.
    pub numa: Option<usize>,
    /// Whether memory that cannot be bound there is an error.
    pub strict: bool,
}

impl Reader {
    /// The threads of a plan, each with memory of its node.
    pub fn of_plan(plan: &Plan) -> Vec<Self> {
        let nodes = plan.nodes.iter();
        let readers = nodes.flat_map(|node| {
            node.cpus.iter().map(|&cpu| Self {
                cpu,
                numa: node.numa,
                strict: false,
            })
        });
        readers.collect()
    }
}

/// What of its memory a thread reads in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pattern {
    /// All of it, from start to end.
    Whole,
    /// A quarter of its rows of so many bytes, in random order.
    Rows {
        /// Bytes of a row.
        row_bytes: usize,
    },
}

impl Pattern {
    /// Reads, and returns the sum of what was read and its bytes.
    fn read(self, bytes: &[u8]) -> (u64, usize) {
        let row_bytes = match self {
            Self::Whole => return (sum_words(bytes), bytes.len()),
            Self::Rows { row_bytes } => row_bytes,
        };
        let n_rows = bytes.len() / row_bytes;
        let n_read = n_rows / ROWS_SKIPPED;
        let mut random = 0x9e37_79b9_7f4a_7c15u64;
        let mut sum = 0u64;
        for _ in 0..n_read {
            // xorshift64: one register, far faster than the memory
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            let row = ((u128::from(random) * n_rows as u128) >> 64) as usize;
            sum = sum.wrapping_add(sum_words(&bytes[row * row_bytes..][..row_bytes]));
        }
        (sum, n_read * row_bytes)
    }
}

/// Bytes per second that `readers` read together by each of `patterns`, of `bytes` that they have together: the best of
/// `n_passes`.
///
/// # Errors
/// A thread cannot be started or pinned, or there is no memory for it.
pub(super) fn speeds(
    readers: &[Reader],
    huge_pages: HugePages,
    bytes: usize,
    patterns: &[Pattern],
    n_passes: usize,
) -> Result<Vec<f64>, TopologyError> {
    let n_threads = readers.len();
    let part_bytes = bytes / n_threads.max(1);
    let pass = AtomicUsize::new(0);
    // No thread reports again before all reports of the pass before are taken.
    let (sender, receiver) = sync_channel(n_threads);
    std::thread::scope(|scope| {
        // Whatever happens, no thread may be left waiting.
        let _stop = StopOnDrop(&pass);
        for reader in readers {
            let (sender, pass) = (sender.clone(), &pass);
            let work = Work {
                reader,
                bytes: part_bytes,
                huge_pages,
                patterns,
                n_passes,
            };
            Builder::new()
                .name(format!("measure-{}", reader.cpu))
                .spawn_scoped(scope, move || read(&work, pass, &sender))
                .map_err(|source| TopologyError::Thread { source })?;
        }
        drop(sender);
        for _ in 0..n_threads {
            if let Ok(Report::Ready(ready)) = receiver.recv() {
                ready?;
            }
        }
        let mut best_bytes_per_second = vec![0.0f64; patterns.len()];
        for number in 0..n_passes * patterns.len() {
            pass.store(number + 1, Ordering::Release);
            let (elapsed, read_bytes) = pass_time(&receiver, n_threads);
            let bytes_per_second = read_bytes as f64 / elapsed.as_secs_f64();
            let best = &mut best_bytes_per_second[number / n_passes];
            *best = best.max(bytes_per_second);
        }
        Ok(best_bytes_per_second)
    })
}

/// What a thread tells the one that waits for it.
enum Report {
    /// Its part of the buffer is ready.
    Ready(Result<(), TopologyError>),
    /// It has read so much.
    Pass {
        start: Instant,
        end: Instant,
        bytes: usize,
    },
}

struct StopOnDrop<'a>(&'a AtomicUsize);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(STOP, Ordering::Release);
    }
}

/// From the first start to the last end, and what was read meanwhile.
fn pass_time(receiver: &Receiver<Report>, n_threads: usize) -> (Duration, usize) {
    let reports: Vec<(Instant, Instant, usize)> = (0..n_threads)
        .filter_map(|_| match receiver.recv() {
            Ok(Report::Pass { start, end, bytes }) => Some((start, end, bytes)),
            _ => None,
        })
        .collect();
    let start = reports.iter().map(|(start, ..)| *start).min();
    let end = reports.iter().map(|(_, end, _)| *end).max();
    let bytes = reports.iter().map(|(.., bytes)| bytes).sum();
    match (start, end) {
        (Some(start), Some(end)) => (end - start, bytes),
        _ => (Duration::MAX, bytes),
    }
}

/// What one thread has to do.
struct Work<'a> {
    reader: &'a Reader,
    bytes: usize,
    huge_pages: HugePages,
    patterns: &'a [Pattern],
    n_passes: usize,
}

/// One thread: prepares its part, then reads it whenever the pass counter moves on.
fn read(work: &Work<'_>, pass: &AtomicUsize, reports: &SyncSender<Report>) {
    let Reader { cpu, numa, strict } = work.reader;
    let prepared = pin_thread(*cpu)
        .and_then(|()| Arena::on(work.bytes, numa.as_slice(), work.huge_pages, *strict));
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
        let pattern = work.patterns[(done - 1) / work.n_passes];
        let start = Instant::now();
        let (sum, bytes) = pattern.read(black_box(arena.as_slice()));
        black_box(sum);
        let end = Instant::now();
        let _ = reports.send(Report::Pass { start, end, bytes });
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
    fn a_quarter_of_the_rows_is_read() {
        let bytes = vec![1u8; 4096 * 64 + 100];
        let (sum, read_bytes) = Pattern::Rows { row_bytes: 4096 }.read(&bytes);
        assert_eq!(read_bytes, 16 * 4096);
        let ones = u64::from_ne_bytes([1; 8]);
        assert_eq!(sum, ones.wrapping_mul(16 * 4096 / 8));
        // memory that has no row is none to read
        assert_eq!(
            Pattern::Rows { row_bytes: 4096 }.read(&bytes[..4000]),
            (0, 0)
        );
        assert_eq!(Pattern::Whole.read(&bytes).1, bytes.len());
    }

    fn on_cpu(cpu: usize) -> Reader {
        Reader {
            cpu,
            numa: None,
            strict: false,
        }
    }

    #[test]
    fn threads_read_memory_in_every_way() {
        let machine = Machine::discover().unwrap();
        let plan = Plan::new(&TopologyConfig::default(), &machine, None).unwrap();
        let patterns = [Pattern::Whole, Pattern::Rows { row_bytes: 1000 }];
        let readers = Reader::of_plan(&plan);
        let found = speeds(&readers, HugePages::Try, 64 << 20, &patterns, 2).unwrap();
        assert_eq!(found.len(), 2);
        for bytes_per_second in found {
            assert!(
                (1e7..1e13).contains(&bytes_per_second),
                "{bytes_per_second} bytes per second"
            );
        }
    }

    #[test]
    fn threads_that_share_a_cpu_can_be_measured() {
        let cpu = Machine::discover().unwrap().cpus()[0];
        let readers = vec![on_cpu(cpu); 4];
        let found = speeds(&readers, HugePages::Try, 16 << 20, &[Pattern::Whole], 2).unwrap();
        assert!(found[0] > 1e7);
    }

    #[test]
    fn one_thread_that_fails_ends_the_others() {
        let cpu = Machine::discover().unwrap().cpus()[0];
        let readers = [on_cpu(cpu), on_cpu(1 << 20), on_cpu(cpu)];
        let error = speeds(&readers, HugePages::Off, 1 << 20, &[Pattern::Whole], 2).unwrap_err();
        assert!(
            matches!(error, TopologyError::Pin { cpu: 1_048_576, .. }),
            "{error}"
        );
    }
}
