//! A predictor's work beside the token's own launches, in blocks of these that would have nothing to do: no launch waits for it. Its hidden values
//! beside gates and ups of the layer before, scores as a bit for each neuron beside attention, the list of these bits beside the output
//! projection.

use super::activations::{DeviceAct, RawAct};
use super::buffer::{View, ViewMut};
use super::layout::{DeviceRows, RowsView, item_values};
use super::rows::Add;
use super::stream::Stream;
use super::then_norm::RawNormBefore;
use crate::activations::ActivationMode;
use crate::quant::{BLOCK, QuantType};

/// Fewest lanes that take a row of scores, and most items that one has.
const LANES_MIN: usize = 4;
const TOGETHER: usize = 4;
/// Rows of scores that a warp takes, for a byte of masks.
const WARP_ROWS: usize = 8;
/// Most hidden values: they lie in shared memory.
const N_HIDDEN_MAX: usize = 32 * BLOCK;

const _: () = assert!(N_HIDDEN_MAX <= BLOCK * TOGETHER * WARP_ROWS);

/// Whether a predictor with these rows, of its two products, is taken: those that `pi-runtime prepare` writes are, up to 1024 hidden values.
pub fn can_predict(hidden: DeviceRows, scores: DeviceRows, mode: ActivationMode) -> bool {
    let formats = [hidden.quant, scores.quant] == [QuantType::Q4_0; 2];
    formats && mode == ActivationMode::Q8 && scores.n_cols <= N_HIDDEN_MAX
}

/// Words of masks for `n` neurons, a bit each.
pub fn mask_words(n: usize) -> usize {
    n.div_ceil(u32::BITS as usize)
}

/// Blocks of `warps` warps that take all scores of `n` neurons at once.
pub(super) fn predict_blocks(n: usize, warps: usize) -> usize {
    n.div_ceil(WARP_ROWS * warps)
}

/// Writes the products of all rows with `x` (`[n_cols]`), plus `add`, to `out` (`[n_rows]` f32), as [`super::gemv`] does.
#[derive(Debug)]
pub struct PredictHidden<'a> {
    /// `[n_rows, n_cols]`
    pub rows: RowsView<'a>,
    /// `[n_cols]`, of an earlier launch.
    pub x: &'a DeviceAct,
    /// Added to the products.
    pub add: Add<'a>,
    /// `[n_rows]` f32, which nobody else reads or writes meanwhile.
    pub out: ViewMut<'a, f32>,
}

/// `PredictHiddenArgs` of `kernels/cuda/predict.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawHidden {
    rows: u64,
    stride: u64,
    n_rows: u32,
    x: RawAct,
    add: u64,
    out: u64,
    norm: RawNormBefore,
}

const _: () = assert!(size_of::<RawHidden>() == 96);

impl RawHidden {
    /// Nothing.
    pub(super) const NONE: Self = Self {
        rows: 0,
        stride: 0,
        n_rows: 0,
        x: RawAct::NONE,
        add: 0,
        out: 0,
        norm: RawNormBefore {
            squares: 0,
            eps: 0.0,
        },
    };
}

impl PredictHidden<'_> {
    /// For a launch whose blocks have `warps` warps; and how many blocks take all rows at once.
    ///
    /// # Panics
    /// When shapes, formats or devices do not fit.
    pub(super) fn raw(self, stream: &Stream, warps: usize) -> (RawHidden, usize) {
        let shape = self.rows.rows();
        let taken = shape.quant == QuantType::Q4_0 && self.x.mode() == ActivationMode::Q8;
        assert!(taken, "rows that are taken");
        assert_eq!(self.x.n_cols(), shape.n_cols, "columns");
        assert_eq!(self.out.len(), shape.n_rows, "one output per row");
        let devices = [
            self.rows.bytes().device(),
            self.x.device(),
            self.out.device(),
        ];
        stream.check(&devices);
        self.add.check(stream);
        let raw = RawHidden {
            rows: self.rows.bytes().address(),
            stride: self.rows.stride_bytes() as u64,
            n_rows: shape.n_rows as u32,
            x: self.x.raw(),
            add: self.add.address(&self.out),
            out: self.out.address(),
            norm: self.x.norm(),
        };
        (raw, shape.n_rows.div_ceil(warps))
    }
}

/// Sets bit `i % 32` of word `i / 32` of `masks` where neuron `i`'s `rows · hidden + bias` is above zero, or NaN, and clears the others. As
/// [`super::prepare`] and [`super::gemv`], but for the order of the sum.
#[derive(Debug)]
pub struct PredictMasks<'a> {
    /// `[n, n_hidden]`
    pub rows: RowsView<'a>,
    /// `[n]` f32, added to the products.
    pub bias: View<'a, f32>,
    /// `[n_hidden]` f32: what the rows are multiplied with. It has to be there when the launch before starts.
    pub hidden: View<'a, f32>,
    /// Whether it is rectified before; NaN stays.
    pub relu: bool,
    /// `[mask_words(n)]` u32, zeros from the `n`-th bit on, which the launch before neither reads nor writes.
    pub masks: ViewMut<'a, u32>,
}

/// `PredictArgs` of `kernels/cuda/predict.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawMasks {
    rows: u64,
    stride: u64,
    hidden: u64,
    bias: u64,
    masks: u64,
    n_rows: u32,
    n_cols: u32,
    relu: u32,
    lanes: u32,
}

const _: () = assert!(size_of::<RawMasks>() == 56);

impl RawMasks {
    /// Nothing.
    pub(super) const NONE: Self = Self {
        rows: 0,
        stride: 0,
        hidden: 0,
        bias: 0,
        masks: 0,
        n_rows: 0,
        n_cols: 0,
        relu: 0,
        lanes: 0,
    };
}

impl PredictMasks<'_> {
    /// For a launch whose blocks have `warps` warps; and how many blocks take all rows at once.
    ///
    /// # Panics
    /// When shapes, formats or devices do not fit.
    pub(super) fn raw(self, stream: &Stream, warps: usize) -> (RawMasks, usize) {
        let shape = self.rows.rows();
        let (n, n_hidden) = (shape.n_rows, shape.n_cols);
        let taken = shape.quant == QuantType::Q4_0 && n_hidden <= N_HIDDEN_MAX;
        assert!(taken, "rows that are taken");
        assert_eq!(self.hidden.len(), n_hidden, "columns");
        assert_eq!(self.bias.len(), n, "a bias for each neuron");
        assert_eq!(self.masks.len(), mask_words(n), "a bit for each neuron");
        let devices = [
            self.rows.bytes().device(),
            self.bias.device(),
            self.hidden.device(),
            self.masks.device(),
        ];
        stream.check(&devices);
        let items = n_hidden / item_values(shape.quant);
        let lanes = items.div_ceil(TOGETHER).next_power_of_two();
        let raw = RawMasks {
            rows: self.rows.bytes().address(),
            stride: self.rows.stride_bytes() as u64,
            hidden: self.hidden.address(),
            bias: self.bias.address(),
            masks: self.masks.address(),
            n_rows: n as u32,
            n_cols: n_hidden as u32,
            relu: u32::from(self.relu),
            lanes: lanes.max(LANES_MIN) as u32,
        };
        (raw, predict_blocks(n, warps))
    }
}

/// Lists, in ascending order, which neurons have their bit set, and how many; places behind the count are left alone.
#[derive(Debug)]
pub struct ListMasks<'a> {
    /// `[mask_words(n)]` u32, as [`PredictMasks`] writes them.
    pub masks: View<'a, u32>,
    /// `[n]` u32.
    pub ids: ViewMut<'a, u32>,
    /// `[1]` u32.
    pub count: ViewMut<'a, u32>,
}

/// `ListMasksArgs` of `kernels/cuda/predict.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawListMasks {
    masks: u64,
    ids: u64,
    count: u64,
    n: u32,
}

const _: () = assert!(size_of::<RawListMasks>() == 32);

impl RawListMasks {
    /// Nothing.
    pub(super) const NONE: Self = Self {
        masks: 0,
        ids: 0,
        count: 0,
        n: 0,
    };
}

impl ListMasks<'_> {
    /// # Panics
    /// When lengths or devices do not fit.
    pub(super) fn raw(self, stream: &Stream) -> RawListMasks {
        let n = self.ids.len();
        assert_eq!(self.masks.len(), mask_words(n), "a bit for each neuron");
        assert_eq!(self.count.len(), 1, "one count");
        stream.check(&[self.masks.device(), self.ids.device(), self.count.device()]);
        RawListMasks {
            masks: self.masks.address(),
            ids: self.ids.address(),
            count: self.count.address(),
            n: n as u32,
        }
    }
}
