//! How fast rows are packed: GB/s of one thread, for each format and layout, of a GPU too.
//!
//! `cargo run --release -p pi-kernels --example pack_speed`

use std::hint::black_box;
use std::time::Instant;

use pi_kernels::cuda::{DeviceRows, SUPPORTED};
use pi_kernels::{Layout, MatrixShape, QuantType};

fn main() {
    let best = |pack: &mut dyn FnMut()| {
        let seconds = |_| {
            let start = Instant::now();
            pack();
            start.elapsed().as_secs_f64()
        };
        (0..30).map(seconds).fold(f64::INFINITY, f64::min)
    };
    for quant in QuantType::ALL {
        for layout in [Layout::Interleaved, Layout::Rows] {
            let shape = MatrixShape {
                quant,
                n_rows: 512,
                n_cols: 1024,
                layout,
            };
            let rows: Vec<u8> = (0..512 * shape.row_bytes()).map(|i| i as u8).collect();
            let mut packed = vec![0; shape.packed_bytes()];
            let best = best(&mut || shape.pack(black_box(&rows), 0, black_box(&mut packed)));
            let speed = rows.len() as f64 / best / 1e9;
            println!("{quant:5} {layout:?}: {speed:.1} GB/s");
        }
    }
    for quant in SUPPORTED {
        let rows = DeviceRows {
            quant,
            n_rows: 512,
            n_cols: 1024,
        };
        let file: Vec<u8> = (0..512 * quant.row_bytes(1024)).map(|i| i as u8).collect();
        let mut packed = vec![0; rows.bytes()];
        let stride = rows.row_bytes();
        let best = best(&mut || rows.pack(black_box(&file), stride, black_box(&mut packed)));
        let speed = file.len() as f64 / best / 1e9;
        println!("{quant:5} on a GPU: {speed:.1} GB/s");
    }
}
