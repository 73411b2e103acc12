//! Cholesky's factor of a wide matrix, in blocks.

use nalgebra::{Cholesky, DMatrix};

use super::products::Workers;

/// Rows and columns of a block.
const BLOCK: usize = 128;
/// Columns that one thread changes at a time.
const COLUMNS: usize = 64;

/// `L`, lower triangular, with `L·Lᵀ` a symmetric positive matrix.
#[derive(Debug)]
pub(crate) struct Lower {
    /// `[n, n]`; what is above the diagonal is not used.
    factor: DMatrix<f64>,
}

impl Lower {
    /// The factor of `matrix` `[n, n]`, of which the lower half is read; none if it is not positive.
    ///
    /// Source: Golub and Van Loan, "Matrix Computations", algorithm 4.2.1 in blocks (right-looking).
    pub fn new(workers: Workers, mut matrix: DMatrix<f64>) -> Option<Self> {
        let n = matrix.nrows();
        for first in (0..n).step_by(BLOCK) {
            let end = (first + BLOCK).min(n);
            let width = end - first;
            let diagonal = matrix.view((first, first), (width, width)).into_owned();
            let diagonal = Cholesky::new(diagonal)?.unpack();
            matrix
                .view_mut((first, first), (width, width))
                .copy_from(&diagonal);
            // rows below, as columns: L · panelᵀ = what is there
            let mut panel = matrix.view((end, first), (n - end, width)).transpose();
            let parts = panel.as_mut_slice().chunks_mut(width * COLUMNS);
            workers.each(parts, |part| {
                let mut part =
                    nalgebra::DMatrixViewMut::from_slice(part, width, part.len() / width);
                diagonal.solve_lower_triangular_mut(&mut part);
            });
            matrix
                .view_mut((end, first), (n - end, width))
                .copy_from(&panel.transpose());
            let columns = matrix.as_mut_slice()[end * n..].chunks_mut(n * COLUMNS);
            workers.each(columns.enumerate(), |(part, columns)| {
                let from = part * COLUMNS;
                let n_columns = columns.len() / n;
                let mut rest = nalgebra::DMatrixViewMut::from_slice(columns, n, n_columns);
                let own = panel.columns(from, n_columns);
                let below = panel.columns(from, n - end - from);
                rest.rows_mut(end + from, n - end - from)
                    .gemm_tr(-1.0, &below, &own, 1.0);
            });
        }
        Some(Self { factor: matrix })
    }

    /// Turns `rows` `[k, n]` into `rows · L⁻¹`.
    pub fn solve(&self, workers: Workers, rows: &mut DMatrix<f64>) {
        let n = self.factor.nrows();
        assert_eq!(rows.ncols(), n, "as many columns");
        for first in (0..n).step_by(BLOCK).rev() {
            let width = BLOCK.min(n - first);
            let diagonal = self.factor.view((first, first), (width, width));
            let mut own = rows.columns(first, width).transpose();
            diagonal.tr_solve_lower_triangular_mut(&mut own);
            let own = own.transpose();
            rows.columns_mut(first, width).copy_from(&own);
            let k = rows.nrows();
            let before = rows.as_mut_slice()[..first * k].chunks_mut(k * COLUMNS);
            workers.each(before.enumerate(), |(part, columns)| {
                let n_columns = columns.len() / k;
                let mut rest = nalgebra::DMatrixViewMut::from_slice(columns, k, n_columns);
                let factor = self
                    .factor
                    .view((first, part * COLUMNS), (width, n_columns));
                rest.gemm(-1.0, &own, &factor, 1.0);
            });
        }
    }

    /// Turns `rows` `[k, n]` into `rows · L⁻ᵀ`.
    pub fn solve_transposed(&self, workers: Workers, rows: &mut DMatrix<f64>) {
        let n = self.factor.nrows();
        assert_eq!(rows.ncols(), n, "as many columns");
        for first in (0..n).step_by(BLOCK) {
            let end = (first + BLOCK).min(n);
            let diagonal = self.factor.view((first, first), (end - first, end - first));
            let mut own = rows.columns(first, end - first).transpose();
            diagonal.solve_lower_triangular_mut(&mut own);
            let own = own.transpose();
            rows.columns_mut(first, end - first).copy_from(&own);
            let k = rows.nrows();
            let behind = rows.as_mut_slice()[end * k..].chunks_mut(k * COLUMNS);
            workers.each(behind.enumerate(), |(part, columns)| {
                let n_columns = columns.len() / k;
                let mut rest = nalgebra::DMatrixViewMut::from_slice(columns, k, n_columns);
                let factor = self
                    .factor
                    .view((end + part * COLUMNS, first), (n_columns, end - first));
                rest.gemm(-1.0, &own, &factor.transpose(), 1.0);
            });
        }
    }

    /// `L` itself, `[n, n]`, with zeros above the diagonal.
    pub fn into_matrix(mut self) -> DMatrix<f64> {
        self.factor.fill_upper_triangle(0.0, 1);
        self.factor
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::super::products::{product, transposed, whole};
    use super::*;
    use crate::sampler::Mt19937;

    fn random(n_rows: usize, n_cols: usize, seed: u32) -> DMatrix<f64> {
        let mut rng = Mt19937::new(seed);
        DMatrix::from_fn(n_rows, n_cols, |_, _| rng.next_f64() - 0.5)
    }

    #[test]
    fn factors_and_solutions_are_the_library_s_for_any_number_of_threads() {
        for n in [1, 5, 128, 129, 300] {
            let m = random(n, n + 20, 1);
            let matrix = &m * m.transpose() + DMatrix::identity(n, n) * 0.1;
            let want = Cholesky::new(matrix.clone()).unwrap().unpack();
            let rows = random(7, n, 2);
            let mut first = None;
            for n_threads in [1, 2, 5] {
                let workers = Workers::new(NonZeroUsize::new(n_threads).unwrap());
                let lower = Lower::new(workers, matrix.clone()).unwrap();
                let mut solved = rows.clone();
                lower.solve(workers, &mut solved);
                let mut transposed_solved = rows.clone();
                lower.solve_transposed(workers, &mut transposed_solved);
                let factor = lower.into_matrix();
                assert!((&factor - &want).abs().max() < 1e-9, "{n}");
                assert!((&solved * &want - &rows).abs().max() < 1e-9, "{n}");
                let back = product(workers, whole(&transposed_solved), transposed(&want));
                assert!((back - &rows).abs().max() < 1e-9, "{n}");
                let got = (factor, solved, transposed_solved);
                assert_eq!(first.get_or_insert(got.clone()), &got, "{n}");
            }
        }
    }

    #[test]
    fn what_is_not_positive_has_none() {
        let workers = Workers::new(NonZeroUsize::MIN);
        let mut matrix = DMatrix::identity(200, 200);
        matrix[(180, 180)] = -1.0;
        assert!(Lower::new(workers, matrix.clone()).is_none());
        matrix[(180, 180)] = f64::NAN;
        assert!(Lower::new(workers, matrix).is_none());
    }
}
