//! Products of rows and several tokens.

use pi_kernels::cuda::{Add, DeviceBatch, GemmScratch, SUPPORTED, gemm, prepare_batch};
use pi_kernels::{ActBatch, ActivationMode, QuantType};

use crate::common::{
    MODES, Random, Rows, assert_near, bits, column_counts, device, magnitude, scalar,
};

/// Of Σ|wᵢ·xᵢ|, as the launcher's docs have it.
fn tolerance(mode: ActivationMode) -> f64 {
    match mode {
        ActivationMode::F32 => 2e-6,
        ActivationMode::Q8 => 1.0 / 1024.0,
    }
}

/// Of the norm of the results, root of mean square.
fn rms_tolerance(mode: ActivationMode) -> f64 {
    match mode {
        ActivationMode::F32 => 1e-6,
        ActivationMode::Q8 => 5e-4,
    }
}

/// The scalar products of rows with a token in f32 arithmetic.
fn products(m: &Rows, x: &[f32]) -> Vec<f32> {
    let mut host = ActBatch::new(ActivationMode::F32, x.len(), 1);
    host.set(scalar(ActivationMode::F32), 0, x);
    let mut out = vec![0.0; m.shape.n_rows];
    let rows = 0..m.shape.n_rows;
    let cpu = scalar(ActivationMode::F32);
    pi_kernels::gemm::gemv(cpu, m.matrix(), host.token(0), rows, &mut out);
    out
}

/// Compares with the scalar products of `checked` tokens, for the first so many tokens each.
fn check(quant: QuantType, n_rows: usize, n_cols: usize, counts: &[usize], checked: &[usize]) {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut scratch = GemmScratch::new(&device).unwrap();
    let m = Rows::random(&device, 7, quant, n_rows, n_cols);
    let n_tokens_max = *counts.iter().max().unwrap();
    let values = Random(11).activations(n_tokens_max * n_cols);
    let token = |t: usize| &values[t * n_cols..(t + 1) * n_cols];
    let want: Vec<_> = checked.iter().map(|&t| products(&m, token(t))).collect();
    let rows: Vec<_> = (0..n_rows).map(|row| m.values(row)).collect();
    for mode in MODES {
        let mut x = DeviceBatch::new(&device, mode, n_tokens_max, n_cols).unwrap();
        for &n_tokens in counts {
            let what = format!("{quant} [{n_rows}, {n_cols}] {mode}, {n_tokens} tokens");
            let on_device = device.upload(&values[..n_tokens * n_cols]).unwrap();
            prepare_batch(&stream, on_device.view(..), &mut x).unwrap();
            let mut out = device.upload(&vec![f32::NAN; n_tokens * n_rows]).unwrap();
            let mut first = None;
            for _ in 0..2 {
                let (scratch, out) = (&mut scratch, &mut out);
                gemm(&stream, m.view(), &x, Add::None, scratch, out.view_mut(..)).unwrap();
                stream.synchronize().unwrap();
                let got = out.read().unwrap();
                assert_eq!(
                    bits(first.get_or_insert(got.clone())),
                    bits(&got),
                    "{what}: again"
                );
            }
            let got = first.unwrap();
            assert!(got.iter().all(|v| v.is_finite()), "{what}: all is written");
            let (mut error, mut norm) = (0.0, 0.0);
            for (&t, want) in checked.iter().zip(&want).filter(|(t, _)| **t < n_tokens) {
                for row in 0..n_rows {
                    let got = got[t * n_rows + row];
                    let bound = tolerance(mode) * magnitude(&rows[row], token(t)) + 1e-12;
                    assert_near(got, want[row], bound, &format!("{what}: {t}, row {row}"));
                    error += (f64::from(got) - f64::from(want[row])).powi(2);
                    norm += f64::from(want[row]).powi(2);
                }
            }
            // few results can cancel out together
            if n_rows * n_tokens > 500 && n_cols > 100 {
                let relative = (error / norm).sqrt();
                assert!(relative <= rms_tolerance(mode), "{what}: {relative:e}");
            }
        }
    }
}

#[test]
fn products_of_odd_shapes_are_near_the_scalar_ones() {
    for quant in SUPPORTED {
        for n_cols in column_counts(quant) {
            check(quant, 37, n_cols, &[1, 8, 33, 70], &[0, 7, 32, 65, 69]);
        }
        check(quant, 1, 1024, &[1, 5], &[0, 4]);
    }
}

/// Several tiles of every size, and sums in parts.
#[test]
fn products_of_many_tiles_are_near_the_scalar_ones() {
    for quant in SUPPORTED {
        check(quant, 5601, 1536, &[20, 40, 130], &[0, 19, 39, 64, 128]);
    }
}

#[test]
fn what_is_added_is_added_once() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut scratch = GemmScratch::new(&device).unwrap();
    let (n_rows, n_cols, n_tokens) = (77, 2048, 35);
    let m = Rows::random(&device, 5, QuantType::Q4_0, n_rows, n_cols);
    let mut random = Random(3);
    let x = device
        .upload(&random.activations(n_tokens * n_cols))
        .unwrap();
    let (bias, residual) = (random.floats(n_rows), random.floats(n_tokens * n_rows));
    let on_device = |values: &[f32]| device.upload(values).unwrap();
    let (bias_there, residual_there) = (on_device(&bias), on_device(&residual));
    for mode in MODES {
        let mut batch = DeviceBatch::new(&device, mode, n_tokens, n_cols).unwrap();
        prepare_batch(&stream, x.view(..), &mut batch).unwrap();
        let mut out = on_device(&vec![f32::NAN; n_tokens * n_rows]);
        let mut run = |add: Add<'_>| {
            gemm(
                &stream,
                m.view(),
                &batch,
                add,
                &mut scratch,
                out.view_mut(..),
            )
            .unwrap();
            stream.synchronize().unwrap();
            out.read().unwrap()
        };
        let plain = run(Add::None);
        let with_bias = run(Add::Values(bias_there.view(..)));
        let with_residual = run(Add::Values(residual_there.view(..)));
        let twice = run(Add::Out);
        for (i, plain) in plain.iter().enumerate() {
            let same = |got: f32, want: f32| assert_eq!(got.to_bits(), want.to_bits(), "{i}");
            same(with_bias[i], bias[i % n_rows] + plain);
            same(with_residual[i], residual[i] + plain);
            same(twice[i], with_residual[i] + plain);
        }
    }
}

#[test]
fn what_is_not_finite_stays_with_its_token() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut scratch = GemmScratch::new(&device).unwrap();
    let (n_rows, n_cols, n_tokens) = (40, 576, 6);
    let m = Rows::random(&device, 5, QuantType::Q8_0, n_rows, n_cols);
    let mut values = Random(3).activations(n_tokens * n_cols);
    let clean = values.clone();
    values[n_cols + 5] = f32::NAN;
    values[3 * n_cols + 575] = f32::INFINITY;
    for mode in MODES {
        let mut run = |values: &[f32]| {
            let x = device.upload(values).unwrap();
            let mut batch = DeviceBatch::new(&device, mode, n_tokens, n_cols).unwrap();
            prepare_batch(&stream, x.view(..), &mut batch).unwrap();
            let mut out = device.upload(&vec![0.0f32; n_tokens * n_rows]).unwrap();
            let out_view = out.view_mut(..);
            gemm(&stream, m.view(), &batch, Add::None, &mut scratch, out_view).unwrap();
            stream.synchronize().unwrap();
            out.read().unwrap()
        };
        let (got, want) = (run(&values), run(&clean));
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            match i / n_rows {
                1 => assert!(got.is_nan(), "{mode} {i}: {got}"),
                3 => assert!(!got.is_finite(), "{mode} {i}: {got}"),
                _ => assert_eq!(got.to_bits(), want.to_bits(), "{mode} {i}"),
            }
        }
    }
}
