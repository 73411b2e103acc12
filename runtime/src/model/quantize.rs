//! Rounding f32 rows to GGUF's block types, value for value as ggml's reference (`quantize_row_*_ref`).
//!
//! Source: ggml 0.25.3, `ggml-quants.c`. K-quants are read but not written: their reference searches for scales.

use half::{bf16, f16};
use pi_kernels::QuantType;
use pi_kernels::quant::dequantize_block;

/// Values in a block of every type written here, other than the float types.
pub(super) const BLOCK_VALUES: usize = 32;

/// The types that [`quantize_row`] writes, in the order in which messages list them.
pub const WRITABLE_TYPES: [QuantType; 8] = [
    QuantType::F32,
    QuantType::F16,
    QuantType::BF16,
    QuantType::Q8_0,
    QuantType::Q5_1,
    QuantType::Q5_0,
    QuantType::Q4_1,
    QuantType::Q4_0,
];

/// Rounds `row` `[n]` to `quant` and overwrites `out`, `quant.row_bytes(n)` bytes.
///
/// # Panics
/// When `quant` is not one of [`WRITABLE_TYPES`], when the row isn't whole blocks, or when `out` has another size.
pub fn quantize_row(quant: QuantType, row: &[f32], out: &mut [u8]) {
    assert_eq!(
        out.len(),
        quant.row_bytes(row.len()),
        "bytes of a {} row of {}",
        quant.name(),
        row.len()
    );
    match quant {
        QuantType::F32 => write_floats(row, out, f32::to_le_bytes),
        QuantType::F16 => write_floats(row, out, |value| f16::from_f32(value).to_le_bytes()),
        QuantType::BF16 => write_floats(row, out, |value| bf16::from_f32(value).to_le_bytes()),
        QuantType::Q8_0 => write_blocks(row, out, 34, block_q8_0),
        QuantType::Q4_0 => write_blocks(row, out, 18, block_symmetric::<4>),
        QuantType::Q5_0 => write_blocks(row, out, 22, block_symmetric::<5>),
        QuantType::Q4_1 => write_blocks(row, out, 20, block_affine::<4>),
        QuantType::Q5_1 => write_blocks(row, out, 24, block_affine::<5>),
        other => panic!("no rounding to {} is offered", other.name()),
    }
}

/// Values of a file's row: overwrites `out` `[n]` from `bytes`, `quant.row_bytes(n)` of them.
///
/// # Panics
/// When `bytes` has another size.
pub fn dequantize_row(quant: QuantType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(
        bytes.len(),
        quant.row_bytes(out.len()),
        "bytes of a {} row",
        quant.name()
    );
    let blocks = bytes.chunks_exact(quant.block_bytes());
    for (block, values) in blocks.zip(out.chunks_exact_mut(quant.block_values())) {
        dequantize_block(quant, block, values);
    }
}

fn write_floats<const N: usize>(row: &[f32], out: &mut [u8], to_bytes: impl Fn(f32) -> [u8; N]) {
    for (value, bytes) in row.iter().zip(out.chunks_exact_mut(N)) {
        bytes.copy_from_slice(&to_bytes(*value));
    }
}

fn write_blocks(
    row: &[f32],
    out: &mut [u8],
    block_bytes: usize,
    block: impl Fn(&[f32], &mut [u8]),
) {
    for (x, y) in row
        .chunks_exact(BLOCK_VALUES)
        .zip(out.chunks_exact_mut(block_bytes))
    {
        block(x, y);
    }
}

fn reciprocal(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// 32 signed bytes and one f16 scale; halves round away from zero.
fn block_q8_0(x: &[f32], y: &mut [u8]) {
    let amax = x.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    let d = amax / 127.0;
    let id = reciprocal(d);
    y[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (value, q) in x.iter().zip(&mut y[2..]) {
        *q = (value * id).round() as i8 as u8;
    }
}

/// The value of largest magnitude becomes the lowest code, −2^(BITS−1).
fn block_symmetric<const BITS: u32>(x: &[f32], y: &mut [u8]) {
    let mut extreme = 0.0f32;
    for &value in x {
        if extreme.abs() < value.abs() {
            extreme = value;
        }
    }
    let half_range = (1u32 << (BITS - 1)) as f32;
    let d = extreme / -half_range;
    let id = reciprocal(d);
    y[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    let top = (1i32 << BITS) - 1;
    let code = |value: f32| ((value * id + (half_range + 0.5)) as i8 as i32).min(top) as u8;
    write_codes::<BITS>(x, code, &mut y[2..]);
}

/// Smallest value plus code times scale.
fn block_affine<const BITS: u32>(x: &[f32], y: &mut [u8]) {
    let min = x
        .iter()
        .copied()
        .fold(f32::MAX, |a, b| if b < a { b } else { a });
    let max = x
        .iter()
        .copied()
        .fold(f32::MIN, |a, b| if b > a { b } else { a });
    let top = (1i32 << BITS) - 1;
    let d = (max - min) / top as f32;
    let id = reciprocal(d);
    y[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    y[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    let code = |value: f32| (((value - min) * id + 0.5) as i8 as i32).min(top) as u8;
    write_codes::<BITS>(x, code, &mut y[4..]);
}

/// Writes 32 codes: with 5 bits the fifth bits first as one little-endian u32, then value j beside value j + 16.
pub(super) fn write_codes<const BITS: u32>(x: &[f32], code: impl Fn(f32) -> u8, y: &mut [u8]) {
    let (low, high) = x.split_at(BLOCK_VALUES / 2);
    let mut fifth_bits = 0u32;
    let nibbles_at = if BITS == 5 { 4 } else { 0 };
    for (j, (a, b)) in low.iter().zip(high).enumerate() {
        let (a, b) = (code(*a), code(*b));
        y[nibbles_at + j] = (a & 15) | (b & 15) << 4;
        fifth_bits |= u32::from(a >> 4) << j | u32::from(b >> 4) << (j + BLOCK_VALUES / 2);
    }
    if BITS == 5 {
        y[..4].copy_from_slice(&fifth_bits.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same values in every run: a linear congruential generator in [−2, 2).
    fn values(n: usize) -> Vec<f32> {
        let mut state = 7u32;
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 * 4.0 - 2.0
        };
        (0..n).map(next).collect()
    }

    fn fnv1a(bytes: &[u8]) -> u64 {
        bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        })
    }

    /// Hashes of what the Python package gguf 0.19 (`gguf.quants.quantize`) makes of the same values.
    #[test]
    fn bytes_equal_the_reference_s() {
        let reference = [
            (QuantType::F16, 0xd2d7_00a8_486f_3520),
            (QuantType::BF16, 0x34b0_7588_2a4d_709d),
            (QuantType::Q8_0, 0x56d1_7b71_9859_66dd),
            (QuantType::Q5_1, 0x4dda_3c0e_09b1_3dcd),
            (QuantType::Q5_0, 0xf981_61b0_524f_8e49),
            (QuantType::Q4_1, 0x3bc9_3561_a98f_b742),
            (QuantType::Q4_0, 0xfdc1_4be7_18ef_73da),
        ];
        let row = values(32 * 256);
        for (quant, hash) in reference {
            let mut out = vec![0xee; quant.row_bytes(row.len())];
            quantize_row(quant, &row, &mut out);
            assert_eq!(fnv1a(&out), hash, "{}", quant.name());
        }
    }

    #[test]
    fn rows_come_back_within_half_a_step() {
        let row = values(320);
        let mut back = vec![0.0; row.len()];
        for quant in WRITABLE_TYPES {
            let mut out = vec![0xee; quant.row_bytes(row.len())];
            quantize_row(quant, &row, &mut out);
            dequantize_row(quant, &out, &mut back);
            let bound = match quant {
                QuantType::F32 => 0.0,
                QuantType::F16 | QuantType::BF16 => 0.008,
                QuantType::Q8_0 => 0.5 * 2.0 / 127.0 + 0.002,
                QuantType::Q5_0 | QuantType::Q5_1 => 4.0 / 31.0,
                _ => 4.0 / 15.0,
            };
            for (value, back) in row.iter().zip(&back) {
                assert!(
                    (value - back).abs() <= bound,
                    "{}: {value} became {back}",
                    quant.name()
                );
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for quant in WRITABLE_TYPES {
            let mut out = vec![0xee; quant.row_bytes(64)];
            quantize_row(quant, &[0.0; 64], &mut out);
            let mut back = vec![1.0; 64];
            dequantize_row(quant, &out, &mut back);
            assert!(back.iter().all(|value| *value == 0.0), "{}", quant.name());
        }
    }
}
