//! A sidecar whose predictors leave nothing out, so that `predicted` has to give the bits of `exact`.

use std::path::Path;

use half::f16;
use pi_runtime::gguf::{GgmlType, GgufFile};
use pi_runtime::model::Hyperparameters;
use pi_runtime::sidecar::{AHEAD_KIND_KEY, SKETCH_KIND_KEY, sidecar_header};

const RANK: usize = 32;

/// Writes a sidecar for `model`: sketches by signs, of low rank, and none take turns over the layers, and all layers
/// are predicted ahead. `bias` above any score makes all neurons candidates.
pub fn write(path: &Path, model: &GgufFile, bias: f32) {
    let hyper = Hyperparameters::read(model).unwrap();
    let mut header = sidecar_header(model, &hyper).unwrap();
    let kinds: Vec<String> = (0..hyper.n_layer)
        .map(|layer| ["signs", "low_rank", "none"][layer % 3].to_owned())
        .collect();
    header.put(SKETCH_KIND_KEY, kinds.clone()).unwrap();
    header.put(AHEAD_KIND_KEY, "svd").unwrap();
    let mut tensors: Vec<(String, Vec<u8>)> = Vec::new();
    let mut matrix = |name: String, n_rows: usize, n_cols: usize| {
        let shape = [n_cols, n_rows];
        header.add_tensor(&name, GgmlType::F16, &shape).unwrap();
        let value = |i: usize| f16::from_f32((i * 7 % 13) as f32 * 0.01 - 0.06);
        let bytes = (0..n_rows * n_cols).flat_map(|i| value(i).to_le_bytes());
        tensors.push((name, bytes.collect()));
    };
    for (layer, kind) in kinds.iter().enumerate() {
        if kind == "low_rank" {
            matrix(format!("blk.{layer}.sketch_a.weight"), RANK, hyper.n_embd);
            matrix(format!("blk.{layer}.sketch_b.weight"), hyper.n_ff, RANK);
        }
        if layer > 0 {
            matrix(format!("blk.{layer}.ahead_a.weight"), RANK, hyper.n_embd);
            matrix(format!("blk.{layer}.ahead_b.weight"), hyper.n_ff, RANK);
        }
    }
    for layer in 0..hyper.n_layer {
        for name in ["sketch.bias", "ahead_b.bias"] {
            let name = format!("blk.{layer}.{name}");
            header
                .add_tensor(&name, GgmlType::F32, &[hyper.n_ff])
                .unwrap();
            tensors.push((name, bias.to_le_bytes().repeat(hyper.n_ff)));
        }
    }
    let mut file = header.create(path).unwrap();
    for (name, bytes) in tensors {
        file.write(&name, &bytes).unwrap();
    }
    file.finish().unwrap();
}
