//! Kernels that take several tokens.

use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    Add, DeviceBatch, DeviceCache, Gates, GemmScratch, attend_batch, gate_up_batch, gemm,
    prepare_batch, rms_norm_batch,
};
use pi_kernels::{ActivationMode, KernelError, QuantType};

use crate::bench::{Bench, random_bytes};

impl Bench {
    /// Values of −1 … 1.
    fn floats(&self, n: usize) -> Vec<f32> {
        let bytes = random_bytes(n, 9);
        bytes.iter().map(|&b| f32::from(b) / 128.0 - 1.0).collect()
    }

    /// Products of rows `[n_rows, n_cols]` with each number of tokens.
    fn gemm(
        &self,
        quant: QuantType,
        mode: ActivationMode,
        [n_rows, n_cols]: [usize; 2],
        counts: &[usize],
    ) -> Result<(), KernelError> {
        let m = self.weights(quant, n_rows, n_cols)?;
        let mut scratch = GemmScratch::new(&self.device)?;
        for &n_tokens in counts {
            let x = self.device.upload(&self.floats(n_tokens * n_cols))?;
            let mut batch = DeviceBatch::new(&self.device, mode, n_tokens, n_cols)?;
            prepare_batch(&self.stream, x.view(..), &mut batch)?;
            let mut out = self.device.alloc::<f32>(n_tokens * n_rows)?;
            let us = self.time(20.max(m.copies.len()), |stream, i| {
                let out = out.view_mut(..);
                gemm(stream, m.view(i), &batch, Add::None, &mut scratch, out)
            })?;
            let name = format!("gemm {quant} {mode} {n_rows}×{n_cols}, {n_tokens} tokens");
            let flop = 2.0 * (n_rows * n_cols) as f64 * n_tokens as f64;
            self.report_flop(&name, us, flop);
        }
        Ok(())
    }

    /// `n_tokens` tokens behind `n_before` others; operations of the positions that they see.
    fn attend_batch(
        &self,
        mode: ActivationMode,
        [n_head, n_head_kv, head_dim]: [usize; 3],
        n_before: usize,
        n_tokens: usize,
    ) -> Result<(), KernelError> {
        let n_ctx = n_before + n_tokens;
        let cache = DeviceCache::new(&self.device, KvType::F16, n_head_kv, n_ctx, head_dim)?;
        let q = self
            .device
            .upload(&self.floats(n_tokens * n_head * head_dim))?;
        let position = self.device.upload(&[n_before as u32])?;
        let mut out = self.device.alloc::<f32>(q.len())?;
        let us = self.time(10, |stream, _| {
            let (q, at, out) = (q.view(..), position.view(..), out.view_mut(..));
            attend_batch(stream, mode, q, n_tokens, &cache, at, None, 0.1, out)
        })?;
        let name = format!(
            "attend_batch {mode} {n_head}/{n_head_kv} of {head_dim}, {n_tokens} at {n_before}"
        );
        let seen = n_tokens * n_before + n_tokens * (n_tokens + 1) / 2;
        self.report_flop(&name, us, 4.0 * (seen * n_head * head_dim) as f64);
        Ok(())
    }

    fn small_batches(&self, n_tokens: usize) -> Result<(), KernelError> {
        let (n_embd, n_ff, q8) = (8192, 28672, ActivationMode::Q8);
        let x = self.device.upload(&self.floats(n_tokens * n_ff))?;
        let narrow = x.view(..n_tokens * n_embd);
        let mut batch = DeviceBatch::new(&self.device, q8, n_tokens, n_embd)?;
        let us = self.time(20, |stream, _| {
            rms_norm_batch(stream, narrow, x.view(..n_embd), 1e-5, None, &mut batch)
        })?;
        let name = format!("rms_norm_batch {n_embd}, {n_tokens} tokens");
        self.report(&name, us, 6 * n_tokens * n_embd);
        let us = self.time(20, |stream, _| prepare_batch(stream, narrow, &mut batch))?;
        let name = format!("prepare_batch {n_embd}, {n_tokens} tokens");
        self.report(&name, us, 6 * n_tokens * n_embd);
        let mut batch = DeviceBatch::new(&self.device, q8, n_tokens, n_ff)?;
        let us = self.time(20, |stream, _| {
            gate_up_batch(stream, x.view(..), x.view(..), Gates::Silu, &mut batch)
        })?;
        let name = format!("gate_up_batch {n_ff}, {n_tokens} tokens");
        self.report(&name, us, 10 * n_tokens * n_ff);
        Ok(())
    }
}

pub fn run(bench: &Bench) -> Result<(), KernelError> {
    let (q8, f32) = (ActivationMode::Q8, ActivationMode::F32);
    let counts = [1, 16, 32, 48, 64, 96, 128, 256, 512, 1024];
    bench.gemm(QuantType::Q4_0, q8, [8192, 8192], &counts)?;
    bench.gemm(QuantType::Q4_0, q8, [28672, 8192], &[32, 64, 128, 512])?;
    bench.gemm(QuantType::Q4_0, q8, [8192, 28672], &[32, 64, 128, 512])?;
    bench.gemm(QuantType::Q4_0, q8, [1024, 8192], &[32, 64, 128, 512])?;
    bench.gemm(QuantType::Q4_0, q8, [4096, 4096], &[32, 512])?;
    bench.gemm(QuantType::Q4_0, f32, [8192, 8192], &[1, 32, 64, 512])?;
    for quant in pi_kernels::cuda::SUPPORTED {
        if ![QuantType::Q4_0, QuantType::F32].contains(&quant) {
            bench.gemm(quant, q8, [8192, 8192], &[32, 64, 512])?;
        }
    }
    bench.gemm(QuantType::F16, f32, [8192, 8192], &[512])?;
    for mode in [q8, f32] {
        for n_before in [0, 4096, 32768] {
            bench.attend_batch(mode, [64, 8, 128], n_before, 512)?;
        }
    }
    bench.attend_batch(q8, [32, 32, 128], 0, 512)?;
    bench.small_batches(512)
}
