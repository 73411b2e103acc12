//! A hidden state as sketches of bits take it: 8-bit values with one scale, in the order of the planes.

use super::planes::{HIGH_BYTES, UNIT, run_of};
use crate::activations::quantize_whole;
use crate::quant::BLOCK;

/// Bits of a byte.
const BITS: usize = 8;

/// One hidden state, `[n_cols]`: `scale = amax / 127`, `q = round_half_even(x / scale)`.
///
/// One scale for all, so that sums with signs are integers over whole rows: exact in any order. A state with a value
/// that is not finite has a NaN scale, so that it surfaces in every score.
#[derive(Debug, Clone)]
pub struct SketchInput {
    values: Vec<i8>,
    top: Vec<i8>,
    high: Vec<i8>,
    sum: i32,
    scale: f32,
}

impl SketchInput {
    /// Room for `n_cols` values, a multiple of 32.
    pub fn new(n_cols: usize) -> Self {
        Self {
            values: vec![0; n_cols],
            top: vec![0; n_cols],
            high: vec![0; n_cols],
            sum: 0,
            scale: 0.0,
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.values.len() + self.top.len() + self.high.len()
    }

    /// Sets it to `x`, `[n_cols]`.
    ///
    /// # Panics
    /// When `x` has another length.
    pub fn set(&mut self, x: &[f32]) {
        self.scale = quantize_whole(x, &mut self.values);
        self.sum = self.values.iter().map(|&q| i32::from(q)).sum();
        self.arrange();
    }

    /// What a sum of [`Self::values`] is multiplied by.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// `[n_cols]` 8-bit values.
    pub fn values(&self) -> &[i8] {
        &self.values
    }

    /// Σ of [`Self::values`].
    pub(super) fn sum(&self) -> i32 {
        self.sum
    }

    /// Values in the order of the top plane. Of a run of w blocks, bit i of byte j of block b is column 8·j + i of that
    /// block, and here value (i·w + b)·4 + j of the run.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn top(&self) -> &[i8] {
        &self.top
    }

    /// Values in the order of a row's bits 2: bit i of byte p meets value i·n_cols/8 + p.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn high(&self) -> &[i8] {
        &self.high
    }

    fn arrange(&mut self) {
        let n_blocks = self.values.len() / BLOCK;
        let stride = n_blocks * HIGH_BYTES;
        for first in (0..n_blocks).step_by(UNIT) {
            let width = (n_blocks - first).min(UNIT);
            for j in 0..HIGH_BYTES {
                // columns 8j … 8j + 7 of the unit's blocks
                let mut rows = [0u64; UNIT];
                for (n, row) in rows[..width].iter_mut().enumerate() {
                    *row = eight(&self.values[(first + n) * BLOCK + BITS * j..]);
                }
                let at = first * HIGH_BYTES + j * width;
                for (i, column) in turned(rows).into_iter().enumerate() {
                    let to = &mut self.high[i * stride + at..][..width];
                    put(column, to);
                }
            }
            for pair in (first..first + width).step_by(2) {
                let two = (first + width - pair).min(2);
                let mut rows = [0u64; UNIT];
                for (n, row) in rows[..two * HIGH_BYTES].iter_mut().enumerate() {
                    *row = eight(&self.values[pair * BLOCK + BITS * n..]);
                }
                let (run, run_width) = run_of(pair, n_blocks);
                for (i, column) in turned(rows).into_iter().enumerate() {
                    for n in 0..two {
                        let at = (i * run_width + pair + n - run) * HIGH_BYTES;
                        let to = &mut self.top[run * BLOCK + at..][..HIGH_BYTES];
                        put(column >> (32 * n), to);
                    }
                }
            }
        }
    }
}

/// The first eight values as bytes, first lowest.
fn eight(values: &[i8]) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| values[i] as u8))
}

/// Writes the lowest bytes.
fn put(bytes: u64, to: &mut [i8]) {
    for (to, byte) in to.iter_mut().zip(bytes.to_le_bytes()) {
        *to = byte as i8;
    }
}

/// Byte i of row n becomes byte n of row i.
fn turned(mut rows: [u64; 8]) -> [u64; 8] {
    for (distance, mask) in [
        (4, 0x0000_0000_FFFF_FFFF),
        (2, 0x0000_FFFF_0000_FFFF),
        (1, 0x00FF_00FF_00FF_00FF),
    ] {
        for n in (0..8).filter(|n| n & distance == 0) {
            let (a, b) = (rows[n], rows[n + distance]);
            let shift = 8 * distance;
            rows[n] = a & mask | (b & mask) << shift;
            rows[n + distance] = a >> shift & mask | b & !mask;
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn values_come_in_the_order_of_the_planes() {
        for n_cols in [32, 288, 576, 608, 1056] {
            let mut input = SketchInput::new(n_cols);
            input.set(&Random(3).activations(n_cols));
            let (n_blocks, stride) = (n_cols / BLOCK, n_cols / 8);
            let mut seen = 0;
            for b in 0..n_blocks {
                let (first, width) = (b / UNIT * UNIT, (n_blocks - b / UNIT * UNIT).min(UNIT));
                let (run, run_width) = run_of(b, n_blocks);
                for (j, i) in (0..4).flat_map(|j| (0..8).map(move |i| (j, i))) {
                    let value = input.values[b * BLOCK + 8 * j + i];
                    let at = run * BLOCK + (i * run_width + b - run) * 4 + j;
                    assert_eq!(input.top[at], value, "top {b} {j} {i}");
                    let byte = first * 4 + j * width + b - first;
                    assert_eq!(input.high[i * stride + byte], value, "high {b} {j} {i}");
                    seen += i32::from(value != 0);
                }
            }
            assert!(seen > n_cols as i32 / 3, "values differ");
        }
    }

    #[test]
    fn one_scale_reaches_the_largest_value_and_nan_surfaces() {
        let mut out = [0; 4];
        assert_eq!(quantize_whole(&[0.5, -2.54, 0.0, 0.03], &mut out), 0.02);
        assert_eq!(out, [25, -127, 0, 2]);
        assert_eq!(quantize_whole(&[0.0; 4], &mut out), 0.0);
        assert_eq!(out, [0; 4]);
        assert!(quantize_whole(&[1.0, f32::NAN, 0.0, 1.0], &mut out).is_nan());
        assert!(quantize_whole(&[1.0, 0.0, f32::INFINITY, 1.0], &mut out).is_nan());
        let scale = quantize_whole(&[f32::MIN_POSITIVE / 1e5; 4], &mut out);
        assert!(scale.is_finite(), "too small to divide by");
        assert_eq!(out, [0; 4]);
    }
}
