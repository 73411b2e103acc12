//! Products of a packed matrix with activation rows: `gemv` for one, `gemm` for a batch.
//!
//! Both run the same tiles and give the same bits; `gemm` unpacks a group of 16 weight rows once
//! for several activation rows.

use std::ops::Range;

use crate::activations::{ActBatch, ActRef, ActivationMode};
use crate::cpu::{Cpu, Tier};
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use crate::dot::amx;
use crate::dot::scalar;
use crate::dot::tile::{self, Group};
use crate::matrix::{Layout, MatrixRef, ROW_GROUP, StridedOut};
use crate::quant::QuantType;

/// Activation rows that a `gemm` tile with 8-bit activations holds in registers.
const TILE_TOKENS: usize = 8;
/// The same with f32 activations, which need eight sums a row.
const TILE_TOKENS_F32: usize = 2;

/// Bytes of rows that stay near while all tokens pass.
const NEAR_BYTES: usize = 128 << 10;

/// As many tokens as pay for a tile of AMX, which has room for 16.
const AMX_TOKENS_MIN: usize = 12;

/// Writes the products of rows `rows` of `m` (`[n_rows, n_cols]`, interleaved) with `x`
/// (`[n_cols]`) to `out` (`[rows.len()]` f32, overwritten).
///
/// # Panics
/// When `m` is not interleaved, `rows` starts inside a group of 16 or ends outside the matrix, or
/// `x` or `out` has another length.
pub fn gemv(cpu: Cpu, m: MatrixRef<'_>, x: ActRef<'_>, rows: Range<usize>, out: &mut [f32]) {
    check(&m, &rows, x.values.len());
    assert_eq!(out.len(), rows.len(), "one output per row");
    if cpu.tier() == Tier::Scalar {
        for (row, out) in rows.zip(out) {
            *out = scalar::dot(m, row, x, cpu.mode());
        }
        return;
    }
    let group_bytes = ROW_GROUP * m.shape.row_bytes();
    for (n, out) in out.chunks_mut(ROW_GROUP).enumerate() {
        let group = &m.bytes[(rows.start / ROW_GROUP + n) * group_bytes..][..group_bytes];
        let mut edge = [0.0; ROW_GROUP];
        let whole = out.len() == ROW_GROUP;
        let to = if whole {
            out.as_mut_ptr()
        } else {
            edge.as_mut_ptr()
        };
        // SAFETY: the group is whole, `x` has the matrix's columns, `to` has room for 16 values.
        unsafe { run_tile(cpu, &m, group, &[x], [to]) };
        if !whole {
            out.copy_from_slice(&edge[..out.len()]);
        }
    }
}

/// Writes the products of rows `rows` of `m` (interleaved) with rows `tokens` of `x` to `out`
/// (`[tokens.len(), rows.len()]`, overwritten). The bits equal [`gemv`]'s.
///
/// # Panics
/// As [`gemv`].
pub fn gemm(
    cpu: Cpu,
    m: MatrixRef<'_>,
    x: &ActBatch,
    tokens: Range<usize>,
    rows: Range<usize>,
    mut out: StridedOut<'_>,
) {
    check(&m, &rows, x.n_cols().next_multiple_of(crate::quant::BLOCK));
    assert!(
        tokens.end <= x.capacity(),
        "tokens {tokens:?} of {}",
        x.capacity()
    );
    assert!(
        out.n_tokens() == tokens.len() && out.n_rows() == rows.len(),
        "output fits"
    );
    if cpu.tier() == Tier::Scalar {
        for (t, token) in tokens.enumerate() {
            for (row, out) in rows.clone().zip(out.row(t)) {
                *out = scalar::dot(m, row, x.token(token), cpu.mode());
            }
        }
        return;
    }
    let n_rows = rows.len();
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    let on_tiles = amx_groups(cpu, &m, x, tokens.clone(), rows.clone(), &mut out);
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    let on_tiles = 0;
    let out = out.part(on_tiles..tokens.len(), 0..n_rows);
    token_tiles(cpu, &m, x, tokens.start + on_tiles..tokens.end, rows, out);
}

/// Bytes of group `group` of 16 rows.
fn group_of<'a>(m: &MatrixRef<'a>, group: usize) -> &'a [u8] {
    let group_bytes = ROW_GROUP * m.shape.row_bytes();
    &m.bytes[group * group_bytes..][..group_bytes]
}

/// Where the products of the group from row `first` on lie among those of `rows`.
fn columns_of(first: usize, rows: &Range<usize>) -> Range<usize> {
    first - rows.start..(first + ROW_GROUP).min(rows.end) - rows.start
}

/// The products of the first tokens, where tiles of AMX are faster: how many these are.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_groups(
    cpu: Cpu,
    m: &MatrixRef<'_>,
    x: &ActBatch,
    tokens: Range<usize>,
    rows: Range<usize>,
    out: &mut StridedOut<'_>,
) -> usize {
    let q8 = cpu.mode() == ActivationMode::Q8 && m.shape.quant.is_quantised();
    if cpu.tier() != Tier::Avx512Amx || !q8 {
        return 0;
    }
    let done = amx::on_tiles(tokens.len(), AMX_TOKENS_MIN);
    for first in rows.clone().step_by(ROW_GROUP) {
        let group = Group {
            start: group_of(m, first / ROW_GROUP).as_ptr(),
            n_cols: m.shape.n_cols,
        };
        let columns = columns_of(first, &rows);
        let (tokens, part) = (
            tokens.start..tokens.start + done,
            out.part(0..done, columns),
        );
        // SAFETY: a `Cpu` exists only for tiers that the machine has; the group is whole, and the batch has its columns.
        unsafe { x86::amx(m.shape.quant, group, x, tokens, part) };
    }
    done
}

/// The products in tiles of a group of 16 rows and some tokens. Groups that fit into a cache together take turns with each tile's tokens,
/// so that both are near: tokens of a wide matrix are more bytes than a few of its rows.
fn token_tiles(
    cpu: Cpu,
    m: &MatrixRef<'_>,
    x: &ActBatch,
    tokens: Range<usize>,
    rows: Range<usize>,
    mut out: StridedOut<'_>,
) {
    let q8 = cpu.mode() == ActivationMode::Q8 && m.shape.quant.is_quantised();
    let tile_tokens = if q8 { TILE_TOKENS } else { TILE_TOKENS_F32 };
    let group_bytes = ROW_GROUP * m.shape.row_bytes();
    let rows_together = (NEAR_BYTES / group_bytes).max(1) * ROW_GROUP;
    for first in rows.clone().step_by(rows_together) {
        let together = first..(first + rows_together).min(rows.end);
        let mut done = 0;
        while done < tokens.len() {
            let step = match tokens.len() - done >= tile_tokens {
                true => tile_tokens,
                false => 1,
            };
            let token = |t: usize| x.token(tokens.start + done + t);
            let columns = together.start - rows.start..together.end - rows.start;
            let part = out.part(done..done + step, columns);
            match step {
                1 => groups::<1>(cpu, m, &[token(0)], together.clone(), part),
                TILE_TOKENS_F32 => {
                    groups(cpu, m, &[token(0), token(1)], together.clone(), part);
                }
                _ => {
                    let x: [_; TILE_TOKENS] = std::array::from_fn(token);
                    groups(cpu, m, &x, together.clone(), part);
                }
            }
            done += step;
        }
    }
}

/// The products of some groups of 16 rows with the tokens of a tile.
fn groups<const T: usize>(
    cpu: Cpu,
    m: &MatrixRef<'_>,
    x: &[ActRef<'_>; T],
    rows: Range<usize>,
    mut out: StridedOut<'_>,
) {
    for first in rows.clone().step_by(ROW_GROUP) {
        let group = group_of(m, first / ROW_GROUP);
        let columns = columns_of(first, &rows);
        let whole = columns.len() == ROW_GROUP;
        let mut edge = [[0.0; ROW_GROUP]; T];
        let mut to = [std::ptr::null_mut(); T];
        for t in 0..T {
            to[t] = if whole {
                out.row(t)[columns.clone()].as_mut_ptr()
            } else {
                edge[t].as_mut_ptr()
            };
        }
        // SAFETY: the group is whole, `x` has the matrix's columns, each `to` room for 16 values.
        unsafe { run_tile::<T>(cpu, m, group, x, to) };
        if !whole {
            for t in 0..T {
                let row = &mut out.row(t)[columns.clone()];
                row.copy_from_slice(&edge[t][..row.len()]);
            }
        }
    }
}

fn check(m: &MatrixRef<'_>, rows: &Range<usize>, n_values: usize) {
    assert_eq!(m.shape.layout, Layout::Interleaved, "matrix is interleaved");
    assert_eq!(rows.start % ROW_GROUP, 0, "rows start a group");
    assert!(rows.end <= m.shape.n_rows, "rows {rows:?} of {:?}", m.shape);
    let n_cols = m.shape.n_cols.next_multiple_of(crate::quant::BLOCK);
    assert_eq!(n_values, n_cols, "activations of {:?}", m.shape);
}

/// One tile in the tier of `cpu`, which is not scalar.
///
/// # Safety
/// `group` is a packed group of `m`, each `x` a row of its columns prepared for the mode of `cpu`,
/// each `out` valid for 16 values.
unsafe fn run_tile<const T: usize>(
    cpu: Cpu,
    m: &MatrixRef<'_>,
    group: &[u8],
    x: &[ActRef<'_>; T],
    out: [*mut f32; T],
) {
    let (quant, mode) = (m.shape.quant, cpu.mode());
    let group = Group {
        start: group.as_ptr(),
        n_cols: m.shape.n_cols,
    };
    if mode == ActivationMode::Q8 && quant.is_quantised() {
        assert!(
            x.iter().all(|x| x.q.len() >= group.n_cols),
            "activations have 8-bit blocks"
        );
    } else if scalar::has_half_mins(quant) {
        assert!(
            x.iter().all(|x| 16 * x.half_totals.len() >= group.n_cols),
            "activations have sums of 16 values"
        );
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a `Cpu` exists only for tiers that the machine has; the rest is this contract.
    unsafe {
        match cpu.tier() {
            Tier::Scalar => unreachable!("scalar runs no tiles"),
            Tier::Avx2 => x86::avx2(quant, mode, group, x, out),
            Tier::Avx512 => x86::avx512(quant, mode, group, x, out),
            Tier::Avx512Vnni | Tier::Avx512Amx => x86::avx512_vnni(quant, mode, group, x, out),
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    unreachable!("only the scalar tier is available")
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use crate::dot::avx2::Avx2;
    use crate::dot::avx512::Avx512;
    use crate::dot::isa::Isa;
    use crate::dot::unpack::{self, Unpack};

    /// # Safety
    /// As [`run_tile`]; the instructions of `S` exist.
    #[inline(always)]
    unsafe fn by_format<S: Isa, const T: usize>(
        quant: QuantType,
        mode: ActivationMode,
        group: Group,
        x: &[ActRef<'_>; T],
        out: [*mut f32; T],
    ) {
        // SAFETY: this function's contract.
        unsafe {
            match quant {
                QuantType::F32 if T != TILE_TOKENS => {
                    tile::floats::<S, T>(QuantType::F32, group, x, out)
                }
                QuantType::F16 if T != TILE_TOKENS => {
                    tile::floats::<S, T>(QuantType::F16, group, x, out)
                }
                QuantType::BF16 if T != TILE_TOKENS => {
                    tile::floats::<S, T>(QuantType::BF16, group, x, out)
                }
                QuantType::F32 | QuantType::F16 | QuantType::BF16 => {
                    unreachable!("no tile of {T} tokens for float weights")
                }
                QuantType::Q4_0 => blocks::<S, unpack::Q4_0, T>(mode, group, x, out),
                QuantType::Q4_1 => blocks::<S, unpack::Q4_1, T>(mode, group, x, out),
                QuantType::Q5_0 => blocks::<S, unpack::Q5_0, T>(mode, group, x, out),
                QuantType::Q5_1 => blocks::<S, unpack::Q5_1, T>(mode, group, x, out),
                QuantType::Q8_0 => blocks::<S, unpack::Q8_0, T>(mode, group, x, out),
                QuantType::Q2_K => blocks::<S, unpack::Q2_K, T>(mode, group, x, out),
                QuantType::Q3_K => blocks::<S, unpack::Q3_K, T>(mode, group, x, out),
                QuantType::Q4_K => blocks::<S, unpack::Q4_K, T>(mode, group, x, out),
                QuantType::Q5_K => blocks::<S, unpack::Q5_K, T>(mode, group, x, out),
                QuantType::Q6_K => blocks::<S, unpack::Q6_K, T>(mode, group, x, out),
            }
        }
    }

    /// # Safety
    /// As [`by_format`].
    #[inline(always)]
    unsafe fn blocks<S: Isa, U: Unpack, const T: usize>(
        mode: ActivationMode,
        group: Group,
        x: &[ActRef<'_>; T],
        out: [*mut f32; T],
    ) {
        // SAFETY: this function's contract.
        unsafe {
            match mode {
                // a tile of two is instantiated for f32 only, one of eight for 8 bits only
                ActivationMode::Q8 if T != TILE_TOKENS_F32 => tile::q8::<S, U, T>(group, x, out),
                ActivationMode::F32 if T != TILE_TOKENS => {
                    tile::f32_blocks::<S, U, T>(group, x, out)
                }
                _ => unreachable!("no tile of {T} tokens for {mode} activations"),
            }
        }
    }

    /// # Safety
    /// As [`amx::q8`].
    #[cfg(target_os = "linux")]
    pub(super) unsafe fn amx(
        quant: QuantType,
        group: Group,
        x: &ActBatch,
        tokens: Range<usize>,
        out: StridedOut<'_>,
    ) {
        // SAFETY: this function's contract.
        unsafe {
            match quant {
                QuantType::F32 | QuantType::F16 | QuantType::BF16 => {
                    unreachable!("no tile of 8 bits for float weights")
                }
                QuantType::Q4_0 => amx::q8::<unpack::Q4_0>(group, x, tokens, out),
                QuantType::Q4_1 => amx::q8::<unpack::Q4_1>(group, x, tokens, out),
                QuantType::Q5_0 => amx::q8::<unpack::Q5_0>(group, x, tokens, out),
                QuantType::Q5_1 => amx::q8::<unpack::Q5_1>(group, x, tokens, out),
                QuantType::Q8_0 => amx::q8::<unpack::Q8_0>(group, x, tokens, out),
                QuantType::Q2_K => amx::q8::<unpack::Q2_K>(group, x, tokens, out),
                QuantType::Q3_K => amx::q8::<unpack::Q3_K>(group, x, tokens, out),
                QuantType::Q4_K => amx::q8::<unpack::Q4_K>(group, x, tokens, out),
                QuantType::Q5_K => amx::q8::<unpack::Q5_K>(group, x, tokens, out),
                QuantType::Q6_K => amx::q8::<unpack::Q6_K>(group, x, tokens, out),
            }
        }
    }

    macro_rules! tier {
        ($name:ident, $isa:ty, $features:literal) => {
            /// # Safety
            /// As [`run_tile`]; the machine has the features.
            #[target_feature(enable = $features)]
            pub(super) unsafe fn $name<const T: usize>(
                quant: QuantType,
                mode: ActivationMode,
                group: Group,
                x: &[ActRef<'_>; T],
                out: [*mut f32; T],
            ) {
                // SAFETY: the features are enabled, the rest is this function's contract.
                unsafe { by_format::<$isa, T>(quant, mode, group, x, out) }
            }
        };
    }

    tier!(avx2, Avx2, "avx2,fma,f16c");
    tier!(
        avx512,
        Avx512<false>,
        "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
    );
    tier!(
        avx512_vnni,
        Avx512<true>,
        "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, bits, pack};

    fn activations(cpu: Cpu, n_cols: usize, n_tokens: usize, seed: u64) -> ActBatch {
        let mut random = Random(seed);
        let mut x = ActBatch::new(cpu.mode(), n_cols, n_tokens);
        for t in 0..n_tokens {
            x.set(cpu, t, &random.activations(n_cols));
        }
        x
    }

    /// Column counts that a format can have: whole blocks; for floats also odd ones.
    fn column_counts(quant: QuantType) -> Vec<usize> {
        match quant.block_values() {
            1 => vec![1, 7, 64, 101],
            block => vec![block, 3 * block],
        }
    }

    /// Every format, shape and arithmetic, as (quant, n_rows, n_cols, mode).
    fn cases() -> Vec<(QuantType, usize, usize, ActivationMode)> {
        let mut cases = Vec::new();
        for quant in QuantType::ALL {
            for n_cols in column_counts(quant) {
                for n_rows in [1, 16, 37] {
                    for mode in [ActivationMode::F32, ActivationMode::Q8] {
                        cases.push((quant, n_rows, n_cols, mode));
                    }
                }
            }
        }
        cases
    }

    #[test]
    fn every_tier_gives_the_bits_of_the_specification() {
        for (quant, n_rows, n_cols, mode) in cases() {
            let rows = Random(7).rows(quant, n_rows, n_cols);
            let (shape, bytes) = pack(quant, n_cols, Layout::Interleaved, &rows);
            let m = MatrixRef::new(shape, &bytes);
            let run = |tier: Tier| {
                let cpu = Cpu::new(tier, mode).unwrap();
                let x = activations(cpu, n_cols, 11, 3);
                let mut one = vec![f32::NAN; n_rows];
                gemv(cpu, m, x.token(1), 0..n_rows, &mut one);
                let mut many = vec![f32::NAN; 11 * n_rows];
                let out = StridedOut::from_slice(&mut many, n_rows, 11, 0..n_rows);
                gemm(cpu, m, &x, 0..11, 0..n_rows, out);
                assert_eq!(
                    bits(&many[n_rows..2 * n_rows]),
                    bits(&one),
                    "gemm equals gemv"
                );
                bits(&many)
            };
            let expected = run(Tier::Scalar);
            for tier in Tier::available() {
                assert_eq!(
                    run(tier),
                    expected,
                    "{quant} [{n_rows}, {n_cols}] {mode} {tier}"
                );
            }
        }
    }

    #[test]
    fn many_tokens_of_wide_rows_give_the_bits_of_one() {
        let (n_rows, n_cols) = (21, 1280);
        for quant in QuantType::ALL {
            let rows = Random(11).rows(quant, n_rows, n_cols);
            let (shape, bytes) = pack(quant, n_cols, Layout::Interleaved, &rows);
            let m = MatrixRef::new(shape, &bytes);
            for tier in Tier::available() {
                let cpu = Cpu::new(tier, ActivationMode::Q8).unwrap();
                let x = activations(cpu, n_cols, 40, 13);
                for tokens in [0..32, 3..40, 5..35, 7..21, 9..12, 7..8] {
                    let mut many = vec![f32::NAN; tokens.len() * n_rows];
                    let out = StridedOut::from_slice(&mut many, n_rows, tokens.len(), 0..n_rows);
                    gemm(cpu, m, &x, tokens.clone(), 0..n_rows, out);
                    for (token, many) in tokens.clone().zip(many.chunks_exact(n_rows)) {
                        let mut one = vec![f32::NAN; n_rows];
                        gemv(cpu, m, x.token(token), 0..n_rows, &mut one);
                        assert_eq!(
                            bits(many),
                            bits(&one),
                            "{quant} {tier} {token} of {tokens:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn the_specification_is_near_a_sum_in_double_precision() {
        for (quant, n_rows, n_cols, mode) in cases() {
            let rows = Random(9).rows(quant, n_rows, n_cols);
            let (shape, bytes) = pack(quant, n_cols, Layout::Interleaved, &rows);
            let m = MatrixRef::new(shape, &bytes);
            let cpu = Cpu::new(Tier::Scalar, mode).unwrap();
            let x = activations(cpu, n_cols, 1, 5);
            let mut out = vec![f32::NAN; n_rows];
            gemv(cpu, m, x.token(0), 0..n_rows, &mut out);
            for (row, &out) in out.iter().enumerate() {
                let mut w = vec![0.0; n_cols];
                m.dequantize_row(row, &mut w);
                let terms = w
                    .iter()
                    .zip(x.token(0).values)
                    .map(|(&w, &x)| f64::from(w * x));
                let exact: f64 = terms.clone().sum();
                let magnitude: f64 = terms.map(f64::abs).sum();
                let q8 = mode == ActivationMode::Q8 && quant.is_quantised();
                // one rounding step of an outlier's block is 20 / 127 of an ordinary value
                let bound = if q8 { 0.06 } else { 1e-6 } * magnitude + 1e-7;
                assert!(
                    (f64::from(out) - exact).abs() <= bound,
                    "{quant} {mode}: {out} {exact}"
                );
            }
        }
    }

    #[test]
    fn rows_may_start_at_any_group_and_outputs_lie_apart() {
        let cpu = Cpu::detect(ActivationMode::Q8);
        let rows = Random(1).rows(QuantType::Q4_0, 64, 64);
        let (shape, bytes) = pack(QuantType::Q4_0, 64, Layout::Interleaved, &rows);
        let m = MatrixRef::new(shape, &bytes);
        let x = activations(cpu, 64, 3, 2);
        let mut whole = vec![0.0; 64];
        gemv(cpu, m, x.token(2), 0..64, &mut whole);
        let mut buffer = vec![7.0; 3 * 100];
        let out = StridedOut::from_slice(&mut buffer, 100, 3, 10..40);
        gemm(cpu, m, &x, 0..3, 32..62, out);
        assert_eq!(buffer[210..240], whole[32..62]);
        assert!(
            buffer[200..210]
                .iter()
                .chain(&buffer[240..])
                .all(|&v| v == 7.0)
        );
    }

    #[test]
    fn an_activation_that_is_not_finite_surfaces() {
        for tier in Tier::available() {
            let cpu = Cpu::new(tier, ActivationMode::Q8).unwrap();
            let rows = Random(1).rows(QuantType::Q8_0, 16, 64);
            let (shape, bytes) = pack(QuantType::Q8_0, 64, Layout::Interleaved, &rows);
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = ActBatch::new(ActivationMode::Q8, 64, 1);
                let mut values = vec![1.0; 64];
                values[40] = bad;
                x.set(cpu, 0, &values);
                let mut out = vec![0.0; 16];
                gemv(
                    cpu,
                    MatrixRef::new(shape, &bytes),
                    x.token(0),
                    0..16,
                    &mut out,
                );
                assert!(out.iter().all(|v| v.is_nan()), "{tier} {bad}");
            }
        }
    }
}
