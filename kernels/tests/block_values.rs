//! Decoded blocks against those of the Python package gguf.

use std::path::Path;

use pi_kernels::QuantType;
use pi_kernels::quant::dequantize_block;

/// Each file holds four blocks, and their values as f32.
#[test]
fn k_types_have_the_values_of_an_independent_implementation() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/family");
    for quant in QuantType::ALL
        .into_iter()
        .filter(|q| q.block_values() == 256)
    {
        let name = format!("{}.bin", quant.name().to_lowercase());
        let bytes = std::fs::read(folder.join(&name)).unwrap();
        let (blocks, values) = bytes.split_at(4 * quant.block_bytes());
        assert_eq!(values.len(), 4 * 256 * 4, "{name}");
        let (values, _) = values.as_chunks::<4>();
        for (block, expected) in blocks
            .chunks_exact(quant.block_bytes())
            .zip(values.chunks_exact(256))
        {
            let mut found = [f32::NAN; 256];
            dequantize_block(quant, block, &mut found);
            for (k, (found, expected)) in found.iter().zip(expected).enumerate() {
                assert_eq!(*found, f32::from_le_bytes(*expected), "{quant} value {k}");
            }
        }
    }
}
