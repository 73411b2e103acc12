//! Activations of several tokens on a device: of values, of a norm, of gates and ups.

use half::f16;

use super::buffer::{DeviceBuffer, View, ViewMut};
use super::device::Device;
use super::functions::Function;
use super::rows::Gates;
use super::stream::{Grid, Stream};
use crate::activations::ActivationMode;
use crate::error::KernelError;

/// Columns that a token is padded to (`BATCH_COLUMNS` of `kernels/cuda/batch.cuh`).
const COLUMNS: usize = 64;
/// Threads of a block (`BATCH_THREADS` of `kernels/cuda/batch.cu`).
const THREADS: usize = 512;

/// Activations of several tokens, `[n_tokens, n_cols]`, as the tensor cores take them: f16, each token times a power
/// of two that makes its largest value lie in 2¹⁴ … 2¹⁵, so that no value overflows and the power costs no bit.
///
/// Mode `Q8`: each value is rounded to f16, by at most 2⁻¹¹ of itself or 2⁻³⁹ of the token's largest value; that is
/// less than the 8 bits of [`super::DeviceAct`] lose. Mode `F32`: a second f16 holds what the first has lost, so that
/// 22 bits are kept.
///
/// A token with a value that is not finite is not scaled; its results are not finite.
#[derive(Debug)]
pub struct DeviceBatch {
    mode: ActivationMode,
    n_cols: usize,
    n_tokens: usize,
    n_tokens_max: usize,
    /// `[n_tokens_max, stride]`.
    high: DeviceBuffer<u16>,
    /// Mode `F32`: likewise; else empty.
    low: DeviceBuffer<u16>,
    /// `[n_tokens_max]`.
    unscale: DeviceBuffer<f32>,
}

/// `Batch` of `kernels/cuda/batch.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawBatch {
    high: u64,
    low: u64,
    unscale: u64,
    n_tokens: u32,
    n_cols: u32,
    stride: u32,
    unused: u32,
}

const _: () = assert!(size_of::<RawBatch>() == 40);

impl DeviceBatch {
    /// Room for up to `n_tokens_max` tokens of `n_cols` values; holds no token yet.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    ///
    /// # Panics
    /// When there are no columns.
    pub fn new(
        device: &Device,
        mode: ActivationMode,
        n_tokens_max: usize,
        n_cols: usize,
    ) -> Result<Self, KernelError> {
        assert!(n_cols > 0, "activations of something");
        let len = n_tokens_max * n_cols.next_multiple_of(COLUMNS);
        let low_len = if mode == ActivationMode::F32 { len } else { 0 };
        Ok(Self {
            mode,
            n_cols,
            n_tokens: 0,
            n_tokens_max,
            high: device.alloc(len)?,
            low: device.alloc(low_len)?,
            unscale: device.alloc(n_tokens_max)?,
        })
    }

    /// The arithmetic that rows meet it with.
    pub fn mode(&self) -> ActivationMode {
        self.mode
    }

    /// Values of a token.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Makes room for tokens of `n_cols` values; holds no token then.
    ///
    /// # Panics
    /// When there are no columns, or more than it was made for.
    pub fn set_columns(&mut self, n_cols: usize) {
        let room = self.high.len() / self.n_tokens_max.max(1);
        let stride = n_cols.next_multiple_of(COLUMNS);
        assert!(n_cols > 0 && stride <= room, "{n_cols} columns in {room}");
        (self.n_cols, self.n_tokens) = (n_cols, 0);
    }

    /// Tokens that it holds: those of the last launch that wrote it.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Tokens that it can hold.
    pub fn n_tokens_max(&self) -> usize {
        self.n_tokens_max
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.high.bytes() + self.low.bytes() + self.unscale.bytes()
    }

    /// The values that rows meet, `[n_tokens, n_cols]`: what both f16 add up to. Streams are not waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self) -> Result<Vec<f32>, KernelError> {
        let (high, low, unscale) = (self.high.read()?, self.low.read()?, self.unscale.read()?);
        let stride = self.n_cols.next_multiple_of(COLUMNS);
        let half = |bits: &u16| f16::from_bits(*bits).to_f32();
        let value = |t: usize, i: usize| {
            let at = t * stride + i;
            (half(&high[at]) + low.get(at).map_or(0.0, half)) * unscale[t]
        };
        let token = |t: usize| (0..self.n_cols).map(move |i| (t, i));
        let places = (0..self.n_tokens).flat_map(token);
        Ok(places.map(|(t, i)| value(t, i)).collect())
    }

    pub(super) fn raw(&self) -> RawBatch {
        let low = match self.mode {
            ActivationMode::F32 => self.low.view(..).address(),
            ActivationMode::Q8 => 0,
        };
        RawBatch {
            high: self.high.view(..).address(),
            low,
            unscale: self.unscale.view(..).address(),
            n_tokens: self.n_tokens as u32,
            n_cols: self.n_cols as u32,
            stride: self.n_cols.next_multiple_of(COLUMNS) as u32,
            unused: 0,
        }
    }

    pub(super) fn device(&self) -> &Device {
        self.high.device()
    }

    /// Sets the number of tokens from that of their values.
    fn take(&mut self, n_values: usize) {
        assert_eq!(n_values % self.n_cols, 0, "whole tokens");
        self.n_tokens = n_values / self.n_cols;
        assert!(
            self.n_tokens <= self.n_tokens_max,
            "{} tokens where {} have room",
            self.n_tokens,
            self.n_tokens_max
        );
    }
}

/// Launches `function` with a block per token; nothing where there is none.
///
/// # Safety
/// As [`Stream::launch`].
unsafe fn launch<A>(
    stream: &Stream,
    operation: &'static str,
    function: Function,
    n_tokens: usize,
    args: A,
) -> Result<(), KernelError> {
    if n_tokens == 0 {
        return Ok(());
    }
    let grid = Grid {
        blocks: [n_tokens, 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    // SAFETY: the caller's contract.
    unsafe { stream.launch(operation, function, grid, args) }
}

#[repr(C)]
struct PrepareArgs {
    x: u64,
    to: RawBatch,
}

const _: () = assert!(size_of::<PrepareArgs>() == 48);

/// Makes activations of `x` (`[n_tokens, n_cols]` f32). Overwrites `to`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When `x` is not whole tokens, or more than there is room for, or devices differ.
pub fn prepare_batch(
    stream: &Stream,
    x: View<'_, f32>,
    to: &mut DeviceBatch,
) -> Result<(), KernelError> {
    to.take(x.len());
    stream.check(&[x.device(), to.device()]);
    let args = PrepareArgs {
        x: x.address(),
        to: to.raw(),
    };
    let function = stream.functions().prefill.prepare_batch;
    // SAFETY: `x` has the tokens, `to` has room for them.
    unsafe { launch(stream, "launch prepare_batch", function, to.n_tokens, args) }
}

#[repr(C)]
struct RmsNormArgs {
    x: u64,
    weight: u64,
    values: u64,
    to: RawBatch,
    eps: f32,
}

const _: () = assert!(size_of::<RmsNormArgs>() == 72);

/// `x[t, i] / √(mean(x[t]²) + eps) · weight[i]`, as activations; `x` is `[n_tokens, n_cols]`, `weight` `[n_cols]` f32.
/// Overwrites `to`, and `values` (as long as `x`) with the same as f32, where given.
///
/// As [`crate::norm::rms_norm`], but for the order of the sum, which is not that of [`super::rms_norm`] either.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes do not fit, or devices differ.
pub fn rms_norm_batch(
    stream: &Stream,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    eps: f32,
    values: Option<ViewMut<'_, f32>>,
    to: &mut DeviceBatch,
) -> Result<(), KernelError> {
    to.take(x.len());
    assert_eq!(weight.len(), to.n_cols, "weights of a norm");
    stream.check(&[x.device(), weight.device(), to.device()]);
    if let Some(values) = &values {
        assert_eq!(values.len(), x.len(), "values of a norm");
        stream.check(&[values.device()]);
    }
    let args = RmsNormArgs {
        x: x.address(),
        weight: weight.address(),
        values: values.map_or(0, |values| values.address()),
        to: to.raw(),
        eps,
    };
    let function = stream.functions().prefill.rms_norm_batch;
    // SAFETY: all have the tokens and columns.
    unsafe { launch(stream, "launch rms_norm_batch", function, to.n_tokens, args) }
}

#[repr(C)]
struct GateUpArgs {
    gate: u64,
    up: u64,
    to: RawBatch,
    gates: u32,
}

const _: () = assert!(size_of::<GateUpArgs>() == 64);

/// `act(gate) · up` of each value, as activations; both are `[n_tokens, n_cols]` f32, products of [`super::gemm`].
/// Overwrites `to`. A closed ReLU gate gives 0 whatever `up` is, one that is NaN is open.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes do not fit, or devices differ.
pub fn gate_up_batch(
    stream: &Stream,
    gate: View<'_, f32>,
    up: View<'_, f32>,
    gates: Gates,
    to: &mut DeviceBatch,
) -> Result<(), KernelError> {
    to.take(gate.len());
    assert_eq!(up.len(), gate.len(), "an up for each gate");
    stream.check(&[gate.device(), up.device(), to.device()]);
    let args = GateUpArgs {
        gate: gate.address(),
        up: up.address(),
        to: to.raw(),
        gates: match gates {
            Gates::ReluDense => Gates::Relu,
            gates => gates,
        } as u32,
    };
    let function = stream.functions().prefill.gate_up_batch;
    // SAFETY: both have the tokens, `to` has room for them.
    unsafe { launch(stream, "launch gate_up_batch", function, to.n_tokens, args) }
}
