//! The hash by which a sidecar knows its model.

use xxhash_rust::xxh3::Xxh3;

use crate::gguf::GgufFile;

/// Bytes that are read of each tensor.
const TENSOR_BYTES: usize = 64 << 10;
/// Pieces in which they are read, evenly over the tensor.
const PIECES: usize = 16;

/// The hash of a model, as 32 hexadecimal digits: of its metadata, its tensor table, and 64 KiB of each tensor, so that
/// a large file is not read through.
pub fn model_hash(model: &GgufFile) -> String {
    let mut hash = Xxh3::new();
    for (key, value_type, encoded) in model.metadata().encoded() {
        update(&mut hash, key.as_bytes());
        update(&mut hash, &value_type.id().to_le_bytes());
        update(&mut hash, &encoded);
    }
    for tensor in model.tensors() {
        update(&mut hash, tensor.name().as_bytes());
        update(&mut hash, &tensor.ggml_type().id().to_le_bytes());
        for dimension in tensor.shape() {
            update(&mut hash, &dimension.to_le_bytes());
        }
        let data = model.tensor_data(tensor);
        if data.len() <= TENSOR_BYTES {
            update(&mut hash, &data);
            continue;
        }
        let piece = TENSOR_BYTES / PIECES;
        for n in 0..PIECES {
            // the last one ends with the tensor
            let start = (data.len() - piece) / (PIECES - 1) * n;
            let start = if n + 1 == PIECES {
                data.len() - piece
            } else {
                start
            };
            update(&mut hash, &data[start..start + piece]);
        }
    }
    format!("{:032x}", hash.digest128())
}

/// Adds a part with its length, so that parts cannot run into one another.
fn update(hash: &mut Xxh3, bytes: &[u8]) {
    hash.update(&(bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}
