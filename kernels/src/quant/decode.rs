//! Scalar decoding of one block: the meaning of every format in one place.

use half::{bf16, f16};

use super::{BLOCK, QuantType};

/// A block of 32 or 256 values taken apart: integers, and scales and minima of its sub-blocks.
///
/// Value k is `d · sub_scale · q[k] + min · sub_min` with the integers of its sub-block.
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
    /// Scale of the minima of the whole block (Q4_1's m, −dmin of the K formats).
    pub min: f32,
    /// Integer minimum per 16 values; 1 where the format has none.
    pub sub_mins: [i32; 16],
}

impl DecodedBlock {
    fn new(len: usize, d: f32) -> Self {
        Self {
            q: [0; 256],
            len,
            d,
            sub_scales: [1; 16],
            min: 0.0,
            sub_mins: [1; 16],
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
            QuantType::Q2_K => Self::q2_k(block),
            QuantType::Q3_K => Self::q3_k(block),
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
        out.min = min;
        let high = u32::from_le_bytes(high.try_into().expect("four bytes of high bits"));
        for k in 0..BLOCK {
            let nibble = (nibbles[k % 16] >> (4 * (k / 16))) & 0xF;
            let fifth = ((high >> k) & 1) << 4;
            out.q[k] = i32::from(nibble) + fifth as i32 - offset;
        }
        out
    }

    /// `Q2_K`: halves of 128 values in four quarters, scale and minimum of 16 in the nibbles of a byte.
    fn q2_k(block: &[u8]) -> Self {
        let mut out = Self::new(256, half(block, 80));
        out.min = -half(block, 82);
        for (sub, &both) in block[..16].iter().enumerate() {
            out.sub_scales[sub] = i32::from(both & 0xF);
            out.sub_mins[sub] = i32::from(both >> 4);
        }
        for k in 0..256 {
            out.q[k] = i32::from(two_bits(&block[16..80], k));
        }
        out
    }

    /// `Q3_K`: as `Q2_K`, with a third bit in `hmask` that takes 4 off where it is clear.
    fn q3_k(block: &[u8]) -> Self {
        let mut out = Self::new(256, half(block, 108));
        for sub in 0..16 {
            out.sub_scales[sub] = scale_q3_k(&block[96..108], sub);
        }
        for k in 0..256 {
            let third = (block[k % 32] >> (k / 32)) & 1;
            out.q[k] = i32::from(two_bits(&block[32..96], k) | (third << 2)) - 4;
        }
        out
    }

    /// `Q4_K` and `Q5_K`: chunks of 64 values, 32 in low and 32 in high nibbles.
    fn k45(block: &[u8], nibbles: &[u8], high: Option<&[u8]>) -> Self {
        let mut out = Self::new(256, half(block, 0));
        out.min = -half(block, 2);
        for sub in 0..8 {
            let (scale, min) = scale_min_k4(&block[4..16], sub);
            for half in [2 * sub, 2 * sub + 1] {
                out.sub_scales[half] = i32::from(scale);
                out.sub_mins[half] = i32::from(min);
            }
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

    /// What is added to each of the 16 values of sub-block `sub`.
    pub fn min_of(&self, sub: usize) -> f32 {
        self.min * self.sub_mins[sub] as f32
    }

    /// The real value of element `k`: what the sparse `down` adds, and what embeddings read.
    pub fn value(&self, k: usize) -> f32 {
        let scale = self.d * self.sub_scales[k / 16] as f32;
        (self.q[k] as f32).mul_add(scale, self.min_of(k / 16))
    }
}

fn half(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Value `k` of the 2-bit values of `Q2_K` and `Q3_K`.
fn two_bits(packed: &[u8], k: usize) -> u8 {
    (packed[k / 128 * 32 + k % 32] >> (2 * (k % 128 / 32))) & 3
}

/// The 6-bit signed scale of the 16 values `sub` out of 12 packed bytes of `Q3_K`.
pub(crate) fn scale_q3_k(packed: &[u8], sub: usize) -> i32 {
    let low = (packed[sub % 8] >> (4 * (sub / 8))) & 0xF;
    let high = (packed[8 + sub % 4] >> (2 * (sub / 4))) & 3;
    i32::from(low | (high << 4)) - 32
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
