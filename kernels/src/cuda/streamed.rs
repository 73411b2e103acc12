//! Weights that come from the host as they lie there: copied, and put in the order that products want.

use std::ops::Range;

use cudarc::driver::{result, sys};

use super::buffer::{View, ViewMut};
use super::device::{Device, call};
use super::layout::{DeviceRows, RowsView, is_supported};
use super::stream::{Grid, Stream};
use crate::activations::ActivationMode;
use crate::error::KernelError;
use crate::ffn_sparse::sketch::planes::PlanesShape;
use crate::matrix::{Layout, MatrixShape};
use crate::quant::{BLOCK, QuantType};

/// Memory of the host that is never paged out while this lives, so that copies of it to any device run beside everything else.
#[derive(Debug)]
pub struct Registered {
    device: Device,
    at: usize,
    bytes: usize,
}

/// Memory is registered by pages.
const PAGE: usize = 4096;

impl Registered {
    /// Registers the pages that `range` of addresses lies in. What else lies on them cannot be copied together with what lies
    /// on others.
    ///
    /// # Errors
    /// The driver's: memory that may not be locked, or that is registered already. Copies work without it, at the speed of
    /// the host's own copying.
    ///
    /// # Safety
    /// All of it is mapped, and stays so while this lives.
    pub unsafe fn new(device: &Device, range: Range<usize>) -> Result<Self, KernelError> {
        let at = range.start / PAGE * PAGE;
        let bytes = range.end.next_multiple_of(PAGE) - at;
        device.bind()?;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
        // SAFETY: all of it is mapped (this function's contract).
        let answer = unsafe {
            sys::cuMemHostRegister_v2(std::ptr::with_exposed_provenance_mut(at), bytes, flags)
        };
        call("lock memory of the host", answer.result())?;
        Ok(Self {
            device: device.clone(),
            at,
            bytes,
        })
    }

    /// Bytes that are locked.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            let at = std::ptr::with_exposed_provenance_mut(self.at);
            // SAFETY: registered by `new`, once. An error has nowhere to go.
            let _ = unsafe { sys::cuMemHostUnregister(at) };
        }
    }
}

/// Queues a copy of `from` to `to`. Returns at once where `from` is [`Registered`] or pinned, else when it has been read.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths or devices differ.
///
/// # Safety
/// `from` stays as it is until the stream has come past the copy.
pub unsafe fn copy_in(
    stream: &Stream,
    from: &[u8],
    to: ViewMut<'_, u8>,
) -> Result<(), KernelError> {
    assert_eq!(from.len(), to.len(), "bytes to copy");
    stream.check(&[to.device()]);
    if from.is_empty() {
        return Ok(());
    }
    stream.device().bind()?;
    // SAFETY: the memory has room; this function's contract.
    let answer = unsafe { result::memcpy_htod_async(to.address(), from, stream.raw()) };
    call("copy weights to the device", answer)
}

/// Queues a copy within the device.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths or devices differ.
pub fn copy(stream: &Stream, from: View<'_, f32>, to: ViewMut<'_, f32>) -> Result<(), KernelError> {
    assert_eq!(from.len(), to.len(), "values to copy");
    stream.check(&[from.device(), to.device()]);
    if from.is_empty() {
        return Ok(());
    }
    stream.device().bind()?;
    let bytes = from.len() * size_of::<f32>();
    // SAFETY: both are that long.
    let answer =
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), bytes, stream.raw()) };
    call("copy on the device", answer)
}

/// Rows as they lie on the host, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct HostRows<'a> {
    /// Format, size and order.
    pub shape: MatrixShape,
    /// From a row to the next ([`Layout::Rows`]); [`Layout::Interleaved`]: a sixteenth of the bytes of a group.
    pub stride_bytes: usize,
    /// The bytes, from the first row's first on.
    pub bytes: View<'a, u8>,
}

impl<'a> HostRows<'a> {
    /// The rows as products take them, where they lie so.
    pub fn as_rows(&self) -> Option<RowsView<'a>> {
        let rows = DeviceRows::from(self.shape);
        // blocks of 256 values are in another order on a device
        let fits = self.shape.layout == Layout::Rows
            && self.shape.quant.block_values() <= BLOCK
            && rows.row_bytes() == self.shape.row_bytes()
            && self.stride_bytes.is_multiple_of(16)
            && self.bytes.address().is_multiple_of(16);
        fits.then(|| RowsView::new(rows, self.stride_bytes, self.bytes))
    }
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct UnpackPlane {
    units: u32,
    unit_bytes: u32,
}

#[repr(C)]
struct UnpackArgs {
    from: u64,
    from_stride: u64,
    to: u64,
    to_stride: u64,
    n_rows: u32,
    together: u32,
    n_planes: u32,
    unused: u32,
    planes: [UnpackPlane; 3],
}

const _: () = assert!(size_of::<UnpackArgs>() == 72);

/// Threads of a block (`UNPACK_THREADS`, `TRANSPOSE_THREADS` of `kernels/cuda/streamed.cu`).
const THREADS: usize = 256;
/// Units of a row that a block takes at a time (`UNPACK_UNITS`).
const UNPACK_UNITS: usize = 128;
/// Rows and columns of a block (`TRANSPOSE_ROWS`, `TRANSPOSE_COLUMNS`).
const TRANSPOSE_TILE: [usize; 2] = [64, 128];

/// Puts rows into the order of [`DeviceRows`], one behind the other. Overwrites all of `to`, padding included.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When the format is none that runs on CUDA, lengths do not fit, or devices differ.
pub fn unpack(stream: &Stream, from: HostRows<'_>, to: ViewMut<'_, u8>) -> Result<(), KernelError> {
    let (shape, rows) = (from.shape, DeviceRows::from(from.shape));
    assert!(is_supported(shape.quant), "{} runs on CUDA", shape.quant);
    assert_eq!(to.len(), rows.bytes(), "rows to write");
    stream.check(&[from.bytes.device(), to.device()]);
    let together = shape.layout.rows_together();
    let n_groups = shape.n_rows.div_ceil(together);
    if n_groups == 0 {
        return Ok(());
    }
    let group_bytes = from.stride_bytes * together;
    let last_bytes = shape.row_bytes() * together;
    assert!(
        from.bytes.len() >= (n_groups - 1) * group_bytes + last_bytes
            && from.bytes.address().is_multiple_of(2),
        "rows to read"
    );
    if shape.quant.block_values() > BLOCK {
        return unpack_k(stream, from, to, group_bytes);
    }
    let n_blocks = shape.n_cols / shape.quant.block_values();
    let all = shape.quant.planes();
    let mut planes = [UnpackPlane::default(); 3];
    for (to, plane) in planes.iter_mut().zip(all) {
        *to = UnpackPlane {
            units: (n_blocks * plane.units) as u32,
            unit_bytes: plane.unit_bytes as u32,
        };
    }
    let args = UnpackArgs {
        from: from.bytes.address(),
        from_stride: group_bytes as u64,
        to: to.address(),
        to_stride: rows.row_bytes() as u64,
        n_rows: shape.n_rows as u32,
        together: together as u32,
        n_planes: all.len() as u32,
        unused: 0,
        planes,
    };
    let units = planes[0].units as usize;
    let grid = Grid {
        blocks: [n_groups, units.div_ceil(4 * UNPACK_UNITS).max(1)],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().prefill.unpack;
    // SAFETY: both sides are that long (asserted).
    unsafe { stream.launch("launch unpack", function, grid, args) }
}

#[repr(C)]
struct UnpackKArgs {
    from: u64,
    from_stride: u64,
    to: u64,
    to_stride: u64,
    n_rows: u32,
    together: u32,
    n_subs: u32,
    bits: u32,
}

const _: () = assert!(size_of::<UnpackKArgs>() == 48);

/// [`unpack`] for blocks of 256 values.
fn unpack_k(
    stream: &Stream,
    from: HostRows<'_>,
    to: ViewMut<'_, u8>,
    group_bytes: usize,
) -> Result<(), KernelError> {
    let shape = from.shape;
    let n_subs = shape.n_cols / BLOCK;
    let args = UnpackKArgs {
        from: from.bytes.address(),
        from_stride: group_bytes as u64,
        to: to.address(),
        to_stride: DeviceRows::from(from.shape).row_bytes() as u64,
        n_rows: shape.n_rows as u32,
        together: shape.layout.rows_together() as u32,
        n_subs: n_subs as u32,
        bits: match shape.quant {
            QuantType::Q4_K => 4,
            QuantType::Q5_K => 5,
            QuantType::Q6_K => 6,
            other => unreachable!("{other} has no blocks of 256 values on CUDA"),
        },
    };
    let grid = Grid {
        blocks: [(shape.n_rows * n_subs).div_ceil(THREADS), 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().prefill.unpack_k;
    // SAFETY: both sides are that long (the caller's assertions).
    unsafe { stream.launch("launch unpack_k", function, grid, args) }
}

/// Gates in planes as they lie on the host, in device memory.
#[derive(Debug, Clone, Copy)]
pub struct HostPlanes<'a> {
    /// Their size.
    pub shape: PlanesShape,
    /// `[shape.top_bytes()]`, from a multiple of 4 on.
    pub top: View<'a, u8>,
    /// `[shape.rest_bytes()]`, from an even byte on.
    pub rest: View<'a, u8>,
}

impl HostPlanes<'_> {
    /// What becomes of them.
    pub fn rows(shape: PlanesShape) -> DeviceRows {
        DeviceRows {
            quant: QuantType::Q4_0,
            n_rows: shape.n_rows,
            n_cols: shape.n_cols,
        }
    }
}

#[repr(C)]
struct UnpackPlanesArgs {
    top: u64,
    rest: u64,
    to: u64,
    to_stride: u64,
    n_rows: u32,
    n_blocks: u32,
}

const _: () = assert!(size_of::<UnpackPlanesArgs>() == 40);

/// [`unpack`] of gates in planes: the rows that these were made of, bit for bit.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths do not fit, or devices differ.
pub fn unpack_planes(
    stream: &Stream,
    from: HostPlanes<'_>,
    to: ViewMut<'_, u8>,
) -> Result<(), KernelError> {
    let shape = from.shape;
    let rows = HostPlanes::rows(shape);
    assert_eq!(to.len(), rows.bytes(), "rows to write");
    assert!(
        from.top.len() >= shape.top_bytes() && from.top.address().is_multiple_of(4),
        "signs to read"
    );
    assert!(
        from.rest.len() >= shape.rest_bytes() && from.rest.address().is_multiple_of(2),
        "other bits to read"
    );
    stream.check(&[from.top.device(), from.rest.device(), to.device()]);
    if shape.n_rows * shape.n_blocks() == 0 {
        return Ok(());
    }
    let args = UnpackPlanesArgs {
        top: from.top.address(),
        rest: from.rest.address(),
        to: to.address(),
        to_stride: rows.row_bytes() as u64,
        n_rows: shape.n_rows as u32,
        n_blocks: shape.n_blocks() as u32,
    };
    let grid = Grid {
        blocks: [(shape.n_rows * shape.n_blocks()).div_ceil(THREADS), 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().prefill.unpack_planes;
    // SAFETY: both sides are that long (asserted).
    unsafe { stream.launch("launch unpack_planes", function, grid, args) }
}

#[repr(C)]
struct TransposeArgs {
    rows: u64,
    stride: u64,
    to: u64,
    to_stride: u64,
    n_rows: u32,
    n_cols: u32,
}

const _: () = assert!(size_of::<TransposeArgs>() == 40);

/// Rows that hold the columns of `rows`: f16 where products round weights to that (mode `Q8`), else f32.
pub fn transposed_rows(rows: DeviceRows, mode: ActivationMode) -> DeviceRows {
    DeviceRows {
        quant: match mode {
            ActivationMode::Q8 => QuantType::F16,
            ActivationMode::F32 => QuantType::F32,
        },
        n_rows: rows.n_cols,
        n_cols: rows.n_rows,
    }
}

/// Writes the columns of `rows` as rows ([`transposed_rows`]), one behind the other, padded with zeros.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When `to` is not as long as they, or devices differ.
pub fn transpose(
    stream: &Stream,
    rows: RowsView<'_>,
    mode: ActivationMode,
    to: ViewMut<'_, u8>,
) -> Result<(), KernelError> {
    let from = rows.rows();
    let turned = transposed_rows(from, mode);
    assert_eq!(to.len(), turned.bytes(), "columns to write");
    stream.check(&[rows.bytes().device(), to.device()]);
    if from.n_rows == 0 || from.n_cols == 0 {
        return Ok(());
    }
    let args = TransposeArgs {
        rows: rows.bytes().address(),
        stride: rows.stride_bytes() as u64,
        to: to.address(),
        to_stride: turned.row_bytes() as u64,
        n_rows: from.n_rows as u32,
        n_cols: from.n_cols as u32,
    };
    let [rows_each, columns_each] = TRANSPOSE_TILE;
    let grid = Grid {
        blocks: [
            from.n_rows.div_ceil(rows_each),
            from.n_cols.div_ceil(columns_each),
        ],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().prefill.transpose(from.quant, mode);
    // SAFETY: both sides are that long (asserted by the view and above).
    unsafe { stream.launch("launch transpose", function, grid, args) }
}

/// Lets the device fail, as a defect would: the context is lost. For tests.
///
/// # Errors
/// The driver's.
pub fn trap(stream: &Stream) -> Result<(), KernelError> {
    let grid = Grid {
        blocks: [1, 1],
        threads: 1,
        shared_bytes: 0,
    };
    // SAFETY: it takes no argument, and none of its memory.
    unsafe { stream.launch("launch trap", stream.functions().trap, grid, 0u64) }
}
