//! Rows times the activations of several tokens, on tensor cores.

use super::batch::{DeviceBatch, RawBatch};
use super::buffer::{DeviceBuffer, ViewMut};
use super::device::Device;
use super::layout::RowsView;
use super::rows::Add;
use super::stream::{Grid, Stream};
use crate::activations::ActivationMode;
use crate::error::KernelError;

/// A kernel's part of the output per block (`GemmTile` of `kernels/cuda/gemm.cu`).
#[derive(Debug, Clone, Copy)]
pub(super) struct Tile {
    /// As the kernel's name ends.
    pub(super) name: &'static str,
    rows: usize,
    tokens: usize,
    /// Blocks that a multiprocessor holds at a time.
    blocks: usize,
    /// Shared memory of a block.
    pub(super) shared_bytes: usize,
}

/// Rows and tokens of a tile, columns of a step, and tiles of activations; `planes` f16 a value.
const fn tile(
    name: &'static str,
    [rows, tokens, columns]: [usize; 3],
    stages: usize,
    planes: usize,
    blocks: usize,
) -> Tile {
    Tile {
        name,
        rows,
        tokens,
        blocks,
        shared_bytes: planes * 2 * columns * (2 * rows + stages * tokens),
    }
}

/// For 8-bit arithmetic, smallest first.
const TILES_Q8: [Tile; 3] = [
    tile("small", [64, 32, 64], 4, 1, 4),
    tile("middle", [128, 64, 32], 4, 1, 3),
    tile("large", [128, 128, 32], 4, 1, 2),
];
/// For f32 arithmetic.
const TILE_F32: Tile = tile("split", [128, 64, 32], 2, 2, 2);

/// All of them; the kernels of a format are in this order.
pub(super) const TILES: [Tile; 4] = [TILES_Q8[0], TILES_Q8[1], TILES_Q8[2], TILE_F32];

/// Threads of a block.
const THREADS: usize = 128;
/// Columns below which dividing a sum further gains nothing.
const COLUMNS_MIN: usize = 512;

/// Memory that [`gemm`] works in, of any shape. One launch at a time may use it.
#[derive(Debug)]
pub struct GemmScratch {
    n_multiprocessors: usize,
    partials: DeviceBuffer<f32>,
    tickets: DeviceBuffer<u32>,
}

impl GemmScratch {
    /// For a device; 128 KiB for each multiprocessor.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device) -> Result<Self, KernelError> {
        let n_multiprocessors = device.info().n_multiprocessors;
        let most = |of: fn(&Tile) -> usize| TILES.iter().map(of).max().unwrap_or_default();
        let len = most(|tile| tile.blocks * tile.rows * tile.tokens);
        Ok(Self {
            n_multiprocessors,
            partials: device.alloc(n_multiprocessors * len)?,
            tickets: device.alloc(n_multiprocessors * most(|tile| tile.blocks))?,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.partials.bytes() + self.tickets.bytes()
    }
}

/// How a product is divided: place in [`TILES`], blocks of the output, parts of the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Division {
    place: usize,
    n_tiles: usize,
    n_parts: usize,
}

/// Divides a product among multiprocessors: with the largest tiles that keep them all busy.
fn divide(
    mode: ActivationMode,
    [n_rows, n_cols, n_tokens]: [usize; 3],
    n_multiprocessors: usize,
) -> Division {
    let with = |place: usize| {
        let tile = TILES[place];
        let n_tiles = n_rows.div_ceil(tile.rows) * n_tokens.div_ceil(tile.tokens);
        // tiles of several parts are never more than there is room for
        let room = n_multiprocessors * tile.blocks;
        let n_parts = (room / n_tiles.max(1)).clamp(1, n_cols.div_ceil(COLUMNS_MIN));
        Division {
            place,
            n_tiles,
            n_parts,
        }
    };
    if mode == ActivationMode::F32 {
        return with(TILES_Q8.len());
    }
    // a tile that the tokens do not fill more than half is too large
    let largest = TILES_Q8.iter().rposition(|tile| n_tokens > tile.tokens / 2);
    let mut places = (1..=largest.unwrap_or(0)).rev().map(with);
    let busy = |division: &Division| division.n_tiles * division.n_parts >= n_multiprocessors;
    places.find(busy).unwrap_or_else(|| with(0))
}

#[repr(C)]
struct GemmArgs {
    rows: u64,
    stride: u64,
    x: RawBatch,
    add: u64,
    out: u64,
    partials: u64,
    tickets: u64,
    n_rows: u32,
    add_stride: u32,
}

const _: () = assert!(size_of::<GemmArgs>() == 96);

/// Writes the products of all rows of `m` (`[n_rows, n_cols]`) with all tokens of `x` (`[n_tokens, n_cols]`), plus
/// `add`, to `out` (`[n_tokens, n_rows]` f32). Values to add are as long as `out`, or `[n_rows]`: a bias of every
/// token.
///
/// With `w` and `x` the row and the token, a result differs from [`crate::gemm::gemv`] in f32 arithmetic by at most
///
/// - mode `F32`: 2·10⁻⁶ · Σ|wᵢ·xᵢ|: both keep 22 bits, in two f16 each, of which three products are summed in f32;
/// - mode `Q8`: 2⁻¹⁰ · Σ|wᵢ·xᵢ|, and by about 3·10⁻⁴ of the norm of the results, root of mean square: weights, as
///   [`crate::MatrixRef::dequantize_row`] has them, and activations are rounded to f16, and products summed in f32.
///   Nothing is rounded to 8 bits: the results are nearer to those in f32 than the scalar 8-bit product is.
///
/// Weights lie within ±4094 (`F16`: any; others beyond give infinities), and lose bits below 4·10⁻⁶ (`F16`: none).
/// The order of sums depends on the shapes, the mode and the number of multiprocessors, on nothing else.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn gemm(
    stream: &Stream,
    m: RowsView<'_>,
    x: &DeviceBatch,
    add: Add<'_>,
    scratch: &mut GemmScratch,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let shape = m.rows();
    let n_tokens = x.n_tokens();
    assert_eq!(shape.n_cols, x.n_cols(), "columns of rows and activations");
    assert_eq!(out.len(), n_tokens * shape.n_rows, "rows of every token");
    stream.check(&[m.bytes().device(), x.device(), out.device()]);
    stream.check(&[scratch.tickets.device()]);
    add.check(stream);
    let (add, add_stride) = match add {
        Add::Values(bias) if bias.len() == shape.n_rows => (bias.address(), 0),
        add => (add.address(&out), shape.n_rows),
    };
    if out.is_empty() {
        return Ok(());
    }
    let division = divide(
        x.mode(),
        [shape.n_rows, shape.n_cols, n_tokens],
        scratch.n_multiprocessors,
    );
    let tile = TILES[division.place];
    let args = GemmArgs {
        rows: m.bytes().address(),
        stride: m.stride_bytes() as u64,
        x: x.raw(),
        add,
        out: out.address(),
        partials: scratch.partials.view(..).address(),
        tickets: scratch.tickets.view(..).address(),
        n_rows: shape.n_rows as u32,
        add_stride: add_stride as u32,
    };
    let grid = Grid {
        blocks: [division.n_tiles, division.n_parts],
        threads: THREADS,
        shared_bytes: tile.shared_bytes,
    };
    let function = stream.functions().prefill.gemm(shape.quant, division.place);
    // SAFETY: rows, activations and output fit (asserted); where there are parts, all blocks have room in the scratch.
    unsafe { stream.launch("launch gemm", function, grid, args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MULTIPROCESSORS: usize = 132;

    fn name(mode: ActivationMode, shape: [usize; 3]) -> (&'static str, usize) {
        let division = divide(mode, shape, MULTIPROCESSORS);
        (TILES[division.place].name, division.n_parts)
    }

    #[test]
    fn tiles_fit_the_tokens_and_keep_the_device_busy() {
        let q8 = ActivationMode::Q8;
        assert_eq!(name(q8, [8192, 8192, 1]), ("small", 4));
        assert_eq!(name(q8, [8192, 8192, 32]), ("small", 4));
        assert_eq!(name(q8, [8192, 8192, 64]), ("middle", 6));
        assert_eq!(name(q8, [8192, 8192, 512]), ("large", 1));
        assert_eq!(name(q8, [28672, 8192, 512]), ("large", 1));
        assert_eq!(name(q8, [1024, 8192, 512]), ("large", 8));
        assert_eq!(name(q8, [576, 576, 512]), ("small", 2));
        assert_eq!(name(ActivationMode::F32, [8192, 8192, 3]), ("split", 4));
    }

    #[test]
    fn parts_have_room_in_the_scratch_and_columns_to_sum() {
        for mode in [ActivationMode::F32, ActivationMode::Q8] {
            for n_rows in [1, 63, 576, 1024, 9000, 128_256] {
                for n_cols in [1, 32, 500, 4096, 28672] {
                    for n_tokens in [1, 9, 33, 65, 512, 2048] {
                        let division = divide(mode, [n_rows, n_cols, n_tokens], MULTIPROCESSORS);
                        let room = MULTIPROCESSORS * TILES[division.place].blocks;
                        assert!(
                            division.n_parts == 1 || division.n_tiles * division.n_parts <= room
                        );
                        // no tile has steps of more columns
                        assert!(division.n_parts <= n_cols.div_ceil(64));
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_take_the_shared_memory_that_every_gpu_has() {
        for tile in TILES {
            assert!(tile.shared_bytes <= 48 << 10, "{}", tile.name);
        }
    }
}
