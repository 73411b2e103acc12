//! Rows of some neurons times x: `up` of active ones, and gates of candidates.

use std::ops::Range;

use super::NeuronRows;
use crate::activations::{ActBatch, ActRef, ActivationMode};
use crate::cpu::{Cpu, Tier};
use crate::dot::scalar;
#[cfg(target_arch = "x86_64")]
use crate::dot::{rows256, rows512};
use crate::gemm::gemm;
use crate::matrix::{Layout, MatrixRef, MatrixShape, ROW_GROUP, StridedOut};
use crate::quant::{BLOCK, QuantType};

/// Rows are asked for so many rows before they are read.
const AHEAD: usize = 16;
/// Float rows that are multiplied together: the sum of one waits for itself at every step.
const FLOAT_ROWS: usize = 4;

/// Writes `gate[j] · (up[ids[j]] · x)` to `out[j]` (overwritten); `x` is `[n_embd]`. `beside` is called
/// with each `j` when its row is asked for, and may ask for others.
///
/// # Panics
/// When an id has no row, or lengths differ.
pub fn up_active(
    cpu: Cpu,
    up: NeuronRows<'_>,
    x: ActRef<'_>,
    ids: &[u32],
    gate: &[f32],
    out: &mut [f32],
    beside: impl FnMut(usize),
) {
    assert_eq!(ids.len(), gate.len(), "one gate per id");
    products_beside(cpu, up, x, ids, out, beside);
    for (out, gate) in out.iter_mut().zip(gate) {
        *out *= gate;
    }
}

/// For [`up_active`]: asks beside the first `n_rows` rows that this thread multiplies, in equal steps, for
/// columns `columns` of the down rows of all `ids`, which it will sum. Beside further rows it asks for nothing.
///
/// # Panics
/// When called, and an id has no row.
pub fn ask_for_down<'a>(
    down: NeuronRows<'a>,
    columns: Range<usize>,
    ids: &'a [u32],
    n_rows: usize,
) -> impl FnMut(usize) + 'a {
    let mut asked = 0;
    move |j| {
        let next = ids.len() * (j + 1).min(n_rows) / n_rows.max(1);
        for &id in &ids[asked..next] {
            down.prefetch(id as usize, columns.clone());
        }
        asked = next;
    }
}

/// Writes `rows[ids[j]] · x` to `out[j]` (overwritten); `x` is `[n_embd]`. The bits equal
/// [`crate::gemm::gemv`]'s.
///
/// # Panics
/// When an id has no row, or lengths differ.
pub fn row_products(cpu: Cpu, rows: NeuronRows<'_>, x: ActRef<'_>, ids: &[u32], out: &mut [f32]) {
    products_beside(cpu, rows, x, ids, out, |_| ());
}

fn products_beside(
    cpu: Cpu,
    rows: NeuronRows<'_>,
    x: ActRef<'_>,
    ids: &[u32],
    out: &mut [f32],
    mut beside: impl FnMut(usize),
) {
    assert!(
        ids.len() == out.len() && x.values.len() >= rows.n_embd,
        "one output per id, activations of n_embd {}",
        rows.n_embd
    );
    let q8 = cpu.mode() == ActivationMode::Q8 && rows.quant.is_quantised();
    let n_blocks = rows.n_embd / BLOCK;
    assert!(
        !q8 || x.q.len() >= rows.n_embd
            && x.scales.len() >= n_blocks
            && x.block_sums.len() >= n_blocks,
        "activations have 8-bit blocks"
    );
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx512Vnni && q8 && rows.quant == QuantType::Q4_0 {
        // each row is there
        ids.iter().for_each(|&id| _ = rows.row(id as usize));
        // SAFETY: as below; all rows are there.
        unsafe {
            rows512::products(&rows512::Q4_0(rows), x, n_blocks, ids, out, &mut beside);
        }
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx2
        && q8
        && rows.quant == QuantType::Q4_0
        && ids.len() >= rows256::ROWS_MIN
    {
        // each row is there
        ids.iter().for_each(|&id| _ = rows.row(id as usize));
        // SAFETY: a `Cpu` exists only for tiers that the machine has; `x` fits, and all rows are there.
        unsafe { rows256::products(rows, x, ids, out, &mut beside) };
        return;
    }
    let mut ask_for = |js: Range<usize>, rows_too: bool| {
        for j in js.start..js.end.min(ids.len()) {
            if rows_too {
                rows.prefetch(ids[j] as usize, 0..rows.n_embd);
            }
            beside(j);
        }
    };
    if !rows.quant.is_quantised() {
        // each asks for the next ones itself
        ask_for(0..FLOAT_ROWS, true);
        for first in (0..ids.len()).step_by(FLOAT_ROWS) {
            let these = first..(first + FLOAT_ROWS).min(ids.len());
            ask_for(these.end..these.end + FLOAT_ROWS, false);
            float_products(cpu, rows, x, ids, these.clone(), &mut out[these]);
        }
        return;
    }
    ask_for(0..AHEAD, true);
    for (j, (id, out)) in ids.iter().zip(out).enumerate() {
        ask_for(j + AHEAD..j + AHEAD + 1, true);
        let (ids, out) = (std::slice::from_ref(id), std::slice::from_mut(out));
        products(cpu, rows, x, q8, ids, out);
    }
}

/// Products of float rows `these` of `ids`, at most [`FLOAT_ROWS`], while those behind them are asked for.
fn float_products(
    cpu: Cpu,
    rows: NeuronRows<'_>,
    x: ActRef<'_>,
    ids: &[u32],
    these: Range<usize>,
    out: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx2 {
        // SAFETY: a `Cpu` exists only for tiers that the machine has; `x` fits.
        unsafe { x86::float_products(rows, x, ids, these, out) };
        return;
    }
    products(cpu, rows, x, false, &ids[these], out);
}

/// Products of rows that are known to fit.
fn products(cpu: Cpu, rows: NeuronRows<'_>, x: ActRef<'_>, q8: bool, ids: &[u32], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx2 {
        // SAFETY: a `Cpu` exists only for tiers that the machine has; `x` fits.
        unsafe { x86::row_products(rows, x, q8, ids, out) };
        return;
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    for (&id, out) in ids.iter().zip(out) {
        *out = scalar::dot(rows.matrix(id as usize), 0, x, cpu.mode());
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::dot::row::{self, RowPlanes, RowUnpack};

    /// # Safety
    /// The machine has AVX2, FMA and F16C; `x` has `rows.n_embd` values, with 8-bit blocks for `q8`.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn row_products(
        rows: NeuronRows<'_>,
        x: ActRef<'_>,
        q8: bool,
        ids: &[u32],
        out: &mut [f32],
    ) {
        // SAFETY: this function's contract.
        unsafe {
            match rows.quant {
                QuantType::F32 | QuantType::F16 | QuantType::BF16 => {
                    float_products(rows, x, ids, 0..ids.len(), out);
                }
                QuantType::Q4_0 => blocks::<row::Q4_0>(rows, x, q8, ids, out),
                QuantType::Q4_1 => blocks::<row::Q4_1>(rows, x, q8, ids, out),
                QuantType::Q5_0 => blocks::<row::Q5_0>(rows, x, q8, ids, out),
                QuantType::Q5_1 => blocks::<row::Q5_1>(rows, x, q8, ids, out),
                QuantType::Q8_0 => blocks::<row::Q8_0>(rows, x, q8, ids, out),
                QuantType::Q2_K => blocks::<row::Q2_K>(rows, x, q8, ids, out),
                QuantType::Q3_K => blocks::<row::Q3_K>(rows, x, q8, ids, out),
                QuantType::Q4_K => blocks::<row::Q4_K>(rows, x, q8, ids, out),
                QuantType::Q5_K => blocks::<row::Q5_K>(rows, x, q8, ids, out),
                QuantType::Q6_K => blocks::<row::Q6_K>(rows, x, q8, ids, out),
            }
        }
    }

    /// Products of rows `these` of `ids`, while those behind each are asked for.
    ///
    /// # Safety
    /// As [`row_products`].
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn float_products(
        rows: NeuronRows<'_>,
        x: ActRef<'_>,
        ids: &[u32],
        these: Range<usize>,
        out: &mut [f32],
    ) {
        // behind the last one that one again
        let at = |j: usize| rows.row(ids[j.min(ids.len() - 1)] as usize).as_ptr();
        let mut j = these.start;
        let (fours, rest) = out.as_chunks_mut::<FLOAT_ROWS>();
        for out in fours {
            let [now, next] = [j, j + FLOAT_ROWS].map(|j| std::array::from_fn(|n| at(j + n)));
            // SAFETY: the rows are whole, `x` has their columns.
            *out = unsafe { row::dot_floats(rows.quant, now, next, rows.n_embd, x) };
            j += FLOAT_ROWS;
        }
        for out in rest {
            // SAFETY: as above.
            [*out] = unsafe { row::dot_floats(rows.quant, [at(j)], [at(j + 1)], rows.n_embd, x) };
            j += 1;
        }
    }

    /// # Safety
    /// As [`row_products`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn blocks<U: RowUnpack>(
        rows: NeuronRows<'_>,
        x: ActRef<'_>,
        q8: bool,
        ids: &[u32],
        out: &mut [f32],
    ) {
        let n_blocks = rows.n_embd / U::QUANT.block_values();
        for (&id, out) in ids.iter().zip(out) {
            // SAFETY: the row is whole, `x` has its columns.
            *out = unsafe {
                let planes = RowPlanes::new(U::QUANT, rows.row(id as usize).as_ptr(), n_blocks);
                if q8 {
                    row::dot_q8::<U>(&planes, rows.n_embd, x)
                } else {
                    row::dot_f32::<U>(&planes, rows.n_embd, x)
                }
            };
        }
    }
}

/// Memory that [`up_tokens`] works in, for one thread.
#[derive(Debug)]
pub struct UpScratch {
    ids: Vec<u32>,
    group: Vec<u8>,
    products: Vec<f32>,
}

impl UpScratch {
    /// Room for `n_tokens` tokens and `n_neurons` neurons whose rows have `row_bytes` bytes.
    pub fn new(n_tokens: usize, n_neurons: usize, row_bytes: usize) -> Self {
        Self {
            ids: Vec::with_capacity(n_neurons),
            group: vec![0; ROW_GROUP * row_bytes],
            products: vec![0.0; ROW_GROUP * n_tokens],
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.ids.capacity() * size_of::<u32>()
            + size_of_val(&*self.group)
            + size_of_val(&*self.products)
    }
}

/// Multiplies the open gates in `act` (`[n_tokens, neurons.len()]` f32: gates after ReLU, of
/// neurons `neurons`) by `up · x` of their token. The rows of neurons whose gate is closed for all
/// tokens are not read; zeros stay zero. Bits equal [`up_active`]'s. Returns how many rows it read.
///
/// # Panics
/// When shapes do not fit.
pub fn up_tokens(
    cpu: Cpu,
    up: NeuronRows<'_>,
    x: &ActBatch,
    tokens: Range<usize>,
    neurons: Range<usize>,
    act: &mut StridedOut<'_>,
    scratch: &mut UpScratch,
) -> usize {
    assert!(
        act.n_tokens() == tokens.len() && act.n_rows() == neurons.len(),
        "activations fit"
    );
    let UpScratch {
        ids,
        group,
        products,
    } = scratch;
    ids.clear();
    // union of the active sets: first marks, then ids
    ids.resize(neurons.len(), 0);
    for t in 0..tokens.len() {
        for (mark, &a) in ids.iter_mut().zip(act.row(t).iter()) {
            *mark |= u32::from(a != 0.0);
        }
    }
    let mut n_ids = 0;
    for n in 0..neurons.len() {
        let open = ids[n] != 0;
        ids[n_ids] = n as u32;
        n_ids += usize::from(open);
    }
    ids.truncate(n_ids);
    let products = &mut products[..ROW_GROUP * tokens.len()];
    for ids in ids.chunks(ROW_GROUP) {
        let m = interleave(up, neurons.start, ids, group);
        let out = StridedOut::from_slice(products, ROW_GROUP, tokens.len(), 0..ids.len());
        gemm(cpu, m, x, tokens.clone(), 0..ids.len(), out);
        let first = ids[0] as usize;
        let side_by_side = ids[ids.len() - 1] as usize - first < ids.len();
        for (t, products) in products.chunks_exact(ROW_GROUP).enumerate() {
            let act = act.row(t);
            let times = |a: f32, product: f32| if a == 0.0 { 0.0 } else { a * product };
            if side_by_side {
                let act = &mut act[first..first + ids.len()];
                act.iter_mut()
                    .zip(products)
                    .for_each(|(a, product)| *a = times(*a, *product));
            } else {
                for (&id, product) in ids.iter().zip(products) {
                    let a = &mut act[id as usize];
                    *a = times(*a, *product);
                }
            }
        }
    }
    n_ids
}

/// Writes the products of rows `neurons` with rows `tokens` of `x` to `out` (`[tokens.len(),
/// neurons.len()]` f32, overwritten). Bits equal [`row_products`]'.
///
/// # Panics
/// When shapes do not fit.
pub fn row_products_tokens(
    cpu: Cpu,
    rows: NeuronRows<'_>,
    x: &ActBatch,
    tokens: Range<usize>,
    neurons: Range<usize>,
    out: &mut StridedOut<'_>,
    scratch: &mut UpScratch,
) {
    assert!(
        out.n_tokens() == tokens.len() && out.n_rows() == neurons.len(),
        "outputs fit"
    );
    let UpScratch { ids, group, .. } = scratch;
    for first in (0..neurons.len()).step_by(ROW_GROUP) {
        let columns = first..(first + ROW_GROUP).min(neurons.len());
        ids.clear();
        ids.extend(columns.clone().map(|n| n as u32));
        let m = interleave(rows, neurons.start, ids, group);
        let part = out.part(0..tokens.len(), columns);
        gemm(cpu, m, x, tokens.clone(), 0..ids.len(), part);
    }
}

/// Rows `first + ids` as one interleaved group in `group`.
fn interleave<'a>(
    up: NeuronRows<'_>,
    first: usize,
    ids: &[u32],
    group: &'a mut [u8],
) -> MatrixRef<'a> {
    let n_blocks = up.n_embd / up.quant.block_values();
    for (lane, &id) in ids.iter().enumerate() {
        let row = up.row(first + id as usize);
        let mut at = 0;
        for plane in up.quant.planes() {
            let bytes = n_blocks * plane.units * plane.unit_bytes;
            let units = row[at..at + bytes].chunks_exact(plane.unit_bytes);
            let image = &mut group[at * ROW_GROUP..(at + bytes) * ROW_GROUP];
            let places = image
                .chunks_exact_mut(plane.unit_bytes)
                .skip(lane)
                .step_by(ROW_GROUP);
            for (unit, place) in units.zip(places) {
                place.copy_from_slice(unit);
            }
            at += bytes;
        }
    }
    let shape = MatrixShape {
        quant: up.quant,
        n_rows: ids.len(),
        n_cols: up.n_embd,
        layout: Layout::Interleaved,
    };
    MatrixRef::new(shape, group)
}
