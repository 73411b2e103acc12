//! Slots: the preallocated buffers that actors hand to one another by message.
//!
//! # Protocol
//! A slot has one writer side and one reader side at any time, and a message marks each change:
//!
//! | slot | written by | before | read by | until |
//! |---|---|---|---|---|
//! | `step`, `x`, `rope` | `Pipeline` | `RunLayer` of layer 0 | everybody | `LayerDone` of the last |
//! | `x` within a layer | `DeviceLayer` | `LayerDone` | `DeviceLayer`, `Pipeline` if not finite | |
//! | `normed` | `DeviceLayer` | `Share`, `Compute` | `ColdLayer`s | their reply |
//! | `normed`, beside a GPU (`Model::takes_in_place`) | the only node's `ColdLayer`, in the job of `Correct` | its first barrier | the same job | its end |
//! | `heads` | `ColdLayer`s, own columns | `ShareDone` | `DeviceLayer` | next `Share` |
//! | `attn` | `DeviceLayer` | `Share` | `ColdLayer`s | their reply |
//! | `projected`, `logits` | `ColdLayer`s, own columns | `ShareDone` | `DeviceLayer`, `Pipeline` | next `Share` |
//! | `head.request` | `Pipeline` | `RunLayer` of layer 0 | everybody | the next feed |
//! | `head.scores`, `head.maxima` | `ColdLayer`s, own rows | `ShareDone` | `DeviceLayer` | its next `Share` |
//! | the same, and `head.threshold` | `DeviceLayer` | `Share` | `ColdLayer`s | their reply |
//! | `head.ids`, `head.n_ids[node]`, `logits` | `ColdLayer`s, own rows | `ShareDone` | `Pipeline` | next `RunHead` |
//! | `predicted[node]`, that of the layer | `Predictor` | `Prefetch`, `Compute` | `ColdLayer` of the node | its `Partial` |
//! | `partials[node]` | `ColdLayer` of the node | `Partial` | `DeviceLayer` | next `Compute` |
//!
//! A message that changes executors goes through a doorbell (release, then acquire); one that stays
//! is handled by the same thread; and a team's threads are ordered by its job's start and end. So
//! every write happens before the reads that follow its message, and no two threads write the same
//! columns between two messages.
//!
//! A step that fails breaks the chain: replies of the old attempt may still be under way. The
//! pipeline starts the next attempt only after every node has said that it has nothing left of the
//! old one (`Quiesce`), so the table holds for the new attempt as well.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::collections::BTreeSet;
use std::ops::Range;

use pi_kernels::{ActBatch, ActWriter, ActivationMode, ROW_GROUP, StridedOut};

/// Values that several threads write and read in turns.
#[derive(Debug)]
pub struct SharedSlice<T> {
    start: *mut T,
    len: usize,
}

/// f32 values that several threads write and read in turns.
pub type SharedF32 = SharedSlice<f32>;

// SAFETY: all access is through unsafe functions whose contract keeps writers and readers apart.
unsafe impl<T: Send> Send for SharedSlice<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for SharedSlice<T> {}

impl<T: Copy + Default> SharedSlice<T> {
    /// Zeros; their pages are taken when they are first written.
    pub fn new(len: usize) -> Self {
        let values = vec![T::default(); len].into_boxed_slice();
        Self {
            start: Box::into_raw(values).cast(),
            len,
        }
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// # Safety
    /// Nobody writes these values while the slice lives.
    pub unsafe fn read(&self, range: Range<usize>) -> &[T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        // SAFETY: inside the allocation; this function's contract.
        unsafe { std::slice::from_raw_parts(self.start.add(range.start), range.len()) }
    }

    /// # Safety
    /// Nobody else touches these values while the slice lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn write(&self, range: Range<usize>) -> &mut [T] {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "{range:?} of {}",
            self.len
        );
        // SAFETY: inside the allocation; this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}

impl SharedF32 {
    /// Columns `columns` of rows of `stride` values: `n_tokens` rows from value `offset` on.
    ///
    /// # Safety
    /// Nobody else touches these values while the output lives.
    pub unsafe fn columns(
        &self,
        offset: usize,
        stride: usize,
        n_tokens: usize,
        columns: Range<usize>,
    ) -> StridedOut<'_> {
        assert!(
            columns.start <= columns.end && columns.end <= stride,
            "{columns:?} of {stride}"
        );
        assert!(
            offset + n_tokens * stride <= self.len,
            "rows of {}",
            self.len
        );
        // SAFETY: inside the allocation; this function's contract.
        unsafe {
            let start = self.start.add(offset + columns.start);
            StridedOut::from_raw(start, stride, n_tokens, columns.len())
        }
    }
}

impl<T> Drop for SharedSlice<T> {
    fn drop(&mut self) {
        let values = std::ptr::slice_from_raw_parts_mut(self.start, self.len);
        // SAFETY: it came from a box of this length.
        drop(unsafe { Box::from_raw(values) });
    }
}

/// A value that one thread writes and others read in turns.
#[derive(Debug, Default)]
pub struct Shared<T>(UnsafeCell<T>);

// SAFETY: all access is through unsafe functions whose contract keeps writers and readers apart.
unsafe impl<T: Send + Sync> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// A first value.
    pub fn new(value: T) -> Self {
        Self(UnsafeCell::new(value))
    }

    /// The value of one who has it alone.
    pub fn own(&mut self) -> &mut T {
        self.0.get_mut()
    }

    /// # Safety
    /// Nobody writes the value while the reference lives.
    pub unsafe fn get(&self) -> &T {
        // SAFETY: this function's contract.
        unsafe { &*self.0.get() }
    }

    /// # Safety
    /// Nobody else touches the value while the reference lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get_mut(&self) -> &mut T {
        // SAFETY: this function's contract.
        unsafe { &mut *self.0.get() }
    }
}

/// Activations of ranks: a batch for each rank that some layer has.
#[derive(Debug)]
pub(crate) struct RankRows(Vec<(usize, Shared<ActBatch>)>);

impl RankRows {
    /// Room for `n_tokens` rows of each of `ranks` values.
    pub fn new(mode: ActivationMode, ranks: &BTreeSet<usize>, n_tokens: usize) -> Self {
        let batch = |&rank: &usize| (rank, Shared::new(ActBatch::new(mode, rank, n_tokens)));
        Self(ranks.iter().map(batch).collect())
    }

    fn find(&self, rank: usize) -> &Shared<ActBatch> {
        let batch = self.0.iter().find(|(of, _)| *of == rank);
        &batch.expect("there is scratch for every layer's rank").1
    }

    /// The rows of rank `rank`.
    ///
    /// # Safety
    /// Nobody writes them while the reference lives.
    pub unsafe fn get(&self, rank: usize) -> &ActBatch {
        // SAFETY: this function's contract.
        unsafe { self.find(rank).get() }
    }

    /// The rows of rank `rank`, to be set by several threads.
    ///
    /// # Safety
    /// Nobody else touches them while the writer lives.
    pub unsafe fn writer(&self, rank: usize) -> ActWriter<'_> {
        // SAFETY: this function's contract.
        unsafe { self.find(rank).get_mut() }.writer()
    }

    /// Bytes of memory.
    pub fn bytes(&mut self) -> usize {
        self.0
            .iter_mut()
            .map(|(_, batch)| batch.own().bytes())
            .sum()
    }

    /// The rows of rank `rank`, of one who has them alone.
    pub fn of(&mut self, rank: usize) -> &mut ActBatch {
        let batch = self.0.iter_mut().find(|(of, _)| *of == rank);
        batch
            .expect("there is scratch for every layer's rank")
            .1
            .own()
    }
}

/// What a step is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct StepInfo {
    /// Position of the first token.
    pub position: usize,
    /// Tokens.
    pub n_tokens: usize,
}

/// Sizes of the slots.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SlotSizes {
    pub mode: ActivationMode,
    pub n_ubatch: usize,
    pub n_embd: usize,
    pub n_attn: usize,
    pub n_vocab: usize,
    pub rope_len: usize,
    pub n_head_tokens: usize,
    /// Whether there is a sketch of the head.
    pub head_sketch: bool,
    /// Whether some layer is predicted from the one before.
    pub ahead: bool,
}

/// What the sparse head is asked for.
#[derive(Debug, Default)]
pub(crate) struct HeadRequest {
    /// What is added to tokens' scores; they are candidates whatever it is.
    pub biases: Vec<(u32, f32)>,
}

/// Slots of the sparse head; rows of tokens are where the token's id says, whoever writes them.
#[derive(Debug)]
pub(crate) struct HeadSlots {
    pub request: Shared<HeadRequest>,
    /// Scores by the sketch, `[n_vocab]`.
    pub scores: SharedF32,
    /// The best score of each 16 tokens, `[⌈n_vocab / 16⌉]`.
    pub maxima: SharedF32,
    /// What a candidate's score reaches.
    pub threshold: Shared<f32>,
    /// A node's candidates, from the place of its first row on, `[n_vocab]`; their logits lie likewise in row 0 of
    /// `logits`.
    pub ids: SharedSlice<u32>,
    /// How many each node has.
    pub n_ids: Vec<Shared<usize>>,
}

impl HeadSlots {
    fn new(n_vocab: usize, n_nodes: usize) -> Self {
        Self {
            request: Shared::default(),
            scores: SharedSlice::new(n_vocab),
            maxima: SharedSlice::new(n_vocab.div_ceil(ROW_GROUP)),
            threshold: Shared::default(),
            ids: SharedSlice::new(n_vocab),
            n_ids: (0..n_nodes).map(|_| Shared::default()).collect(),
        }
    }
}

/// All slots of an engine; see the module's table.
#[derive(Debug)]
pub(crate) struct Slots {
    pub sizes: SlotSizes,
    pub step: Shared<StepInfo>,
    /// Residual stream, `[n_ubatch, n_embd]`.
    pub x: SharedF32,
    /// Rotations of the step's positions, `[n_ubatch, rope_len]`.
    pub rope: SharedF32,
    /// `[n_ubatch, n_embd]`
    pub normed: Shared<ActBatch>,
    /// Results of attention, `[n_ubatch, n_attn]`.
    pub heads: SharedF32,
    /// The same as activations.
    pub attn: Shared<ActBatch>,
    /// Result of the output projection, `[n_ubatch, n_embd]`.
    pub projected: SharedF32,
    /// For each node `[n_sums, n_ubatch, n_embd]`.
    pub partials: Vec<SharedF32>,
    /// For each node the ids of neurons that were predicted for a layer, counted from the node's first
    /// one, ascending: of even and of odd layers, as the next layer's are written while one is computed.
    pub predicted: Vec<[Shared<Vec<u32>>; 2]>,
    /// `[n_head_tokens, n_vocab]`
    pub logits: SharedF32,
    /// Of nothing where there is no sketch of the head.
    pub head: HeadSlots,
}

impl Slots {
    /// Slots for nodes that have at most `n_neurons[node]` neurons of a layer and send `n_sums[node]`
    /// partial sums each.
    pub fn new(sizes: SlotSizes, n_sums: &[usize], n_neurons: &[usize]) -> Self {
        let SlotSizes {
            mode,
            n_ubatch,
            n_embd,
            n_attn,
            ..
        } = sizes;
        let partials = n_sums
            .iter()
            .map(|n| SharedF32::new(n * n_ubatch * n_embd))
            .collect();
        Self {
            sizes,
            step: Shared::default(),
            x: SharedF32::new(n_ubatch * n_embd),
            rope: SharedF32::new(n_ubatch * sizes.rope_len),
            normed: Shared::new(ActBatch::new(mode, n_embd, n_ubatch)),
            heads: SharedF32::new(n_ubatch * n_attn),
            attn: Shared::new(ActBatch::new(mode, n_attn, n_ubatch)),
            projected: SharedF32::new(n_ubatch * n_embd),
            partials,
            predicted: (n_neurons.iter())
                .map(|n| {
                    let capacity = if sizes.ahead { *n } else { 0 };
                    std::array::from_fn(|_| Shared::new(Vec::with_capacity(capacity)))
                })
                .collect(),
            logits: SharedF32::new(sizes.n_head_tokens * sizes.n_vocab),
            head: HeadSlots::new(
                if sizes.head_sketch { sizes.n_vocab } else { 0 },
                n_sums.len(),
            ),
        }
    }

    /// Bytes of memory of the slots that all nodes use, and of each node's own.
    pub fn bytes(&self) -> (usize, Vec<usize>) {
        let SlotSizes {
            mode,
            n_ubatch,
            n_embd,
            n_attn,
            ..
        } = self.sizes;
        let batch = |n_cols| ActBatch::new(mode, n_cols, n_ubatch).bytes();
        let floats = [
            &self.x,
            &self.rope,
            &self.heads,
            &self.projected,
            &self.logits,
        ];
        let floats: usize = floats.iter().map(|slot| slot.bytes()).sum();
        let own = self.partials.iter().map(SharedF32::bytes).collect();
        (floats + batch(n_embd) + batch(n_attn), own)
    }
}
