//! Attention of one token over a cache on the device.

use super::activations::{DeviceAct, RawAct};
use super::buffer::{DeviceBuffer, View, ViewMut};
use super::device::Device;
use super::functions::{ATTEND_GROUP_DIMS, ATTEND_HEADS};
use super::predict::{PredictMasks, RawMasks, predict_blocks};
use super::stream::{Grid, Stream};
use crate::activations::ActivationMode;
use crate::attention::{HEAD_DIM_MAX, KvType};
use crate::error::KernelError;
use crate::quant::BLOCK;
use crate::rope::RopePairs;

/// Threads of a block of `attend`.
const THREADS: usize = 128;
/// Blocks that share the work on a multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 2;
/// Threads of a block of `attend_group`, of which a multiprocessor has room for one.
const GROUP_THREADS: usize = 256;
/// Query heads of such a block, at most.
const GROUP_HEADS: usize = 8;
/// Query heads that share a key/value head from which on it is faster: it computes with all eight.
const GROUP_HEADS_MIN: usize = 3;
/// Positions of a part of it, at least.
const GROUP_POSITIONS_MIN: usize = 128;
/// Threads of a block of `attend_lone`.
const LONE_THREADS: usize = GROUP_THREADS;
/// Warps of a block of either.
const PREDICT_WARPS: usize = GROUP_THREADS / 32;
/// Positions of a part of it, at least.
const LONE_POSITIONS_MIN: usize = 128;
/// Parts that one block can join.
const PARTS_MAX: usize = 64;
/// Positions below which dividing a context further gains nothing.
const POSITIONS_MIN: usize = 32;
/// Contexts up to which fewer heads share a block: to read keys and values more often takes less time than to compute with them one
/// head after the other.
const SHORT_CONTEXT: usize = 4096;

/// Keys and values of one layer, `[n_head_kv, n_ctx, head_dim]` each.
#[derive(Debug)]
pub struct DeviceCache {
    kv_type: KvType,
    n_head_kv: usize,
    n_ctx: usize,
    head_dim: usize,
    k: DeviceBuffer<u8>,
    v: DeviceBuffer<u8>,
}

impl DeviceCache {
    /// An empty cache.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    ///
    /// # Panics
    /// When `head_dim` is no multiple of 8 in 8 … [`HEAD_DIM_MAX`], or there are no heads or positions.
    pub fn new(
        device: &Device,
        kv_type: KvType,
        n_head_kv: usize,
        n_ctx: usize,
        head_dim: usize,
    ) -> Result<Self, KernelError> {
        assert!(
            head_dim.is_multiple_of(8) && (8..=HEAD_DIM_MAX).contains(&head_dim),
            "head_dim {head_dim} is a multiple of 8 up to {HEAD_DIM_MAX}"
        );
        assert!(n_head_kv > 0 && n_ctx > 0, "a cache of something");
        let bytes = n_head_kv * n_ctx * kv_type.row_bytes(head_dim);
        Ok(Self {
            kv_type,
            n_head_kv,
            n_ctx,
            head_dim,
            k: device.alloc(bytes)?,
            v: device.alloc(bytes)?,
        })
    }

    /// Format of the values.
    pub fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Heads of keys and values.
    pub fn n_head_kv(&self) -> usize {
        self.n_head_kv
    }

    /// Positions.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Values of a row.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// The keys, `[n_head_kv, n_ctx, head_dim]` of `kv_type`.
    pub fn keys(&self) -> View<'_, u8> {
        self.k.view(..)
    }

    /// The values, likewise.
    pub fn values(&self) -> View<'_, u8> {
        self.v.view(..)
    }

    /// The keys and the values, to be written.
    pub fn halves_mut(&mut self) -> (ViewMut<'_, u8>, ViewMut<'_, u8>) {
        (self.k.view_mut(..), self.v.view_mut(..))
    }

    pub(super) fn addresses(&self) -> (u64, u64) {
        (self.k.view(..).address(), self.v.view(..).address())
    }

    pub(super) fn device(&self) -> &Device {
        self.k.device()
    }
}

/// The kernel of a shape.
#[derive(Debug, Clone, Copy)]
enum Kernel {
    /// `attend`, by place in [`ATTEND_HEADS`].
    Heads(usize),
    /// `attend_group`, by place in [`ATTEND_GROUP_DIMS`].
    Group(usize),
    /// `attend_lone`, likewise.
    Lone(usize),
}

impl Kernel {
    /// Query heads of a block, at most.
    fn heads(self) -> usize {
        match self {
            Kernel::Heads(place) => ATTEND_HEADS[place],
            Kernel::Group(_) => GROUP_HEADS,
            Kernel::Lone(_) => 1,
        }
    }
}

/// Memory that [`attend`] works in. One launch at a time may use it; layers of the same shape can share it.
#[derive(Debug)]
pub struct AttendScratch {
    n_head: usize,
    n_head_kv: usize,
    head_dim: usize,
    kv_type: KvType,
    kernel: Kernel,
    n_groups: usize,
    n_parts: usize,
    states: DeviceBuffer<f32>,
    tickets: DeviceBuffer<u32>,
}

impl AttendScratch {
    /// For `n_head` query heads over `n_head_kv` key/value heads and contexts of up to `n_ctx` positions. How the
    /// positions are divided, and so the result's last bits, depends on these, the number of multiprocessors and
    /// the position, on nothing else.
    ///
    /// With 8-bit arithmetic and an f16 cache whose heads are shared by three query heads or more, of 64 or 128 values, tensor cores
    /// get queries and weights as f16.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    ///
    /// # Panics
    /// When `n_head_kv` does not divide `n_head`.
    pub fn new(
        device: &Device,
        n_head: usize,
        n_head_kv: usize,
        head_dim: usize,
        n_ctx: usize,
        kv_type: KvType,
        mode: ActivationMode,
    ) -> Result<Self, KernelError> {
        assert!(
            n_head > 0 && n_head.is_multiple_of(n_head_kv),
            "{n_head} heads share {n_head_kv}"
        );
        let shared_by = n_head / n_head_kv;
        let of_dim = ATTEND_GROUP_DIMS.iter().position(|&dim| dim == head_dim);
        let shares =
            mode == ActivationMode::Q8 && kv_type == KvType::F16 && shared_by >= GROUP_HEADS_MIN;
        let kernel = match of_dim {
            Some(place) if shared_by == 1 => Kernel::Lone(place),
            Some(place) if shares => Kernel::Group(place),
            _ => {
                let most = match n_ctx {
                    0..=SHORT_CONTEXT => ATTEND_HEADS.len() - 2,
                    _ => ATTEND_HEADS.len() - 1,
                };
                let heads = ATTEND_HEADS.iter().position(|&heads| heads >= shared_by);
                Kernel::Heads(heads.unwrap_or(most).min(most))
            }
        };
        let (blocks, positions) = match kernel {
            Kernel::Heads(_) => (BLOCKS_PER_MULTIPROCESSOR, POSITIONS_MIN),
            Kernel::Group(_) => (1, GROUP_POSITIONS_MIN),
            Kernel::Lone(_) => (BLOCKS_PER_MULTIPROCESSOR, LONE_POSITIONS_MIN),
        };
        let n_groups = n_head_kv * shared_by.div_ceil(kernel.heads());
        let room = device.info().n_multiprocessors * blocks;
        let n_parts = (room / n_groups).clamp(1, n_ctx.div_ceil(positions).clamp(1, PARTS_MAX));
        Ok(Self {
            n_head,
            n_head_kv,
            head_dim,
            kv_type,
            kernel,
            n_groups,
            n_parts,
            states: device.alloc(n_parts * n_head * (head_dim + 2))?,
            tickets: device.alloc(n_groups)?,
        })
    }

    /// Whether a launch has room for blocks that predict beside, of `n` neurons at once: those of a short context leave it.
    pub fn can_predict(&self, n: usize) -> bool {
        let blocks = match self.kernel {
            Kernel::Heads(_) => return false,
            Kernel::Group(_) => 1,
            Kernel::Lone(_) => BLOCKS_PER_MULTIPROCESSOR,
        };
        let n_multiprocessors = self.states.device().info().n_multiprocessors;
        self.n_groups + predict_blocks(n, PREDICT_WARPS) <= n_multiprocessors * blocks
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.states.bytes() + self.tickets.bytes()
    }
}

#[repr(C)]
struct AttendArgs {
    q: u64,
    k_cache: u64,
    v_cache: u64,
    position: u64,
    out: u64,
    states: u64,
    tickets: u64,
    n_head: u32,
    n_head_kv: u32,
    head_dim: u32,
    n_ctx: u32,
    window: u32,
    scale: f32,
    k: u64,
    v: u64,
    rotation: u64,
    n_dims: u32,
    halves: u32,
    act: RawAct,
    predict: RawMasks,
    n_groups: u32,
}

const _: () = assert!(size_of::<AttendArgs>() == 216);

/// A token whose keys and values are not in the cache yet.
#[derive(Debug)]
pub struct AttendToken<'a> {
    /// `[n_head, head_dim]` f32, not rotated.
    pub q: View<'a, f32>,
    /// `[n_head_kv, head_dim]` f32, not rotated.
    pub k: View<'a, f32>,
    /// `[n_head_kv, head_dim]` f32.
    pub v: View<'a, f32>,
    /// `[2, n_dims]` f32: a row of [`crate::rope::RopeTable::fill`] for the token's position.
    pub rotation: View<'a, f32>,
    /// Which values of a head form a pair.
    pub pairs: RopePairs,
    /// `[1]` u32: the token's position.
    pub position: View<'a, u32>,
}

/// Whether [`attend_token`] can be used: activations are written 32 at a time.
pub fn can_attend_token(head_dim: usize) -> bool {
    head_dim.is_multiple_of(BLOCK)
}

/// As [`super::rope_append`], [`attend`] and [`super::prepare`] one after the other, with the same bits; queries are left as they
/// are. What earlier tokens have in the cache is there before the launch before this one starts: it may be read while that one ends.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit, the window is 0, or not [`can_attend_token`].
pub fn attend_token(
    stream: &Stream,
    token: AttendToken<'_>,
    cache: &mut DeviceCache,
    window: Option<usize>,
    scale: f32,
    scratch: &mut AttendScratch,
    to: &mut DeviceAct,
) -> Result<(), KernelError> {
    attend_token_with(stream, token, cache, window, scale, scratch, None, to)
}

/// The same, with a predictor's scores beside.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// As [`attend_token`]; when something is predicted and the kernel has no blocks for it ([`AttendScratch::can_predict`] of one neuron); when
/// shapes of that do not fit.
pub fn attend_token_with(
    stream: &Stream,
    token: AttendToken<'_>,
    cache: &mut DeviceCache,
    window: Option<usize>,
    scale: f32,
    scratch: &mut AttendScratch,
    predict: Option<PredictMasks<'_>>,
    to: &mut DeviceAct,
) -> Result<(), KernelError> {
    let (head_dim, n_kv) = (cache.head_dim, cache.n_head_kv * cache.head_dim);
    let n_dims = token.rotation.len() / 2;
    assert!(can_attend_token(head_dim), "whole blocks of activations");
    assert!(
        token.k.len() == n_kv && token.v.len() == n_kv,
        "keys and values of the cache's heads"
    );
    assert!(
        token.rotation.len().is_multiple_of(4) && n_dims <= head_dim,
        "rotations of pairs of a head"
    );
    assert_eq!(to.n_cols(), token.q.len(), "activations of all heads");
    stream.check(&[token.k.device(), token.v.device(), token.rotation.device()]);
    stream.check(&[to.device()]);
    let rest = Rest {
        k: token.k.address(),
        v: token.v.address(),
        rotation: token.rotation.address(),
        n_dims: n_dims as u32,
        halves: u32::from(token.pairs == RopePairs::Halves),
        act: to.written(),
        predict,
        out: 0,
    };
    launch(
        stream,
        token.q,
        cache,
        token.position,
        window,
        scale,
        scratch,
        rest,
    )
}

/// What differs between [`attend`] and [`attend_token`].
struct Rest<'a> {
    k: u64,
    v: u64,
    rotation: u64,
    n_dims: u32,
    halves: u32,
    act: RawAct,
    predict: Option<PredictMasks<'a>>,
    out: u64,
}

/// Writes the attention of one token's queries `q` (`[n_head, head_dim]` f32, rotated) over `cache` to `out`
/// (`[n_head, head_dim]` f32, overwritten). The token, at `position` (`[1]` u32), sees positions up to its own, of
/// which `window` takes the last ones. `scale` multiplies the queries, commonly 1/√head_dim.
///
/// As [`crate::attention::attend`], but for the order of sums, and for queries and weights that are rounded to f16 where
/// [`AttendScratch::new`] says so: results are then right to about 10⁻³ of the largest value, else to 10⁻⁶. A position beyond the
/// cache is taken as its last. What earlier tokens have in the cache is there before the launch before this one starts.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit, or the window is 0.
pub fn attend(
    stream: &Stream,
    q: View<'_, f32>,
    cache: &DeviceCache,
    position: View<'_, u32>,
    window: Option<usize>,
    scale: f32,
    scratch: &mut AttendScratch,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    assert_eq!(out.len(), q.len(), "heads of a token");
    stream.check(&[out.device()]);
    let rest = Rest {
        k: 0,
        v: 0,
        rotation: 0,
        n_dims: 0,
        halves: 0,
        act: RawAct::NONE,
        predict: None,
        out: out.address(),
    };
    launch(stream, q, cache, position, window, scale, scratch, rest)
}

fn launch(
    stream: &Stream,
    q: View<'_, f32>,
    cache: &DeviceCache,
    position: View<'_, u32>,
    window: Option<usize>,
    scale: f32,
    scratch: &mut AttendScratch,
    rest: Rest<'_>,
) -> Result<(), KernelError> {
    let (n_head, head_dim) = (scratch.n_head, scratch.head_dim);
    assert_eq!(cache.head_dim, head_dim, "head_dim of the scratch");
    assert_eq!(cache.n_head_kv, scratch.n_head_kv, "heads of the scratch");
    assert_eq!(cache.kv_type, scratch.kv_type, "values of the scratch");
    assert_eq!(q.len(), n_head * head_dim, "heads of a token");
    assert_eq!(position.len(), 1, "one position");
    assert!(window != Some(0), "a window sees at least the token itself");
    stream.check(&[q.device(), cache.device(), position.device()]);
    stream.check(&[scratch.tickets.device()]);
    let (k_cache, v_cache) = cache.addresses();
    let is_alone = rest.predict.is_none();
    let has_blocks = !matches!(scratch.kernel, Kernel::Heads(_));
    assert!(is_alone || has_blocks, "blocks that predict");
    let (predict, n_beside) = rest.predict.map_or((RawMasks::NONE, 0), |predict| {
        predict.raw(stream, PREDICT_WARPS)
    });
    let args = AttendArgs {
        q: q.address(),
        k_cache,
        v_cache,
        position: position.address(),
        out: rest.out,
        states: scratch.states.view(..).address(),
        tickets: scratch.tickets.view(..).address(),
        n_head: n_head as u32,
        n_head_kv: cache.n_head_kv as u32,
        head_dim: head_dim as u32,
        n_ctx: cache.n_ctx as u32,
        window: window.map_or(0, |window| window.min(cache.n_ctx) as u32),
        scale,
        k: rest.k,
        v: rest.v,
        rotation: rest.rotation,
        n_dims: rest.n_dims,
        halves: rest.halves,
        act: rest.act,
        predict,
        n_groups: scratch.n_groups as u32,
    };
    let functions = stream.functions();
    let (function, threads, shared_bytes) = match scratch.kernel {
        Kernel::Heads(place) => {
            // sums of as many groups of threads as a row leaves room for
            let row_groups = THREADS / (head_dim / 8);
            let shared_bytes = row_groups * scratch.kernel.heads() * head_dim * size_of::<f32>();
            (
                functions.attend(cache.kv_type, place),
                THREADS,
                shared_bytes,
            )
        }
        Kernel::Group(place) => (functions.attend_group(place), GROUP_THREADS, 0),
        Kernel::Lone(place) => (functions.attend_lone(cache.kv_type, place), LONE_THREADS, 0),
    };
    let grid = Grid {
        blocks: [
            scratch.n_parts,
            scratch.n_groups + n_beside.div_ceil(scratch.n_parts),
        ],
        threads,
        shared_bytes,
    };
    // SAFETY: all shapes fit (asserted); the scratch was made for them; shared memory is at most 32 KiB.
    unsafe { stream.launch("launch attend", function, grid, args) }
}
