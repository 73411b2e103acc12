//! Gates of 4 bits as two planes: the signs of all rows, and the rest row by row.
//!
//! The signs are a sketch of the gates: a weight is taken as plus or minus one, and what a row's
//! weights have in length is its bias's matter. They are read for all neurons; the three other bits
//! and the scales only of candidates, whose exact gates come out of both. Together they take the
//! bytes of the gates alone.
//!
//! A value q of `Q4_0` is 8·b + r with the top bit b and r below 8. With s = Σ ±x over a block, the
//! sign that of (2b − 1)·scale, Σ (q − 8)·x = Σ r·x ± 4·s − 4·Σx, plus where the scale is positive:
//! the sketch's sums are the first half of the gate's.
//!
//! ```text
//! top   16 rows together, block after block:  signs 8j … 8j+7 of 16 rows, j = 0 … 3
//! rest  row after row:                        bits 0, 1 of all blocks (8 bytes each), bits 2 (4 bytes each),
//!                                             scales (f16)
//! ```
//!
//! In a byte of bits 0 and 1, byte j of a block holds columns j, 8+j, 16+j and 24+j, lowest first.
//! Bits 2 lie in units of 8 blocks (the last may have fewer): columns 0 … 7 of each block, then
//! columns 8 … 15, and so on, so that 64 of them meet 64 values of bits 0 and 1.

use std::ops::Range;

use half::f16;

use super::super::NeuronRows;
use crate::activations::ActRef;
use crate::cpu::{Cpu, Tier};
use crate::matrix::{Layout, MatrixShape, ROW_GROUP};
use crate::quant::{BLOCK, QuantType};

/// Bytes of a block of 16 rows in the top plane.
pub(super) const TOP_BYTES: usize = ROW_GROUP * BLOCK / 8;
/// Bytes of a block in a row of the rest: two bits a value, one, and the scale.
pub(super) const LOW_BYTES: usize = BLOCK / 4;
pub(super) const HIGH_BYTES: usize = BLOCK / 8;
pub(super) const SCALE_BYTES: usize = 2;
/// Blocks whose bits 2 lie together.
pub(super) const UNIT: usize = 8;
/// Rows of the rest that are taken together, and asked for before.
const TOGETHER: usize = 16;
/// Rows' sums are padded to so many blocks.
const SUMS_TOGETHER: usize = 16;
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
        self.n_blocks() * (LOW_BYTES + HIGH_BYTES + SCALE_BYTES)
    }

    /// Bytes of the rest.
    pub const fn rest_bytes(&self) -> usize {
        self.n_rows * self.rest_row_bytes()
    }

    /// From a row's sums of signs to the next one's, see [`sign_scores`].
    pub const fn sums_stride(&self) -> usize {
        self.n_blocks().next_multiple_of(SUMS_TOGETHER)
    }

    /// Sums of signs of `n_rows` rows, padding rows included.
    pub const fn n_sums(&self, n_rows: usize) -> usize {
        n_rows.next_multiple_of(ROW_GROUP) * self.sums_stride()
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
            let (low, rest) = rest.split_at_mut(n_blocks * LOW_BYTES);
            let (high, scales) = rest.split_at_mut(n_blocks * HIGH_BYTES);
            for (b, block) in row.chunks_exact(QuantType::Q4_0.block_bytes()).enumerate() {
                let top = &mut top[(group * n_blocks + b) * TOP_BYTES..][..TOP_BYTES];
                let negative = u32::from(block[1] >> 7);
                scales[b * SCALE_BYTES..][..SCALE_BYTES].copy_from_slice(&block[..SCALE_BYTES]);
                let (mut signs, mut bits) = (0u32, 0u32);
                let low = &mut low[b * LOW_BYTES..][..LOW_BYTES];
                low.fill(0);
                for k in 0..BLOCK {
                    let q = nibble(&block[SCALE_BYTES..], k);
                    signs |= (u32::from(q >> 3) ^ negative) << k;
                    bits |= u32::from(q >> 2 & 1) << k;
                    low[k % 8] |= (q & 3) << (2 * (k / 8));
                }
                for (j, byte) in bits.to_le_bytes().into_iter().enumerate() {
                    high[high_at(b, j, n_blocks)] = byte;
                }
                for (j, byte) in signs.to_le_bytes().into_iter().enumerate() {
                    top[j * ROW_GROUP + lane] = byte;
                }
            }
        }
    }
}

/// Where bits 2 of columns 8·j … 8·j+7 of block `block` lie.
const fn high_at(block: usize, j: usize, n_blocks: usize) -> usize {
    let first = block / UNIT * UNIT;
    let left = n_blocks - first;
    let width = if left < UNIT { left } else { UNIT };
    first * HIGH_BYTES + j * width + block - first
}

/// Value k of a `Q4_0` block's 16 bytes.
fn nibble(bytes: &[u8], k: usize) -> u8 {
    if k < 16 {
        bytes[k] & 15
    } else {
        bytes[k - 16] >> 4
    }
}

/// A row of the rest: bits 0 and 1, bits 2, and scales.
#[derive(Debug, Clone, Copy)]
pub(super) struct RestRow<'a> {
    pub low: &'a [u8],
    pub high: &'a [u8],
    pub scales: &'a [u8],
}

/// A block's 32 values.
struct GateBlock {
    signs: u32,
    high: u32,
    low: [u8; LOW_BYTES],
    scale: [u8; SCALE_BYTES],
}

impl GateBlock {
    /// Whether the scale is below zero.
    fn is_negative(&self) -> bool {
        self.scale[1] >> 7 == 1
    }

    /// The three bits below the top one.
    fn rest(&self, k: usize) -> u8 {
        ((self.high >> k & 1) << 2) as u8 | self.low[k % 8] >> (2 * (k / 8)) & 3
    }

    /// Value k, 0 to 15.
    fn value(&self, k: usize) -> u8 {
        let top = (self.signs >> k & 1) as u8 ^ u8::from(self.is_negative());
        top << 3 | self.rest(k)
    }
}

/// Writes a block of `Q4_0` in file order to `out`.
fn write_block(scale: [u8; SCALE_BYTES], q: impl Fn(usize) -> u8, out: &mut [u8]) {
    out[..SCALE_BYTES].copy_from_slice(&scale);
    for k in 0..16 {
        out[SCALE_BYTES + k] = q(k) | q(k + 16) << 4;
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

    /// A block of row `row`.
    fn block(&self, row: usize, block: usize) -> GateBlock {
        let (top, lane) = (self.top_block(row, block), row % ROW_GROUP);
        let rest = self.rest_row(row);
        let n_blocks = self.shape.n_blocks();
        let at = block * SCALE_BYTES;
        GateBlock {
            signs: u32::from_le_bytes(std::array::from_fn(|j| top[j * ROW_GROUP + lane])),
            high: u32::from_le_bytes(std::array::from_fn(|j| {
                rest.high[high_at(block, j, n_blocks)]
            })),
            low: std::array::from_fn(|j| rest.low[block * LOW_BYTES + j]),
            scale: [rest.scales[at], rest.scales[at + 1]],
        }
    }

    /// The rest of row `row`.
    pub(super) fn rest_row(&self, row: usize) -> RestRow<'a> {
        let n_blocks = self.shape.n_blocks();
        let bytes = self.shape.rest_row_bytes();
        let (low, rest) = self.rest[row * bytes..][..bytes].split_at(n_blocks * LOW_BYTES);
        let (high, scales) = rest.split_at(n_blocks * HIGH_BYTES);
        RestRow { low, high, scales }
    }

    /// Pulls the rest of row `row` towards the first cache.
    #[inline]
    pub fn prefetch(&self, row: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            let bytes = self.shape.rest_row_bytes();
            let rest = &self.rest[row * bytes..][..bytes];
            crate::dot::prefetch_bytes(rest.as_ptr(), bytes);
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
            let signs = self.block(row, b).signs;
            let q = |k: usize| if signs >> k & 1 == 1 { 9 } else { 7 };
            write_block(f16::ONE.to_le_bytes(), q, block);
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
        for (b, block) in out
            .chunks_exact_mut(QuantType::Q4_0.block_bytes())
            .enumerate()
        {
            let gate = self.block(row, b);
            write_block(gate.scale, |k| gate.value(k), block);
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

/// # Panics
/// When activations have no 8-bit blocks for all columns, or a plane is too short.
fn check(planes: &GatePlanes<'_>, x: ActRef<'_>) {
    let (shape, n_blocks) = (planes.shape, planes.shape.n_blocks());
    assert!(
        x.q.len() >= shape.n_cols && x.scales.len() >= n_blocks && x.block_sums.len() >= n_blocks,
        "activations of 8 bits"
    );
    assert!(
        planes.top.len() >= shape.top_bytes() && planes.rest.len() >= shape.rest_bytes(),
        "planes of {shape:?}"
    );
}

/// Whether the scores use [`fill_tables`]' tables in this tier.
pub fn needs_tables(cpu: Cpu) -> bool {
    (Tier::Avx2..Tier::Avx512Vnni).contains(&cpu.tier())
}

/// Scores rows `rows`: writes Σ over blocks of `x_scale · s` to `scores` (`[rows.len()]` f32,
/// overwritten), one fused multiply-add a block in ascending order, and the integer sums s to `sums`
/// (`[rows.len() to whole groups, shape.sums_stride()]`, overwritten; what is behind a row's blocks
/// is nobody's).
///
/// `x` has 8-bit blocks, and `tables` are [`fill_tables`]' of all of them where the tier
/// [needs](needs_tables) them.
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
    check(&planes, x);
    assert!(
        !needs_tables(cpu) || tables.len() >= planes.shape.table_bytes(),
        "tables fit"
    );
    assert!(
        scores.len() == rows.len() && sums.len() >= planes.shape.n_sums(rows.len()),
        "outputs fit"
    );
    #[cfg(target_arch = "x86_64")]
    match cpu.tier() {
        Tier::Avx512Vnni => {
            // SAFETY: a `Cpu` exists only for tiers that the machine has; lengths are asserted.
            return unsafe { super::avx512::sign_scores(planes, x, rows, scores, sums) };
        }
        Tier::Avx2 | Tier::Avx512 => {
            // SAFETY: as above.
            return unsafe { super::x86::sign_scores(planes, x, tables, rows, scores, sums) };
        }
        Tier::Scalar => {}
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    let stride = planes.shape.sums_stride();
    for ((row, score), sums) in rows.zip(scores).zip(sums.chunks_exact_mut(stride)) {
        let mut acc = 0.0f32;
        for b in 0..n_blocks {
            let signs = planes.block(row, b).signs;
            let signed = |k: usize| {
                let x = i32::from(x.q[b * BLOCK + k]);
                if signs >> k & 1 == 1 { x } else { -x }
            };
            let sum: i32 = (0..BLOCK).map(signed).sum();
            acc = (sum as f32).mul_add(x.scales[b], acc);
            sums[b] = sum as i16;
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
    assert!(
        first_row.is_multiple_of(ROW_GROUP) && ids.len() == out.len(),
        "one output per id"
    );
    check(&planes, x);
    let stride = planes.shape.sums_stride();
    let with_sums = first_row..(first_row + sums.len() / stride).min(planes.shape.n_rows);
    let all_there = ids.iter().all(|&id| with_sums.contains(&(id as usize)));
    assert!(all_there, "rows and sums {with_sums:?}");
    let ask_for = |ids: &[u32]| ids.iter().for_each(|&id| planes.prefetch(id as usize));
    ask_for(&ids[..ids.len().min(TOGETHER)]);
    for first in (0..ids.len()).step_by(TOGETHER) {
        let together = first..(first + TOGETHER).min(ids.len());
        ask_for(&ids[together.end..(together.end + TOGETHER).min(ids.len())]);
        let (ids, out) = (&ids[together.clone()], &mut out[together]);
        gates_together(cpu, planes, x, first_row, sums, ids, out);
    }
}

/// [`plane_gates`] of rows and sums that are known to be there.
fn gates_together(
    cpu: Cpu,
    planes: GatePlanes<'_>,
    x: ActRef<'_>,
    first_row: usize,
    sums: &[i16],
    ids: &[u32],
    out: &mut [f32],
) {
    let (n_blocks, stride) = (planes.shape.n_blocks(), planes.shape.sums_stride());
    #[cfg(target_arch = "x86_64")]
    match cpu.tier() {
        Tier::Avx512Vnni => {
            // SAFETY: as in `sign_scores`; all rows and their sums are there.
            return unsafe { super::avx512::gates(planes, x, first_row, sums, ids, out) };
        }
        Tier::Avx2 | Tier::Avx512 => {
            for (&id, out) in ids.iter().zip(out) {
                let sums = &sums[(id as usize - first_row) * stride..][..stride];
                // SAFETY: as above.
                *out = unsafe { super::x86::plane_gate(planes, x, id as usize, sums) };
            }
            return;
        }
        Tier::Scalar => {}
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    for (&id, out) in ids.iter().zip(out) {
        let row = id as usize;
        let sums = &sums[(row - first_row) * stride..][..n_blocks];
        let mut acc = 0.0f32;
        for (b, sum) in sums.iter().enumerate() {
            let gate = planes.block(row, b);
            let total: i32 = (0..BLOCK)
                .map(|k| i32::from(gate.rest(k)) * i32::from(x.q[b * BLOCK + k]))
                .sum();
            let sum = i32::from(*sum);
            let sum = if gate.is_negative() { -sum } else { sum };
            let total = total + 4 * (sum - x.block_sums[b]);
            let scale = f16::from_le_bytes(gate.scale).to_f32();
            acc = (total as f32).mul_add(scale * x.scales[b], acc);
        }
        *out = acc;
    }
}
