//! Rows times one token's activations: a matrix, some rows of it, or gate and up of neurons.

use super::activations::{DeviceAct, RawAct};
use super::buffer::{View, ViewMut};
use super::functions::{ROWS_THEN_NORM_THREADS, ROWS_THREADS};
use super::layout::{DeviceRows, RowsView, item_values};
use super::stream::{Grid, Stream};
use super::then_norm::{RawNormBefore, RawThenNorm, ThenNorm, can_norm};
use crate::activations::ActivationMode;
use crate::error::KernelError;
use crate::quant::BLOCK;

/// What is added to a result.
#[derive(Debug, Clone, Copy)]
pub enum Add<'a> {
    /// Nothing: the output is overwritten.
    None,
    /// Values as long as the output, which is overwritten: a bias, or a residual stream that goes on elsewhere.
    Values(View<'a, f32>),
    /// What the output holds: results are accumulated into it.
    Out,
}

impl Add<'_> {
    /// The address, 0 for none; asserts the length.
    pub(super) fn address(&self, out: &ViewMut<'_, f32>) -> u64 {
        match self {
            Add::None => 0,
            Add::Values(values) => {
                assert_eq!(values.len(), out.len(), "values to add");
                values.address()
            }
            Add::Out => out.address(),
        }
    }

    pub(super) fn check(&self, stream: &Stream) {
        if let Add::Values(values) = self {
            stream.check(&[values.device()]);
        }
    }
}

/// Which rows or neurons, in ascending order.
#[derive(Debug, Clone, Copy)]
pub enum NeuronList<'a> {
    /// All of them.
    All,
    /// The first `count[0]` of `ids`, read when the kernel runs. A count over the list's length is cut to it. Both have to be
    /// there when the launch before starts: kernels ask for the first rows while that one ends.
    Ids {
        /// `[n_max]` u32.
        ids: View<'a, u32>,
        /// `[1]` u32.
        count: View<'a, u32>,
    },
}

impl NeuronList<'_> {
    /// Addresses of ids and count (0: all rows), and how many there can be.
    pub(super) fn raw(&self, stream: &Stream, n_rows: usize) -> (u64, u64, usize) {
        match self {
            NeuronList::All => (0, 0, n_rows),
            NeuronList::Ids { ids, count } => {
                assert_eq!(count.len(), 1, "one count");
                stream.check(&[ids.device(), count.device()]);
                (ids.address(), count.address(), ids.len())
            }
        }
    }
}

#[repr(C)]
struct RowsArgs {
    rows: u64,
    stride: u64,
    up: u64,
    up_stride: u64,
    ids: u64,
    n_ids: u64,
    n_rows: u32,
    n_out: u32,
    x: RawAct,
    add: u64,
    out: u64,
    gates: u32,
    together: u32,
    norm: RawNormBefore,
}

const _: () = assert!(size_of::<RowsArgs>() == 136);

#[repr(C)]
struct RowsThenNormArgs {
    rows: u64,
    stride: u64,
    n_rows: u32,
    x: RawAct,
    add: u64,
    out: u64,
    then: RawThenNorm,
    norm: RawNormBefore,
}

const _: () = assert!(size_of::<RowsThenNormArgs>() == 168);

/// Items of a row, in blocks' threads, from which on a block's warps take it together: work is divided more evenly.
const TOGETHER_ITEMS_MIN: usize = 2;
/// Warps of a block.
const WARPS: usize = ROWS_THREADS / 32;

/// Writes the products of all rows of `m` (`[n_rows, n_cols]`) with `x` (`[n_cols]`), plus `add`, to `out`
/// (`[n_rows]` f32). As [`crate::gemm::gemv`], but for the order of the sum.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn gemv(
    stream: &Stream,
    m: RowsView<'_>,
    x: &DeviceAct,
    add: Add<'_>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    launch(
        stream,
        "launch gemv",
        m,
        None,
        NeuronList::All,
        x,
        add,
        Gates::Silu,
        out,
    )
}

/// Whether [`gemv_then_norm`] takes rows of this format and size.
pub fn can_norm_products(rows: DeviceRows, mode: ActivationMode) -> bool {
    rows.quant.is_quantised() && can_norm(rows.n_rows, mode)
}

/// As [`gemv`] with [`Add::Out`], and the first half of a norm of `out` in the same launch.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit, or not [`can_norm_products`].
pub fn gemv_then_norm(
    stream: &Stream,
    m: RowsView<'_>,
    x: &DeviceAct,
    then: ThenNorm<'_>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let shape = m.rows();
    assert!(
        can_norm_products(shape, x.mode()),
        "rows that can be normed"
    );
    assert_eq!(x.n_cols(), shape.n_cols, "columns");
    assert_eq!(out.len(), shape.n_rows, "one output per row");
    stream.check(&[m.bytes().device(), x.device(), out.device()]);
    let args = RowsThenNormArgs {
        rows: m.bytes().address(),
        stride: m.stride_bytes() as u64,
        n_rows: shape.n_rows as u32,
        x: x.raw(),
        add: out.address(),
        out: out.address(),
        then: then.raw(stream, shape.n_rows),
        norm: x.norm(),
    };
    let kernel = stream.functions().rows_then_norm(shape.quant);
    let room = stream.device().info().n_multiprocessors * kernel.blocks_per_multiprocessor;
    let grid = Grid {
        blocks: [(shape.n_rows / BLOCK).min(room), 1],
        threads: ROWS_THEN_NORM_THREADS,
        shared_bytes: 0,
    };
    // SAFETY: rows, activations and output fit (asserted), and are in 8-bit arithmetic.
    unsafe { stream.launch("launch gemv_then_norm", kernel.function, grid, args) }
}

/// As [`gemv`], of the rows in `list` only: `out[j]` (f32, as long as the list) belongs to the j-th. Places
/// behind the count are left alone.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn row_products(
    stream: &Stream,
    rows: RowsView<'_>,
    list: NeuronList<'_>,
    x: &DeviceAct,
    add: Add<'_>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    launch(
        stream,
        "launch row_products",
        rows,
        None,
        list,
        x,
        add,
        Gates::Silu,
        out,
    )
}

/// What lies between gate and up, as the kernel numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Gates {
    /// SiLU.
    Silu = 0,
    /// ReLU; up rows of closed gates (≤ 0) are not read.
    Relu = 1,
    /// ReLU; they are read, for the same result.
    ReluDense = 2,
    /// GELU, in its tanh form.
    Gelu = 3,
}

/// Writes `act(gate · x) · (up · x)` of each neuron in `list` to `out` (f32, as long as the list). With ReLU a closed gate
/// gives 0. Places behind the count are left alone.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes, formats or devices do not fit.
pub fn gate_up(
    stream: &Stream,
    gate: RowsView<'_>,
    up: RowsView<'_>,
    list: NeuronList<'_>,
    x: &DeviceAct,
    gates: Gates,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    assert_eq!(gate.rows(), up.rows(), "gate and up of the same neurons");
    launch(
        stream,
        "launch gate_up",
        gate,
        Some(up),
        list,
        x,
        Add::None,
        gates,
        out,
    )
}

fn launch(
    stream: &Stream,
    operation: &'static str,
    rows: RowsView<'_>,
    up: Option<RowsView<'_>>,
    list: NeuronList<'_>,
    x: &DeviceAct,
    add: Add<'_>,
    gates: Gates,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let shape = rows.rows();
    let (ids, n_ids, n_out) = list.raw(stream, shape.n_rows);
    assert_eq!(x.n_cols(), shape.n_cols, "columns");
    assert_eq!(out.len(), n_out, "one output per row");
    stream.check(&[rows.bytes().device(), x.device(), out.device()]);
    add.check(stream);
    let norm = x.norm();
    assert!(
        norm.squares == 0 || shape.quant.is_quantised(),
        "rows that take a norm's scale"
    );
    if n_out == 0 {
        return Ok(());
    }
    let items = shape.n_cols / item_values(shape.quant);
    let together = items >= TOGETHER_ITEMS_MIN * ROWS_THREADS;
    let args = RowsArgs {
        rows: rows.bytes().address(),
        stride: rows.stride_bytes() as u64,
        up: up.map_or(0, |up| up.bytes().address()),
        up_stride: up.map_or(0, |up| up.stride_bytes() as u64),
        ids,
        n_ids,
        n_rows: shape.n_rows as u32,
        n_out: n_out as u32,
        x: x.raw(),
        add: add.address(&out),
        out: out.address(),
        gates: gates as u32,
        together: u32::from(together),
        norm,
    };
    // of a list gate and up rows are taken at once, where none of the latter is left out
    let pairs = up.is_some() && gates != Gates::Relu && matches!(list, NeuronList::Ids { .. });
    let functions = stream.functions();
    let kernel = match pairs && x.mode() == ActivationMode::Q8 && shape.quant.is_quantised() {
        true => functions.row_pairs(shape.quant),
        false => functions.rows(shape.quant, x.mode()),
    };
    let n_teams = if together {
        n_out
    } else {
        n_out.div_ceil(WARPS)
    };
    // no more blocks than there is room for: each asks for its next row before it computes one
    let n_multiprocessors = stream.device().info().n_multiprocessors;
    let room = n_multiprocessors * kernel.blocks_per_multiprocessor;
    let n_blocks = n_teams.min(room);
    let grid = Grid {
        blocks: [n_blocks, 1],
        threads: ROWS_THREADS,
        shared_bytes: 0,
    };
    // SAFETY: rows, activations, list and output fit (asserted); activations have what their mode's kernel reads.
    unsafe { stream.launch(operation, kernel.function, grid, args) }
}
