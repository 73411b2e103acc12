//! Many single rows times one x with AVX-512 and VNNI, 16 rows at a time.
//!
//! Of each row the integer totals of 16 blocks come first. 16 rows of them, turned, lie side by side,
//! so that every lane adds one row's blocks in the order of the specification: the bits are
//! [`super::scalar::dot`]'s.

use std::arch::x86_64::*;

use crate::activations::ActRef;
use crate::ffn_sparse::NeuronRows;
use crate::quant::{BLOCK, QuantType};

/// Rows of a tile, and blocks.
const TILE: usize = 16;

/// Features of every function here.
macro_rules! vnni_fn {
    ($(#[$doc:meta])* $vis:vis fn $name:ident (&mut $self:ident, $($arg:ident : $t:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        $vis unsafe fn $name(&mut $self, $($arg: $t),*) {
            // SAFETY: the features are enabled; pointers are valid by the function's contract.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident (&$self:ident, $($arg:ident : $t:ty),* $(,)?) -> $r:ty $body:block) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        $vis unsafe fn $name(&$self, $($arg: $t),*) -> $r {
            // SAFETY: the features are enabled; pointers are valid by the function's contract.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident [$($g:ident : $b:path),*; const $n:ident : $nt:ty] ($($arg:ident : $t:ty),* $(,)?) -> $r:ty $body:block) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        $vis unsafe fn $name<$($g: $b),*, const $n: $nt>($($arg: $t),*) -> $r {
            // SAFETY: the features are enabled; pointers are valid by the function's contract.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident $(<$($g:ident : $b:path),*>)? $([const $n:ident : $nt:ty])? ($($arg:ident : $t:ty),* $(,)?) $(-> $r:ty)? $body:block) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        $vis unsafe fn $name $(<$($g: $b),*>)? $(<const $n: $nt>)? ($($arg: $t),*) $(-> $r)? {
            // SAFETY: the features are enabled; pointers are valid by the function's contract.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    };
}
pub(crate) use vnni_fn;

/// Up to 16 blocks of all rows.
#[derive(Clone, Copy)]
pub(crate) struct Chunk {
    /// First block.
    pub first: usize,
    /// Blocks.
    pub count: usize,
    /// Blocks of a whole row.
    pub n_blocks: usize,
}

impl Chunk {
    /// A bit for each block.
    #[inline(always)]
    pub(crate) fn mask(&self) -> __mmask16 {
        (0xFFFF_u32 >> (TILE - self.count)) as u16
    }

    /// A bit for each of 64 bytes from byte `at` of the chunk on, of which a block has `bytes`.
    #[inline(always)]
    pub(crate) fn mask_of_bytes(&self, at: usize, bytes: usize) -> __mmask64 {
        let left = (self.count * bytes).saturating_sub(at);
        if left >= 64 {
            u64::MAX
        } else {
            (1u64 << left) - 1
        }
    }

    vnni_fn! {
        /// Its scales (f16), of a row whose scales start at `row`; 0 behind them.
        ///
        /// A masked load waits for all the memory that it spans, also where it is masked out. So nothing behind a row's last scale is
        /// touched, wherever the row has 16: it may lie in another line of the caches, which nobody has asked for.
        ///
        /// # Safety
        /// AVX-512 is there; the row has these blocks.
        pub(crate) fn scales(&self, row: *const u8) -> __m256i {
            if self.n_blocks < TILE || self.first + TILE <= self.n_blocks {
                return _mm256_maskz_loadu_epi16(self.mask(), row.wrapping_add(2 * self.first).cast());
            }
            let from = self.n_blocks - TILE;
            let last = _mm256_loadu_si256(row.wrapping_add(2 * from).cast());
            let lanes = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let lanes = _mm256_add_epi16(lanes, _mm256_set1_epi16((self.first - from) as i16));
            _mm256_maskz_permutexvar_epi16(self.mask(), lanes, last)
        }
    }
}

/// Rows, for [`products`].
///
/// # Safety
/// Functions read rows below the number that the implementation was made with, and `x` within whole
/// blocks; they may be called where AVX-512 and VNNI are.
pub(crate) trait TileRows {
    /// Activations of a chunk, in the order of the rows' bytes.
    type Activations: Copy;

    /// Whether chunks of 16 blocks are computed by code of their own, without masks. (Two copies of long code are not inlined.)
    const WHOLE: bool;

    /// Asks for what [`Self::totals`] will read.
    fn ask_for(&self, row: usize, chunk: Chunk);

    /// Reads those of `chunk`.
    unsafe fn activations(x: ActRef<'_>, chunk: Chunk) -> Self::Activations;

    /// What each block of the row adds to (in integers), 0 behind the last; and 16 scales (f16),
    /// 0 behind the last.
    unsafe fn totals(&self, row: usize, chunk: Chunk, x: &Self::Activations) -> (__m512i, __m256i);
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([[f32; TILE]; TILE]);

vnni_fn! {
    /// Columns `at` … `at` + 3 of the tile.
    fn columns(tile: &Tile, at: usize) -> [__m512; 4] {
        let four = |first: usize| {
            let part = |row: usize| _mm_load_ps(tile.0[row].as_ptr().add(at));
            let v = _mm512_castps128_ps512(part(first));
            let v = _mm512_insertf32x4::<1>(v, part(first + 4));
            let v = _mm512_insertf32x4::<2>(v, part(first + 8));
            _mm512_insertf32x4::<3>(v, part(first + 12))
        };
        let (a, b, c, d) = (four(0), four(1), four(2), four(3));
        let pairs = [
            _mm512_castps_pd(_mm512_unpacklo_ps(a, b)),
            _mm512_castps_pd(_mm512_unpackhi_ps(a, b)),
            _mm512_castps_pd(_mm512_unpacklo_ps(c, d)),
            _mm512_castps_pd(_mm512_unpackhi_ps(c, d)),
        ];
        [
            _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[0], pairs[2])),
            _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[0], pairs[2])),
            _mm512_castpd_ps(_mm512_unpacklo_pd(pairs[1], pairs[3])),
            _mm512_castpd_ps(_mm512_unpackhi_pd(pairs[1], pairs[3])),
        ]
    }
}

vnni_fn! {
    /// Writes the products of rows `ids` to `out`; a row has `n_blocks` blocks. `beside` is called with each index once,
    /// when its row is asked for: one for one with rows that are multiplied, so that memory is never waited for in
    /// long runs.
    ///
    /// # Safety
    /// AVX-512 with VNNI is there, all ids have rows, there is an output for each, and `x` has 8-bit blocks.
    pub(crate) fn products<R: TileRows, F: FnMut(usize)>(
        rows: &R,
        x: ActRef<'_>,
        n_blocks: usize,
        ids: &[u32],
        out: &mut [f32],
        beside: &mut F,
    ) {
        for (j, &id) in ids.iter().enumerate().take(TILE) {
            rows.ask_for(id as usize, Chunk { first: 0, count: n_blocks, n_blocks });
            beside(j);
        }
        let mut tiles = [Tile([[0.0; TILE]; TILE]); 2];
        let mut at = 0;
        while at < ids.len() {
            let (these, next) = ids[at..].split_at((ids.len() - at).min(TILE));
            let mut acc = _mm512_setzero_ps();
            for first in (0..n_blocks).step_by(TILE) {
                let chunk = Chunk { first, count: (n_blocks - first).min(TILE), n_blocks };
                let mut ask = |r: usize| {
                    if let Some(&next) = next.get(r) {
                        rows.ask_for(next as usize, chunk);
                        if first == 0 {
                            beside(at + TILE + r);
                        }
                    }
                };
                acc = if R::WHOLE && chunk.count == TILE {
                    add_chunk::<R, _, true>(rows, x, chunk, these, &mut tiles, acc, &mut ask)
                } else {
                    add_chunk::<R, _, false>(rows, x, chunk, these, &mut tiles, acc, &mut ask)
                };
            }
            let mask = (0xFFFF_u32 >> (TILE - these.len())) as u16;
            _mm512_mask_storeu_ps(out.as_mut_ptr().add(at), mask, acc);
            at += these.len();
        }
    }
}

vnni_fn! {
    /// `acc`, a row's sum in each lane, and the rows' products with a chunk. `ask` is called beside each.
    ///
    /// # Safety
    /// As [`products`]; the chunk is `FULL` or not.
    fn add_chunk[R: TileRows, F: FnMut(usize); const FULL: bool](
        rows: &R,
        x: ActRef<'_>,
        chunk: Chunk,
        ids: &[u32],
        tiles: &mut [Tile; 2],
        acc: __m512,
        ask: &mut F,
    ) -> __m512 {
        // known to the compiler, which needs no masks then
        let chunk = if FULL { Chunk { count: TILE, ..chunk } } else { chunk };
        let [totals, factors] = tiles;
        let activations = R::activations(x, chunk);
        let x_scales = _mm512_maskz_loadu_ps(chunk.mask(), x.scales.as_ptr().add(chunk.first));
        for (r, &id) in ids.iter().enumerate() {
            ask(r);
            let (total, scales) = rows.totals(id as usize, chunk, &activations);
            let factor = _mm512_mul_ps(_mm512_cvtph_ps(scales), x_scales);
            _mm512_store_ps(totals.0[r].as_mut_ptr(), _mm512_cvtepi32_ps(total));
            _mm512_store_ps(factors.0[r].as_mut_ptr(), factor);
        }
        let mut acc = acc;
        let mut block = 0;
        while block < chunk.count {
            let (t, f) = (columns(totals, block), columns(factors, block));
            for c in 0..(chunk.count - block).min(4) {
                acc = _mm512_fmadd_ps(t[c], f[c], acc);
            }
            block += 4;
        }
        acc
    }
}

/// Rows of `Q4_0`: nibbles of all blocks, 16 bytes each, and behind them the scales.
pub(crate) struct Q4_0<'a>(pub NeuronRows<'a>);

/// Low and high nibbles' activations of four blocks each, and eight times the blocks' sums.
#[derive(Clone, Copy)]
pub(crate) struct Q4_0Activations {
    low: [__m512i; 4],
    high: [__m512i; 4],
    offsets: __m512i,
}

impl Q4_0<'_> {
    #[inline(always)]
    fn start(&self, row: usize) -> *const u8 {
        debug_assert!(row < self.0.n_neurons && self.0.quant == QuantType::Q4_0);
        let at = row * self.0.stride_bytes + self.0.offset_bytes;
        self.0.bytes.as_ptr().wrapping_add(at)
    }
}

// SAFETY (whole impl): rows are whole; loads are masked behind the last block.
#[allow(clippy::undocumented_unsafe_blocks)]
impl TileRows for Q4_0<'_> {
    type Activations = Q4_0Activations;
    const WHOLE: bool = true;

    #[inline]
    fn ask_for(&self, row: usize, chunk: Chunk) {
        let row = self.start(row);
        super::prefetch_bytes(row.wrapping_add(chunk.first * 16), chunk.count * 16);
        let scales = row.wrapping_add(chunk.n_blocks * 16 + chunk.first * 2);
        super::prefetch_bytes(scales, chunk.count * 2);
    }

    vnni_fn! {
        fn activations(x: ActRef<'_>, chunk: Chunk) -> Q4_0Activations {
            let q = x.q.as_ptr().add(chunk.first * BLOCK);
            let mut out = Q4_0Activations {
                low: [_mm512_setzero_si512(); 4],
                high: [_mm512_setzero_si512(); 4],
                offsets: _mm512_slli_epi32::<3>(_mm512_maskz_loadu_epi32(
                    chunk.mask(),
                    x.block_sums.as_ptr().add(chunk.first),
                )),
            };
            for unit in 0..4 {
                let two = |n: usize| {
                    let at = (2 * unit + n) * 64;
                    _mm512_maskz_loadu_epi8(chunk.mask_of_bytes(at, BLOCK), q.wrapping_add(at))
                };
                let (a, b) = (two(0), two(1));
                out.low[unit] = _mm512_shuffle_i64x2::<0b10_00_10_00>(a, b);
                out.high[unit] = _mm512_shuffle_i64x2::<0b11_01_11_01>(a, b);
            }
            out
        }
    }

    vnni_fn! {
        fn totals(&self, row: usize, chunk: Chunk, x: &Q4_0Activations) -> (__m512i, __m256i) {
            let start = self.start(row);
            let nibbles = start.wrapping_add(chunk.first * 16);
            let mask = _mm512_set1_epi8(0xF);
            let mut sums = [_mm512_setzero_si512(); 4];
            for unit in 0..4 {
                if 4 * unit >= chunk.count {
                    break;
                }
                let at = 64 * unit;
                let w = _mm512_maskz_loadu_epi8(chunk.mask_of_bytes(at, 16), nibbles.wrapping_add(at).cast());
                let (low, high) = (_mm512_and_si512(w, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(w), mask));
                let sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low, x.low[unit]);
                sums[unit] = _mm512_dpbusd_epi32(sum, high, x.high[unit]);
            }
            // lane k of a unit has four parts of block 4·unit + k
            let add = |a: __m512i, b: __m512i| {
                _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b))
            };
            let (front, back) = (add(sums[0], sums[1]), add(sums[2], sums[3]));
            let total = _mm512_add_epi32(
                _mm512_unpacklo_epi64(front, back),
                _mm512_unpackhi_epi64(front, back),
            );
            let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let total = _mm512_permutexvar_epi32(order, total);
            let scales = start.wrapping_add(chunk.n_blocks * 16);
            (_mm512_sub_epi32(total, x.offsets), chunk.scales(scales))
        }
    }
}
