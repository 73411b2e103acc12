//! Rounding f32 rows to GGUF's small block types with a smaller error than ggml's reference.
//!
//! The reference lets a block's codes span its extremes. Here some narrower and wider spans are tried too, each scale
//! (and minimum) fitted to its codes by least squares, and the one with the smallest squared error is kept.

use half::f16;
use pi_kernels::QuantType;
use pi_kernels::quant::dequantize_block;

use super::quantize::{BLOCK_VALUES, quantize_row, write_codes};

/// By how many codes a span is wider than the range of the codes.
const STRETCHES: [f32; 6] = [-2.0, -1.25, -0.5, 0.25, 1.0, 1.75];
/// Lanes in which sums run, so that they are the same whatever the compiler makes of them.
const LANES: usize = 8;

/// Adding and taking it off again rounds to whole numbers, in any instruction set.
const TO_WHOLE: f32 = 12_582_912.0;

type Values = [f32; BLOCK_VALUES];

/// Rounds `row` `[n]` to `quant` and overwrites `out`, `quant.row_bytes(n)` bytes: as [`quantize_row`], in no block with
/// a greater squared error.
///
/// # Panics
/// As [`quantize_row`].
pub fn requantize_row(quant: QuantType, row: &[f32], out: &mut [u8]) {
    quantize_row(quant, row, out);
    let improve: fn(QuantType, &Values, &mut [u8]) = match quant {
        QuantType::Q4_0 => improve_block::<4, false>,
        QuantType::Q4_1 => improve_block::<4, true>,
        QuantType::Q5_0 => improve_block::<5, false>,
        QuantType::Q5_1 => improve_block::<5, true>,
        _ => return,
    };
    let (blocks, _) = row.as_chunks::<BLOCK_VALUES>();
    for (x, y) in blocks.iter().zip(out.chunks_exact_mut(quant.block_bytes())) {
        improve(quant, x, y);
    }
}

/// What codes of a block stand for: `d · code + min`.
#[derive(Clone, Copy)]
struct Scale {
    d: f32,
    min: f32,
}

fn improve_block<const BITS: u32, const AFFINE: bool>(quant: QuantType, x: &Values, y: &mut [u8]) {
    let mut reference = [0.0; BLOCK_VALUES];
    dequantize_block(quant, y, &mut reference);
    let error = |q: &Values, scale: Scale| sum(|n| (q[n] * scale.d + scale.min - x[n]).powi(2));
    let mut least = sum(|n| (reference[n] - x[n]).powi(2));
    let top = ((1u32 << BITS) - 1) as f32;
    let half = (1u32 << (BITS - 1)) as f32;
    let low = if AFFINE { 0.0 } else { -half };
    let mut best = None;
    for stretch in STRETCHES {
        let first = if AFFINE {
            span(x, top + stretch)
        } else {
            one_sided(x, half + stretch)
        };
        let fitted = fit::<AFFINE>(x, &codes(x, first, low, top));
        let q = codes(x, fitted, low, top);
        let error = error(&q, fitted);
        // comparisons with what is no number fail, and the reference stays
        if error < least {
            least = error;
            best = Some((fitted, q));
        }
    }
    if let Some((scale, q)) = best {
        y[..2].copy_from_slice(&f16::from_f32(scale.d).to_le_bytes());
        let mut codes_at = 2;
        if AFFINE {
            y[2..4].copy_from_slice(&f16::from_f32(scale.min).to_le_bytes());
            codes_at = 4;
        }
        write_codes::<BITS>(&q, |code| (code - low) as u8, &mut y[codes_at..]);
    }
}

/// From the smallest value to the largest in `steps`.
fn span(x: &Values, steps: f32) -> Scale {
    let min = x.iter().copied().fold(f32::INFINITY, f32::min);
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    Scale {
        d: (max - min) / steps,
        min,
    }
}

/// From 0 to the value of largest magnitude, the lowest code, in `steps`.
fn one_sided(x: &Values, steps: f32) -> Scale {
    let larger = |a: f32, b: &f32| if a.abs() < b.abs() { *b } else { a };
    Scale {
        d: x.iter().fold(0.0, larger) / -steps,
        min: 0.0,
    }
}

/// The nearest codes, as floats.
fn codes(x: &Values, scale: Scale, low: f32, top: f32) -> Values {
    let inverse = 1.0 / scale.d;
    x.map(|x| ((x - scale.min) * inverse).clamp(low, low + top) + TO_WHOLE - TO_WHOLE)
}

/// The scale with the smallest squared error for these codes, as it can be stored.
fn fit<const AFFINE: bool>(x: &Values, q: &Values) -> Scale {
    let stored = |value: f32| f16::from_f32(value).to_f32();
    if !AFFINE {
        let d = sum(|n| q[n] * x[n]) / sum(|n| q[n] * q[n]);
        return Scale {
            d: stored(d),
            min: 0.0,
        };
    }
    let n_values = BLOCK_VALUES as f32;
    let (q_mean, x_mean) = (sum(|n| q[n]) / n_values, sum(|n| x[n]) / n_values);
    let d = sum(|n| (q[n] - q_mean) * (x[n] - x_mean)) / sum(|n| (q[n] - q_mean) * (q[n] - q_mean));
    let d = stored(d);
    Scale {
        d,
        min: stored(x_mean - d * q_mean),
    }
}

fn sum(value: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    for start in (0..BLOCK_VALUES).step_by(LANES) {
        for (lane, sum) in lanes.iter_mut().enumerate() {
            *sum += value(start + lane);
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::quantize::dequantize_row;

    const TYPES: [QuantType; 4] = [
        QuantType::Q4_0,
        QuantType::Q4_1,
        QuantType::Q5_0,
        QuantType::Q5_1,
    ];

    /// The same values in every run, about normal, as weights are.
    fn values(n: usize) -> Vec<f32> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n).map(|_| (0..12).map(|_| next()).sum()).collect()
    }

    fn errors(quant: QuantType, row: &[f32], round: fn(QuantType, &[f32], &mut [u8])) -> Vec<f32> {
        let mut bytes = vec![0xee; quant.row_bytes(row.len())];
        let mut back = vec![0.0; row.len()];
        round(quant, row, &mut bytes);
        dequantize_row(quant, &bytes, &mut back);
        let squares = back.iter().zip(row).map(|(a, b)| (a - b).powi(2));
        let squares: Vec<f32> = squares.collect();
        squares
            .chunks(BLOCK_VALUES)
            .map(|b| b.iter().sum())
            .collect()
    }

    #[test]
    fn errors_fall_and_rise_in_no_block() {
        let row = values(32 * 256);
        for quant in TYPES {
            let reference = errors(quant, &row, quantize_row);
            let close = errors(quant, &row, requantize_row);
            for (close, reference) in close.iter().zip(&reference) {
                assert!(*close <= reference * 1.0001, "{quant}: {close} {reference}");
            }
            let ratio = close.iter().sum::<f32>() / reference.iter().sum::<f32>();
            let bound = match quant {
                QuantType::Q4_1 | QuantType::Q5_1 => 0.85,
                _ => 0.93,
            };
            assert!(ratio < bound, "{quant}: {ratio}");
        }
    }

    #[test]
    fn odd_blocks_are_rounded_as_by_the_reference() {
        let mut damaged = values(32);
        damaged[3] = f32::NAN;
        let mut endless = values(32);
        endless[30] = f32::INFINITY;
        for quant in TYPES.into_iter().chain([QuantType::Q8_0, QuantType::F16]) {
            for row in [
                vec![0.0; 32],
                vec![0.25; 32],
                damaged.clone(),
                endless.clone(),
            ] {
                let mut expected = vec![0xee; quant.row_bytes(32)];
                let mut out = vec![0xbb; expected.len()];
                quantize_row(quant, &row, &mut expected);
                requantize_row(quant, &row, &mut out);
                assert_eq!(out, expected, "{quant} {row:?}");
            }
        }
    }
}
