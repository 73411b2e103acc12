//! The specification: one row of any layout against one activation row.

use crate::activations::{ActRef, ActivationMode, join_lanes};
use crate::matrix::MatrixRef;
use crate::quant::{BLOCK, DecodedBlock, QuantType, dequantize_block};

/// Dot product of row `row` of `m` with `x`, with 8-bit activations where `mode` and format say so.
pub(crate) fn dot(m: MatrixRef<'_>, row: usize, x: ActRef<'_>, mode: ActivationMode) -> f32 {
    let quant = m.shape.quant;
    if !quant.is_quantised() {
        return dot_float(m, row, x);
    }
    let mut acc = 0.0;
    m.each_block(row, |block, bytes| {
        let decoded = DecodedBlock::read(quant, bytes);
        let first = block * decoded.len / BLOCK;
        for sub in 0..decoded.len / BLOCK {
            acc = match mode {
                ActivationMode::Q8 => block_q8(quant, &decoded, sub, x, first + sub, acc),
                ActivationMode::F32 => block_f32(quant, &decoded, sub, x, first + sub, acc),
            };
        }
    });
    acc
}

/// Whether the format adds a minimum to its values.
pub(crate) const fn has_min(quant: QuantType) -> bool {
    matches!(
        quant,
        QuantType::Q4_1 | QuantType::Q5_1 | QuantType::Q2_K | QuantType::Q4_K | QuantType::Q5_K
    )
}

/// Whether a block of 32 values has two minima.
pub(crate) const fn has_half_mins(quant: QuantType) -> bool {
    quant.has_halves() && has_min(quant)
}

fn block_q8(
    quant: QuantType,
    block: &DecodedBlock,
    sub: usize,
    x: ActRef<'_>,
    b: usize,
    acc: f32,
) -> f32 {
    let half = |half: usize| -> i32 {
        (half * 16..(half + 1) * 16)
            .map(|k| block.q[sub * BLOCK + k] * i32::from(x.q[b * BLOCK + k]))
            .sum()
    };
    // formats with two scales in a block of 32 join them as integers
    let (sum, scale) = if quant.has_halves() {
        let scales = &block.sub_scales[2 * sub..];
        (half(0) * scales[0] + half(1) * scales[1], block.d)
    } else {
        (
            half(0) + half(1),
            block.d * block.sub_scales[2 * sub] as f32,
        )
    };
    let acc = (sum as f32).mul_add(scale * x.scales[b], acc);
    if has_half_mins(quant) {
        // joined as integers, as the scales are
        let mins = &block.sub_mins[2 * sub..];
        let sum = mins[0] * x.half_sums[2 * b] + mins[1] * x.half_sums[2 * b + 1];
        (sum as f32).mul_add(block.min * x.scales[b], acc)
    } else if has_min(quant) {
        block.min_of(2 * sub).mul_add(x.sums[b], acc)
    } else {
        acc
    }
}

fn block_f32(
    quant: QuantType,
    block: &DecodedBlock,
    sub: usize,
    x: ActRef<'_>,
    b: usize,
    mut acc: f32,
) -> f32 {
    // formats with two scales in a block of 32 are summed in two parts
    let part = if quant.has_halves() { 16 } else { BLOCK };
    for start in (0..BLOCK).step_by(part) {
        let mut lanes = [0.0f32; 8];
        for k in start..start + part {
            let q = block.q[sub * BLOCK + k] as f32;
            lanes[k % 8] = q.mul_add(x.values[b * BLOCK + k], lanes[k % 8]);
        }
        let scale = block.d * block.sub_scales[2 * sub + start / 16] as f32;
        acc = join_lanes(lanes).mul_add(scale, acc);
    }
    if has_half_mins(quant) {
        for half in [2 * sub, 2 * sub + 1] {
            let total = x.half_totals[2 * b + half % 2];
            acc = block.min_of(half).mul_add(total, acc);
        }
        acc
    } else if has_min(quant) {
        block.min_of(2 * sub).mul_add(x.sums[b], acc)
    } else {
        acc
    }
}

/// Float weights: 8 sums over the whole row.
fn dot_float(m: MatrixRef<'_>, row: usize, x: ActRef<'_>) -> f32 {
    let mut lanes = [0.0f32; 8];
    m.each_block(row, |k, bytes| {
        let mut weight = [0.0];
        dequantize_block(m.shape.quant, bytes, &mut weight);
        lanes[k % 8] = weight[0].mul_add(x.values[k], lanes[k % 8]);
    });
    join_lanes(lanes)
}
