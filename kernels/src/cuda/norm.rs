//! RMS normalisation.

use super::activations::{DeviceAct, RawAct};
use super::buffer::View;
use super::hand_off::{HandOverNormed, RawHandOver};
use super::stream::{Grid, Stream};
use crate::activations::ActivationMode;
use crate::error::KernelError;

/// Threads of a block, which take four columns each.
const THREADS: usize = 256;

#[repr(C)]
struct RmsNormArgs {
    x: u64,
    weight: u64,
    to: RawAct,
    plain: RawAct,
    host: u64,
    hand: RawHandOver,
    begun: u64,
    not_finite: u64,
    part: u32,
    eps: f32,
    host_q8: u32,
}

const _: () = assert!(size_of::<RmsNormArgs>() == 168);

/// What a norm's launch does besides.
#[derive(Debug, Default)]
pub struct AroundNorm<'a> {
    /// Gets the normed values without the weight.
    pub plain: Option<&'a mut DeviceAct>,
    /// Hands the normed values over to the host.
    pub after: Option<HandOverNormed<'a>>,
    /// `[1]` u64 in the host's memory: gets the device's time, in ns, at which all that comes before was there.
    pub begun: Option<View<'a, u64>>,
    /// `[1]` u32 in the host's memory, which becomes this number where it is zero and the mean of squares is not finite: the
    /// norm would hide it.
    pub not_finite: Option<(View<'a, u32>, u32)>,
}

/// `x[i] / √(mean(x²) + eps) · weight[i]`, as activations; `x` and `weight` are `[n_cols]` f32. Overwrites `to`.
///
/// As [`crate::norm::rms_norm`], but for the order of the sum.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When the lengths differ or are 0, or devices differ.
pub fn rms_norm(
    stream: &Stream,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    eps: f32,
    to: &mut DeviceAct,
) -> Result<(), KernelError> {
    rms_norm_with(stream, x, weight, eps, to, AroundNorm::default())
}

/// The same, with what comes behind it in one launch.
///
/// # Errors
/// As [`rms_norm`].
///
/// # Panics
/// As [`rms_norm`], or when shapes of what is around do not fit.
pub fn rms_norm_with(
    stream: &Stream,
    x: View<'_, f32>,
    weight: View<'_, f32>,
    eps: f32,
    to: &mut DeviceAct,
    around: AroundNorm<'_>,
) -> Result<(), KernelError> {
    let n = x.len();
    assert!(n == to.n_cols() && weight.len() == n, "lengths of a norm");
    assert!(!x.is_empty(), "a norm of nothing");
    stream.check(&[x.device(), weight.device(), to.device()]);
    let plain = around.plain.map_or(RawAct::NONE, |plain| {
        assert_eq!(plain.n_cols(), n, "lengths of a norm");
        stream.check(&[plain.device()]);
        plain.written()
    });
    let (host, hand) = match &around.after {
        Some(after) => {
            assert!(
                !after.q8 || to.mode() == ActivationMode::Q8,
                "8-bit blocks are of 8-bit activations"
            );
            after.raw(stream, n)
        }
        None => Default::default(),
    };
    let (not_finite, part) = around.not_finite.map_or((0, 0), |(word, part)| {
        assert_eq!(word.len(), 1, "one word");
        stream.check(&[word.device()]);
        (word.address(), part)
    });
    let begun = around.begun.map_or(0, |stamp| {
        assert_eq!(stamp.len(), 1, "one stamp");
        stream.check(&[stamp.device()]);
        stamp.address()
    });
    let args = RmsNormArgs {
        x: x.address(),
        weight: weight.address(),
        to: to.written(),
        plain,
        host,
        hand,
        begun,
        not_finite,
        part,
        eps,
        host_q8: around.after.is_some_and(|after| after.q8).into(),
    };
    let grid = Grid {
        blocks: [n.div_ceil(4 * THREADS), 1],
        threads: THREADS,
        shared_bytes: 0,
    };
    // SAFETY: all have the columns (asserted).
    unsafe { stream.launch("launch rms_norm", stream.functions().rms_norm, grid, args) }
}
