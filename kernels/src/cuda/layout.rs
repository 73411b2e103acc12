//! Rows of weights as they lie on a device.

use super::buffer::View;
use crate::matrix::MatrixShape;
use crate::quant::QuantType;

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
/// A row is planes, values first and scales behind, each padded with zeros to 16 bytes, so that loads of 16 bytes are
/// aligned and neighbouring lanes read neighbouring bytes. Blocks of one or 32 values have the planes of
/// [`QuantType::planes`]: the row is that of [`crate::Layout::Rows`] but for the padding, of which there is none where
/// `n_cols` is a multiple of 256. Blocks of 256 values are put in order anew, as eight sub-blocks of 32:
///
/// | plane | bytes per sub-block |
/// |---|---|
/// | low 4 bits: value j in the low nibble of byte j, value j + 16 in the high one | 16 |
/// | `Q5_K`: fifth bits, of value k in bit k | 4 |
/// | `Q6_K`: for each half, the high bits of its value 4 w + k in bits 2 w and 2 w + 1 of byte k | 2 × 4 |
/// | `Q4_K`, `Q5_K`: scale and minimum, unpacked to a byte each; `Q6_K`: the scales of both halves | 2 |
/// | `Q4_K`, `Q5_K`: d and dmin of the block; `Q6_K`: d | 4 or 2 per block |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceRows {
    /// Format of the weights, one of [`SUPPORTED`].
    pub quant: QuantType,
    /// Rows.
    pub n_rows: usize,
    /// Values of a row; a multiple of the format's block.
    pub n_cols: usize,
}

impl std::convert::From<MatrixShape> for DeviceRows {
    /// The same rows, however they lie on the host.
    fn from(shape: MatrixShape) -> Self {
        Self {
            quant: shape.quant,
            n_rows: shape.n_rows,
            n_cols: shape.n_cols,
        }
    }
}

impl DeviceRows {
    /// Bytes of one row: a multiple of 16.
    pub fn row_bytes(&self) -> usize {
        let n_blocks = self.n_blocks();
        let padded = |field: &Field| (n_blocks * field.bytes).next_multiple_of(ALIGN);
        fields(self.quant).iter().map(padded).sum()
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
        let fields = fields(self.quant);
        for (row, dst) in file_rows
            .chunks_exact(file_bytes)
            .zip(dst.chunks_mut(stride_bytes))
        {
            let mut rest = &mut dst[..row_bytes];
            for field in fields {
                let plane_bytes = self.n_blocks() * field.bytes;
                let (plane, behind) = rest.split_at_mut(plane_bytes.next_multiple_of(ALIGN));
                let (plane, padding) = plane.split_at_mut(plane_bytes);
                (field.write)(row, plane);
                padding.fill(0);
                rest = behind;
            }
        }
    }
}

/// One plane of a format: what a block has in it.
struct Field {
    bytes: usize,
    /// From the blocks of a row in the file's order to the plane, `[n_blocks, bytes]`.
    write: fn(&[u8], &mut [u8]),
}

const fn field(bytes: usize, write: fn(&[u8], &mut [u8])) -> Field {
    Field { bytes, write }
}

/// `BYTES` bytes of each block of `BLOCK`, from `OFFSET` on.
const fn bytes<const BLOCK: usize, const OFFSET: usize, const BYTES: usize>() -> Field {
    field(BYTES, copy_bytes::<BLOCK, OFFSET, BYTES>)
}

/// The planes of a format on a device.
fn fields(quant: QuantType) -> &'static [Field] {
    match quant {
        QuantType::F32 => const { &[field(4, copy)] },
        QuantType::F16 | QuantType::BF16 => const { &[field(2, copy)] },
        QuantType::Q4_0 => const { &[bytes::<18, 2, 16>(), bytes::<18, 0, 2>()] },
        QuantType::Q4_1 => {
            const {
                &[
                    bytes::<20, 4, 16>(),
                    bytes::<20, 0, 2>(),
                    bytes::<20, 2, 2>(),
                ]
            }
        }
        QuantType::Q5_0 => {
            const {
                &[
                    bytes::<22, 6, 16>(),
                    bytes::<22, 2, 4>(),
                    bytes::<22, 0, 2>(),
                ]
            }
        }
        QuantType::Q8_0 => const { &[bytes::<34, 2, 32>(), bytes::<34, 0, 2>()] },
        QuantType::Q4_K => {
            const {
                &[
                    field(128, nibbles_k45::<144, 16>),
                    field(16, scales_k45::<144>),
                    bytes::<144, 0, 4>(),
                ]
            }
        }
        QuantType::Q5_K => {
            const {
                &[
                    field(128, nibbles_k45::<176, 48>),
                    field(32, fifth_bits),
                    field(16, scales_k45::<176>),
                    bytes::<176, 0, 4>(),
                ]
            }
        }
        QuantType::Q6_K => {
            const {
                &[
                    field(128, nibbles_q6),
                    field(64, high_bits_q6),
                    bytes::<210, 192, 16>(),
                    bytes::<210, 208, 2>(),
                ]
            }
        }
        _ => panic!("{quant} does not run on CUDA"),
    }
}

// All sizes are the compiler's: a copy of 16 bytes is two instructions then, and loops over fixed arrays are vectorised.

/// Blocks of a row, and what each has in a plane.
fn blocks<'a, const BLOCK: usize, const BYTES: usize>(
    row: &'a [u8],
    plane: &'a mut [u8],
) -> impl Iterator<Item = (&'a [u8; BLOCK], &'a mut [u8; BYTES])> {
    let (row, plane) = (row.as_chunks().0, plane.as_chunks_mut().0);
    row.iter().zip(plane)
}

/// `N` bytes from the `at`-th on.
fn part<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().expect("a block is longer")
}

fn copy(row: &[u8], plane: &mut [u8]) {
    plane.copy_from_slice(row);
}

fn copy_bytes<const BLOCK: usize, const OFFSET: usize, const BYTES: usize>(
    row: &[u8],
    plane: &mut [u8],
) {
    for (block, out) in blocks::<BLOCK, BYTES>(row, plane) {
        *out = *part(block, OFFSET);
    }
}

/// Of 32 bytes, all low nibbles and all high ones: those of bytes 0 ... 15 become low nibbles, those of the others high ones.
fn apart(bytes: &[u8; 32]) -> [[u8; 16]; 2] {
    const LOW: u64 = 0x0F0F_0F0F_0F0F_0F0F;
    let mut nibbles = [[0; 16]; 2];
    for half in [0, 8] {
        let [first, second] = [half, 16 + half].map(|at| u64::from_le_bytes(*part(bytes, at)));
        let low = (first & LOW) | (second & LOW) << 4;
        let high = ((first >> 4) & LOW) | (second & !LOW);
        nibbles[0][half..half + 8].copy_from_slice(&low.to_le_bytes());
        nibbles[1][half..half + 8].copy_from_slice(&high.to_le_bytes());
    }
    nibbles
}

/// Nibbles of `Q4_K` and `Q5_K`: 32 bytes hold two sub-blocks, one in low nibbles, one in high ones.
fn nibbles_k45<const BLOCK: usize, const OFFSET: usize>(row: &[u8], plane: &mut [u8]) {
    for (block, out) in blocks::<BLOCK, 128>(row, plane) {
        let nibbles: &[u8; 128] = part(block, OFFSET);
        let (nibbles, out) = (nibbles.as_chunks().0, out.as_chunks_mut::<32>().0);
        for (nibbles, out) in nibbles.iter().zip(out) {
            out.copy_from_slice(apart(nibbles).as_flattened());
        }
    }
}

/// Fifth bits of `Q5_K`: bit `s` of byte `k` belongs to value `k` of sub-block `s`.
fn fifth_bits(row: &[u8], plane: &mut [u8]) {
    for (block, out) in blocks::<176, 32>(row, plane) {
        let bits: &[u8; 32] = part(block, 16);
        for (quarter, eight) in bits.as_chunks::<8>().0.iter().enumerate() {
            let by_sub = transposed_bits(u64::from_le_bytes(*eight)).to_le_bytes();
            for (sub, bits) in by_sub.into_iter().enumerate() {
                out[sub * 4 + quarter] = bits;
            }
        }
    }
}

/// Bit `j` of byte `i` becomes bit `i` of byte `j`.
fn transposed_bits(mut bits: u64) -> u64 {
    // single bits, then pairs, then fours change places
    for (by, mask) in [
        (7, 0x00AA_00AA_00AA_00AA),
        (14, 0x0000_CCCC_0000_CCCC),
        (28, 0x0000_0000_F0F0_F0F0),
    ] {
        let differ = (bits ^ (bits >> by)) & mask;
        bits ^= differ ^ (differ << by);
    }
    bits
}

/// Scales and minima of `Q4_K` and `Q5_K`, 6 bits each in the file (`scale_min_k4`), four sub-blocks at a time.
fn scales_k45<const BLOCK: usize>(row: &[u8], plane: &mut [u8]) {
    for (block, out) in blocks::<BLOCK, 16>(row, plane) {
        let [scales, mins, highs] = [4, 8, 12].map(|at| u32::from_le_bytes(*part(block, at)));
        let low_bits = 0x3F3F_3F3F;
        let high_bits = |four: u32| (four >> 2) & 0x3030_3030;
        let scales = [scales & low_bits, (highs & 0x0F0F_0F0F) | high_bits(scales)];
        let mins = [
            mins & low_bits,
            ((highs >> 4) & 0x0F0F_0F0F) | high_bits(mins),
        ];
        for (half, out) in out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let (scales, mins) = (scales[half].to_le_bytes(), mins[half].to_le_bytes());
            for sub in 0..4 {
                out[2 * sub] = scales[sub];
                out[2 * sub + 1] = mins[sub];
            }
        }
    }
}

/// Low bits of `Q6_K`: 64 bytes hold four sub-blocks, two in low nibbles, two in high ones.
fn nibbles_q6(row: &[u8], plane: &mut [u8]) {
    for (block, out) in blocks::<210, 128>(row, plane) {
        let low: &[u8; 128] = part(block, 0);
        let (low, out) = (low.as_chunks::<32>().0, out.as_chunks_mut::<64>().0);
        for (pair, out) in low.as_chunks::<2>().0.iter().zip(out) {
            let [first, second] = pair.each_ref().map(apart);
            let subs = [first[0], second[0], first[1], second[1]];
            out.copy_from_slice(subs.as_flattened());
        }
    }
}

/// High bits of `Q6_K`: bits 2 w and 2 w + 1 of byte `k` are those of value 4 w + k of a half of a sub-block.
fn high_bits_q6(row: &[u8], plane: &mut [u8]) {
    for (block, out) in blocks::<210, 64>(row, plane) {
        for (half, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let (sub, first) = (half / 2, half % 2 * 16);
            let high: &[u8; 16] = part(block, 128 + sub / 4 * 32 + first);
            let four = |w: usize| u32::from_le_bytes(*part(high, 4 * w));
            let bits = |w: usize| ((four(w) >> (sub % 4 * 2)) & 0x0303_0303) << (2 * w);
            *out = (bits(0) | bits(1) | bits(2) | bits(3)).to_le_bytes();
        }
    }
}

/// Values of an item, which a lane takes at a time (`quant.cuh`).
pub(super) fn item_values(quant: QuantType) -> usize {
    match quant {
        QuantType::F32 => 4,
        QuantType::F16 | QuantType::BF16 => 8,
        QuantType::Q8_0 => 16,
        _ => 32,
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
    use half::{bf16, f16};

    use super::*;
    use crate::quant::dequantize_block;
    use crate::testing::Random;

    /// Value `k` of a packed row: the format's meaning, read from the layout's description.
    fn value(rows: &DeviceRows, row: &[u8], k: usize) -> f32 {
        let (quant, n) = (rows.quant, rows.n_cols);
        let pad = |bytes: usize| bytes.next_multiple_of(16);
        let half = |at: usize| f16::from_le_bytes([row[at], row[at + 1]]).to_f32();
        let (block, sub, j) = (k / 256, k / 32, k % 32);
        let nibble = i32::from((row[sub * 16 + j % 16] >> (j / 16 * 4)) & 0xF);
        let values = n / 2;
        match quant {
            QuantType::F32 => f32::from_le_bytes(row[4 * k..4 * k + 4].try_into().unwrap()),
            QuantType::F16 => half(2 * k),
            QuantType::BF16 => bf16::from_le_bytes([row[2 * k], row[2 * k + 1]]).to_f32(),
            QuantType::Q4_0 => half(values + sub * 2) * (nibble - 8) as f32,
            QuantType::Q4_1 => {
                let min = half(values + pad(n / 16) + sub * 2);
                (nibble as f32).mul_add(half(values + sub * 2), min)
            }
            QuantType::Q5_0 => {
                let fifth = i32::from((row[values + sub * 4 + j / 8] >> (j % 8)) & 1) << 4;
                half(values + pad(n / 8) + sub * 2) * (nibble + fifth - 16) as f32
            }
            QuantType::Q8_0 => half(n + sub * 2) * f32::from(row[k] as i8),
            QuantType::Q4_K | QuantType::Q5_K => {
                let (mut subs, mut q) = (values, nibble);
                if quant == QuantType::Q5_K {
                    q += i32::from((row[values + sub * 4 + j / 8] >> (j % 8)) & 1) << 4;
                    subs += n / 8;
                }
                let floats = subs + pad(n / 16) + block * 4;
                let scale = half(floats) * f32::from(row[subs + sub * 2]);
                let min = -half(floats + 2) * f32::from(row[subs + sub * 2 + 1]);
                (q as f32).mul_add(scale, min)
            }
            QuantType::Q6_K => {
                let (part, within) = (j / 16, j % 16);
                let byte = row[values + sub * 8 + part * 4 + within % 4];
                let q = nibble + (i32::from((byte >> (within / 4 * 2)) & 3) << 4) - 32;
                let subs = values + n / 4;
                let scale = f32::from(row[subs + sub * 2 + part] as i8);
                half(subs + pad(n / 16) + block * 2) * scale * q as f32
            }
            _ => unreachable!(),
        }
    }

    #[test]
    fn packed_rows_have_the_file_s_values_and_nothing_between() {
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
                assert_eq!(rows.row_bytes() % 16, 0);
                let mut packed = vec![0xA5; n_rows * stride];
                rows.pack(&file, stride, &mut packed);
                let blocks: Vec<&[u8]> = file.chunks(quant.block_bytes()).collect();
                for (r, row) in packed.chunks(stride).enumerate() {
                    let (row, between) = row.split_at(rows.row_bytes());
                    assert_eq!(between, [0xA5; 32], "{quant}: between rows");
                    for (b, file) in blocks[r * n_cols / block..].iter().enumerate() {
                        if b == n_cols / block {
                            break;
                        }
                        let mut values = vec![0.0; block];
                        dequantize_block(quant, file, &mut values);
                        for (k, want) in values.iter().enumerate() {
                            let got = value(&rows, row, b * block + k);
                            assert_eq!(got, *want, "{quant} row {r} block {b} value {k}");
                        }
                    }
                }
                // padding is zeros whatever was there
                let mut other = vec![0x5A; n_rows * stride];
                rows.pack(&file, stride, &mut other);
                for (a, b) in packed.chunks(stride).zip(other.chunks(stride)) {
                    assert_eq!(a[..rows.row_bytes()], b[..rows.row_bytes()], "{quant}");
                }
            }
        }
    }

    #[test]
    fn wide_rows_have_the_bytes_of_the_host_s_layout() {
        use crate::matrix::Layout;
        for (quant, n_cols) in [(QuantType::Q4_0, 512), (QuantType::Q5_0, 256)] {
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
