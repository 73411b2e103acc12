//! Inputs that the benchmarks share, and the loop without actors that the pipeline is compared with.

mod plain_loop;

pub use plain_loop::PlainLoop;

use pi_kernels::{Layout, MatrixShape, QuantType};

/// SplitMix64: the same weights in every run.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// `n` values in −1 … 1.
    pub fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n)
            .map(|_| (self.next_u64() >> 40) as f32 / (1u64 << 23) as f32 - 1.0)
            .collect()
    }
}

/// A packed matrix of random values with scales of one bit pattern (0.01), touched by writing it.
pub fn matrix(
    quant: QuantType,
    n_rows: usize,
    n_cols: usize,
    layout: Layout,
) -> (MatrixShape, Vec<u8>) {
    let mut random = Random(1);
    let mut file: Vec<u8> = Vec::with_capacity(n_rows * quant.row_bytes(n_cols) + 8);
    while file.len() < n_rows * quant.row_bytes(n_cols) {
        file.extend_from_slice(&random.next_u64().to_le_bytes());
    }
    file.truncate(n_rows * quant.row_bytes(n_cols));
    for block in file.chunks_exact_mut(quant.block_bytes()) {
        for plane in quant.planes().iter().filter(|plane| plane.unit_bytes == 2) {
            block[plane.offset_bytes..plane.offset_bytes + 2].copy_from_slice(&[0x1f, 0x21]);
        }
    }
    let shape = MatrixShape {
        quant,
        n_rows,
        n_cols,
        layout,
    };
    let mut bytes = vec![0; shape.packed_bytes()];
    shape.pack(&file, 0, &mut bytes);
    (shape, bytes)
}
