//! What predictors are fitted with, against loops in f64.

use pi_kernels::cuda::fit::{
    AdamStep, Join, LossOf, Matrix, Parameters, column_sums, double_product, join_slices,
    long_product, n_slices, product_slices, scaled_rows, score_errors,
};
use pi_kernels::cuda::{Plain, View};

use crate::common::{Random, device};

/// Relative to the sum of magnitudes.
fn assert_near(found: f64, expected: f64, magnitude: f64, what: &str) {
    let error = (found - expected).abs();
    assert!(
        error <= 2e-6 * magnitude + 1e-12,
        "{what}: {found}, not {expected}"
    );
}

/// An `[n_rows, n_cols]` matrix that may lie with its columns one after the other.
fn matrix<V: Plain>(
    values: View<'_, V>,
    (n_rows, n_cols): (usize, usize),
    turned: bool,
) -> Matrix<'_, V> {
    match turned {
        false => Matrix::new(values, n_rows, n_cols),
        true => Matrix::new(values, n_cols, n_rows).turned(),
    }
}

/// Value `(i, k)` of an `[n_rows, n_cols]` matrix that may lie with its columns one after the other.
fn at(values: &[f32], (n_rows, n_cols): (usize, usize), turned: bool, i: usize, k: usize) -> f64 {
    f64::from(match turned {
        false => values[i * n_cols + k],
        true => values[k * n_rows + i],
    })
}

#[test]
fn products_are_their_definition_s_in_any_layout() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(11);
    let shapes = [
        (1, 1, 1),
        (64, 64, 16),
        (65, 63, 17),
        (256, 64, 700),
        (3, 200, 1025),
        (130, 70, 512),
    ];
    for (m, n, k) in shapes {
        let (a, b) = (random.floats(m * k), random.floats(n * k));
        let (on_a, on_b) = (device.upload(&a).unwrap(), device.upload(&b).unwrap());
        let doubles = |values: &[f32]| {
            let values: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
            device.upload(&values).unwrap()
        };
        let (doubles_a, doubles_b) = (doubles(&a), doubles(&b));
        for (a_turned, b_turned) in [(false, false), (true, false), (false, true), (true, true)] {
            let x = matrix(on_a.view(..), (m, k), a_turned);
            let y = matrix(on_b.view(..), (n, k), b_turned);
            let mut slices = device.upload(&vec![f32::NAN; n_slices(k) * m * n]).unwrap();
            let mut long = device.upload(&vec![f64::NAN; m * n]).unwrap();
            product_slices(&stream, x, y, slices.view_mut(..)).unwrap();
            long_product(&stream, x, y, long.view_mut(..)).unwrap();
            let x = matrix(doubles_a.view(..), (m, k), a_turned);
            let y = matrix(doubles_b.view(..), (n, k), b_turned);
            let mut double = device.upload(&vec![f64::NAN; m * n]).unwrap();
            double_product(&stream, x, y, double.view_mut(..)).unwrap();
            stream.synchronize().unwrap();
            let (slices, long) = (slices.read().unwrap(), long.read().unwrap());
            let double = double.read().unwrap();
            for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
                let mut all = (0.0, 0.0);
                for slice in 0..n_slices(k) {
                    let columns = slice * 512..k.min((slice + 1) * 512);
                    let products = columns.map(|k_at| {
                        at(&a, (m, k), a_turned, i, k_at) * at(&b, (n, k), b_turned, j, k_at)
                    });
                    let (sum, size) = products.fold((0.0, 0.0), |(sum, size), product: f64| {
                        (sum + product, size + product.abs())
                    });
                    let found = f64::from(slices[(slice * m + i) * n + j]);
                    assert_near(found, sum, size, "a slice");
                    all = (all.0 + sum, all.1 + size);
                }
                assert_near(long[i * n + j], all.0, all.1, "a sum of slices");
                let error = (double[i * n + j] - all.0).abs();
                assert!(
                    error <= 1e-13 * all.1,
                    "in f64: {} not {}",
                    double[i * n + j],
                    all.0
                );
            }
        }
    }
}

#[test]
fn rows_are_taken_and_scaled() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(12);
    for (n_from, n_rows, n_columns) in [(5, 9, 1), (100, 30, 257), (3, 3, 4096)] {
        let (from, scales) = (random.floats(n_from * n_columns), random.floats(n_columns));
        let mut ids: Vec<u32> = (0..n_rows).map(|_| random.below(n_from) as u32).collect();
        ids[1] = n_from as u32;
        let [on_from, on_scales] = [&from, &scales].map(|values| device.upload(values).unwrap());
        let on_ids = device.upload(&ids).unwrap();
        let mut out = device.alloc::<f32>(n_rows * n_columns).unwrap();
        let (ids_view, to) = (on_ids.view(..), out.view_mut(..));
        scaled_rows(&stream, on_from.view(..), ids_view, on_scales.view(..), to).unwrap();
        stream.synchronize().unwrap();
        for (row, id) in out.read().unwrap().chunks(n_columns).zip(&ids) {
            for (column, found) in row.iter().enumerate() {
                match from.get(*id as usize * n_columns + column) {
                    Some(value) => assert_eq!(*found, value * scales[column]),
                    None => assert!(found.is_nan(), "no such row"),
                }
            }
        }
    }
}

#[test]
fn slices_are_joined_in_their_order() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(13);
    for (n_slices, n_rows, n_columns) in [(1, 1, 1), (3, 7, 65), (22, 256, 64)] {
        let n = n_rows * n_columns;
        let slices = random.floats(n_slices * n);
        let (biases, forward) = (random.floats(n_columns), random.floats(n));
        let sum = |i: usize| (0..n_slices).fold(0.0, |sum, slice| sum + slices[slice * n + i]);
        let [on_slices, on_biases, on_forward] =
            [&slices, &biases, &forward].map(|values| device.upload(values).unwrap());
        let mut out = device.alloc::<f32>(n).unwrap();
        let hows = [
            Join::Forward(on_biases.view(..)),
            Join::Backward(on_forward.view(..)),
        ];
        for how in hows {
            join_slices(
                &stream,
                on_slices.view(..),
                how,
                n_columns,
                out.view_mut(..),
            )
            .unwrap();
            stream.synchronize().unwrap();
            for (i, found) in out.read().unwrap().into_iter().enumerate() {
                let expected = match how {
                    Join::Forward(_) => (sum(i) + biases[i % n_columns]).max(0.0),
                    Join::Backward(_) if forward[i] > 0.0 => sum(i),
                    Join::Backward(_) => 0.0,
                };
                assert_eq!(found, expected, "{how:?} {i}");
            }
        }
    }
}

#[test]
fn errors_are_the_loss_s_derivative() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(14);
    let (n_tokens, n_rows, n_columns, unit, most) = (40, 33, 300, 0.05, 30.0);
    let scores: Vec<f32> = (0..n_rows * n_columns)
        .map(|_| 30.0 * random.float())
        .collect();
    let biases = random.floats(n_columns);
    let masses: Vec<f32> = (0..n_tokens * n_columns)
        .map(|_| (3.0 * random.float()).max(0.0))
        .collect();
    let ids: Vec<u32> = (0..n_rows).map(|_| random.below(n_tokens) as u32).collect();
    let [mut on_scores, on_biases, on_masses] =
        [&scores, &biases, &masses].map(|values| device.upload(values).unwrap());
    let on_ids = device.upload(&ids).unwrap();
    let loss = LossOf {
        masses: on_masses.view(..),
        ids: on_ids.view(..),
        unit,
        most,
    };
    score_errors(&stream, on_scores.view_mut(..), on_biases.view(..), loss).unwrap();
    let mut sums = device.alloc::<f32>(n_columns).unwrap();
    column_sums(&stream, on_scores.view(..), sums.view_mut(..)).unwrap();
    stream.synchronize().unwrap();
    let (found, sums) = (on_scores.read().unwrap(), sums.read().unwrap());
    let mut expected_sums = vec![0.0f64; n_columns];
    for (place, found) in found.iter().enumerate() {
        let (row, column) = (place / n_columns, place % n_columns);
        let score = f64::from(scores[place] + biases[column]);
        let mass = masses[ids[row] as usize * n_columns + column];
        let weight = f64::from((mass / unit).min(most));
        // by the definition of the loss, on both sides of the score
        let softplus = |s: f64| s.max(0.0) + (-s.abs()).exp().ln_1p();
        let loss = |s: f64| (weight * softplus(-s) + softplus(s)) / n_rows as f64;
        let step = 1e-4;
        let slope = (loss(score + step) - loss(score - step)) / (2.0 * step);
        let error = (f64::from(*found) - slope).abs();
        assert!(error < 1e-5, "{place}: {found}, not {slope}");
        expected_sums[column] += f64::from(*found);
    }
    for (found, expected) in sums.iter().zip(expected_sums) {
        assert!(
            (f64::from(*found) - expected).abs() < 1e-5,
            "{found}, not {expected}"
        );
    }
}

#[test]
fn adam_s_steps_are_its_definition_s() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(15);
    let n = 1000;
    let start = random.floats(n);
    let mut parameters = Parameters::new(&device, &start).unwrap();
    let (mut values, mut mean, mut square) = (
        start.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(),
        vec![0.0f64; n],
        vec![0.0f64; n],
    );
    for step in 1..=5 {
        let gradient = random.floats(n);
        let unbias = [0.9f32, 0.99].map(|decay| 1.0 / (1.0 - decay.powi(step)));
        let step = AdamStep {
            rate: 1e-2,
            decay: [0.9, 0.99],
            unbias,
        };
        let on_device = device.upload(&gradient).unwrap();
        parameters
            .update(&stream, on_device.view(..), step)
            .unwrap();
        stream.synchronize().unwrap();
        for (i, gradient) in gradient.into_iter().map(f64::from).enumerate() {
            mean[i] += 0.1 * (gradient - mean[i]);
            square[i] += 0.01 * (gradient * gradient - square[i]);
            let [mean, square] = [mean[i], square[i]];
            let size = (square * f64::from(unbias[1])).sqrt();
            values[i] -= 1e-2 * mean * f64::from(unbias[0]) / (size + 1e-8);
        }
    }
    let found = parameters.values().read().unwrap();
    for (found, expected) in found.iter().zip(values) {
        assert!(
            (f64::from(*found) - expected).abs() < 1e-5,
            "{found}, not {expected}"
        );
    }
}
