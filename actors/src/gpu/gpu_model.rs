//! A model on a GPU: the graphs of a token and of the head, and the host's side of running them.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    Add, AroundNorm, AttendToken, BeginToken, BesideGates, DeviceAct, DeviceBuffer, DownScratch,
    Event, Gates, Graph, HandOver, HandOverNormed, ListMasks, NeuronList, PredictHidden,
    PredictMasks, RopeAppend, Stream, TakeOver, ThenNorm, View, attend, attend_token_with,
    begin_token, can_attend_token, can_norm, can_norm_products, can_predict, compact, copy,
    count_active, down_active, gate_up_with, gemv, gemv_then_norm, gemv_then_norm_with, hand_over,
    mask_words, prepare, prepare_relu, rms_norm_with, rope_append, take_over, takes_pairs, trap,
};
use pi_kernels::{ActivationMode, KernelError, QuantType};

use super::buffers::Buffers;
use super::clock::ClockBounds;
use super::error::GpuError;
use super::exchange::{Exchange, ExchangeSizes, Flag, Stamp};
use super::hot_counts::HotCounts;
use super::moving::Moving;
use super::prefill::{Prefill, PrefillSizes};
use super::reads::{self, HotCounted, RowsRead};
use super::times::{GpuTimes, LayerTimes};
use super::weights::{
    GpuAhead, GpuDown, GpuFfn, GpuHead, GpuLayer, GpuSync, GpuValues, GpuWeights, values,
};
use crate::counters::Counters;
use crate::messages::Step;
use crate::trace::{GpuEvent, GpuPart, Recorder};
use crate::weights::{
    FfnShare, GateActivation, LayerShare, LayerWeights, ModelShape, ModelWeights, SketchKind,
    UpRows,
};

/// See the module. Only the thread of node 0's executor calls its functions while a run is under way.
#[derive(Debug)]
pub(crate) struct GpuModel {
    // graphs first: they are dropped before the memory that they use
    token: Mutex<TokenGraphs>,
    /// The same, which count too.
    counted: Option<Mutex<TokenGraphs>>,
    /// Whether these are launched.
    counting: AtomicBool,
    head: Option<Mutex<Graph>>,
    pub(super) stream: Stream,
    prefill: Option<Mutex<Prefill>>,
    exchange: Exchange,
    buffers: Mutex<Buffers>,
    /// Where all weights lie.
    pub(super) arena: Mutex<DeviceBuffer<u8>>,
    /// What lies where; their own arena is empty.
    weights: GpuWeights,
    /// Where neurons change places with the host's.
    pub(super) moving: Option<Mutex<Moving>>,
    /// Number of the token under way.
    number: AtomicU32,
    /// Whether the GPU still works on it.
    under_way: AtomicBool,
    times: Mutex<TokenTimes>,
    limit: Duration,
    /// Whether a layer's hidden state is handed over as 8-bit blocks.
    hidden_q8: Vec<bool>,
}

/// A layer's hidden state as the GPU hands it over.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HiddenState<'a> {
    /// `[n_embd]`
    F32(&'a [f32]),
    /// In 8-bit blocks of 32, where the host computes with nothing else.
    Q8 {
        /// `[n_embd]`
        q: &'a [i8],
        /// `[n_embd / 32]`
        scales: &'a [f32],
    },
}

/// Whether a layer's nodes take the hidden state as 8-bit blocks alone.
fn takes_q8(layer: &LayerWeights, mode: ActivationMode) -> bool {
    let of_share = |share: &LayerShare| {
        let up = match &share.ffn {
            FfnShare::Neurons {
                up: UpRows::Paired,
                rows,
            } => rows.up_rows().map(|up| up.quant),
            FfnShare::Neurons {
                up: UpRows::Interleaved(up),
                ..
            }
            | FfnShare::Dense { up, .. } => Some(up.shape.quant),
        };
        let sketch = share.sketch.as_ref().map(|sketch| &sketch.kind);
        share.gate.shape.quant.is_quantised()
            && up.is_some_and(QuantType::is_quantised)
            && matches!(sketch, None | Some(SketchKind::Nothing))
    };
    mode == ActivationMode::Q8 && layer.shares.iter().all(of_share)
}

/// A token's launches.
#[derive(Debug)]
enum TokenGraphs {
    /// All in one.
    Whole(Graph),
    /// Up to each point at which the host is waited for; and what is behind the last one.
    Parts(Vec<Part>, Graph),
}

/// Launches between two waits for the host.
#[derive(Debug)]
struct Part {
    /// From the host's part of a layer to the next hidden state that it needs.
    graph: Graph,
    /// That is there.
    hidden: Event,
    /// Whose it is.
    layer: usize,
    /// Predictor and hot neurons, beside the host.
    hot: Graph,
    hot_done: Event,
}

/// Bytes of device memory that tokens are computed in, key-value cache of `n_layer` layers included, rounded up as the driver gives memory.
pub fn working_bytes(
    shape: &ModelShape,
    n_layer: usize,
    kv_type: KvType,
    prefill: PrefillSizes,
) -> usize {
    /// What the driver gives large pieces in.
    const GRANULE: usize = 2 << 20;
    /// Attention's and down's scratch, and what else does not depend on the model's width.
    const SCRATCH: usize = 48 << 20;
    let half = shape.n_head_kv * shape.n_ctx * kv_type.row_bytes(shape.head_dim);
    // small pieces share a granule
    let cache = match half {
        0..0x10_0000 => (2 * half * n_layer).next_multiple_of(GRANULE),
        _ => 2 * half.next_multiple_of(GRANULE) * n_layer,
    };
    let wide = 16 * (shape.n_embd + shape.n_attn()) + 8 * shape.n_ff + 2 * shape.n_vocab;
    cache + SCRATCH + (wide * size_of::<f32>()).next_multiple_of(GRANULE) + prefill.bytes(shape)
}

/// How a model is run on a GPU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GpuOptions {
    /// Values of a position's rotation.
    pub rope_len: usize,
    /// The arithmetic.
    pub mode: ActivationMode,
    /// Format of the key-value cache.
    pub kv_type: KvType,
    /// Most tokens of a prompt at a time.
    pub n_tokens: usize,
    /// Whether hidden states are looked at, which only those of several tokens are.
    pub tapped: bool,
    /// A token that waits longer is given up.
    pub limit: Duration,
}

impl GpuModel {
    /// Prepares some layers to run, whose other neurons `host` has.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(
        mut weights: GpuWeights,
        host: &ModelWeights,
        options: GpuOptions,
    ) -> Result<Self, GpuError> {
        let (device, shape) = (weights.device.clone(), &host.shape);
        let GpuOptions {
            rope_len,
            mode,
            kv_type,
            n_tokens,
            tapped,
            limit,
        } = options;
        let mut buffers = Buffers::new(&device, shape, rope_len, &weights.layers, mode, kv_type)?;
        let predicts = weights.layers.iter().any(|layer| layer.ahead.is_some());
        let n_layer = weights.layers.len();
        let sizes = ExchangeSizes {
            n_layer,
            n_embd: shape.n_embd,
            rope_len,
            n_ids: if predicts { shape.n_ff } else { 0 },
            n_vocab: if weights.head.is_some() {
                shape.n_vocab
            } else {
                0
            },
        };
        let exchange = match pi_topology::gpu_node(&device.info().pci_address) {
            Some(numa) => pi_topology::with_memory_of(numa, || Exchange::new(&device, sizes)),
            None => Exchange::new(&device, sizes),
        }?;
        let prefill = Prefill::new(&weights, host, rope_len, mode, n_tokens, tapped)?;
        if let Some(prefill) = &prefill {
            let (locked, all) = prefill.streamed_bytes();
            let (locked_mib, of_mib) = (locked >> 20, all >> 20);
            tracing::info!(locked_mib, of_mib, "prompts stream cold neurons to the GPU");
        }
        let (stream, side) = (device.stream()?, device.stream()?);
        let events = [Event::new(&device)?, Event::new(&device)?];
        let layers = &host.layers[weights.range()];
        let takes = |layer| takes_q8(layer, mode);
        let hidden_q8: Vec<bool> = layers.iter().map(takes).collect();
        let moving = weights.replan.take();
        let moving = moving.map(|replan| Moving::new(&device, &weights.layers, shape.n_ff, replan));
        let mut moving = moving.transpose()?;
        let mut capture = Capture {
            hidden_q8: &hidden_q8,
            shape,
            weights: &weights,
            exchange: &exchange,
            buffers: &mut buffers,
            counts: moving.as_mut().map(|moving| &mut moving.hot),
            side: &side,
            events: &events,
            limit,
            reads: false,
        };
        let token = capture.graphs(&stream)?;
        capture.reads = true;
        let counted = weights.counts.then(|| capture.graphs(&stream));
        let counted = counted.transpose()?;
        let head = match &weights.head {
            Some(head) => Some(Graph::capture(&stream, |stream| {
                capture.head(stream, head)
            })?),
            None => None,
        };
        let empty = device.alloc(0)?;
        Ok(Self {
            token: Mutex::new(token),
            counted: counted.map(Mutex::new),
            counting: AtomicBool::new(false),
            head: head.map(Mutex::new),
            stream,
            prefill: prefill.map(Mutex::new),
            exchange,
            buffers: Mutex::new(buffers),
            arena: Mutex::new(std::mem::replace(&mut weights.arena, empty)),
            weights,
            moving: moving.map(Mutex::new),
            number: AtomicU32::new(0),
            under_way: AtomicBool::new(false),
            times: Mutex::new(TokenTimes::new(n_layer)),
            limit,
            hidden_q8,
        })
    }

    /// The layers, counted from the model's first, as everywhere in these functions.
    pub fn layers(&self) -> Range<usize> {
        self.weights.range()
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.weights.device.info().name
    }

    fn layer(&self, layer: usize) -> &GpuLayer {
        &self.weights.layers[self.own(layer)]
    }

    /// Place of a layer among the GPU's own.
    fn own(&self, layer: usize) -> usize {
        layer - self.weights.first_layer
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        let prefill = self.prefill.as_ref();
        let prefill = prefill.map_or(0, |prefill| locked(prefill).bytes());
        let moving = self.moving.as_ref();
        let moving = moving.map_or(0, |moving| locked(moving).bytes());
        locked(&self.arena).bytes() + locked(&self.buffers).bytes() + prefill + moving
    }

    /// Tokens from which a prompt is computed several at a time; none where it never is.
    pub fn prefill_from(&self) -> Option<usize> {
        let prefill = self.prefill.as_ref()?;
        Some(locked(prefill).n_tokens_min)
    }

    /// Whether the layer has neurons on the host.
    pub fn has_cold(&self, layer: usize) -> bool {
        self.layer(layer).has_cold
    }

    /// How the layer is predicted: none; or whether what is not named is left out.
    pub fn ahead_alone(&self, layer: usize) -> Option<bool> {
        let ahead = self.layer(layer).ahead.as_ref();
        ahead.map(|ahead| ahead.alone)
    }

    /// Whether bundles that are predicted are pulled towards the caches of the host.
    pub fn prefetches(&self, layer: usize) -> bool {
        let ahead = self.layer(layer).ahead.as_ref();
        ahead.is_some_and(|ahead| ahead.prefetch)
    }

    /// Hot neurons of the layer.
    pub fn n_hot(&self, layer: usize) -> usize {
        let ffn = self.layer(layer).ffn.as_ref();
        ffn.map_or(0, GpuFfn::n_hot)
    }

    /// Launches the graphs that count from the next token on, or the others again; false where there are none.
    pub fn count(&self, on: bool) -> bool {
        let on = on && self.counted.is_some();
        self.counting.store(on, Ordering::Relaxed);
        on
    }

    fn graphs(&self) -> MutexGuard<'_, TokenGraphs> {
        match &self.counted {
            Some(counted) if self.counting.load(Ordering::Relaxed) => locked(counted),
            _ => locked(&self.token),
        }
    }

    fn number(&self) -> u32 {
        self.number.load(Ordering::Relaxed)
    }

    /// Starts a token: its embedding `[n_embd]`, rotation `[rope_len]` and position.
    ///
    /// # Errors
    /// The driver's, or the token before hangs.
    pub fn begin(&self, x: &[f32], rotation: &[f32], position: usize) -> Result<(), GpuError> {
        self.give_up()?;
        self.before_token(position)?;
        let number = self.next_number();
        let exchange = &self.exchange;
        // SAFETY: no token is under way, and no other thread of the host touches these.
        unsafe {
            exchange.x.write(0..x.len()).copy_from_slice(x);
            let to = exchange.rotation.write(0..rotation.len());
            to.copy_from_slice(rotation);
            let words = exchange.words.write(0..2);
            words.copy_from_slice(&[position as u32, number]);
        }
        exchange.store(Flag::NotFinite, 0);
        let mut times = self.times();
        times.host.fill(HostTimes::default());
        times.launched = Some(Instant::now());
        drop(times);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.launch_part(0)?;
        self.under_way.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Launches part `n` of the token, or all of it where it has no parts.
    fn launch_part(&self, n: usize) -> Result<(), GpuError> {
        match &*self.graphs() {
            TokenGraphs::Whole(graph) => graph.launch(&self.stream)?,
            TokenGraphs::Parts(parts, last) => match parts.get(n) {
                Some(part) => {
                    part.graph.launch(&self.stream)?;
                    part.hidden.record(&self.stream)?;
                    part.hot.launch(&self.stream)?;
                    part.hot_done.record(&self.stream)?;
                }
                None => last.launch(&self.stream)?,
            },
        }
        Ok(())
    }

    /// Lets a token that was given up run to its end, with whatever lies in the slots: nobody uses its results.
    fn give_up(&self) -> Result<(), GpuError> {
        if !self.under_way.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.under_way.store(false, Ordering::Relaxed);
        if self.weights.sync == GpuSync::Events {
            // what was launched waits for nothing
            return self.wait_batch();
        }
        let number = self.number();
        for layer in 0..self.weights.layers.len() {
            self.exchange.store(Flag::Partial(layer), number);
        }
        self.wait_token()
    }

    /// Starts several tokens of a prompt: their embeddings `[n, n_embd]`, rotations `[n, rope_len]`, and the position of the
    /// first one.
    ///
    /// # Errors
    /// The driver's, or what was before hangs.
    ///
    /// # Panics
    /// When [`Self::prefill_from`] is none.
    pub fn begin_batch(
        &self,
        x: &[f32],
        rotation: &[f32],
        position: usize,
    ) -> Result<(), GpuError> {
        self.give_up()?;
        self.check_whole()?;
        self.wait_batch()?;
        let number = self.next_number();
        let buffers = &mut *locked(&self.buffers);
        buffers.words.write(0, &[position as u32, number])?;
        Ok(self.prefill().begin(x, rotation)?)
    }

    /// Launches a layer's attention of these tokens.
    ///
    /// # Errors
    /// The driver's.
    pub fn batch_attention(&self, layer: usize, shape: &ModelShape) -> Result<(), GpuError> {
        let buffers = &mut *locked(&self.buffers);
        let own = self.own(layer);
        let cache = (&mut buffers.caches[own], buffers.words.view(0..1));
        let (layer, arena) = (&self.weights.layers[own], locked(&self.arena));
        let mut prefill = self.prefill();
        Ok(prefill.attention(&self.stream, layer, &arena, shape, cache)?)
    }

    /// Launches its neurons.
    ///
    /// # Errors
    /// The driver's.
    pub fn batch_neurons(&self, layer: usize, shape: &ModelShape) -> Result<(), GpuError> {
        let own = self.own(layer);
        let (layer, arena) = ((own, &self.weights.layers[own]), locked(&self.arena));
        let mut prefill = self.prefill();
        Ok(prefill.neurons(&self.stream, layer, &arena, shape)?)
    }

    /// Waits for the end of what was launched.
    ///
    /// # Errors
    /// The driver's; or it does not come.
    pub fn wait_batch(&self) -> Result<(), GpuError> {
        self.ask_until(
            || self.stream.is_done(),
            || std::thread::sleep(ASK_BATCH_EVERY),
        )
    }

    /// Lets the GPU fail, for tests: it is lost.
    pub fn trap(&self) {
        if let Err(error) = trap(&self.stream) {
            tracing::error!("no trap: {error}");
        }
    }

    fn prefill(&self) -> MutexGuard<'_, Prefill> {
        let prefill = self.prefill.as_ref();
        locked(prefill.expect("prompts are computed several tokens at a time"))
    }

    /// A number that flags have never been, and one for each layer: the host's part of layer l is tagged with the number + l.
    fn next_number(&self) -> u32 {
        let n_layer = self.weights.layers.len() as u32;
        // 0 is what flags are at first, and what the one of logits is set to
        let number = match self.number().wrapping_add(n_layer) {
            0 => n_layer,
            number => number,
        };
        self.number.store(number, Ordering::Relaxed);
        number
    }

    fn wait(&self, flag: Flag) -> Result<(), GpuError> {
        let parts = match self.weights.sync {
            GpuSync::Flags => {
                return self
                    .exchange
                    .wait(flag, self.number(), &self.stream, self.limit);
            }
            GpuSync::Events => self.graphs(),
        };
        let TokenGraphs::Parts(parts, _) = &*parts else {
            unreachable!("events need parts");
        };
        let event = match flag {
            Flag::Hidden(layer) => {
                let part = parts.iter().find(|part| part.layer == layer);
                part.map(|part| &part.hidden)
            }
            // predicted beside the hot neurons of the layer before
            Flag::Ids(layer) => {
                let part = parts.iter().find(|part| part.layer + 1 >= layer);
                part.map(|part| {
                    if part.layer < layer {
                        &part.hot_done
                    } else {
                        &part.hidden
                    }
                })
            }
            _ => None,
        };
        let is_done = || match event {
            Some(event) => event.is_done(),
            None => self.stream.is_done(),
        };
        self.ask_until(is_done, std::hint::spin_loop)
    }

    /// Asks the driver again and again, with a pause between.
    fn ask_until(
        &self,
        is_done: impl Fn() -> Result<bool, KernelError>,
        pause: impl Fn(),
    ) -> Result<(), GpuError> {
        let start = Instant::now();
        while !is_done()? {
            if start.elapsed() > self.limit {
                let seconds = self.limit.as_secs_f64();
                return Err(GpuError::GpuLate { seconds });
            }
            pause();
        }
        Ok(())
    }

    /// The ids of cold neurons that were predicted for a layer, counted from its first cold one, ascending.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn wait_ids(&self, layer: usize) -> Result<&[u32], GpuError> {
        let own = self.own(layer);
        self.wait(Flag::Ids(own))?;
        // SAFETY: the flag was seen; the slice is used before `answer`, by this thread.
        Ok(unsafe { self.exchange.ids(own) })
    }

    /// The normed hidden state of a layer.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn wait_hidden(&self, layer: usize) -> Result<HiddenState<'_>, GpuError> {
        let own = self.own(layer);
        self.wait(Flag::Hidden(own))?;
        self.times().host[own].seen = Some(Instant::now());
        // SAFETY: the flag was seen; the slice is used before `answer`.
        Ok(unsafe { self.hidden(layer) })
    }

    /// The same where [`Self::wait_hidden`] has returned.
    ///
    /// # Safety
    /// That; and no column is given ([`Self::give`]) while the slices live.
    pub unsafe fn hidden(&self, layer: usize) -> HiddenState<'_> {
        let own = self.own(layer);
        // SAFETY: this function's contract.
        unsafe {
            if self.hidden_q8[own] {
                let (q, scales) = self.exchange.hidden_q8(own);
                HiddenState::Q8 { q, scales }
            } else {
                HiddenState::F32(self.exchange.hidden(own))
            }
        }
    }

    /// Ends the host's part of a layer, all columns of which were given to the GPU.
    ///
    /// # Errors
    /// The driver's.
    pub fn answer(&self, layer: usize) -> Result<(), GpuError> {
        let own = self.own(layer);
        self.times().host[own].told = Some(Instant::now());
        self.exchange.store(Flag::Partial(own), self.number());
        let next = match &*self.graphs() {
            TokenGraphs::Whole(_) => return Ok(()),
            TokenGraphs::Parts(parts, _) => {
                parts.iter().take_while(|part| part.layer <= own).count()
            }
        };
        self.launch_part(next)
    }

    /// Gives columns of the host's part of a layer to the GPU, from the `first` on: each may be taken over at once. The layer's
    /// hidden state was seen, and [`Self::answer`] comes behind all columns.
    pub fn give(&self, layer: usize, first: usize, values: &[f32]) {
        let own = self.own(layer);
        if first == 0 {
            // the GPU's first block notes when it has these
            self.times().host[own].given = Some(Instant::now());
        }
        self.exchange
            .write_partial(own, first, values, self.number());
    }

    /// The residual stream behind the GPU's last layer, `[n_embd]`, where another GPU goes on.
    ///
    /// # Safety
    /// The token has ended, and the next one is not started while the slice lives.
    pub unsafe fn residual(&self) -> &[f32] {
        let n_embd = self.exchange.x_out.len();
        // SAFETY: this function's contract.
        unsafe { self.exchange.x_out.read(0..n_embd) }
    }

    /// The same of several tokens, `[n, n_embd]`, whose launches so far have ended: these values of it.
    ///
    /// # Errors
    /// The driver's.
    pub fn batch_residual(&self, values: Range<usize>) -> Result<Vec<f32>, GpuError> {
        Ok(self.prefill().x.view(values).read()?)
    }

    /// Waits for the end of the token's layers.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn wait_token(&self) -> Result<(), GpuError> {
        self.wait(Flag::Token)?;
        self.under_way.store(false, Ordering::Relaxed);
        if self.exchange.load(Flag::Late) != 0 {
            let seconds = self.limit.as_secs_f64();
            return Err(GpuError::HostLate { seconds });
        }
        self.check_finite()?;
        self.note_times();
        Ok(())
    }

    /// # Errors
    /// A norm of the token found a layer's output that is not finite.
    fn check_finite(&self) -> Result<(), GpuError> {
        match self.exchange.load(Flag::NotFinite) {
            0 => Ok(()),
            number => Err(GpuError::NotFinite {
                layer: number as usize - 1,
            }),
        }
    }

    fn times(&self) -> MutexGuard<'_, TokenTimes> {
        locked(&self.times)
    }

    /// Notes the times of the token that has just ended.
    fn note_times(&self) {
        let mut times = self.times();
        // SAFETY: the token has ended.
        let [mut before, end] = unsafe { self.exchange.times(Stamp::Begin) };
        let ns = |from: u64, to: u64| to.saturating_sub(from) as f32;
        let token = ns(before, end);
        times.ended = Some(Instant::now());
        let TokenTimes { host, all, .. } = &mut *times;
        let layers = host.iter().enumerate().map(|(layer, host)| {
            if !self.weights.layers[layer].has_cold {
                return None;
            }
            // SAFETY: as above.
            let [hidden, _, wait, answered] = unsafe { self.exchange.times(Stamp::Hidden(layer)) };
            let (seen, told) = (host.seen?, host.told?);
            let host_ns = told.duration_since(seen).as_nanos() as f32;
            let times = LayerTimes::new(
                ns(before, hidden),
                ns(hidden, wait),
                ns(wait, answered),
                host_ns,
            );
            before = answered;
            Some(times)
        });
        all.push(token, layers);
    }

    /// Writes the token that has just ended to the timeline, as GPU number `gpu`.
    pub fn trace(&self, recorder: &Recorder, gpu: usize, step: Step) {
        let times = self.times();
        let ns = |at: Instant| recorder.ns(at);
        // SAFETY: the token has ended.
        let [begin, end] = unsafe { self.exchange.times(Stamp::Begin) };
        let mut bounds = ClockBounds::new();
        if let (Some(launched), Some(ended)) = (times.launched, times.ended) {
            bounds.host_first(ns(launched), begin);
            bounds.gpu_first(end, ns(ended));
        }
        // SAFETY: as above.
        let stamps = |layer| unsafe { self.exchange.times::<4>(Stamp::Hidden(layer)) };
        for (layer, host) in times.host.iter().enumerate() {
            let (Some(seen), Some(given)) = (host.seen, host.given) else {
                continue;
            };
            let [hidden, _, _, answered] = stamps(layer);
            bounds.gpu_first(hidden, ns(seen));
            bounds.host_first(ns(given), answered);
        }
        let Some(map) = bounds.map() else { return };
        let part = |part, own: usize, from: u64, to: u64| {
            recorder.gpu(GpuEvent {
                part,
                gpu,
                layer: self.weights.first_layer + own,
                step,
                start_ns: from,
                end_ns: to,
                error_ns: map.error_ns,
            });
        };
        let on_gpu = |what, own, from, to| part(what, own, map.host_ns(from), map.host_ns(to));
        let mut before = begin;
        let mut hidden_before = None;
        for (own, host) in times.host.iter().enumerate() {
            let (Some(seen), Some(told)) = (host.seen, host.told) else {
                hidden_before = None;
                continue;
            };
            let [hidden, ids, wait, answered] = stamps(own);
            on_gpu(GpuPart::Layers, own, before, hidden);
            if let (Some(forked), Some(_)) = (hidden_before, &self.weights.layers[own].ahead) {
                on_gpu(GpuPart::Predict, own, forked, ids);
            }
            on_gpu(GpuPart::Hot, own, hidden, wait);
            on_gpu(GpuPart::Wait, own, wait, answered);
            part(GpuPart::Seen, own, ns(seen), ns(seen));
            part(GpuPart::Told, own, ns(told), ns(told));
            on_gpu(GpuPart::Taken, own, answered, answered);
            (before, hidden_before) = (answered, Some(hidden));
        }
        let last = self.weights.layers.len() - 1;
        on_gpu(GpuPart::Rest, last, before, end);
    }

    /// What the GPU read in all its layers for the tokens at `positions`, which have just ended; nothing where it does not count.
    pub fn work(&self, shape: &ModelShape, kv_type: KvType, positions: Range<usize>) -> Counters {
        if !self.counting.load(Ordering::Relaxed) {
            return Counters::default();
        }
        let mut work = match positions.len() {
            1 => self.token_work(shape),
            _ => self.batch_work(),
        };
        for _ in self.layers() {
            work += reads::of_cache(shape, kv_type, positions.clone());
        }
        work
    }

    fn token_work(&self, shape: &ModelShape) -> Counters {
        let read_too = RowsRead {
            ups: shape.gate_activation != GateActivation::Relu,
            all: self.weights.dense,
        };
        let layers = self.weights.layers.iter().enumerate();
        let work = layers.map(|(own, layer)| {
            // SAFETY: the token has ended.
            let [candidates, open] = unsafe { self.exchange.counts(own) };
            reads::of_token(layer, HotCounted { candidates, open }, read_too)
        });
        work.fold(Counters::default(), |sum, work| sum + work)
    }

    fn batch_work(&self) -> Counters {
        let prefill = self.prefill();
        let layers = self.weights.layers.iter().enumerate();
        let work = layers.map(|(own, layer)| reads::of_batch(layer, prefill.cold_bytes(own)));
        work.fold(Counters::default(), |sum, work| sum + work)
    }

    /// What each computation of logits reads, likewise.
    pub fn head_work(&self) -> Counters {
        let counting = self.counting.load(Ordering::Relaxed);
        let head = self.weights.head.as_ref().filter(|_| counting);
        head.map_or(Counters::default(), |head| {
            reads::of_head(&head.rows, &head.norm)
        })
    }

    /// Where the time of recent tokens went.
    pub fn recent_times(&self) -> GpuTimes {
        self.times().all.clone()
    }

    /// Logits of the last token, or of this one of those that were computed together, `[n_vocab]`.
    ///
    /// # Errors
    /// [`GpuError`].
    pub fn logits(&self, of_batch: Option<usize>) -> Result<&[f32], GpuError> {
        if let Some(token) = of_batch {
            let buffers = &mut *locked(&self.buffers);
            let n_embd = buffers.x.len();
            let prefill = self.prefill();
            let from = prefill.x.view(token * n_embd..(token + 1) * n_embd);
            copy(&self.stream, from, buffers.x.view_mut(..))?;
        }
        // another number than the last launch's
        self.exchange.store(Flag::Logits, 0);
        let head = self.head.as_ref().expect("the last GPU has the head");
        locked(head).launch(&self.stream)?;
        self.wait(Flag::Logits)?;
        if of_batch.is_none() {
            self.check_finite()?;
        }
        let n_vocab = self.exchange.logits.len();
        // SAFETY: the flag was seen; the next launch is after the slice's use, by this thread.
        Ok(unsafe { self.exchange.logits.read(0..n_vocab) })
    }
}

/// Between questions whether a prompt's tokens are done.
const ASK_BATCH_EVERY: Duration = Duration::from_micros(50);

pub(super) fn locked<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(|broken| broken.into_inner())
}

/// When the host saw a layer's hidden state, gave the first columns of its part, and had given all.
#[derive(Debug, Clone, Copy, Default)]
struct HostTimes {
    seen: Option<Instant>,
    given: Option<Instant>,
    told: Option<Instant>,
}

/// The host's times of each layer of the token under way; and all that is known of tokens before.
#[derive(Debug)]
struct TokenTimes {
    host: Vec<HostTimes>,
    /// When the host launched the token, and saw its end.
    launched: Option<Instant>,
    ended: Option<Instant>,
    all: GpuTimes,
}

impl TokenTimes {
    fn new(n_layer: usize) -> Self {
        Self {
            host: vec![HostTimes::default(); n_layer],
            launched: None,
            ended: None,
            all: GpuTimes::new(n_layer),
        }
    }
}

/// What the launches of a token are made from.
struct Capture<'a> {
    hidden_q8: &'a [bool],
    shape: &'a ModelShape,
    weights: &'a GpuWeights,
    exchange: &'a Exchange,
    buffers: &'a mut Buffers,
    /// Where it is counted which hot neurons fire.
    counts: Option<&'a mut HotCounts>,
    /// Where predictors run beside the hot neurons of the layer before, and what marks beginnings and ends there.
    side: &'a Stream,
    events: &'a [Event; 2],
    limit: Duration,
    /// Whether the kernels count what they read.
    reads: bool,
}

type Launched = Result<(), KernelError>;

/// Where a norm notes that what one of the GPU's layers gave is not finite, and as what; of none it is what was before the first one.
fn not_finite<'a>(
    exchange: &'a Exchange,
    weights: &GpuWeights,
    layer: Option<usize>,
) -> Option<(View<'a, u32>, u32)> {
    // the host has looked at embeddings
    let number = weights.first_layer + layer.map_or(0, |own| own + 1);
    (number > 0).then(|| (exchange.flag(Flag::NotFinite), number as u32))
}

/// A norm that notes it.
fn noting<'a>(
    exchange: &'a Exchange,
    weights: &GpuWeights,
    layer: Option<usize>,
) -> AroundNorm<'a> {
    AroundNorm {
        not_finite: not_finite(exchange, weights, layer),
        ..AroundNorm::default()
    }
}

/// What lies between gate and up. `dense`: up rows of closed gates are read.
pub(super) fn gates_of(shape: &ModelShape, dense: bool) -> Gates {
    match shape.gate_activation {
        GateActivation::Silu => Gates::Silu,
        GateActivation::Gelu => Gates::Gelu,
        GateActivation::Relu if dense => Gates::ReluDense,
        GateActivation::Relu => Gates::Relu,
    }
}

/// What is added to a predictor's first product.
fn hidden_bias<'a>(arena: &'a DeviceBuffer<u8>, ahead: &GpuAhead) -> Add<'a> {
    match &ahead.a_bias {
        Some(at) => Add::Values(values(arena, at)),
        None => Add::None,
    }
}

impl Capture<'_> {
    fn graphs(&mut self, stream: &Stream) -> Result<TokenGraphs, KernelError> {
        match self.weights.sync {
            GpuSync::Flags => {
                let whole = Graph::capture(stream, |stream| self.token(stream))?;
                Ok(TokenGraphs::Whole(whole))
            }
            GpuSync::Events => self.parts(stream),
        }
    }

    /// The whole token.
    fn token(&mut self, stream: &Stream) -> Launched {
        self.begin(stream)?;
        for index in 0..self.weights.layers.len() {
            self.until_hidden(stream, index, true)?;
            self.beside_host(stream, index)?;
            if self.weights.layers[index].has_cold {
                self.cold(stream, index)?;
            }
        }
        self.end(stream)
    }

    /// The token in parts, each of which waits for nothing.
    fn parts(&mut self, stream: &Stream) -> Result<TokenGraphs, KernelError> {
        let n_layer = self.weights.layers.len();
        let mut parts: Vec<Part> = Vec::new();
        loop {
            let before = parts.last().map(|part| part.layer);
            let first = before.map_or(0, |layer| layer + 1);
            let layer = (first..n_layer).find(|layer| self.weights.layers[*layer].has_cold);
            let graph = Graph::capture(stream, |stream| {
                match before {
                    None => self.begin(stream)?,
                    Some(before) => self.cold(stream, before)?,
                }
                for index in first..layer.unwrap_or(n_layer) {
                    self.until_hidden(stream, index, index > first)?;
                    self.beside_host(stream, index)?;
                }
                match layer {
                    Some(layer) => self.until_hidden(stream, layer, layer > first),
                    None => self.end(stream),
                }
            })?;
            let Some(layer) = layer else {
                return Ok(TokenGraphs::Parts(parts, graph));
            };
            let hot = Graph::capture(stream, |stream| {
                self.beside_host(stream, layer)?;
                if self.is_predicted(layer + 1) {
                    stream.wait_for(&self.events[1])?;
                }
                Ok(())
            })?;
            let device = stream.device();
            parts.push(Part {
                graph,
                hidden: Event::new(device)?,
                layer,
                hot,
                hot_done: Event::new(device)?,
            });
        }
    }

    fn begin(&mut self, stream: &Stream) -> Launched {
        let (exchange, buffers) = (self.exchange, &mut *self.buffers);
        let token = BeginToken {
            x: (exchange.x.view(0..exchange.x.len()), buffers.x.view_mut(..)),
            rotation: (
                exchange.rotation.view(0..exchange.rotation.len()),
                buffers.rotation.view_mut(..),
            ),
            words: (exchange.words.view(0..2), buffers.words.view_mut(..)),
            stamp: exchange.stamps(Stamp::Begin, 1),
        };
        begin_token(stream, token)
    }

    /// Tells the host, who gets the residual stream where another GPU goes on.
    fn end(&mut self, stream: &Stream) -> Launched {
        let n = match self.weights.head {
            Some(_) => 0,
            None => self.shape.n_embd,
        };
        let [_, _, ticket] = &mut self.buffers.tickets;
        let what = HandOver {
            from: self.buffers.x.view(..n).to_bits(),
            count: None,
            to: self.exchange.x_out.view(0..n).to_bits(),
            flag: self.exchange.flag(Flag::Token),
            number: self.buffers.words.view(1..2),
            stamp: self.exchange.stamps(Stamp::Token, 1),
        };
        hand_over(stream, what, ticket)
    }

    /// The layer up to its normed hidden state. `join`: the predictor may still run beside it.
    fn until_hidden(&mut self, stream: &Stream, index: usize, join: bool) -> Launched {
        let layer = &self.weights.layers[index];
        self.attention(stream, index, layer)?;
        if self.norms_with_wo(index) {
            return Ok(());
        }
        if layer.ahead.is_some() && join {
            // its list is needed from here on, and what it has read is written
            stream.wait_for(&self.events[1])?;
        }
        let predicts = self.is_predicted(index + 1);
        self.ffn_norm(stream, index, layer, predicts)
    }

    /// Whether the layer's predictor runs in blocks of the token's own launches: where the host has no part in this layer nor in the one before,
    /// which is predicted, too, so that its gates and ups leave room.
    fn is_predicted_beside(&self, index: usize) -> bool {
        let (mode, gates) = (self.buffers.residual.mode(), gates_of(self.shape, true));
        let by_list = |layer: &GpuLayer| {
            let pairs = |ffn: &GpuFfn| takes_pairs(ffn.gate.rows, gates, mode);
            !layer.has_cold
                && layer.ahead.as_ref().is_some_and(|ahead| ahead.alone)
                && layer.ffn.as_ref().is_some_and(pairs)
        };
        let takes = |ahead: &GpuAhead| can_predict(ahead.a.rows, ahead.b.rows, mode);
        let Some(before) = index.checked_sub(1) else {
            return false;
        };
        let layers = &self.weights.layers;
        // whoever predicts the next layer takes the norm's scale
        let next = layers.get(index + 1).and_then(|next| next.ahead.as_ref());
        next.is_none_or(|ahead| ahead.a.rows.quant.is_quantised())
            && layers.get(index).is_some_and(|layer| {
                by_list(layer)
                    && layer.ahead.as_ref().is_some_and(takes)
                    && can_norm_products(layer.wo.rows, mode)
            })
            && by_list(&layers[before])
            && can_attend_token(self.shape.head_dim)
            && self.buffers.attend.can_predict(self.shape.n_ff)
    }

    /// Whether there is such a layer, and it is predicted.
    fn is_predicted(&self, index: usize) -> bool {
        let layer = self.weights.layers.get(index);
        layer.is_some_and(|layer| layer.ahead.is_some())
    }

    /// What runs while the host computes the layer's cold neurons: the next layer's predictor, and hot neurons.
    fn beside_host(&mut self, stream: &Stream, index: usize) -> Launched {
        let weights = self.weights;
        if let Some(next) = weights.layers.get(index + 1)
            && let Some(ahead) = &next.ahead
            && !self.is_predicted_beside(index + 1)
        {
            let n_hot = next.ffn.as_ref().map_or(0, GpuFfn::n_hot);
            let [begin, end] = self.events;
            begin.record(stream)?;
            self.side.wait_for(begin)?;
            self.predict(self.side, index + 1, ahead, n_hot, next.has_cold)?;
            end.record(self.side)?;
        }
        let layer = &weights.layers[index];
        if let Some(ffn) = &layer.ffn {
            let by_list = layer.ahead.as_ref().is_some_and(|ahead| ahead.alone);
            self.hot(stream, index, ffn, by_list)?;
        }
        Ok(())
    }

    /// Norm, queries, keys and values, attention, output projection.
    fn attention(&mut self, stream: &Stream, index: usize, layer: &GpuLayer) -> Launched {
        let (arena, shape) = (&self.weights.arena, self.shape);
        // a layer's output is the next one's input
        let mut before = noting(self.exchange, self.weights, index.checked_sub(1));
        if index > 0 && self.weights.layers[index - 1].has_cold {
            // the take-over of the layer before has ended
            before.begun = Some(self.exchange.stamps(Stamp::Taken(index - 1), 1));
        }
        let is_normed = index > 0 && self.next_norm(index - 1).is_some();
        let buffers = &mut *self.buffers;
        if !is_normed {
            rms_norm_with(
                stream,
                buffers.x.view(..),
                values(arena, &layer.attn_norm),
                shape.rms_eps,
                &mut buffers.normed,
                before,
            )?;
        }
        let mut first = 0;
        for rows in &layer.qkv {
            let out = first..first + rows.rows.n_rows;
            let add = match &layer.qkv_bias {
                Some(bias) => Add::Values(values(
                    arena,
                    &(bias.start + 4 * out.start..bias.start + 4 * out.end),
                )),
                None => Add::None,
            };
            let to = buffers.qkv.view_mut(out.clone());
            gemv(stream, rows.view(arena), &buffers.normed, add, to)?;
            first = out.end;
        }
        self.attend(stream, index)?;
        let predicts = self.is_predicted(index + 1);
        let is_normed = self.norms_with_wo(index);
        let lists = self.is_predicted_beside(index);
        let buffers = &mut *self.buffers;
        let (wo, x) = (layer.wo.view(arena), buffers.x.view_mut(..));
        if !is_normed {
            return gemv(stream, wo, &buffers.attn, Add::Out, x);
        }
        let then = ThenNorm {
            weight: values(arena, &layer.ffn_norm),
            eps: shape.rms_eps,
            to: &mut buffers.ffn_normed,
            plain: predicts.then_some(&mut buffers.residual),
            not_finite: not_finite(self.exchange, self.weights, Some(index)),
        };
        let list = lists.then(|| {
            let list = &mut buffers.hot[index % 2];
            ListMasks {
                masks: buffers.masks.view(..mask_words(shape.n_ff)),
                ids: list.ids.view_mut(..shape.n_ff),
                count: list.count.view_mut(..),
            }
        });
        gemv_then_norm_with(stream, wo, &buffers.attn, then, list, x)
    }

    /// Whether all of the layer is in the stream's own launches, the next layer's predictor included: then norms are made by the launches before
    /// them. (What waits for two streams starts late, and costs a projection more than a norm.)
    fn is_alone(&self, index: usize) -> bool {
        let layer = &self.weights.layers[index];
        let beside = |index| !self.is_predicted(index) || self.is_predicted_beside(index);
        !layer.has_cold && beside(index) && beside(index + 1)
    }

    /// Whether the output projection makes the norm before the FFN.
    fn norms_with_wo(&self, index: usize) -> bool {
        let layer = &self.weights.layers[index];
        let takes =
            |ffn: &GpuFfn| ffn.gate.rows.quant.is_quantised() && ffn.up.rows.quant.is_quantised();
        (self.is_alone(index) || self.is_predicted_beside(index))
            && layer.ffn.as_ref().is_some_and(takes)
            && can_norm_products(layer.wo.rows, self.buffers.attn.mode())
    }

    /// The norm before the next layer's attention, if the sum of this one's neurons, its last launch, makes it: the weight. (The head's
    /// is in a graph of its own.)
    fn next_norm(&self, index: usize) -> Option<&'_ GpuValues> {
        let mode = self.buffers.normed.mode();
        let layers = &self.weights.layers;
        let (layer, next) = (&layers[index], layers.get(index + 1)?);
        let gives = match layer.ffn.as_ref()?.down {
            GpuDown::Neurons(_) => can_norm(self.shape.n_embd, mode),
            GpuDown::Plain(rows) => can_norm_products(rows.rows, mode),
        };
        let takes = next.qkv.iter().all(|rows| rows.rows.quant.is_quantised());
        (self.is_alone(index) && gives && takes).then_some(&next.attn_norm)
    }

    fn attend(&mut self, stream: &Stream, index: usize) -> Launched {
        let (arena, shape) = (&self.weights.arena, self.shape);
        let is_predicted = self.is_predicted_beside(index);
        let buffers = &mut *self.buffers;
        let (n_q, n_kv) = (shape.n_attn(), shape.n_head_kv * shape.head_dim);
        let cache = &mut buffers.caches[index];
        if can_attend_token(shape.head_dim) {
            let qkv = buffers.qkv.view(..);
            let token = AttendToken {
                q: qkv.part(0..n_q),
                k: qkv.part(n_q..n_q + n_kv),
                v: qkv.part(n_q + n_kv..n_q + 2 * n_kv),
                rotation: buffers.rotation.view(..),
                pairs: shape.rope.pairs,
                position: buffers.words.view(0..1),
            };
            let ahead = self.weights.layers[index].ahead.as_ref();
            let predict = ahead.filter(|_| is_predicted).map(|ahead| PredictMasks {
                rows: ahead.b.view(arena),
                bias: values(arena, &ahead.b_bias),
                hidden: buffers.middle.view(..ahead.a.rows.n_rows),
                relu: ahead.a_bias.is_some(),
                masks: buffers.masks.view_mut(..mask_words(shape.n_ff)),
            });
            return attend_token_with(
                stream,
                token,
                cache,
                shape.window,
                shape.attn_scale,
                &mut buffers.attend,
                predict,
                &mut buffers.attn,
            );
        }
        let (q, kv) = buffers.qkv.split_at_mut(n_q);
        rope_append(
            stream,
            RopeAppend {
                q,
                k: kv.part(0..n_kv),
                v: kv.part(n_kv..2 * n_kv),
                rotation: buffers.rotation.view(..),
                pairs: shape.rope.pairs,
                position: buffers.words.view(0..1),
            },
            cache,
        )?;
        attend(
            stream,
            buffers.qkv.view(..n_q),
            cache,
            buffers.words.view(0..1),
            shape.window,
            shape.attn_scale,
            &mut buffers.attend,
            buffers.heads.view_mut(..),
        )?;
        prepare(stream, buffers.heads.view(..), &mut buffers.attn)
    }

    /// Norms for the FFN, and for the next layer's predictor; hands the hidden state over where the host needs it.
    fn ffn_norm(
        &mut self,
        stream: &Stream,
        index: usize,
        layer: &GpuLayer,
        predicts: bool,
    ) -> Launched {
        let (arena, shape, exchange) = (&self.weights.arena, self.shape, self.exchange);
        let around = noting(exchange, self.weights, Some(index));
        let buffers = &mut *self.buffers;
        let [ticket, _, _] = &mut buffers.tickets;
        let after = layer.has_cold.then(|| HandOverNormed {
            to: exchange.hidden_view(index),
            q8: self.hidden_q8[index],
            flag: exchange.flag(Flag::Hidden(index)),
            number: buffers.words.view(1..2),
            stamp: exchange.stamps(Stamp::Hidden(index), 1),
            ticket: ticket.view_mut(..),
        });
        rms_norm_with(
            stream,
            buffers.x.view(..),
            values(arena, &layer.ffn_norm),
            shape.rms_eps,
            &mut buffers.ffn_normed,
            AroundNorm {
                plain: predicts.then_some(&mut buffers.residual),
                after,
                ..around
            },
        )
    }

    /// Predicts layer `next` from the residual stream after attention: hot neurons for the GPU, cold ones for the host.
    fn predict(
        &mut self,
        stream: &Stream,
        next: usize,
        ahead: &GpuAhead,
        n_hot: usize,
        has_cold: bool,
    ) -> Launched {
        let (arena, shape, exchange) = (&self.weights.arena, self.shape, self.exchange);
        let buffers = &mut *self.buffers;
        let rank = ahead.a.rows.n_rows;
        gemv(
            stream,
            ahead.a.view(arena),
            &buffers.residual,
            hidden_bias(arena, ahead),
            buffers.middle.view_mut(..rank),
        )?;
        let middle = (buffers.middles.iter_mut()).find(|act| act.n_cols() == rank);
        let middle: &mut DeviceAct = middle.expect("there is one for every rank");
        let h = buffers.middle.view(..rank);
        match ahead.a_bias {
            Some(_) => prepare_relu(stream, h, middle)?,
            None => prepare(stream, h, middle)?,
        }
        gemv(
            stream,
            ahead.b.view(arena),
            middle,
            Add::Values(values(arena, &ahead.b_bias)),
            buffers.scores.view_mut(..),
        )?;
        if has_cold {
            let n_cold = shape.n_ff - n_hot;
            compact(
                stream,
                buffers.scores.view(n_hot..),
                None,
                0,
                buffers.cold.ids.view_mut(..n_cold),
                None,
                buffers.cold.count.view_mut(..),
            )?;
            let (to, to_count) = exchange.ids_views(next, n_cold);
            let what = HandOver {
                from: buffers.cold.ids.view(..n_cold),
                count: Some((buffers.cold.count.view(..), to_count)),
                to,
                flag: exchange.flag(Flag::Ids(next)),
                number: buffers.words.view(1..2),
                stamp: exchange.stamps(Stamp::Ids(next), 1),
            };
            let [_, ticket, _] = &mut buffers.tickets;
            hand_over(stream, what, ticket)?;
        }
        if n_hot > 0 && ahead.alone {
            let list = &mut buffers.hot[next % 2];
            compact(
                stream,
                buffers.scores.view(..n_hot),
                None,
                0,
                list.ids.view_mut(..n_hot),
                None,
                list.count.view_mut(..),
            )?;
        }
        Ok(())
    }

    /// Adds the hot neurons' part to the residual stream.
    fn hot(&mut self, stream: &Stream, index: usize, ffn: &GpuFfn, by_list: bool) -> Launched {
        let (arena, shape) = (&self.weights.arena, self.shape);
        let next_norm = self.next_norm(index).cloned();
        let late = self.is_predicted_beside(index);
        let next_ahead = match self.is_predicted_beside(index + 1) {
            true => self.weights.layers[index + 1].ahead.as_ref(),
            false => None,
        };
        let buffers = &mut *self.buffers;
        let n_hot = ffn.n_hot();
        let predicted = &buffers.hot[index % 2];
        let list = match by_list {
            true => NeuronList::Ids {
                ids: predicted.ids.view(..n_hot),
                count: predicted.count.view(..),
            },
            false => NeuronList::All,
        };
        let hidden = next_ahead.map(|ahead| PredictHidden {
            rows: ahead.a.view(arena),
            x: &buffers.residual,
            add: hidden_bias(arena, ahead),
            out: buffers.middle.view_mut(..ahead.a.rows.n_rows),
        });
        gate_up_with(
            stream,
            ffn.gate.view(arena),
            ffn.up.view(arena),
            list,
            &buffers.ffn_normed,
            // of those that are named nearly all fire: nothing is gained by waiting for gates
            gates_of(shape, self.weights.dense || by_list),
            BesideGates { hidden, late },
            buffers.act.view_mut(..n_hot),
        )?;
        if self.reads {
            let counts = self.exchange.counts_view(index);
            count_active(stream, buffers.act.view(..n_hot), list, counts)?;
        }
        let then = next_norm.as_ref().map(|weight| ThenNorm {
            weight: values(arena, weight),
            eps: shape.rms_eps,
            to: &mut buffers.normed,
            plain: None,
            not_finite: not_finite(self.exchange, self.weights, Some(index)),
        });
        match &ffn.down {
            GpuDown::Neurons(down) => {
                let scratch = (buffers.downs.iter_mut()).find(|(rows, _)| *rows == down.rows);
                let scratch: &mut DownScratch =
                    &mut scratch.expect("there is scratch for all shapes").1;
                down_active(
                    stream,
                    down.view(arena),
                    list,
                    buffers.act.view(..n_hot),
                    // named ones are read at once: nearly all fire
                    matches!(list, NeuronList::All) && !self.weights.dense,
                    Add::Out,
                    then,
                    scratch,
                    buffers.x.view_mut(..),
                )?
            }
            GpuDown::Plain(down) => {
                let rows = buffers.act_rows.as_mut();
                let rows = rows.expect("there are some where a down projection is plain");
                prepare(stream, buffers.act.view(..n_hot), rows)?;
                let (down, to) = (down.view(arena), buffers.x.view_mut(..));
                match then {
                    Some(then) => gemv_then_norm(stream, down, rows, then, to)?,
                    None => gemv(stream, down, rows, Add::Out, to)?,
                }
            }
        }
        if let Some(counts) = &mut self.counts {
            let fired = (buffers.act.view(..n_hot), list);
            counts.mark(stream, index, fired, buffers.words.view(0..1))?;
        }
        Ok(())
    }

    /// Waits for the host's part, and adds it.
    fn cold(&mut self, stream: &Stream, index: usize) -> Launched {
        let (exchange, buffers) = (self.exchange, &mut *self.buffers);
        let what = TakeOver {
            from: exchange.partial_view(index),
            flag: exchange.flag(Flag::Partial(index)),
            number: buffers.words.view(1..2),
            plus: index as u32,
            late: (buffers.late.view(..), exchange.flag(Flag::Late)),
            stamps: exchange.stamps(Stamp::Wait(index), 2),
            limit: self.limit,
        };
        take_over(stream, what, buffers.x.view_mut(..))
    }

    fn head(&mut self, stream: &Stream, head: &GpuHead) -> Launched {
        let (arena, shape, exchange) = (&self.weights.arena, self.shape, self.exchange);
        let before = noting(
            exchange,
            self.weights,
            self.weights.layers.len().checked_sub(1),
        );
        let buffers = &mut *self.buffers;
        rms_norm_with(
            stream,
            buffers.x.view(..),
            values(arena, &head.norm),
            shape.rms_eps,
            &mut buffers.normed,
            before,
        )?;
        gemv(
            stream,
            head.rows.view(arena),
            &buffers.normed,
            Add::None,
            buffers.logits.view_mut(..),
        )?;
        let what = HandOver {
            from: buffers.logits.view(..).to_bits(),
            count: None,
            to: exchange.logits.view(0..shape.n_vocab).to_bits(),
            flag: exchange.flag(Flag::Logits),
            number: buffers.words.view(1..2),
            stamp: exchange.stamps(Stamp::Logits, 1),
        };
        let [_, _, ticket] = &mut buffers.tickets;
        hand_over(stream, what, ticket)
    }
}
