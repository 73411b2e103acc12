//! 16 interleaved rows against 16 activation rows with AMX: the inner loop of `gemm` for many tokens.
//!
//! A vector of [`Unpack::values`] holds four columns of each of 16 rows, as a row of a tile's right operand does: eight of them are a
//! sub-block of all 16 rows. Their product with the same 32 columns of 16 tokens is one instruction, whose integers are exact. Each is
//! then scaled and added as in [`super::tile::q8`], with the same bits.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::OnceLock;

use super::avx512::Avx512;
use super::tile::Group;
use super::unpack::{Planes, Unpack};
use crate::activations::ActBatch;
use crate::matrix::{ROW_GROUP, StridedOut};
use crate::quant::BLOCK;

/// Tokens of a tile.
const TOKENS: usize = 16;
/// Sub-blocks whose values are unpacked at a time, so that the first cache holds them.
const SUBS: usize = 32;
/// Bytes of a sub-block's values.
const SUB_BYTES: usize = ROW_GROUP * BLOCK;
/// Bytes from one row of a tile to the next, of the right operand and of products.
const ROW_BYTES: usize = 4 * ROW_GROUP;

type S = Avx512<true>;

/// Whether the processor has 8-bit tiles and the kernel lets this process use them.
///
/// Source: Intel, "Architecture Instruction Set Extensions Programming Reference", chapter 3; Linux, `Documentation/arch/x86/xstate.rst`.
pub(crate) fn is_available() -> bool {
    /// Bits of CPUID leaf 7: tiles, and products of 8-bit tiles.
    const TILES: u32 = 1 << 24 | 1 << 25;
    /// Asks for a feature of the processor's state that is not saved unless asked for.
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & TILES != TILES {
            return false;
        }
        // SAFETY: it changes nothing but the right to use tiles.
        unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            ) == 0
        }
    })
}

/// How many of `n_tokens` go on tiles: the last ones too if there are `min`.
pub(crate) fn on_tiles(n_tokens: usize, min: usize) -> usize {
    match n_tokens % TOKENS {
        rest if rest < min => n_tokens - rest,
        _ => n_tokens,
    }
}

/// Shapes of the tiles: palette 1.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    n_rows: [u8; 16],
}

impl Shapes {
    /// Tiles 0 and 3: left operands; 1 and 4: right ones; 2 and 5: products.
    const fn new(n_left: usize, columns: usize) -> Self {
        let mut shapes = Self {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            n_rows: [0; 16],
        };
        let mut first = 0;
        while first < 6 {
            shapes.row_bytes[first] = columns as u16;
            shapes.n_rows[first] = n_left as u8;
            shapes.row_bytes[first + 1] = ROW_BYTES as u16;
            shapes.n_rows[first + 1] = (columns / 4) as u8;
            shapes.row_bytes[first + 2] = ROW_BYTES as u16;
            shapes.n_rows[first + 2] = n_left as u8;
            first += 3;
        }
        shapes
    }
}

/// The thread's tiles, with shapes. Given up when dropped, so that nobody saves them when threads change.
struct Tiles(());

impl Tiles {
    /// Tiles for products of `n_left` rows (1 to 16) of `columns` bytes (a multiple of 4, up to 64) with 16 others.
    ///
    /// # Safety
    /// The machine has AMX; the thread has no other tiles.
    unsafe fn new(n_left: usize, columns: usize) -> Self {
        let mut tiles = Self(());
        // SAFETY: this function's contract.
        unsafe { tiles.reshape(n_left, columns) };
        tiles
    }

    /// The same tiles with other shapes.
    ///
    /// # Safety
    /// As [`Tiles::new`].
    unsafe fn reshape(&mut self, n_left: usize, columns: usize) {
        let shapes = Shapes::new(n_left, columns);
        // SAFETY: this function's contract; the shapes fit palette 1.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly, preserves_flags));
        }
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: it exists only where the machine has AMX.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Sub-blocks of a group of 16 rows: signed values in the order of a tile's right operand, and what they are scaled with.
#[repr(C, align(64))]
struct Unpacked {
    values: [[i8; SUB_BYTES]; SUBS],
    scales: [[f32; ROW_GROUP]; SUBS],
    mins: [[f32; ROW_GROUP]; SUBS],
    half_scales: [[[i32; ROW_GROUP]; 2]; SUBS],
    half_mins: [[[i32; ROW_GROUP]; 2]; SUBS],
}

/// Products of one sub-block, or of its two halves.
#[repr(C, align(64))]
struct Products([[[i32; ROW_GROUP]; TOKENS]; 2]);

/// Features of every function here, beside AMX.
macro_rules! amx_fn {
    ($(#[$doc:meta])* $vis:vis fn $name:ident [$($g:ident : $b:path)? $(; const $n:ident : $nt:ty)?] ($($arg:ident : $t:ty),* $(,)?) $body:block) => {
        $(#[$doc])*
        #[inline]
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
        $vis unsafe fn $name<$($g: $b,)? $(const $n: $nt)?>($($arg: $t),*) {
            // SAFETY: the features are enabled; the rest is the function's contract.
            #[allow(unused_unsafe)]
            unsafe { $body }
        }
    };
}

amx_fn! {
    /// Unpacks sub-blocks `subs` (at most [`SUBS`]).
    ///
    /// # Safety
    /// The machine has AVX-512; `planes` holds the sub-blocks; `out` is valid for writes.
    fn unpack[U: Unpack](planes: &Planes, subs: Range<usize>, out: *mut Unpacked) {
        for (n, sub) in subs.enumerate() {
            let values = U::values::<S>(planes, sub);
            let to = (&raw mut (*out).values[n]).cast::<u8>();
            for (j, values) in values.into_iter().enumerate() {
                let signed = match U::OFFSET_SHIFT {
                    Some(shift) => _mm512_sub_epi8(values, _mm512_set1_epi8(1 << shift)),
                    None => values,
                };
                _mm512_store_si512(to.add(j * ROW_BYTES).cast(), signed);
            }
            let f32s = |to: *mut [f32; ROW_GROUP], v: __m512| _mm512_store_ps(to.cast(), v);
            let i32s = |to: *mut [i32; ROW_GROUP], v: __m512i| _mm512_store_si512(to.cast(), v);
            f32s(&raw mut (*out).scales[n], U::scale::<S>(planes, sub));
            if U::HAS_MIN {
                f32s(&raw mut (*out).mins[n], U::min::<S>(planes, sub));
            }
            if U::HALVES {
                let (first, second) = U::half_scales::<S>(planes, sub);
                i32s(&raw mut (*out).half_scales[n][0], first);
                i32s(&raw mut (*out).half_scales[n][1], second);
            }
            if U::HALVES && U::HAS_MIN {
                let (first, second) = U::half_mins::<S>(planes, sub);
                i32s(&raw mut (*out).half_mins[n][0], first);
                i32s(&raw mut (*out).half_mins[n][1], second);
            }
        }
    }
}

/// Products of signed bytes, in registers of their own.
macro_rules! multiply {
    ($a:literal, $b:literal, $c:literal, $left:expr, $stride:expr, $right:expr, $out:expr) => {
        asm!(
            concat!("tileloadd ", $a, ", [{left} + {stride}*1]"),
            concat!("tileloadd ", $b, ", [{right} + {row}*1]"),
            concat!("tilezero ", $c),
            concat!("tdpbssd ", $c, ", ", $a, ", ", $b),
            concat!("tilestored [{out} + {row}*1], ", $c),
            left = in(reg) $left,
            stride = in(reg) $stride,
            right = in(reg) $right,
            out = in(reg) $out,
            row = in(reg) ROW_BYTES,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, out("tmm4") _, out("tmm5") _,
            options(nostack, preserves_flags),
        )
    };
}

/// Overwrites `out` `[n_left, 16]` with the products of the rows at `left`, `stride` bytes apart, and of `right` `[columns / 4, 16, 4]`.
/// Neighbouring products are `SECOND` and not in turns, to have tiles of their own.
///
/// # Safety
/// The machine has AMX; the thread's [`Tiles`] have these shapes; pointers are valid.
#[inline(always)]
unsafe fn multiply<const SECOND: bool>(
    left: *const i8,
    stride: usize,
    right: *const i8,
    out: *mut i32,
) {
    // SAFETY: this function's contract.
    unsafe {
        if SECOND {
            multiply!("tmm3", "tmm4", "tmm5", left, stride, right, out);
        } else {
            multiply!("tmm0", "tmm1", "tmm2", left, stride, right, out);
        }
    }
}

amx_fn! {
    /// Integer products of sub-block `n` of `weights` with those columns of the tokens that start at `x`, `stride` bytes apart.
    ///
    /// # Safety
    /// The machine has AMX; tiles have the shapes of the format and the tokens; all tokens have the columns.
    fn products[U: Unpack](weights: *const Unpacked, n: usize, x: *const i8, stride: usize, out: *mut Products) {
        let w = (&raw const (*weights).values[n]).cast::<i8>();
        let first = (&raw mut (*out).0[0]).cast::<i32>();
        if U::HALVES {
            let second = (&raw mut (*out).0[1]).cast::<i32>();
            multiply::<false>(x, stride, w, first);
            multiply::<true>(x.add(BLOCK / 2), stride, w.add(SUB_BYTES / 2), second);
        } else if n.is_multiple_of(2) {
            multiply::<false>(x, stride, w, first);
        } else {
            multiply::<true>(x, stride, w, first);
        }
    }
}

/// Activations of a tile's tokens, from the first of some sub-blocks on.
#[derive(Clone, Copy)]
struct Tokens {
    q: *const i8,
    scales: *const f32,
    sums: *const f32,
    half_sums: *const i32,
    /// Sub-blocks from one token to the next.
    n_blocks: usize,
}

impl Tokens {
    fn new(x: &ActBatch, token: usize, sub: usize) -> Self {
        let first = x.token(token);
        Self {
            q: first.q[sub * BLOCK..].as_ptr(),
            scales: first.scales[sub..].as_ptr(),
            sums: first.sums[sub..].as_ptr(),
            half_sums: first.half_sums[2 * sub..].as_ptr(),
            n_blocks: first.scales.len(),
        }
    }
}

/// Adds `products` of sub-block `n` to one token's sums, in the order of the specification.
///
/// # Safety
/// The machine has AVX-512; `t` and `n` are there.
#[inline(always)]
unsafe fn add<U: Unpack>(
    weights: *const Unpacked,
    n: usize,
    x: Tokens,
    t: usize,
    products: *const Products,
    acc: __m512,
) -> __m512 {
    // SAFETY: this function's contract.
    unsafe {
        let f32s = |from: *const [f32; ROW_GROUP]| _mm512_load_ps(from.cast());
        let i32s = |from: *const [i32; ROW_GROUP]| _mm512_load_si512(from.cast());
        let at = t * x.n_blocks + n;
        let first = i32s(&raw const (*products).0[0][t]);
        let total = if U::HALVES {
            let second = i32s(&raw const (*products).0[1][t]);
            let scales = &raw const (*weights).half_scales[n];
            _mm512_add_epi32(
                _mm512_mullo_epi32(first, i32s(&raw const (*scales)[0])),
                _mm512_mullo_epi32(second, i32s(&raw const (*scales)[1])),
            )
        } else {
            first
        };
        let x_scale = _mm512_set1_ps(*x.scales.add(at));
        let scale = f32s(&raw const (*weights).scales[n]);
        let both = _mm512_mul_ps(scale, x_scale);
        let acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), both, acc);
        if !U::HAS_MIN {
            return acc;
        }
        let min = f32s(&raw const (*weights).mins[n]);
        if !U::HALVES {
            return _mm512_fmadd_ps(min, _mm512_set1_ps(*x.sums.add(at)), acc);
        }
        let mins = &raw const (*weights).half_mins[n];
        let sums = x.half_sums.add(2 * at);
        let total = _mm512_add_epi32(
            _mm512_mullo_epi32(i32s(&raw const (*mins)[0]), _mm512_set1_epi32(*sums)),
            _mm512_mullo_epi32(i32s(&raw const (*mins)[1]), _mm512_set1_epi32(*sums.add(1))),
        );
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(min, x_scale), acc)
    }
}

amx_fn! {
    /// Adds the products of `n_subs` unpacked sub-blocks with all 16 tokens, or, if not `FULL`, with as many as `out` has.
    ///
    /// # Safety
    /// The machine has AMX; tiles have the shapes of the format and the tokens, which have the sub-blocks. `out` has at most 16 rows.
    fn tile[U: Unpack; const FULL: bool](
        weights: *const Unpacked,
        n_subs: usize,
        x: Tokens,
        is_first: bool,
        out: &mut StridedOut<'_>,
    ) {
        let n_tokens = if FULL { TOKENS } else { out.n_tokens() };
        let mask = (0xFFFF_u32 >> (ROW_GROUP - out.n_rows())) as u16;
        let mut acc = [_mm512_setzero_ps(); TOKENS];
        if !is_first {
            for t in 0..n_tokens {
                acc[t] = _mm512_maskz_loadu_ps(mask, out.row(t).as_ptr());
            }
        }
        let mut room = MaybeUninit::<[Products; 2]>::uninit();
        let room = room.as_mut_ptr().cast::<Products>();
        let stride = x.n_blocks * BLOCK;
        products::<U>(weights, 0, x.q, stride, room);
        for n in 0..n_subs {
            if n + 1 < n_subs {
                // the next ones are multiplied while these are added
                let next = room.add((n + 1) % 2);
                products::<U>(weights, n + 1, x.q.add((n + 1) * BLOCK), stride, next);
            }
            let products = room.add(n % 2);
            if FULL {
                // written out, so that sums stay in registers
                macro_rules! add_all {
                    ($($t:literal)*) => {$(
                        acc[$t] = add::<U>(weights, n, x, $t, products, acc[$t]);
                    )*};
                }
                add_all!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            } else {
                for t in 0..n_tokens {
                    acc[t] = add::<U>(weights, n, x, t, products, acc[t]);
                }
            }
        }
        for t in 0..n_tokens {
            _mm512_mask_storeu_ps(out.row(t).as_mut_ptr(), mask, acc[t]);
        }
    }
}

amx_fn! {
    /// 8-bit activations: overwrites `out` (a row for each of `tokens`, up to 16 columns).
    ///
    /// # Safety
    /// The machine has AMX and AVX-512 with VNNI; `group` is a packed group of the format, and `x` has its columns, in 8-bit blocks.
    pub(crate) fn q8[U: Unpack](group: Group, x: &ActBatch, tokens: Range<usize>, out: StridedOut<'_>) {
        if tokens.is_empty() {
            return;
        }
        assert!(
            x.token(tokens.start).q.len() >= group.n_cols && tokens.end <= x.capacity(),
            "activations have 8-bit blocks"
        );
        let mut out = out;
        let planes = Planes::new(U::QUANT, group.start, group.n_cols / U::QUANT.block_values());
        let n_subs = group.n_cols / BLOCK;
        let mut unpacked = MaybeUninit::<Unpacked>::uninit();
        let whole = tokens.len() / TOKENS * TOKENS;
        let columns = if U::HALVES { BLOCK / 2 } else { BLOCK };
        let mut tiles = Tiles::new(tokens.len().min(TOKENS), columns);
        let n_rows = out.n_rows();
        for first in (0..n_subs).step_by(SUBS) {
            let subs = first..(first + SUBS).min(n_subs);
            let weights = unpacked.as_mut_ptr();
            unpack::<U>(&planes, subs.clone(), weights);
            if whole > 0 && whole < tokens.len() {
                tiles.reshape(TOKENS, columns);
            }
            for t in (0..whole).step_by(TOKENS) {
                let x = Tokens::new(x, tokens.start + t, first);
                let mut out = out.part(t..t + TOKENS, 0..n_rows);
                tile::<U, true>(weights, subs.len(), x, first == 0, &mut out);
            }
            if whole < tokens.len() {
                tiles.reshape(tokens.len() - whole, columns);
                let x = Tokens::new(x, tokens.start + whole, first);
                let mut out = out.part(whole..tokens.len(), 0..n_rows);
                tile::<U, false>(weights, subs.len(), x, first == 0, &mut out);
            }
        }
    }
}
