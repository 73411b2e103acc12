//! Random weights and activations for tests.

use half::{bf16, f16};

use crate::matrix::{Layout, MatrixShape};
use crate::quant::QuantType;

/// SplitMix64.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in −1 … 1.
    pub(crate) fn float(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.float()).collect()
    }

    /// Activations with outliers and zeros, as real ones have.
    pub(crate) fn activations(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| match self.next() % 16 {
                0 => 0.0,
                1 => 20.0 * self.float(),
                _ => self.float(),
            })
            .collect()
    }

    /// Rows of random blocks in file order: any bits for values, scales of about ±0.02.
    pub(crate) fn rows(&mut self, quant: QuantType, n_rows: usize, n_cols: usize) -> Vec<u8> {
        let n_blocks = n_rows * n_cols / quant.block_values();
        let mut bytes = Vec::with_capacity(n_rows * quant.row_bytes(n_cols));
        for _ in 0..n_blocks {
            let start = bytes.len();
            for _ in 0..quant.block_bytes() {
                bytes.push(self.next() as u8);
            }
            let block = &mut bytes[start..];
            match quant {
                QuantType::F32 => block.copy_from_slice(&self.float().to_le_bytes()),
                QuantType::F16 => {
                    block.copy_from_slice(&f16::from_f32(self.float()).to_le_bytes());
                }
                QuantType::BF16 => {
                    block.copy_from_slice(&bf16::from_f32(self.float()).to_le_bytes());
                }
                _ => {
                    for plane in quant.planes().iter().filter(|plane| plane.unit_bytes == 2) {
                        let scale = f16::from_f32(0.02 * self.float()).to_le_bytes();
                        block[plane.offset_bytes..plane.offset_bytes + 2].copy_from_slice(&scale);
                    }
                }
            }
        }
        bytes
    }
}

/// A packed matrix and its bytes.
pub(crate) fn pack(
    quant: QuantType,
    n_cols: usize,
    layout: Layout,
    rows: &[u8],
) -> (MatrixShape, Vec<u8>) {
    let n_rows = rows.len() / quant.row_bytes(n_cols);
    let shape = MatrixShape {
        quant,
        n_rows,
        n_cols,
        layout,
    };
    let mut bytes = vec![0; shape.packed_bytes()];
    shape.pack(rows, 0, &mut bytes);
    (shape, bytes)
}

/// Bit patterns, so that NaN compares equal to itself.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}
