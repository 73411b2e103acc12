//! What passes between host and GPUs: copies from and to pinned memory, and a flag there and back.

use std::time::{Duration, Instant};

use pi_actors::latency::Latency;
use pi_kernels::KernelError;
use pi_kernels::cuda::{
    Device, DeviceBuffer, Event, HandOver, PinnedBuffer, Stream, TakeOver, copy_to_device,
    copy_to_host, device_count, hand_over, take_over,
};
use serde::{Deserialize, Serialize};

use super::Nanoseconds;

/// Bytes of a copy.
const COPY_BYTES: usize = 256 << 20;

/// Copies of which the median counts.
const N_COPIES: usize = 5;

/// Flags that are sent, and some before anything counts.
const N_FLAGS: usize = 1000;
const N_FLAGS_WARM_UP: usize = 50;

/// Longest wait of either side for a flag.
const FLAG_LIMIT: Duration = Duration::from_secs(1);

/// Time after a kernel's flag in which the next one, launched behind it, begins to wait for the host's.
const SETTLING: Duration = Duration::from_micros(20);

/// Values that are handed over with a flag.
const N_VALUES: usize = 4;

/// What passes between the host and a GPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuLink {
    /// Number among the driver's GPUs.
    pub ordinal: usize,
    /// Name.
    pub name: String,
    /// From pinned memory to the GPU's, bytes per second.
    pub to_device_bytes_per_s: f64,
    /// From the GPU's memory to pinned memory, bytes per second.
    pub to_host_bytes_per_s: f64,
    /// A flag from the host to a kernel that waits for it, and one back from the next kernel; none where one was lost.
    pub flag_round_trip: Option<Nanoseconds>,
}

impl GpuLink {
    /// Measures all GPUs, from the thread that calls, and says why one was not; `said` is told of each before it is
    /// measured.
    pub fn measure_all(said: &dyn Fn(&str)) -> (Vec<Self>, Vec<String>) {
        let count = match device_count() {
            Ok(0) => return (vec![], vec!["the driver has no GPU".to_owned()]),
            Ok(count) => count,
            Err(error) => return (vec![], vec![error.to_string()]),
        };
        let mut links = Vec::with_capacity(count);
        let mut problems = Vec::new();
        for ordinal in 0..count {
            said(&format!("GPU {ordinal}: copies and flags"));
            match Self::measure(ordinal) {
                Ok(link) => links.push(link),
                Err(error) => problems.push(format!("GPU {ordinal}: {error}")),
            }
        }
        (links, problems)
    }

    fn measure(ordinal: usize) -> Result<Self, KernelError> {
        let device = Device::open(ordinal)?;
        let stream = device.stream()?;
        let pinned = PinnedBuffer::<u8>::new(&device, COPY_BYTES)?;
        let mut buffer = device.alloc::<u8>(COPY_BYTES)?;
        let to_device = speed(&stream, || {
            copy_to_device(&stream, &pinned, buffer.view_mut(..))
        })?;
        let to_host = speed(&stream, || copy_to_host(&stream, buffer.view(..), &pinned))?;
        Ok(Self {
            ordinal,
            name: device.info().name.clone(),
            to_device_bytes_per_s: to_device,
            to_host_bytes_per_s: to_host,
            flag_round_trip: Flags::new(&device, &stream)?.round_trips()?.map(Into::into),
        })
    }

    /// Whether all numbers are such as a measurement gives.
    pub(super) fn is_sane(&self) -> bool {
        let speeds = [self.to_device_bytes_per_s, self.to_host_bytes_per_s];
        speeds.iter().all(|speed| speed.is_finite() && *speed > 0.0)
    }
}

/// Bytes per second of the median copy, after one that does not count.
fn speed(
    stream: &Stream,
    mut copy: impl FnMut() -> Result<(), KernelError>,
) -> Result<f64, KernelError> {
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    let mut all_ms = Vec::with_capacity(N_COPIES);
    for index in 0..=N_COPIES {
        start.record(stream)?;
        copy()?;
        end.record(stream)?;
        stream.synchronize()?;
        if index > 0 {
            all_ms.push(start.elapsed_ms(&end)?);
        }
    }
    all_ms.sort_by(f32::total_cmp);
    Ok(COPY_BYTES as f64 / f64::from(all_ms[N_COPIES / 2]) * 1e3)
}

/// Where flags and what belongs to them lie.
struct Flags<'a> {
    stream: &'a Stream,
    /// By [`Self::READY`], [`Self::GO`] and [`Self::BACK`].
    flags: PinnedBuffer<u32>,
    late_host: PinnedBuffer<u32>,
    words: PinnedBuffer<u32>,
    values: PinnedBuffer<f32>,
    stamps: PinnedBuffer<u64>,
    number: DeviceBuffer<u32>,
    late: DeviceBuffer<u32>,
    tickets: [DeviceBuffer<u32>; 2],
    x: DeviceBuffer<f32>,
}

impl<'a> Flags<'a> {
    /// Set by a kernel when the one that waits for the host comes next.
    const READY: usize = 0;
    /// Set by the host.
    const GO: usize = 1;
    /// Set by the kernel behind the one that waits.
    const BACK: usize = 2;

    fn new(device: &Device, stream: &'a Stream) -> Result<Self, KernelError> {
        Ok(Self {
            stream,
            flags: PinnedBuffer::new(device, 3)?,
            late_host: PinnedBuffer::new(device, 1)?,
            words: PinnedBuffer::new(device, N_VALUES)?,
            values: PinnedBuffer::new(device, N_VALUES)?,
            stamps: PinnedBuffer::new(device, 3)?,
            number: device.alloc(1)?,
            late: device.alloc(1)?,
            tickets: [device.alloc(1)?, device.alloc(1)?],
            x: device.alloc(N_VALUES)?,
        })
    }

    /// None when a flag did not come in time.
    fn round_trips(mut self) -> Result<Option<Latency>, KernelError> {
        let mut rounds_ns = Vec::with_capacity(N_FLAGS);
        for round in 0..N_FLAGS_WARM_UP + N_FLAGS {
            let Some(took) = self.round_trip(round as u32 + 1)? else {
                return Ok(None);
            };
            if round >= N_FLAGS_WARM_UP {
                rounds_ns.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
            }
        }
        Ok(Some(Latency::of(rounds_ns)))
    }

    fn round_trip(&mut self, number: u32) -> Result<Option<Duration>, KernelError> {
        self.number.write(0, &[number])?;
        self.hand_over(Self::READY, 0)?;
        let take = TakeOver {
            from: self.values.view(0..N_VALUES),
            flag: self.flags.view(Self::GO..Self::GO + 1),
            number: self.number.view(..),
            late: (self.late.view(..), self.late_host.view(0..1)),
            stamps: self.stamps.view(0..2),
            limit: FLAG_LIMIT,
        };
        take_over(self.stream, take, self.x.view_mut(..))?;
        self.hand_over(Self::BACK, 1)?;
        let ready = self.wait_for(Self::READY, number);
        let settled = Instant::now() + SETTLING;
        while Instant::now() < settled {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        self.flags.store(Self::GO, number);
        let back = self.wait_for(Self::BACK, number);
        let took = start.elapsed();
        self.stream.synchronize()?;
        let in_time = ready && back && self.late_host.load(0) == 0;
        Ok(in_time.then_some(took))
    }

    fn hand_over(&mut self, flag: usize, ticket: usize) -> Result<(), KernelError> {
        let what = HandOver {
            from: self.x.view(..).to_bits(),
            count: None,
            to: self.words.view(0..N_VALUES),
            flag: self.flags.view(flag..flag + 1),
            number: self.number.view(..),
            stamp: self.stamps.view(2..3),
        };
        hand_over(self.stream, what, &mut self.tickets[ticket])
    }

    /// Spins for a kernel's flag; false when it does not come.
    fn wait_for(&self, flag: usize, number: u32) -> bool {
        let start = Instant::now();
        while self.flags.load(flag) != number {
            if start.elapsed() > FLAG_LIMIT {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }
}
