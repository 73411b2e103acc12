//! The largest logits, chosen on the device.

use super::buffer::{DeviceBuffer, View, ViewMut};
use super::device::Device;
use super::stream::{Grid, Stream};
use crate::error::KernelError;

/// Largest `k` of [`top_k`].
pub const TOP_K_MAX: usize = 256;

/// Keys that a block of `top_k` sorts.
const KEYS: usize = 1024;
/// Blocks of `argmax`.
const ARGMAX_BLOCKS: usize = 64;

/// Memory that [`argmax`] and [`top_k`] work in. One launch at a time may use it.
#[derive(Debug)]
pub struct SampleScratch {
    n: usize,
    /// Keys of one round and of the next.
    keys: [DeviceBuffer<u64>; 2],
    ticket: DeviceBuffer<u32>,
}

impl SampleScratch {
    /// For up to `n` logits.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device, n: usize) -> Result<Self, KernelError> {
        let len = (n.div_ceil(KEYS) * TOP_K_MAX).max(ARGMAX_BLOCKS);
        let next = (len.div_ceil(KEYS) * TOP_K_MAX).max(1);
        Ok(Self {
            n,
            keys: [device.alloc(len)?, device.alloc(next)?],
            ticket: device.alloc(1)?,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.keys[0].bytes() + self.keys[1].bytes() + self.ticket.bytes()
    }
}

#[repr(C)]
struct ArgmaxArgs {
    logits: u64,
    n: u32,
    id: u64,
    partials: u64,
    ticket: u64,
}

const _: () = assert!(size_of::<ArgmaxArgs>() == 40);

/// Writes the index of the largest of `logits` (`[n]` f32) to `id` (`[1]` u32, overwritten): the lowest one where
/// several are equal. NaN is never chosen; `u32::MAX` where there is nothing but NaN.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn argmax(
    stream: &Stream,
    logits: View<'_, f32>,
    scratch: &mut SampleScratch,
    id: ViewMut<'_, u32>,
) -> Result<(), KernelError> {
    assert!(
        logits.len() <= scratch.n,
        "scratch for {} logits",
        scratch.n
    );
    assert_eq!(id.len(), 1, "one id");
    stream.check(&[logits.device(), id.device(), scratch.ticket.device()]);
    let args = ArgmaxArgs {
        logits: logits.address(),
        n: logits.len() as u32,
        id: id.address(),
        partials: scratch.keys[0].view(..).address(),
        ticket: scratch.ticket.view(..).address(),
    };
    let grid = Grid {
        blocks: [ARGMAX_BLOCKS, 1],
        threads: 256,
        shared_bytes: 0,
    };
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch argmax", stream.functions().argmax, grid, args) }
}

#[repr(C)]
struct TopKArgs {
    logits: u64,
    keys: u64,
    n: u32,
    k: u32,
    out: u64,
    values: u64,
    ids: u64,
}

const _: () = assert!(size_of::<TopKArgs>() == 48);

/// Writes the `k` largest of `logits` (`[n]` f32) in descending order to `values` (`[k]` f32) and their indices to
/// `ids` (`[k]` u32), both overwritten; of equal ones the lower index is first. NaN is never chosen; −∞ and
/// `u32::MAX` where there are fewer.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit, or `k` is not in 1 … [`TOP_K_MAX`].
pub fn top_k(
    stream: &Stream,
    logits: View<'_, f32>,
    scratch: &mut SampleScratch,
    values: ViewMut<'_, f32>,
    ids: ViewMut<'_, u32>,
) -> Result<(), KernelError> {
    let k = values.len();
    assert!((1..=TOP_K_MAX).contains(&k) && ids.len() == k, "k of {k}");
    assert!(
        logits.len() <= scratch.n,
        "scratch for {} logits",
        scratch.n
    );
    stream.check(&[
        logits.device(),
        values.device(),
        ids.device(),
        scratch.ticket.device(),
    ]);
    // each round leaves k of 1024, until one block is enough
    let (mut from, mut n, mut round) = (0, logits.len(), 0);
    loop {
        let n_blocks = n.div_ceil(KEYS).max(1);
        let to = scratch.keys[round % 2].view(..).address();
        let is_last = n_blocks == 1;
        let args = TopKArgs {
            logits: if round == 0 { logits.address() } else { 0 },
            keys: from,
            n: n as u32,
            k: k as u32,
            out: if is_last { 0 } else { to },
            values: values.address(),
            ids: ids.address(),
        };
        let grid = Grid {
            blocks: [n_blocks, 1],
            threads: KEYS / 2,
            shared_bytes: 0,
        };
        // SAFETY: all lengths fit (asserted); a round's keys are no more than the scratch was made for.
        unsafe { stream.launch("launch top_k", stream.functions().top_k, grid, args)? };
        if is_last {
            return Ok(());
        }
        (from, n, round) = (to, n_blocks * k, round + 1);
    }
}
