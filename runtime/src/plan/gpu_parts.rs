//! What of a model goes to GPUs, as its loader would divide it, and what follows for a token and a prompt.

use pi_actors::gpu::streamed_tokens_min;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::placement::LayerLoad;

use super::costs::Costs;
use super::gpu::{GpuForecast, OnGpus};
use super::loads::{LayerBytes, layer_bytes};
use super::memory::NodeMemory;
use super::{Mode, Planning};
use crate::error::RuntimeError;
use crate::model::gpu::{GpuPart, GpuRequest, GpuRoom, HotLayer, choose_on};
use crate::model::load::model_shape;
use crate::model::sparsity::DownPlan;
use crate::session::N_UBATCH;

impl Planning<'_> {
    /// What goes to each GPU that is used; none where a model goes to none, as a run would find.
    ///
    /// # Errors
    /// It does not go to GPUs of which one is required.
    pub(super) fn gpu_parts(&self, mode: &Mode) -> Result<Vec<GpuPart>, RuntimeError> {
        if self.gpus.is_empty() {
            return Ok(vec![]);
        }
        let options = &self.options;
        let shape = model_shape(self.hyper, self.tensors, options.n_ctx);
        let rooms: Vec<GpuRoom> = self.gpus.iter().map(|(gpu, _)| gpu.room).collect();
        let request = GpuRequest {
            shape: &shape.map_err(|source| self.in_model(source))?,
            tensors: self.tensors,
            sparsity: &mode.sparsity,
            predictors: mode.predictors.as_deref(),
            profile: self.profile.as_ref(),
            kv_type: options.kv_type,
            n_ubatch: options.n_batch.min(N_UBATCH),
            mode: options.cpu.mode(),
            groups_max: FFN_GROUPS,
            layers: 0..self.hyper.n_layer,
            replans: (self.gpus.iter()).any(|(gpu, _)| options.replan.unwrap_or(gpu.replan) > 0),
        };
        match choose_on(&rooms, &request) {
            Ok(parts) => Ok(parts),
            Err(error) if self.gpus.iter().any(|(gpu, _)| gpu.required) => {
                Err(self.in_model(error.into()))
            }
            Err(error) => {
                let mode = mode.sparsity.mode.name();
                tracing::warn!("{mode}: {error}; the host computes in its place");
                Ok(vec![])
            }
        }
    }

    /// A token and a prompt with these parts of the model on GPUs; none where nothing is.
    pub(super) fn on_gpus(
        &self,
        mode: &Mode,
        parts: &[GpuPart],
        layers: &[LayerBytes],
        (costs, memory): (&Costs, &[NodeMemory]),
    ) -> Result<Option<GpuForecast>, RuntimeError> {
        if parts.is_empty() {
            return Ok(None);
        }
        let hot: Vec<HotLayer> = parts.iter().flat_map(|part| part.hot.clone()).collect();
        let loader = self.loader(mode, Some(&hot))?;
        let ids = (0..self.hyper.n_layer).map(|layer| loader.neuron_ids(layer));
        let loads = self.loads(mode, layers);
        let machine = self.machine(&loads, costs, memory, &self.loader(mode, None)?);
        let other = self.other_bytes();
        let streamed = parts.iter().map(|part| part.layers.clone());
        let on_gpus = OnGpus {
            gpus: &self.gpus,
            parts,
            loads: &self.gpu_loads(mode, parts, loads, other.kv),
            cold_ids: &ids.collect::<Vec<_>>(),
            divisible: (mode.sparsity.down.iter()).all(|down| !matches!(down, DownPlan::Dense(_))),
            nodes: &machine.nodes,
            head_bytes: other.head,
            streamed_bytes: streamed
                .map(|layers| loader.streamed_bytes(layers))
                .collect(),
            streamed_from: streamed_tokens_min(mode.sparsity.predicts),
            n_batch: self.options.n_batch.min(N_UBATCH),
            n_ctx: self.options.n_ctx,
        };
        Ok(Some(on_gpus.forecast()?))
    }

    /// The same loads for GPUs, which have all of a neuron and read the cache and predictors.
    fn gpu_loads(
        &self,
        mode: &Mode,
        parts: &[GpuPart],
        mut loads: Vec<LayerLoad>,
        kv_bytes: u64,
    ) -> Vec<LayerLoad> {
        let shares = &self.expected.shares;
        let whole = layer_bytes(self.hyper, self.tensors, &mode.sparsity, None, shares);
        let n_layer = loads.len().max(1) as u64;
        let named_alone = |index: usize| {
            let predictors = mode.predictors.as_ref();
            let ahead = predictors.and_then(|all| all[index].ahead.as_ref());
            ahead.is_some_and(|ahead| ahead.alone)
        };
        for part in parts {
            let predictor_bytes = part.memory.predictors / part.layers.len().max(1);
            for index in part.layers.clone() {
                let (load, layer) = (&mut loads[index], &whole[index]);
                let n = load.frequencies.len().max(1);
                load.bundle_bytes = (layer.gate + layer.neurons) / n as u64;
                load.fixed_bytes += kv_bytes / n_layer + predictor_bytes as u64;
                // nothing predicts a GPU's first layer
                if named_alone(index) && index > part.layers.start {
                    // gates of those that are named, who are more than fire
                    let fire = self.expected.frequencies.active(index) / n as f64;
                    let named = (shares[index].candidates / fire.max(f64::MIN_POSITIVE)).max(1.0);
                    let bytes = layer.neurons as f64 + layer.gate as f64 * named;
                    load.scanned_bytes = 0;
                    load.active_bytes = bytes as u64 / n as u64;
                }
            }
        }
        loads
    }
}
