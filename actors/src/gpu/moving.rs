//! Neurons that change places between a GPU and the host, between two tokens.
#![allow(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use pi_kernels::KernelError;
use pi_kernels::cuda::{Device, MARK_TOKENS, Scatter, mark_words};

use super::error::GpuError;
use super::gpu_model::{GpuModel, locked};
use super::hot_counts::HotCounts;
use super::weights::GpuLayer;
use crate::model::Model;
use crate::replan::{
    ColdCounts, MOVED_BYTES_MAX, Place, Replan, Replans, SketchValue, Swap, Wish, bounded, wishes,
};
use crate::team::Team;

/// Counts are halved after so many tokens, or after each time where that is longer: enough to tell who fires more often, also where
/// neurons move every few tokens.
const REMEMBERED_TOKENS: usize = 64;

/// Bytes that go to the device together, and in how many pieces.
const SCATTER_BYTES: usize = 8 << 20;
const SCATTER_PIECES: usize = 16 << 10;

/// Bytes of device memory that re-planning takes where `n_layer` layers have up to `n_hot` hot neurons each, rounded up as the
/// driver gives memory.
pub fn replan_bytes(n_layer: usize, n_hot: usize) -> usize {
    /// What the driver gives large pieces in.
    const GRANULE: usize = 2 << 20;
    let words = n_layer * mark_words(n_hot);
    let pieces = [
        4 * words * MARK_TOKENS,
        4 * words * u32::BITS as usize,
        SCATTER_BYTES,
        16 * SCATTER_PIECES,
    ];
    pieces
        .map(|bytes| bytes.next_multiple_of(GRANULE))
        .iter()
        .sum()
}

/// Bytes of the GPU's arena, and what goes there.
type Pieces = Vec<(usize, Vec<u8>)>;

/// What re-planning keeps.
#[derive(Debug)]
pub(super) struct Moving {
    replan: Replan,
    pub hot: HotCounts,
    scatter: Scatter,
    /// Tokens since the last time, and since counts were halved.
    n_tokens: usize,
    n_remembered: usize,
    /// By layer how often each neuron fired, `[n_ff]` in the layer's order: what is longer ago counts less.
    fired: Vec<Vec<u32>>,
    /// Whether moving was broken off: nobody knows which weights are where.
    broken: bool,
}

impl Moving {
    /// For layers of `n_ff` neurons.
    pub fn new(
        device: &Device,
        layers: &[GpuLayer],
        n_ff: usize,
        replan: Replan,
    ) -> Result<Self, KernelError> {
        Ok(Self {
            replan,
            hot: HotCounts::new(device, layers)?,
            scatter: Scatter::new(device, SCATTER_BYTES, SCATTER_PIECES)?,
            n_tokens: 0,
            n_remembered: 0,
            fired: vec![vec![0; n_ff]; layers.len()],
            broken: false,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.hot.bytes() + self.scatter.bytes()
    }

    /// Adds what fired since the last time, of layers from `first` on.
    fn add_fired(&mut self, first: usize, hot: Vec<Vec<u32>>, cold: &ColdCounts) -> (u64, u64) {
        let sum = |counts: &[u32]| counts.iter().map(|count| u64::from(*count)).sum::<u64>();
        let (mut of_hot, mut of_all) = (0, 0);
        for (own, (fired, hot)) in self.fired.iter_mut().zip(hot).enumerate() {
            let cold = cold.take(first + own);
            assert_eq!(fired.len(), hot.len() + cold.len(), "a count a neuron");
            of_hot += sum(&hot);
            of_all += sum(&hot) + sum(&cold);
            for (fired, now) in fired.iter_mut().zip(hot.iter().chain(&cold)) {
                *fired = fired.saturating_add(*now);
            }
        }
        (of_hot, of_all)
    }

    /// Which neurons of each layer change places; the first `n_hot` of a layer are hot.
    fn decide(&self, first: usize, n_hot: &[usize], team: &mut Team) -> Vec<Vec<Swap>> {
        let n_layer = self.fired.len();
        let source = &self.replan.source;
        let bytes: Vec<Option<usize>> = (0..n_layer)
            .map(|own| source.swap_bytes(first + own))
            .collect();
        let wished: Vec<Mutex<Vec<Wish>>> = (0..n_layer).map(|_| Mutex::default()).collect();
        by_all(team, n_layer, &|own| {
            if bytes[own].is_some() {
                let (hot, cold) = self.fired[own].split_at(n_hot[own]);
                *locked(&wished[own]) = wishes(hot, cold);
            }
        });
        let wished: Vec<Vec<Wish>> = (wished.into_iter())
            .map(|wishes| wishes.into_inner().unwrap_or_default())
            .collect();
        let bytes: Vec<usize> = bytes.iter().map(|bytes| bytes.unwrap_or(0)).collect();
        bounded(&wished, &bytes, MOVED_BYTES_MAX)
    }

    /// Neurons are where their counts say; and what was counted counts half where that was long enough ago.
    fn age(&mut self, swaps: &[Vec<Swap>]) {
        self.n_remembered += self.replan.every;
        let halves = self.n_remembered >= REMEMBERED_TOKENS;
        if halves {
            self.n_remembered = 0;
        }
        for (fired, swaps) in self.fired.iter_mut().zip(swaps) {
            for swap in swaps {
                fired.swap(swap.hot as usize, swap.cold as usize);
            }
            if halves {
                fired.iter_mut().for_each(|count| *count /= 2);
            }
        }
    }
}

/// Runs `task` for each number below `n`, by all threads of the team.
fn by_all(team: &mut Team, n: usize, task: &(dyn Fn(usize) + Sync)) {
    let next = AtomicUsize::new(0);
    // files may be slow
    team.run_long(&|_| {
        let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < n);
        while let Some(number) = take() {
            task(number);
        }
    });
}

impl GpuModel {
    /// Whether its neurons change places.
    pub fn replans(&self) -> bool {
        self.moving.is_some()
    }

    /// Before the token at `position` starts.
    ///
    /// # Errors
    /// The driver's, or moving neurons was broken off before.
    pub(super) fn before_token(&self, position: usize) -> Result<(), GpuError> {
        let Some(moving) = &self.moving else {
            return Ok(());
        };
        self.check_whole()?;
        let moving = &mut *locked(moving);
        Ok(moving.hot.make_room(&self.stream, position)?)
    }

    /// Whether all neurons are where they should be.
    ///
    /// # Errors
    /// Moving them was broken off before.
    pub(super) fn check_whole(&self) -> Result<(), GpuError> {
        let moving = self.moving.as_ref();
        match moving.is_some_and(|moving| locked(moving).broken) {
            true => Err(GpuError::HalfMoved),
            false => Ok(()),
        }
    }

    /// Notes that the token at `position` is complete; after enough of them has neurons change places with the nodes of `model`,
    /// whose counts are `cold`. No step is under way, on any node.
    ///
    /// # Errors
    /// The driver's: the model cannot go on.
    pub fn end_token(
        &self,
        position: usize,
        model: &Model,
        cold: &ColdCounts,
        team: &mut Team,
    ) -> Result<Option<Replans>, GpuError> {
        let Some(moving) = &self.moving else {
            return Ok(None);
        };
        let moving = &mut *locked(moving);
        moving.hot.end_token(position);
        moving.n_tokens += 1;
        if moving.n_tokens < moving.replan.every {
            return Ok(None);
        }
        moving.n_tokens = 0;
        let start = Instant::now();
        // nothing that was launched is still under way
        self.wait_batch()?;
        let layers = self.layers();
        let hot = moving.hot.take(&self.stream)?;
        let n_hot: Vec<usize> = hot.iter().map(Vec::len).collect();
        let (fired_hot, fired) = moving.add_fired(layers.start, hot, cold);
        let swaps = moving.decide(layers.start, &n_hot, team);
        moving.broken = true;
        let bytes = self.carry_out(moving, &swaps, model, team)?;
        moving.broken = false;
        moving.age(&swaps);
        let moved = swaps.iter().map(|swaps| swaps.len() as u64).sum();
        let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let done = Replans {
            times: 1,
            moved,
            bytes,
            ns,
            fired,
            fired_hot,
        };
        let (hot_share, ms) = (done.hot_share().unwrap_or(0.0), ns as f64 / 1e6);
        let mib = bytes as f64 / f64::from(1 << 20);
        tracing::info!(?layers, moved, mib, ms, hot_share, "neurons changed places");
        Ok(Some(done))
    }

    /// Puts everything of moved neurons where it belongs; returns the bytes of it.
    fn carry_out(
        &self,
        moving: &mut Moving,
        swaps: &[Vec<Swap>],
        model: &Model,
        team: &mut Team,
    ) -> Result<u64, GpuError> {
        let first = self.layers().start;
        let Replan { source, host, .. } = &moving.replan;
        let written = AtomicU64::new(0);
        let pieces: Vec<Mutex<Pieces>> = swaps.iter().map(|_| Mutex::default()).collect();
        by_all(team, swaps.len(), &|own| {
            if swaps[own].is_empty() {
                return;
            }
            let layer = first + own;
            let of_gpu = &mut *locked(&pieces[own]);
            source.swap(layer, &swaps[own], &mut |place, bytes| {
                written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                match place {
                    Place::Gpu { at } => of_gpu.push((at, bytes.to_vec())),
                    // SAFETY: no step is under way: every node has answered, so that no thread reads weights, and the GPU has
                    // ended what it copies from there. No two places overlap, and this thread alone has this layer. The job's
                    // end, and the messages of the next step, are behind it for all who read.
                    Place::Host { node, at } => unsafe { host[node].write(at, bytes) },
                    Place::Sketch {
                        node,
                        neuron,
                        value,
                    } => {
                        let sketch = model.share(layer, node).sketch.as_ref();
                        let sketch = sketch.expect("the share has a sketch");
                        let values = sketch.values(value);
                        let values = values.expect("the sketch has such values");
                        let number = bytes.try_into().expect("an f32");
                        // SAFETY: as above.
                        unsafe { values.set(neuron, f32::from_le_bytes(number)) };
                    }
                }
            });
        });
        let pieces: Pieces = (pieces.into_iter())
            .flat_map(|pieces| pieces.into_inner().unwrap_or_default())
            .collect();
        let arena = &mut *locked(&self.arena);
        let pieces = pieces.iter().map(|(at, bytes)| (*at, &bytes[..]));
        (moving.scatter).write(&self.stream, pieces, &mut arena.view_mut(..))?;
        Ok(written.into_inner())
    }
}

impl crate::weights::SketchShare {
    fn values(&self, value: SketchValue) -> Option<&crate::replan::NeuronValues> {
        match (value, &self.kind) {
            (SketchValue::Bias, _) => Some(&self.bias),
            (SketchValue::Floor, _) => self.floor.as_ref(),
            (SketchValue::TwoBitBias, crate::weights::SketchKind::Bits { two_bit_bias, .. }) => {
                two_bit_bias.as_ref()
            }
            (SketchValue::TwoBitBias, _) => None,
        }
    }
}
