//! Matrices of predictors as they are stored, and products with them as the runtime computes them.

use pi_kernels::gemm::gemm;
use pi_kernels::{ActBatch, Cpu, Layout, MatrixRef, MatrixShape, QuantType, StridedOut};

use crate::linear_algebra::Workers;
use crate::model::quantize::{dequantize_row, quantize_row};

/// Tokens whose products one thread computes at a time.
const TOKENS: usize = 64;

/// A matrix `[n_rows, n_cols]` in a GGUF format, row after row as in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedMatrix {
    /// Format.
    pub quant: QuantType,
    /// Output values.
    pub n_rows: usize,
    /// Input values, whole blocks of the format.
    pub n_cols: usize,
    /// `n_rows · quant.row_bytes(n_cols)` bytes.
    pub bytes: Vec<u8>,
}

impl QuantisedMatrix {
    /// Rounds row-major `values` `[n_rows, n_cols]` to `quant`.
    ///
    /// # Panics
    /// When the values aren't whole rows, the rows not whole blocks, or the format can't be written.
    pub fn round(quant: QuantType, values: &[f32], n_cols: usize) -> Self {
        assert_eq!(values.len() % n_cols, 0, "whole rows");
        let (n_rows, row_bytes) = (values.len() / n_cols, quant.row_bytes(n_cols));
        let mut bytes = vec![0; n_rows * row_bytes];
        for (row, out) in values
            .chunks_exact(n_cols)
            .zip(bytes.chunks_exact_mut(row_bytes))
        {
            quantize_row(quant, row, out);
        }
        Self {
            quant,
            n_rows,
            n_cols,
            bytes,
        }
    }

    /// The real values, row-major `[n_rows, n_cols]`.
    pub fn values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.n_rows * self.n_cols];
        let rows = self.bytes.chunks_exact(self.quant.row_bytes(self.n_cols));
        for (row, out) in rows.zip(values.chunks_exact_mut(self.n_cols)) {
            dequantize_row(self.quant, row, out);
        }
        values
    }

    /// Products with every row of `x`, row-major `[n, n_cols]`, as the runtime's kernels compute them: `[n, n_rows]`.
    pub(super) fn products(&self, cpu: Cpu, workers: Workers, x: &[f32]) -> Vec<f32> {
        let packed = Packed::new(self);
        let n = x.len() / self.n_cols;
        let mut out = vec![0.0; n * self.n_rows];
        let blocks = out
            .chunks_mut(TOKENS * self.n_rows)
            .zip(x.chunks(TOKENS * self.n_cols));
        workers.each(blocks, |(out, x)| packed.products(cpu, x, out));
        out
    }
}

/// A matrix in the order that kernels read.
struct Packed {
    shape: MatrixShape,
    bytes: Vec<u8>,
}

impl Packed {
    fn new(matrix: &QuantisedMatrix) -> Self {
        let shape = MatrixShape {
            quant: matrix.quant,
            n_rows: matrix.n_rows,
            n_cols: matrix.n_cols,
            layout: Layout::Interleaved,
        };
        let mut bytes = vec![0; shape.packed_bytes()];
        shape.pack(&matrix.bytes, 0, &mut bytes);
        Self { shape, bytes }
    }

    /// Overwrites `out` `[n, n_rows]` from `x` `[n, n_cols]`.
    fn products(&self, cpu: Cpu, x: &[f32], out: &mut [f32]) {
        let (n_rows, n_cols) = (self.shape.n_rows, self.shape.n_cols);
        let n = x.len() / n_cols;
        let mut batch = ActBatch::new(cpu.mode(), n_cols, n);
        for (token, row) in x.chunks_exact(n_cols).enumerate() {
            batch.set(cpu, token, row);
        }
        let matrix = MatrixRef::new(self.shape, &self.bytes);
        let out = StridedOut::from_slice(out, n_rows, n, 0..n_rows);
        gemm(cpu, matrix, &batch, 0..n, 0..n_rows, out);
    }
}
