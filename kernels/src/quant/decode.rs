//! Scalar decoding of one block: the meaning of every format in one place.

use half::{bf16, f16};

use super::{BLOCK, QuantType};

/// A block of 32 or 256 values taken apart: integers, and scales and minima of its sub-blocks.
///
/// Value k is `scale · q[k] + min` with the scale and minimum of its sub-block.
#[derive(Debug, Clone)]
pub struct DecodedBlock {
    /// Integer values with their offset taken off (`Q4_0`: −8 … 7).
    pub q: [i32; 256],
    /// Values in use: 32 or 256.
    pub len: usize,
    /// Scale of the whole block (`d`).
    pub d: f32,
    /// Integer scale per 16 values; 1 where the format has none.
    pub sub_scales: [i32; 16],
    /// What is added to every value, per 32 values (Q4_1's m, −dmin·m of the K formats).
    pub mins: [f32; 8],
}

impl DecodedBlock {
    fn new(len: usize, d: f32) -> Self {
        Self {
            q: [0; 256],
            len,
            d,
            sub_scales: [1; 16],
            mins: [0.0; 8],
        }
    }

    /// Takes a block of the file apart.
    ///
    /// # Panics
    /// When `quant` is a float type or `block` is not one block long.
    pub fn read(quant: QuantType, block: &[u8]) -> Self {
        assert_eq!(block.len(), quant.block_bytes(), "{quant} block");
        match quant {
            QuantType::Q4_0 => Self::small(half(block, 0), 0.0, &block[2..18], &[0; 4], 8),
            QuantType::Q4_1 => {
                Self::small(half(block, 0), half(block, 2), &block[4..20], &[0; 4], 0)
            }
            QuantType::Q5_0 => Self::small(half(block, 0), 0.0, &block[6..22], &block[2..6], 16),
            QuantType::Q5_1 => Self::small(
                half(block, 0),
                half(block, 2),
                &block[8..24],
                &block[4..8],
                0,
            ),
            QuantType::Q8_0 => {
                let mut out = Self::new(BLOCK, half(block, 0));
                for (q, &byte) in out.q.iter_mut().zip(&block[2..]) {
                    *q = i32::from(byte as i8);
                }
                out
            }
            QuantType::Q4_K => Self::k45(block, &block[16..], None),
            QuantType::Q5_K => Self::k45(block, &block[48..], Some(&block[16..48])),
            QuantType::Q6_K => Self::q6_k(block),
            QuantType::F32 | QuantType::F16 | QuantType::BF16 => {
                panic!("{quant} has no blocks to decode")
            }
        }
    }

    /// 4 bits (and a fifth in `high`): value k in the low nibble of byte k, value k+16 in the high one.
    fn small(d: f32, min: f32, nibbles: &[u8], high: &[u8], offset: i32) -> Self {
        let mut out = Self::new(BLOCK, d);
        out.mins[0] = min;
        let high = u32::from_le_bytes(high.try_into().expect("four bytes of high bits"));
        for k in 0..BLOCK {
            let nibble = (nibbles[k % 16] >> (4 * (k / 16))) & 0xF;
            let fifth = ((high >> k) & 1) << 4;
            out.q[k] = i32::from(nibble) + fifth as i32 - offset;
        }
        out
    }

    /// `Q4_K` and `Q5_K`: chunks of 64 values, 32 in low and 32 in high nibbles.
    fn k45(block: &[u8], nibbles: &[u8], high: Option<&[u8]>) -> Self {
        let mut out = Self::new(256, half(block, 0));
        let dmin = half(block, 2);
        for sub in 0..8 {
            let (scale, min) = scale_min_k4(&block[4..16], sub);
            out.sub_scales[2 * sub] = i32::from(scale);
            out.sub_scales[2 * sub + 1] = i32::from(scale);
            out.mins[sub] = -(dmin * f32::from(min));
            for k in 0..BLOCK {
                let nibble = (nibbles[sub / 2 * 32 + k] >> (4 * (sub % 2))) & 0xF;
                let fifth = high.map_or(0, |high| ((high[k] >> sub) & 1) << 4);
                out.q[sub * BLOCK + k] = i32::from(nibble + fifth);
            }
        }
        out
    }

    /// `Q6_K`: halves of 128 values in four quarters, 4 low bits in `ql`, 2 high bits in `qh`.
    fn q6_k(block: &[u8]) -> Self {
        let mut out = Self::new(256, half(block, 208));
        for (sub, &scale) in block[192..208].iter().enumerate() {
            out.sub_scales[sub] = i32::from(scale as i8);
        }
        for k in 0..256 {
            let (big, quarter, l) = (k / 128, k % 128 / 32, k % 32);
            let low = block[big * 64 + quarter % 2 * 32 + l] >> (4 * (quarter / 2));
            let high = block[128 + big * 32 + l] >> (2 * quarter);
            out.q[k] = i32::from((low & 0xF) | ((high & 3) << 4)) - 32;
        }
        out
    }

    /// The real value of element `k`: what the sparse `down` adds, and what embeddings read.
    pub fn value(&self, k: usize) -> f32 {
        let scale = self.d * self.sub_scales[k / 16] as f32;
        (self.q[k] as f32).mul_add(scale, self.mins[k / BLOCK])
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// The 6-bit scale and minimum of sub-block `sub` out of 12 packed bytes.
pub(crate) fn scale_min_k4(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        (
            (packed[sub + 4] & 0xF) | ((packed[sub - 4] >> 6) << 4),
            (packed[sub + 4] >> 4) | ((packed[sub] >> 6) << 4),
        )
    }
}

/// Writes the real values of one block in file order to `out` (`[block_values]`).
///
/// # Panics
/// When `block` or `out` has not the length of one block.
pub fn dequantize_block(quant: QuantType, block: &[u8], out: &mut [f32]) {
    assert_eq!(out.len(), quant.block_values(), "{quant} values");
    match quant {
        QuantType::F32 => out[0] = f32::from_le_bytes(block.try_into().expect("four bytes")),
        QuantType::F16 => out[0] = half(block, 0),
        QuantType::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
        _ => {
            let decoded = DecodedBlock::read(quant, block);
            for (k, value) in out.iter_mut().enumerate() {
                *value = decoded.value(k);
            }
        }
    }
}
