//! `down` with AVX2 and AVX-512: tiles of columns stay in registers over all neurons of a group.

use std::arch::x86_64::*;
use std::ops::Range;

use super::super::NeuronRows;
use super::super::tree::SUBTREES_MAX;
use super::strips::{STRIP, strips, sum_groups};
use super::{COLUMNS, DownScratch, GroupSpan, NEURONS, TOKENS};
use crate::dot::row::{self, RowPlanes, RowUnpack};
use crate::matrix::StridedOut;
use crate::quant::{BLOCK, QuantType};

/// 32 columns in registers.
///
/// # Safety
/// All functions: the tier's instructions exist; pointers are valid for 32 values.
trait Columns {
    type Block: Copy;
    /// Blocks of columns that registers hold beside the weights.
    const TILE: usize;
    unsafe fn zero() -> Self::Block;
    /// a·w + y.
    unsafe fn axpy(a: f32, w: Self::Block, y: Self::Block) -> Self::Block;
    unsafe fn load(p: *const f32) -> Self::Block;
    unsafe fn store(p: *mut f32, v: Self::Block);
    unsafe fn weights<R: Source>(planes: &RowPlanes, sub: usize, scale: f32) -> Self::Block;
}

/// Real values of 32 columns of a row, in any format.
///
/// # Safety
/// The planes are a row's; sub-block `sub` is in it; AVX2 (AVX-512) exists.
trait Source {
    const QUANT: QuantType;
    /// Scales of the sub-blocks from `first` on (at most [`STRIP`]; `n_subs` in the row).
    unsafe fn scales(planes: &RowPlanes, first: usize, n_subs: usize, out: &mut [f32; STRIP]);
    unsafe fn reals(planes: &RowPlanes, sub: usize, scale: f32) -> [__m256; 4];
    unsafe fn reals_512(planes: &RowPlanes, sub: usize, scale: f32) -> [__m512; 2];
}

#[inline(always)]
unsafe fn pair(low: __m256, high: __m256) -> __m512 {
    // SAFETY: the caller has AVX-512.
    unsafe { _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1) }
}

// SAFETY (whole impl): the trait's contract.
#[allow(clippy::undocumented_unsafe_blocks)]
impl<U: RowUnpack> Source for U {
    const QUANT: QuantType = U::QUANT;

    #[inline(always)]
    unsafe fn scales(planes: &RowPlanes, first: usize, n_subs: usize, out: &mut [f32; STRIP]) {
        unsafe {
            _mm256_storeu_ps(
                out.as_mut_ptr(),
                row::scales_of_eight::<U>(planes, first, n_subs),
            );
            for at in (8..STRIP).step_by(8) {
                if first + at < n_subs {
                    let more = row::scales_of_eight::<U>(planes, first + at, n_subs);
                    _mm256_storeu_ps(out.as_mut_ptr().add(at), more);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn reals(planes: &RowPlanes, sub: usize, scale: f32) -> [__m256; 4] {
        unsafe { row::reals::<U>(planes, sub, scale) }
    }

    #[inline(always)]
    unsafe fn reals_512(planes: &RowPlanes, sub: usize, scale: f32) -> [__m512; 2] {
        unsafe {
            match U::QUANT {
                QuantType::Q4_0 => {
                    // value = table[nibble] · d; lanes of a permutation use their low 4 bits only
                    let table = _mm512_setr_ps(
                        -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0,
                        5.0, 6.0, 7.0,
                    );
                    let table = _mm512_mul_ps(table, _mm512_set1_ps(scale));
                    let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(planes.block16(sub).cast()));
                    [
                        _mm512_permutexvar_ps(both, table),
                        _mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), table),
                    ]
                }
                QuantType::Q8_0 => {
                    let bytes = U::values(planes, sub);
                    let scale = _mm512_set1_ps(scale);
                    let half = |v: __m128i| {
                        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v)), scale)
                    };
                    [
                        half(_mm256_castsi256_si128(bytes)),
                        half(_mm256_extracti128_si256(bytes, 1)),
                    ]
                }
                _ => {
                    let [a, b, c, d] = row::reals::<U>(planes, sub, scale);
                    [pair(a, b), pair(c, d)]
                }
            }
        }
    }
}

/// Float rows.
macro_rules! float_source {
    ($name:ident) => {
        struct $name;
        // SAFETY (whole impl): the trait's contract.
        #[allow(clippy::undocumented_unsafe_blocks)]
        impl Source for $name {
            const QUANT: QuantType = QuantType::$name;

            #[inline(always)]
            unsafe fn scales(_: &RowPlanes, _: usize, _: usize, _: &mut [f32; STRIP]) {}

            #[inline(always)]
            unsafe fn reals(planes: &RowPlanes, sub: usize, _scale: f32) -> [__m256; 4] {
                let (row, k) = (planes.start(), sub * BLOCK);
                unsafe {
                    [
                        row::floats(Self::QUANT, row, k, 8),
                        row::floats(Self::QUANT, row, k + 8, 8),
                        row::floats(Self::QUANT, row, k + 16, 8),
                        row::floats(Self::QUANT, row, k + 24, 8),
                    ]
                }
            }

            #[inline(always)]
            unsafe fn reals_512(planes: &RowPlanes, sub: usize, scale: f32) -> [__m512; 2] {
                unsafe {
                    let [a, b, c, d] = Self::reals(planes, sub, scale);
                    [pair(a, b), pair(c, d)]
                }
            }
        }
    };
}

float_source!(F32);
float_source!(F16);
float_source!(BF16);

struct Avx2;
struct Avx512;

// SAFETY (whole impl): the trait's contract.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Columns for Avx2 {
    type Block = [__m256; 4];
    const TILE: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self::Block {
        unsafe { [_mm256_setzero_ps(); 4] }
    }
    #[inline(always)]
    unsafe fn axpy(a: f32, w: Self::Block, y: Self::Block) -> Self::Block {
        unsafe {
            let a = _mm256_set1_ps(a);
            [
                _mm256_fmadd_ps(a, w[0], y[0]),
                _mm256_fmadd_ps(a, w[1], y[1]),
                _mm256_fmadd_ps(a, w[2], y[2]),
                _mm256_fmadd_ps(a, w[3], y[3]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::Block {
        unsafe {
            [
                _mm256_loadu_ps(p),
                _mm256_loadu_ps(p.add(8)),
                _mm256_loadu_ps(p.add(16)),
                _mm256_loadu_ps(p.add(24)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::Block) {
        unsafe {
            for n in 0..4 {
                _mm256_storeu_ps(p.add(8 * n), v[n]);
            }
        }
    }
    #[inline(always)]
    unsafe fn weights<R: Source>(planes: &RowPlanes, sub: usize, scale: f32) -> Self::Block {
        unsafe { R::reals(planes, sub, scale) }
    }
}

// SAFETY (whole impl): the trait's contract.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Columns for Avx512 {
    type Block = [__m512; 2];
    const TILE: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self::Block {
        unsafe { [_mm512_setzero_ps(); 2] }
    }
    #[inline(always)]
    unsafe fn axpy(a: f32, w: Self::Block, y: Self::Block) -> Self::Block {
        unsafe {
            let a = _mm512_set1_ps(a);
            [
                _mm512_fmadd_ps(a, w[0], y[0]),
                _mm512_fmadd_ps(a, w[1], y[1]),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::Block {
        unsafe { [_mm512_loadu_ps(p), _mm512_loadu_ps(p.add(16))] }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::Block) {
        unsafe {
            _mm512_storeu_ps(p, v[0]);
            _mm512_storeu_ps(p.add(16), v[1]);
        }
    }
    #[inline(always)]
    unsafe fn weights<R: Source>(planes: &RowPlanes, sub: usize, scale: f32) -> Self::Block {
        unsafe { R::reals_512(planes, sub, scale) }
    }
}

/// What one token adds.
#[derive(Clone, Copy)]
pub(super) struct Active<'a> {
    pub(super) down: NeuronRows<'a>,
    pub(super) ids: &'a [u32],
    pub(super) a: &'a [f32],
    pub(super) groups: &'a [GroupSpan],
}

/// What some tokens add.
pub(super) struct Batch<'a> {
    pub(super) down: NeuronRows<'a>,
    /// From the first token on.
    pub(super) act: &'a [f32],
    pub(super) stride: usize,
    pub(super) groups: &'a [GroupSpan],
    /// Which rows of the outputs.
    pub(super) tokens: Range<usize>,
    pub(super) skip_zeros: bool,
}

/// Calls `$f::<C, format>` for the format of `$quant`.
macro_rules! by_format {
    ($quant:expr, $c:ty, $f:ident($($arg:expr),*)) => {
        match $quant {
            QuantType::F32 => $f::<$c, F32>($($arg),*),
            QuantType::F16 => $f::<$c, F16>($($arg),*),
            QuantType::BF16 => $f::<$c, BF16>($($arg),*),
            QuantType::Q4_0 => $f::<$c, row::Q4_0>($($arg),*),
            QuantType::Q4_1 => $f::<$c, row::Q4_1>($($arg),*),
            QuantType::Q5_0 => $f::<$c, row::Q5_0>($($arg),*),
            QuantType::Q5_1 => $f::<$c, row::Q5_1>($($arg),*),
            QuantType::Q8_0 => $f::<$c, row::Q8_0>($($arg),*),
            QuantType::Q2_K => $f::<$c, row::Q2_K>($($arg),*),
            QuantType::Q3_K => $f::<$c, row::Q3_K>($($arg),*),
            QuantType::Q4_K => $f::<$c, row::Q4_K>($($arg),*),
            QuantType::Q5_K => $f::<$c, row::Q5_K>($($arg),*),
            QuantType::Q6_K => $f::<$c, row::Q6_K>($($arg),*),
        }
    };
}

macro_rules! tier {
    ($active:ident, $tokens:ident, $columns:ty, $features:literal) => {
        /// # Safety
        /// The machine has the features.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $active(
            list: Active<'_>,
            cols: Range<usize>,
            sums: &mut [&mut [f32]],
        ) {
            // SAFETY: the features are enabled.
            unsafe { by_format!(list.down.quant, $columns, active(list, cols, sums)) }
        }

        /// # Safety
        /// The machine has the features.
        #[target_feature(enable = $features)]
        pub(super) unsafe fn $tokens(
            batch: &Batch<'_>,
            cols: Range<usize>,
            scratch: &mut DownScratch,
            sums: &mut [StridedOut<'_>],
        ) {
            // SAFETY: the features are enabled.
            unsafe {
                by_format!(
                    batch.down.quant,
                    $columns,
                    tokens(batch, cols, scratch, sums)
                )
            }
        }
    };
}

tier!(active_avx2, tokens_avx2, Avx2, "avx2,fma,f16c");
tier!(
    active_avx512,
    tokens_avx512,
    Avx512,
    "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
);

/// Tokens that are taken together where activations are rounded.
pub(super) const TOKENS_ROUNDED: usize = TOKENS * COLUMNS / (STRIP * BLOCK);

/// All columns, in strips of nearly equal size.
///
/// # Safety
/// The instructions of `C` exist; shapes were checked by the caller.
#[inline(always)]
unsafe fn active<C: Columns, R: Source>(
    list: Active<'_>,
    cols: Range<usize>,
    sums: &mut [&mut [f32]],
) {
    for blocks in strips(&cols, STRIP) {
        let at = blocks.start * BLOCK - cols.start;
        // SAFETY: this function's contract; the strip's blocks are in the row.
        unsafe { strip::<C, R>(list, blocks, at, sums) };
    }
}

/// The blocks `blocks` (at most [`STRIP`]) of the rows, to column `at` of `sums`.
///
/// Some neurons at a time, so that their rows stay in the first cache while tiles of columns pass
/// over them; the sums of a strip lie in memory in between.
///
/// # Safety
/// As [`active`]; the blocks are in the rows.
#[inline(always)]
unsafe fn strip<C: Columns, R: Source>(
    list: Active<'_>,
    blocks: Range<usize>,
    at: usize,
    sums: &mut [&mut [f32]],
) {
    let down = &list.down;
    let n_blocks = down.n_embd / R::QUANT.block_values();
    let width = blocks.len() * BLOCK;
    let mut done = [[0.0f32; STRIP * BLOCK]; SUBTREES_MAX + 1];
    let flat = done.as_flattened_mut();
    sum_groups(list.groups, flat, STRIP * BLOCK, width, |span, y| {
        for first in span.clone().step_by(NEURONS) {
            let part = first..(first + NEURONS).min(span.end);
            let (ids, a) = (&list.ids[part.clone()], &list.a[part]);
            let mut rows = Rows {
                planes: [RowPlanes::none(); NEURONS],
                scales: [[0.0; STRIP]; NEURONS],
            };
            let next = list.ids.get(first + NEURONS..).unwrap_or(&[]);
            // SAFETY: this function's contract: the rows are whole and hold the blocks.
            unsafe {
                for (n, &id) in ids.iter().enumerate() {
                    if let Some(&next) = next.get(n) {
                        let row = down.row(next as usize).as_ptr();
                        RowPlanes::new(R::QUANT, row, n_blocks).prefetch(R::QUANT, blocks.clone());
                    }
                    let row = down.row(id as usize).as_ptr();
                    rows.planes[n] = RowPlanes::new(R::QUANT, row, n_blocks);
                    let n_subs = down.n_embd / BLOCK;
                    R::scales(&rows.planes[n], blocks.start, n_subs, &mut rows.scales[n]);
                }
                tiles::<C, R>(&rows, a, blocks.clone(), y);
            }
        }
    });
    for (sum, y) in sums.iter_mut().zip(&done) {
        sum[at..at + width].copy_from_slice(&y[..width]);
    }
}

/// Some neurons' rows, and their scales from a strip's first block on.
struct Rows {
    planes: [RowPlanes; NEURONS],
    scales: [[f32; STRIP]; NEURONS],
}

/// Adds neurons to a strip, `y` `[blocks.len() · 32]`, in tiles of columns.
///
/// # Safety
/// As [`active`]; `rows` holds `a.len()` rows, and these the blocks.
#[inline(always)]
unsafe fn tiles<C: Columns, R: Source>(
    rows: &Rows,
    a: &[f32],
    blocks: Range<usize>,
    y: &mut [f32],
) {
    let mut done = 0;
    while done < blocks.len() {
        let left = blocks.len() - done;
        let y = &mut y[done * BLOCK..];
        // SAFETY: this function's contract.
        done += unsafe {
            if left >= C::TILE && C::TILE == 4 {
                tile::<C, R, 4>(rows, a, blocks.start, done, y)
            } else if left >= 2 {
                tile::<C, R, 2>(rows, a, blocks.start, done, y)
            } else {
                tile::<C, R, 1>(rows, a, blocks.start, done, y)
            }
        };
    }
}

/// `B` blocks from block `skip` of the strip on; returns `B`.
///
/// # Safety
/// As [`tiles`].
#[inline(always)]
unsafe fn tile<C: Columns, R: Source, const B: usize>(
    rows: &Rows,
    a: &[f32],
    first: usize,
    skip: usize,
    y: &mut [f32],
) -> usize {
    let y = &mut y[..B * BLOCK];
    // SAFETY: this function's contract; `y` holds B blocks.
    unsafe {
        let mut sums = [C::zero(); B];
        for b in 0..B {
            sums[b] = C::load(y.as_ptr().add(b * BLOCK));
        }
        for (n, &a) in a.iter().enumerate() {
            let planes = rows.planes.get_unchecked(n);
            let scales = rows.scales.get_unchecked(n);
            for b in 0..B {
                let scale = *scales.get_unchecked(skip + b);
                sums[b] = C::axpy(a, C::weights::<R>(planes, first + skip + b, scale), sums[b]);
            }
        }
        for b in 0..B {
            C::store(y.as_mut_ptr().add(b * BLOCK), sums[b]);
        }
    }
    B
}

/// All columns for up to [`TOKENS`] tokens.
///
/// # Safety
/// As [`active`].
#[inline(always)]
unsafe fn tokens<C: Columns, R: Source>(
    batch: &Batch<'_>,
    cols: Range<usize>,
    scratch: &mut DownScratch,
    sums: &mut [StridedOut<'_>],
) {
    // registers hold the sums of one token beside the weights
    let step = if C::TILE == 4 { COLUMNS } else { COLUMNS / 2 };
    for first in cols.clone().step_by(step) {
        let columns = first..(first + step).min(cols.end);
        // SAFETY: this function's contract.
        unsafe {
            if columns.len() == COLUMNS {
                token_columns::<C, R, 4>(batch, columns, cols.start, scratch, sums);
            } else {
                for pair in columns.clone().step_by(2 * BLOCK) {
                    let part = pair..(pair + 2 * BLOCK).min(columns.end);
                    if part.len() == 2 * BLOCK {
                        token_columns::<C, R, 2>(batch, part, cols.start, scratch, sums);
                    } else {
                        token_columns::<C, R, 1>(batch, part, cols.start, scratch, sums);
                    }
                }
            }
        }
    }
}

/// `B` blocks of columns; outputs start at column `origin` of the matrix.
///
/// # Safety
/// As [`active`].
#[inline(always)]
unsafe fn token_columns<C: Columns, R: Source, const B: usize>(
    batch: &Batch<'_>,
    columns: Range<usize>,
    origin: usize,
    scratch: &mut DownScratch,
    sums: &mut [StridedOut<'_>],
) {
    let n_tokens = batch.tokens.len();
    let size = TOKENS * COLUMNS;
    let width = n_tokens * B * BLOCK;
    let DownScratch { rows, sums: done } = scratch;
    sum_groups(batch.groups, done, size, width, |span, y| {
        for first in span.clone().step_by(NEURONS) {
            let neurons = first..(first + NEURONS).min(span.end);
            // SAFETY: this function's contract.
            unsafe { add_neurons::<C, R, B>(batch, neurons, columns.start, rows, y) };
        }
    });
    let at = columns.start - origin;
    for (n, sum) in sums.iter_mut().enumerate() {
        let y = &done[n * size..][..width];
        for (t, y) in batch.tokens.clone().zip(y.chunks_exact(B * BLOCK)) {
            sum.row(t)[at..at + B * BLOCK].copy_from_slice(y);
        }
    }
}

/// Adds the neurons `neurons` (at most [`NEURONS`]) of all tokens to `y` (`[n_tokens, B · 32]`).
///
/// # Safety
/// As [`active`].
#[inline(always)]
unsafe fn add_neurons<C: Columns, R: Source, const B: usize>(
    batch: &Batch<'_>,
    neurons: Range<usize>,
    column: usize,
    rows: &mut [f32],
    y: &mut [f32],
) {
    let down = &batch.down;
    let n_blocks = down.n_embd / R::QUANT.block_values();
    let rows = &mut rows[..neurons.len() * B * BLOCK];
    // SAFETY: this function's contract; `rows` and `y` hold B blocks per neuron and token.
    unsafe {
        for (neuron, row) in neurons.clone().zip(rows.chunks_exact_mut(B * BLOCK)) {
            let planes = RowPlanes::new(R::QUANT, down.row(neuron).as_ptr(), n_blocks);
            let mut scales = [0.0; STRIP];
            R::scales(&planes, column / BLOCK, down.n_embd / BLOCK, &mut scales);
            for b in 0..B {
                let w = C::weights::<R>(&planes, column / BLOCK + b, scales[b]);
                C::store(row.as_mut_ptr().add(b * BLOCK), w);
            }
        }
        for (t, y) in y.chunks_exact_mut(B * BLOCK).enumerate() {
            let a = &batch.act[t * batch.stride..][neurons.clone()];
            let mut sums = [C::zero(); B];
            for b in 0..B {
                sums[b] = C::load(y.as_ptr().add(b * BLOCK));
            }
            // bit n: neuron n adds something
            let mut open = if batch.skip_zeros {
                open_mask(a)
            } else {
                u32::MAX >> (32 - a.len())
            };
            while open != 0 {
                let n = open.trailing_zeros() as usize;
                open &= open - 1;
                let row = rows.as_ptr().add(n * B * BLOCK);
                let value = *a.as_ptr().add(n);
                for b in 0..B {
                    sums[b] = C::axpy(value, C::load(row.add(b * BLOCK)), sums[b]);
                }
            }
            for b in 0..B {
                C::store(y.as_mut_ptr().add(b * BLOCK), sums[b]);
            }
        }
    }
}

/// Bit n is set where value n (of at most 32) is not zero.
#[inline(always)]
fn open_mask(a: &[f32]) -> u32 {
    a.iter()
        .enumerate()
        .fold(0, |mask, (n, &a)| mask | (u32::from(a != 0.0) << n))
}
