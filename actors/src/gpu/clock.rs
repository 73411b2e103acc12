//! The GPU's clock in terms of the host's: each look of one at what the other did bounds the difference.

/// Bounds of host's time minus GPU's time, in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClockBounds {
    low: i64,
    high: i64,
    /// What all of the GPU's times are multiples of: its clock's step.
    step: u64,
}

/// The largest step of a GPU's clock; what fewer times have in common by chance is no step.
const STEP_MAX: u64 = 1024;

/// Maps the GPU's times.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ClockMap {
    offset_ns: i64,
    /// How far off it may be.
    pub error_ns: u64,
}

impl ClockBounds {
    /// Nothing known.
    pub fn new() -> Self {
        Self {
            low: i64::MIN,
            high: i64::MAX,
            step: 0,
        }
    }

    /// The host did something at `host_ns`, and the GPU, because of that, at `gpu_ns`.
    pub fn host_first(&mut self, host_ns: u64, gpu_ns: u64) {
        self.low = self.low.max(difference(host_ns, gpu_ns));
        self.step = common(self.step, gpu_ns);
    }

    /// The GPU did something at `gpu_ns`, and the host saw it at `host_ns`.
    pub fn gpu_first(&mut self, gpu_ns: u64, host_ns: u64) {
        self.high = self.high.min(difference(host_ns, gpu_ns));
        self.step = common(self.step, gpu_ns);
    }

    /// The middle of what is possible; none where a bound is missing. The error is half of the rest, and the clock's step. Where clocks contradict each other, by a step or a
    /// drift, the error is as large.
    pub fn map(&self) -> Option<ClockMap> {
        if self.low == i64::MIN || self.high == i64::MAX {
            return None;
        }
        let middle = (i128::from(self.low) + i128::from(self.high)) / 2;
        Some(ClockMap {
            offset_ns: middle as i64,
            error_ns: self.low.abs_diff(self.high).div_ceil(2) + self.step.min(STEP_MAX) - 1,
        })
    }
}

/// The largest number that divides both, at least 1.
fn common(a: u64, b: u64) -> u64 {
    let (mut a, mut b) = (a, b);
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a.max(1)
}

fn difference(a: u64, b: u64) -> i64 {
    (i128::from(a) - i128::from(b)).clamp(i128::from(i64::MIN + 1), i128::from(i64::MAX - 1)) as i64
}

impl ClockMap {
    /// The host's time of a time of the GPU's.
    pub fn host_ns(&self, gpu_ns: u64) -> u64 {
        gpu_ns.saturating_add_signed(self.offset_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_looks_count() {
        let offset = 1_000_000u64;
        let mut bounds = ClockBounds::new();
        assert_eq!(bounds.map(), None);
        for (n, late) in [700, 300, 900].into_iter().enumerate() {
            let gpu = 5000 * n as u64 + 101;
            // the host writes, `late` before the GPU sees it; and the other way round
            bounds.host_first(gpu + offset - late, gpu);
            bounds.gpu_first(gpu + 1000, gpu + 1000 + offset + late + 100);
        }
        let map = bounds.map().unwrap();
        assert_eq!(map.error_ns, 350);
        assert_eq!(map.host_ns(0), offset + 50);
        assert!(map.host_ns(77).abs_diff(offset + 77) <= map.error_ns);
    }

    #[test]
    fn a_clock_that_steps_is_off_by_a_step_more() {
        let mut bounds = ClockBounds::new();
        for n in 1..20u64 {
            bounds.host_first(32 * n * n, 32 * n * n);
            bounds.gpu_first(64 * n, 64 * n + 100);
        }
        assert_eq!(bounds.map().unwrap().error_ns, 50 + 31);
    }

    #[test]
    fn one_bound_is_no_map_and_a_contradiction_is_a_large_error() {
        let mut bounds = ClockBounds::new();
        bounds.host_first(10, 21);
        assert_eq!(bounds.map(), None);
        // the host saw it 5000 ns before it can have happened
        bounds.gpu_first(6001, 1000 - 10);
        assert_eq!(bounds.map().unwrap().error_ns, 2500);
        let mut far = ClockBounds::new();
        far.host_first(u64::MAX, 0);
        far.gpu_first(u64::MAX, 0);
        assert!(far.map().unwrap().error_ns > 1 << 62);
    }
}
