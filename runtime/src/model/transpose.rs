//! Neuron rows out of a plain down projection, whose blocks run across neurons.

use std::ops::Range;

use pi_kernels::QuantType;

use super::quantize::dequantize_row;
use super::requantize::requantize_row;
use super::tensors::FileMatrix;

/// Neurons transposed at a time, at least: whole blocks of any type that are 32 or 256 neurons.
const TILE_NEURONS: usize = 64;

/// Transposes a plain down projection `[n_embd, n_ff]`, some neurons at a time. The buffers are reused.
#[derive(Debug)]
pub struct Transposer<'a> {
    down: &'a FileMatrix,
    to: QuantType,
    /// One output row's values for the tile's neurons.
    piece: Vec<f32>,
    /// `[neuron of the tile, n_embd]`
    tile: Vec<f32>,
    /// One neuron's row, in the file's order of type `to`.
    row: Vec<u8>,
}

impl<'a> Transposer<'a> {
    /// Makes rows of type `to` out of `down`.
    pub fn new(down: &'a FileMatrix, to: QuantType) -> Self {
        let n_embd = down.n_rows();
        Self {
            down,
            to,
            piece: Vec::new(),
            tile: Vec::new(),
            row: vec![0; to.row_bytes(n_embd)],
        }
    }

    /// Calls `visit` with each of `neurons` and its row in file order, ascending.
    pub fn each_row(&mut self, neurons: Range<usize>, mut visit: impl FnMut(usize, &[u8])) {
        let block_values = self.down.quant.block_values();
        let step = TILE_NEURONS.next_multiple_of(block_values);
        let mut start = neurons.start - neurons.start % block_values;
        while start < neurons.end {
            let end = (start + step).min(self.down.n_cols());
            self.fill_tile(start..end);
            let n_embd = self.down.n_rows();
            for neuron in start.max(neurons.start)..end.min(neurons.end) {
                requantize_row(
                    self.to,
                    &self.tile[(neuron - start) * n_embd..][..n_embd],
                    &mut self.row,
                );
                visit(neuron, &self.row);
            }
            start = end;
        }
    }

    fn fill_tile(&mut self, neurons: Range<usize>) {
        let (quant, n_embd, n) = (self.down.quant, self.down.n_rows(), neurons.len());
        let columns = quant.row_bytes(neurons.start)..quant.row_bytes(neurons.end);
        self.piece.resize(n, 0.0);
        self.tile.resize(n * n_embd, 0.0);
        for output in 0..n_embd {
            let bytes = &self.down.rows(output..output + 1)[columns.clone()];
            dequantize_row(quant, bytes, &mut self.piece);
            for (neuron, value) in self.piece.iter().enumerate() {
                self.tile[neuron * n_embd + output] = *value;
            }
        }
    }
}
