//! Speed of attention, one thread: `cargo run --release -p pi-kernels --example attention_speed`.
//!
//! Decode: GB/s of cache read, for more heads than the caches of the processor hold. Prefill:
//! GFLOP/s of both products. The best of several rounds counts.

use std::time::Instant;

use pi_kernels::attention::{
    KvHead, KvType, Queries, attend, attend_chunk, join_chunks, reset_states, state_len,
};
use pi_kernels::{ActivationMode, Cpu, StridedOut, Tier};

const ROUNDS: usize = 7;

fn main() {
    for tier in Tier::available()
        .into_iter()
        .filter(|&tier| tier != Tier::Scalar)
    {
        let Ok(cpu) = Cpu::new(tier, ActivationMode::F32) else {
            continue;
        };
        for (head_dim, n_heads) in [(64, 3), (128, 4), (128, 1)] {
            for kv_type in [KvType::F16, KvType::F32] {
                let gbs = decode(cpu, kv_type, head_dim, n_heads, 1536);
                let gflops = prefill(cpu, kv_type, head_dim, n_heads, 512);
                println!(
                    "{tier:12} {kv_type} head_dim {head_dim:3}, {n_heads} query heads: \
                     decode at 1536 {gbs:5.1} GB/s, prefill of 512 {gflops:5.1} GFLOP/s"
                );
            }
        }
    }
}

/// Random bytes of f16 or f32 values between −1 and 1.
fn cache(kv_type: KvType, n_values: usize) -> Vec<u8> {
    let mut bytes = vec![0; kv_type.row_bytes(n_values)];
    let values: Vec<f32> = (0..n_values)
        .map(|i| (i * 2_654_435_761 % 65_521) as f32 / 32_761.0 - 1.0)
        .collect();
    let cpu = Cpu::detect(ActivationMode::F32);
    pi_kernels::attention::append(cpu, kv_type, &values, &mut bytes);
    bytes
}

/// GB/s of keys and values for one token over 64 MB of key/value heads.
fn decode(cpu: Cpu, kv_type: KvType, head_dim: usize, n_heads: usize, depth: usize) -> f64 {
    let head_bytes = kv_type.row_bytes(head_dim) * depth;
    let n_kv = (64 << 20) / (2 * head_bytes);
    let k = cache(kv_type, n_kv * head_dim * depth);
    let v = k.clone();
    let values = vec![0.1; n_heads * head_dim];
    let queries = Queries {
        values: &values,
        stride: n_heads * head_dim,
        n_tokens: 1,
        n_heads,
        first_position: depth - 1,
        window: None,
    };
    let chunk_len = n_heads * state_len(head_dim);
    let mut states = vec![0.0; queries.chunks().len() * chunk_len];
    let mut out = vec![0.0; n_heads * head_dim];
    let seconds = best(|| {
        for (k, v) in k.chunks_exact(head_bytes).zip(v.chunks_exact(head_bytes)) {
            let kv = KvHead {
                kv_type,
                head_dim,
                k,
                v,
            };
            reset_states(&mut states, head_dim);
            for (chunk, states) in states.chunks_exact_mut(chunk_len).enumerate() {
                attend_chunk(cpu, kv, queries, chunk, 0.125, states);
            }
            join_chunks(cpu, head_dim, &mut states, &mut out);
        }
    });
    (2 * n_kv * head_bytes) as f64 / seconds / 1e9
}

/// GFLOP/s of `n_tokens` tokens from position 0, 8 key/value heads, visible positions counted.
fn prefill(cpu: Cpu, kv_type: KvType, head_dim: usize, n_heads: usize, n_tokens: usize) -> f64 {
    let n_kv = 8;
    let head_bytes = kv_type.row_bytes(head_dim) * n_tokens;
    let k = cache(kv_type, n_kv * head_dim * n_tokens);
    let v = k.clone();
    let width = n_heads * head_dim;
    let values = vec![0.1; n_tokens * width];
    let queries = Queries {
        values: &values,
        stride: width,
        n_tokens,
        n_heads,
        first_position: 0,
        window: None,
    };
    let mut states = vec![0.0; 32 * n_heads * state_len(head_dim)];
    let mut out = vec![0.0; n_tokens * width];
    let seconds = best(|| {
        for (k, v) in k.chunks_exact(head_bytes).zip(v.chunks_exact(head_bytes)) {
            let kv = KvHead {
                kv_type,
                head_dim,
                k,
                v,
            };
            let mut out = StridedOut::from_slice(&mut out, width, n_tokens, 0..width);
            attend(cpu, kv, queries, 0.125, &mut states, &mut out);
        }
    });
    let visible = n_tokens * (n_tokens + 1) / 2;
    (n_kv * n_heads * visible * head_dim * 4) as f64 / seconds / 1e9
}

/// Seconds of the fastest of several rounds.
fn best(mut work: impl FnMut()) -> f64 {
    let mut best = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
