//! A token and a prompt with GPUs as the device, from what their hot neurons, the host's nodes and the links take.
//!
//! Pure functions of numbers, but for [`PlannedGpu::open_all`]: bytes over speeds, as [`pi_topology::placement`] has them.

use std::ops::Range;

use pi_topology::placement::{
    ColdShare, DeviceSpeed, LayerLoad, LayerPlacement, MachineSpeed, NodeSpeed, Part,
    PlacementError, TokenTime, solve,
};
use pi_topology::{GpuSync, Plan};

use super::link::LinkFigures;
use crate::model::gpu::{GpuModelError, GpuPart, GpuRoom};
use crate::session::open_all;

/// Tokens of the prompt that is forecast, where the context has room for them.
const PROMPT_TOKENS: usize = 512;

/// What hot sets of single neurons, by what was measured, have to save before they are worth a line, ms a token.
const SAVED_MS_MIN: f64 = 0.05;

/// A GPU that a model is planned for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedGpu {
    /// Number among the driver's GPUs.
    pub ordinal: usize,
    /// Name.
    pub name: String,
    /// What may be used of its memory.
    pub room: GpuRoom,
    /// How it and the host wait for each other.
    pub sync: GpuSync,
    /// Whether a model that does not go there is an error; else the host computes in its place.
    pub required: bool,
    /// After how many tokens its neurons change places with the host's; 0: never.
    pub replan: usize,
}

impl PlannedGpu {
    /// The plan's GPUs, each opened for a moment to see what is free; none where one cannot be used and none is required.
    ///
    /// # Errors
    /// What the driver says of a required one.
    pub fn open_all(plan: &Plan) -> Result<Vec<Self>, GpuModelError> {
        let opened = match open_all(&plan.gpus) {
            Ok(opened) => opened,
            Err(error) if plan.gpus.iter().any(|gpu| gpu.required) => return Err(error),
            Err(error) => {
                tracing::warn!("{error}; the host computes in its place");
                return Ok(vec![]);
            }
        };
        let planned = opened.iter().zip(&plan.gpus).map(|(gpu, config)| {
            let info = gpu.device.info();
            Self {
                ordinal: info.ordinal,
                name: info.name.clone(),
                room: gpu.room,
                sync: config.sync,
                required: config.required,
                replan: config.replan,
            }
        });
        Ok(planned.collect())
    }
}

/// A mode with GPUs as the device.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuForecast {
    /// GPUs that are used: their layers, and their hot neurons with all neurons of these.
    pub gpus: Vec<(Range<usize>, [usize; 2])>,
    /// A token's parts in ms, the longest first.
    pub parts: Vec<(Part, f64)>,
    /// What hot sets of single neurons, which the solver finds by what was measured, would save of a token, ms, where it is
    /// worth a line.
    pub saved_ms: Option<f64>,
    /// A prompt.
    pub prompt: PromptForecast,
}

/// How a prompt gets at cold neurons.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PromptForecast {
    /// There are none.
    AllHot,
    /// They are streamed to the GPUs.
    Streamed {
        /// Tokens of the prompt.
        n_tokens: usize,
        /// Bytes that pass the links.
        bytes: u64,
        /// What that takes at the links' speed, ms: the prompt takes no less.
        ms: f64,
    },
    /// Token by token on the host: too few tokens go together.
    TokenByToken,
}

impl GpuForecast {
    /// A token's time, ms.
    pub fn token_ms(&self) -> f64 {
        self.parts.iter().map(|(_, ms)| ms).sum()
    }

    /// Tokens decoded in a second.
    pub fn tokens_per_s(&self) -> f64 {
        1e3 / self.token_ms()
    }

    /// Hand-offs of all layers, ms.
    pub fn hand_off_ms(&self) -> f64 {
        let hand_offs = self.parts.iter();
        let hand_offs = hand_offs.filter(|(part, _)| *part == Part::HandOff);
        hand_offs.map(|(_, ms)| ms).sum()
    }

    /// Share of all neurons that are hot.
    pub fn hot_share(&self) -> f64 {
        let sum = |which: usize| self.gpus.iter().map(|(_, n)| n[which]).sum::<usize>();
        sum(0) as f64 / sum(1).max(1) as f64
    }
}

/// What a forecast is made of.
pub(super) struct OnGpus<'a> {
    pub gpus: &'a [(PlannedGpu, LinkFigures)],
    /// What the loader gives each of the first ones.
    pub parts: &'a [GpuPart],
    /// All layers, with the cache and the predictors that they read.
    pub loads: &'a [LayerLoad],
    /// Cold neurons, `[n_layer][n_nodes]`, as the loader has them.
    pub cold_ids: &'a [Vec<Vec<u32>>],
    /// Whether any neuron may be hot alone; else only all of a layer.
    pub divisible: bool,
    pub nodes: &'a [NodeSpeed],
    pub head_bytes: u64,
    /// By GPU, bytes of cold neurons.
    pub streamed_bytes: Vec<u64>,
    /// Tokens from which they are.
    pub streamed_from: usize,
    /// Tokens of a prompt that go together, and of the context.
    pub n_batch: usize,
    pub n_ctx: usize,
}

impl OnGpus<'_> {
    /// Adds it all up.
    ///
    /// # Errors
    /// The solver's.
    pub fn forecast(&self) -> Result<GpuForecast, PlacementError> {
        let mut gpus = Vec::with_capacity(self.parts.len());
        let mut parts: Vec<(Part, f64)> = Vec::new();
        let mut saved_s = 0.0;
        for (index, part) in self.parts.iter().enumerate() {
            let layers = part.layers.clone();
            let loads = &self.loads[layers.clone()];
            let machine = self.machine(index);
            let loaded: Vec<LayerPlacement> = (layers.clone())
                .map(|layer| placement(&self.cold_ids[layer], loads[0].frequencies.len()))
                .collect();
            let head_bytes = match layers.end == self.loads.len() {
                true => self.head_bytes,
                false => 0,
            };
            // no node has whole groups
            let time = |placements: &[LayerPlacement]| {
                TokenTime::of(loads, placements, &machine, &[], head_bytes)
            };
            let token = time(&loaded);
            for (part, seconds) in token.parts() {
                add(&mut parts, on_device(part, index), seconds * 1e3);
            }
            if self.divisible && !self.is_limited(index) {
                let solved = solve(loads, &machine, &[])?;
                saved_s += token.total_s() - time(&solved).total_s();
            }
            let n_hot = loaded.iter().map(|layer| layer.hot_ids[0].len()).sum();
            let n_all = loads.iter().map(|load| load.frequencies.len()).sum();
            gpus.push((layers, [n_hot, n_all]));
        }
        parts.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let saved_ms = saved_s * 1e3;
        Ok(GpuForecast {
            gpus,
            parts,
            saved_ms: (saved_ms > SAVED_MS_MIN).then_some(saved_ms),
            prompt: self.prompt(),
        })
    }

    /// Whether not all of a layer's neurons may be hot.
    fn is_limited(&self, index: usize) -> bool {
        self.gpus[index].0.room.groups_max < pi_kernels::ffn_sparse::FFN_GROUPS
    }

    /// A GPU's layers, and all nodes with their part of them.
    fn machine(&self, index: usize) -> MachineSpeed {
        let part = &self.parts[index];
        let share = part.layers.len() as f64 / self.loads.len().max(1) as f64;
        let node = |node: &NodeSpeed| NodeSpeed {
            budget_bytes: (node.budget_bytes as f64 * share) as u64,
            ..node.clone()
        };
        MachineSpeed {
            devices: vec![DeviceSpeed {
                bytes_per_s: self.gpus[index].1.memory_bytes_per_s.value,
                launch_s: self.gpus[index].1.launch_s.value,
                budget_bytes: part.memory.room() as u64,
                // hot neurons are in one arena
                granule_bytes: 1,
            }],
            nodes: self.nodes.iter().map(node).collect(),
            hand_off_s: self.gpus[index].1.hand_off_s.value,
        }
    }

    fn prompt(&self) -> PromptForecast {
        let bytes = &self.streamed_bytes;
        if bytes.iter().all(|&bytes| bytes == 0) {
            return PromptForecast::AllHot;
        }
        let (n_steps, n_tokens) = streamed_steps(
            PROMPT_TOKENS.min(self.n_ctx),
            self.n_batch,
            self.streamed_from,
        );
        if n_steps == 0 {
            return PromptForecast::TokenByToken;
        }
        // one GPU after the other
        let links = self
            .gpus
            .iter()
            .map(|(_, link)| link.to_device_bytes_per_s.value);
        let step_s: f64 = (bytes.iter().zip(links))
            .map(|(&bytes, bytes_per_s)| bytes as f64 / bytes_per_s)
            .sum();
        PromptForecast::Streamed {
            n_tokens,
            bytes: n_steps as u64 * bytes.iter().sum::<u64>(),
            ms: n_steps as f64 * step_s * 1e3,
        }
    }
}

/// Steps of a prompt, of at least `from` tokens, for each of which cold neurons are streamed, and the tokens of these.
fn streamed_steps(n_tokens: usize, n_batch: usize, from: usize) -> (usize, usize) {
    let n_batch = n_batch.max(1);
    let sizes = (0..n_tokens).step_by(n_batch);
    let sizes = sizes.map(|start| n_batch.min(n_tokens - start));
    sizes
        .filter(|&size| size >= from)
        .fold((0, 0), |(n, sum), size| (n + 1, sum + size))
}

/// A layer of which nodes have these neurons, and one GPU the others.
fn placement(cold_ids: &[Vec<u32>], n_neurons: usize) -> LayerPlacement {
    let mut is_hot = vec![true; n_neurons];
    for &id in cold_ids.iter().flatten() {
        is_hot[id as usize] = false;
    }
    let ids = 0..n_neurons as u32;
    LayerPlacement {
        hot_ids: vec![ids.filter(|&id| is_hot[id as usize]).collect()],
        cold: cold_ids.iter().cloned().map(ColdShare::Ids).collect(),
    }
}

/// The part with the GPU's own number in place of the only one's.
fn on_device(part: Part, device: usize) -> Part {
    match part {
        Part::Hot { .. } => Part::Hot { device },
        other => other,
    }
}

fn add(parts: &mut Vec<(Part, f64)>, part: Part, ms: f64) {
    match parts.iter_mut().find(|(known, _)| *known == part) {
        Some((_, sum)) => *sum += ms,
        None => parts.push((part, ms)),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::link::Figure;
    use super::*;
    use crate::model::gpu::{GpuMemory, HotLayer};

    /// A GPU of 24 GiB.
    pub(in crate::plan) fn gpu(ordinal: usize) -> PlannedGpu {
        PlannedGpu {
            ordinal,
            name: "Some GPU".to_owned(),
            room: GpuRoom {
                budget: 24 << 30,
                overhead: 0,
                groups_max: 16,
            },
            sync: GpuSync::Flags,
            required: false,
            replan: 0,
        }
    }

    fn figure(value: f64) -> Figure {
        Figure {
            value,
            measured: None,
        }
    }

    fn link(to_device_bytes_per_s: f64, hand_off_s: f64) -> LinkFigures {
        LinkFigures {
            to_device_bytes_per_s: figure(to_device_bytes_per_s),
            hand_off_s: figure(hand_off_s),
            memory_bytes_per_s: figure(1e12),
            launch_s: figure(0.0),
        }
    }

    /// `n_hot` neurons have room.
    fn part(layers: Range<usize>, n_hot: usize) -> GpuPart {
        GpuPart {
            hot: vec![HotLayer::default(); layers.len()],
            layers,
            memory: GpuMemory {
                budget: n_hot * 3000,
                ..GpuMemory::default()
            },
        }
    }

    /// Four neurons that always fire, of 3000 bytes.
    fn load() -> LayerLoad {
        LayerLoad {
            fixed_bytes: 1_000_000,
            scanned_bytes: 1000,
            active_bytes: 2000,
            bundle_bytes: 3000,
            frequencies: vec![1.0; 4],
        }
    }

    fn node() -> NodeSpeed {
        NodeSpeed {
            bytes_per_s: 1e9,
            budget_bytes: 1 << 40,
            granule_bytes: 1,
        }
    }

    fn on_gpus<'a>(
        gpus: &'a [(PlannedGpu, LinkFigures)],
        parts: &'a [GpuPart],
        loads: &'a [LayerLoad],
        cold_ids: &'a [Vec<Vec<u32>>],
        nodes: &'a [NodeSpeed],
    ) -> OnGpus<'a> {
        OnGpus {
            gpus,
            parts,
            loads,
            cold_ids,
            divisible: true,
            nodes,
            head_bytes: 4_000_000,
            streamed_bytes: vec![6000; parts.len()],
            streamed_from: 32,
            n_batch: 512,
            n_ctx: 4096,
        }
    }

    fn near(found: f64, expected: f64) {
        let error = (found - expected).abs();
        assert!(error < 1e-9 * expected.abs(), "{found}, not {expected}");
    }

    #[test]
    fn a_hand_off_is_paid_by_every_layer_with_cold_neurons() {
        let (loads, nodes) = (vec![load(); 3], [node()]);
        // layers 0 and 2 have two cold neurons, layer 1 none
        let cold = [vec![vec![1, 3]], vec![vec![]], vec![vec![0, 1]]];
        let parts = [part(0..3, 8)];
        let found = |hand_off_s: f64| {
            let gpus = [(gpu(0), link(1e9, hand_off_s))];
            on_gpus(&gpus, &parts, &loads, &cold, &nodes)
                .forecast()
                .unwrap()
        };
        let forecast = found(7e-6);
        assert_eq!(forecast.gpus, [(0..3, [8, 12])]);
        near(forecast.hand_off_ms(), 2.0 * 7e-3);
        near(forecast.hot_share(), 8.0 / 12.0);
        // attention of three layers and the head by the GPU; two layers wait for 6000 bytes of the node, one for 12000 of
        // the GPU
        let expected = [
            (Part::Cold { node: 0 }, 12e-3),
            (Part::HandOff, 14e-3),
            (Part::Head, 4e-3),
            (Part::Fixed, 3e-3),
            (Part::Hot { device: 0 }, 12e-6),
        ];
        for (part, ms) in expected {
            let known = forecast.parts.iter().find(|(known, _)| *known == part);
            near(known.unwrap().1, ms);
        }
        near(forecast.token_ms(), 12e-3 + 14e-3 + 4e-3 + 3e-3 + 12e-6);
        assert!(forecast.parts.is_sorted_by(|a, b| a.1 >= b.1));
        // a figure more is a token longer by as much for each of both layers
        near(found(1e-3).token_ms() - found(0.0).token_ms(), 2.0);
    }

    #[test]
    fn what_the_solver_saves_goes_by_the_hand_off() {
        let (loads, nodes) = (vec![load(); 2], [node()]);
        // room for four neurons; two of each layer are hot
        let cold = vec![vec![vec![2, 3]]; 2];
        let parts = [part(0..2, 4)];
        let found = |hand_off_s: f64, groups_max: usize| {
            let mut gpu = gpu(0);
            gpu.room.groups_max = groups_max;
            let gpus = [(gpu, link(1e9, hand_off_s))];
            let all = on_gpus(&gpus, &parts, &loads, &cold, &nodes);
            all.forecast().unwrap().saved_ms
        };
        // one layer whole and the other cold saves one of two hand-offs; nothing else, up to nanoseconds
        let saved_ms = found(1e-3, 16).unwrap();
        assert!((saved_ms - 1.0).abs() < 1e-4, "{saved_ms}");
        assert_eq!(found(7e-6, 16), None);
        // hot sets that may not be so large are not compared
        assert_eq!(found(1e-3, 8), None);
    }

    #[test]
    fn a_prompt_takes_what_passes_each_link() {
        let (loads, nodes) = (vec![load(); 2], [node()]);
        let cold = vec![vec![vec![2, 3]]; 2];
        let parts = [part(0..1, 2), part(1..2, 2)];
        let gpus = [(gpu(0), link(1e9, 0.0)), (gpu(1), link(3e9, 0.0))];
        let prompt = |change: fn(&mut OnGpus<'_>)| {
            let mut all = on_gpus(&gpus, &parts, &loads, &cold, &nodes);
            change(&mut all);
            all.forecast().unwrap().prompt
        };
        let PromptForecast::Streamed {
            n_tokens,
            bytes,
            ms,
        } = prompt(|_| {})
        else {
            panic!("streamed")
        };
        assert_eq!((n_tokens, bytes), (512, 12_000));
        near(ms, 6e-3 + 2e-3);
        let halves = prompt(|all| all.n_batch = 256);
        let twice = PromptForecast::Streamed {
            n_tokens: 512,
            bytes: 24_000,
            ms: 2.0 * ms,
        };
        assert_eq!(halves, twice);
        let short = prompt(|all| all.n_ctx = 100);
        assert!(matches!(
            short,
            PromptForecast::Streamed { n_tokens: 100, .. }
        ));
        let hot = prompt(|all| all.streamed_bytes = vec![0; 2]);
        assert_eq!(hot, PromptForecast::AllHot);
        for change in [(|all| all.n_batch = 31) as fn(&mut OnGpus<'_>), |all| {
            all.n_ctx = 31
        }] {
            assert_eq!(prompt(change), PromptForecast::TokenByToken);
        }
    }

    #[test]
    fn steps_too_short_to_stream_for_are_left_out() {
        assert_eq!(streamed_steps(512, 512, 32), (1, 512));
        assert_eq!(streamed_steps(512, 500, 32), (1, 500));
        assert_eq!(streamed_steps(512, 500, 8), (2, 512));
        assert_eq!(streamed_steps(512, 480, 32), (2, 512));
        assert_eq!(streamed_steps(512, 1, 8), (0, 0));
    }
}
