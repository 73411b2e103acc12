//! What is accepted as a model, and what is said of the others.

mod common;

use common::tiny_model::{N_VOCAB, TinyModel};
use pi_kernels::QuantType;
use pi_kernels::rope::{RopePairs, RopeScaling, RopeTable};
use pi_runtime::gguf::{GgufFile, OwnedValue};
use pi_runtime::model::rope::PositionScaling;
use pi_runtime::model::{GateKind, Hyperparameters, ModelError, ModelTensors};

fn opened(model: &TinyModel) -> GgufFile {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    model.write(&path);
    GgufFile::open(&path).unwrap()
}

fn read(model: &TinyModel) -> Result<(Hyperparameters, ModelTensors), ModelError> {
    let file = opened(model);
    let hyper = Hyperparameters::read(&file)?;
    let tensors = ModelTensors::find(&file, &hyper)?;
    Ok((hyper, tensors))
}

#[test]
fn sizes_and_defaults_are_read() {
    let (hyper, tensors) = read(&TinyModel {
        gate: None,
        ..TinyModel::default()
    })
    .unwrap();
    assert_eq!(
        (hyper.n_layer, hyper.n_embd, hyper.n_ff, hyper.n_vocab),
        (2, 64, 512, N_VOCAB)
    );
    assert_eq!((hyper.n_head, hyper.n_head_kv, hyper.head_dim), (4, 2, 16));
    assert_eq!((hyper.gate, hyper.n_ctx_max), (GateKind::Silu, 256));
    assert_eq!(
        (hyper.rope.pairs, hyper.rope.n_rot),
        (RopePairs::Adjacent, 16)
    );
    assert_eq!(
        (hyper.rope.freq_base, hyper.rope.scaling),
        (10_000.0, PositionScaling::None)
    );
    assert_eq!(hyper.window, None);
    assert_eq!(tensors.layers.len(), 2);
    assert!(tensors.output.is_none() && tensors.rope_freqs.is_none());
    assert_eq!(hyper.rope.spec(None).unwrap().scaling, RopeScaling::None);
}

#[test]
fn gemma_s_sizes_and_defaults_are_read() {
    let (hyper, tensors) = read(&TinyModel::gemma()).unwrap();
    assert_eq!((hyper.n_head, hyper.n_head_kv, hyper.head_dim), (4, 1, 32));
    assert_eq!((hyper.n_embd_q(), hyper.n_embd_kv()), (128, 32));
    assert_eq!(
        (hyper.gate, hyper.embedding_scale, hyper.window),
        (GateKind::Gelu, 8.0, None)
    );
    assert_eq!(
        (hyper.rope.pairs, hyper.rope.n_rot),
        (RopePairs::Halves, 32)
    );
    assert!(tensors.output.is_none());
}

#[test]
fn a_file_may_name_its_gates() {
    let cases = [
        ("silu", GateKind::Silu),
        ("relu", GateKind::Relu),
        ("gelu", GateKind::Gelu),
        ("gelu_pytorch_tanh", GateKind::Gelu),
    ];
    for (name, kind) in cases {
        for model in [TinyModel::default(), TinyModel::gemma()] {
            let gate = Some(name);
            let (hyper, _) = read(&TinyModel { gate, ..model }).unwrap();
            assert_eq!(hyper.gate, kind, "{name}");
        }
    }
}

#[test]
fn rope_keys_change_the_rotation() {
    let keys = vec![
        ("llama.rope.dimension_count", 8u32.into()),
        ("llama.rope.freq_base", 5e5f32.into()),
        ("llama.rope.scaling.type", "linear".into()),
        ("llama.rope.scaling.factor", 4f32.into()),
    ];
    let (hyper, _) = read(&TinyModel {
        keys,
        ..TinyModel::default()
    })
    .unwrap();
    assert_eq!((hyper.rope.n_rot, hyper.rope.freq_base), (8, 5e5));
    assert_eq!(
        hyper.rope.spec(None).unwrap().scaling,
        RopeScaling::Linear { factor: 4.0 }
    );
    let divisors = hyper.rope.spec(Some(vec![1.0; 4])).unwrap_err();
    assert!(
        divisors.to_string().contains("rope_freqs.weight"),
        "{divisors}"
    );
}

/// Keys of YaRN from 64 tokens to four times as many, and these.
fn yarn(keys: Vec<(&'static str, OwnedValue)>) -> TinyModel {
    let yarn = vec![
        ("llama.rope.scaling.type", "yarn".into()),
        ("llama.rope.scaling.factor", 4f32.into()),
        ("llama.rope.scaling.original_context_length", 64u32.into()),
    ];
    TinyModel {
        keys: [yarn, keys].concat(),
        n_ctx: 64,
        ..TinyModel::default()
    }
}

/// The magnitudes are transformers' `attention_factor`s for the same keys, and llama.cpp's.
#[test]
fn yarn_keys_make_the_rotation_longer_and_the_context_too() {
    let cases: [(&[(&str, f32)], f64); 5] = [
        (&[], 1.138_629_436),
        (&[("llama.rope.scaling.attn_factor", 1.5)], 1.707_944_154),
        (
            &[("llama.rope.scaling.yarn_log_multiplier", 0.5)],
            1.064_821_992,
        ),
        (&[("llama.rope.scaling.yarn_log_multiplier", 1.0)], 1.0),
        (&[("llama.rope.scaling.yarn_attn_factor", 0.8)], 0.8),
    ];
    for (keys, magnitude) in cases {
        let keys = keys.iter().map(|&(key, value)| (key, value.into()));
        let (hyper, _) = read(&yarn(keys.collect())).unwrap();
        assert_eq!(hyper.n_ctx_max, 256);
        let table = RopeTable::new(hyper.rope.spec(None).unwrap());
        let mut row = vec![0.0; table.row_len()];
        table.fill(0, &mut row);
        for cos in &row[..hyper.rope.n_rot] {
            assert!(
                (f64::from(*cos) - magnitude).abs() < 1e-6,
                "{cos} {magnitude}"
            );
        }
    }
    let (hyper, _) = read(&yarn(vec![
        ("llama.rope.scaling.yarn_beta_fast", 16f32.into()),
        ("llama.rope.scaling.yarn_beta_slow", 2f32.into()),
        ("llama.rope.scaling.yarn_ext_factor", 0f32.into()),
    ]))
    .unwrap();
    let PositionScaling::Yarn(yarn) = hyper.rope.scaling else {
        panic!("{:?}", hyper.rope.scaling)
    };
    assert_eq!((yarn.beta_fast, yarn.beta_slow), (16.0, 2.0));
    assert_eq!((yarn.ext_factor, yarn.attn_factor), (0.0, 1.0));
}

#[test]
fn a_window_that_hides_nothing_is_none() {
    for (window, expected) in [(0u32, None), (255, Some(255)), (256, None), (4096, None)] {
        let (hyper, _) = read(&TinyModel {
            keys: vec![("llama.attention.sliding_window", window.into())],
            ..TinyModel::default()
        })
        .unwrap();
        assert_eq!(hyper.window, expected, "{window}");
    }
}

#[test]
fn a_head_of_its_own_is_found() {
    let (_, tensors) = read(&TinyModel {
        tied: false,
        ..TinyModel::default()
    })
    .unwrap();
    assert_eq!(tensors.output.unwrap().info.name(), "output.weight");
}

/// Each bad model, and the words that its message must have: what is wrong, and what would be right.
#[test]
fn bad_models_are_refused_with_cause_and_cure() {
    let with = |key, value| TinyModel {
        keys: vec![(key, value)],
        ..TinyModel::default()
    };
    let without = |name| TinyModel {
        without_tensors: vec![name],
        ..TinyModel::default()
    };
    let cases: Vec<(TinyModel, &[&str])> = vec![
        (
            with("general.architecture", "falcon".into()),
            &["\"falcon\"", "supported: llama, qwen2, gemma"],
        ),
        (
            with("llama.block_count", 0u32.into()),
            &["llama.block_count", "from 1"],
        ),
        (
            with("llama.block_count", 3u32.into()),
            &["blk.2.ffn_down", "missing"],
        ),
        (
            with("llama.block_count", u32::MAX.into()),
            &["llama.block_count"],
        ),
        (
            with("llama.embedding_length", 72u32.into()),
            &["shape", "72"],
        ),
        (
            with("llama.feed_forward_length", 256u32.into()),
            &["ffn_", "shape"],
        ),
        (
            with("llama.attention.head_count_kv", 3u32.into()),
            &["head_count_kv", "divide"],
        ),
        (with("llama.attention.key_length", 8u32.into()), &["shape"]),
        (
            TinyModel {
                head_dim: Some(1024),
                ..TinyModel::default()
            },
            &["llama.attention.key_length", "1024", "512"],
        ),
        (
            with("llama.attention.value_length", 8u32.into()),
            &["value_length", "16"],
        ),
        (
            with("llama.attention.layer_norm_rms_epsilon", f32::NAN.into()),
            &["epsilon", "positive"],
        ),
        (
            with("llama.rope.dimension_count", 7u32.into()),
            &["rope.dimension_count", "even"],
        ),
        (
            with("llama.rope.freq_base", 0f32.into()),
            &["rope.freq_base", "positive"],
        ),
        (
            with("llama.rope.scaling.type", "longrope".into()),
            &["rope.scaling.type", "longrope", "YaRN"],
        ),
        (
            yarn(vec![("llama.rope.scaling.factor", 0.5f32.into())]),
            &["rope.scaling.factor", "0.5", "at least 1"],
        ),
        (
            yarn(vec![("llama.rope.scaling.yarn_ext_factor", (-1f32).into())]),
            &["yarn_ext_factor", "from 0 to 1"],
        ),
        (
            yarn(vec![("llama.rope.scaling.yarn_beta_slow", 64f32.into())]),
            &["yarn_beta_slow", "yarn_beta_fast"],
        ),
        (
            yarn(vec![(
                "llama.rope.scaling.yarn_log_multiplier",
                f32::INFINITY.into(),
            )]),
            &["yarn_log_multiplier", "number"],
        ),
        (
            yarn(vec![(
                "llama.rope.scaling.original_context_length",
                0u32.into(),
            )]),
            &["original_context_length", "from 1"],
        ),
        (
            TinyModel {
                keys: vec![
                    ("llama.attention.sliding_window", 64u32.into()),
                    ("llama.attention.sliding_window_pattern", 2u32.into()),
                ],
                ..TinyModel::default()
            },
            &["sliding_window_pattern", "some layers only"],
        ),
        (
            with("llama.attention.sliding_window", (-1i32).into()),
            &["sliding_window", "-1"],
        ),
        (
            with("llama.hidden_activation", "tanh".into()),
            &["\"tanh\"", "silu, relu and gelu"],
        ),
        (
            TinyModel {
                keys: vec![("gemma.attention.sliding_window", 64u32.into())],
                ..TinyModel::gemma()
            },
            &["gemma.attention.sliding_window", "some layers only"],
        ),
        (
            with("llama.expert_count", 8u32.into()),
            &["mixture of experts", "expert_count"],
        ),
        (
            with("llama.vocab_size", 300u32.into()),
            &["vocab_size", "259 rows"],
        ),
        (
            with("llama.context_length", "long".into()),
            &["llama.context_length", "str"],
        ),
        (
            without("token_embd.weight"),
            &["token_embd.weight", "missing"],
        ),
        (
            without("blk.1.ffn_down_t.weight"),
            &["blk.1.ffn_down.weight", "missing"],
        ),
        (
            without("output_norm.weight"),
            &["output_norm.weight", "missing"],
        ),
    ];
    for (model, words) in cases {
        let message = read(&model).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{message:?} lacks {word:?}");
        }
    }
}

#[test]
fn matrices_may_have_any_type_that_divides() {
    for quant in [
        QuantType::F16,
        QuantType::BF16,
        QuantType::Q4_0,
        QuantType::Q8_0,
    ] {
        let (_, tensors) = read(&TinyModel {
            quant,
            ..TinyModel::default()
        })
        .unwrap();
        assert_eq!(tensors.layers[1].wq.quant, quant);
        assert_eq!(
            tensors.layers[1].wq.rows(1..3).len(),
            2 * quant.row_bytes(64)
        );
    }
}
