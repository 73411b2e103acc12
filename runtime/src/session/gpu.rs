//! A model's part on GPUs: whether there are some, and what goes there.

use pi_actors::gpu::streamed_tokens_min;
use pi_actors::gpu::weights::{GpuSync, GpuWeights};
use pi_kernels::cuda::Device;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_topology::{GpuConfig, Plan, VramBudget};

use super::opening::ModelOptions;
use crate::head_sketch::Head;
use crate::model::gpu::{
    GpuLayout, GpuModelError, GpuPart, GpuRequest, GpuRoom, HotLayer, choose_on,
};
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
    part: GpuPart,
}

/// A GPU before it is known what goes there.
pub(crate) struct OpenGpu {
    pub device: Device,
    pub sync: GpuSync,
    pub room: GpuRoom,
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
        match Self::try_choose(options, plan, request) {
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
        plan: &Plan,
        request: &GpuRequest<'_>,
    ) -> Result<Self, GpuModelError> {
        let configs = &plan.gpus;
        let refusal = if request.sparsity.mode == Sparsity::Threshold {
            Some(("--sparsity threshold", "take --sparsity off"))
        } else if options.head == Head::Sparse {
            Some(("--head sparse", "take --head full"))
        } else if options.tap.is_some() && request.n_ubatch < streamed_tokens_min(false) {
            let what = "looking at hidden states of so few tokens at a time";
            Some((what, "take a larger -b"))
        } else {
            None
        };
        if let Some((what, cure)) = refusal {
            return Err(GpuModelError::Mode { what, cure });
        }
        let opened = open_all(configs)?;
        let rooms: Vec<GpuRoom> = opened.iter().map(|gpu| gpu.room).collect();
        let parts = choose_on(&rooms, request)?;
        let unused = configs.len() - parts.len();
        if unused > 0 {
            tracing::info!("{unused} of {} GPUs are not needed", configs.len());
        }
        for gpu in opened.iter().take(parts.len()) {
            let address = &gpu.device.info().pci_address;
            let numa = pi_topology::gpu_node(address);
            if let Some(problem) = far_team(address, numa, plan) {
                tracing::warn!("{problem}");
            }
        }
        let gpus = opened.into_iter().zip(parts);
        Ok(Self {
            gpus: gpus
                .map(|(gpu, part)| OnGpu {
                    device: gpu.device,
                    sync: gpu.sync,
                    part,
                })
                .collect(),
        })
    }

    /// All layers' neurons.
    pub fn hot(&self) -> Vec<HotLayer> {
        (self.gpus.iter())
            .flat_map(|gpu| gpu.part.hot.clone())
            .collect()
    }

    /// What lies where, by GPU.
    pub fn layouts<'a>(&'a self, request: &GpuRequest<'a>) -> Vec<GpuLayout<'a>> {
        let layout = |gpu: &'a OnGpu| {
            let layers = gpu.part.layers.clone();
            let request = GpuRequest {
                layers,
                ..request.clone()
            };
            GpuLayout::new(&request, &gpu.part.hot)
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
            let part = &gpu.part;
            let hot: usize = part.hot.iter().map(|layer| layer.groups).sum();
            tracing::info!(
                gpu = gpu.device.info().name,
                layers = ?part.layers,
                mib = bytes >> 20,
                hot_groups = hot,
                of = part.hot.len() * FFN_GROUPS,
                "on the GPU:\n{}",
                part.memory
            );
        }
    }
}

/// What to do where a GPU hangs on another NUMA node than the team that drives it, of which its flags would cross the
/// link between them.
fn far_team(address: &str, numa: Option<usize>, plan: &Plan) -> Option<String> {
    let (gpu, team) = numa.zip(plan.nodes.first()?.numa)?;
    if gpu == team {
        return None;
    }
    let has_team = plan.nodes.iter().any(|node| node.numa == Some(gpu));
    let cure = match has_team {
        true => format!("list the team of NUMA node {gpu} first ([[host.node]])"),
        false => format!("give NUMA node {gpu} a team, the first ([[host.node]])"),
    };
    Some(format!(
        "GPU {address} hangs on NUMA node {gpu}, but the team that drives it is on NUMA node {team}: {cure}"
    ))
}

/// Opens the GPUs that configs name.
///
/// # Errors
/// The driver's.
pub(crate) fn open_all(configs: &[GpuConfig]) -> Result<Vec<OpenGpu>, GpuModelError> {
    let configs = configs.iter().enumerate();
    configs.map(|(n, config)| open_gpu(n, config)).collect()
}

/// Opens the GPU that a config names, or the `n`th one.
///
/// # Errors
/// The driver's.
pub(crate) fn open_gpu(n: usize, config: &GpuConfig) -> Result<OpenGpu, GpuModelError> {
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
    Ok(OpenGpu {
        device,
        sync: match config.sync {
            pi_topology::GpuSync::Flags => GpuSync::Flags,
            pi_topology::GpuSync::Events => GpuSync::Events,
        },
        room: GpuRoom {
            budget,
            overhead,
            groups_max: FFN_GROUPS * usize::from(config.hot_percent_max) / 100,
        },
    })
}

#[cfg(test)]
mod tests {
    use pi_topology::{HugePages, NodePlan};

    use super::*;

    #[test]
    fn a_gpu_on_another_node_than_its_team_is_named() {
        let plan = |numas: &[Option<usize>]| {
            let team = |&numa: &Option<usize>| NodePlan {
                numa,
                cpus: vec![0],
            };
            Plan::of_nodes(numas.iter().map(team).collect(), HugePages::Off)
        };
        let far = |numa, numas: &[Option<usize>]| far_team("0000:41:00.0", numa, &plan(numas));
        assert_eq!(far(Some(0), &[Some(0), Some(1)]), None);
        assert_eq!(
            far(Some(1), &[Some(0), Some(1)]).unwrap(),
            "GPU 0000:41:00.0 hangs on NUMA node 1, but the team that drives it is on NUMA node 0: list the team of NUMA node \
             1 first ([[host.node]])"
        );
        let text = far(Some(1), &[Some(0)]).unwrap();
        assert!(text.contains("give NUMA node 1 a team"), "{text}");
        assert_eq!(far(None, &[Some(0)]), None, "nobody knows");
        assert_eq!(far(Some(1), &[None]), None);
    }
}
