//! 16 interleaved rows against T activation rows: the inner loop of `gemv` (T = 1) and `gemm`.

use super::isa::Isa;
use super::unpack::{Planes, Unpack};
use crate::activations::ActRef;
use crate::matrix::ROW_GROUP;
use crate::quant::{BLOCK, QuantType};

/// A group of 16 rows in [`crate::Layout::Interleaved`].
#[derive(Clone, Copy)]
pub(crate) struct Group {
    /// First byte of the group.
    pub start: *const u8,
    /// Columns of the matrix.
    pub n_cols: usize,
}

/// Bytes of 32 columns of 16 rows, all planes together.
const fn bytes_of_sub_block(quant: QuantType) -> usize {
    ROW_GROUP * quant.block_bytes() * BLOCK / quant.block_values()
}

/// Asks for `len` bytes from `offset` on, [`Isa::AHEAD_BYTES`] further.
///
/// A group's planes are read side by side, in steps too short and too many for the processor to
/// foresee; but a matrix is read from end to end.
#[inline(always)]
fn prefetch<S: Isa>(start: *const u8, offset: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let ahead = start.wrapping_add(offset + S::AHEAD_BYTES + line);
        // SAFETY: a hint, for any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ahead.cast()) };
    }
}

/// Subtracts `sum << shift`, with the same sum in all lanes.
#[inline(always)]
unsafe fn take_off<S: Isa>(total: S::I, sum: i32, shift: Option<u32>) -> S::I {
    // SAFETY: the caller has the tier's instructions.
    unsafe {
        match shift {
            Some(shift) => S::sub_i(total, S::shl(S::splat_i(sum), shift)),
            None => total,
        }
    }
}

/// Integer dot products of vectors `from..from + count` of a sub-block with activations at `x`.
#[inline(always)]
unsafe fn integers<S: Isa, U: Unpack>(
    w: &[S::I; 8],
    x: *const i8,
    from: usize,
    count: usize,
) -> S::I {
    // SAFETY: `x` holds 32 values; the caller has the tier's instructions.
    unsafe {
        let at = |j: usize| x.add(4 * j);
        let mut total = S::splat_i(0);
        let mut j = from;
        while j < from + count {
            if U::SIGNED {
                total = S::dot_signed(total, w[j], at(j));
                j += 1;
            } else if U::DOTS == 8 && count == 8 {
                total = S::dot_unsigned(total, *w, std::array::from_fn(at));
                j += 8;
            } else if U::DOTS >= 4 {
                let part: [S::I; 4] = std::array::from_fn(|n| w[j + n]);
                total = S::dot_unsigned(total, part, std::array::from_fn(|n| at(j + n)));
                j += 4;
            } else {
                total = S::dot_unsigned(total, [w[j], w[j + 1]], [at(j), at(j + 1)]);
                j += 2;
            }
        }
        total
    }
}

/// 8-bit activations; overwrites 16 values at each of `out`.
///
/// # Safety
/// The tier's instructions exist; `group` is a packed group of the format; all `x` are rows of
/// `group.n_cols` values with 8-bit blocks; each `out` is valid for 16 values.
#[inline(always)]
pub(crate) unsafe fn q8<S: Isa, U: Unpack, const T: usize>(
    group: Group,
    x: &[ActRef<'_>; T],
    out: [*mut f32; T],
) {
    // SAFETY: this function's contract; sub-blocks cover the row's columns.
    unsafe {
        let n_blocks = group.n_cols / U::QUANT.block_values();
        let planes = Planes::new(U::QUANT, group.start, n_blocks);
        let mut acc = [S::splat(0.0); T];
        for sub in 0..group.n_cols / BLOCK {
            if T == 1 {
                prefetch::<S>(
                    group.start,
                    sub * bytes_of_sub_block(U::QUANT),
                    bytes_of_sub_block(U::QUANT),
                );
            }
            let w = U::values::<S>(&planes, sub);
            let scale = U::scale::<S>(&planes, sub);
            let min = if U::HAS_MIN {
                U::min::<S>(&planes, sub)
            } else {
                scale
            };
            let none = (S::splat_i(0), S::splat_i(0));
            let (first, second) = if U::HALVES {
                U::half_scales::<S>(&planes, sub)
            } else {
                none
            };
            let mins = if U::HALVES && U::HAS_MIN {
                U::half_mins::<S>(&planes, sub)
            } else {
                none
            };
            for t in 0..T {
                let q = x[t].q.as_ptr().add(sub * BLOCK);
                let total = if U::HALVES {
                    let sums = x[t].half_sums.as_ptr().add(2 * sub);
                    let a = take_off::<S>(integers::<S, U>(&w, q, 0, 4), *sums, U::OFFSET_SHIFT);
                    let b = integers::<S, U>(&w, q, 4, 4);
                    let b = take_off::<S>(b, *sums.add(1), U::OFFSET_SHIFT);
                    S::add_i(S::mul_i(a, first), S::mul_i(b, second))
                } else {
                    let shift = if U::SIGNED {
                        S::SIGNED_SHIFT
                    } else {
                        U::OFFSET_SHIFT
                    };
                    let sum = *x[t].block_sums.as_ptr().add(sub);
                    take_off::<S>(integers::<S, U>(&w, q, 0, 8), sum, shift)
                };
                let both = S::mul(scale, S::splat(*x[t].scales.as_ptr().add(sub)));
                acc[t] = S::fma(S::to_f(total), both, acc[t]);
                if U::HALVES && U::HAS_MIN {
                    let sums = x[t].half_sums.as_ptr().add(2 * sub);
                    let total = S::add_i(
                        S::mul_i(mins.0, S::splat_i(*sums)),
                        S::mul_i(mins.1, S::splat_i(*sums.add(1))),
                    );
                    let both = S::mul(min, S::splat(*x[t].scales.as_ptr().add(sub)));
                    acc[t] = S::fma(S::to_f(total), both, acc[t]);
                } else if U::HAS_MIN {
                    let sum = S::splat(*x[t].sums.as_ptr().add(sub));
                    acc[t] = S::fma(min, sum, acc[t]);
                }
            }
        }
        for t in 0..T {
            S::store(out[t], acc[t]);
        }
    }
}

/// Joins 8 lanes as [`crate::activations::join_lanes`] does, for 16 rows at once.
#[inline(always)]
unsafe fn join<S: Isa>(l: [S::F; 8]) -> S::F {
    // SAFETY: the caller has the tier's instructions.
    unsafe {
        let even = S::add(S::add(l[0], l[4]), S::add(l[2], l[6]));
        let odd = S::add(S::add(l[1], l[5]), S::add(l[3], l[7]));
        S::add(even, odd)
    }
}

/// One f32 lane sum per k mod 8 over vectors `from..to` of a sub-block.
#[inline(always)]
unsafe fn lane_sums<S: Isa, U: Unpack>(
    w: &[S::I; 8],
    x: *const f32,
    from: usize,
    to: usize,
) -> S::F {
    // SAFETY: `x` holds 32 values; the caller has the tier's instructions.
    unsafe {
        let mut lanes = [S::splat(0.0); 8];
        for j in from..to {
            for byte in 0..4u32 {
                let q = if U::SIGNED {
                    S::sar(S::shl(w[j], 24 - 8 * byte), 24)
                } else {
                    let q = S::and(S::shr(w[j], 8 * byte), S::splat_i(0xFF));
                    take_off::<S>(q, 1, U::OFFSET_SHIFT)
                };
                let lane = 4 * (j % 2) + byte as usize;
                let value = S::splat(*x.add(4 * j + byte as usize));
                lanes[lane] = S::fma(S::to_f(q), value, lanes[lane]);
            }
        }
        join::<S>(lanes)
    }
}

/// f32 activations with block formats; overwrites 16 values at each of `out`.
///
/// # Safety
/// As [`q8`], with f32 values in `x`.
#[inline(always)]
pub(crate) unsafe fn f32_blocks<S: Isa, U: Unpack, const T: usize>(
    group: Group,
    x: &[ActRef<'_>; T],
    out: [*mut f32; T],
) {
    // SAFETY: this function's contract.
    unsafe {
        let n_blocks = group.n_cols / U::QUANT.block_values();
        let planes = Planes::new(U::QUANT, group.start, n_blocks);
        let mut acc = [S::splat(0.0); T];
        for sub in 0..group.n_cols / BLOCK {
            let w = U::values::<S>(&planes, sub);
            let scale = U::scale::<S>(&planes, sub);
            for t in 0..T {
                let values = x[t].values.as_ptr().add(sub * BLOCK);
                if U::HALVES {
                    let (first, second) = U::half_scales::<S>(&planes, sub);
                    for (scales, from) in [(first, 0), (second, 4)] {
                        let part = S::mul(scale, S::to_f(scales));
                        let sum = lane_sums::<S, U>(&w, values, from, from + 4);
                        acc[t] = S::fma(sum, part, acc[t]);
                    }
                } else {
                    acc[t] = S::fma(lane_sums::<S, U>(&w, values, 0, 8), scale, acc[t]);
                }
                if U::HALVES && U::HAS_MIN {
                    let (first, second) = U::half_mins::<S>(&planes, sub);
                    let totals = x[t].half_totals.as_ptr().add(2 * sub);
                    for (n, mins) in [first, second].into_iter().enumerate() {
                        let min = S::mul(U::min::<S>(&planes, sub), S::to_f(mins));
                        acc[t] = S::fma(min, S::splat(*totals.add(n)), acc[t]);
                    }
                } else if U::HAS_MIN {
                    let sum = S::splat(*x[t].sums.as_ptr().add(sub));
                    acc[t] = S::fma(U::min::<S>(&planes, sub), sum, acc[t]);
                }
            }
        }
        for t in 0..T {
            S::store(out[t], acc[t]);
        }
    }
}

/// Adds the products of column `k` to lane `lane` of each token.
///
/// # Safety
/// As [`floats`].
#[inline(always)]
unsafe fn float_column<S: Isa, const T: usize>(
    quant: QuantType,
    group: *const u8,
    k: usize,
    lane: usize,
    x: &[ActRef<'_>; T],
    lanes: &mut [[S::F; 8]; T],
) {
    // SAFETY: this function's contract.
    unsafe {
        let w = match quant {
            QuantType::F32 => S::load_f32(group.add(k * 64)),
            QuantType::F16 => S::load_f16(group.add(k * 32)),
            _ => S::load_bf16(group.add(k * 32)),
        };
        for t in 0..T {
            let value = S::splat(*x[t].values.as_ptr().add(k));
            lanes[t][lane] = S::fma(w, value, lanes[t][lane]);
        }
    }
}

/// Float weights: 8 lanes over the whole row; overwrites 16 values at each of `out`.
///
/// # Safety
/// As [`q8`], with f32 values in `x`, and a group of format `quant` (F32, F16 or BF16).
#[inline(always)]
pub(crate) unsafe fn floats<S: Isa, const T: usize>(
    quant: QuantType,
    group: Group,
    x: &[ActRef<'_>; T],
    out: [*mut f32; T],
) {
    // SAFETY: this function's contract.
    unsafe {
        let mut lanes = [[S::splat(0.0); 8]; T];
        let mut first = 0;
        // no closures: they would be compiled without the tier's instructions
        while first < group.n_cols {
            let count = (group.n_cols - first).min(8);
            if count == 8 {
                let mut lane = 0;
                while lane < 8 {
                    float_column::<S, T>(quant, group.start, first + lane, lane, x, &mut lanes);
                    lane += 1;
                }
            } else {
                for lane in 0..count {
                    float_column::<S, T>(quant, group.start, first + lane, lane, x, &mut lanes);
                }
            }
            first += 8;
        }
        for t in 0..T {
            S::store(out[t], join::<S>(lanes[t]));
        }
    }
}
