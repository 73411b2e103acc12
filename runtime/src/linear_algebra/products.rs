//! Products of matrices on several threads.

use std::num::NonZeroUsize;

use nalgebra::{DMatrix, DMatrixView, DMatrixViewMut, Dyn, RealField};

/// Columns of a block.
const BLOCK: usize = 256;
/// Tokens that are summed in f32 before they join a sum in f64.
const F32_TOKENS: usize = 512;

/// Threads that share a fit's work.
#[derive(Debug, Clone, Copy)]
pub struct Workers {
    n_threads: NonZeroUsize,
}

impl Workers {
    /// That many threads.
    pub fn new(n_threads: NonZeroUsize) -> Self {
        Self { n_threads }
    }

    /// Calls `work` once for every item, on all threads.
    pub fn each<T: Send>(self, items: impl IntoIterator<Item = T>, work: impl Fn(T) + Sync) {
        let n_threads = self.n_threads.get();
        let mut shares: Vec<Vec<T>> = (0..n_threads).map(|_| Vec::new()).collect();
        for (i, item) in items.into_iter().enumerate() {
            shares[i % n_threads].push(item);
        }
        shares.retain(|share| !share.is_empty());
        let Some(own) = shares.pop() else { return };
        std::thread::scope(|scope| {
            for share in shares {
                scope.spawn(|| share.into_iter().for_each(&work));
            }
            own.into_iter().for_each(&work);
        });
    }
}

/// A row-major `[n_rows, n_cols]` list as a matrix.
pub(crate) fn view(values: &[f32], n_rows: usize, n_cols: usize) -> DMatrixView<'_, f32, Dyn, Dyn> {
    DMatrixView::from_slice_with_strides(values, n_rows, n_cols, n_cols.max(1), 1)
}

/// The same, transposed: `[n_cols, n_rows]`.
pub(crate) fn view_t(
    values: &[f32],
    n_rows: usize,
    n_cols: usize,
) -> DMatrixView<'_, f32, Dyn, Dyn> {
    DMatrixView::from_slice_with_strides(values, n_cols, n_rows, 1, n_cols.max(1))
}

/// A row-major `[n_rows, n_cols]` list as a matrix to write to.
pub(crate) fn view_mut(
    values: &mut [f32],
    n_rows: usize,
    n_cols: usize,
) -> DMatrixViewMut<'_, f32, Dyn, Dyn> {
    DMatrixViewMut::from_slice_with_strides_mut(values, n_rows, n_cols, n_cols.max(1), 1)
}

/// Overwrites `out` with `a · b`.
///
/// For operands of few rows or columns nalgebra takes a length in memory for a number of rows, where rows are not side by side, and
/// writes past the end (its issue 1616); so these are copied.
pub(crate) fn multiply<T: RealField + Copy>(
    out: &mut DMatrixViewMut<'_, T, Dyn, Dyn>,
    a: DMatrixView<'_, T, Dyn, Dyn>,
    b: DMatrixView<'_, T, Dyn, Dyn>,
) {
    /// At most as many as for which it has loops of its own.
    const FEW: usize = 8;
    let few = a.nrows().min(a.ncols()).min(b.ncols()) <= FEW;
    match few && a.strides().0 != 1 {
        true => out.gemm(T::one(), &a.into_owned(), &b, T::zero()),
        false => out.gemm(T::one(), &a, &b, T::zero()),
    }
}

/// `x · wᵀ`: overwrites `out` `[n, n_out]` from `x` `[n, n_in]` and `w` `[n_out, n_in]`, all row-major.
pub(crate) fn times_transposed(x: &[f32], w: &[f32], n_in: usize, out: &mut [f32]) {
    let (n, n_out) = (x.len() / n_in, w.len() / n_in);
    assert_eq!(out.len(), n * n_out, "output is [n, n_out]");
    let (x, w) = (view(x, n, n_in), view_t(w, n_out, n_in));
    multiply(&mut view_mut(out, n, n_out), x, w);
}

/// A matrix as an operand of [`product`].
pub(crate) fn whole(m: &DMatrix<f64>) -> DMatrixView<'_, f64, Dyn, Dyn> {
    DMatrixView::from_slice_with_strides(m.as_slice(), m.nrows(), m.ncols(), 1, m.nrows().max(1))
}

/// The same, transposed.
pub(crate) fn transposed(m: &DMatrix<f64>) -> DMatrixView<'_, f64, Dyn, Dyn> {
    DMatrixView::from_slice_with_strides(m.as_slice(), m.ncols(), m.nrows(), m.nrows().max(1), 1)
}

/// `a · b`.
pub(crate) fn product(
    workers: Workers,
    a: DMatrixView<'_, f64, Dyn, Dyn>,
    b: DMatrixView<'_, f64, Dyn, Dyn>,
) -> DMatrix<f64> {
    let (n_rows, n_cols) = (a.nrows(), b.ncols());
    let mut out = DMatrix::zeros(n_rows, n_cols);
    let parts = out.as_mut_slice().chunks_mut((n_rows * BLOCK).max(1));
    workers.each(parts.enumerate(), |(part, columns)| {
        let n_columns = columns.len() / n_rows;
        let mut out =
            DMatrixViewMut::from_slice_with_strides_mut(columns, n_rows, n_columns, 1, n_rows);
        multiply(&mut out, a, b.columns(part * BLOCK, n_columns));
    });
    out
}

/// Means `[n_cols]` of row-major `values` `[n, n_cols]`, summed in f64.
pub(crate) fn means(values: &[f32], n_cols: usize) -> Vec<f64> {
    let mut sums = vec![0.0; n_cols];
    for row in values.chunks_exact(n_cols) {
        for (sum, value) in sums.iter_mut().zip(row) {
            *sum += f64::from(*value);
        }
    }
    let n = (values.len() / n_cols).max(1) as f64;
    sums.iter().map(|sum| sum / n).collect()
}

/// Covariance `[n_b, n_a]` of the columns of row-major `b` `[n, n_b]` and `a` `[n, n_a]`.
pub(crate) fn covariance(workers: Workers, a: (&[f32], usize), b: (&[f32], usize)) -> DMatrix<f64> {
    let ((a, n_a), (b, n_b)) = (a, b);
    let n = a.len() / n_a;
    assert_eq!(b.len() / n_b, n, "as many tokens");
    // column-major: a block of columns is one slice
    let mut sums = DMatrix::<f64>::zeros(n_b, n_a);
    let blocks = sums.as_mut_slice().chunks_mut(n_b * BLOCK).enumerate();
    workers.each(blocks, |(block, sums)| {
        let first = block * BLOCK;
        let width = sums.len() / n_b;
        let mut part = DMatrix::<f32>::zeros(n_b, width);
        for from in (0..n).step_by(F32_TOKENS) {
            let tokens = F32_TOKENS.min(n - from);
            let own = DMatrixView::from_slice_with_strides(
                &a[from * n_a + first..],
                tokens,
                width,
                n_a,
                1,
            );
            let other = view_t(&b[from * n_b..(from + tokens) * n_b], tokens, n_b);
            multiply(&mut (&mut part).into(), other, own);
            for (sum, part) in sums.iter_mut().zip(part.iter()) {
                *sum += f64::from(*part);
            }
        }
    });
    centred(workers, &mut sums, (a, n_a), (b, n_b));
    sums
}

/// Makes covariances of sums of products `[n_b, n_a]` of the columns of `b` and `a`, as [`covariance`] has them.
pub(crate) fn centred(
    workers: Workers,
    sums: &mut DMatrix<f64>,
    a: (&[f32], usize),
    b: (&[f32], usize),
) {
    let ((a, n_a), (b, n_b)) = (a, b);
    let n = (a.len() / n_a) as f64;
    let (mean_a, mean_b) = (means(a, n_a), means(b, n_b));
    let blocks = sums.as_mut_slice().chunks_mut(n_b * BLOCK);
    workers.each(blocks.zip(mean_a.chunks(BLOCK)), |(sums, mean_a)| {
        for (column, mean_a) in sums.chunks_mut(n_b).zip(mean_a) {
            for (sum, mean) in column.iter_mut().zip(&mean_b) {
                *sum = *sum / n - mean_a * mean;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let mut rng = crate::sampler::Mt19937::new(seed);
        (0..n).map(|_| rng.next_f64() as f32 - 0.3).collect()
    }

    #[test]
    fn products_of_few_rows_or_columns_stay_in_their_places() {
        for (n, n_in, n_out) in [(1, 7, 3), (2, 40, 40), (5, 40, 3), (40, 2, 40), (40, 9, 5)] {
            let (x, w) = (values(n * n_in, 1), values(n_out * n_in, 2));
            let mut out = vec![7.0; n * n_out + 300];
            times_transposed(&x, &w, n_in, &mut out[..n * n_out]);
            for (at, value) in out[..n * n_out].iter().enumerate() {
                let (row, column) = (&x[at / n_out * n_in..], &w[at % n_out * n_in..]);
                let want: f32 = row.iter().zip(column).take(n_in).map(|(x, w)| x * w).sum();
                assert!((value - want).abs() < 1e-5, "{value} against {want}");
            }
            assert!(out[n * n_out..].iter().all(|value| *value == 7.0));
        }
    }

    #[test]
    fn covariance_is_the_definition_s_for_any_number_of_threads() {
        let (n, n_a, n_b) = (700, 130, 9);
        let (a, b) = (values(n * n_a, 1), values(n * n_b, 2));
        let one = covariance(Workers::new(NonZeroUsize::MIN), (&a, n_a), (&b, n_b));
        for n_threads in [2, 3, 7] {
            let workers = Workers::new(NonZeroUsize::new(n_threads).unwrap());
            assert_eq!(covariance(workers, (&a, n_a), (&b, n_b)), one);
        }
        assert_eq!(one.shape(), (n_b, n_a));
        for (i, j) in [(0, 0), (129, 8), (64, 3)] {
            let column = |values: &[f32], n_cols: usize, c: usize| -> Vec<f64> {
                values
                    .iter()
                    .skip(c)
                    .step_by(n_cols)
                    .map(|v| f64::from(*v))
                    .collect()
            };
            let (x, y) = (column(&a, n_a, i), column(&b, n_b, j));
            let (mx, my) = (
                x.iter().sum::<f64>() / n as f64,
                y.iter().sum::<f64>() / n as f64,
            );
            let want = x
                .iter()
                .zip(&y)
                .map(|(x, y)| (x - mx) * (y - my))
                .sum::<f64>()
                / n as f64;
            assert!(
                (one[(j, i)] - want).abs() < 1e-5,
                "{} against {want}",
                one[(j, i)]
            );
        }
    }
}
