//! Norms without a launch of their own.

use super::activations::{DeviceAct, RawAct};
use super::buffer::View;
use super::stream::Stream;
use crate::activations::ActivationMode;
use crate::quant::BLOCK;

/// The norm of what a launch writes, in its first half: `to` becomes activations of values times `weight`, and sums of squares lie
/// beside them. Products with `to` take the scale, `1 / √(mean(x²) + eps)`, which makes them those of [`super::rms_norm`] but for
/// rounding.
#[derive(Debug)]
pub struct ThenNorm<'a> {
    /// `[n_cols]` f32.
    pub weight: View<'a, f32>,
    /// Added to the mean of squares.
    pub eps: f32,
    /// What becomes activations, in 8-bit arithmetic; of whole blocks.
    pub to: &'a mut DeviceAct,
    /// The same without the weight, where somebody takes it.
    pub plain: Option<&'a mut DeviceAct>,
    /// `[1]` u32 in the host's memory, which becomes this number where it is zero and the mean of squares may not be finite.
    pub not_finite: Option<(View<'a, u32>, u32)>,
}

/// Most values that a norm's scale is taken of.
const N_MAX: usize = 256 * BLOCK;

/// Whether a launch that writes `n` values can make the first half of their norm.
pub fn can_norm(n: usize, mode: ActivationMode) -> bool {
    mode == ActivationMode::Q8 && n.is_multiple_of(BLOCK) && n <= N_MAX
}

/// `ThenNorm` of `kernels/cuda/then_norm.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawThenNorm {
    weight: u64,
    to: RawAct,
    squares: u64,
    plain: RawAct,
    plain_squares: u64,
    not_finite: u64,
    part: u32,
}

const _: () = assert!(size_of::<RawThenNorm>() == 120);

/// `NormBefore` of `kernels/cuda/then_norm.cuh`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RawNormBefore {
    pub(super) squares: u64,
    pub(super) eps: f32,
}

const _: () = assert!(size_of::<RawNormBefore>() == 16);

impl RawThenNorm {
    /// No norm.
    pub(super) const NONE: Self = Self {
        weight: 0,
        to: RawAct::NONE,
        squares: 0,
        plain: RawAct::NONE,
        plain_squares: 0,
        not_finite: 0,
        part: 0,
    };
}

impl ThenNorm<'_> {
    /// For a launch that writes `n` values; from here on `to` is what this launch makes of it.
    ///
    /// # Panics
    /// When lengths or devices do not fit, or `to` is not of whole 8-bit blocks.
    pub(super) fn raw(self, stream: &Stream, n: usize) -> RawThenNorm {
        assert!(
            self.weight.len() == n && self.to.n_cols() == n,
            "lengths of a norm"
        );
        stream.check(&[self.weight.device(), self.to.device()]);
        let (not_finite, part) = self.not_finite.map_or((0, 0), |(word, part)| {
            assert_eq!(word.len(), 1, "one word");
            stream.check(&[word.device()]);
            (word.address(), part)
        });
        let (plain, plain_squares) = self.plain.map_or((RawAct::NONE, 0), |plain| {
            assert_eq!(plain.n_cols(), n, "lengths of a norm");
            stream.check(&[plain.device()]);
            let squares = plain.before_norm(self.eps);
            (plain.raw(), squares)
        });
        RawThenNorm {
            weight: self.weight.address(),
            squares: self.to.before_norm(self.eps),
            to: self.to.raw(),
            plain,
            plain_squares,
            not_finite,
            part,
        }
    }
}
