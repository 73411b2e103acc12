//! A model's part on GPUs: whether there are some, and what goes there.

use std::ops::Range;

use pi_actors::gpu::weights::{GpuSync, GpuWeights};
use pi_kernels::cuda::Device;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::{GpuConfig, Plan, VramBudget};

use super::opening::ModelOptions;
use crate::head_sketch::Head;
use crate::model::gpu::{GpuLayout, GpuMemory, GpuModelError, GpuRequest, HotLayer, choose, split};
use crate::model::node_memory::NodeThreads;
use crate::model::{ModelError, Sparsity};

/// GPUs that are the device of a model, and which neurons are hot.
#[derive(Debug)]
pub(super) struct OnGpus {
    gpus: Vec<OnGpu>,
}

/// One of them.
#[derive(Debug)]
struct OnGpu {
    device: Device,
    sync: GpuSync,
    layers: Range<usize>,
    hot: Vec<HotLayer>,
    memory: GpuMemory,
}

/// A GPU before it is known what goes there.
struct Opened {
    device: Device,
    sync: GpuSync,
    budget: usize,
    overhead: usize,
    groups_max: usize,
}

impl OnGpus {
    /// Chooses what goes to the plan's GPUs: to as few as hold all, else to all of them; none where there is no GPU in it, or one
    /// that is not required and cannot be used.
    ///
    /// # Errors
    /// A required GPU cannot be used.
    pub fn choose(
        options: &ModelOptions,
        plan: &Plan,
        request: &GpuRequest<'_>,
    ) -> Result<Option<Self>, ModelError> {
        if plan.gpus.is_empty() {
            return Ok(None);
        }
        match Self::try_choose(options, &plan.gpus, request) {
            Ok(gpus) => Ok(Some(gpus)),
            Err(error) if plan.gpus.iter().any(|gpu| gpu.required) => Err(error.into()),
            Err(error) => {
                tracing::warn!("{error}; the host computes in its place");
                Ok(None)
            }
        }
    }

    fn try_choose(
        options: &ModelOptions,
        configs: &[GpuConfig],
        request: &GpuRequest<'_>,
    ) -> Result<Self, GpuModelError> {
        let refusal = if request.sparsity.mode == Sparsity::Threshold {
            Some(("--sparsity threshold", "take --sparsity off"))
        } else if options.head == Head::Sparse {
            Some(("--head sparse", "take --head full"))
        } else if options.tap.is_some() {
            Some(("looking at hidden states", "prepare the model on the host"))
        } else {
            None
        };
        if let Some((what, cure)) = refusal {
            return Err(GpuModelError::Mode { what, cure });
        }
        let opened = configs
            .iter()
            .enumerate()
            .map(|(n, config)| open(n, config));
        let opened: Vec<Opened> = opened.collect::<Result<_, _>>()?;
        let n_max = opened.len().min(request.shape.n_layer);
        let mut chosen = Self::on(&opened[..1], request);
        for n in 2..=n_max {
            if chosen.as_ref().is_ok_and(Self::has_all) {
                break;
            }
            chosen = Self::on(&opened[..n], request);
        }
        let unused = configs.len() - chosen.as_ref().map_or(0, |chosen| chosen.gpus.len());
        if unused > 0 && chosen.is_ok() {
            tracing::info!("{unused} of {} GPUs are not needed", configs.len());
        }
        chosen
    }

    /// Chooses for these GPUs.
    fn on(opened: &[Opened], request: &GpuRequest<'_>) -> Result<Self, GpuModelError> {
        let rooms = opened
            .iter()
            .map(|gpu| gpu.budget.saturating_sub(gpu.overhead));
        let ranges = split(request.shape.n_layer, &rooms.collect::<Vec<_>>());
        let gpus = opened.iter().zip(ranges).map(|(gpu, layers)| {
            let request = GpuRequest {
                groups_max: gpu.groups_max,
                layers: layers.clone(),
                ..request.clone()
            };
            let (hot, memory) = choose(&request, gpu.budget, gpu.overhead)?;
            Ok(OnGpu {
                device: gpu.device.clone(),
                sync: gpu.sync,
                layers,
                hot,
                memory,
            })
        });
        let gpus = gpus.collect::<Result<_, GpuModelError>>()?;
        Ok(Self { gpus })
    }

    /// Whether all neurons that may be hot are.
    fn has_all(&self) -> bool {
        let hot = self.gpus.iter().flat_map(|gpu| &gpu.hot);
        hot.map(|layer| layer.groups).min() == Some(FFN_GROUPS)
    }

    /// All layers' neurons.
    pub fn hot(&self) -> Vec<HotLayer> {
        self.gpus.iter().flat_map(|gpu| gpu.hot.clone()).collect()
    }

    /// What lies where, by GPU.
    pub fn layouts<'a>(&'a self, request: &GpuRequest<'a>) -> Vec<GpuLayout<'a>> {
        let layout = |gpu: &'a OnGpu| {
            let layers = gpu.layers.clone();
            let request = GpuRequest {
                layers,
                ..request.clone()
            };
            GpuLayout::new(&request, &gpu.hot)
        };
        self.gpus.iter().map(layout).collect()
    }

    /// Copies everything. `progress` is called from all threads with the bytes that are there.
    ///
    /// # Errors
    /// As [`GpuLayout::load`].
    pub fn load(
        &self,
        layouts: &[GpuLayout<'_>],
        threads: &dyn NodeThreads,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<GpuWeights>, ModelError> {
        let mut before = 0;
        let mut loaded = Vec::new();
        for (gpu, layout) in self.gpus.iter().zip(layouts) {
            let copied = |bytes| progress(before + bytes);
            loaded.push(layout.load(&gpu.device, gpu.sync, threads, &copied)?);
            before += layout.bytes as u64;
        }
        Ok(loaded)
    }

    /// Says what lies where; `bytes` are taken on each GPU.
    pub fn log(&self, bytes: &[usize]) {
        for (gpu, bytes) in self.gpus.iter().zip(bytes) {
            let hot: usize = gpu.hot.iter().map(|layer| layer.groups).sum();
            tracing::info!(
                gpu = gpu.device.info().name,
                layers = ?gpu.layers,
                mib = bytes >> 20,
                hot_groups = hot,
                of = gpu.hot.len() * FFN_GROUPS,
                "on the GPU:\n{}",
                gpu.memory
            );
        }
    }
}

/// Opens the GPU that a config names, or the `n`th one.
fn open(n: usize, config: &GpuConfig) -> Result<Opened, GpuModelError> {
    let device = match &config.pci_address {
        Some(address) => Device::open_at(address)?,
        None => Device::open(n)?,
    };
    let total = device.info().memory_bytes;
    let overhead = total.saturating_sub(device.free_bytes()?);
    let budget = match config.vram_budget {
        VramBudget::All => total,
        VramBudget::Bytes(bytes) => usize::try_from(bytes.0).unwrap_or(usize::MAX).min(total),
    };
    Ok(Opened {
        device,
        sync: match config.sync {
            pi_topology::GpuSync::Flags => GpuSync::Flags,
            pi_topology::GpuSync::Events => GpuSync::Events,
        },
        budget,
        overhead,
        groups_max: FFN_GROUPS * usize::from(config.hot_percent_max) / 100,
    })
}
