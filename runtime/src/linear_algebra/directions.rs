//! Leading eigenvectors by subspace iteration.

use nalgebra::DMatrix;

use super::products::{Workers, product, transposed, whole};
use crate::sampler::Mt19937;

/// Directions tracked beside those asked for.
const OVERSAMPLED: usize = 16;
/// Directions that are made orthogonal at a time.
const BLOCK: usize = 32;
/// Products up to which all are at once, on one thread.
const AT_ONCE: usize = 1 << 27;

/// Rows that [`leading_directions`] multiplies at a time.
pub(crate) fn n_tracked(n: usize, n_directions: usize) -> usize {
    (n_directions + OVERSAMPLED).min(n)
}

/// Leading eigenvectors of a symmetric operator without negative eigenvalues, as rows `[n_directions, n]`, orthonormal, strongest first.
///
/// `apply` multiplies rows `[k, n]` with the operator. `seed` says where the search begins; `n_passes` how often it is applied, each of
/// which squares the lead of strong directions.
///
/// Source: Halko, Martinsson and Tropp 2011, "Finding structure with randomness", algorithm 4.4.
pub(crate) fn leading_directions(
    workers: Workers,
    n: usize,
    n_directions: usize,
    n_passes: usize,
    seed: u32,
    mut apply: impl FnMut(&DMatrix<f64>) -> DMatrix<f64>,
) -> DMatrix<f64> {
    let n_directions = n_directions.min(n);
    let tracked = n_tracked(n, n_directions);
    let mut rng = Mt19937::new(seed);
    let start = DMatrix::from_fn(n, tracked, |_, _| rng.next_f64() - 0.5);
    let mut basis = orthonormal(workers, start.transpose());
    for _ in 0..n_passes {
        basis = orthonormal(workers, apply(&basis));
    }
    let applied = apply(&basis);
    let inner = product(workers, whole(&basis), transposed(&applied));
    let eigen = inner.symmetric_eigen();
    let mut order: Vec<usize> = (0..tracked).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
    let vectors = eigen.eigenvectors.select_columns(&order[..n_directions]);
    product(workers, transposed(&vectors), whole(&basis))
}

/// An orthonormal basis, as rows, of the space that `rows` `[k, n]` span.
fn orthonormal(workers: Workers, rows: DMatrix<f64>) -> DMatrix<f64> {
    let (k, n) = rows.shape();
    match n * k * k <= AT_ONCE {
        true => rows.transpose().qr().q().transpose(),
        false => orthonormal_in_blocks(workers, &rows),
    }
}

/// The same: block after block is freed of those before it, twice, as once leaves rounding errors behind.
fn orthonormal_in_blocks(workers: Workers, rows: &DMatrix<f64>) -> DMatrix<f64> {
    let (k, n) = rows.shape();
    let mut basis = DMatrix::zeros(k, n);
    for first in (0..k).step_by(BLOCK) {
        let width = BLOCK.min(k - first);
        let mut block = rows.rows(first, width).into_owned();
        if first > 0 {
            let before = basis.rows(0, first).into_owned();
            for _ in 0..2 {
                let along = product(workers, whole(&block), transposed(&before));
                block -= product(workers, whole(&along), whole(&before));
            }
        }
        let block = block.transpose().qr().q();
        basis.rows_mut(first, width).copy_from(&block.transpose());
    }
    basis
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn the_strongest_directions_are_found() {
        // eigenvalues 1/1, 1/2, 1/3, … along turned axes
        let n = 96;
        let mut random = Mt19937::new(9);
        let turn = DMatrix::from_fn(n, n, |_, _| random.next_f64() - 0.5)
            .qr()
            .q();
        let values = DMatrix::from_fn(n, n, |i, j| if i == j { 1.0 / (i + 1) as f64 } else { 0.0 });
        let matrix = &turn * values * turn.transpose();
        let find = |n_threads: usize| {
            let workers = Workers::new(NonZeroUsize::new(n_threads).unwrap());
            leading_directions(workers, n, 32, 12, 5, |rows| rows * &matrix)
        };
        let found = find(1);
        assert_eq!(found, find(3));
        let gram = &found * found.transpose();
        assert!((gram - DMatrix::identity(32, 32)).abs().max() < 1e-9);
        for i in 0..16 {
            let along = found.row(i).transpose().dot(&turn.column(i)).abs();
            assert!(along > 0.98, "direction {i}: {along}");
        }
    }

    #[test]
    fn directions_are_the_eigenvectors() {
        let mut random = Mt19937::new(5);
        let m = DMatrix::from_fn(40, 40, |_, _| random.next_f64() - 0.5);
        let gram = &m * m.transpose();
        let workers = Workers::new(NonZeroUsize::MIN);
        let found = leading_directions(workers, 40, 5, 10, 1, |rows| rows * &gram);
        let mut values: Vec<f64> = gram
            .clone()
            .symmetric_eigen()
            .eigenvalues
            .iter()
            .copied()
            .collect();
        values.sort_by(|a, b| b.total_cmp(a));
        for (k, value) in values[..5].iter().enumerate() {
            let v = found.row(k);
            let quotient = (v * &gram * v.transpose())[(0, 0)];
            assert!(
                (quotient / value - 1.0).abs() < 1e-3,
                "{quotient} against {value}"
            );
        }
    }

    #[test]
    fn rows_that_are_nearly_the_same_become_orthonormal() {
        let (k, n) = (70, 300);
        let mut random = Mt19937::new(4);
        let common: Vec<f64> = (0..n).map(|_| random.next_f64() - 0.5).collect();
        let rows = DMatrix::from_fn(k, n, |_, j| common[j] + 1e-7 * (random.next_f64() - 0.5));
        let basis = orthonormal_in_blocks(Workers::new(NonZeroUsize::MIN), &rows);
        let gram = &basis * basis.transpose();
        assert!((gram - DMatrix::identity(k, k)).abs().max() < 1e-9);
    }
}
