//! Sign sums by masks, and gates from planes, with AVX-512 and VNNI.
//!
//! 64 signs are a mask: of the activations of 8 columns, repeated for 8 rows, those of set bits are
//! summed. With the sum of all of them, that gives the sum with signs.

use std::arch::x86_64::*;
use std::ops::Range;

use super::planes::{GatePlanes, HIGH_BYTES, LOW_BYTES, SCALE_BYTES, TOP_BYTES, UNIT};
use crate::activations::ActRef;
use crate::dot::rows512::{Chunk, TileRows, products, vnni_fn};
use crate::matrix::ROW_GROUP;
use crate::quant::BLOCK;

/// Asks for what comes so far ahead.
const AHEAD_BYTES: usize = 4096;

vnni_fn! {
    /// Sums of the lanes 2n and 2n + 1 of both.
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
    /// Sums with signs of a block of 16 rows, of which `x_sum` is the sum without.
    fn block_sums(top: *const u8, x: *const i8, x_sum: i32) -> __m512i {
        let ones = _mm512_set1_epi8(1);
        let mut set = [_mm512_setzero_si512(); 2];
        for j in 0..BLOCK / 8 {
            let eight = _mm512_set1_epi64(x.add(8 * j).cast::<i64>().read_unaligned());
            for half in 0..2 {
                let mask = top.add(j * ROW_GROUP + 8 * half).cast::<u64>().read_unaligned();
                set[half] = _mm512_dpbusd_epi32(set[half], _mm512_maskz_mov_epi8(mask, ones), eight);
            }
        }
        let set = pair_sums(set[0], set[1]);
        _mm512_sub_epi32(_mm512_add_epi32(set, set), _mm512_set1_epi32(x_sum))
    }
}

vnni_fn! {
    /// Writes 16 blocks' sums of 16 rows to `to`, rows `stride` sums apart.
    fn store_turned(sums: &[__m512i; 16], to: *mut i16, stride: usize) {
        let mut quads = [_mm512_setzero_si512(); 8];
        for half in 0..2 {
            let pair = |n: usize| {
                let (a, b) = (sums[8 * half + 2 * n], sums[8 * half + 2 * n + 1]);
                _mm512_mask_blend_epi16(0xAAAA_AAAA, a, _mm512_slli_epi32::<16>(b))
            };
            let (a, b, c, d) = (pair(0), pair(1), pair(2), pair(3));
            let (ab, ab_high) = (_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
            let (cd, cd_high) = (_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
            quads[4 * half] = _mm512_unpacklo_epi64(ab, cd);
            quads[4 * half + 1] = _mm512_unpackhi_epi64(ab, cd);
            quads[4 * half + 2] = _mm512_unpacklo_epi64(ab_high, cd_high);
            quads[4 * half + 3] = _mm512_unpackhi_epi64(ab_high, cd_high);
        }
        for (n, quad) in quads.into_iter().enumerate() {
            let to = to.add(n % 4 * stride + n / 4 * 8);
            let row = |lane: usize| to.add(4 * lane * stride).cast::<__m128i>();
            _mm_storeu_si128(row(0), _mm512_extracti32x4_epi32::<0>(quad));
            _mm_storeu_si128(row(1), _mm512_extracti32x4_epi32::<1>(quad));
            _mm_storeu_si128(row(2), _mm512_extracti32x4_epi32::<2>(quad));
            _mm_storeu_si128(row(3), _mm512_extracti32x4_epi32::<3>(quad));
        }
    }
}

vnni_fn! {
    /// # Safety
    /// AVX-512 with VNNI is there; lengths fit as [`super::planes::sign_scores`] asserts.
    pub(super) fn sign_scores(
        planes: GatePlanes<'_>,
        x: ActRef<'_>,
        rows: Range<usize>,
        scores: &mut [f32],
        sums: &mut [i16],
    ) {
        let (n_blocks, stride) = (planes.shape.n_blocks(), planes.shape.sums_stride());
        let first_group = rows.start / ROW_GROUP;
        for (group, scores) in scores.chunks_mut(ROW_GROUP).enumerate() {
            let top = planes.top.as_ptr().add((first_group + group) * n_blocks * TOP_BYTES);
            let sums = sums.as_mut_ptr().add(group * ROW_GROUP * stride);
            let mut acc = _mm512_setzero_ps();
            let mut first = 0;
            while first < n_blocks {
                let mut of_blocks = [_mm512_setzero_si512(); 16];
                for block in first..(first + 16).min(n_blocks) {
                    let top = top.add(block * TOP_BYTES);
                    _mm_prefetch::<_MM_HINT_T0>(top.wrapping_add(AHEAD_BYTES).cast());
                    let x_sum = *x.block_sums.get_unchecked(block);
                    let sum = block_sums(top, x.q.as_ptr().add(block * BLOCK), x_sum);
                    let x_scale = _mm512_set1_ps(*x.scales.get_unchecked(block));
                    acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), x_scale, acc);
                    of_blocks[block - first] = sum;
                }
                store_turned(&of_blocks, sums.add(first), stride);
                first += 16;
            }
            let mask = (0xFFFF_u32 >> (ROW_GROUP - scores.len())) as u16;
            _mm512_mask_storeu_ps(scores.as_mut_ptr(), mask, acc);
        }
    }
}

/// Rows of the rest, with their sums of signs.
struct RestRows<'a> {
    planes: GatePlanes<'a>,
    first_row: usize,
    sums: &'a [i16],
}

/// Two units' activations: columns 8·j … 8·j+7 of eight blocks together; and the blocks' sums.
#[derive(Clone, Copy)]
struct RestActivations {
    columns: [[__m512i; 4]; 2],
    x_sums: __m512i,
}

impl RestRows<'_> {
    fn start(&self, row: usize) -> *const u8 {
        let at = row * self.planes.shape.rest_row_bytes();
        self.planes.rest.as_ptr().wrapping_add(at)
    }
}

// SAFETY (whole impl): rows are whole; loads are masked behind the last block.
#[allow(clippy::undocumented_unsafe_blocks)]
impl TileRows for RestRows<'_> {
    type Activations = RestActivations;

    vnni_fn! {
        fn activations(x: ActRef<'_>, chunk: Chunk) -> RestActivations {
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
            RestActivations { columns, x_sums: _mm512_maskz_loadu_epi32(chunk.mask(), x_sums) }
        }
    }

    vnni_fn! {
        fn totals(&self, row: usize, chunk: Chunk, x: &RestActivations) -> (__m512i, __m256i) {
            let n_blocks = chunk.n_blocks;
            let low = self.start(row);
            let high = low.wrapping_add(n_blocks * LOW_BYTES);
            let scales = high.wrapping_add(n_blocks * HIGH_BYTES + chunk.first * SCALE_BYTES);
            let (three, four) = (_mm512_set1_epi8(3), _mm512_set1_epi8(4));
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
                    if width == UNIT {
                        return high.add(UNIT * j).cast::<u64>().read_unaligned();
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
                    let rest = _mm512_mask_add_epi8(part, bits(j), part, four);
                    *sum = _mm512_dpbusd_epi32(*sum, rest, x.columns[unit][j]);
                }
            }
            let scales = _mm256_maskz_loadu_epi16(chunk.mask(), scales.cast());
            let signs = self.sums.as_ptr().add((row - self.first_row) * self.planes.shape.sums_stride() + chunk.first);
            let signs = _mm512_cvtepi16_epi32(_mm256_loadu_si256(signs.cast()));
            let negative = _mm256_movepi16_mask(scales);
            let signs = _mm512_mask_sub_epi32(signs, negative, _mm512_setzero_si512(), signs);
            let rest = _mm512_slli_epi32::<2>(_mm512_sub_epi32(signs, x.x_sums));
            (_mm512_add_epi32(pair_sums(units[0], units[1]), rest), scales)
        }
    }
}

vnni_fn! {
    /// # Safety
    /// AVX-512 with VNNI is there; all rows and their sums are there, as [`super::planes::plane_gates`]
    /// asserts.
    pub(super) fn gates(
        planes: GatePlanes<'_>,
        x: ActRef<'_>,
        first_row: usize,
        sums: &[i16],
        ids: &[u32],
        out: &mut [f32],
    ) {
        let rows = RestRows { planes, first_row, sums };
        products(&rows, x, planes.shape.n_blocks(), ids, out);
    }
}
