//! Rows times one token's activations: a matrix, some rows of it, or gate and up of neurons.

use super::activations::{DeviceAct, RawAct};
use super::buffer::{View, ViewMut};
use super::functions::{ROWS_THEN_NORM_THREADS, ROWS_THREADS};
use super::layout::{DeviceRows, RowsView, item_values};
use super::predict::{ListMasks, PredictHidden, RawHidden, RawListMasks};
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
struct RowPairsArgs {
    pairs: RowsArgs,
    hidden: RawHidden,
    n_blocks: u32,
    late: u32,
}

const _: () = assert!(size_of::<RowPairsArgs>() == 240);

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
    list: RawListMasks,
}

const _: () = assert!(size_of::<RowsThenNormArgs>() == 248);

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
    let what = Rows::products(m, add);
    launch(stream, "launch gemv", what, NeuronList::All, x, out)
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
    gemv_then_norm_with(stream, m, x, then, None, out)
}

/// The same, with a list made beside.
///
/// # Errors
/// As [`gemv_then_norm`].
///
/// # Panics
/// As [`gemv_then_norm`], or when shapes of the list do not fit.
pub fn gemv_then_norm_with(
    stream: &Stream,
    m: RowsView<'_>,
    x: &DeviceAct,
    then: ThenNorm<'_>,
    list: Option<ListMasks<'_>>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let n_lists = usize::from(list.is_some());
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
        list: list.map_or(RawListMasks::NONE, |list| list.raw(stream)),
    };
    let kernel = stream.functions().rows_then_norm(shape.quant);
    let room = stream.device().info().n_multiprocessors * kernel.blocks_per_multiprocessor;
    let grid = Grid {
        blocks: [(shape.n_rows / BLOCK).min(room) + n_lists, 1],
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
    let what = Rows::products(rows, add);
    launch(stream, "launch row_products", what, list, x, out)
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
    let beside = BesideGates::default();
    gate_up_with(stream, gate, up, list, x, gates, beside, out)
}

/// What a launch of gates and ups does besides, and needs not.
#[derive(Debug, Default)]
pub struct BesideGates<'a> {
    /// Hidden values of a predictor.
    pub hidden: Option<PredictHidden<'a>>,
    /// The launch before makes the list: it is read when that one has ended.
    pub late: bool,
}

/// The same of a list, with what is beside it.
///
/// # Errors
/// As [`gate_up`].
///
/// # Panics
/// As [`gate_up`]; when something is beside it, and not [`takes_pairs`]; when shapes of what is beside do not fit.
pub fn gate_up_with(
    stream: &Stream,
    gate: RowsView<'_>,
    up: RowsView<'_>,
    list: NeuronList<'_>,
    x: &DeviceAct,
    gates: Gates,
    beside: BesideGates<'_>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    assert_eq!(gate.rows(), up.rows(), "gate and up of the same neurons");
    let operation = "launch gate_up";
    let what = Rows {
        rows: gate,
        up: Some(up),
        gates,
        add: Add::None,
        beside,
    };
    launch(stream, operation, what, list, x, out)
}

/// Whether gate and up rows of a list are taken at once, as none of the latter is left out.
pub fn takes_pairs(rows: DeviceRows, gates: Gates, mode: ActivationMode) -> bool {
    gates != Gates::Relu && mode == ActivationMode::Q8 && rows.quant.is_quantised()
}

/// What [`launch`] launches.
struct Rows<'a> {
    rows: RowsView<'a>,
    up: Option<RowsView<'a>>,
    gates: Gates,
    add: Add<'a>,
    beside: BesideGates<'a>,
}

impl<'a> Rows<'a> {
    /// The products themselves.
    fn products(rows: RowsView<'a>, add: Add<'a>) -> Self {
        Self {
            rows,
            up: None,
            gates: Gates::Silu,
            add,
            beside: BesideGates::default(),
        }
    }
}

fn launch(
    stream: &Stream,
    operation: &'static str,
    what: Rows<'_>,
    list: NeuronList<'_>,
    x: &DeviceAct,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let Rows {
        rows,
        up,
        gates,
        add,
        beside,
    } = what;
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
    let is_list = matches!(list, NeuronList::Ids { .. });
    let pairs = up.is_some() && is_list && takes_pairs(shape, gates, x.mode());
    let is_alone = beside.hidden.is_none() && !beside.late;
    assert!(
        is_alone || pairs && n_out > 0,
        "something beside pairs of a list"
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
    let functions = stream.functions();
    let kernel = match pairs {
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
    let (hidden, n_beside) = beside
        .hidden
        .map_or((RawHidden::NONE, 0), |hidden| hidden.raw(stream, WARPS));
    // nor more of those beside than one a multiprocessor
    let n_beside = n_beside.min(n_multiprocessors).min(room - 1);
    let n_blocks = n_teams.min(room - n_beside);
    let grid = Grid {
        blocks: [n_blocks + n_beside, 1],
        threads: ROWS_THREADS,
        shared_bytes: 0,
    };
    if pairs {
        let args = RowPairsArgs {
            pairs: args,
            hidden,
            n_blocks: n_blocks as u32,
            late: u32::from(beside.late),
        };
        // SAFETY: rows, activations, list and output fit, as does what is beside (asserted); there are 8-bit activations.
        return unsafe { stream.launch(operation, kernel.function, grid, args) };
    }
    // SAFETY: rows, activations, list and output fit (asserted); activations have what their mode's kernel reads.
    unsafe { stream.launch(operation, kernel.function, grid, args) }
}
