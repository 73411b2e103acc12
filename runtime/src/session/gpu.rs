//! A model's part on a GPU: whether there is one, and what goes there.

use pi_kernels::cuda::Device;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::{GpuConfig, GpuSync, Plan, VramBudget};

use super::opening::ModelOptions;
use crate::head_sketch::Head;
use crate::model::gpu::{GpuMemory, GpuModelError, GpuRequest, HotLayer, choose};
use crate::model::{ModelError, Sparsity};

/// A GPU that is the device of a model, and which neurons are hot.
#[derive(Debug)]
pub(super) struct OnGpu {
    pub device: Device,
    pub hot: Vec<HotLayer>,
    memory: GpuMemory,
}

impl OnGpu {
    /// Chooses what goes to the plan's GPU; none where there is no GPU in it, or one that is not required and cannot be used.
    ///
    /// # Errors
    /// A required GPU cannot be used.
    pub fn choose(
        options: &ModelOptions,
        plan: &Plan,
        request: GpuRequest<'_>,
    ) -> Result<Option<Self>, ModelError> {
        let Some(config) = plan.gpus.first() else {
            return Ok(None);
        };
        if plan.gpus.len() > 1 {
            tracing::warn!(
                "{} GPUs are asked for, the first one is used",
                plan.gpus.len()
            );
        }
        match Self::try_choose(options, config, request) {
            Ok(on_gpu) => Ok(Some(on_gpu)),
            Err(error) if config.required => Err(error.into()),
            Err(error) => {
                tracing::warn!("{error}; the host computes in its place");
                Ok(None)
            }
        }
    }

    fn try_choose(
        options: &ModelOptions,
        config: &GpuConfig,
        request: GpuRequest<'_>,
    ) -> Result<Self, GpuModelError> {
        let refusal = if request.sparsity.mode == Sparsity::Threshold {
            Some(("--sparsity threshold", "take --sparsity off"))
        } else if options.head == Head::Sparse {
            Some(("--head sparse", "take --head full"))
        } else if config.sync == GpuSync::Events {
            Some(("sync = \"events\"", "take sync = \"flags\""))
        } else if options.tap.is_some() {
            Some(("looking at hidden states", "prepare the model on the host"))
        } else {
            None
        };
        if let Some((what, cure)) = refusal {
            return Err(GpuModelError::Mode { what, cure });
        }
        let device = match &config.pci_address {
            Some(address) => Device::open_at(address)?,
            None => Device::open(0)?,
        };
        let total = device.info().memory_bytes;
        let overhead = total.saturating_sub(device.free_bytes()?);
        let budget = match config.vram_budget {
            VramBudget::All => total,
            VramBudget::Bytes(bytes) => usize::try_from(bytes.0).unwrap_or(usize::MAX).min(total),
        };
        let groups_max = FFN_GROUPS * usize::from(config.hot_percent_max) / 100;
        let request = GpuRequest {
            groups_max,
            ..request
        };
        let (hot, memory) = choose(request, budget, overhead)?;
        Ok(Self {
            device,
            hot,
            memory,
        })
    }

    /// Says what lies where.
    pub fn log(&self, bytes: usize) {
        let hot: usize = self.hot.iter().map(|layer| layer.groups).sum();
        tracing::info!(
            gpu = self.device.info().name,
            mib = bytes >> 20,
            hot_groups = hot,
            of = self.hot.len() * FFN_GROUPS,
            "on the GPU:\n{}",
            self.memory
        );
    }
}
