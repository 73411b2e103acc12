//! Gates of 4 bits as two planes: the top bit of all rows, and the rest row by row.
//!
//! The top bits with the scales are a sketch of the gates: a weight is taken as plus or minus its
//! block's scale. They are read for all neurons; the three other bits only of candidates, whose
//! exact gates come out of both. Together they take the bytes of the gates alone.
//!
//! A value q of `Q4_0` is 8·b + r with the top bit b and r below 8. With s = Σ (2b − 1)·x over a
//! block, Σ (q − 8)·x = Σ r·x + 4·s − 4·Σx: the sketch's sums are the first half of the gate's.
//!
//! ```text
//! top   16 rows together, block after block:  bits 8j … 8j+7 of 16 rows, j = 0 … 3; 16 scales (f16)
//! rest  row after row:                        bits 0, 1 of all blocks (8 bytes each), bits 2 (4 bytes each)
//! ```
//!
//! In a byte of bits 0 and 1, byte j of a block holds columns j, 8+j, 16+j and 24+j, lowest first.

use std::ops::Range;

use half::f16;

use super::super::NeuronRows;
use crate::activations::ActRef;
use crate::cpu::{Cpu, Tier};
use crate::matrix::{Layout, MatrixShape, ROW_GROUP};
use crate::quant::{BLOCK, QuantType};

/// Bytes of a block of 16 rows in the top plane.
pub(super) const TOP_BYTES: usize = ROW_GROUP * (BLOCK / 8 + 2);
/// Where a block's scales start in it.
pub(super) const SCALES_AT: usize = ROW_GROUP * BLOCK / 8;
/// Bytes of a block in a row of the rest: two bits a value, and one.
pub(super) const LOW_BYTES: usize = BLOCK / 4;
pub(super) const HIGH_BYTES: usize = BLOCK / 8;
/// Bytes of the sums of four activations with all signs, for a block: low and high bytes.
pub const TABLE_BYTES: usize = BLOCK / 4 * 16 * 2;

/// Size of gates in planes, `[n_rows, n_cols]` of `Q4_0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PlanesShape {
    /// Neurons.
    pub n_rows: usize,
    /// Columns, a multiple of 32.
    pub n_cols: usize,
}

impl PlanesShape {
    /// Blocks of a row.
    pub const fn n_blocks(&self) -> usize {
        self.n_cols / BLOCK
    }

    /// Bytes of the top plane, padding rows included.
    pub const fn top_bytes(&self) -> usize {
        self.n_rows.div_ceil(ROW_GROUP) * self.n_blocks() * TOP_BYTES
    }

    /// Bytes of one row of the rest.
    pub const fn rest_row_bytes(&self) -> usize {
        self.n_blocks() * (LOW_BYTES + HIGH_BYTES)
    }

    /// Bytes of the rest.
    pub const fn rest_bytes(&self) -> usize {
        self.n_rows * self.rest_row_bytes()
    }

    /// Bytes of the tables for one token, see [`fill_tables`].
    pub const fn table_bytes(&self) -> usize {
        self.n_blocks() * TABLE_BYTES
    }

    /// Takes rows of `Q4_0` in file order apart. `top` and `rest` are those of rows from
    /// `first_row` on, a multiple of 16.
    ///
    /// # Panics
    /// When lengths do not fit.
    pub fn pack(&self, file_rows: &[u8], first_row: usize, top: &mut [u8], rest: &mut [u8]) {
        let row_bytes = QuantType::Q4_0.row_bytes(self.n_cols);
        assert!(
            file_rows.len().is_multiple_of(row_bytes) && first_row.is_multiple_of(ROW_GROUP),
            "whole rows from a group's start"
        );
        let n_blocks = self.n_blocks();
        for (r, row) in file_rows.chunks_exact(row_bytes).enumerate() {
            let (group, lane) = (r / ROW_GROUP, r % ROW_GROUP);
            let rest = &mut rest[r * self.rest_row_bytes()..][..self.rest_row_bytes()];
            let (low, high) = rest.split_at_mut(n_blocks * LOW_BYTES);
            for (b, block) in row.chunks_exact(QuantType::Q4_0.block_bytes()).enumerate() {
                let top = &mut top[(group * n_blocks + b) * TOP_BYTES..][..TOP_BYTES];
                top[SCALES_AT + 2 * lane..][..2].copy_from_slice(&block[..2]);
                let (mut top_bits, mut high_bits) = (0u32, 0u32);
                let low = &mut low[b * LOW_BYTES..][..LOW_BYTES];
                low.fill(0);
                for k in 0..BLOCK {
                    let q = nibble(&block[2..], k);
                    top_bits |= u32::from(q >> 3) << k;
                    high_bits |= u32::from(q >> 2 & 1) << k;
                    low[k % 8] |= (q & 3) << (2 * (k / 8));
                }
                high[b * HIGH_BYTES..][..HIGH_BYTES].copy_from_slice(&high_bits.to_le_bytes());
                for (j, byte) in top_bits.to_le_bytes().into_iter().enumerate() {
                    top[j * ROW_GROUP + lane] = byte;
                }
            }
        }
    }
}

/// Value k of a `Q4_0` block's 16 bytes.
fn nibble(bytes: &[u8], k: usize) -> u8 {
    if k < 16 {
        bytes[k] & 15
    } else {
        bytes[k - 16] >> 4
    }
}

/// Gates in planes.
#[derive(Debug, Clone, Copy)]
pub struct GatePlanes<'a> {
    /// Their size.
    pub shape: PlanesShape,
    /// `[shape.top_bytes()]`
    pub top: &'a [u8],
    /// `[shape.rest_bytes()]`
    pub rest: &'a [u8],
}

impl<'a> GatePlanes<'a> {
    /// # Panics
    /// When a plane is too short.
    pub fn new(shape: PlanesShape, top: &'a [u8], rest: &'a [u8]) -> Self {
        assert!(
            top.len() >= shape.top_bytes() && rest.len() >= shape.rest_bytes(),
            "planes of {shape:?}"
        );
        Self { shape, top, rest }
    }

    /// Block `block` of the group of row `row` in the top plane.
    fn top_block(&self, row: usize, block: usize) -> &'a [u8] {
        let n = row / ROW_GROUP * self.shape.n_blocks() + block;
        &self.top[n * TOP_BYTES..][..TOP_BYTES]
    }

    /// Scale and top bits of a block.
    fn top_of(&self, row: usize, block: usize) -> ([u8; 2], u32) {
        let (top, lane) = (self.top_block(row, block), row % ROW_GROUP);
        let at = SCALES_AT + 2 * lane;
        let bits = std::array::from_fn(|j| top[j * ROW_GROUP + lane]);
        ([top[at], top[at + 1]], u32::from_le_bytes(bits))
    }

    /// The remaining bits of row `row`: two a value, and one.
    pub(super) fn rest_row(&self, row: usize) -> (&'a [u8], &'a [u8]) {
        let bytes = self.shape.rest_row_bytes();
        self.rest[row * bytes..][..bytes].split_at(self.shape.n_blocks() * LOW_BYTES)
    }

    /// Pulls the remaining bits of row `row` towards the first cache.
    #[inline]
    pub fn prefetch(&self, row: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let bytes = self.shape.rest_row_bytes();
            for line in self.rest[row * bytes..][..bytes].chunks(64) {
                // SAFETY: prefetching is a hint and touches no memory; the pointer is in `rest`.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = row;
    }

    /// Writes the signs of row `row` as `Q4_0` blocks in file order to `out` (overwritten): values of
    /// plus and minus one, so that a product with it gives [`sign_scores`]' bits.
    ///
    /// # Panics
    /// As [`Self::file_row`].
    pub fn sign_row(&self, row: usize, out: &mut [u8]) {
        assert!(row < self.shape.n_rows, "row {row} of {:?}", self.shape);
        assert_eq!(
            out.len(),
            QuantType::Q4_0.row_bytes(self.shape.n_cols),
            "one row"
        );
        for (b, block) in out
            .chunks_exact_mut(QuantType::Q4_0.block_bytes())
            .enumerate()
        {
            let (scale, top) = self.top_of(row, b);
            let q = |k: usize| if top >> k & 1 == 1 { 9 } else { 7 };
            block[..2].copy_from_slice(&scale);
            for k in 0..16 {
                block[2 + k] = q(k) | q(k + 16) << 4;
            }
        }
    }

    /// Row `row` put together as the only row of a matrix of `Q4_0` in `memory`, which has room for
    /// two rows.
    ///
    /// # Panics
    /// As [`Self::file_row`], or when `memory` is too short.
    pub fn unpacked<'m>(&self, row: usize, memory: &'m mut [u8]) -> NeuronRows<'m> {
        let n_cols = self.shape.n_cols;
        let (file, packed) = memory.split_at_mut(QuantType::Q4_0.row_bytes(n_cols));
        self.file_row(row, file);
        let shape = MatrixShape {
            quant: QuantType::Q4_0,
            n_rows: 1,
            n_cols,
            layout: Layout::Rows,
        };
        let packed = &mut packed[..file.len()];
        shape.pack(file, 0, packed);
        NeuronRows {
            quant: QuantType::Q4_0,
            n_embd: n_cols,
            n_neurons: 1,
            stride_bytes: packed.len(),
            offset_bytes: 0,
            bytes: packed,
        }
    }

    /// Writes row `row` as `Q4_0` blocks in file order to `out` (overwritten).
    ///
    /// # Panics
    /// When there is no such row, or `out` has another length.
    pub fn file_row(&self, row: usize, out: &mut [u8]) {
        assert!(row < self.shape.n_rows, "row {row} of {:?}", self.shape);
        assert_eq!(
            out.len(),
            QuantType::Q4_0.row_bytes(self.shape.n_cols),
            "one row"
        );
        let (low, high) = self.rest_row(row);
        for (b, block) in out
            .chunks_exact_mut(QuantType::Q4_0.block_bytes())
            .enumerate()
        {
            let (scale, top) = self.top_of(row, b);
            let low = &low[b * LOW_BYTES..][..LOW_BYTES];
            let high: [u8; 4] = high[b * HIGH_BYTES..][..HIGH_BYTES]
                .try_into()
                .expect("four bytes");
            let high = u32::from_le_bytes(high);
            let q = |k: usize| {
                let upper = (top >> k & 1) << 3 | (high >> k & 1) << 2;
                upper as u8 | low[k % 8] >> (2 * (k / 8)) & 3
            };
            block[..2].copy_from_slice(&scale);
            for k in 0..16 {
                block[2 + k] = q(k) | q(k + 16) << 4;
            }
        }
    }
}

/// Fills the tables of blocks `blocks` of an activation row: for each 4 of its 8-bit values the
/// sums with all 16 signs. `tables` are those of these blocks, `[blocks.len() · TABLE_BYTES]`.
///
/// # Panics
/// When `x` has no 8-bit blocks, or lengths do not fit.
pub fn fill_tables(cpu: Cpu, x: ActRef<'_>, blocks: Range<usize>, tables: &mut [u8]) {
    assert!(x.q.len() >= blocks.end * BLOCK, "activations of 8 bits");
    assert_eq!(tables.len(), blocks.len() * TABLE_BYTES, "tables fit");
    let _ = cpu;
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx2 {
        // SAFETY: a `Cpu` exists only for tiers that the machine has; lengths are asserted.
        unsafe { super::x86::fill_tables(x, blocks, tables) };
    }
}

/// Scores rows `rows`: writes Σ over blocks of `scale · x_scale · s` to `scores` (`[rows.len()]` f32,
/// overwritten), one fused multiply-add a block in ascending order, and the integer sums s to `sums`
/// (`[groups of rows, n_blocks, 16]`, overwritten).
///
/// `x` has 8-bit blocks, and `tables` are [`fill_tables`]' of all of them.
///
/// # Panics
/// When `rows` starts inside a group of 16 or ends outside, or lengths do not fit.
pub fn sign_scores(
    cpu: Cpu,
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    tables: &[u8],
    rows: Range<usize>,
    scores: &mut [f32],
    sums: &mut [i16],
) {
    let n_blocks = planes.shape.n_blocks();
    assert!(
        rows.start.is_multiple_of(ROW_GROUP) && rows.end <= planes.shape.n_rows,
        "rows {rows:?} of {:?}",
        planes.shape
    );
    assert!(
        x.q.len() >= planes.shape.n_cols && tables.len() >= planes.shape.table_bytes(),
        "activations fit"
    );
    assert!(
        scores.len() == rows.len()
            && sums.len() >= rows.len().next_multiple_of(ROW_GROUP) * n_blocks,
        "outputs fit"
    );
    #[cfg(target_arch = "x86_64")]
    if cpu.tier() >= Tier::Avx2 {
        // SAFETY: a `Cpu` exists only for tiers that the machine has; lengths are asserted.
        unsafe { super::x86::sign_scores(planes, x, tables, rows, scores, sums) };
        return;
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    for (n, (row, score)) in rows.zip(scores).enumerate() {
        let (group, lane) = (n / ROW_GROUP, n % ROW_GROUP);
        let mut acc = 0.0f32;
        for b in 0..n_blocks {
            let (scale, bits) = planes.top_of(row, b);
            let signed = |k: usize| {
                let x = i32::from(x.q[b * BLOCK + k]);
                if bits >> k & 1 == 1 { x } else { -x }
            };
            let sum: i32 = (0..BLOCK).map(signed).sum();
            let scale = f16::from_le_bytes(scale).to_f32();
            acc = (sum as f32).mul_add(scale * x.scales[b], acc);
            sums[(group * n_blocks + b) * ROW_GROUP + lane] = sum as i16;
        }
        *score = acc;
    }
}

/// Writes the exact gates of neurons `ids` to `out` (overwritten): the bits of a product of the
/// `Q4_0` row with 8-bit activations. `sums` are [`sign_scores`]' of rows from `first_row` on, which
/// is a multiple of 16.
///
/// # Panics
/// When lengths do not fit, or an id has no row or sums.
pub fn plane_gates(
    cpu: Cpu,
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    first_row: usize,
    sums: &[i16],
    ids: &[u32],
    out: &mut [f32],
) {
    let n_blocks = planes.shape.n_blocks();
    assert!(
        first_row.is_multiple_of(ROW_GROUP) && ids.len() == out.len(),
        "one output per id"
    );
    assert!(
        x.q.len() >= planes.shape.n_cols && x.block_sums.len() >= n_blocks,
        "activations of 8 bits"
    );
    for (&id, out) in ids.iter().zip(out) {
        let row = id as usize;
        assert!((first_row..planes.shape.n_rows).contains(&row), "row {row}");
        let of_row =
            &sums[(row - first_row) / ROW_GROUP * n_blocks * ROW_GROUP..][..n_blocks * ROW_GROUP];
        #[cfg(target_arch = "x86_64")]
        if cpu.tier() >= Tier::Avx2 {
            // SAFETY: as above; the row and its sums are whole.
            *out = unsafe { super::x86::plane_gate(planes, x, row, of_row) };
            continue;
        }
        debug_assert_eq!(cpu.tier(), Tier::Scalar);
        let (low, high) = planes.rest_row(row);
        let mut acc = 0.0f32;
        for b in 0..n_blocks {
            let (scale, _) = planes.top_of(row, b);
            let rest = |k: usize| {
                let two = low[b * LOW_BYTES + k % 8] >> (2 * (k / 8)) & 3;
                let third = high[b * HIGH_BYTES + k / 8] >> (k % 8) & 1;
                i32::from(two | third << 2)
            };
            let total: i32 = (0..BLOCK)
                .map(|k| rest(k) * i32::from(x.q[b * BLOCK + k]))
                .sum();
            let sum = i32::from(of_row[b * ROW_GROUP + row % ROW_GROUP]);
            let total = total + 4 * sum - 4 * x.block_sums[b];
            let scale = f16::from_le_bytes(scale).to_f32();
            acc = (total as f32).mul_add(scale * x.scales[b], acc);
        }
        *out = acc;
    }
}
