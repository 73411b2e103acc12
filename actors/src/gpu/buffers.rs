//! What a token is computed in on the GPU: one set for all layers, as they come one after the other.

use pi_kernels::ActivationMode;
use pi_kernels::KernelError;
use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    AttendScratch, Device, DeviceAct, DeviceBuffer, DeviceCache, DeviceRows, DownScratch,
    mask_words,
};

use super::weights::{GpuDown, GpuLayer};
use crate::weights::ModelShape;

/// See the module.
#[derive(Debug)]
pub(super) struct Buffers {
    /// Residual stream, `[n_embd]`.
    pub x: DeviceBuffer<f32>,
    pub rotation: DeviceBuffer<f32>,
    /// Position and number of the token.
    pub words: DeviceBuffer<u32>,
    /// Normed residual stream: before attention and before the head; before the FFN; over its root mean square alone.
    pub normed: DeviceAct,
    pub ffn_normed: DeviceAct,
    pub residual: DeviceAct,
    /// Queries, keys, values.
    pub qkv: DeviceBuffer<f32>,
    /// Results of attention, and the same as activations.
    pub heads: DeviceBuffer<f32>,
    pub attn: DeviceAct,
    /// Activations of hot neurons, and the same for a plain down projection.
    pub act: DeviceBuffer<f32>,
    pub act_rows: Option<DeviceAct>,
    /// What a predictor ahead computes in: its middle, by rank, and all scores.
    pub middle: DeviceBuffer<f32>,
    pub middles: Vec<DeviceAct>,
    pub scores: DeviceBuffer<f32>,
    /// A bit for each neuron, in place of scores, where the predictor runs in blocks of the token's own launches.
    pub masks: DeviceBuffer<u32>,
    /// Hot neurons that were predicted for even and for odd layers.
    pub hot: [IdList; 2],
    /// Cold ones; the host gets a copy.
    pub cold: IdList,
    pub downs: Vec<(DeviceRows, DownScratch)>,
    pub attend: AttendScratch,
    pub logits: DeviceBuffer<f32>,
    /// For what is handed over: hidden states, ids, and the rest.
    pub tickets: [DeviceBuffer<u32>; 3],
    /// Set when the host was late.
    pub late: DeviceBuffer<u32>,
    /// Keys and values, by layer.
    pub caches: Vec<DeviceCache>,
}

/// Ids, and how many there are.
#[derive(Debug)]
pub(super) struct IdList {
    pub ids: DeviceBuffer<u32>,
    pub count: DeviceBuffer<u32>,
}

impl IdList {
    fn new(device: &Device, n: usize) -> Result<Self, KernelError> {
        Ok(Self {
            ids: device.alloc(n)?,
            count: device.alloc(1)?,
        })
    }

    fn bytes(&self) -> usize {
        self.ids.bytes() + self.count.bytes()
    }
}

impl Buffers {
    pub fn new(
        device: &Device,
        shape: &ModelShape,
        rope_len: usize,
        layers: &[GpuLayer],
        mode: ActivationMode,
        kv_type: KvType,
    ) -> Result<Self, KernelError> {
        let n_kv = shape.n_head_kv * shape.head_dim;
        let act = |n: usize| DeviceAct::new(device, mode, n);
        let n_hot = layers.iter().filter_map(|layer| layer.ffn.as_ref());
        let n_hot = n_hot.map(|ffn| ffn.n_hot()).max().unwrap_or(0);
        let is_plain = |layer: &GpuLayer| matches!(layer.ffn, Some(ffn) if matches!(ffn.down, GpuDown::Plain(_)));
        let aheads = || layers.iter().filter_map(|layer| layer.ahead.as_ref());
        let mut ranks: Vec<usize> = aheads().map(|ahead| ahead.a.rows.n_rows).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let n_scores = if ranks.is_empty() { 0 } else { shape.n_ff };
        let mut downs: Vec<(DeviceRows, DownScratch)> = Vec::new();
        for layer in layers {
            if let Some(ffn) = &layer.ffn
                && let GpuDown::Neurons(down) = &ffn.down
                && downs.iter().all(|(rows, _)| *rows != down.rows)
            {
                downs.push((down.rows, DownScratch::new(device, down.rows)?));
            }
        }
        let cache = |_| {
            DeviceCache::new(
                device,
                kv_type,
                shape.n_head_kv,
                shape.n_ctx,
                shape.head_dim,
            )
        };
        Ok(Self {
            x: device.alloc(shape.n_embd)?,
            rotation: device.alloc(rope_len)?,
            words: device.alloc(2)?,
            normed: act(shape.n_embd)?,
            ffn_normed: act(shape.n_embd)?,
            residual: act(shape.n_embd)?,
            qkv: device.alloc(shape.n_attn() + 2 * n_kv)?,
            heads: device.alloc(shape.n_attn())?,
            attn: act(shape.n_attn())?,
            act: device.alloc(n_hot)?,
            act_rows: layers
                .iter()
                .any(is_plain)
                .then(|| act(shape.n_ff))
                .transpose()?,
            middle: device.alloc(ranks.last().copied().unwrap_or(0))?,
            middles: ranks
                .iter()
                .map(|rank| act(*rank))
                .collect::<Result<_, _>>()?,
            scores: device.alloc(n_scores)?,
            masks: device.alloc(mask_words(n_scores))?,
            hot: [
                IdList::new(device, n_scores)?,
                IdList::new(device, n_scores)?,
            ],
            cold: IdList::new(device, n_scores)?,
            downs,
            attend: AttendScratch::new(
                device,
                shape.n_head,
                shape.n_head_kv,
                shape.head_dim,
                shape.n_ctx,
                kv_type,
                mode,
            )?,
            logits: device.alloc(shape.n_vocab)?,
            tickets: [device.alloc(1)?, device.alloc(1)?, device.alloc(1)?],
            late: device.alloc(1)?,
            caches: layers.iter().map(cache).collect::<Result<_, _>>()?,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let floats = [
            &self.x,
            &self.rotation,
            &self.qkv,
            &self.heads,
            &self.act,
            &self.middle,
            &self.scores,
            &self.logits,
        ];
        let acts = [&self.normed, &self.ffn_normed, &self.residual, &self.attn];
        let acts = acts.into_iter().chain(&self.act_rows).chain(&self.middles);
        floats.iter().map(|buffer| buffer.bytes()).sum::<usize>()
            + acts.map(DeviceAct::bytes).sum::<usize>()
            + self.hot.iter().map(IdList::bytes).sum::<usize>()
            + self.cold.bytes()
            + self.masks.bytes()
            + (self.downs.iter().map(|(_, scratch)| scratch.bytes())).sum::<usize>()
            + self.attend.bytes()
            + self.caches.iter().map(DeviceCache::bytes).sum::<usize>()
    }
}
