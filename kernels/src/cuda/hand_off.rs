//! What passes between host and device within a token.

use std::time::Duration;

use super::buffer::{DeviceBuffer, View, ViewMut};
use super::stream::{Grid, Stream};
use crate::error::KernelError;
use crate::quant::BLOCK;

/// Words that a block of `hand_over` takes, about.
const WORDS_PER_BLOCK: usize = 4096;
/// Threads of a block of `take_over`, each of which takes two values.
const THREADS: usize = 256;
/// Most blocks of it: a few keep the link busy.
const BLOCKS_MAX: usize = 32;

/// What [`begin_token`] fetches.
#[derive(Debug)]
pub struct BeginToken<'a> {
    /// `[n_embd]` f32 in the host's memory, and where they go.
    pub x: (View<'a, f32>, ViewMut<'a, f32>),
    /// `[rope_len]` f32, likewise.
    pub rotation: (View<'a, f32>, ViewMut<'a, f32>),
    /// `[2]` u32: position and number of the token, likewise.
    pub words: (View<'a, u32>, ViewMut<'a, u32>),
    /// `[1]` u64 in the host's memory: gets the device's time, in ns, at which the token began.
    pub stamp: View<'a, u64>,
}

#[repr(C)]
struct BeginArgs {
    x_in: u64,
    rotation_in: u64,
    words_in: u64,
    x: u64,
    rotation: u64,
    words: u64,
    stamp: u64,
    n: u32,
    n_rotation: u32,
}

const _: () = assert!(size_of::<BeginArgs>() == 64);

/// Copies a token's embedding, rotation, position and number to the device.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths or devices do not fit.
pub fn begin_token(stream: &Stream, token: BeginToken<'_>) -> Result<(), KernelError> {
    let BeginToken {
        x,
        rotation,
        words,
        stamp,
    } = token;
    assert_eq!(stamp.len(), 1, "one stamp");
    assert_eq!(x.0.len(), x.1.len(), "an embedding");
    assert_eq!(rotation.0.len(), rotation.1.len(), "a rotation");
    assert!(words.0.len() == 2 && words.1.len() == 2, "two words");
    stream.check(&[x.0.device(), rotation.0.device(), words.0.device()]);
    stream.check(&[x.1.device(), rotation.1.device(), words.1.device()]);
    stream.check(&[stamp.device()]);
    let args = BeginArgs {
        x_in: x.0.address(),
        rotation_in: rotation.0.address(),
        words_in: words.0.address(),
        x: x.1.address(),
        rotation: rotation.1.address(),
        words: words.1.address(),
        stamp: stamp.address(),
        n: x.0.len() as u32,
        n_rotation: rotation.0.len() as u32,
    };
    let grid = Grid {
        blocks: [x.0.len().div_ceil(1024).clamp(1, BLOCKS_MAX), 1],
        threads: 1024,
        shared_bytes: 0,
    };
    let function = stream.functions().begin_token;
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch begin_token", function, grid, args) }
}

/// What [`hand_over`] writes.
#[derive(Debug)]
pub struct HandOver<'a> {
    /// `[n]` words on the device: u32, or bits of f32 ([`View::to_bits`]).
    pub from: View<'a, u32>,
    /// `[1]` u32 on the device: how many of them are written; and where that is written, `[1]` u32 in the host's memory.
    /// None: all.
    pub count: Option<(View<'a, u32>, View<'a, u32>)>,
    /// `[n]` words in the host's memory.
    pub to: View<'a, u32>,
    /// `[1]` u32 in the host's memory: gets the number when the rest is there.
    pub flag: View<'a, u32>,
    /// `[1]` u32 on the device: the token's number.
    pub number: View<'a, u32>,
    /// `[1]` u64 in the host's memory: gets the device's time, in ns, just before the flag is set.
    pub stamp: View<'a, u64>,
}

/// `HandOver` of `kernels/cuda/hand_off.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RawHandOver {
    flag: u64,
    number: u64,
    ticket: u64,
    stamp: u64,
}

#[repr(C)]
struct HandOverArgs {
    from: u64,
    count: u64,
    to: u64,
    to_count: u64,
    hand: RawHandOver,
    n: u32,
}

const _: () = assert!(size_of::<HandOverArgs>() == 72);

/// Writes words to the host's memory, and then the token's number to a flag there.
///
/// `ticket` (`[1]` u32) is zero, and is left so; one launch at a time may use it.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths or devices do not fit.
pub fn hand_over(
    stream: &Stream,
    what: HandOver<'_>,
    ticket: &mut DeviceBuffer<u32>,
) -> Result<(), KernelError> {
    let n = what.from.len();
    assert_eq!(what.to.len(), n, "room for all words");
    assert_eq!(what.flag.len(), 1, "one flag");
    assert_eq!(what.number.len(), 1, "one number");
    assert_eq!(ticket.len(), 1, "one ticket");
    stream.check(&[what.from.device(), what.to.device(), what.flag.device()]);
    assert_eq!(what.stamp.len(), 1, "one stamp");
    stream.check(&[what.number.device(), ticket.device(), what.stamp.device()]);
    if let Some((count, to_count)) = &what.count {
        assert!(count.len() == 1 && to_count.len() == 1, "one count");
        stream.check(&[count.device(), to_count.device()]);
    }
    let (count, to_count) = what
        .count
        .map_or((0, 0), |(count, to)| (count.address(), to.address()));
    let args = HandOverArgs {
        from: what.from.address(),
        count,
        to: what.to.address(),
        to_count,
        hand: RawHandOver {
            flag: what.flag.address(),
            number: what.number.address(),
            ticket: ticket.view(..).address(),
            stamp: what.stamp.address(),
        },
        n: n as u32,
    };
    let grid = Grid {
        blocks: [n.div_ceil(WORDS_PER_BLOCK).clamp(1, BLOCKS_MAX), 1],
        threads: 1024,
        shared_bytes: 0,
    };
    let function = stream.functions().hand_over;
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch hand_over", function, grid, args) }
}

/// What [`take_over`] waits for.
#[derive(Debug)]
pub struct TakeOver<'a> {
    /// `[n]` [`tagged`] f32 in the host's memory.
    pub from: View<'a, u64>,
    /// `[1]` u32 in the host's memory: the token's number when they are there, or nothing more will come.
    pub flag: View<'a, u32>,
    /// `[1]` u32 on the device: the token's number.
    pub number: View<'a, u32>,
    /// What is added to the number to get the values' tag.
    pub plus: u32,
    /// `[1]` u32 on the device and `[1]` u32 in the host's memory: set when the host was late.
    pub late: (View<'a, u32>, View<'a, u32>),
    /// `[2]` u64 in the host's memory: get the device's times, in ns, between which the first block waited.
    pub stamps: View<'a, u64>,
    /// How long is waited.
    pub limit: Duration,
}

/// `TakeOver` of `kernels/cuda/hand_off.cuh`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RawTakeOver {
    from: u64,
    flag: u64,
    number: u64,
    late: u64,
    late_host: u64,
    stamps: u64,
    limit_ns: u64,
    plus: u32,
}

/// A value as [`take_over`] takes it: with the tag that says what it belongs to, in one word, which is written as a whole.
pub fn tagged(value: f32, tag: u32) -> u64 {
    u64::from(tag) << 32 | u64::from(value.to_bits())
}

impl TakeOver<'_> {
    /// As the kernels take it; asserts the shapes.
    pub(super) fn raw(&self, stream: &Stream, n: usize) -> RawTakeOver {
        assert_eq!(self.from.len(), n, "values to add");
        for word in [&self.flag, &self.number, &self.late.0, &self.late.1] {
            assert_eq!(word.len(), 1, "one word");
            stream.check(&[word.device()]);
        }
        assert_eq!(self.stamps.len(), 2, "two stamps");
        stream.check(&[self.from.device(), self.stamps.device()]);
        RawTakeOver {
            from: self.from.address(),
            flag: self.flag.address(),
            number: self.number.address(),
            late: self.late.0.address(),
            late_host: self.late.1.address(),
            stamps: self.stamps.address(),
            limit_ns: u64::try_from(self.limit.as_nanos()).unwrap_or(u64::MAX),
            plus: self.plus,
        }
    }
}

/// How normed values are handed over to the host.
#[derive(Debug)]
pub struct HandOverNormed<'a> {
    /// `[n]` f32 in the host's memory; as 8-bit blocks its first bytes are `[n_blocks · 32]` i8, and behind them are `[n_blocks]`
    /// f32, the scales.
    pub to: View<'a, f32>,
    /// Whether the values are handed over as 8-bit blocks: a quarter of the lines that the host has to fetch.
    pub q8: bool,
    /// `[1]` u32 in the host's memory: gets the number when the rest is there.
    pub flag: View<'a, u32>,
    /// `[1]` u32 on the device: the token's number.
    pub number: View<'a, u32>,
    /// `[1]` u64 in the host's memory: gets the device's time, in ns, just before the flag is set.
    pub stamp: View<'a, u64>,
    /// `[1]` u32, zero, and left so; one launch at a time may use it.
    pub ticket: ViewMut<'a, u32>,
}

impl HandOverNormed<'_> {
    /// As the kernels take it; asserts the shapes.
    pub(super) fn raw(&self, stream: &Stream, n: usize) -> (u64, RawHandOver) {
        assert_eq!(self.to.len(), n, "room for all values");
        assert!(
            !self.q8 || n.is_multiple_of(BLOCK) && n.is_multiple_of(4),
            "whole blocks of 8 bits"
        );
        let words = [self.flag.len(), self.number.len(), self.ticket.len()];
        assert_eq!(words, [1; 3], "one word each");
        assert_eq!(self.stamp.len(), 1, "one stamp");
        stream.check(&[self.to.device(), self.flag.device(), self.number.device()]);
        stream.check(&[self.stamp.device(), self.ticket.device()]);
        let hand = RawHandOver {
            flag: self.flag.address(),
            number: self.number.address(),
            ticket: self.ticket.address(),
            stamp: self.stamp.address(),
        };
        (self.to.address(), hand)
    }
}

#[repr(C)]
struct TakeOverArgs {
    take: RawTakeOver,
    x: u64,
    n: u32,
}

const _: () = assert!(size_of::<TakeOverArgs>() == 80);

/// Waits until the host has written each value, and adds them to `x` (`[n]` f32). A host that is later than the limit
/// is noted, and neither this nor any later launch with the same note waits for it.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When lengths or devices do not fit, or `n` is odd.
pub fn take_over(
    stream: &Stream,
    what: TakeOver<'_>,
    x: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    stream.check(&[x.device()]);
    assert!(
        what.from.address().is_multiple_of(16) && x.address().is_multiple_of(16),
        "aligned values"
    );
    assert!(x.len().is_multiple_of(2), "pairs of values");
    let args = TakeOverArgs {
        take: what.raw(stream, x.len()),
        x: x.address(),
        n: x.len() as u32,
    };
    let grid = Grid {
        blocks: [x.len().div_ceil(2 * THREADS).max(1), 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().take_over;
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch take_over", function, grid, args) }
}
