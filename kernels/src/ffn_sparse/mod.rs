//! The feed-forward network over active neurons only: gate → skip → up → down.
//!
//! A neuron's up and down rows are read only when its gate is open. The sum over neurons has the
//! fixed order of [`FFN_GROUPS`], so skipping (adding exact zeros or not) changes no bit.

mod down;
pub mod sketch;
mod threshold;
mod tree;
mod up;

use std::ops::Range;

use crate::matrix::{Layout, MatrixRef, MatrixShape};
use crate::quant::QuantType;

pub use down::{DownScratch, GroupSpan, down_active, down_tokens};
pub use threshold::{large_active, zero_small};
pub use tree::{FFN_GROUPS, SUBTREES_MAX, join_subtrees, n_subtrees, subtrees};
pub use up::{UpScratch, ask_for_down, row_products, row_products_tokens, up_active, up_tokens};

/// One of the two rows (`up`, or `down` = a row of `ffn_down_t`) of each neuron, `[n_neurons,
/// n_embd]`, each row packed as [`Layout::Rows`], rows `stride_bytes` apart.
#[derive(Debug, Clone, Copy)]
pub struct NeuronRows<'a> {
    /// Format of the rows.
    pub quant: QuantType,
    /// Columns.
    pub n_embd: usize,
    /// Rows.
    pub n_neurons: usize,
    /// From a neuron's record to the next one's.
    pub stride_bytes: usize,
    /// Where the row starts in the neuron's record.
    pub offset_bytes: usize,
    /// All records.
    pub bytes: &'a [u8],
}

impl<'a> NeuronRows<'a> {
    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.quant.row_bytes(self.n_embd)
    }

    /// The packed row of neuron `neuron`.
    ///
    /// # Panics
    /// When there is no such neuron.
    #[inline]
    pub fn row(&self, neuron: usize) -> &'a [u8] {
        assert!(
            neuron < self.n_neurons,
            "neuron {neuron} of {}",
            self.n_neurons
        );
        &self.bytes[neuron * self.stride_bytes + self.offset_bytes..][..self.row_bytes()]
    }

    /// The row of a neuron as a matrix of one row.
    fn matrix(&self, neuron: usize) -> MatrixRef<'a> {
        let shape = MatrixShape {
            quant: self.quant,
            n_rows: 1,
            n_cols: self.n_embd,
            layout: Layout::Rows,
        };
        MatrixRef::new(shape, self.row(neuron))
    }

    /// Pulls columns `columns` (whole blocks) of the neuron's row towards the caches.
    #[inline]
    pub fn prefetch(&self, neuron: usize, columns: Range<usize>) {
        #[cfg(target_arch = "x86_64")]
        {
            let (row, per_block) = (self.row(neuron), self.quant.block_values());
            let n_blocks = self.n_embd / per_block;
            let blocks = columns.start / per_block..columns.end.div_ceil(per_block);
            // a row is plane after plane
            let mut start = 0;
            for plane in self.quant.planes() {
                let bytes = plane.units * plane.unit_bytes;
                let part = &row[start + blocks.start * bytes..start + blocks.end * bytes];
                crate::dot::prefetch_bytes(part.as_ptr(), part.len());
                start += n_blocks * bytes;
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (neuron, columns);
    }
}

/// Appends the ids (`first_id` + index) and values of the open gates of `gate` (`[n]` f32, before
/// the activation): those above zero. NaN counts as open, so that it surfaces in the output.
pub fn gate_active(gate: &[f32], first_id: u32, ids: &mut Vec<u32>, values: &mut Vec<f32>) {
    for (id, &value) in (first_id..).zip(gate) {
        let closed = value <= 0.0;
        if !closed {
            ids.push(id);
            values.push(value);
        }
    }
}

#[cfg(test)]
mod size_tests;
#[cfg(test)]
mod tests;
