//! In-layer sketch: the gate's own signs, each weight taken as plus or minus one.

use half::f16;
use pi_kernels::{Cpu, QuantType};

use super::products::Workers;
use super::quantised::QuantisedMatrix;

/// Scores, row-major `[n, n_ff]`, of every row of `x` `[n, n_embd]` by the signs of `gate` `[n_ff, n_embd]`.
///
/// The bits are the kernel's (`pi_kernels::ffn_sparse::sketch`): plus and minus one are `Q8_0` values with the scale
/// one, and the sums are of the same integers in the same order.
///
/// # Panics
/// When `gate` isn't `Q4_0`.
pub fn scores(cpu: Cpu, workers: Workers, gate: &QuantisedMatrix, x: &[f32]) -> Vec<f32> {
    plus_minus_one(gate).products(cpu, workers, x)
}

fn plus_minus_one(gate: &QuantisedMatrix) -> QuantisedMatrix {
    assert_eq!(gate.quant, QuantType::Q4_0, "signs are of Q4_0 gates");
    let blocks = gate.bytes.chunks_exact(QuantType::Q4_0.block_bytes());
    let mut bytes = Vec::with_capacity(blocks.len() * QuantType::Q8_0.block_bytes());
    for block in blocks {
        let (scale, values) = block.split_at(size_of::<f16>());
        bytes.extend_from_slice(&f16::ONE.to_le_bytes());
        let negative = scale[1] >> 7 == 1;
        let signs = |shift: u32| {
            let is_plus = move |byte: &u8| (byte >> shift & 8 != 0) != negative;
            values
                .iter()
                .map(move |byte| if is_plus(byte) { 1i8 } else { -1 })
        };
        bytes.extend(signs(0).chain(signs(4)).map(|sign| sign as u8));
    }
    QuantisedMatrix {
        quant: QuantType::Q8_0,
        bytes,
        ..*gate
    }
}
