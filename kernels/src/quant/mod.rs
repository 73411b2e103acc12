//! Block formats of quantised weights, as GGUF files store them.
//!
//! Source: ggml's `ggml-common.h` (block structures) and `ggml-quants.c` (reference dequantisation).

mod decode;

pub use decode::{DecodedBlock, dequantize_block};
pub(crate) use decode::{scale_min_k4, scale_q3_k};

use half::f16;

/// Values that share one scale in the formats of 32, and the length of an activation block.
pub const BLOCK: usize = 32;

/// Bytes of the largest block format (`Q6_K`).
pub const BLOCK_BYTES_MAX: usize = 210;

/// A weight format that the kernels can run.
#[allow(non_camel_case_types)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QuantType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// 4 bits, one scale per 32.
    Q4_0,
    /// 4 bits, scale and minimum per 32.
    Q4_1,
    /// 5 bits, one scale per 32.
    Q5_0,
    /// 5 bits, scale and minimum per 32.
    Q5_1,
    /// 8 bits, one scale per 32.
    Q8_0,
    /// 2 bits, 4-bit scales and minima per 16 in super-blocks of 256.
    Q2_K,
    /// 3 bits, 6-bit scales per 16 in super-blocks of 256.
    Q3_K,
    /// 4 bits, 6-bit scales and minima per 32 in super-blocks of 256.
    Q4_K,
    /// 5 bits, 6-bit scales and minima per 32 in super-blocks of 256.
    Q5_K,
    /// 6 bits, 8-bit scales per 16 in super-blocks of 256.
    Q6_K,
}

/// One field of a block, cut into units that are moved as a whole when rows are interleaved.
///
/// A packed row is its planes one after the other, so that the values of neighbouring blocks lie
/// side by side, and so do their scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    /// Where the field starts in the file's block, in bytes.
    pub offset_bytes: usize,
    /// Unit in bytes: 4 (values) or 2 (half-precision scales).
    pub unit_bytes: usize,
    /// Units per block.
    pub units: usize,
}

impl Plane {
    /// Bytes of the field in a block.
    pub const fn bytes(&self) -> usize {
        self.unit_bytes * self.units
    }
}

const fn plane(offset_bytes: usize, unit_bytes: usize, units: usize) -> Plane {
    Plane {
        offset_bytes,
        unit_bytes,
        units,
    }
}

const _: () = {
    assert!(size_of::<f16>() == 2);
    let mut i = 0;
    while i < QuantType::ALL.len() {
        // every byte of a block is in exactly one plane
        let quant = QuantType::ALL[i];
        let planes = quant.planes();
        let (mut bytes, mut p) = (0, 0);
        while p < planes.len() {
            bytes += planes[p].unit_bytes * planes[p].units;
            p += 1;
        }
        assert!(bytes == quant.block_bytes());
        assert!(bytes <= BLOCK_BYTES_MAX);
        i += 1;
    }
};

impl QuantType {
    /// Every format.
    pub const ALL: [QuantType; 13] = [
        QuantType::F32,
        QuantType::F16,
        QuantType::BF16,
        QuantType::Q4_0,
        QuantType::Q4_1,
        QuantType::Q5_0,
        QuantType::Q5_1,
        QuantType::Q8_0,
        QuantType::Q2_K,
        QuantType::Q3_K,
        QuantType::Q4_K,
        QuantType::Q5_K,
        QuantType::Q6_K,
    ];

    /// Values per block: 1, 32 or 256.
    pub const fn block_values(self) -> usize {
        match self {
            QuantType::F32 | QuantType::F16 | QuantType::BF16 => 1,
            QuantType::Q2_K
            | QuantType::Q3_K
            | QuantType::Q4_K
            | QuantType::Q5_K
            | QuantType::Q6_K => 256,
            _ => BLOCK,
        }
    }

    /// Bytes per block.
    pub const fn block_bytes(self) -> usize {
        match self {
            QuantType::F32 => 4,
            QuantType::F16 | QuantType::BF16 => 2,
            QuantType::Q4_0 => 18,
            QuantType::Q4_1 => 20,
            QuantType::Q5_0 => 22,
            QuantType::Q5_1 => 24,
            QuantType::Q8_0 => 34,
            QuantType::Q2_K => 84,
            QuantType::Q3_K => 110,
            QuantType::Q4_K => 144,
            QuantType::Q5_K => 176,
            QuantType::Q6_K => 210,
        }
    }

    /// Bytes of a row of `n_cols` values; `n_cols` is a multiple of [`Self::block_values`].
    pub const fn row_bytes(self, n_cols: usize) -> usize {
        assert!(
            n_cols.is_multiple_of(self.block_values()),
            "row is no whole number of blocks"
        );
        n_cols / self.block_values() * self.block_bytes()
    }

    /// The fields of a block, in the order in which packed rows hold them (values first).
    pub const fn planes(self) -> &'static [Plane] {
        match self {
            QuantType::F32 => const { &[plane(0, 4, 1)] },
            QuantType::F16 | QuantType::BF16 => const { &[plane(0, 2, 1)] },
            QuantType::Q4_0 => const { &[plane(2, 4, 4), plane(0, 2, 1)] },
            QuantType::Q4_1 => const { &[plane(4, 4, 4), plane(0, 2, 1), plane(2, 2, 1)] },
            QuantType::Q5_0 => const { &[plane(6, 4, 4), plane(2, 4, 1), plane(0, 2, 1)] },
            QuantType::Q5_1 => {
                const {
                    &[
                        plane(8, 4, 4),
                        plane(4, 4, 1),
                        plane(0, 2, 1),
                        plane(2, 2, 1),
                    ]
                }
            }
            QuantType::Q8_0 => const { &[plane(2, 4, 8), plane(0, 2, 1)] },
            QuantType::Q2_K => {
                const {
                    &[
                        plane(16, 4, 16),
                        plane(0, 4, 4),
                        plane(80, 2, 1),
                        plane(82, 2, 1),
                    ]
                }
            }
            QuantType::Q3_K => {
                const {
                    &[
                        plane(32, 4, 16),
                        plane(0, 4, 8),
                        plane(96, 4, 3),
                        plane(108, 2, 1),
                    ]
                }
            }
            QuantType::Q4_K => {
                const {
                    &[
                        plane(16, 4, 32),
                        plane(4, 4, 3),
                        plane(0, 2, 1),
                        plane(2, 2, 1),
                    ]
                }
            }
            QuantType::Q5_K => {
                const {
                    &[
                        plane(48, 4, 32),
                        plane(16, 4, 8),
                        plane(4, 4, 3),
                        plane(0, 2, 1),
                        plane(2, 2, 1),
                    ]
                }
            }
            QuantType::Q6_K => {
                const {
                    &[
                        plane(0, 4, 32),
                        plane(128, 4, 16),
                        plane(192, 4, 4),
                        plane(208, 2, 1),
                    ]
                }
            }
        }
    }

    /// Whether a block of 32 values has two scales, one per 16.
    pub(crate) const fn has_halves(self) -> bool {
        matches!(self, QuantType::Q2_K | QuantType::Q3_K | QuantType::Q6_K)
    }

    /// Whether blocks carry scales; else the values are floats, which always meet f32 activations.
    pub const fn is_quantised(self) -> bool {
        self.block_values() > 1
    }

    /// Name as GGUF tools print it.
    pub const fn name(self) -> &'static str {
        match self {
            QuantType::F32 => "F32",
            QuantType::F16 => "F16",
            QuantType::BF16 => "BF16",
            QuantType::Q4_0 => "Q4_0",
            QuantType::Q4_1 => "Q4_1",
            QuantType::Q5_0 => "Q5_0",
            QuantType::Q5_1 => "Q5_1",
            QuantType::Q8_0 => "Q8_0",
            QuantType::Q2_K => "Q2_K",
            QuantType::Q3_K => "Q3_K",
            QuantType::Q4_K => "Q4_K",
            QuantType::Q5_K => "Q5_K",
            QuantType::Q6_K => "Q6_K",
        }
    }

    /// The number that GGUF files use for the format.
    pub const fn ggml_id(self) -> u32 {
        match self {
            QuantType::F32 => 0,
            QuantType::F16 => 1,
            QuantType::Q4_0 => 2,
            QuantType::Q4_1 => 3,
            QuantType::Q5_0 => 6,
            QuantType::Q5_1 => 7,
            QuantType::Q8_0 => 8,
            QuantType::Q2_K => 10,
            QuantType::Q3_K => 11,
            QuantType::Q4_K => 12,
            QuantType::Q5_K => 13,
            QuantType::Q6_K => 14,
            QuantType::BF16 => 30,
        }
    }

    /// The format with the given GGUF number, if the kernels run it.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|quant| quant.ggml_id() == id)
    }
}

impl std::fmt::Display for QuantType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
