//! How fast the CUDA kernels are: cargo run --release -p pi-kernels --example cuda_speed -- [decode | prefill] [GB/s] [TFLOP/s]
//!
//! Decoding: how fast they read memory, and percent of GB/s (3100 where none is given). Prefill: how fast they multiply, and
//! percent of what the card's tensor cores do in dense f16 (989 where none is given).
//!
//! Weights rotate over copies that no cache holds; launches are captured in one graph, so that the time is the device's.
//! Medians of nine.

mod bench;
mod prefill;

use bench::Bench;
use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    Add, AttendScratch, Device, DeviceAct, DeviceCache, DownScratch, Gates, NeuronList,
    SampleScratch, argmax, attend, compact, down_active, gate_up, gemv, prepare, rms_norm, top_k,
};
use pi_kernels::{ActivationMode, KernelError, QuantType};

use crate::bench::random_bytes;

impl Bench {
    fn gemv(
        &self,
        quant: QuantType,
        mode: ActivationMode,
        n_rows: usize,
        n_cols: usize,
    ) -> Result<(), KernelError> {
        let m = self.weights(quant, n_rows, n_cols)?;
        let x = self.activations(n_cols, mode)?;
        let mut out = self.device.alloc::<f32>(n_rows)?;
        let us = self.time(40.max(m.copies.len()), |stream, i| {
            gemv(stream, m.view(i), &x, Add::None, out.view_mut(..))
        })?;
        self.report(
            &format!("gemv {quant} {mode} {n_rows}×{n_cols}"),
            us,
            m.rows.bytes(),
        );
        Ok(())
    }

    /// Gate, up and down of `n_active` of `n_ff` neurons: the two launches apart, and together.
    fn ffn(
        &self,
        quant: QuantType,
        n_embd: usize,
        n_ff: usize,
        n_active: usize,
    ) -> Result<(), KernelError> {
        let weights = self.weights(quant, n_ff, n_embd)?;
        let x = self.activations(n_embd, ActivationMode::Q8)?;
        // evenly spread, and other rows in each list, so that no cache holds what is read
        let ids = |shift: usize| (0..n_active).map(move |j| (j * n_ff / n_active + shift) as u32);
        let lists =
            (0..n_ff / n_active).map(|shift| self.device.upload(&ids(shift).collect::<Vec<_>>()));
        let lists = lists.collect::<Result<Vec<_>, _>>()?;
        let count = self.device.upload(&[n_active as u32])?;
        let list = |i: usize| NeuronList::Ids {
            ids: lists[i % lists.len()].view(..),
            count: count.view(..),
        };
        let mut a = self.device.upload(&vec![0.25f32; n_active])?;
        let mut y = self.device.alloc::<f32>(n_embd)?;
        let mut scratch = DownScratch::new(&self.device, weights.rows)?;
        let bytes = n_active * weights.rows.row_bytes();
        let name = format!("{quant} {n_embd}, {n_active} of {n_ff}");
        let us = self.time(48, |stream, i| {
            let (rows, y) = (weights.view(i), y.view_mut(..));
            down_active(
                stream,
                rows,
                list(i),
                a.view(..),
                true,
                Add::None,
                None,
                &mut scratch,
                y,
            )
        })?;
        self.report(&format!("down {name}"), us, bytes);
        // so that all of the list is read
        let gates = Gates::Silu;
        let us = self.time(48, |stream, i| {
            let (gate, up) = (weights.view(2 * i), weights.view(2 * i + 1));
            gate_up(stream, gate, up, list(i), &x, gates, a.view_mut(..))
        })?;
        self.report(&format!("gate, up {name}"), us, 2 * bytes);
        let us = self.time(48, |stream, i| {
            let (gate, up, down) = (
                weights.view(3 * i),
                weights.view(3 * i + 1),
                weights.view(3 * i + 2),
            );
            gate_up(stream, gate, up, list(i), &x, gates, a.view_mut(..))?;
            let y = y.view_mut(..);
            down_active(
                stream,
                down,
                list(i),
                a.view(..),
                true,
                Add::None,
                None,
                &mut scratch,
                y,
            )
        })?;
        self.report(&format!("ffn {name}"), us, 3 * bytes);
        Ok(())
    }

    fn attention(
        &self,
        n_head: usize,
        n_head_kv: usize,
        head_dim: usize,
        n_ctx: usize,
        mode: ActivationMode,
    ) -> Result<(), KernelError> {
        let cache = DeviceCache::new(&self.device, KvType::F16, n_head_kv, n_ctx, head_dim)?;
        let mut scratch = AttendScratch::new(
            &self.device,
            n_head,
            n_head_kv,
            head_dim,
            n_ctx,
            KvType::F16,
            mode,
        )?;
        let q = self.device.upload(&vec![0.01f32; n_head * head_dim])?;
        let position = self.device.upload(&[n_ctx as u32 - 1])?;
        let mut out = self.device.alloc::<f32>(n_head * head_dim)?;
        let us = self.time(40, |stream, _| {
            let at = position.view(..);
            attend(
                stream,
                q.view(..),
                &cache,
                at,
                None,
                0.1,
                &mut scratch,
                out.view_mut(..),
            )
        })?;
        let name =
            format!("attend {n_head}/{n_head_kv} heads of {head_dim}, {n_ctx} positions, {mode}");
        self.report(&name, us, cache.bytes());
        Ok(())
    }

    fn small(&self) -> Result<(), KernelError> {
        for n in [4096, 8192] {
            let ones = self.device.upload(&vec![1.0f32; n])?;
            let mut act = DeviceAct::new(&self.device, ActivationMode::Q8, n)?;
            let us = self.time(100, |stream, _| {
                rms_norm(stream, ones.view(..), ones.view(..), 1e-5, &mut act)
            })?;
            self.report(&format!("rms_norm {n}"), us, 8 * n);
            let us = self.time(100, |stream, _| prepare(stream, ones.view(..), &mut act))?;
            self.report(&format!("prepare {n}"), us, 4 * n);
        }
        let n = 28_672;
        let gates: Vec<f32> = random_bytes(n, 4)
            .iter()
            .map(|&b| f32::from(b) - 217.0)
            .collect();
        let gates = self.device.upload(&gates)?;
        let (mut ids, mut count) = (self.device.alloc::<u32>(n)?, self.device.alloc::<u32>(1)?);
        let us = self.time(100, |stream, _| {
            let (ids, count) = (ids.view_mut(..), count.view_mut(..));
            compact(stream, gates.view(..), None, 0, ids, None, count)
        })?;
        self.report(&format!("compact {n}, 15 %"), us, 4 * n);
        let n = 128_256;
        let logits: Vec<f32> = random_bytes(n, 3).iter().map(|&b| f32::from(b)).collect();
        let logits = self.device.upload(&logits)?;
        let mut scratch = SampleScratch::new(&self.device, n)?;
        let mut id = self.device.alloc::<u32>(1)?;
        let us = self.time(100, |stream, _| {
            argmax(stream, logits.view(..), &mut scratch, id.view_mut(..))
        })?;
        self.report(&format!("argmax {n}"), us, 4 * n);
        let (mut values, mut ids) = (self.device.alloc::<f32>(40)?, self.device.alloc::<u32>(40)?);
        let us = self.time(100, |stream, _| {
            let (values, ids) = (values.view_mut(..), ids.view_mut(..));
            top_k(stream, logits.view(..), &mut scratch, values, ids)
        })?;
        self.report(&format!("top_k 40 of {n}"), us, 4 * n);
        Ok(())
    }
}

fn decode(bench: &Bench) -> Result<(), KernelError> {
    let (q8, f32) = (ActivationMode::Q8, ActivationMode::F32);
    for (n_rows, n_cols) in [
        (4096, 4096),
        (8192, 8192),
        (1024, 8192),
        (28672, 8192),
        (8192, 28672),
    ] {
        bench.gemv(QuantType::Q4_0, q8, n_rows, n_cols)?;
    }
    bench.gemv(QuantType::Q4_0, f32, 28672, 8192)?;
    for quant in [
        QuantType::Q8_0,
        QuantType::F16,
        QuantType::BF16,
        QuantType::Q4_1,
    ] {
        bench.gemv(quant, q8, 8192, 8192)?;
    }
    for quant in [
        QuantType::Q5_0,
        QuantType::Q4_K,
        QuantType::Q5_K,
        QuantType::Q6_K,
    ] {
        bench.gemv(quant, q8, 8192, 8192)?;
    }
    for percent in [10, 15] {
        bench.ffn(QuantType::Q4_0, 8192, 28672, 28672 * percent / 100)?;
    }
    bench.ffn(QuantType::Q4_0, 4096, 11008, 11008 / 10)?;
    bench.ffn(QuantType::Q4_K, 8192, 28672, 28672 * 15 / 100)?;
    bench.ffn(QuantType::F16, 5120, 13824, 13824 * 15 / 100)?;
    for n_ctx in [512, 4096, 32768] {
        for mode in [ActivationMode::F32, ActivationMode::Q8] {
            bench.attention(64, 8, 128, n_ctx, mode)?;
            bench.attention(32, 8, 128, n_ctx, mode)?;
        }
    }
    bench.attention(32, 32, 128, 4096, ActivationMode::Q8)?;
    bench.small()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let is_named = |name: &&String| ["decode", "prefill"].contains(&name.as_str());
    let only = arguments.first().filter(is_named);
    let mut peaks = arguments[usize::from(only.is_some())..].iter();
    let mut peak = |or: f64| peaks.next().map_or(Ok(or), |peak| peak.parse());
    let (peak_gb_s, peak_tflop_s) = (peak(3100.0)?, peak(989.0)?);
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    println!(
        "{:?}; percent are of {peak_gb_s} GB/s and {peak_tflop_s} TFLOP/s",
        device.info()
    );
    let stream = device.stream()?;
    let bench = Bench {
        device,
        stream,
        peak_gb_s,
        peak_tflop_s,
    };
    if only.is_none_or(|only| only == "decode") {
        decode(&bench)?;
    }
    if only.is_none_or(|only| only == "prefill") {
        prefill::run(&bench)?;
    }
    Ok(())
}
