//! The embedding of one token.

use super::buffer::{View, ViewMut};
use super::layout::RowsView;
use super::stream::{Grid, Stream};
use crate::error::KernelError;

#[repr(C)]
struct EmbedArgs {
    rows: u64,
    stride: u64,
    token: u64,
    n_rows: u32,
    n_cols: u32,
    out: u64,
}

const _: () = assert!(size_of::<EmbedArgs>() == 40);

/// Writes the real values of row `token[0]` of `rows` to `out` (`[n_cols]` f32, overwritten). The bits are those of
/// [`crate::MatrixRef::dequantize_row`]. A token that does not exist gives NaN.
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn embed(
    stream: &Stream,
    rows: RowsView<'_>,
    token: View<'_, u32>,
    out: ViewMut<'_, f32>,
) -> Result<(), KernelError> {
    let shape = rows.rows();
    assert_eq!(token.len(), 1, "one token");
    assert_eq!(out.len(), shape.n_cols, "columns");
    stream.check(&[rows.bytes().device(), token.device(), out.device()]);
    let args = EmbedArgs {
        rows: rows.bytes().address(),
        stride: rows.stride_bytes() as u64,
        token: token.address(),
        n_rows: shape.n_rows as u32,
        n_cols: shape.n_cols as u32,
        out: out.address(),
    };
    let grid = Grid {
        blocks: [shape.n_cols.div_ceil(1024).max(1), 1],
        threads: 128,
        shared_bytes: 0,
    };
    // SAFETY: rows and output fit (asserted).
    unsafe {
        stream.launch(
            "launch embed",
            stream.functions().embed(shape.quant),
            grid,
            args,
        )
    }
}
