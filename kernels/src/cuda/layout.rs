//! Rows of weights as they lie on a device.

use super::buffer::View;
use crate::quant::{Plane, QuantType};

/// Formats that the CUDA kernels run.
pub const SUPPORTED: [QuantType; 10] = [
    QuantType::F32,
    QuantType::F16,
    QuantType::BF16,
    QuantType::Q4_0,
    QuantType::Q4_1,
    QuantType::Q5_0,
    QuantType::Q8_0,
    QuantType::Q4_K,
    QuantType::Q5_K,
    QuantType::Q6_K,
];

/// Whether the CUDA kernels run `quant`; layers of other formats belong on the host.
pub fn is_supported(quant: QuantType) -> bool {
    SUPPORTED.contains(&quant)
}

/// What each plane, and so each row, is padded to: one load.
const ALIGN: usize = 16;

/// Format and size of rows `[n_rows, n_cols]` on a device.
///
/// A row is its format's planes ([`QuantType::planes`]: values first, scales behind), each padded with zeros to 16
/// bytes, so that every load of 16 bytes is aligned. It is [`crate::Layout::Rows`] with that padding, of which
/// there is none where `n_cols` is a multiple of 256 (of 2048 for the formats with blocks of 256).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceRows {
    /// Format of the weights, one of [`SUPPORTED`].
    pub quant: QuantType,
    /// Rows.
    pub n_rows: usize,
    /// Values of a row; a multiple of the format's block.
    pub n_cols: usize,
}

impl DeviceRows {
    /// Bytes of one row: a multiple of 16.
    pub fn row_bytes(&self) -> usize {
        self.planes().map(|(_, bytes)| bytes).sum()
    }

    /// Bytes of all rows, one behind the other.
    pub fn bytes(&self) -> usize {
        self.n_rows * self.row_bytes()
    }

    fn n_blocks(&self) -> usize {
        let block = self.quant.block_values();
        assert!(
            self.n_cols.is_multiple_of(block),
            "row is no whole number of blocks"
        );
        self.n_cols / block
    }

    /// Each plane and its bytes in a row, padding included.
    fn planes(&self) -> impl Iterator<Item = (&'static Plane, usize)> {
        let n_blocks = self.n_blocks();
        let planes = self.quant.planes().iter();
        planes.map(move |plane| (plane, (n_blocks * plane.bytes()).next_multiple_of(ALIGN)))
    }

    /// Writes rows in file order (`file_rows`, whole rows) to `dst`, each `stride_bytes` behind the one before.
    /// Overwrites `row_bytes` of each stride, padding included, and nothing else.
    ///
    /// # Panics
    /// When the lengths do not fit.
    pub fn pack(&self, file_rows: &[u8], stride_bytes: usize, dst: &mut [u8]) {
        let (file_bytes, row_bytes) = (self.quant.row_bytes(self.n_cols), self.row_bytes());
        assert_eq!(file_rows.len() % file_bytes, 0, "whole rows");
        assert!(stride_bytes >= row_bytes, "a row fits into its stride");
        let n_rows = file_rows.len() / file_bytes;
        assert!(
            n_rows == 0 || dst.len() >= (n_rows - 1) * stride_bytes + row_bytes,
            "{n_rows} rows fit"
        );
        let block_bytes = self.quant.block_bytes();
        for (row, dst) in file_rows
            .chunks_exact(file_bytes)
            .zip(dst.chunks_mut(stride_bytes))
        {
            let mut rest = &mut dst[..row_bytes];
            for (plane, bytes) in self.planes() {
                let (out, behind) = rest.split_at_mut(bytes);
                let (fields, padding) = out.split_at_mut(self.n_blocks() * plane.bytes());
                let blocks = row.chunks_exact(block_bytes);
                for (block, field) in blocks.zip(fields.chunks_exact_mut(plane.bytes())) {
                    field.copy_from_slice(&block[plane.offset_bytes..][..plane.bytes()]);
                }
                padding.fill(0);
                rest = behind;
            }
        }
    }
}

/// Packed rows in device memory.
#[derive(Debug, Clone, Copy)]
pub struct RowsView<'a> {
    rows: DeviceRows,
    stride_bytes: usize,
    bytes: View<'a, u8>,
}

impl<'a> RowsView<'a> {
    /// Rows that start `stride_bytes` apart, the first at the start of `bytes`.
    ///
    /// # Panics
    /// When the format is not supported, the start or the stride is no multiple of 16, or `bytes` is too short.
    pub fn new(rows: DeviceRows, stride_bytes: usize, bytes: View<'a, u8>) -> Self {
        assert!(is_supported(rows.quant), "{} runs on CUDA", rows.quant);
        let row_bytes = rows.row_bytes();
        assert!(
            stride_bytes >= row_bytes && stride_bytes.is_multiple_of(ALIGN),
            "stride {stride_bytes} of rows of {row_bytes}"
        );
        assert!(bytes.address().is_multiple_of(ALIGN as u64), "aligned rows");
        assert!(
            rows.n_rows == 0 || bytes.len() >= (rows.n_rows - 1) * stride_bytes + row_bytes,
            "{} bytes for {rows:?}",
            bytes.len()
        );
        Self {
            rows,
            stride_bytes,
            bytes,
        }
    }

    /// Rows that lie one behind the other.
    ///
    /// # Panics
    /// As [`Self::new`].
    pub fn dense(rows: DeviceRows, bytes: View<'a, u8>) -> Self {
        Self::new(rows, rows.row_bytes(), bytes)
    }

    /// Format and size.
    pub fn rows(&self) -> DeviceRows {
        self.rows
    }

    /// From a row to the next.
    pub fn stride_bytes(&self) -> usize {
        self.stride_bytes
    }

    pub(super) fn bytes(&self) -> View<'a, u8> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn planes_start_at_16_bytes_and_hold_the_file_s_fields() {
        for quant in SUPPORTED {
            let block = quant.block_values();
            for n_cols in [block, 3 * block, 8 * block, 18 * block] {
                let n_rows = 5;
                let rows = DeviceRows {
                    quant,
                    n_rows,
                    n_cols,
                };
                let file = Random(3).rows(quant, n_rows, n_cols);
                let stride = rows.row_bytes() + 32;
                let mut packed = vec![0xA5; n_rows * stride];
                rows.pack(&file, stride, &mut packed);
                for (r, row) in file.chunks(quant.row_bytes(n_cols)).enumerate() {
                    let mut at = r * stride;
                    for plane in quant.planes() {
                        assert_eq!(at % 16, 0, "{quant} plane");
                        for block in row.chunks(quant.block_bytes()) {
                            let field = &block[plane.offset_bytes..][..plane.bytes()];
                            assert_eq!(&packed[at..at + plane.bytes()], field, "{quant} row {r}");
                            at += plane.bytes();
                        }
                        while at % 16 != 0 {
                            assert_eq!(packed[at], 0, "{quant} padding");
                            at += 1;
                        }
                    }
                    assert_eq!(at, r * stride + rows.row_bytes(), "{quant} bytes of a row");
                    assert_eq!(
                        packed[at..(r + 1) * stride],
                        [0xA5; 32],
                        "{quant} between rows"
                    );
                }
            }
        }
    }

    #[test]
    fn wide_rows_have_the_bytes_of_the_host_s_layout() {
        use crate::matrix::Layout;
        for (quant, n_cols) in [(QuantType::Q4_0, 512), (QuantType::Q6_K, 2048)] {
            let file = Random(5).rows(quant, 3, n_cols);
            let rows = DeviceRows {
                quant,
                n_rows: 3,
                n_cols,
            };
            let mut packed = vec![0; rows.bytes()];
            rows.pack(&file, rows.row_bytes(), &mut packed);
            assert_eq!(
                packed,
                crate::testing::pack(quant, n_cols, Layout::Rows, &file).1
            );
        }
    }
}
