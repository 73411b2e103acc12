//! The timeline's clock: the processor's time-stamp counter where it counts evenly at all times (19 ns
//! an event, where the system's clock takes 49), else the system's monotonic clock.
//!
//! Both are looked at together when a trace begins and when it is read, and what lies between is
//! interpolated.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

/// Least time between the two looks at both clocks: a look is off by 0.1 µs at most.
const BASE_MIN: Duration = Duration::from_millis(10);

/// Looks of which the quickest counts.
const LOOKS: usize = 16;

/// A clock that counts ticks of unknown length.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    counter: bool,
    start: Instant,
    start_ticks: u64,
}

/// Converts a clock's ticks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scale {
    start_ticks: u64,
    ns_per_tick: f64,
}

impl Clock {
    /// Begins to count.
    pub fn start() -> Self {
        Self::with(has_even_counter())
    }

    fn with(counter: bool) -> Self {
        let mut clock = Self {
            counter,
            start: Instant::now(),
            start_ticks: 0,
        };
        (clock.start, clock.start_ticks) = clock.both();
        clock
    }

    /// When it began to count.
    pub fn started(&self) -> Instant {
        self.start
    }

    /// Now.
    #[inline]
    pub fn ticks(&self) -> u64 {
        if self.counter {
            counter()
        } else {
            u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
        }
    }

    /// How long a tick is, by all the time since the start.
    pub fn scale(&self) -> Scale {
        std::thread::sleep(BASE_MIN.saturating_sub(self.start.elapsed()));
        let (now, ticks) = self.both();
        let ns = now.duration_since(self.start).as_nanos() as f64;
        Scale {
            start_ticks: self.start_ticks,
            ns_per_tick: ns / ticks.saturating_sub(self.start_ticks).max(1) as f64,
        }
    }

    /// One moment by both clocks.
    fn both(&self) -> (Instant, u64) {
        let look = || {
            let before = self.ticks();
            let now = Instant::now();
            let took = self.ticks().saturating_sub(before);
            (took, now, before + took / 2)
        };
        let best = (0..LOOKS).map(|_| look()).min_by_key(|look| look.0);
        best.map_or((self.start, self.start_ticks), |(_, now, ticks)| {
            (now, ticks)
        })
    }
}

impl Scale {
    /// How long so many ticks take, in ns.
    pub fn duration_ns(&self, ticks: u64) -> u64 {
        (ticks as f64 * self.ns_per_tick) as u64
    }

    /// Time from the clock's start to `ticks`, in ns.
    pub fn ns(&self, ticks: u64) -> u64 {
        (ticks.saturating_sub(self.start_ticks) as f64 * self.ns_per_tick) as u64
    }
}

/// The time-stamp counter.
#[cfg(target_arch = "x86_64")]
#[inline]
fn counter() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and it only reads.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> u64 {
    0
}

/// Whether the counter runs at one speed, and at all times ("invariant TSC").
#[cfg(target_arch = "x86_64")]
fn has_even_counter() -> bool {
    const POWER_MANAGEMENT: u32 = 0x8000_0007;
    const INVARIANT: u32 = 1 << 8;
    use std::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= POWER_MANAGEMENT && __cpuid(POWER_MANAGEMENT).edx & INVARIANT != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn has_even_counter() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sources_agree_with_the_system_clock() {
        let mut sources = vec![false];
        if has_even_counter() {
            sources.push(true);
        }
        for counter in sources {
            let clock = Clock::with(counter);
            std::thread::sleep(Duration::from_millis(20));
            let before = clock.started().elapsed();
            let ticks = clock.ticks();
            let after = clock.started().elapsed();
            let ns = clock.scale().ns(ticks) as f64;
            // the two looks are apart by as long as the system lets the thread wait
            let slack = 20_000.0;
            assert!(ns >= before.as_nanos() as f64 - slack, "{ns} {before:?}");
            assert!(ns <= after.as_nanos() as f64 + slack, "{ns} {after:?}");
        }
    }
}
