//! `down`: Σ over neurons of activation · row.

use super::buffer::{DeviceBuffer, View, ViewMut};
use super::device::Device;
use super::layout::{DeviceRows, RowsView, item_values};
use super::rows::{Add, NeuronList};
use super::stream::{Grid, Stream};
use super::then_norm::{RawThenNorm, ThenNorm};
use crate::error::KernelError;

/// Items of a row that a block has.
const TILE_ITEMS: usize = 8;
/// Threads of a block.
const THREADS: usize = 256;
/// Blocks that share the work on a multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// Neurons below which dividing a list further gains nothing.
const NEURONS_MIN: usize = 48;
/// Bits of what is no part of a sum yet.
const NOT_YET: u32 = u32::MAX;

/// Memory that [`down_active`] works in. One launch at a time may use it.
#[derive(Debug)]
pub struct DownScratch {
    rows: DeviceRows,
    n_tiles: usize,
    n_parts: usize,
    /// Parts of sums, [`NOT_YET`] between launches.
    partials: DeviceBuffer<u32>,
    /// Two counts for each part of the columns, zeros between launches.
    counts: DeviceBuffer<u32>,
}

impl DownScratch {
    /// For down rows of this format and size. How the sum is divided, and so its last bits, depends on these and on
    /// the number of multiprocessors, on nothing else.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device, rows: DeviceRows) -> Result<Self, KernelError> {
        let room = device.info().n_multiprocessors * BLOCKS_PER_MULTIPROCESSOR;
        let n_parts = room / n_tiles(rows).max(1);
        Self::with_parts(device, rows, n_parts)
    }

    /// The same, of neurons in about so many parts, each a block for each part of the columns. More than there is room for at a time are slower.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn with_parts(
        device: &Device,
        rows: DeviceRows,
        n_parts: usize,
    ) -> Result<Self, KernelError> {
        let n_tiles = n_tiles(rows);
        let n_parts = n_parts.clamp(1, rows.n_rows.div_ceil(NEURONS_MIN).max(1));
        let n_partials = n_tiles * n_parts * TILE_ITEMS * item_values(rows.quant);
        Ok(Self {
            rows,
            n_tiles,
            n_parts,
            counts: device.alloc(2 * n_tiles)?,
            partials: device.upload(&vec![NOT_YET; n_partials])?,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.partials.bytes() + self.counts.bytes()
    }
}

/// Parts of the columns.
fn n_tiles(rows: DeviceRows) -> usize {
    rows.n_cols
        .div_ceil(item_values(rows.quant))
        .div_ceil(TILE_ITEMS)
}

#[repr(C)]
struct DownArgs {
    rows: u64,
    stride: u64,
    ids: u64,
    n_ids: u64,
    n_neurons: u32,
    n_a: u32,
    n_cols: u32,
    a: u64,
    add: u64,
    out: u64,
    partials: u64,
    counts: u64,
    skip: u32,
    then: RawThenNorm,
}

const _: () = assert!(size_of::<DownArgs>() == 216);

/// Writes `Σ a[j] · down[ids[j]]`, plus `add`, to `out` (`[n_cols]` f32), and the first half of a norm of it. With `skip`, rows whose `a` (f32, as long as the
/// list) is zero are not read.
///
/// Activations stay f32 with every [`crate::ActivationMode`]: rounding them to 8 bits, as the CPU does beside 8-bit
/// activations for `Q4_0`, would save nothing here. The order of the sum is not the CPU's.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit, or `scratch` is for other rows.
pub fn down_active(
    stream: &Stream,
    down: RowsView<'_>,
    list: NeuronList<'_>,
    a: View<'_, f32>,
    skip: bool,
    add: Add<'_>,
    then: Option<ThenNorm<'_>>,
    scratch: &mut DownScratch,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let shape = down.rows();
    let (ids, n_ids, n_a) = list.raw(stream, shape.n_rows);
    assert_eq!(scratch.rows, shape, "scratch for these rows");
    assert_eq!(a.len(), n_a, "one activation per neuron");
    assert_eq!(out.len(), shape.n_cols, "columns");
    let scratch_device = scratch.partials.device();
    stream.check(&[
        down.bytes().device(),
        a.device(),
        out.device(),
        scratch_device,
    ]);
    add.check(stream);
    let args = DownArgs {
        rows: down.bytes().address(),
        stride: down.stride_bytes() as u64,
        ids,
        n_ids,
        n_neurons: shape.n_rows as u32,
        n_a: n_a as u32,
        n_cols: shape.n_cols as u32,
        a: a.address(),
        add: add.address(&out),
        out: out.address(),
        partials: scratch.partials.view(..).address(),
        counts: scratch.counts.view(..).address(),
        skip: u32::from(skip),
        then: then.map_or(RawThenNorm::NONE, |then| then.raw(stream, shape.n_cols)),
    };
    let grid = Grid {
        blocks: [scratch.n_tiles, scratch.n_parts],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().down(shape.quant);
    // SAFETY: rows, list and output fit (asserted); the scratch was made for them.
    unsafe { stream.launch("launch down_active", function, grid, args) }
}
