//! A model's twin in floats: the same values as F32, with `ffn_down` in the plain layout.

use std::path::Path;

use pi_runtime::gguf::{GgmlType, GgufError, GgufFile, GgufWriter};
use pi_runtime::model::quantize::dequantize_row;

/// Writes the twin of `model` to `path`.
pub fn write(model: &Path, path: &Path) -> Result<(), GgufError> {
    let file = GgufFile::open(model)?;
    let mut header = GgufWriter::new();
    header.copy_metadata(file.metadata(), |_| false)?;
    for tensor in file.tensors() {
        let mut shape = tensor.shape().to_vec();
        if tensor.name().contains("ffn_down_t") {
            shape.reverse();
        }
        header.add_tensor(&plain_name(tensor.name()), GgmlType::F32, &shape)?;
    }
    let mut stream = header.create(path)?;
    for tensor in file.tensors() {
        let (quant, n_cols) = (tensor.require_quant()?, tensor.n_cols());
        let mut values = vec![0.0; tensor.n_values()];
        let data = file.tensor_data(tensor);
        let rows = data.chunks_exact(quant.row_bytes(n_cols));
        for (row, values) in rows.zip(values.chunks_exact_mut(n_cols)) {
            dequantize_row(quant, row, values);
        }
        if tensor.name().contains("ffn_down_t") {
            let n_rows = tensor.n_rows();
            values = (0..values.len())
                .map(|at| values[at % n_rows * n_cols + at / n_rows])
                .collect();
        }
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        stream.write(&plain_name(tensor.name()), &bytes)?;
    }
    stream.finish()
}

fn plain_name(name: &str) -> String {
    name.replace("ffn_down_t", "ffn_down")
}
