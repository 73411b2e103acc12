//! Weight matrices as the kernels read them: the file's bytes, rows possibly interleaved.

use std::marker::PhantomData;
use std::ops::Range;

use crate::quant::{BLOCK_BYTES_MAX, Plane, QuantType, dequantize_block};

/// Rows that are interleaved with one another: one SIMD lane each.
pub const ROW_GROUP: usize = 16;

/// Order of a packed matrix in memory. The bytes are the file's in either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layout {
    /// Groups of 16 rows, unit by unit (4 bytes of values of row 0, of row 1, …): for matrices that
    /// are read whole. The last group is padded with zero rows.
    Interleaved,
    /// Row after row, each with its values first and its scales behind: for rows read one by one.
    Rows,
}

impl Layout {
    /// Rows that are stored together.
    pub const fn rows_together(self) -> usize {
        match self {
            Layout::Interleaved => ROW_GROUP,
            Layout::Rows => 1,
        }
    }
}

/// Format and size of a packed matrix `[n_rows, n_cols]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MatrixShape {
    /// Format of the weights.
    pub quant: QuantType,
    /// Output values of a product.
    pub n_rows: usize,
    /// Input values of a product; a multiple of the format's block.
    pub n_cols: usize,
    /// Order in memory.
    pub layout: Layout,
}

impl MatrixShape {
    /// Bytes of one row.
    pub const fn row_bytes(&self) -> usize {
        self.quant.row_bytes(self.n_cols)
    }

    /// Bytes of the packed matrix, padding rows included.
    pub const fn packed_bytes(&self) -> usize {
        self.n_rows.next_multiple_of(self.layout.rows_together()) * self.row_bytes()
    }

    const fn n_blocks(&self) -> usize {
        self.n_cols / self.quant.block_values()
    }

    /// Copies rows in file order into their places in the packed image `dst`.
    ///
    /// `file_rows` holds whole rows, the first of which becomes row `first_row`; `dst` is the packed
    /// image of rows `first_row..` (so that threads can fill disjoint parts): `first_row` is a
    /// multiple of 16 for [`Layout::Interleaved`], and only the rows' own bytes are written.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn pack(&self, file_rows: &[u8], first_row: usize, dst: &mut [u8]) {
        let (row_bytes, together) = (self.row_bytes(), self.layout.rows_together());
        assert_eq!(file_rows.len() % row_bytes, 0, "whole rows");
        assert_eq!(first_row % together, 0, "first row starts a group");
        let n_rows = file_rows.len() / row_bytes;
        assert!(first_row + n_rows <= self.n_rows, "rows are in the matrix");
        assert!(
            dst.len() >= n_rows.next_multiple_of(together) * row_bytes,
            "image is long enough"
        );
        for (group, rows) in file_rows.chunks(together * row_bytes).enumerate() {
            let image = &mut dst[group * together * row_bytes..][..together * row_bytes];
            self.pack_group(rows, image);
        }
    }

    fn pack_group(&self, rows: &[u8], image: &mut [u8]) {
        if self.quant.block_values() == 1 && self.layout == Layout::Rows {
            // one plane without anything to take apart
            image.copy_from_slice(rows);
            return;
        }
        let together = self.layout.rows_together();
        let mut at = 0;
        for plane in self.quant.planes() {
            let plane_bytes = self.n_blocks() * plane.bytes() * together;
            let out = &mut image[at..at + plane_bytes];
            if rows.len() < together * self.row_bytes() {
                self.pack_edge(rows, plane, out);
            } else if together == 1 {
                plane_units::<1>(self.quant, plane, rows, out);
            } else {
                plane_units::<ROW_GROUP>(self.quant, plane, rows, out);
            }
            at += plane_bytes;
        }
    }

    /// One plane of a last group, whose missing rows' places are left as they are.
    fn pack_edge(&self, rows: &[u8], plane: &Plane, out: &mut [u8]) {
        let (unit, together) = (plane.unit_bytes, self.layout.rows_together());
        for (r, row) in rows.chunks_exact(self.row_bytes()).enumerate() {
            let fields = row
                .chunks_exact(self.quant.block_bytes())
                .flat_map(|block| block[plane.offset_bytes..][..plane.bytes()].chunks_exact(unit));
            let places = out.chunks_exact_mut(unit).skip(r).step_by(together);
            for (unit, place) in fields.zip(places) {
                place.copy_from_slice(unit);
            }
        }
    }
}

/// Copies one plane of `R` rows, unit by unit; the number of units in a block is a constant for the
/// compiler's sake.
fn plane_units<const R: usize>(quant: QuantType, plane: &Plane, rows: &[u8], out: &mut [u8]) {
    let block_bytes = quant.block_bytes();
    let start = plane.offset_bytes;
    match (plane.unit_bytes, plane.units) {
        // floats: eight values are as good as a block, but for the last few
        (4, 1) if block_bytes == 4 => float_units::<4, R>(rows, out),
        (2, 1) if block_bytes == 2 => float_units::<2, R>(rows, out),
        (4, 1) => copy_units::<4, 1, R>(rows, block_bytes, start, out),
        (4, 3) => copy_units::<4, 3, R>(rows, block_bytes, start, out),
        (4, 4) => copy_units::<4, 4, R>(rows, block_bytes, start, out),
        (4, 8) => copy_units::<4, 8, R>(rows, block_bytes, start, out),
        (4, 16) => copy_units::<4, 16, R>(rows, block_bytes, start, out),
        (4, 32) => copy_units::<4, 32, R>(rows, block_bytes, start, out),
        (2, 1) => copy_units::<2, 1, R>(rows, block_bytes, start, out),
        _ => unreachable!("no format has a plane of {plane:?}"),
    }
}

fn float_units<const UNIT: usize, const R: usize>(rows: &[u8], out: &mut [u8]) {
    let row_bytes = rows.len() / R;
    if row_bytes.is_multiple_of(8 * UNIT) {
        copy_units::<UNIT, 8, R>(rows, 8 * UNIT, 0, out);
    } else {
        copy_units::<UNIT, 1, R>(rows, UNIT, 0, out);
    }
}

/// Writes unit u of row r to place `u · R + r`, for `R` rows whose blocks of `block_bytes` have
/// `UNITS` units of `UNIT` bytes from `start` on.
fn copy_units<const UNIT: usize, const UNITS: usize, const R: usize>(
    rows: &[u8],
    block_bytes: usize,
    start: usize,
    out: &mut [u8],
) {
    let row_bytes = rows.len() / R;
    let (places, _) = out.as_chunks_mut::<UNIT>();
    let (places, _) = places.as_chunks_mut::<R>();
    let (blocks, _) = places.as_chunks_mut::<UNITS>();
    for (b, places) in blocks.iter_mut().enumerate() {
        let fields: [&[[u8; UNIT]; UNITS]; R] = std::array::from_fn(|r| {
            let field = &rows[r * row_bytes + b * block_bytes + start..][..UNITS * UNIT];
            field.as_chunks().0.try_into().expect("a field of a block")
        });
        for (u, places) in places.iter_mut().enumerate() {
            for (place, field) in places.iter_mut().zip(fields) {
                *place = field[u];
            }
        }
    }
}

/// A packed matrix.
#[derive(Debug, Clone, Copy)]
pub struct MatrixRef<'a> {
    /// Format and size.
    pub shape: MatrixShape,
    /// `[shape.packed_bytes()]`.
    pub bytes: &'a [u8],
}

impl<'a> MatrixRef<'a> {
    /// # Panics
    /// When `bytes` is shorter than the shape says.
    pub fn new(shape: MatrixShape, bytes: &'a [u8]) -> Self {
        assert!(
            bytes.len() >= shape.packed_bytes(),
            "{} bytes for {shape:?}",
            bytes.len()
        );
        Self { shape, bytes }
    }

    /// The bytes of block `block` of row `row` in file order.
    fn file_block(&self, row: usize, block: usize, out: &mut [u8; BLOCK_BYTES_MAX]) {
        let (shape, together) = (self.shape, self.shape.layout.rows_together());
        let (group, lane) = (row / together, row % together);
        let mut at = group * together * shape.row_bytes();
        for plane in shape.quant.planes() {
            for unit in 0..plane.units {
                let place = ((block * plane.units + unit) * together + lane) * plane.unit_bytes;
                let to = plane.offset_bytes + unit * plane.unit_bytes;
                out[to..to + plane.unit_bytes]
                    .copy_from_slice(&self.bytes[at + place..][..plane.unit_bytes]);
            }
            at += shape.n_blocks() * plane.units * plane.unit_bytes * together;
        }
    }

    /// Calls `visit` with the bytes of every block of a row, in file order.
    pub(crate) fn each_block(&self, row: usize, mut visit: impl FnMut(usize, &[u8])) {
        assert!(
            row < self.shape.n_rows,
            "row {row} of {}",
            self.shape.n_rows
        );
        let mut buffer = [0; BLOCK_BYTES_MAX];
        for block in 0..self.shape.n_blocks() {
            self.file_block(row, block, &mut buffer);
            visit(block, &buffer[..self.shape.quant.block_bytes()]);
        }
    }

    /// Writes the real values of row `row` to `out` (`[n_cols]`, overwritten).
    ///
    /// # Panics
    /// When `row` is not in the matrix or `out` has another length.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.shape.n_cols, "output of a row");
        let values = self.shape.quant.block_values();
        self.each_block(row, |block, bytes| {
            let out = &mut out[block * values..(block + 1) * values];
            dequantize_block(self.shape.quant, bytes, out);
        });
    }
}

/// Output `[n_tokens, n_rows]` f32 of a product whose rows may lie apart by a stride, so that
/// threads can write disjoint columns of one buffer.
#[derive(Debug)]
pub struct StridedOut<'a> {
    start: *mut f32,
    stride: usize,
    n_tokens: usize,
    n_rows: usize,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: it is a set of exclusive slices, which may move to another thread as such.
unsafe impl Send for StridedOut<'_> {}

impl<'a> StridedOut<'a> {
    /// Columns `columns` of `buffer`, which holds `n_tokens` rows of `stride` values.
    ///
    /// # Panics
    /// When the buffer is too short.
    pub fn from_slice(
        buffer: &'a mut [f32],
        stride: usize,
        n_tokens: usize,
        columns: Range<usize>,
    ) -> Self {
        assert!(
            columns.end <= stride && buffer.len() >= n_tokens * stride,
            "output fits"
        );
        let start = buffer.as_mut_ptr().wrapping_add(columns.start);
        // SAFETY: the columns of all rows lie in `buffer`, which is borrowed for 'a.
        unsafe { Self::from_raw(start, stride, n_tokens, columns.len()) }
    }

    /// Rows of `n_rows` values that start at `start`, `start + stride`, ….
    ///
    /// # Safety
    /// For 'a, all `n_tokens` rows are valid for writes, and nobody else touches them.
    pub unsafe fn from_raw(start: *mut f32, stride: usize, n_tokens: usize, n_rows: usize) -> Self {
        Self {
            start,
            stride,
            n_tokens,
            n_rows,
            owner: PhantomData,
        }
    }

    /// Tokens (rows of the buffer).
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Values per token.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// The values of token `token`, `[n_rows]`.
    pub fn row(&mut self, token: usize) -> &mut [f32] {
        assert!(token < self.n_tokens, "token {token} of {}", self.n_tokens);
        // SAFETY: row `token` is valid and exclusive by the constructor's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(token * self.stride), self.n_rows) }
    }

    /// Columns `columns` of the same output, borrowed.
    ///
    /// # Panics
    /// When it has fewer.
    pub fn columns_of(&mut self, columns: Range<usize>) -> StridedOut<'_> {
        self.part(0..self.n_tokens, columns)
    }

    /// The same output without its first `n` tokens and from column `column` on, borrowed.
    pub(crate) fn part(&mut self, tokens: Range<usize>, rows: Range<usize>) -> StridedOut<'_> {
        assert!(
            tokens.end <= self.n_tokens && rows.end <= self.n_rows,
            "part of the output"
        );
        // SAFETY: a part of rows that are valid and exclusive; `self` stays borrowed meanwhile.
        unsafe {
            StridedOut::from_raw(
                self.start.add(tokens.start * self.stride + rows.start),
                self.stride,
                tokens.len(),
                rows.len(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn packed_rows_are_the_file_s_bytes_and_padding_is_left_alone() {
        for quant in QuantType::ALL {
            let block = quant.block_values();
            for n_cols in [block, 3 * block, 8 * block, 21 * block] {
                for (layout, n_rows) in [Layout::Interleaved, Layout::Rows]
                    .into_iter()
                    .flat_map(|layout| [1, 16, 37].map(|n_rows| (layout, n_rows)))
                {
                    let shape = MatrixShape {
                        quant,
                        n_rows,
                        n_cols,
                        layout,
                    };
                    let rows = Random(3).rows(quant, n_rows, n_cols);
                    let mut packed = vec![0xA5; shape.packed_bytes() + 1];
                    shape.pack(&rows, 0, &mut packed);
                    let padding = packed.len() - rows.len();
                    let m = MatrixRef::new(shape, &packed);
                    for (r, row) in rows.chunks(shape.row_bytes()).enumerate() {
                        let mut copy = Vec::new();
                        m.each_block(r, |_, bytes| copy.extend_from_slice(bytes));
                        assert_eq!(copy, row, "{quant} {layout:?} row {r} of {n_rows}");
                    }
                    // a place written has the same byte in both images
                    let mut other = vec![0x5A; packed.len()];
                    shape.pack(&rows, 0, &mut other);
                    let untouched = packed
                        .iter()
                        .zip(&other)
                        .filter(|&(&a, &b)| a == 0xA5 && b == 0x5A)
                        .count();
                    assert_eq!(untouched, padding, "{quant} {layout:?} {n_rows} rows");
                }
            }
        }
    }

    #[test]
    fn parts_of_a_matrix_can_be_packed_alone() {
        let shape = MatrixShape {
            quant: QuantType::Q5_1,
            n_rows: 53,
            n_cols: 96,
            layout: Layout::Interleaved,
        };
        let row_bytes = shape.row_bytes();
        let rows = Random(8).rows(shape.quant, shape.n_rows, shape.n_cols);
        let mut whole = vec![0; shape.packed_bytes()];
        shape.pack(&rows, 0, &mut whole);
        let mut parts = vec![0; shape.packed_bytes()];
        for (first, end) in [(32, 53), (0, 32)] {
            let part = &rows[first * row_bytes..end * row_bytes];
            shape.pack(part, first, &mut parts[first * row_bytes..]);
        }
        assert_eq!(parts, whole);
    }
}
