//! What a tier must offer to multiply 16 interleaved rows: vectors of 16 lanes, a row each.

/// 16 lanes of 32 bits (i32, 4 bytes, or f32), and dot products of the bytes.
///
/// # Safety
/// All methods may be called only where the tier's instructions exist; pointers must be valid for
/// the stated bytes (no alignment is needed).
pub(crate) trait Isa {
    /// 16 × i32, or 64 bytes.
    type I: Copy;
    /// 16 × f32.
    type F: Copy;
    /// How far ahead a single token's product asks for weights.
    const AHEAD_BYTES: usize;
    /// What [`Isa::dot_signed`] adds to signed weights to make them unsigned: callers take
    /// `SIGNED_SHIFT` bits' worth of the activations' sum off again. `None`: nothing.
    const SIGNED_SHIFT: Option<u32>;

    /// 64 bytes.
    unsafe fn load(p: *const u8) -> Self::I;
    /// One i32 in all lanes.
    unsafe fn splat_i(v: i32) -> Self::I;
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn sub_i(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn mul_i(a: Self::I, b: Self::I) -> Self::I;
    /// Logical shift of every lane to the right.
    unsafe fn shr(a: Self::I, bits: u32) -> Self::I;
    /// Shift of every lane to the left.
    unsafe fn shl(a: Self::I, bits: u32) -> Self::I;
    /// Arithmetic shift of every lane to the right.
    unsafe fn sar(a: Self::I, bits: u32) -> Self::I;
    /// Sets bit 4 of byte i of each lane of `w` where bit 4·`nibble`+i of that lane of `h` is set.
    unsafe fn or_fifth_bit(w: Self::I, h: Self::I, nibble: usize) -> Self::I;

    /// i32 → f32, rounded to nearest even.
    unsafe fn to_f(a: Self::I) -> Self::F;
    unsafe fn splat(v: f32) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// a·b + c, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// 16 f32.
    unsafe fn load_f32(p: *const u8) -> Self::F;
    /// 16 half-precision values.
    unsafe fn load_f16(p: *const u8) -> Self::F;
    /// 16 bfloat16 values.
    unsafe fn load_bf16(p: *const u8) -> Self::F;
    unsafe fn store(p: *mut f32, v: Self::F);

    /// Adds to every lane of `total` the sum over N vectors of (4 unsigned weights of the lane) ·
    /// (4 signed activations at `x[n]`, the same for all lanes). The caller chooses N so that
    /// `N · 2 · weight_max · 127` fits 16 bits.
    unsafe fn dot_unsigned<const N: usize>(
        total: Self::I,
        w: [Self::I; N],
        x: [*const i8; N],
    ) -> Self::I;

    /// As [`Isa::dot_unsigned`] for one vector of signed weights; see [`Isa::SIGNED_SHIFT`].
    unsafe fn dot_signed(total: Self::I, w: Self::I, x: *const i8) -> Self::I;
}
