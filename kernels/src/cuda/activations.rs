//! Activations of one token on a device.

use super::buffer::{DeviceBuffer, View};
use super::device::Device;
use super::stream::{Grid, Stream};
use super::then_norm::{RawNormBefore, can_norm};
use crate::activations::ActivationMode;
use crate::error::KernelError;
use crate::quant::BLOCK;

/// Activations of one token, `[n_cols]`: f32 values, and beside them what products with quantised rows read.
///
/// Blocks, rounding and scales are those of [`crate::ActBatch`]; only the order in memory is the device's
/// (`kernels/cuda/common.cuh`, `Act`).
#[derive(Debug)]
pub struct DeviceAct {
    mode: ActivationMode,
    n_cols: usize,
    /// `[n_blocks · 32]`, zeros behind the last column.
    values: DeviceBuffer<f32>,
    /// Mode `F32`: `[8, n_blocks, 4]`; else empty.
    quads: DeviceBuffer<f32>,
    /// Mode `Q8`: `[2, n_blocks, 16]`; else empty.
    halves: DeviceBuffer<i8>,
    /// Mode `Q8`: `[n_blocks, 4]`: scale (its bits), integer sums of both halves, 0; else empty.
    meta: DeviceBuffer<i32>,
    /// Mode `Q8`: `[n_blocks]`, padded with zeros to 16 bytes: sums of squares, where products take a norm's scale; else empty.
    squares: DeviceBuffer<f32>,
    /// Of a norm whose scale products still have to take.
    eps: Option<f32>,
}

/// A copy of 8-bit blocks, as [`crate::ActRef`] has them.
#[derive(Debug, Clone, PartialEq)]
pub struct Q8Copy {
    /// `[n_blocks · 32]` 8-bit values.
    pub q: Vec<i8>,
    /// `[n_blocks]` scale of each block.
    pub scales: Vec<f32>,
    /// `[n_blocks]` integer sum of each block.
    pub block_sums: Vec<i32>,
}

/// `Act` of `kernels/cuda/common.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawAct {
    values: u64,
    quads: u64,
    halves: u64,
    meta: u64,
    n_blocks: u32,
    n_cols: u32,
}

const _: () = assert!(size_of::<RawAct>() == 40);

impl RawAct {
    /// No activations.
    pub(super) const NONE: Self = Self {
        values: 0,
        quads: 0,
        halves: 0,
        meta: 0,
        n_blocks: 0,
        n_cols: 0,
    };
}

impl DeviceAct {
    /// Room for one token's `n_cols` values.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device, mode: ActivationMode, n_cols: usize) -> Result<Self, KernelError> {
        let n_blocks = n_cols.div_ceil(BLOCK);
        let (f32, q8) = match mode {
            ActivationMode::F32 => (n_blocks, 0),
            ActivationMode::Q8 => (0, n_blocks),
        };
        Ok(Self {
            mode,
            n_cols,
            values: device.alloc(n_blocks * BLOCK)?,
            quads: device.alloc(f32 * BLOCK)?,
            halves: device.alloc(q8 * BLOCK)?,
            meta: device.alloc(q8 * 4)?,
            squares: device.alloc(q8.next_multiple_of(4))?,
            eps: None,
        })
    }

    /// The arithmetic that quantised rows meet it with.
    pub fn mode(&self) -> ActivationMode {
        self.mode
    }

    /// Values.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.values.bytes()
            + self.quads.bytes()
            + self.halves.bytes()
            + self.meta.bytes()
            + self.squares.bytes()
    }

    /// The values, `[n_cols]` f32; before a norm's scale where a launch did [`super::ThenNorm`].
    pub fn values(&self) -> View<'_, f32> {
        self.values.view(..self.n_cols)
    }

    /// The 8-bit blocks in the order of columns (mode `Q8`, else empty). Streams are not waited for.
    ///
    /// # Errors
    /// The driver's.
    pub fn read_q8(&self) -> Result<Q8Copy, KernelError> {
        let (halves, meta) = (self.halves.read()?, self.meta.read()?);
        let n_blocks = meta.len() / 4;
        let (halves, _) = halves.as_chunks::<16>();
        let (meta, _) = meta.as_chunks::<4>();
        Ok(Q8Copy {
            q: (0..2 * n_blocks)
                .flat_map(|half| halves[half % 2 * n_blocks + half / 2])
                .collect(),
            scales: meta.iter().map(|m| f32::from_bits(m[0] as u32)).collect(),
            block_sums: meta.iter().map(|m| m[1] + m[2]).collect(),
        })
    }

    /// What they are from the next launch on: whole.
    pub(super) fn written(&mut self) -> RawAct {
        self.eps = None;
        self.raw()
    }

    /// What they are from the next launch on: before a norm's scale. Where sums of squares go.
    pub(super) fn before_norm(&mut self, eps: f32) -> u64 {
        assert!(
            can_norm(self.n_cols, self.mode),
            "whole blocks in 8-bit arithmetic"
        );
        self.eps = Some(eps);
        self.squares.view(..).address()
    }

    /// What products multiply by.
    pub(super) fn norm(&self) -> RawNormBefore {
        RawNormBefore {
            squares: self.eps.map_or(0, |_| self.squares.view(..).address()),
            eps: self.eps.unwrap_or(0.0),
        }
    }

    pub(super) fn raw(&self) -> RawAct {
        let or_null = |address: u64, len: usize| if len == 0 { 0 } else { address };
        RawAct {
            values: self.values.view(..).address(),
            quads: or_null(self.quads.view(..).address(), self.quads.len()),
            halves: or_null(self.halves.view(..).address(), self.halves.len()),
            meta: or_null(self.meta.view(..).address(), self.meta.len()),
            n_blocks: self.n_cols.div_ceil(BLOCK) as u32,
            n_cols: self.n_cols as u32,
        }
    }

    pub(super) fn device(&self) -> &Device {
        self.values.device()
    }
}

#[repr(C)]
struct PrepareArgs {
    x: u64,
    to: RawAct,
    relu: u32,
}

const _: () = assert!(size_of::<PrepareArgs>() == 56);

/// Makes activations of `x` (`[n_cols]` f32). Overwrites `to`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When the lengths differ, or devices do.
pub fn prepare(stream: &Stream, x: View<'_, f32>, to: &mut DeviceAct) -> Result<(), KernelError> {
    launch(stream, x, false, to)
}

/// The same of `max(x, 0)`; NaN stays NaN.
///
/// # Errors
/// As [`prepare`].
///
/// # Panics
/// As [`prepare`].
pub fn prepare_relu(
    stream: &Stream,
    x: View<'_, f32>,
    to: &mut DeviceAct,
) -> Result<(), KernelError> {
    launch(stream, x, true, to)
}

fn launch(
    stream: &Stream,
    x: View<'_, f32>,
    relu: bool,
    to: &mut DeviceAct,
) -> Result<(), KernelError> {
    assert_eq!(x.len(), to.n_cols, "values of the activations");
    stream.check(&[x.device(), to.device()]);
    let args = PrepareArgs {
        x: x.address(),
        to: to.written(),
        relu: u32::from(relu),
    };
    let grid = Grid {
        blocks: [to.n_cols.div_ceil(4 * BLOCK), 1],
        threads: 4 * 32,
        shared_bytes: 0,
    };
    // SAFETY: `x` has the columns, `to` has room for them.
    unsafe { stream.launch("launch prepare", stream.functions().prepare, grid, args) }
}
