//! Weight bytes per second of the kernels, one thread, weights far larger than the caches.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use pi_benches::{Random, matrix};
use pi_kernels::ffn_sparse::{
    DownScratch, GroupSpan, NeuronRows, down_active, down_tokens, up_active,
};
use pi_kernels::gemm::{gemm, gemv};
use pi_kernels::{ActBatch, ActivationMode, Cpu, Layout, MatrixRef, QuantType, StridedOut, Tier};

const N_ROWS: usize = 65_536;
const N_COLS: usize = 1_024;

fn tiers() -> Vec<Tier> {
    Tier::available()
        .into_iter()
        .filter(|&tier| tier != Tier::Scalar)
        .collect()
}

fn batch(cpu: Cpu, n_tokens: usize) -> ActBatch {
    let mut random = Random(2);
    let mut x = ActBatch::new(cpu.mode(), N_COLS, n_tokens);
    for t in 0..n_tokens {
        x.set(cpu, t, &random.floats(N_COLS));
    }
    x
}

fn bench_gemv(c: &mut Criterion) {
    let mut group = c.benchmark_group("gemv");
    for quant in QuantType::ALL {
        let (shape, bytes) = matrix(quant, N_ROWS / 4, N_COLS, Layout::Interleaved);
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        for tier in tiers() {
            for mode in [ActivationMode::Q8, ActivationMode::F32] {
                let cpu = Cpu::new(tier, mode).expect("tier is available");
                let x = batch(cpu, 1);
                let mut out = vec![0.0; shape.n_rows];
                let m = MatrixRef::new(shape, &bytes);
                group.bench_function(format!("{quant}/{tier}/{mode}"), |b| {
                    b.iter(|| gemv(cpu, m, x.token(0), 0..shape.n_rows, black_box(&mut out)));
                });
            }
        }
    }
    group.finish();
}

fn bench_gemm(c: &mut Criterion) {
    const N_TOKENS: usize = 64;
    let mut group = c.benchmark_group("gemm");
    for quant in [
        QuantType::Q4_0,
        QuantType::Q8_0,
        QuantType::Q4_K,
        QuantType::Q6_K,
    ] {
        let (shape, bytes) = matrix(quant, 1536, N_COLS, Layout::Interleaved);
        // multiply-adds
        group.throughput(Throughput::Elements(
            (shape.n_rows * N_COLS * N_TOKENS) as u64,
        ));
        for tier in tiers() {
            let cpu = Cpu::new(tier, ActivationMode::Q8).expect("tier is available");
            let x = batch(cpu, N_TOKENS);
            let mut out = vec![0.0; shape.n_rows * N_TOKENS];
            let m = MatrixRef::new(shape, &bytes);
            group.bench_function(format!("{quant}/{tier}"), |b| {
                b.iter(|| {
                    let n_rows = shape.n_rows;
                    let out =
                        StridedOut::from_slice(black_box(&mut out), n_rows, N_TOKENS, 0..n_rows);
                    gemm(cpu, m, &x, 0..N_TOKENS, 0..n_rows, out);
                });
            });
        }
    }
    group.finish();
}

/// 16 equal groups of `n` items.
fn groups(n: usize) -> Vec<GroupSpan> {
    (0..16)
        .map(|g| GroupSpan {
            group: g,
            span: g * n / 16..(g + 1) * n / 16,
        })
        .collect()
}

fn bench_sparse(c: &mut Criterion) {
    let mut group = c.benchmark_group("ffn_sparse");
    for quant in [
        QuantType::Q4_0,
        QuantType::Q8_0,
        QuantType::Q5_0,
        QuantType::F16,
    ] {
        let (shape, bytes) = matrix(quant, N_ROWS, N_COLS, Layout::Rows);
        let row_bytes = shape.row_bytes();
        let rows = |offset_bytes| NeuronRows {
            quant,
            n_embd: N_COLS,
            n_neurons: N_ROWS / 2,
            stride_bytes: 2 * row_bytes,
            offset_bytes,
            bytes: &bytes,
        };
        // one neuron in eight fires
        let ids: Vec<u32> = (0..N_ROWS as u32 / 2).step_by(8).collect();
        let gate = vec![0.5; ids.len()];
        let mut a = vec![0.0; ids.len()];
        group.throughput(Throughput::Bytes((ids.len() * row_bytes) as u64));
        for tier in tiers() {
            let cpu = Cpu::new(tier, ActivationMode::Q8).expect("tier is available");
            let x = batch(cpu, 1);
            group.bench_function(format!("up/{quant}/{tier}"), |b| {
                b.iter(|| {
                    up_active(
                        cpu,
                        rows(0),
                        x.token(0),
                        &ids,
                        &gate,
                        black_box(&mut a),
                        |_| (),
                    )
                });
            });
            let mut y = vec![0.0; N_COLS];
            let spans = groups(ids.len());
            group.bench_function(format!("down/{quant}/{tier}"), |b| {
                b.iter(|| {
                    let sums = &mut [black_box(y.as_mut_slice())];
                    down_active(cpu, rows(row_bytes), &ids, &gate, &spans, 0..N_COLS, sums);
                });
            });
        }
    }
    group.finish();
}

fn bench_down_tokens(c: &mut Criterion) {
    const N_TOKENS: usize = 64;
    const N_NEURONS: usize = 1536;
    let mut group = c.benchmark_group("down_tokens");
    let (_, bytes) = matrix(QuantType::Q4_0, N_NEURONS, N_COLS, Layout::Rows);
    let stride_bytes = QuantType::Q4_0.row_bytes(N_COLS);
    let down = NeuronRows {
        quant: QuantType::Q4_0,
        n_embd: N_COLS,
        n_neurons: N_NEURONS,
        stride_bytes,
        offset_bytes: 0,
        bytes: &bytes,
    };
    let act: Vec<f32> = Random(3)
        .floats(N_TOKENS * N_NEURONS)
        .iter()
        .map(|g| (g - 0.76).max(0.0))
        .collect();
    let mut y = vec![0.0; N_TOKENS * N_COLS];
    group.throughput(Throughput::Elements((N_TOKENS * N_NEURONS * N_COLS) as u64));
    for tier in tiers() {
        for skip in [false, true] {
            let cpu = Cpu::new(tier, ActivationMode::Q8).expect("tier is available");
            let mut scratch = DownScratch::default();
            let name = if skip { "skip" } else { "dense" };
            group.bench_function(format!("{name}/{tier}"), |b| {
                b.iter(|| {
                    let out =
                        StridedOut::from_slice(black_box(&mut y), N_COLS, N_TOKENS, 0..N_COLS);
                    let spans = groups(N_NEURONS);
                    down_tokens(
                        cpu,
                        down,
                        &act,
                        N_NEURONS,
                        &spans,
                        0..N_COLS,
                        skip,
                        &mut scratch,
                        &mut [out],
                    );
                });
            });
        }
    }
    group.finish();
}

criterion_group!(
    benches,
    bench_gemv,
    bench_gemm,
    bench_sparse,
    bench_down_tokens
);
criterion_main!(benches);
