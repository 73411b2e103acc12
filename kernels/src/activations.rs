//! Activations on their way into a matrix product: f32 values, and 8-bit blocks of them.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::slice::from_raw_parts_mut;
use std::str::FromStr;

use crate::cpu::{Cpu, Tier};
use crate::error::KernelError;
use crate::quant::BLOCK;

/// How quantised weights meet activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ActivationMode {
    /// Full precision: the oracle, and what golden tests run.
    F32,
    /// Blocks of 32 rounded to 8 bits: what fast kernels run (weights of float types stay with f32).
    Q8,
}

impl fmt::Display for ActivationMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ActivationMode::F32 => "f32",
            ActivationMode::Q8 => "q8",
        })
    }
}

impl FromStr for ActivationMode {
    type Err = KernelError;

    fn from_str(text: &str) -> Result<Self, KernelError> {
        match text {
            "f32" => Ok(ActivationMode::F32),
            "q8" => Ok(ActivationMode::Q8),
            _ => Err(KernelError::UnknownActivationMode {
                name: text.to_owned(),
            }),
        }
    }
}

/// A batch of activation rows, `[n_tokens, n_cols]` f32, with their 8-bit blocks beside them.
///
/// Block b of a row holds values 32·b … 32·b+31: `scale = amax / 127`, `q = round_half_even(x /
/// scale)`. Rows whose length is no multiple of 32 are padded with zeros. All memory is allocated
/// by [`ActBatch::new`].
#[derive(Debug, Clone)]
pub struct ActBatch {
    mode: ActivationMode,
    n_cols: usize,
    capacity: usize,
    values: Vec<f32>,
    q: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<f32>,
    block_sums: Vec<i32>,
    half_sums: Vec<i32>,
    half_totals: Vec<f32>,
}

/// One row of an [`ActBatch`].
#[derive(Debug, Clone, Copy)]
pub struct ActRef<'a> {
    /// `[n_cols]` as they were set, zero-padded to whole blocks.
    pub values: &'a [f32],
    /// `[n_blocks · 32]` 8-bit values (mode `Q8`, else empty).
    pub q: &'a [i8],
    /// `[n_blocks]` scale of each block (mode `Q8`, else empty).
    pub scales: &'a [f32],
    /// `[n_blocks]` sum of each block's real values: `scale · Σq` (Q8) or `Σx` in 8 lanes (F32).
    pub sums: &'a [f32],
    /// `[n_blocks]` integer sum of each block (mode `Q8`, else empty).
    pub block_sums: &'a [i32],
    /// `[n_blocks · 2]` integer sums of each 16 values (mode `Q8`, else empty).
    pub half_sums: &'a [i32],
    /// `[n_blocks · 2]` sum of each 16 values in 8 lanes (mode `F32`, else empty).
    pub half_totals: &'a [f32],
}

impl ActBatch {
    /// Room for `capacity` rows of `n_cols` values.
    pub fn new(mode: ActivationMode, n_cols: usize, capacity: usize) -> Self {
        let n_blocks = n_cols.div_ceil(BLOCK) * capacity;
        let q8 = if mode == ActivationMode::Q8 {
            n_blocks
        } else {
            0
        };
        Self {
            mode,
            n_cols,
            capacity,
            values: vec![0.0; n_blocks * BLOCK],
            q: vec![0; q8 * BLOCK],
            scales: vec![0.0; q8],
            sums: vec![0.0; n_blocks],
            block_sums: vec![0; q8],
            half_sums: vec![0; q8 * 2],
            half_totals: vec![0.0; (n_blocks - q8) * 2],
        }
    }

    /// Bytes of memory that all rows take.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.values)
            + size_of_val(&*self.q)
            + size_of_val(&*self.scales)
            + size_of_val(&*self.sums)
            + size_of_val(&*self.block_sums)
            + size_of_val(&*self.half_sums)
            + size_of_val(&*self.half_totals)
    }

    /// Values per row.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Rows that fit.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The arithmetic that the rows are prepared for.
    pub fn mode(&self) -> ActivationMode {
        self.mode
    }

    fn blocks(&self, token: usize) -> Range<usize> {
        let n_blocks = self.n_cols.div_ceil(BLOCK);
        token * n_blocks..(token + 1) * n_blocks
    }

    /// Row `token`.
    pub fn token(&self, token: usize) -> ActRef<'_> {
        let b = self.blocks(token);
        let q8 = if self.mode == ActivationMode::Q8 {
            b.clone()
        } else {
            0..0
        };
        let f32 = if self.mode == ActivationMode::F32 {
            b.clone()
        } else {
            0..0
        };
        ActRef {
            values: &self.values[b.start * BLOCK..b.end * BLOCK],
            q: &self.q[q8.start * BLOCK..q8.end * BLOCK],
            scales: &self.scales[q8.clone()],
            sums: &self.sums[b],
            block_sums: &self.block_sums[q8.clone()],
            half_sums: &self.half_sums[q8.start * 2..q8.end * 2],
            half_totals: &self.half_totals[f32.start * 2..f32.end * 2],
        }
    }

    /// The f32 row `token` (`[n_cols]`) to write to; call [`Self::prepare`] afterwards.
    pub fn values_mut(&mut self, token: usize) -> &mut [f32] {
        let start = self.blocks(token).start * BLOCK;
        &mut self.values[start..start + self.n_cols]
    }

    /// Sets row `token` to `values` (`[n_cols]`) and makes its blocks.
    pub fn set(&mut self, cpu: Cpu, token: usize, values: &[f32]) {
        self.values_mut(token).copy_from_slice(values);
        self.prepare(cpu, token);
    }

    /// Makes the blocks of row `token` from its f32 values.
    pub fn prepare(&mut self, cpu: Cpu, token: usize) {
        assert!(token < self.capacity, "row {token} of {}", self.capacity);
        // SAFETY: the writer borrows the batch exclusively, and there is one thread.
        unsafe { self.writer().set_with(cpu, token, |_| ()) };
    }

    /// A way to set rows from several threads.
    pub fn writer(&mut self) -> ActWriter<'_> {
        ActWriter {
            mode: self.mode,
            n_cols: self.n_cols,
            capacity: self.capacity,
            values: self.values.as_mut_ptr(),
            q: self.q.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            sums: self.sums.as_mut_ptr(),
            block_sums: self.block_sums.as_mut_ptr(),
            half_sums: self.half_sums.as_mut_ptr(),
            half_totals: self.half_totals.as_mut_ptr(),
            owner: PhantomData,
        }
    }
}

/// Sets rows of an [`ActBatch`] from several threads at once.
#[derive(Debug, Clone, Copy)]
pub struct ActWriter<'a> {
    mode: ActivationMode,
    n_cols: usize,
    capacity: usize,
    values: *mut f32,
    q: *mut i8,
    scales: *mut f32,
    sums: *mut f32,
    block_sums: *mut i32,
    half_sums: *mut i32,
    half_totals: *mut f32,
    owner: PhantomData<&'a mut ActBatch>,
}

// SAFETY: the pointers are to a batch borrowed exclusively for 'a; writing through them is unsafe,
// and its contract keeps threads apart.
unsafe impl Send for ActWriter<'_> {}
// SAFETY: as above.
unsafe impl Sync for ActWriter<'_> {}

impl ActWriter<'_> {
    /// Lets `fill` write the `[n_cols]` f32 values of row `token` and makes its blocks.
    ///
    /// # Safety
    /// No other thread sets the same row at the same time.
    ///
    /// # Panics
    /// When there is no such row.
    pub unsafe fn set_with(&self, cpu: Cpu, token: usize, fill: impl FnOnce(&mut [f32])) {
        // SAFETY: this function's contract.
        unsafe { self.set_columns(cpu, token, 0..self.n_cols, fill) }
    }

    /// Sets some columns of row `token`, whole blocks, from their 8-bit blocks: `q` are the values of these columns, `scales` one for
    /// each block. Their f32 values are NaN: only 8-bit arithmetic may follow.
    ///
    /// # Safety
    /// As [`Self::set_columns`].
    ///
    /// # Panics
    /// When the batch is not of 8-bit blocks, there is no such row or column, or lengths differ.
    pub unsafe fn set_rounded(
        &self,
        token: usize,
        columns: Range<usize>,
        q: &[i8],
        scales: &[f32],
    ) {
        assert_eq!(self.mode, ActivationMode::Q8, "8-bit blocks");
        assert!(token < self.capacity, "row {token} of {}", self.capacity);
        let Range { start, end } = columns;
        assert!(
            start <= end && end <= self.n_cols && start % BLOCK + end % BLOCK == 0,
            "whole blocks: columns {start}..{end} of {}",
            self.n_cols
        );
        let n = (end - start) / BLOCK;
        assert!(q.len() == n * BLOCK && scales.len() == n, "{n} blocks");
        let first = token * self.n_cols.div_ceil(BLOCK) + start / BLOCK;
        // SAFETY: as in `set_columns`.
        unsafe {
            from_raw_parts_mut(self.values.add(first * BLOCK), n * BLOCK).fill(f32::NAN);
            from_raw_parts_mut(self.q.add(first * BLOCK), n * BLOCK).copy_from_slice(q);
            from_raw_parts_mut(self.scales.add(first), n).copy_from_slice(scales);
            let sums = from_raw_parts_mut(self.sums.add(first), n);
            let block_sums = from_raw_parts_mut(self.block_sums.add(first), n);
            let half_sums = from_raw_parts_mut(self.half_sums.add(first * 2), n * 2);
            for (half, q) in half_sums.iter_mut().zip(q.chunks_exact(BLOCK / 2)) {
                *half = q.iter().map(|&q| i32::from(q)).sum();
            }
            for (n, half) in half_sums.chunks_exact(2).enumerate() {
                block_sums[n] = half[0] + half[1];
                sums[n] = scales[n] * block_sums[n] as f32;
            }
        }
    }

    /// Sets some columns of row `token`, from a whole block of 32 on to another or to the last column: `fill` writes the
    /// values.
    ///
    /// # Safety
    /// Nobody else touches these columns of the row while this runs.
    ///
    /// # Panics
    /// When there is no such row, or no such columns.
    pub unsafe fn set_columns(
        &self,
        cpu: Cpu,
        token: usize,
        columns: Range<usize>,
        fill: impl FnOnce(&mut [f32]),
    ) {
        assert!(token < self.capacity, "row {token} of {}", self.capacity);
        let Range { start, end } = columns;
        assert!(
            start <= end && end <= self.n_cols && start.is_multiple_of(BLOCK),
            "columns {start}..{end} of {}",
            self.n_cols
        );
        assert!(
            end == self.n_cols || end.is_multiple_of(BLOCK),
            "whole blocks"
        );
        let n = (end - start).div_ceil(BLOCK);
        let first = token * self.n_cols.div_ceil(BLOCK) + start / BLOCK;
        // SAFETY: the blocks lie within the batch and, by the contract, are nobody else's; each mode has only its own
        // slices.
        unsafe {
            let values = from_raw_parts_mut(self.values.add(first * BLOCK), n * BLOCK);
            fill(&mut values[..end - start]);
            let sums = from_raw_parts_mut(self.sums.add(first), n);
            if self.mode != ActivationMode::Q8 {
                let half_totals = self.half_totals.add(first * 2);
                let half_totals = from_raw_parts_mut(half_totals, n * 2);
                return add_up(values, sums, half_totals);
            }
            let out = Q8Blocks {
                q: from_raw_parts_mut(self.q.add(first * BLOCK), n * BLOCK),
                scales: from_raw_parts_mut(self.scales.add(first), n),
                sums,
                block_sums: from_raw_parts_mut(self.block_sums.add(first), n),
                half_sums: from_raw_parts_mut(self.half_sums.add(first * 2), n * 2),
            };
            quantize(cpu, values, out);
        }
    }
}

/// Writes `x` as 8-bit values with one scale for all to `out` (`[x.len()]`), and returns the scale: NaN where a value is
/// not finite.
///
/// # Panics
/// When lengths differ.
pub(crate) fn quantize_whole(x: &[f32], out: &mut [i8]) -> f32 {
    assert_eq!(x.len(), out.len(), "one value each");
    let amax = x.iter().fold(0.0f32, |max, x| x.abs().max(max));
    if !x.iter().all(|x| x.is_finite()) {
        out.fill(0);
        return f32::NAN;
    }
    let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    for (out, x) in out.iter_mut().zip(x) {
        // SAFETY: finite, and within ±127.5
        *out = unsafe { (x * inverse).round_ties_even().to_int_unchecked::<i32>() } as i8;
    }
    amax / 127.0
}

/// Makes the sums of one row in mode `F32`.
fn add_up(values: &[f32], sums: &mut [f32], half_totals: &mut [f32]) {
    for (sum, block) in sums.iter_mut().zip(values.chunks_exact(BLOCK)) {
        *sum = lane_sum(block);
    }
    for (total, half) in half_totals.iter_mut().zip(values.chunks_exact(BLOCK / 2)) {
        *total = lane_sum(half);
    }
}

/// Makes the 8-bit blocks of one row.
fn quantize(cpu: Cpu, values: &[f32], out: Q8Blocks<'_>) {
    match cpu.tier() {
        #[cfg(target_arch = "x86_64")]
        Tier::Avx2 | Tier::Avx512 | Tier::Avx512Vnni | Tier::Avx512Amx => {
            // SAFETY: a `Cpu` exists only for tiers that the machine has; all of these have AVX2.
            unsafe { x86::quantize(values, out) }
        }
        _ => quantize_scalar(values, out),
    }
}

/// Where the blocks of one row go.
struct Q8Blocks<'a> {
    q: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
    block_sums: &'a mut [i32],
    half_sums: &'a mut [i32],
}

/// Sum of a block of 32, or of half of one, in the order of the f32 products: 8 lanes by k mod 8, joined by a tree.
fn lane_sum(block: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    for (k, &x) in block.iter().enumerate() {
        lanes[k % 8] += x;
    }
    join_lanes(lanes)
}

/// The fixed tree that joins the 8 lanes of an f32 product.
pub(crate) fn join_lanes(l: [f32; 8]) -> f32 {
    let quads = [l[0] + l[4], l[1] + l[5], l[2] + l[6], l[3] + l[7]];
    (quads[0] + quads[2]) + (quads[1] + quads[3])
}

/// The specification of 8-bit activation blocks.
///
/// A block with a value that is not finite gets a NaN scale, so that it surfaces in every product.
fn quantize_scalar(values: &[f32], out: Q8Blocks<'_>) {
    for (b, block) in values.chunks_exact(BLOCK).enumerate() {
        let amax = block.iter().fold(0.0f32, |max, x| x.abs().max(max));
        let finite = block.iter().all(|x| x.is_finite());
        let scale = if finite { amax / 127.0 } else { f32::NAN };
        let inverse = if scale > 0.0 { 127.0 / amax } else { 0.0 };
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        for half in 0..2 {
            let mut sum = 0;
            for k in half * 16..(half + 1) * 16 {
                let rounded = if finite {
                    (block[k] * inverse).round_ties_even() as i8
                } else {
                    0
                };
                out.q[b * BLOCK + k] = rounded;
                sum += i32::from(rounded);
            }
            out.half_sums[2 * b + half] = sum;
        }
        out.block_sums[b] = out.half_sums[2 * b] + out.half_sums[2 * b + 1];
        out.scales[b] = scale;
        out.sums[b] = scale * out.block_sums[b] as f32;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{BLOCK, Q8Blocks};

    /// [`super::quantize_scalar`] with AVX2.
    ///
    /// # Safety
    /// The machine has AVX2. Slice lengths fit: 32, 32, 1, 1 and 2 values a block.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn quantize(values: &[f32], out: Q8Blocks<'_>) {
        let Q8Blocks {
            q,
            scales,
            sums,
            block_sums,
            half_sums,
        } = out;
        assert!(q.len() == values.len() && scales.len() * BLOCK == values.len());
        let magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fff_ffff));
        for b in 0..scales.len() {
            // SAFETY: `values` and `q` hold 32 values for each of the blocks (asserted above).
            unsafe {
                let at = values.as_ptr().add(b * BLOCK);
                let x = [0, 8, 16, 24].map(|k| _mm256_loadu_ps(at.add(k)));
                let a = x.map(|x| _mm256_and_ps(x, magnitude));
                let max = _mm256_max_ps(_mm256_max_ps(a[0], a[1]), _mm256_max_ps(a[2], a[3]));
                let max = _mm_max_ps(_mm256_castps256_ps128(max), _mm256_extractf128_ps(max, 1));
                let max = _mm_max_ps(max, _mm_movehl_ps(max, max));
                let amax = _mm_cvtss_f32(_mm_max_ss(max, _mm_movehdup_ps(max)));
                // NaN or Inf anywhere: the sum of magnitudes times zero is NaN
                let total = _mm256_add_ps(_mm256_add_ps(a[0], a[1]), _mm256_add_ps(a[2], a[3]));
                let zero = _mm256_mul_ps(total, _mm256_setzero_ps());
                let bad = _mm256_movemask_ps(_mm256_cmp_ps(zero, zero, _CMP_UNORD_Q)) != 0
                    && std::slice::from_raw_parts(at, BLOCK)
                        .iter()
                        .any(|x| !x.is_finite());
                let scale = if bad { f32::NAN } else { amax / 127.0 };
                let inverse = if scale > 0.0 { 127.0 / amax } else { 0.0 };
                let inverse = if inverse.is_finite() { inverse } else { 0.0 };
                let factor = _mm256_set1_ps(inverse);
                let i = if bad {
                    [_mm256_setzero_si256(); 4]
                } else {
                    x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, factor)))
                };
                let words = _mm256_packs_epi32(i[0], i[1]);
                let more = _mm256_packs_epi32(i[2], i[3]);
                let bytes = _mm256_packs_epi16(words, more);
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                let bytes = _mm256_permutevar8x32_epi32(bytes, order);
                _mm256_storeu_si256(q.as_mut_ptr().add(b * BLOCK).cast(), bytes);
                let low = sum_i32(_mm256_add_epi32(i[0], i[1]));
                let high = sum_i32(_mm256_add_epi32(i[2], i[3]));
                half_sums[2 * b] = low;
                half_sums[2 * b + 1] = high;
                block_sums[b] = low + high;
                scales[b] = scale;
                sums[b] = scale * (low + high) as f32;
            }
        }
    }

    #[target_feature(enable = "avx2")]
    fn sum_i32(v: __m256i) -> i32 {
        let v = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
        let v = _mm_add_epi32(v, _mm_shuffle_epi32(v, 0b01_00_11_10));
        _mm_cvtsi128_si32(_mm_add_epi32(v, _mm_shuffle_epi32(v, 0b10_11_00_01)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn blocks_that_are_given_are_those_that_values_would_become() {
        let cpu = Cpu::detect(ActivationMode::Q8);
        for n in [32, 256, 576] {
            let mut values = Random(n as u64).floats(2 * n);
            values[n + 40 % n] = f32::NAN;
            let mut want = ActBatch::new(ActivationMode::Q8, n, 2);
            let mut got = want.clone();
            for token in 0..2 {
                want.set(cpu, token, &values[token * n..][..n]);
                let row = want.token(token);
                let middle = n / 64 * 32;
                for columns in [0..middle, middle..n] {
                    let blocks = columns.start / BLOCK..columns.end / BLOCK;
                    let (q, scales) = (&row.q[columns.clone()], &row.scales[blocks]);
                    // SAFETY: one thread.
                    unsafe { got.writer().set_rounded(token, columns, q, scales) };
                }
                let got = got.token(token);
                let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(got.q, row.q);
                assert_eq!(bits(got.scales), bits(row.scales));
                assert_eq!(bits(got.sums), bits(row.sums));
                assert_eq!(got.block_sums, row.block_sums);
                assert_eq!(got.half_sums, row.half_sums);
                assert!(got.values.iter().all(|x| x.is_nan()), "nobody reads them");
            }
        }
    }
}
