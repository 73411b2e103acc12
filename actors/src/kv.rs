//! A node's cache of keys and values: memory that outlives the actors that use it, so that a
//! restarted actor goes on where the other one was.
#![allow(unsafe_code)]

use std::ops::Range;

use pi_kernels::attention::{KvHead, KvType};
use pi_topology::{Arena, Plan, TopologyError};

/// Keys and values of one node's heads in all layers.
///
/// Of each layer and head there are `[n_ctx, head_dim]` keys, then as many values.
#[derive(Debug)]
pub(crate) struct KvStore {
    arena: Arena,
    start: *mut u8,
    kv_type: KvType,
    head_dim: usize,
    n_ctx: usize,
    heads: Range<usize>,
    n_layer: usize,
}

// SAFETY: all access is through unsafe functions whose contract keeps writers and readers apart.
unsafe impl Send for KvStore {}
// SAFETY: as above.
unsafe impl Sync for KvStore {}

impl KvStore {
    /// Room for `n_ctx` positions of `heads` in `n_layer` layers, on the NUMA node of team `node` of `plan`. Pages are
    /// taken when positions are first written.
    ///
    /// # Errors
    /// The memory cannot be had.
    pub fn new(
        plan: &Plan,
        node: usize,
        kv_type: KvType,
        head_dim: usize,
        n_ctx: usize,
        heads: Range<usize>,
        n_layer: usize,
    ) -> Result<Self, TopologyError> {
        let bytes = 2 * kv_type.row_bytes(head_dim) * n_ctx * heads.len() * n_layer;
        let mut arena = plan.cache_arena(node, bytes.max(1))?;
        let start = arena.as_mut_slice().as_mut_ptr();
        Ok(Self {
            arena,
            start,
            kv_type,
            head_dim,
            n_ctx,
            heads,
            n_layer,
        })
    }

    /// Where it lies.
    pub fn addresses(&self) -> Range<usize> {
        let start = self.start.addr();
        start..start + self.arena.len()
    }

    fn matrix_bytes(&self) -> usize {
        self.kv_type.row_bytes(self.head_dim) * self.n_ctx
    }

    /// Offset of the keys of a head (the model's number) in a layer.
    fn offset(&self, layer: usize, head: usize) -> usize {
        assert!(
            layer < self.n_layer && self.heads.contains(&head),
            "layer {layer}, head {head}"
        );
        (layer * self.heads.len() + head - self.heads.start) * 2 * self.matrix_bytes()
    }

    /// The first `end` positions of a head.
    ///
    /// # Safety
    /// Nobody writes these positions while the result lives.
    pub unsafe fn head(&self, layer: usize, head: usize, end: usize) -> KvHead<'_> {
        assert!(end <= self.n_ctx, "{end} of {} positions", self.n_ctx);
        let len = self.kv_type.row_bytes(self.head_dim) * end;
        let keys = self.offset(layer, head);
        // SAFETY: inside the arena, which is zeroed memory; this function's contract.
        let at = |offset| unsafe { std::slice::from_raw_parts(self.start.add(offset), len) };
        KvHead {
            kv_type: self.kv_type,
            head_dim: self.head_dim,
            k: at(keys),
            v: at(keys + self.matrix_bytes()),
        }
    }

    /// The rows of keys and of values at `position` of a head, to be written.
    ///
    /// # Safety
    /// Nobody else touches this position while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, layer: usize, head: usize, position: usize) -> [&mut [u8]; 2] {
        assert!(
            position < self.n_ctx,
            "position {position} of {}",
            self.n_ctx
        );
        let len = self.kv_type.row_bytes(self.head_dim);
        let keys = self.offset(layer, head) + position * len;
        // SAFETY: inside the arena; this function's contract.
        let at = |offset| unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), len) };
        [at(keys), at(keys + self.matrix_bytes())]
    }
}
