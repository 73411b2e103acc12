//! Sums of sketches, and gates from planes, with AVX-512 and VNNI.
//!
//! Bit i of 64 bytes, left where it is, is a factor of 0 or 2^i: with it each byte's activation is multiplied and
//! added. There is a sum for each i, and what it is too large by is taken out at the end.

use std::arch::x86_64::*;
use std::ops::Range;

use super::input::SketchInput;
use super::planes::{
    AHEAD, GatePlanes, HIGH_BYTES, LOW_BYTES, RUN, SCALE_BYTES, SIGN_BYTES, TOP_BYTES, UNIT, run_of,
};
use crate::activations::ActRef;
use crate::dot::rows512::{Chunk, TileRows, products, vnni_fn};
use crate::matrix::ROW_GROUP;
use crate::quant::BLOCK;

/// Bits of a byte.
const BITS: usize = 8;
/// Rows that are summed together.
const ROWS: usize = 8;

/// Asks for what comes so far ahead.
const AHEAD_BYTES: usize = 4096;

vnni_fn! {
    /// Sums of the lanes 2n and 2n + 1 of both, those of `a` first.
    fn pair_sums(a: __m512i, b: __m512i) -> __m512i {
        let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
        _mm512_add_epi32(
            _mm512_permutex2var_epi32(a, even, b),
            _mm512_permutex2var_epi32(a, odd, b),
        )
    }
}

vnni_fn! {
    /// Σ over i of the sums of bits i, which are 2^i too large.
    fn joined(of_bits: [__m512i; BITS]) -> __m512i {
        let mut sum = of_bits[BITS - 1];
        for i in (0..BITS - 1).rev() {
            sum = _mm512_add_epi32(_mm512_srai_epi32::<1>(sum), of_bits[i]);
        }
        sum
    }
}

/// Bytes with bit i alone, for each i.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn bit_masks() -> [__m512i; BITS] {
    std::array::from_fn(|i| _mm512_set1_epi8((1u8 << i) as i8))
}

vnni_fn! {
    /// Σ of activations whose weight is positive, of eight rows: the first or the second half of the group whose signs
    /// start at `top`.
    fn positive_sums(top: *const u8, half: usize, n_blocks: usize, x: *const i8) -> __m256i {
        let masks = bit_masks();
        let mut of_bits = [[_mm512_setzero_si512(); BITS]; 2];
        let mut block = 0;
        while block + RUN <= n_blocks {
            // four rows of four blocks, twice
            let at = top.add(block * TOP_BYTES + half * ROWS * RUN * SIGN_BYTES);
            let x = x.add(block * BLOCK);
            let mut signs = [_mm512_setzero_si512(); 2];
            for (n, signs) in signs.iter_mut().enumerate() {
                let at = at.add(64 * n);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(AHEAD_BYTES).cast());
                *signs = _mm512_loadu_si512(at.cast());
            }
            for i in 0..BITS {
                let x = _mm_loadu_si128(x.add(i * RUN * SIGN_BYTES).cast());
                let x = _mm512_broadcast_i32x4(x);
                for n in 0..2 {
                    let set = _mm512_and_si512(signs[n], masks[i]);
                    of_bits[n][i] = _mm512_dpbusd_epi32(of_bits[n][i], set, x);
                }
            }
            block += RUN;
        }
        // a row's four blocks are neighbours, and then its two pairs of them
        let pairs = pair_sums(joined(of_bits[0]), joined(of_bits[1]));
        let mut rows = pair_sums(pairs, pairs);
        while block < n_blocks {
            let (_, width) = run_of(block, n_blocks);
            let at = top.add(block * TOP_BYTES + half * ROWS * width * SIGN_BYTES);
            let x = x.add(block * BLOCK);
            let mut of_bits = [_mm512_setzero_si512(); BITS];
            let signs = if width == 2 {
                _mm512_loadu_si512(at.cast())
            } else {
                _mm512_zextsi256_si512(_mm256_loadu_si256(at.cast()))
            };
            for i in 0..BITS {
                let x = x.add(i * width * SIGN_BYTES);
                let x = if width == 2 {
                    _mm512_set1_epi64(x.cast::<i64>().read_unaligned())
                } else {
                    _mm512_set1_epi32(x.cast::<i32>().read_unaligned())
                };
                of_bits[i] = _mm512_dpbusd_epi32(of_bits[i], _mm512_and_si512(signs, masks[i]), x);
            }
            let sums = joined(of_bits);
            let of_rows = if width == 2 { pair_sums(sums, sums) } else { sums };
            rows = _mm512_add_epi32(rows, of_rows);
            block += width;
        }
        _mm512_castsi512_si256(rows)
    }
}

vnni_fn! {
    /// # Safety
    /// AVX-512 with VNNI is there; lengths fit as [`super::planes::sign_sums`] asserts.
    pub(super) fn sign_sums(planes: GatePlanes<'_>, x: &SketchInput, rows: Range<usize>, sums: &mut [i32]) {
        let n_blocks = planes.shape.n_blocks();
        let first_group = rows.start / ROW_GROUP;
        let all = _mm256_set1_epi32(x.sum());
        for (n, sums) in sums.chunks_mut(ROWS).enumerate() {
            let (group, half) = (first_group + n / 2, n % 2);
            let top = planes.top.as_ptr().add(group * n_blocks * TOP_BYTES);
            let positive = positive_sums(top, half, n_blocks, x.top().as_ptr());
            let sum = _mm256_sub_epi32(_mm256_add_epi32(positive, positive), all);
            let mask = (0xFF_u32 >> (ROWS - sums.len())) as u8;
            _mm256_mask_storeu_epi32(sums.as_mut_ptr(), mask, sum);
        }
    }
}

vnni_fn! {
    /// # Safety
    /// AVX-512 with VNNI is there; all rows are there, and `x` has their columns.
    pub(super) fn sign_sums_of(planes: GatePlanes<'_>, x: &SketchInput, ids: &[u32], out: &mut [i32]) {
        let n_blocks = planes.shape.n_blocks();
        // lane l of four: bits l and 4 + l of 16 bytes
        let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
        let shifts = [lanes, _mm512_add_epi32(lanes, _mm512_set1_epi32(4))];
        let masks = shifts.map(|shifts| _mm512_sllv_epi32(_mm512_set1_epi32(0x0101_0101), shifts));
        // of two blocks, lane l of eight: bit l of 8 bytes; of one, of 4
        let pair_shifts = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
        let pair_masks = _mm512_sllv_epi32(_mm512_set1_epi32(0x0101_0101), pair_shifts);
        let one_shifts = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        let one_masks = _mm256_sllv_epi32(_mm256_set1_epi32(0x0101_0101), one_shifts);
        let n_whole = n_blocks / RUN * RUN;
        for (&id, out) in ids.iter().zip(out) {
            let row = id as usize;
            let at = |block: usize| planes.top.as_ptr().add(planes.shape.signs_at(row, block));
            let first = at(0);
            let mut sums = [_mm512_setzero_si512(); 2];
            for block in (0..n_whole).step_by(RUN) {
                let signs = _mm_loadu_si128(first.add(block * TOP_BYTES).cast());
                let signs = _mm512_broadcast_i32x4(signs);
                let x = x.top().as_ptr().add(block * BLOCK);
                for n in 0..2 {
                    let set = _mm512_and_si512(signs, masks[n]);
                    sums[n] = _mm512_dpbusd_epi32(sums[n], set, _mm512_loadu_si512(x.add(64 * n).cast()));
                }
            }
            let mut sum = _mm512_add_epi32(
                _mm512_srav_epi32(sums[0], shifts[0]),
                _mm512_srav_epi32(sums[1], shifts[1]),
            );
            let mut block = n_whole;
            while block < n_blocks {
                let (_, width) = run_of(block, n_blocks);
                let x = x.top().as_ptr().add(block * BLOCK);
                let zero = _mm512_setzero_si512();
                let of_run = if width == 2 {
                    let signs = _mm512_set1_epi64(at(block).cast::<i64>().read_unaligned());
                    let set = _mm512_and_si512(signs, pair_masks);
                    let sums = _mm512_dpbusd_epi32(zero, set, _mm512_loadu_si512(x.cast()));
                    _mm512_srav_epi32(sums, pair_shifts)
                } else {
                    let signs = _mm256_set1_epi32(at(block).cast::<i32>().read_unaligned());
                    let set = _mm256_and_si256(signs, one_masks);
                    let x = _mm256_loadu_si256(x.cast());
                    let sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), set, x);
                    _mm512_zextsi256_si512(_mm256_srav_epi32(sums, one_shifts))
                };
                sum = _mm512_add_epi32(sum, of_run);
                block += width;
            }
            // those set less those not
            *out = 2 * _mm512_reduce_add_epi32(sum) - x.sum();
        }
    }
}

vnni_fn! {
    /// Writes Σ of activations whose bit 2 is set to `out`, for rows `ids`.
    ///
    /// # Safety
    /// AVX-512 with VNNI is there; all rows are there, and `x` has their columns.
    pub(super) fn high_sums(planes: GatePlanes<'_>, x: &SketchInput, ids: &[u32], out: &mut [i32]) {
        let (masks, bytes) = (bit_masks(), planes.shape.high_row_bytes());
        for &id in &ids[..ids.len().min(AHEAD)] {
            planes.prefetch_high(id as usize);
        }
        for n in 0..ids.len() {
            if let Some(&later) = ids.get(n + AHEAD) {
                planes.prefetch_high(later as usize);
            }
            let high = planes.rest_row(ids[n] as usize).high.as_ptr();
            let mut of_bits = [_mm512_setzero_si512(); BITS];
            for at in (0..bytes).step_by(64) {
                let (bits, of_x): (_, [_; BITS]) = if bytes >= 64 {
                    // the last 64 bytes less what was added: a masked load would wait for memory behind the row too
                    let from = at.min(bytes - 64);
                    let high_bits = _mm512_loadu_si512(high.add(from).cast());
                    let x = |i: usize| _mm512_loadu_si512(x.high().as_ptr().add(i * bytes + from).cast());
                    (_mm512_maskz_mov_epi8(u64::MAX << (at - from), high_bits), std::array::from_fn(x))
                } else {
                    let there = (1u64 << bytes) - 1;
                    let x = |i: usize| _mm512_maskz_loadu_epi8(there, x.high().as_ptr().add(i * bytes));
                    (_mm512_maskz_loadu_epi8(there, high.cast()), std::array::from_fn(x))
                };
                for i in 0..BITS {
                    let set = _mm512_and_si512(bits, masks[i]);
                    of_bits[i] = _mm512_dpbusd_epi32(of_bits[i], set, of_x[i]);
                }
            }
            out[n] = _mm512_reduce_add_epi32(joined(of_bits));
        }
    }
}

/// Rows of planes.
struct PlaneRows<'a>(GatePlanes<'a>);

/// Two units' activations: columns 8·j … 8·j+7 of eight blocks together; and the blocks' sums.
#[derive(Clone, Copy)]
struct PlaneActivations {
    columns: [[__m512i; HIGH_BYTES]; 2],
    x_sums: __m512i,
}

impl PlaneRows<'_> {
    fn start(&self, row: usize) -> *const u8 {
        let at = row * self.0.shape.rest_row_bytes();
        self.0.rest.as_ptr().wrapping_add(at)
    }

    vnni_fn! {
        /// Signs of columns 8·j … 8·j+7 of eight blocks, for both units and each j.
        fn signs(&self, row: usize, chunk: Chunk) -> [[u64; HIGH_BYTES]; 2] {
            let at = |block: usize| self.0.top.as_ptr().wrapping_add(self.0.shape.signs_at(row, block));
            let mut runs = [_mm_setzero_si128(); 4];
            let first = at(chunk.first);
            for (n, run) in runs.iter_mut().enumerate() {
                match chunk.count.saturating_sub(n * RUN) {
                    0 => break,
                    1 => *run = _mm_cvtsi32_si128(at(chunk.first + n * RUN).cast::<i32>().read_unaligned()),
                    2 | 3 => {
                        let block = chunk.first + n * RUN;
                        *run = _mm_loadl_epi64(at(block).cast());
                        if chunk.count - n * RUN == 3 {
                            let last = at(block + 2).cast::<i32>().read_unaligned();
                            *run = _mm_insert_epi32::<2>(*run, last);
                        }
                    }
                    _ => *run = _mm_loadu_si128(first.wrapping_add(n * RUN * TOP_BYTES).cast()),
                }
            }
            let of_blocks = _mm512_castsi128_si512(runs[0]);
            let of_blocks = _mm512_inserti32x4::<1>(of_blocks, runs[1]);
            let of_blocks = _mm512_inserti32x4::<2>(of_blocks, runs[2]);
            let of_blocks = _mm512_inserti32x4::<3>(of_blocks, runs[3]);
            // bytes j of four blocks together, then of eight
            let bytes = _mm512_set4_epi32(0x0F0B_0703, 0x0E0A_0602, 0x0D09_0501, 0x0C08_0400);
            let fours = _mm512_shuffle_epi8(of_blocks, bytes);
            let order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
            std::mem::transmute(_mm512_permutexvar_epi32(order, fours))
        }
    }
}

// SAFETY (whole impl): rows are whole; loads are masked behind the last block.
#[allow(clippy::undocumented_unsafe_blocks)]
impl TileRows for PlaneRows<'_> {
    type Activations = PlaneActivations;
    const WHOLE: bool = false;

    #[inline]
    fn ask_for(&self, row: usize, chunk: Chunk) {
        self.0
            .prefetch_signs(row, chunk.first..chunk.first + chunk.count);
        let (row, n_blocks) = (self.start(row), chunk.n_blocks);
        let mut from = 0;
        for bytes in [LOW_BYTES, HIGH_BYTES, SCALE_BYTES] {
            let at = row.wrapping_add(from + chunk.first * bytes);
            crate::dot::prefetch_bytes(at, chunk.count * bytes);
            from += n_blocks * bytes;
        }
    }

    vnni_fn! {
        fn activations(x: ActRef<'_>, chunk: Chunk) -> PlaneActivations {
            let q = x.q.as_ptr().add(chunk.first * BLOCK);
            let mut columns = [[_mm512_setzero_si512(); 4]; 2];
            for (unit, columns) in columns.iter_mut().enumerate() {
                let two = |n: usize| {
                    let at = (unit * UNIT + 2 * n) * BLOCK;
                    _mm512_maskz_loadu_epi8(chunk.mask_of_bytes(at, BLOCK), q.wrapping_add(at))
                };
                let (a, b, c, d) = (two(0), two(1), two(2), two(3));
                for (j, columns) in columns.iter_mut().enumerate() {
                    let j = j as i64;
                    let order = _mm512_setr_epi64(j, 4 + j, 8 + j, 12 + j, j, 4 + j, 8 + j, 12 + j);
                    let (front, back) = (
                        _mm512_permutex2var_epi64(a, order, b),
                        _mm512_permutex2var_epi64(c, order, d),
                    );
                    *columns = _mm512_shuffle_i64x2::<0b01_00_01_00>(front, back);
                }
            }
            let x_sums = x.block_sums.as_ptr().add(chunk.first);
            PlaneActivations { columns, x_sums: _mm512_maskz_loadu_epi32(chunk.mask(), x_sums) }
        }
    }

    vnni_fn! {
        fn totals(&self, row: usize, chunk: Chunk, x: &PlaneActivations) -> (__m512i, __m256i) {
            let n_blocks = chunk.n_blocks;
            let low = self.start(row);
            let high = low.wrapping_add(n_blocks * LOW_BYTES);
            let scales = high.wrapping_add(n_blocks * HIGH_BYTES);
            let (three, four, eight) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4), _mm512_set1_epi8(8));
            let signs = self.signs(row, chunk);
            let mut units = [_mm512_setzero_si512(); 2];
            for (unit, sum) in units.iter_mut().enumerate() {
                if unit * UNIT >= chunk.count {
                    break;
                }
                let width = (chunk.count - unit * UNIT).min(UNIT);
                let first = chunk.first + unit * UNIT;
                let mask = chunk.mask_of_bytes(unit * UNIT * LOW_BYTES, LOW_BYTES);
                let two = _mm512_maskz_loadu_epi8(mask, low.wrapping_add(first * LOW_BYTES).cast());
                let high = high.wrapping_add(first * HIGH_BYTES);
                let bits = |j: usize| {
                    // scales come behind, two bytes a block
                    if n_blocks >= UNIT / SCALE_BYTES {
                        let bits = high.add(width * j).cast::<u64>().read_unaligned();
                        return bits & (u64::MAX >> (64 - 8 * width));
                    }
                    let mut bytes = [0u8; UNIT];
                    std::ptr::copy_nonoverlapping(high.add(width * j), bytes.as_mut_ptr(), width);
                    u64::from_le_bytes(bytes)
                };
                let parts = [
                    two,
                    _mm512_srli_epi16::<2>(two),
                    _mm512_srli_epi16::<4>(two),
                    _mm512_srli_epi16::<6>(two),
                ];
                for (j, part) in parts.into_iter().enumerate() {
                    let part = _mm512_and_si512(part, three);
                    let q = _mm512_mask_add_epi8(part, bits(j), part, four);
                    let q = _mm512_mask_add_epi8(q, signs[unit][j], q, eight);
                    *sum = _mm512_dpbusd_epi32(*sum, q, x.columns[unit][j]);
                }
            }
            let scales = chunk.scales(scales);
            // eight, and one less where the scale is negative
            let negative = _mm256_movepi16_mask(scales);
            let offsets = _mm512_slli_epi32::<3>(x.x_sums);
            let offsets = _mm512_mask_sub_epi32(offsets, negative, offsets, x.x_sums);
            let lengths = _mm256_and_si256(scales, _mm256_set1_epi16(0x7FFF));
            (_mm512_sub_epi32(pair_sums(units[0], units[1]), offsets), lengths)
        }
    }
}

vnni_fn! {
    /// # Safety
    /// AVX-512 with VNNI is there; all rows are there, as [`super::planes::plane_gates`] asserts.
    pub(super) fn gates(planes: GatePlanes<'_>, x: ActRef<'_>, ids: &[u32], out: &mut [f32]) {
        products(&PlaneRows(planes), x, planes.shape.n_blocks(), ids, out, &mut |_| ());
    }
}

vnni_fn! {
    /// A block's 32 values in the file's order, 0 to 15 each.
    fn block_values(low: *const u8, high: u32, signs: u32, flip: __m256i) -> __m128i {
        let two = _mm256_set1_epi64x(low.cast::<i64>().read_unaligned());
        let two = _mm256_srlv_epi64(two, _mm256_setr_epi64x(0, 2, 4, 6));
        let two = _mm256_and_si256(two, _mm256_set1_epi8(3));
        let more = _mm256_or_si256(_mm256_maskz_set1_epi8(high, 4), _mm256_maskz_set1_epi8(signs, 8));
        let values = _mm256_xor_si256(_mm256_or_si256(two, more), flip);
        // none reaches over its byte
        let second = _mm_slli_epi16::<4>(_mm256_extracti128_si256::<1>(values));
        _mm_or_si128(_mm256_castsi256_si128(values), second)
    }
}

vnni_fn! {
    /// Writes `rows` of one group as an interleaved matrix of `Q4_0`.
    ///
    /// # Safety
    /// AVX-512 is there; the rows are there, and `image` has room for 16.
    pub(super) fn group(planes: GatePlanes<'_>, rows: Range<usize>, image: *mut u8) {
        let n_blocks = planes.shape.n_blocks();
        let to_scales = image.add(n_blocks * ROW_GROUP * BLOCK / 2);
        for (r, row) in rows.enumerate() {
            let rest = planes.rest_row(row);
            let signs = planes.top.as_ptr();
            for first in (0..n_blocks).step_by(UNIT) {
                let count = (n_blocks - first).min(UNIT);
                let mut high = [0; UNIT];
                if count == UNIT {
                    high = super::x86::high_of_blocks(rest.high[first * HIGH_BYTES..].as_ptr());
                } else {
                    let there = high[..count].iter_mut().enumerate();
                    there.for_each(|(n, high)| *high = rest.high_of(first + n));
                }
                for n in 0..count {
                    let block = first + n;
                    let signs = signs.add(planes.shape.signs_at(row, block)).cast::<u32>().read_unaligned();
                    let at = block * SCALE_BYTES;
                    let scale = u16::from_le_bytes([rest.scales[at], rest.scales[at + 1]]);
                    let flip = if scale >> 15 == 1 { 15 } else { 0 };
                    let low = rest.low.as_ptr().add(block * LOW_BYTES);
                    let values = block_values(low, high[n], signs, _mm256_set1_epi8(flip));
                    let to = image.add((block * BLOCK / 8 * ROW_GROUP + r) * 4).cast::<i32>();
                    to.write_unaligned(_mm_extract_epi32::<0>(values));
                    to.add(ROW_GROUP).write_unaligned(_mm_extract_epi32::<1>(values));
                    to.add(2 * ROW_GROUP).write_unaligned(_mm_extract_epi32::<2>(values));
                    to.add(3 * ROW_GROUP).write_unaligned(_mm_extract_epi32::<3>(values));
                    let to = to_scales.add((block * ROW_GROUP + r) * SCALE_BYTES);
                    to.cast::<u16>().write_unaligned(scale);
                }
            }
        }
    }
}
