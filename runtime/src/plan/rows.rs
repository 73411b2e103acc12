//! Random rows of any type, for a rehearsal: bytes that cost what a model's cost, with outputs that are chosen.

use half::f16;
use pi_kernels::QuantType;

use crate::model::quantize::{dequantize_row, quantize_row};

/// Tokens of a rehearsal, each with an embedding of its own.
pub(super) const N_TOKENS: usize = 8;

/// Which of the tokens open a gate, a bit each.
pub(super) type Pattern = u8;

const _: () = assert!(N_TOKENS == Pattern::BITS as usize);

/// Rows drawn for gates before what is missing is replaced by the nearest.
const N_DRAWS: usize = 1 << 14;

/// A gate nearer to zero than this, as a cosine of row and input, might fall on the other side in 8-bit arithmetic.
const MARGIN: f32 = 0.01;

/// SplitMix64: the same rehearsal in every run.
#[derive(Debug, Clone)]
pub(super) struct Random(pub u64);

impl Random {
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// From 0 up to 1.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// `n` values from −1 to 1.
    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.unit() * 2.0 - 1.0) as f32).collect()
    }
}

/// A random row of `n_cols` values, as a file has it, whose products with inputs of size 1 are about as large.
pub(super) fn random_row(quant: QuantType, n_cols: usize, random: &mut Random) -> Vec<u8> {
    let target = 1.0 / (n_cols as f32).sqrt();
    let mut row = vec![0; quant.row_bytes(n_cols)];
    if !quant.is_quantised() {
        let values: Vec<f32> = random.values(n_cols).iter().map(|x| x * target).collect();
        quantize_row(quant, &values, &mut row);
        return row;
    }
    for bytes in row.chunks_mut(8) {
        bytes.copy_from_slice(&random.next_u64().to_le_bytes()[..bytes.len()]);
    }
    set_scales(quant, &mut row, 1.0);
    let mut values = vec![0.0; n_cols];
    dequantize_row(quant, &row, &mut values);
    let size = (values.iter().map(|x| x * x).sum::<f32>() / n_cols as f32).sqrt();
    set_scales(quant, &mut row, target / size.max(f32::MIN_POSITIVE));
    row
}

/// A row whose every value is zero; of a block type with random codes and scales of zero.
pub(super) fn zero_row(quant: QuantType, n_cols: usize, random: &mut Random) -> Vec<u8> {
    if !quant.is_quantised() {
        return vec![0; quant.row_bytes(n_cols)];
    }
    let mut row = random_row(quant, n_cols, random);
    set_scales(quant, &mut row, 0.0);
    row
}

/// Sets the half-precision scales of every block, and its minima so that random codes are zero in the mean.
fn set_scales(quant: QuantType, row: &mut [u8], scale: f32) {
    let of_scale = [1.0, centre(quant)];
    each_scale(quant, row, |n, bytes| {
        let value = f16::from_f32(scale * of_scale[n]);
        bytes.copy_from_slice(&value.to_le_bytes());
    });
}

/// What a block's minimum has to be, over its scale: a minimum is added in the formats of 32, and taken off in those of
/// 256, whose integer scales and minima have the same mean.
fn centre(quant: QuantType) -> f32 {
    match quant {
        QuantType::Q4_1 => -7.5,
        QuantType::Q5_1 => -15.5,
        QuantType::Q2_K => 1.5,
        QuantType::Q4_K => 7.5,
        QuantType::Q5_K => 15.5,
        _ => 0.0,
    }
}

/// The row times −1.
fn negate(quant: QuantType, row: &mut [u8]) {
    match quant {
        QuantType::F32 => row.iter_mut().skip(3).step_by(4).for_each(flip),
        QuantType::F16 | QuantType::BF16 => row.iter_mut().skip(1).step_by(2).for_each(flip),
        _ => each_scale(quant, row, |_, bytes| flip(&mut bytes[1])),
    }
}

/// Flips the sign in the last byte of a number.
fn flip(byte: &mut u8) {
    *byte ^= 0x80;
}

/// Changes a block's half-precision numbers: its scale, and then its minimum if there is one.
fn each_scale(quant: QuantType, row: &mut [u8], change: impl Fn(usize, &mut [u8])) {
    for block in row.chunks_exact_mut(quant.block_bytes()) {
        // units of two bytes are the scales, those of four values
        let halves = quant.planes().iter().filter(|plane| plane.unit_bytes == 2);
        for (n, plane) in halves.enumerate() {
            change(n, &mut block[plane.offset_bytes..][..plane.bytes()]);
        }
    }
}

/// Gate rows for every pattern of open and closed.
#[derive(Debug)]
pub(super) struct GateRows {
    by_pattern: Vec<Vec<u8>>,
}

impl GateRows {
    /// Rows whose product with the input of token t is above zero where bit t of the pattern is set, and below zero
    /// where it is not. `inputs` are `[n_cols]` each.
    pub fn new(
        quant: QuantType,
        n_cols: usize,
        inputs: &[Vec<f32>; N_TOKENS],
        random: &mut Random,
    ) -> Self {
        let n_patterns = 1usize << N_TOKENS;
        let mut found: Vec<Option<Vec<u8>>> = vec![None; n_patterns];
        let mut n_missing = n_patterns;
        let mut values = vec![0.0; n_cols];
        for _ in 0..N_DRAWS {
            if n_missing == 0 {
                break;
            }
            let mut row = random_row(quant, n_cols, random);
            dequantize_row(quant, &row, &mut values);
            let Some(pattern) = pattern_of(&values, inputs) else {
                continue;
            };
            for pattern in [pattern, !pattern] {
                let place = &mut found[usize::from(pattern)];
                if place.is_none() {
                    *place = Some(row.clone());
                    n_missing -= 1;
                }
                negate(quant, &mut row);
            }
        }
        Self {
            by_pattern: nearest(found, || random_row(quant, n_cols, random)),
        }
    }

    /// The row of a pattern.
    pub fn row(&self, pattern: Pattern) -> &[u8] {
        &self.by_pattern[usize::from(pattern)]
    }
}

/// The tokens whose product with a row is above zero; none where one is too near to zero.
fn pattern_of(row: &[f32], inputs: &[Vec<f32>; N_TOKENS]) -> Option<Pattern> {
    let size = |values: &[f32]| values.iter().map(|x| x * x).sum::<f32>().sqrt();
    let row_size = size(row);
    let mut pattern = 0;
    for (token, input) in inputs.iter().enumerate() {
        let product: f32 = row.iter().zip(input).map(|(w, x)| w * x).sum();
        if product.abs() <= MARGIN * row_size * size(input) {
            return None;
        }
        pattern |= Pattern::from(product > 0.0) << token;
    }
    Some(pattern)
}

/// Gives a pattern that was not found the row of one that differs least from it.
fn nearest(found: Vec<Option<Vec<u8>>>, mut any: impl FnMut() -> Vec<u8>) -> Vec<Vec<u8>> {
    (0..found.len())
        .map(|wanted| {
            let rows = found.iter().enumerate();
            let there = rows.filter_map(|(pattern, row)| Some((pattern, row.as_ref()?)));
            let best = there.min_by_key(|(pattern, _)| (pattern ^ wanted).count_ones());
            best.map_or_else(&mut any, |(_, row)| row.clone())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_open_for_the_tokens_of_their_pattern_in_every_type() {
        for quant in QuantType::ALL {
            let n_cols = 256;
            let mut random = Random(7);
            let inputs = std::array::from_fn(|_| random.values(n_cols));
            let rows = GateRows::new(quant, n_cols, &inputs, &mut random);
            let mut values = vec![0.0; n_cols];
            for pattern in 0..=Pattern::MAX {
                dequantize_row(quant, rows.row(pattern), &mut values);
                assert_eq!(pattern_of(&values, &inputs), Some(pattern), "{quant}");
            }
        }
    }

    #[test]
    fn rows_have_about_the_size_asked_for_and_zero_rows_none() {
        for quant in QuantType::ALL {
            let mut random = Random(3);
            let mut values = vec![0.0; 512];
            dequantize_row(quant, &random_row(quant, 512, &mut random), &mut values);
            let size = values.iter().map(|x| x * x).sum::<f32>();
            assert!((0.2..2.0).contains(&size), "{quant}: {size}");
            dequantize_row(quant, &zero_row(quant, 512, &mut random), &mut values);
            assert!(values.iter().all(|&x| x == 0.0), "{quant}");
        }
    }
}
