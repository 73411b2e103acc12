//! How long a thread takes for a few single rows, as beside a GPU, all of them in its caches: ns a row of products (gates, ups),
//! and of sums of downs over a sixteenth of the columns.
//!
//! `cargo run --release -p pi-kernels --example row_speed`

use std::hint::black_box;
use std::time::Instant;

use pi_kernels::ffn_sparse::{GroupSpan, NeuronRows, SUBTREES_MAX, down_active, row_products};
use pi_kernels::{ActBatch, ActivationMode, Cpu, QuantType, Tier};

const N_EMBD: usize = 8192;
const N_NEURONS: usize = 14_336;
const QUANT: QuantType = QuantType::Q4_0;

fn main() {
    let row_bytes = QUANT.row_bytes(N_EMBD);
    // scales are where weights are too: a few bits of each, finite as halves
    let bytes: Vec<u8> = (0..N_NEURONS * row_bytes)
        .map(|i| ((i * 7919) >> 5) as u8 & 0x3F)
        .collect();
    let rows = NeuronRows {
        quant: QUANT,
        n_embd: N_EMBD,
        n_neurons: N_NEURONS,
        stride_bytes: row_bytes,
        offset_bytes: 0,
        bytes: &bytes,
    };
    let values: Vec<f32> = (0..N_EMBD).map(|i| (i as f32).sin()).collect();
    println!("| tier | what | rows | ns a row |\n| - | - | -: | -: |");
    for tier in Tier::available() {
        let cpu = Cpu::new(tier, ActivationMode::Q8).expect("it is available");
        let mut x = ActBatch::new(cpu.mode(), N_EMBD, 1);
        x.set(cpu, 0, &values);
        for n in [6, 14, 32] {
            let ids: Vec<u32> = (0..n).map(|i| (i * N_NEURONS / n) as u32).collect();
            let mut out = vec![0.0; n];
            let ns = best(|| row_products(cpu, rows, x.token(0), &ids, black_box(&mut out)));
            print(tier, "products", n, ns);
        }
        for (n, every) in [(101, 141), (101, 40), (101, 8), (101, 2)] {
            let ids: Vec<u32> = (0..n).map(|i| (i * every) as u32).collect();
            let a: Vec<f32> = ids.iter().map(|&id| 0.1 + id as f32 / 1e4).collect();
            let groups: Vec<GroupSpan> = (0..16)
                .map(|group| GroupSpan {
                    group,
                    span: n * group / 16..n * (group + 1) / 16,
                })
                .collect();
            let mut sum = vec![0.0; N_EMBD / 16];
            let mut all: [&mut [f32]; SUBTREES_MAX] = Default::default();
            all[0] = &mut sum;
            let columns = 0..N_EMBD / 16;
            let ns = best(|| {
                let sums = black_box(&mut all[..1]);
                down_active(cpu, rows, &ids, &a, &groups, columns.clone(), sums);
            });
            print(tier, &format!("downs, one in {every}"), n, ns);
        }
    }
}

/// The best of some, in ns.
fn best(mut run: impl FnMut()) -> f64 {
    let times = (0..300).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64() * 1e9
    });
    times.fold(f64::INFINITY, f64::min)
}

fn print(tier: Tier, what: &str, n: usize, ns: f64) {
    println!("| {tier} | {what} | {n} | {:.0} |", ns / n as f64);
}
