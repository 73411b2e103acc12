//! Attention of several tokens over a cache on the device.

use super::attention::DeviceCache;
use super::buffer::{View, ViewMut};
use super::stream::{Grid, Stream};
use crate::activations::ActivationMode;
use crate::attention::KvType;
use crate::error::KernelError;

/// Positions of a tile (`POSITIONS` of `kernels/cuda/attention_batch.cu`).
const POSITIONS: usize = 32;
/// Columns of values that a block sums (`VALUE_COLUMNS`).
const VALUE_COLUMNS: usize = 128;
/// Queries of a warp (`WARP_QUERIES`).
const WARP_QUERIES: usize = 16;
/// Shared memory that a block may take: what GPUs of 7.5 have, less what a kernel has for itself.
pub(super) const SHARED_BYTES_MAX: usize = 63 << 10;

#[repr(C)]
struct AttendBatchArgs {
    q: u64,
    k_cache: u64,
    v_cache: u64,
    position: u64,
    out: u64,
    n_tokens: u32,
    n_head: u32,
    n_head_kv: u32,
    head_dim: u32,
    n_ctx: u32,
    window: u32,
    key_columns: u32,
    scale: f32,
}

const _: () = assert!(size_of::<AttendBatchArgs>() == 72);

/// Warps of a block, columns of keys in shared memory at a time, and bytes of shared memory.
fn divide(mode: ActivationMode, kv_type: KvType, head_dim: usize) -> (usize, usize, usize) {
    let (planes, cache_planes) = match (mode, kv_type) {
        (ActivationMode::Q8, _) => (1, 1),
        (ActivationMode::F32, KvType::F16) => (2, 1),
        (ActivationMode::F32, KvType::F32) => (2, 2),
    };
    let columns = head_dim.next_multiple_of(16);
    // a tile's row has 16 bytes more than its values, so that rows lie in different banks
    let tile_bytes = |n_rows: usize, columns: usize| n_rows * (columns * 2 + 16);
    let with = |(n_warps, key_columns): (usize, usize)| {
        let key_columns = columns.min(key_columns);
        let bytes = planes * tile_bytes(n_warps * WARP_QUERIES, columns)
            + cache_planes * tile_bytes(POSITIONS, key_columns)
            + cache_planes * tile_bytes(POSITIONS, columns.min(VALUE_COLUMNS));
        (n_warps, key_columns, bytes)
    };
    let mut all = [(4, 128), (2, 128), (1, 128), (1, 64)]
        .into_iter()
        .map(with);
    let fits = |(_, _, bytes): &(usize, usize, usize)| *bytes <= SHARED_BYTES_MAX;
    all.find(fits).expect("a cache's largest head fits")
}

/// Writes the attention of several tokens' queries `q` (`[n_tokens, n_head, head_dim]` f32, rotated) over `cache` to
/// `out` (likewise, overwritten). The first token is at `position` (`[1]` u32), the others behind it; each sees
/// positions up to its own, of which `window` takes the last ones: the tokens' own keys and values are in the cache
/// ([`super::rope_append_batch`]). `scale` multiplies the queries, commonly 1/√head_dim.
///
/// As [`crate::attention::attend`], but for the order of sums, and in mode `Q8` for queries, keys, values and weights
/// that are rounded to f16: with values of at most `v`, results are right to about 10⁻⁶ · v in mode `F32`, and to
/// 10⁻³ · v in mode `Q8` where scores are within ±8, more where they are larger. A position beyond the cache is taken
/// as its last. A cached value that is not finite makes NaN of tokens up to 31 positions before it, too.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit, or the window is 0.
pub fn attend_batch(
    stream: &Stream,
    mode: ActivationMode,
    q: View<'_, f32>,
    n_tokens: usize,
    cache: &DeviceCache,
    position: View<'_, u32>,
    window: Option<usize>,
    scale: f32,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let (head_dim, n_head_kv) = (cache.head_dim(), cache.n_head_kv());
    assert_eq!(q.len(), out.len(), "queries and results");
    assert_eq!(position.len(), 1, "one position");
    assert!(window != Some(0), "a window sees at least the token itself");
    stream.check(&[q.device(), cache.device(), position.device()]);
    stream.check(&[out.device()]);
    if n_tokens == 0 {
        assert!(q.is_empty(), "queries of no tokens");
        return Ok(());
    }
    let n_head = q.len() / (n_tokens * head_dim);
    assert!(
        n_head > 0 && q.len() == n_tokens * n_head * head_dim && n_head.is_multiple_of(n_head_kv),
        "whole heads, which share those of the cache"
    );
    let (n_warps, key_columns, shared_bytes) = divide(mode, cache.kv_type(), head_dim);
    let (k_cache, v_cache) = cache.addresses();
    let args = AttendBatchArgs {
        q: q.address(),
        k_cache,
        v_cache,
        position: position.address(),
        out: out.address(),
        n_tokens: n_tokens as u32,
        n_head: n_head as u32,
        n_head_kv: n_head_kv as u32,
        head_dim: head_dim as u32,
        n_ctx: cache.n_ctx() as u32,
        window: window.map_or(0, |window| window.min(cache.n_ctx()) as u32),
        key_columns: key_columns as u32,
        scale,
    };
    let n_queries = n_tokens * n_head / n_head_kv;
    let grid = Grid {
        blocks: [
            n_queries.div_ceil(n_warps * WARP_QUERIES),
            n_head_kv * head_dim.div_ceil(VALUE_COLUMNS),
        ],
        threads: n_warps * 32,
        shared_bytes,
    };
    let function = stream.functions().prefill.attend(cache.kv_type(), mode);
    // SAFETY: all shapes fit (asserted).
    unsafe { stream.launch("launch attend_batch", function, grid, args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::HEAD_DIM_MAX;

    #[test]
    fn blocks_of_every_head_fit_into_shared_memory() {
        for mode in [ActivationMode::F32, ActivationMode::Q8] {
            for kv_type in [KvType::F16, KvType::F32] {
                for head_dim in (8..=HEAD_DIM_MAX).step_by(8) {
                    let (n_warps, key_columns, bytes) = divide(mode, kv_type, head_dim);
                    assert!(bytes <= SHARED_BYTES_MAX && key_columns.is_multiple_of(16));
                    assert!(n_warps == 4 || head_dim > 64, "{head_dim}: {n_warps} warps");
                }
            }
        }
    }
}
