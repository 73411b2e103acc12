//! Products and steps that predictors are fitted with. Sums have an order that depends on shapes alone.

use super::buffer::{DeviceBuffer, Plain, View, ViewMut};
use super::device::Device;
use super::functions::Function;
use super::stream::{Grid, Stream};
use crate::error::KernelError;

/// Values of a block's part of a product, in each direction (`FIT_TILE` of `kernels/cuda/fit.cu`).
const TILE: usize = 64;
/// Threads of a block (`FIT_THREADS`).
const THREADS: usize = 256;
/// Products that are summed in f32 before they join another sum (`FIT_SLICE`).
const SLICE: usize = 512;

/// A matrix of values in device memory, which may be turned.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a, V: Plain = f32> {
    values: View<'a, V>,
    n_rows: usize,
    n_cols: usize,
    turned: bool,
}

impl<'a, V: Plain> Matrix<'a, V> {
    /// Values `[n_rows, n_cols]`, row after row.
    ///
    /// # Panics
    /// When there are not as many.
    pub fn new(values: View<'a, V>, n_rows: usize, n_cols: usize) -> Self {
        assert_eq!(values.len(), n_rows * n_cols, "[n_rows, n_cols] values");
        Self {
            values,
            n_rows,
            n_cols,
            turned: false,
        }
    }

    /// The same with rows for columns.
    pub fn turned(self) -> Self {
        Self {
            n_rows: self.n_cols,
            n_cols: self.n_rows,
            turned: !self.turned,
            ..self
        }
    }

    fn raw(&self) -> RawMatrix {
        let (row, column) = match self.turned {
            false => (self.n_cols, 1),
            true => (1, self.n_rows),
        };
        RawMatrix {
            at: self.values.address(),
            row: row as u64,
            column: column as u64,
        }
    }
}

#[repr(C)]
struct RawMatrix {
    at: u64,
    row: u64,
    column: u64,
}

#[repr(C)]
struct ProductArgs {
    a: RawMatrix,
    b: RawMatrix,
    out: u64,
    m: u32,
    n: u32,
    k: u32,
    n_slices: u32,
}

const _: () = assert!(size_of::<ProductArgs>() == 72);

/// # Safety
/// `function` takes values of type V and writes values of type T.
unsafe fn product<V: Plain, T: Plain>(
    stream: &Stream,
    function: Function,
    [a, b]: [Matrix<'_, V>; 2],
    n_slices: usize,
    out: &ViewMut<'_, T>,
) -> Result<(), KernelError> {
    let (m, n, k) = (a.n_rows, b.n_rows, a.n_cols);
    assert_eq!(b.n_cols, k, "as many columns");
    assert_eq!(out.len(), n_slices * m * n, "[n_slices, m, n] values");
    stream.check(&[a.values.device(), b.values.device(), out.device()]);
    if m == 0 || n == 0 || n_slices == 0 {
        return Ok(());
    }
    let args = ProductArgs {
        a: a.raw(),
        b: b.raw(),
        out: out.address(),
        m: m as u32,
        n: n as u32,
        k: k as u32,
        n_slices: n_slices as u32,
    };
    let grid = Grid {
        blocks: [n.div_ceil(TILE), m.div_ceil(TILE) * n_slices],
        threads: THREADS,
        shared_bytes: 0,
    };
    // SAFETY: matrices have their shapes, and the output has room (asserted); types are the caller's contract.
    unsafe { stream.launch("launch fit_product", function, grid, args) }
}

/// Slices in which a product over `k` is summed.
pub fn n_slices(k: usize) -> usize {
    k.div_ceil(SLICE)
}

/// `a · bᵀ` of `a` `[m, k]` and `b` `[n, k]` in slices of 512 columns: overwrites `out`, `[n_slices(k), m, n]`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn product_slices(
    stream: &Stream,
    a: Matrix<'_>,
    b: Matrix<'_>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let function = stream.functions().fit.product;
    // SAFETY: the kernel takes and writes f32.
    unsafe { product(stream, function, [a, b], n_slices(a.n_cols), &out) }
}

/// `a · bᵀ` of `a` `[m, k]` and `b` `[n, k]`: 512 columns at a time are summed in f32, and these in f64. Overwrites `out`, `[m, n]`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn long_product(
    stream: &Stream,
    a: Matrix<'_>,
    b: Matrix<'_>,
    out: ViewMut<'_, f64>,
) -> Result<(), KernelError> {
    let function = stream.functions().fit.long_product;
    // SAFETY: the kernel takes f32 and writes f64.
    unsafe { product(stream, function, [a, b], 1, &out) }
}

/// `a · bᵀ` of `a` `[m, k]` and `b` `[n, k]` in f64. Overwrites `out`, `[m, n]`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn double_product(
    stream: &Stream,
    a: Matrix<'_, f64>,
    b: Matrix<'_, f64>,
    out: ViewMut<'_, f64>,
) -> Result<(), KernelError> {
    let function = stream.functions().fit.double_product;
    // SAFETY: the kernel takes and writes f64.
    unsafe { product(stream, function, [a, b], 1, &out) }
}

#[repr(C)]
struct RowsArgs {
    from: u64,
    ids: u64,
    scales: u64,
    out: u64,
    n_rows: u32,
    n_columns: u32,
    n_from: u32,
}

const _: () = assert!(size_of::<RowsArgs>() == 48);

/// Rows `ids` of `from` `[.., scales.len()]`, each column times its scale: overwrites `out`, `[ids.len(), scales.len()]`. A row that does
/// not exist is NaN.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn scaled_rows(
    stream: &Stream,
    from: View<'_, f32>,
    ids: View<'_, u32>,
    scales: View<'_, f32>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let (n_rows, n_columns) = (ids.len(), scales.len());
    assert!(from.len().is_multiple_of(n_columns), "whole rows");
    assert_eq!(out.len(), n_rows * n_columns, "[n_rows, n_columns] values");
    stream.check(&[from.device(), ids.device(), scales.device(), out.device()]);
    let args = RowsArgs {
        from: from.address(),
        ids: ids.address(),
        scales: scales.address(),
        out: out.address(),
        n_rows: n_rows as u32,
        n_columns: n_columns as u32,
        n_from: (from.len() / n_columns) as u32,
    };
    let function = stream.functions().fit.rows;
    // SAFETY: lengths fit (asserted).
    unsafe {
        stream.launch(
            "launch fit_rows",
            function,
            by_rows(n_rows, n_columns),
            args,
        )
    }
}

#[repr(C)]
struct JoinArgs {
    slices: u64,
    beside: u64,
    out: u64,
    n_slices: u32,
    n_rows: u32,
    n_columns: u32,
    backward: u32,
}

const _: () = assert!(size_of::<JoinArgs>() == 40);

/// Which way slices are joined.
#[derive(Debug, Clone, Copy)]
pub enum Join<'a> {
    /// `max(sum + bias, 0)`, biases `[n_columns]`.
    Forward(View<'a, f32>),
    /// The sum where this, which came forward, is above zero, else 0.
    Backward(View<'a, f32>),
}

/// Sums `slices` (as [`product_slices`] makes them, `[.., n_rows, n_columns]`): overwrites `out`, `[n_rows, n_columns]`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn join_slices(
    stream: &Stream,
    slices: View<'_, f32>,
    how: Join<'_>,
    n_columns: usize,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let n = out.len();
    assert!(slices.len().is_multiple_of(n), "whole slices");
    let (beside, backward) = match how {
        Join::Forward(biases) => (biases, false),
        Join::Backward(forward) => (forward, true),
    };
    let expected = if backward { n } else { n_columns };
    assert_eq!(
        beside.len(),
        expected,
        "biases, or values that came forward"
    );
    stream.check(&[slices.device(), beside.device(), out.device()]);
    let args = JoinArgs {
        slices: slices.address(),
        beside: beside.address(),
        out: out.address(),
        n_slices: (slices.len() / n) as u32,
        n_rows: (n / n_columns) as u32,
        n_columns: n_columns as u32,
        backward: backward.into(),
    };
    let function = stream.functions().fit.join;
    // SAFETY: lengths fit (asserted).
    unsafe { stream.launch("launch fit_join", function, flat(n), args) }
}

#[repr(C)]
struct ErrorsArgs {
    scores: u64,
    biases: u64,
    masses: u64,
    ids: u64,
    n_rows: u32,
    n_columns: u32,
    n_masses: u32,
    unit: f32,
    most: f32,
}

const _: () = assert!(size_of::<ErrorsArgs>() == 56);

/// What neurons' scores are trained towards.
#[derive(Debug, Clone, Copy)]
pub struct LossOf<'a> {
    /// `[.., biases.len()]`
    pub masses: View<'a, f32>,
    /// Rows of it, one for each row of scores. One that does not exist gives NaN.
    pub ids: View<'a, u32>,
    /// Mass that weighs as much as a missed chance to skip.
    pub unit: f32,
    /// Most that a mass weighs.
    pub most: f32,
}

/// Overwrites `scores` `[ids.len(), biases.len()]` with how the loss changes with them: with s = score + bias and w = mass / unit, at
/// most `most`, the loss is `w · softplus(−s) + softplus(s)`, in the mean over rows.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn score_errors(
    stream: &Stream,
    scores: ViewMut<'_, f32>,
    biases: View<'_, f32>,
    loss: LossOf<'_>,
) -> Result<(), KernelError> {
    let (n_rows, n_columns) = (loss.ids.len(), biases.len());
    assert_eq!(
        scores.len(),
        n_rows * n_columns,
        "[n_rows, n_columns] scores"
    );
    assert!(loss.masses.len().is_multiple_of(n_columns), "whole rows");
    stream.check(&[
        scores.device(),
        biases.device(),
        loss.masses.device(),
        loss.ids.device(),
    ]);
    let args = ErrorsArgs {
        scores: scores.address(),
        biases: biases.address(),
        masses: loss.masses.address(),
        ids: loss.ids.address(),
        n_rows: n_rows as u32,
        n_columns: n_columns as u32,
        n_masses: (loss.masses.len() / n_columns) as u32,
        unit: loss.unit,
        most: loss.most,
    };
    let function = stream.functions().fit.errors;
    let grid = by_rows(n_rows, n_columns);
    // SAFETY: lengths fit (asserted).
    unsafe { stream.launch("launch fit_errors", function, grid, args) }
}

#[repr(C)]
struct ColumnsArgs {
    values: u64,
    sums: u64,
    n_rows: u32,
    n_columns: u32,
}

const _: () = assert!(size_of::<ColumnsArgs>() == 24);

/// Overwrites `sums` with those of the columns of `values` `[.., sums.len()]`.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn column_sums(
    stream: &Stream,
    values: View<'_, f32>,
    sums: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let n_columns = sums.len();
    assert!(values.len().is_multiple_of(n_columns), "whole rows");
    stream.check(&[values.device(), sums.device()]);
    let args = ColumnsArgs {
        values: values.address(),
        sums: sums.address(),
        n_rows: (values.len() / n_columns) as u32,
        n_columns: n_columns as u32,
    };
    let function = stream.functions().fit.columns;
    // SAFETY: lengths fit (asserted).
    unsafe { stream.launch("launch fit_columns", function, flat(n_columns), args) }
}

#[repr(C)]
struct AdamArgs {
    values: u64,
    mean: u64,
    square: u64,
    gradient: u64,
    n: u64,
    rate: f32,
    decay: [f32; 2],
    unbias: [f32; 2],
}

const _: () = assert!(size_of::<AdamArgs>() == 64);

/// Size of a step of Adam.
#[derive(Debug, Clone, Copy)]
pub struct AdamStep {
    /// The rate.
    pub rate: f32,
    /// Of the mean gradient, and of the mean square.
    pub decay: [f32; 2],
    /// What makes up for means that began at zero.
    pub unbias: [f32; 2],
}

/// Parameters with their means.
#[derive(Debug)]
pub struct Parameters {
    values: DeviceBuffer<f32>,
    mean: DeviceBuffer<f32>,
    square: DeviceBuffer<f32>,
}

impl Parameters {
    /// Copies `values`; means are zero.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device, values: &[f32]) -> Result<Self, KernelError> {
        let mut on_device = device.alloc(values.len())?;
        on_device.write(0, values)?;
        Ok(Self {
            values: on_device,
            mean: device.alloc(values.len())?,
            square: device.alloc(values.len())?,
        })
    }

    /// The parameters.
    pub fn values(&self) -> View<'_, f32> {
        self.values.view(..)
    }

    /// One step of Adam against `gradient`.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When lengths or devices do not fit.
    pub fn update(
        &mut self,
        stream: &Stream,
        gradient: View<'_, f32>,
        step: AdamStep,
    ) -> Result<(), KernelError> {
        let n = self.values.len();
        assert_eq!(gradient.len(), n, "a gradient per parameter");
        stream.check(&[self.values.device(), gradient.device()]);
        let args = AdamArgs {
            values: self.values.view_mut(..).address(),
            mean: self.mean.view_mut(..).address(),
            square: self.square.view_mut(..).address(),
            gradient: gradient.address(),
            n: n as u64,
            rate: step.rate,
            decay: step.decay,
            unbias: step.unbias,
        };
        let function = stream.functions().fit.adam;
        // SAFETY: all have `n` values.
        unsafe { stream.launch("launch fit_adam", function, flat(n), args) }
    }
}

/// A thread for each of `n` values.
fn flat(n: usize) -> Grid {
    by_rows(1, n)
}

/// A thread for each column of each row.
fn by_rows(n_rows: usize, n_columns: usize) -> Grid {
    Grid {
        blocks: [n_columns.div_ceil(THREADS).max(1), n_rows.max(1)],
        threads: THREADS,
        shared_bytes: 0,
    }
}
