//! What passes between host and GPUs: copies from and to pinned memory, and a flag there and back; and what a GPU does by itself.

use std::time::{Duration, Instant};

use pi_actors::latency::Latency;
use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    Add, AttendScratch, AttendToken, Device, DeviceAct, DeviceBuffer, DeviceCache, DeviceRows,
    DownScratch, Event, Gates, Graph, HandOver, NeuronList, PinnedBuffer, RowsView, Stream,
    TakeOver, ThenNorm, attend_token, copy_to_device, copy_to_host, device_count, down_active,
    gate_up, gemv, gemv_then_norm, hand_over, rms_norm, tagged, take_over,
};
use pi_kernels::rope::RopePairs;
use pi_kernels::{ActivationMode, KernelError, QuantType};
use serde::{Deserialize, Serialize};

use super::Nanoseconds;

/// Bytes of a copy.
const COPY_BYTES: usize = 256 << 20;

/// Copies of which the median counts.
const N_COPIES: usize = 5;

/// A layer that is run to find what kernels take, of a model of 7 B parameters: its width, neurons, heads, and the token's position.
const N_EMBD: usize = 4096;
const N_FF: usize = 11008;
const HEAD_DIM: usize = 128;
const N_POSITIONS: usize = 128;
/// So many times, and its kernels.
const N_LAYERS: usize = 8;
const N_LAUNCHES: f64 = 5.0;

/// The least that a kernel takes beside its bytes, seconds: a measurement cannot give less.
const LAUNCH_S_MIN: f64 = 1e-7;

/// Flags that are sent, and some before anything counts.
const N_FLAGS: usize = 1000;
const N_FLAGS_WARM_UP: usize = 50;

/// Longest wait of either side for a flag.
const FLAG_LIMIT: Duration = Duration::from_secs(1);

/// Time after a kernel's flag in which the next one, launched behind it, begins to wait for the host's.
const SETTLING: Duration = Duration::from_micros(20);

/// Values that are handed over with a flag.
const N_VALUES: usize = 4;

/// What passes between the host and a GPU, and the GPU's own speed.
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
    /// Its own memory, as the product of a large matrix with a token reads it, bytes per second; none in files from before it was
    /// measured.
    #[serde(default)]
    pub memory_bytes_per_s: Option<f64>,
    /// What a layer's kernels, in a graph, take beside the time for their bytes, on average, seconds; likewise.
    #[serde(default)]
    pub launch_s: Option<f64>,
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
        let to_device_s = median_s(&stream, || {
            copy_to_device(&stream, &pinned, buffer.view_mut(..))
        })?;
        let to_host_s = median_s(&stream, || copy_to_host(&stream, buffer.view(..), &pinned))?;
        let (memory_bytes_per_s, launch_s) = products(&device, &stream, &buffer)?;
        Ok(Self {
            ordinal,
            name: device.info().name.clone(),
            to_device_bytes_per_s: COPY_BYTES as f64 / to_device_s,
            to_host_bytes_per_s: COPY_BYTES as f64 / to_host_s,
            memory_bytes_per_s: Some(memory_bytes_per_s),
            launch_s: Some(launch_s),
            flag_round_trip: Flags::new(&device, &stream)?.round_trips()?.map(Into::into),
        })
    }

    /// Whether all numbers are such as a measurement gives.
    pub(super) fn is_sane(&self) -> bool {
        let copies = [self.to_device_bytes_per_s, self.to_host_bytes_per_s];
        let others = [self.memory_bytes_per_s, self.launch_s];
        let mut numbers = copies.into_iter().chain(others.into_iter().flatten());
        numbers.all(|number| number.is_finite() && number > 0.0)
    }
}

/// Bytes per second at which the kernels read a GPU's memory, of a large matrix.
///
/// # Errors
/// The driver's; there is no room for the matrix.
pub fn memory_bandwidth(device: &Device) -> Result<f64, KernelError> {
    let weights = device.alloc::<u8>(COPY_BYTES)?;
    large_product(device, &device.stream()?, &weights)
}

/// Rows of the matrices.
fn rows_of(n_rows: usize) -> DeviceRows {
    DeviceRows {
        quant: QuantType::Q4_0,
        n_rows,
        n_cols: N_EMBD,
    }
}

/// Bytes per second at which a large matrix is read. `weights` are [`COPY_BYTES`] of zeros.
fn large_product(
    device: &Device,
    stream: &Stream,
    weights: &DeviceBuffer<u8>,
) -> Result<f64, KernelError> {
    let rows = rows_of(COPY_BYTES / rows_of(1).bytes());
    let x = DeviceAct::new(device, ActivationMode::Q8, N_EMBD)?;
    let mut out = device.alloc::<f32>(rows.n_rows)?;
    let product = Graph::capture(stream, |stream| {
        let rows = RowsView::dense(rows, weights.view(..rows.bytes()));
        gemv(stream, rows, &x, Add::None, out.view_mut(..))
    })?;
    let seconds = median_s(stream, || product.launch(stream))?;
    Ok(rows.bytes() as f64 / seconds)
}

/// Bytes per second at which a large matrix is read, and what a kernel takes beside, seconds: on average over those of a layer.
/// `weights` are [`COPY_BYTES`] of zeros.
fn products(
    device: &Device,
    stream: &Stream,
    weights: &DeviceBuffer<u8>,
) -> Result<(f64, f64), KernelError> {
    let rows_at = |at: usize, n_rows| {
        let rows = rows_of(n_rows);
        RowsView::dense(rows, weights.view(at..at + rows.bytes()))
    };
    let act = || DeviceAct::new(device, ActivationMode::Q8, N_EMBD);
    let (mut normed, mut heads, mut ffn_normed) = (act()?, act()?, act()?);

    let bytes_per_s = large_product(device, stream, weights)?;

    let ones = device.upload(&[1.0f32; N_EMBD])?;
    let mut x = device.upload(&[1.0f32; N_EMBD])?;
    let mut qkv = device.alloc::<f32>(3 * N_EMBD)?;
    let mut a = device.alloc::<f32>(N_FF)?;
    let rotation = device.alloc::<f32>(2 * HEAD_DIM)?;
    let position = device.upload(&[N_POSITIONS as u32 - 1])?;
    let n_head = N_EMBD / HEAD_DIM;
    let mut cache = DeviceCache::new(device, KvType::F16, n_head, N_POSITIONS, HEAD_DIM)?;
    let (kv_type, mode) = (KvType::F16, ActivationMode::Q8);
    let mut attention =
        AttendScratch::new(device, n_head, n_head, HEAD_DIM, N_POSITIONS, kv_type, mode)?;
    let mut down = DownScratch::new(device, rows_of(N_FF))?;
    let sizes = [3 * N_EMBD, N_EMBD, N_FF, N_FF, N_FF].map(|n_rows| rows_of(n_rows).bytes());
    let layer_bytes: usize = sizes.iter().sum();
    let layers = Graph::capture(stream, |stream| {
        rms_norm(stream, x.view(..), ones.view(..), 1e-5, &mut normed)?;
        for layer in 0..N_LAYERS {
            // others than the layer before, so that no cache has them
            let mut at = layer % (COPY_BYTES / layer_bytes) * layer_bytes;
            let mut next = |n_rows| {
                let rows = rows_at(at, n_rows);
                at += rows_of(n_rows).bytes();
                rows
            };
            gemv(
                stream,
                next(3 * N_EMBD),
                &normed,
                Add::None,
                qkv.view_mut(..),
            )?;
            let of = |k: usize| qkv.view(k * N_EMBD..(k + 1) * N_EMBD);
            let token = AttendToken {
                q: of(0),
                k: of(1),
                v: of(2),
                rotation: rotation.view(..),
                pairs: RopePairs::Halves,
                position: position.view(..),
            };
            attend_token(
                stream,
                token,
                &mut cache,
                None,
                1.0,
                &mut attention,
                &mut heads,
            )?;
            let (wo, to) = (next(N_EMBD), x.view_mut(..));
            let then = then_norm(&ones, &mut ffn_normed);
            gemv_then_norm(stream, wo, &heads, then, to)?;
            let (gate, up, all) = (next(N_FF), next(N_FF), NeuronList::All);
            let (x_ffn, a_out) = (&ffn_normed, a.view_mut(..));
            gate_up(stream, gate, up, all, x_ffn, Gates::Silu, a_out)?;
            let to = x.view_mut(..);
            down_active(
                stream,
                next(N_FF),
                all,
                a.view(..),
                false,
                Add::Out,
                Some(then_norm(&ones, &mut normed)),
                &mut down,
                to,
            )?;
        }
        Ok(())
    })?;
    let layer_s = median_s(stream, || layers.launch(stream))? / N_LAYERS as f64;
    let launch_s = (layer_s - layer_bytes as f64 / bytes_per_s) / N_LAUNCHES;
    Ok((bytes_per_s, launch_s.max(LAUNCH_S_MIN)))
}

/// As in layers that are the GPU's alone, whoever writes the residual stream makes the norm behind it.
fn then_norm<'a>(weight: &'a DeviceBuffer<f32>, to: &'a mut DeviceAct) -> ThenNorm<'a> {
    ThenNorm {
        weight: weight.view(..),
        eps: 1e-5,
        to,
        plain: None,
        not_finite: None,
    }
}

/// Seconds of the median of some runs, after one that does not count.
fn median_s(
    stream: &Stream,
    mut run: impl FnMut() -> Result<(), KernelError>,
) -> Result<f64, KernelError> {
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    let mut all_ms = Vec::with_capacity(N_COPIES);
    for index in 0..=N_COPIES {
        start.record(stream)?;
        run()?;
        end.record(stream)?;
        stream.synchronize()?;
        if index > 0 {
            all_ms.push(start.elapsed_ms(&end)?);
        }
    }
    all_ms.sort_by(f32::total_cmp);
    Ok(f64::from(all_ms[N_COPIES / 2]) / 1e3)
}

/// Where flags and what belongs to them lie.
struct Flags<'a> {
    stream: &'a Stream,
    /// By [`Self::READY`], [`Self::GO`] and [`Self::BACK`].
    flags: PinnedBuffer<u32>,
    late_host: PinnedBuffer<u32>,
    words: PinnedBuffer<u32>,
    values: PinnedBuffer<u64>,
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
            plus: 0,
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
        let words = [tagged(1.0, number); N_VALUES];
        self.values.store_words(0, words.into_iter());
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
