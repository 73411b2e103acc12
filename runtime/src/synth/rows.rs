//! Where a tensor's rows come from.

use std::fmt::Debug;
use std::ops::Range;

use pi_kernels::QuantType;

use super::blocks::{RandomBlocks, fill_constant};
use super::random::Random;

/// Makes the rows of a tensor, each from its own random numbers.
pub(super) trait Rows: Debug + Send + Sync {
    /// Overwrites `out` with row `row`.
    fn write(&self, row: usize, random: Random, out: &mut [u8]);
}

/// A row that is given, of F32: vectors.
#[derive(Debug)]
pub(super) struct Vector(pub Vec<f32>);

impl Rows for Vector {
    fn write(&self, _: usize, _: Random, out: &mut [u8]) {
        for (bytes, value) in out.chunks_exact_mut(4).zip(&self.0) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Random rows whose first columns, the constant channels', are set apart.
#[derive(Debug)]
pub(super) struct RandomRows {
    pub quant: QuantType,
    pub n_constant: usize,
    /// Value in the constant channels' columns, by the row's place in a period (a head).
    pub lead: Vec<f64>,
    pub blocks: RandomBlocks,
    /// Rows that are zeros.
    pub zeros: Range<usize>,
}

impl Rows for RandomRows {
    fn write(&self, row: usize, mut random: Random, out: &mut [u8]) {
        if self.zeros.contains(&row) {
            return out.fill(0);
        }
        let (lead, rest) = out.split_at_mut(self.quant.row_bytes(self.n_constant));
        match self.lead.get(row % self.lead.len().max(1)) {
            Some(value) if *value != 0.0 => fill_constant(self.quant, *value, lead),
            _ => lead.fill(0),
        }
        self.blocks.fill(&mut random, rest);
    }
}
