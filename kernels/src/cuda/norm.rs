//! RMS normalisation.

use super::activations::{DeviceAct, RawAct};
use super::buffer::View;
use super::stream::{Grid, Stream};
use crate::error::KernelError;

#[repr(C)]
struct RmsNormArgs {
    x: u64,
    weight: u64,
    to: RawAct,
    eps: f32,
}

const _: () = assert!(size_of::<RmsNormArgs>() == 64);

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
    assert!(
        x.len() == to.n_cols() && weight.len() == to.n_cols(),
        "lengths of a norm"
    );
    assert!(!x.is_empty(), "a norm of nothing");
    stream.check(&[x.device(), weight.device(), to.device()]);
    let args = RmsNormArgs {
        x: x.address(),
        weight: weight.address(),
        to: to.raw(),
        eps,
    };
    let grid = Grid {
        blocks: [x.len().div_ceil(1024), 1],
        threads: 1024,
        shared_bytes: 0,
    };
    // SAFETY: all three have the columns.
    unsafe { stream.launch("launch rms_norm", stream.functions().rms_norm, grid, args) }
}
