//! Rotary position embedding, and the cache of keys and values.

use super::attention::DeviceCache;
use super::buffer::{View, ViewMut};
use super::stream::{Grid, Stream};
use crate::attention::KvType;
use crate::error::KernelError;
use crate::rope::RopePairs;

/// What [`rope_append`] rotates and stores; of [`rope_append_batch`] every array but `position` has the tokens as its
/// first dimension.
#[derive(Debug)]
pub struct RopeAppend<'a> {
    /// `[n_head, head_dim]` f32, rotated in place.
    pub q: ViewMut<'a, f32>,
    /// `[n_head_kv, head_dim]` f32, left as they are.
    pub k: View<'a, f32>,
    /// `[n_head_kv, head_dim]` f32.
    pub v: View<'a, f32>,
    /// `[2, n_dims]` f32: a row of [`crate::rope::RopeTable::fill`] for the token's position.
    pub rotation: View<'a, f32>,
    /// Which values of a head form a pair.
    pub pairs: RopePairs,
    /// `[1]` u32: the position of the token, or of the first of several, which are at consecutive positions.
    pub position: View<'a, u32>,
}

#[repr(C)]
struct RopeAppendArgs {
    q: u64,
    k: u64,
    v: u64,
    rotation: u64,
    position: u64,
    k_cache: u64,
    v_cache: u64,
    n_head: u32,
    n_head_kv: u32,
    head_dim: u32,
    n_dims: u32,
    n_ctx: u32,
    halves: u32,
    cache_f32: u32,
}

const _: () = assert!(size_of::<RopeAppendArgs>() == 88);

/// Rotates the queries of one token, and writes its rotated keys and its values to `cache` at its position. The bits
/// are those of [`crate::rope::RopeTable::apply`] and [`crate::attention::append`]. A position that the cache does
/// not have writes nothing.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn rope_append(
    stream: &Stream,
    token: RopeAppend<'_>,
    cache: &mut DeviceCache,
) -> Result<(), KernelError> {
    rope_append_batch(stream, token, 1, cache)
}

/// [`rope_append`] for `n_tokens` tokens at consecutive positions: the same bits.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn rope_append_batch(
    stream: &Stream,
    token: RopeAppend<'_>,
    n_tokens: usize,
    cache: &mut DeviceCache,
) -> Result<(), KernelError> {
    let (head_dim, n_head_kv) = (cache.head_dim(), cache.n_head_kv());
    if n_tokens == 0 {
        return Ok(());
    }
    let n_dims = token.rotation.len() / (2 * n_tokens);
    let n_head = token.q.len() / (n_tokens * head_dim);
    assert_eq!(
        token.q.len(),
        n_tokens * n_head * head_dim,
        "whole heads of every token"
    );
    let kv_len = n_tokens * n_head_kv * head_dim;
    assert!(
        token.k.len() == kv_len && token.v.len() == kv_len,
        "keys and values of the cache's heads"
    );
    assert!(
        token.rotation.len() == 2 * n_tokens * n_dims
            && n_dims.is_multiple_of(2)
            && n_dims <= head_dim,
        "rotations of pairs of a head"
    );
    assert_eq!(token.position.len(), 1, "one position");
    stream.check(&[token.q.device(), token.k.device(), token.v.device()]);
    stream.check(&[
        token.rotation.device(),
        token.position.device(),
        cache.device(),
    ]);
    let (k_cache, v_cache) = cache.addresses();
    let args = RopeAppendArgs {
        q: token.q.address(),
        k: token.k.address(),
        v: token.v.address(),
        rotation: token.rotation.address(),
        position: token.position.address(),
        k_cache,
        v_cache,
        n_head: n_head as u32,
        n_head_kv: n_head_kv as u32,
        head_dim: head_dim as u32,
        n_dims: n_dims as u32,
        n_ctx: cache.n_ctx() as u32,
        halves: u32::from(token.pairs == RopePairs::Halves),
        cache_f32: u32::from(cache.kv_type() == KvType::F32),
    };
    let grid = Grid {
        blocks: [n_head + 2 * n_head_kv, n_tokens],
        threads: 128,
        shared_bytes: 0,
    };
    // SAFETY: all shapes fit (asserted).
    unsafe {
        stream.launch(
            "launch rope_append",
            stream.functions().rope_append,
            grid,
            args,
        )
    }
}
