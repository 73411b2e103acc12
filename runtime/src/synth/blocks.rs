//! Blocks of a type as bytes: random ones of a given spread, and ones whose values are all alike.

use half::{bf16, f16};
use pi_kernels::QuantType;

use super::gaussian::quantile;
use super::random::Random;

/// Values that get bytes together: a block, or 32 values of a float type.
pub(super) const fn unit_values(quant: QuantType) -> usize {
    if quant.is_quantised() {
        quant.block_values()
    } else {
        32
    }
}

/// Scale (or minimum) 16 in each of the eight sub-blocks of `Q4_K` and `Q5_K`.
const SUB_SCALES_K4: [u8; 12] = [0x50, 0x50, 0x50, 0x50, 0x50, 0x50, 0x50, 0x50, 0, 0, 0, 0];

/// What is the same in all random blocks of a type.
struct Form {
    /// Constant bytes and where they lie.
    fixed: Vec<(usize, Vec<u8>)>,
    /// Half-precision fields, and by how much of the standard deviation.
    halves: Vec<(usize, f64)>,
}

/// The layout of a random block: codes are uniform, scales and minima such that values have mean 0 and deviation 1.
fn form(quant: QuantType) -> Form {
    // root of the mean square of codes from `low` to `high`, times the sub-block's scale
    let spread = |low: i32, high: i32, middle: f64, scale: f64| {
        let square = |code: i32| (f64::from(code) - middle).powi(2);
        scale * ((low..=high).map(square).sum::<f64>() / f64::from(high - low + 1)).sqrt()
    };
    let one = |at: usize, spread: f64| vec![(at, 1.0 / spread)];
    let (fixed, halves) = match quant {
        QuantType::Q4_0 => (vec![], one(0, spread(-8, 7, 0.0, 1.0))),
        QuantType::Q5_0 => (vec![], one(0, spread(-16, 15, 0.0, 1.0))),
        QuantType::Q8_0 => (vec![], one(0, spread(-128, 127, 0.0, 1.0))),
        QuantType::Q4_1 => {
            let spread = spread(0, 15, 7.5, 1.0);
            (vec![], vec![(0, 1.0 / spread), (2, -7.5 / spread)])
        }
        QuantType::Q5_1 => {
            let spread = spread(0, 31, 15.5, 1.0);
            (vec![], vec![(0, 1.0 / spread), (2, -15.5 / spread)])
        }
        QuantType::Q2_K => {
            let spread = spread(0, 3, 1.5, 15.0);
            let scales = vec![(0, vec![0xff; 16])];
            (scales, vec![(80, 1.0 / spread), (82, 1.5 / spread)])
        }
        // packed zeros are a scale of -32
        QuantType::Q3_K => {
            let scales = vec![(96, vec![0; 12])];
            (scales, one(108, spread(-4, 3, 0.0, 32.0)))
        }
        QuantType::Q4_K => {
            let spread = spread(0, 15, 7.5, 16.0);
            let scales = vec![(4, SUB_SCALES_K4.to_vec())];
            (scales, vec![(0, 1.0 / spread), (2, 7.5 / spread)])
        }
        QuantType::Q5_K => {
            let spread = spread(0, 31, 15.5, 16.0);
            let scales = vec![(4, SUB_SCALES_K4.to_vec())];
            (scales, vec![(0, 1.0 / spread), (2, 15.5 / spread)])
        }
        QuantType::Q6_K => {
            let scales = vec![(192, vec![8; 16])];
            (scales, one(208, spread(-32, 31, 0.0, 8.0)))
        }
        QuantType::F32 | QuantType::F16 | QuantType::BF16 => (vec![], vec![]),
    };
    Form { fixed, halves }
}

/// Makes random blocks.
#[derive(Debug, Clone)]
pub(super) struct RandomBlocks {
    quant: QuantType,
    fixed: Vec<(usize, Vec<u8>)>,
    halves: Vec<(usize, u16)>,
    /// Values of a float type: 256 quantiles of the normal distribution.
    floats: Vec<[u8; 4]>,
}

impl RandomBlocks {
    /// Blocks whose values have mean 0 and the standard deviation `std`.
    pub fn new(quant: QuantType, std: f64) -> Self {
        let Form { fixed, halves } = form(quant);
        let floats = if quant.is_quantised() {
            vec![]
        } else {
            let raw: Vec<f64> = (0..256)
                .map(|i| quantile((f64::from(i) + 0.5) / 256.0))
                .collect();
            let square = raw.iter().map(|value| value * value).sum::<f64>() / 256.0;
            let scale = std / square.sqrt();
            raw.iter()
                .map(|value| float_bytes(quant, (value * scale) as f32))
                .collect()
        };
        Self {
            quant,
            fixed,
            halves: halves
                .into_iter()
                .map(|(at, part)| (at, f16::from_f64(part * std).to_bits()))
                .collect(),
            floats,
        }
    }

    /// Overwrites `out`, whole blocks.
    pub fn fill(&self, random: &mut Random, out: &mut [u8]) {
        match self.quant {
            QuantType::F32 => self.fill_floats::<4>(random, out),
            QuantType::F16 | QuantType::BF16 => self.fill_floats::<2>(random, out),
            _ => {
                random.fill(out);
                for block in out.chunks_exact_mut(self.quant.block_bytes()) {
                    self.head(block);
                }
            }
        }
    }

    /// Gives a block of random bytes its scales, with a random sign: so codes that are not centred cancel out.
    fn head(&self, block: &mut [u8]) {
        for (at, bytes) in &self.fixed {
            block[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let sign = self
            .halves
            .first()
            .map_or(0, |(at, _)| u16::from(block[*at] & 1) << 15);
        for (at, bits) in &self.halves {
            block[*at..at + 2].copy_from_slice(&(bits ^ sign).to_le_bytes());
        }
    }

    fn fill_floats<const N: usize>(&self, random: &mut Random, out: &mut [u8]) {
        for values in out.chunks_mut(8 * N) {
            let choices = random.next().to_le_bytes();
            for (value, choice) in values.chunks_exact_mut(N).zip(choices) {
                value.copy_from_slice(&self.floats[usize::from(choice)][..N]);
            }
        }
    }
}

fn float_bytes(quant: QuantType, value: f32) -> [u8; 4] {
    let mut out = [0; 4];
    match quant {
        QuantType::F32 => out = value.to_le_bytes(),
        QuantType::F16 => out[..2].copy_from_slice(&f16::from_f32(value).to_le_bytes()),
        QuantType::BF16 => out[..2].copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        _ => unreachable!("blocks have no single values"),
    }
    out
}

/// Overwrites `out`, whole blocks, with blocks whose values are all `value`.
pub(super) fn fill_constant(quant: QuantType, value: f64, out: &mut [u8]) {
    let block_bytes = quant.block_bytes();
    // all codes 0: what that means, and the field that scales it
    let (at, unit) = match quant {
        QuantType::F32 | QuantType::F16 | QuantType::BF16 => {
            let bytes = float_bytes(quant, value as f32);
            for block in out.chunks_exact_mut(block_bytes) {
                block.copy_from_slice(&bytes[..block_bytes]);
            }
            return;
        }
        QuantType::Q4_0 => (0, -8.0),
        QuantType::Q5_0 => (0, -16.0),
        QuantType::Q4_1 | QuantType::Q5_1 => (2, 1.0),
        QuantType::Q8_0 => (0, 127.0),
        QuantType::Q2_K => (82, -15.0),
        QuantType::Q3_K => (108, 128.0),
        QuantType::Q4_K | QuantType::Q5_K => (2, -16.0),
        QuantType::Q6_K => (208, -32.0 * 8.0),
    };
    out.fill(0);
    for block in out.chunks_exact_mut(block_bytes) {
        match quant {
            QuantType::Q8_0 => block[2..].fill(127),
            QuantType::Q2_K => block[..16].fill(0xf0),
            QuantType::Q4_K | QuantType::Q5_K => block[4..16].copy_from_slice(&SUB_SCALES_K4),
            QuantType::Q6_K => block[192..208].fill(8),
            _ => {}
        }
        block[at..at + 2].copy_from_slice(&f16::from_f64(value / unit).to_le_bytes());
    }
}

/// Overwrites `out` with the blocks of `blocks`, every value with its sign changed.
pub(super) fn fill_negated(quant: QuantType, blocks: &[u8], out: &mut [u8]) {
    out.copy_from_slice(blocks);
    let (block_bytes, signs) = match quant {
        QuantType::F32 => (4, vec![3]),
        QuantType::F16 | QuantType::BF16 => (2, vec![1]),
        _ => {
            let halves = form(quant).halves;
            let signs = halves.iter().map(|(at, _)| at + 1).collect();
            (quant.block_bytes(), signs)
        }
    };
    for block in out.chunks_exact_mut(block_bytes) {
        signs.iter().for_each(|&at: &usize| block[at] ^= 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::quantize::dequantize_row;

    fn values(quant: QuantType, bytes: &[u8]) -> Vec<f32> {
        let n_values = bytes.len() / quant.block_bytes() * quant.block_values();
        let mut out = vec![0.0; n_values];
        dequantize_row(quant, bytes, &mut out);
        out
    }

    #[test]
    fn random_blocks_of_every_type_have_the_deviation_asked_for() {
        for quant in QuantType::ALL {
            let n_values = 1 << 16;
            let mut bytes = vec![0; quant.row_bytes(n_values)];
            let blocks = RandomBlocks::new(quant, 0.02);
            blocks.fill(&mut Random::stream(1, 2, 3), &mut bytes);
            let drawn = values(quant, &bytes);
            let mean = drawn.iter().sum::<f32>() / n_values as f32;
            let square = drawn.iter().map(|value| value * value).sum::<f32>() / n_values as f32;
            assert!(mean.abs() < 5e-4, "{quant}: mean {mean}");
            assert!(
                (square.sqrt() / 0.02 - 1.0).abs() < 0.02,
                "{quant}: {square}"
            );
            let mut negated = vec![0; bytes.len()];
            fill_negated(quant, &bytes, &mut negated);
            for (value, other) in drawn.iter().zip(values(quant, &negated)) {
                assert_eq!(*value, -other, "{quant}");
            }
        }
    }

    #[test]
    fn constant_blocks_of_every_type_are_constant() {
        for quant in QuantType::ALL {
            for value in [0.03, -0.7, 0.0] {
                let mut bytes = vec![0xaa; quant.row_bytes(512)];
                fill_constant(quant, value, &mut bytes);
                for found in values(quant, &bytes) {
                    let error = (f64::from(found) - value).abs();
                    assert!(error <= 5e-3 * value.abs(), "{quant}: {found} for {value}");
                }
            }
            let mut zeros = vec![0xaa; quant.row_bytes(512)];
            zeros.fill(0);
            assert!(values(quant, &zeros).iter().all(|value| *value == 0.0));
        }
    }
}
