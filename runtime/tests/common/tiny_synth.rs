//! A synthetic model that is small enough for tests.

use std::path::{Path, PathBuf};

use pi_kernels::QuantType;
use pi_runtime::session::Silent;
use pi_runtime::synth::{SynthOptions, SynthShape, Synthesis};

/// A model of 3 MB with four layers, of whose neurons a tenth is active.
pub fn options() -> SynthOptions {
    SynthOptions {
        name: "tiny".into(),
        shape: SynthShape {
            n_layer: 4,
            n_embd: 256,
            n_ff: 1024,
            n_head: 4,
            n_head_kv: 2,
            n_vocab: 4096,
            n_ctx: 2048,
            rope_base: 1e4,
        },
        quant: QuantType::Q4_0,
        active: 0.10,
        skew: 2.4,
        seed: 1,
    }
}

/// Writes it, with its sidecar, into a folder.
pub fn write(folder: &Path) -> PathBuf {
    let path = folder.join("m.gguf");
    let synthesis = Synthesis::new(&options()).unwrap();
    assert!(synthesis.write(&path, 2, &Silent, &|| false).unwrap());
    path
}
