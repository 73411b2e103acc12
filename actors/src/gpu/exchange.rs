//! Memory that host and GPU both see, and who may touch it when.
//!
//! Flags carry the token's number. The writer of a slot sets its flag behind the data; the reader waits for the flag.
//!
//! | slot | written by | flag | read by | until |
//! |---|---|---|---|---|
//! | `x`, `rotation`, `words` | host | (launch of the graph) | GPU | end of the token |
//! | `hidden`, that of even or odd layers | GPU | `hidden[layer]` | host | its first value of `partial` |
//! | `ids`, `n_ids`, likewise | GPU | `ids[layer]` | host | its first value of `partial` |
//! | `partial`, likewise | host | each value's tag | GPU | `hidden[layer + 1]`, or the end |
//! | `counts` | GPU | `token` | host | the next launch |
//! | `x_out` | GPU, where another one goes on | `token` | host | the next launch |
//! | `logits` | GPU | `logits` | host | the next launch |
//!
//! The slots of layer l + 2 are those of layer l. The GPU writes `hidden` of l + 2 after it took all of `partial` of l, of which the
//! host writes no value before it has read `hidden` and `ids` of l (`ids` before the messages that values come from, `hidden` at the
//! latest before a barrier of the job that they come from); it writes `ids` of l + 2 within layer l + 1, so after that too. The
//! host writes `partial` of l + 2 after it saw `hidden[l + 2]`, which the GPU set after it had read `partial` of l. Where a layer
//! has no cold neurons it uses no slot.
#![allow(unsafe_code)]

use std::time::{Duration, Instant};

use pi_kernels::KernelError;
use pi_kernels::cuda::{Device, PinnedBuffer, Stream, View, tagged};
use pi_kernels::quant::BLOCK;

use super::error::GpuError;

/// Words between flags: a line of the host's caches, and the one that it fetches beside it.
const FLAG_WORDS: usize = 32;
/// Slots start at multiples of this many values.
const SLOT_VALUES: usize = 64;
/// Looks at a flag between looks at the clock.
const SPINS: u32 = 1 << 12;
/// Time between questions to the driver whether the GPU still works.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// A flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flag {
    /// The layer's normed hidden state is there.
    Hidden(usize),
    /// The ids that were predicted for the layer are there.
    Ids(usize),
    /// The host's part of the layer is there, or none will come.
    Partial(usize),
    /// All layers are done.
    Token,
    /// The logits are there.
    Logits,
    /// The host was late.
    Late,
    /// Not 0: the first layer whose output is not finite, counted from the model's first one, + 1.
    NotFinite,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Exchange {
    n_embd: usize,
    stride: usize,
    ids_stride: usize,
    flags: PinnedBuffer<u32>,
    pub x: PinnedBuffer<f32>,
    /// The residual stream behind the last layer.
    pub x_out: PinnedBuffer<f32>,
    pub rotation: PinnedBuffer<f32>,
    /// Position and number of the token.
    pub words: PinnedBuffer<u32>,
    hidden: PinnedBuffer<f32>,
    partial: PinnedBuffer<u64>,
    ids: PinnedBuffer<u32>,
    n_ids: PinnedBuffer<u32>,
    pub logits: PinnedBuffer<f32>,
    /// The device's times, in ns.
    stamps: PinnedBuffer<u64>,
    /// What was counted within the token, `[n_layer, 2]`.
    counts: PinnedBuffer<u32>,
}

/// A time on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stamp {
    /// The token began.
    Begin,
    /// All layers are done.
    Token,
    /// The logits are there.
    Logits,
    /// The layer's hidden state is handed over.
    Hidden(usize),
    /// The ids that were predicted for the layer are handed over.
    Ids(usize),
    /// The wait for the host's part of the layer began; the next one is its end, as the first block sees it.
    Wait(usize),
    /// All of it was added.
    Taken(usize),
}

impl Stamp {
    fn place(self) -> usize {
        match self {
            Stamp::Begin => 0,
            Stamp::Token => 1,
            Stamp::Logits => 2,
            Stamp::Hidden(layer) => 4 + 4 * layer,
            Stamp::Ids(layer) => 5 + 4 * layer,
            Stamp::Wait(layer) => 6 + 4 * layer,
            Stamp::Taken(layer) => 7 + 4 * layer,
        }
    }
}

/// Sizes of an [`Exchange`].
#[derive(Debug, Clone, Copy)]
pub(super) struct ExchangeSizes {
    pub n_layer: usize,
    pub n_embd: usize,
    pub rope_len: usize,
    /// Most ids of a layer.
    pub n_ids: usize,
    pub n_vocab: usize,
}

impl Exchange {
    pub fn new(device: &Device, sizes: ExchangeSizes) -> Result<Self, KernelError> {
        let stride = sizes.n_embd.next_multiple_of(SLOT_VALUES);
        let ids_stride = sizes.n_ids.next_multiple_of(SLOT_VALUES);
        let n_flags = 3 * sizes.n_layer + 4;
        Ok(Self {
            n_embd: sizes.n_embd,
            stride,
            ids_stride,
            flags: PinnedBuffer::new(device, n_flags * FLAG_WORDS)?,
            x: PinnedBuffer::new(device, sizes.n_embd)?,
            x_out: PinnedBuffer::new(device, sizes.n_embd)?,
            rotation: PinnedBuffer::new(device, sizes.rope_len)?,
            words: PinnedBuffer::new(device, 2)?,
            hidden: PinnedBuffer::new(device, 2 * stride)?,
            partial: PinnedBuffer::new(device, 2 * stride)?,
            ids: PinnedBuffer::new(device, 2 * ids_stride)?,
            n_ids: PinnedBuffer::new(device, 2 * FLAG_WORDS)?,
            logits: PinnedBuffer::new(device, sizes.n_vocab)?,
            stamps: PinnedBuffer::new(device, 4 + 4 * sizes.n_layer)?,
            counts: PinnedBuffer::new(device, 2 * sizes.n_layer)?,
        })
    }

    fn place(flag: Flag) -> usize {
        FLAG_WORDS
            * match flag {
                Flag::Token => 0,
                Flag::Logits => 1,
                Flag::Late => 2,
                Flag::NotFinite => 3,
                Flag::Hidden(layer) => 4 + 3 * layer,
                Flag::Ids(layer) => 5 + 3 * layer,
                Flag::Partial(layer) => 6 + 3 * layer,
            }
    }

    /// A flag as the GPU sees it, `[1]`.
    pub fn flag(&self, flag: Flag) -> View<'_, u32> {
        let at = Self::place(flag);
        self.flags.view(at..at + 1)
    }

    /// `n` stamps from one on, as the GPU sees them.
    pub fn stamps(&self, first: Stamp, n: usize) -> View<'_, u64> {
        let at = first.place();
        self.stamps.view(at..at + n)
    }

    /// `N` stamps from one on.
    ///
    /// # Safety
    /// The token that they are of has ended.
    pub unsafe fn times<const N: usize>(&self, first: Stamp) -> [u64; N] {
        let at = first.place();
        // SAFETY: this function's contract.
        let stamps = unsafe { self.stamps.read(at..at + N) };
        std::array::from_fn(|n| stamps[n])
    }

    /// A layer's counts as the GPU sees them, `[2]`.
    pub fn counts_view(&self, layer: usize) -> View<'_, u32> {
        self.counts.view(2 * layer..2 * layer + 2)
    }

    /// A layer's hot neurons whose activation was computed, and those among them that fired.
    ///
    /// # Safety
    /// The token that they are of has ended, and the next one is not launched meanwhile.
    pub unsafe fn counts(&self, layer: usize) -> [u32; 2] {
        // SAFETY: this function's contract.
        let counts = unsafe { self.counts.read(2 * layer..2 * layer + 2) };
        [counts[0], counts[1]]
    }

    pub fn load(&self, flag: Flag) -> u32 {
        self.flags.load(Self::place(flag))
    }

    pub fn store(&self, flag: Flag, number: u32) {
        self.flags.store(Self::place(flag), number);
    }

    /// The normed hidden state of a layer as the GPU sees it, `[n_embd]`.
    pub fn hidden_view(&self, layer: usize) -> View<'_, f32> {
        self.hidden.view(self.slot(layer))
    }

    /// The host's part of a layer as the GPU sees it, `[n_embd]`.
    pub fn partial_view(&self, layer: usize) -> View<'_, u64> {
        self.partial.view(self.slot(layer))
    }

    /// Room for the first `n` ids of a layer, and for their number `[1]`, as the GPU sees them.
    pub fn ids_views(&self, layer: usize, n: usize) -> (View<'_, u32>, View<'_, u32>) {
        let at = layer % 2 * self.ids_stride;
        let count = layer % 2 * FLAG_WORDS;
        (self.ids.view(at..at + n), self.n_ids.view(count..count + 1))
    }

    /// # Safety
    /// `hidden[layer]` was seen, and no value of `partial` is written while the slice lives.
    pub unsafe fn hidden(&self, layer: usize) -> &[f32] {
        // SAFETY: this function's contract.
        unsafe { self.hidden.read(self.slot(layer)) }
    }

    /// The same as 8-bit blocks: `[n_embd]` values, and `[n_embd / 32]` scales.
    ///
    /// # Safety
    /// As [`Self::hidden`]; they were handed over so, and `n_embd` is a multiple of 32.
    pub unsafe fn hidden_q8(&self, layer: usize) -> (&[i8], &[f32]) {
        // SAFETY: this function's contract.
        let words = unsafe { self.hidden(layer) };
        let (q, scales) = words.split_at(self.n_embd / 4);
        // SAFETY: four values in each word; any byte is one.
        let q = unsafe { std::slice::from_raw_parts(q.as_ptr().cast(), self.n_embd) };
        (q, &scales[..self.n_embd / BLOCK])
    }

    /// # Safety
    /// As [`Self::hidden`], with `ids[layer]`.
    pub unsafe fn ids(&self, layer: usize) -> &[u32] {
        let (at, count) = (layer % 2 * self.ids_stride, layer % 2 * FLAG_WORDS);
        // SAFETY: this function's contract.
        unsafe {
            let n = self.n_ids.read(count..count + 1)[0] as usize;
            self.ids.read(at..at + n.min(self.ids_stride))
        }
    }

    /// Writes columns of the host's part of a layer, from the `first` on. `hidden[layer]` was seen, and `partial[layer]` is not set yet.
    ///
    /// # Panics
    /// When the layer has no such columns.
    pub fn write_partial(&self, layer: usize, first: usize, values: &[f32], number: u32) {
        let (slot, tag) = (self.slot(layer), number.wrapping_add(layer as u32));
        assert!(
            first + values.len() <= slot.len(),
            "columns of a layer's part"
        );
        let words = values.iter().map(|&value| tagged(value, tag));
        self.partial.store_words(slot.start + first, words);
    }

    fn slot(&self, layer: usize) -> std::ops::Range<usize> {
        let at = layer % 2 * self.stride;
        at..at + self.n_embd
    }

    /// Spins until the GPU has set the flag to `number`.
    ///
    /// # Errors
    /// The GPU failed, was waiting for the host too long, or does not answer within `limit`.
    pub fn wait(
        &self,
        flag: Flag,
        number: u32,
        stream: &Stream,
        limit: Duration,
    ) -> Result<(), GpuError> {
        let mut clock: Option<(Instant, Instant)> = None;
        loop {
            for _ in 0..SPINS {
                if self.load(flag) == number {
                    return Ok(());
                }
                std::hint::spin_loop();
            }
            let now = Instant::now();
            let (start, asked) = clock.get_or_insert((now, now));
            if now.duration_since(*asked) < ASK_EVERY {
                continue;
            }
            *asked = now;
            let seconds = limit.as_secs_f64();
            if self.load(Flag::Late) != 0 {
                return Err(GpuError::HostLate { seconds });
            }
            let is_done = stream.is_done()?;
            // it may have been set since the last look
            if is_done && self.load(flag) != number || now.duration_since(*start) > limit {
                return Err(GpuError::GpuLate {
                    seconds: now.duration_since(*start).as_secs_f64(),
                });
            }
        }
    }
}
