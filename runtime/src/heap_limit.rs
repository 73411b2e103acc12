//! A bound on the memory of one piece of work, such as rendering a template that a file brought.
//!
//! [`LimitedHeap`] is the program's allocator: the system's, which also counts what a thread holds
//! while [`run_limited`] works on it. An allocator can neither unwind nor report an error that a
//! library would handle, so a thread that wants more than it may have sleeps from then on; whoever
//! waits for it hears why and goes on. Thread, stack and memory are lost, at most the limit each time,
//! and so is a processor where work neither ends nor allocates: callers must not let the same input
//! try again, and the work must hold no lock that others need.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Stack of the working thread, taken page by page as it is used: values nested as deep as the
/// fuel of a template allows must be printed and dropped on it.
const STACK_BYTES: usize = 256 << 20;

/// How often the waiting side looks whether the worker still works.
const LOOK: Duration = Duration::from_millis(5);

/// Why a piece of work has no result.
#[derive(Debug)]
pub enum Unfinished {
    /// It wanted more memory than it may have.
    Memory,
    /// It took longer than it may.
    Time,
    /// It panicked, with these words.
    Panic(String),
    /// Its thread could not be started.
    Thread(std::io::Error),
}

/// What a worker may take, and what became of it.
struct Limit {
    bytes: usize,
    exceeded: AtomicBool,
    /// Nobody waits any more.
    given_up: AtomicBool,
}

thread_local! {
    /// The limit of the thread's work; null where there is none.
    static LIMIT: Cell<*const Limit> = const { Cell::new(std::ptr::null()) };
    /// Bytes that the work holds.
    static HELD: Cell<usize> = const { Cell::new(0) };
}

/// The system's allocator with limits for [`run_limited`]. Where it is not the program's, work has
/// no limit on memory.
#[derive(Debug, Clone, Copy)]
pub struct LimitedHeap;

/// Counts `bytes` more for the thread's work, or stops it.
#[inline]
fn take(bytes: usize) {
    // fails while the thread ends: its work has ended before
    let limit = LIMIT.try_with(Cell::get).unwrap_or(std::ptr::null());
    if !limit.is_null() {
        take_limited(limit, bytes);
    }
}

#[cold]
fn take_limited(limit: *const Limit, bytes: usize) {
    // SAFETY: `run_limited` keeps it alive until it has set the pointer back to null.
    let limit = unsafe { &*limit };
    // a panic is reported under locks that other threads need
    if std::thread::panicking() {
        return;
    }
    let held = HELD.get().saturating_add(bytes);
    if held > limit.bytes || limit.given_up.load(Ordering::Relaxed) {
        limit.exceeded.store(true, Ordering::Release);
        loop {
            std::thread::sleep(Duration::from_secs(3600));
        }
    }
    HELD.set(held);
}

/// Counts `bytes` less; what another thread allocated was never counted here.
#[inline]
fn give(bytes: usize) {
    let limit = LIMIT.try_with(Cell::get).unwrap_or(std::ptr::null());
    if !limit.is_null() {
        HELD.set(HELD.get().saturating_sub(bytes));
    }
}

// SAFETY: every call goes to `System` unchanged; the counters are plain thread-local numbers without
// a destructor, which no allocation is needed for.
unsafe impl GlobalAlloc for LimitedHeap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, new_bytes: usize) -> *mut u8 {
        if new_bytes > layout.size() {
            take(new_bytes - layout.size());
        } else {
            give(layout.size() - new_bytes);
        }
        // SAFETY: `pointer` came from `System` with this `layout`.
        unsafe { System.realloc(pointer, layout, new_bytes) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        give(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Does `work` on a thread of its own and waits for it: it may hold `bytes` of memory at once and
/// take as long as `patience`.
///
/// # Errors
/// It wants more, takes longer, panics, or its thread cannot be started.
pub fn run_limited<T: Send + 'static>(
    bytes: usize,
    patience: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unfinished> {
    let limit = Arc::new(Limit {
        bytes,
        exceeded: AtomicBool::new(false),
        given_up: AtomicBool::new(false),
    });
    let (done, answer) = sync_channel(1);
    let own = Arc::clone(&limit);
    let worker = move || {
        HELD.set(0);
        LIMIT.set(Arc::as_ptr(&own));
        let result = catch_unwind(AssertUnwindSafe(work));
        LIMIT.set(std::ptr::null());
        // whoever waited may have given up
        let _ = done.send(result.map_err(|panic| panic_text(panic.as_ref())));
    };
    std::thread::Builder::new()
        .name("pi-limited".into())
        .stack_size(STACK_BYTES)
        .spawn(worker)
        .map_err(Unfinished::Thread)?;
    let start = Instant::now();
    loop {
        match answer.recv_timeout(LOOK) {
            Ok(result) => return result.map_err(Unfinished::Panic),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Unfinished::Panic("its thread ended".into()));
            }
            Err(RecvTimeoutError::Timeout) if limit.exceeded.load(Ordering::Acquire) => {
                return Err(Unfinished::Memory);
            }
            Err(RecvTimeoutError::Timeout) if start.elapsed() > patience => {
                limit.given_up.store(true, Ordering::Relaxed);
                return Err(Unfinished::Time);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no words".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn work_within_its_limit_has_a_result() {
        let sum = run_limited(1 << 20, MINUTE, || {
            // far more than the limit, but never at once
            (0..1000u64).map(|n| vec![n; 10_000][9_999]).sum::<u64>()
        });
        assert_eq!(sum.unwrap(), 499_500);
    }

    #[test]
    fn whoever_wants_more_at_once_is_stopped() {
        let grows = || {
            let mut all = Vec::new();
            loop {
                all.push(vec![0u8; 1000]);
            }
        };
        assert!(matches!(
            run_limited::<()>(1 << 20, MINUTE, grows),
            Err(Unfinished::Memory)
        ));
        let one = || vec![0u8; 1 << 40].len();
        assert!(matches!(
            run_limited(1 << 20, MINUTE, one),
            Err(Unfinished::Memory)
        ));
        let mut text = String::from("x");
        let doubles = move || loop {
            text.push_str(&text.clone());
        };
        assert!(matches!(
            run_limited::<()>(1 << 20, MINUTE, doubles),
            Err(Unfinished::Memory)
        ));
    }

    #[test]
    fn endless_work_and_panics_are_told_apart() {
        let endless = || loop {
            std::hint::black_box(vec![0u8; 10]);
        };
        let late = run_limited::<()>(1 << 20, Duration::from_millis(20), endless);
        assert!(matches!(late, Err(Unfinished::Time)));
        let panics = run_limited::<()>(1 << 20, MINUTE, || panic!("no way"));
        assert!(matches!(panics, Err(Unfinished::Panic(words)) if words == "no way"));
    }
}
