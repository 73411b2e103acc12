//! Gates of 4 bits as two planes: the signs of all rows, and the rest row by row.
//!
//! The signs are a sketch of the gates: a weight is taken as plus or minus one, and what a row's
//! weights have in length is its bias's matter. They are read for all neurons. The next bit, which
//! lies apart in a row of the rest, makes a closer sketch of those that the signs named: a weight is
//! one of ±1, ±3. The two other bits and the scales are read only of candidates, whose exact gates
//! come out of all. Together they take the bytes of the gates alone.
//!
//! Values q of `Q4_0` stand for (q − 8) · scale. Of a block whose scale is negative, the planes hold
//! 15 − q, which stands for (15 − q − 7) · |scale|: so the top bit is the weight's sign everywhere.
//!
//! ```text
//! top   16 rows together, run after run:      32 signs of each block (u32, column 0 lowest), row after row
//! rest  row after row:                        bits 0, 1 of all blocks (8 bytes each), bits 2 (4 bytes each),
//!                                             scales (f16, with their signs)
//! ```
//!
//! A run of the top plane has the signs of 4 blocks of a row side by side, so that those of a candidate are fetched in
//! few cache lines; of a row's last blocks two are a run, and one.
//!
//! In a byte of bits 0 and 1, byte j of a block holds columns j, 8+j, 16+j and 24+j, lowest first.
//! Bits 2 lie in units of 8 blocks (the last may have fewer): columns 0 … 7 of each block, then
//! columns 8 … 15, and so on, so that 64 of them meet 64 values of bits 0 and 1.

use std::ops::Range;

use half::f16;

use super::super::NeuronRows;
use super::input::SketchInput;
use crate::activations::ActRef;
use crate::cpu::{Cpu, Tier};
use crate::matrix::{Layout, MatrixRef, MatrixShape, ROW_GROUP};
use crate::quant::{BLOCK, QuantType};

/// Bytes of a block of 16 rows in the top plane.
pub(super) const TOP_BYTES: usize = ROW_GROUP * SIGN_BYTES;
/// Bytes of one row's signs in it.
pub(super) const SIGN_BYTES: usize = BLOCK / 8;
/// Blocks of a row whose signs lie side by side.
pub(super) const RUN: usize = 4;
/// Bytes of a block in a row of the rest: two bits a value, one, and the scale.
pub(super) const LOW_BYTES: usize = BLOCK / 4;
pub(super) const HIGH_BYTES: usize = BLOCK / 8;
pub(super) const SCALE_BYTES: usize = 2;
/// Blocks whose bits 2 lie together.
pub(super) const UNIT: usize = 8;
/// Rows are asked for so many rows before they are read.
pub(super) const AHEAD: usize = 16;

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

    /// Bytes of a row's signs in the top plane, where they lie apart.
    pub const fn sign_row_bytes(&self) -> usize {
        self.n_blocks() * SIGN_BYTES
    }

    /// Bytes of a row's bits 2, which lie together.
    pub const fn high_row_bytes(&self) -> usize {
        self.n_blocks() * HIGH_BYTES
    }

    /// Where the signs of block `block` of row `row` lie in the top plane.
    #[inline]
    pub(super) const fn signs_at(&self, row: usize, block: usize) -> usize {
        let (first, width) = run_of(block, self.n_blocks());
        let run = (row / ROW_GROUP * self.n_blocks() + first) * TOP_BYTES;
        run + (row % ROW_GROUP * width + block - first) * SIGN_BYTES
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
            let rest = &mut rest[r * self.rest_row_bytes()..][..self.rest_row_bytes()];
            let (low, rest) = rest.split_at_mut(n_blocks * LOW_BYTES);
            let (high, scales) = rest.split_at_mut(n_blocks * HIGH_BYTES);
            for (b, block) in row.chunks_exact(QuantType::Q4_0.block_bytes()).enumerate() {
                let flip = if block[1] >> 7 == 1 { 15 } else { 0 };
                scales[b * SCALE_BYTES..][..SCALE_BYTES].copy_from_slice(&block[..SCALE_BYTES]);
                let (mut signs, mut bits) = (0u32, 0u32);
                let low = &mut low[b * LOW_BYTES..][..LOW_BYTES];
                low.fill(0);
                for k in 0..BLOCK {
                    let q = nibble(&block[SCALE_BYTES..], k) ^ flip;
                    signs |= u32::from(q >> 3) << k;
                    bits |= u32::from(q >> 2 & 1) << k;
                    low[k % 8] |= (q & 3) << (2 * (k / 8));
                }
                for (j, byte) in bits.to_le_bytes().into_iter().enumerate() {
                    high[high_at(b, j, n_blocks)] = byte;
                }
                let top = &mut top[self.signs_at(r, b)..][..SIGN_BYTES];
                top.copy_from_slice(&signs.to_le_bytes());
            }
        }
    }
}

/// The run that block `block` is in: its first block, and how many it has.
#[inline]
pub(super) const fn run_of(block: usize, n_blocks: usize) -> (usize, usize) {
    let whole = n_blocks / RUN * RUN;
    if block < whole {
        (block / RUN * RUN, RUN)
    } else if n_blocks - whole >= 2 && block < whole + 2 {
        (whole, 2)
    } else {
        (n_blocks - 1, 1)
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

impl RestRow<'_> {
    /// Bits 2 of a block.
    pub fn high_of(&self, block: usize) -> u32 {
        let n_blocks = self.high.len() / HIGH_BYTES;
        let byte = |j| self.high[high_at(block, j, n_blocks)];
        u32::from_le_bytes(std::array::from_fn(byte))
    }
}

/// A block's 32 values.
struct GateBlock {
    signs: u32,
    high: u32,
    low: [u8; LOW_BYTES],
    scale: [u8; SCALE_BYTES],
}

/// By byte: its bits, one a byte.
const SPREAD: [u64; 256] = {
    let mut all = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut bit = 0;
        while bit < 8 {
            all[byte] |= (byte as u64 >> bit & 1) << (8 * bit);
            bit += 1;
        }
        byte += 1;
    }
    all
};

/// The same byte, eight times.
const fn eight_times(byte: u8) -> u64 {
    byte as u64 * 0x0101_0101_0101_0101
}

/// Values 8·j … 8·j+7 of a block, a byte each.
type Words = [u64; 4];

impl GateBlock {
    /// Whether the scale is below zero.
    fn is_negative(&self) -> bool {
        self.scale[1] >> 7 == 1
    }

    /// Value k as the planes have it, 0 to 15; 8 has no sign's share, or 7 where the scale is negative.
    fn value(&self, k: usize) -> u8 {
        let two = self.low[k % 8] >> (2 * (k / 8)) & 3;
        let (sign, high) = (self.signs >> k & 1, self.high >> k & 1);
        (sign << 3 | high << 2) as u8 | two
    }

    /// A bit of each value.
    fn spread(bits: u32) -> Words {
        bits.to_le_bytes().map(|byte| SPREAD[usize::from(byte)])
    }

    /// Each [`Self::value`].
    fn values(&self) -> Words {
        let (signs, high) = (Self::spread(self.signs), Self::spread(self.high));
        let low = u64::from_le_bytes(self.low);
        std::array::from_fn(|j| signs[j] << 3 | high[j] << 2 | low >> (2 * j) & eight_times(3))
    }

    /// The values as in the file.
    fn file_values(&self) -> Words {
        let flip = if self.is_negative() {
            eight_times(15)
        } else {
            0
        };
        self.values().map(|values| values ^ flip)
    }

    /// The first bits alone, as values that are odd around 8.
    fn sketch_values(&self, bits: SketchBits) -> Words {
        let (signs, high) = (Self::spread(self.signs), Self::spread(self.high));
        match bits {
            SketchBits::One => signs.map(|signs| eight_times(7) + (signs << 1)),
            SketchBits::Two => {
                std::array::from_fn(|j| eight_times(5) + (signs[j] << 2) + (high[j] << 1))
            }
        }
    }
}

/// Writes a block of `Q4_0` in file order to `out`.
fn write_block(scale: [u8; SCALE_BYTES], values: Words, out: &mut [u8]) {
    let (to_scale, to_values) = out.split_at_mut(SCALE_BYTES);
    to_scale.copy_from_slice(&scale);
    let (first, second) = to_values.split_at_mut(8);
    first.copy_from_slice(&(values[0] | values[2] << 4).to_le_bytes());
    second.copy_from_slice(&(values[1] | values[3] << 4).to_le_bytes());
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

    /// A block of row `row`.
    fn block(&self, row: usize, block: usize) -> GateBlock {
        let signs = &self.top[self.shape.signs_at(row, block)..];
        let rest = self.rest_row(row);
        let at = block * SCALE_BYTES;
        GateBlock {
            signs: u32::from_le_bytes(std::array::from_fn(|j| signs[j])),
            high: rest.high_of(block),
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

    /// Pulls the signs of some blocks, from a multiple of four on, of row `row` towards the first cache. Where the layer was
    /// scored they have been read before, but those of large layers have left the second cache since.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    pub(super) fn prefetch_signs(&self, row: usize, blocks: Range<usize>) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let mut block = blocks.start;
        while block < blocks.end {
            let at = self.shape.signs_at(row, block);
            // SAFETY: a hint, for any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(self.top.as_ptr().wrapping_add(at).cast()) };
            block += run_of(block, self.shape.n_blocks()).1;
        }
    }

    /// Pulls row `row` towards the first caches.
    #[inline]
    pub fn prefetch(&self, row: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            self.prefetch_signs(row, 0..self.shape.n_blocks());
            let bytes = self.shape.rest_row_bytes();
            let rest = &self.rest[row * bytes..][..bytes];
            crate::dot::prefetch_bytes(rest.as_ptr(), bytes);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = row;
    }

    /// Pulls bits 2 of row `row` towards the caches.
    #[inline]
    pub(super) fn prefetch_high(&self, row: usize) {
        #[cfg(target_arch = "x86_64")]
        {
            let high = self.rest_row(row).high;
            crate::dot::prefetch_bytes(high.as_ptr(), high.len());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = row;
    }

    /// Writes a sketch of row `row` as `Q4_0` blocks in file order to `out` (overwritten): for one bit,
    /// values of plus and minus one, for two also of three. Its product with [`SketchInput::values`] is
    /// [`sign_sums`]' or [`two_bit_sums`]'.
    ///
    /// # Panics
    /// As [`Self::file_row`].
    pub fn sketch_row(&self, row: usize, bits: SketchBits, out: &mut [u8]) {
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
            let values = self.block(row, b).sketch_values(bits);
            write_block(f16::ONE.to_le_bytes(), values, block);
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

    /// Puts `rows` of one group of 16 together as a matrix of `Q4_0` whose rows are interleaved, in `image`, with room for 16 rows:
    /// as they are in the file. `file` has room for as many rows in file order.
    ///
    /// # Panics
    /// When the rows are not all there, or not of one group, or a buffer is too short.
    pub fn group<'m>(
        &self,
        cpu: Cpu,
        rows: Range<usize>,
        file: &mut [u8],
        image: &'m mut [u8],
    ) -> MatrixRef<'m> {
        let shape = MatrixShape {
            quant: QuantType::Q4_0,
            n_rows: rows.len(),
            n_cols: self.shape.n_cols,
            layout: Layout::Interleaved,
        };
        assert!(
            rows.start.is_multiple_of(ROW_GROUP)
                && rows.len() <= ROW_GROUP
                && rows.end <= self.shape.n_rows,
            "rows {rows:?} of {:?}",
            self.shape
        );
        let image = &mut image[..shape.packed_bytes()];
        #[cfg(target_arch = "x86_64")]
        if cpu.tier() >= Tier::Avx512Vnni {
            check_lengths(self);
            // SAFETY: the machine has the tier; the rows and the room are there, as asserted.
            unsafe { super::avx512::group(*self, rows, image.as_mut_ptr()) };
            return MatrixRef::new(shape, image);
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = cpu;
        let row_bytes = QuantType::Q4_0.row_bytes(shape.n_cols);
        let file = &mut file[..rows.len() * row_bytes];
        for (row, file) in rows.zip(file.chunks_exact_mut(row_bytes)) {
            self.file_row(row, file);
        }
        shape.pack(file, 0, image);
        MatrixRef::new(shape, image)
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
            write_block(gate.scale, gate.file_values(), block);
        }
    }
}

/// Whether sums over so many columns are exact in f32, as scores are.
pub const fn sums_are_exact(n_cols: usize) -> bool {
    // at most three times 127 a column
    n_cols * 3 * 127 < 1 << 24
}

/// Bits of a weight that a sketch looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SketchBits {
    /// The sign.
    One,
    /// And the next.
    Two,
}

/// # Panics
/// When activations have no 8-bit blocks for all columns, or a plane is too short.
fn check(planes: &GatePlanes<'_>, x: ActRef<'_>) {
    let (shape, n_blocks) = (planes.shape, planes.shape.n_blocks());
    assert!(
        x.q.len() >= shape.n_cols && x.scales.len() >= n_blocks && x.block_sums.len() >= n_blocks,
        "activations of 8 bits"
    );
    check_lengths(planes);
}

/// # Panics
/// When a plane is too short.
fn check_lengths(planes: &GatePlanes<'_>) {
    let shape = planes.shape;
    assert!(
        planes.top.len() >= shape.top_bytes() && planes.rest.len() >= shape.rest_bytes(),
        "planes of {shape:?}"
    );
}

/// Writes Σ ±x of rows `rows` to `sums` (`[rows.len()]`, overwritten), plus where the weight is positive; `x` is
/// `[n_cols]`.
///
/// # Panics
/// When `rows` starts inside a group of 16 or ends outside, or lengths do not fit.
pub fn sign_sums(
    cpu: Cpu,
    planes: GatePlanes<'_>,
    x: &SketchInput,
    rows: Range<usize>,
    sums: &mut [i32],
) {
    assert!(
        rows.start.is_multiple_of(ROW_GROUP) && rows.end <= planes.shape.n_rows,
        "rows {rows:?} of {:?}",
        planes.shape
    );
    assert!(
        sums.len() == rows.len() && x.values().len() == planes.shape.n_cols,
        "inputs and outputs fit"
    );
    check_lengths(&planes);
    #[cfg(target_arch = "x86_64")]
    match cpu.tier() {
        Tier::Avx512Vnni | Tier::Avx512Amx => {
            // SAFETY: a `Cpu` exists only for tiers that the machine has; lengths are asserted.
            return unsafe { super::avx512::sign_sums(planes, x, rows, sums) };
        }
        Tier::Avx2 | Tier::Avx512 => {
            // SAFETY: as above.
            return unsafe { super::x86::sign_sums(planes, x, rows, sums) };
        }
        Tier::Scalar => {}
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    for (row, sum) in rows.zip(sums) {
        *sum = sign_sum_scalar(&planes, row, x);
    }
}

/// The same of rows `ids` alone, to `out` (`[ids.len()]`, overwritten), with the same sums.
///
/// # Panics
/// When lengths do not fit, or an id has no row.
pub fn sign_sums_of(
    cpu: Cpu,
    planes: GatePlanes<'_>,
    x: &SketchInput,
    ids: &[u32],
    out: &mut [i32],
) {
    assert!(
        ids.len() == out.len() && x.values().len() == planes.shape.n_cols,
        "inputs and outputs fit"
    );
    let all_there = ids.iter().all(|&id| (id as usize) < planes.shape.n_rows);
    assert!(all_there, "rows of {:?}", planes.shape);
    check_lengths(&planes);
    #[cfg(target_arch = "x86_64")]
    match cpu.tier() {
        Tier::Avx512Vnni | Tier::Avx512Amx => {
            // SAFETY: a `Cpu` exists only for tiers that the machine has; all rows are there.
            return unsafe { super::avx512::sign_sums_of(planes, x, ids, out) };
        }
        Tier::Avx2 | Tier::Avx512 => {
            // SAFETY: as above.
            return unsafe { super::x86::sign_sums_of(planes, x, ids, out) };
        }
        Tier::Scalar => {}
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    for (&id, sum) in ids.iter().zip(out) {
        *sum = sign_sum_scalar(&planes, id as usize, x);
    }
}

/// Writes Σ w·x of rows `ids` to `out` (`[ids.len()]`, overwritten), with w = ±1, ±3 by two bits. `sums` are
/// [`sign_sums`]' of rows from `first_row` on.
///
/// # Panics
/// When lengths do not fit, or an id has no row or sum.
pub fn two_bit_sums(
    cpu: Cpu,
    planes: GatePlanes<'_>,
    x: &SketchInput,
    first_row: usize,
    sums: &[i32],
    ids: &[u32],
    out: &mut [i32],
) {
    assert!(
        ids.len() == out.len() && x.values().len() == planes.shape.n_cols,
        "inputs and outputs fit"
    );
    check_lengths(&planes);
    let with_sums = first_row..(first_row + sums.len()).min(planes.shape.n_rows);
    let all_there = ids.iter().all(|&id| with_sums.contains(&(id as usize)));
    assert!(all_there, "rows and sums {with_sums:?}");
    #[cfg(target_arch = "x86_64")]
    {
        let products = match cpu.tier() {
            Tier::Avx512Vnni | Tier::Avx512Amx => super::avx512::high_sums,
            Tier::Avx2 | Tier::Avx512 => super::x86::high_sums,
            Tier::Scalar => return two_bit_sums_scalar(&planes, x, ids, out),
        };
        // SAFETY: a `Cpu` exists only for tiers that the machine has; all rows are there.
        unsafe { products(planes, x, ids, out) };
        for (out, &id) in out.iter_mut().zip(ids) {
            // 2·(±1) + (±1), of which the second are those set less those not
            *out = 2 * (sums[id as usize - first_row] + *out) - x.sum();
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    two_bit_sums_scalar(&planes, x, ids, out);
}

fn sign_sum_scalar(planes: &GatePlanes<'_>, row: usize, x: &SketchInput) -> i32 {
    weighted_sum(planes, row, x, |gate, k| {
        2 * i32::from(gate.value(k) >> 3) - 1
    })
}

fn two_bit_sums_scalar(planes: &GatePlanes<'_>, x: &SketchInput, ids: &[u32], out: &mut [i32]) {
    for (&id, out) in ids.iter().zip(out) {
        *out = weighted_sum(planes, id as usize, x, |gate, k| {
            2 * i32::from(gate.value(k) >> 2) - 3
        });
    }
}

/// Σ over a row of a weight's sketch and x.
fn weighted_sum(
    planes: &GatePlanes<'_>,
    row: usize,
    x: &SketchInput,
    weight: impl Fn(&GateBlock, usize) -> i32,
) -> i32 {
    let blocks = x.values().chunks_exact(BLOCK).enumerate();
    blocks
        .map(|(b, x)| {
            let gate = planes.block(row, b);
            let products = x.iter().enumerate();
            products
                .map(|(k, &x)| weight(&gate, k) * i32::from(x))
                .sum::<i32>()
        })
        .sum()
}

/// Writes the exact gates of neurons `ids` to `out` (overwritten): the bits of a product of the
/// `Q4_0` row with 8-bit activations.
///
/// # Panics
/// When lengths do not fit, or an id has no row.
pub fn plane_gates(cpu: Cpu, planes: GatePlanes<'_>, x: ActRef<'_>, ids: &[u32], out: &mut [f32]) {
    assert_eq!(ids.len(), out.len(), "one output per id");
    check(&planes, x);
    let n_rows = planes.shape.n_rows;
    assert!(
        ids.iter().all(|&id| (id as usize) < n_rows),
        "rows of {n_rows}"
    );
    #[cfg(target_arch = "x86_64")]
    match cpu.tier() {
        Tier::Avx512Vnni | Tier::Avx512Amx => {
            // SAFETY: as in `sign_sums`; all rows are there.
            return unsafe { super::avx512::gates(planes, x, ids, out) };
        }
        Tier::Avx2 | Tier::Avx512 => {
            for &id in &ids[..ids.len().min(AHEAD)] {
                planes.prefetch(id as usize);
            }
            for (n, (&id, out)) in ids.iter().zip(out).enumerate() {
                if let Some(&later) = ids.get(n + AHEAD) {
                    planes.prefetch(later as usize);
                }
                // SAFETY: as above.
                *out = unsafe { super::x86::plane_gate(planes, x, id as usize) };
            }
            return;
        }
        Tier::Scalar => {}
    }
    debug_assert_eq!(cpu.tier(), Tier::Scalar);
    for (&id, out) in ids.iter().zip(out) {
        let mut acc = 0.0f32;
        for b in 0..planes.shape.n_blocks() {
            let gate = planes.block(id as usize, b);
            let total: i32 = (0..BLOCK)
                .map(|k| i32::from(gate.value(k)) * i32::from(x.q[b * BLOCK + k]))
                .sum();
            let offset = if gate.is_negative() { 7 } else { 8 };
            let scale = f16::from_le_bytes(gate.scale).to_f32().abs();
            let total = total - offset * x.block_sums[b];
            acc = (total as f32).mul_add(scale * x.scales[b], acc);
        }
        *out = acc;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn words_have_each_value() {
        let mut random = Random(17);
        for n in 0..200 {
            let block = GateBlock {
                signs: random.next() as u32,
                high: random.next() as u32,
                low: random.next().to_le_bytes(),
                scale: [0, if n % 2 == 0 { 0x80 } else { 0 }],
            };
            let bytes = |words: Words| words.map(u64::to_le_bytes).concat();
            let values: Vec<u8> = (0..BLOCK).map(|k| block.value(k)).collect();
            assert_eq!(bytes(block.values()), values);
            let each = |f: &dyn Fn(u8) -> u8| values.iter().map(|v| f(*v)).collect::<Vec<u8>>();
            let flip = if n % 2 == 0 { 15 } else { 0 };
            assert_eq!(bytes(block.file_values()), each(&|value| value ^ flip));
            let one = each(&|value| 7 + 2 * (value >> 3));
            assert_eq!(bytes(block.sketch_values(SketchBits::One)), one);
            let two = each(&|value| 5 + 2 * (value >> 2));
            assert_eq!(bytes(block.sketch_values(SketchBits::Two)), two);
            let mut packed = [0; SCALE_BYTES + BLOCK / 2];
            write_block([1, 2], block.values(), &mut packed);
            let unpacked: Vec<u8> = (0..BLOCK)
                .map(|k| nibble(&packed[SCALE_BYTES..], k))
                .collect();
            assert_eq!(unpacked, values);
        }
    }
}
