//! Activations of several tokens.

use pi_kernels::ActivationMode;
use pi_kernels::cuda::{DeviceBatch, Gates, gate_up_batch, prepare_batch, rms_norm_batch};

use crate::common::{MODES, Random, assert_near, device, scalar};

const N_COLS: [usize; 5] = [1, 31, 576, 1000, 20_000];
const N_TOKENS: usize = 5;

/// How far a value may be from `want`, in a token whose largest value is `largest`.
fn bound(mode: ActivationMode, want: f32, largest: f32) -> f64 {
    let (relative, absolute) = match mode {
        ActivationMode::F32 => (2f64.powi(-21), 2f64.powi(-38)),
        ActivationMode::Q8 => (2f64.powi(-11), 2f64.powi(-38)),
    };
    relative * f64::from(want.abs()) + absolute * f64::from(largest)
}

fn check(batch: &DeviceBatch, want: &[f32], extra: f64, what: &str) {
    let got = batch.read().unwrap();
    assert_eq!(got.len(), want.len(), "{what}");
    let n_cols = batch.n_cols();
    for (t, (got, want)) in got.chunks(n_cols).zip(want.chunks(n_cols)).enumerate() {
        let largest = want.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        for (got, want) in got.iter().zip(want) {
            let bound = bound(batch.mode(), *want, largest) + extra * f64::from(want.abs());
            assert_near(*got, *want, bound, &format!("{what} token {t}"));
        }
    }
}

#[test]
fn values_of_any_size_keep_their_bits() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n_cols in N_COLS {
        for mode in MODES {
            let mut batch = DeviceBatch::new(&device, mode, N_TOKENS + 2, n_cols).unwrap();
            let mut values = Random(n_cols as u64).activations(N_TOKENS * n_cols);
            // tokens with very small, very large and no values
            for (t, token) in values.chunks_mut(n_cols).enumerate() {
                let by = [1.0, 1e-25, 1e25, 0.0, 65504.0][t];
                token.iter_mut().for_each(|v| *v *= by);
            }
            let x = device.upload(&values).unwrap();
            prepare_batch(&stream, x.view(..), &mut batch).unwrap();
            stream.synchronize().unwrap();
            assert_eq!(batch.n_tokens(), N_TOKENS);
            check(&batch, &values, 0.0, &format!("{n_cols} {mode}"));
        }
    }
}

#[test]
fn norms_are_near_the_scalar_ones() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let cpu = scalar(ActivationMode::F32);
    for n_cols in N_COLS {
        let mut random = Random(n_cols as u64);
        let (x, weight) = (random.activations(N_TOKENS * n_cols), random.floats(n_cols));
        let mut want = vec![0.0; x.len()];
        for (x, want) in x.chunks(n_cols).zip(want.chunks_mut(n_cols)) {
            pi_kernels::norm::rms_norm(cpu, x, &weight, 1e-5, want);
        }
        let (x, weight) = (device.upload(&x).unwrap(), device.upload(&weight).unwrap());
        for mode in MODES {
            let mut batch = DeviceBatch::new(&device, mode, N_TOKENS, n_cols).unwrap();
            let mut values = device.upload(&vec![f32::NAN; want.len()]).unwrap();
            let to = Some(values.view_mut(..));
            rms_norm_batch(&stream, x.view(..), weight.view(..), 1e-5, to, &mut batch).unwrap();
            stream.synchronize().unwrap();
            check(&batch, &want, 2e-6, &format!("{n_cols} {mode}"));
            for (got, want) in values.read().unwrap().iter().zip(&want) {
                assert_near(*got, *want, 2e-6 * f64::from(want.abs()), "values");
            }
        }
    }
}

#[test]
fn gates_and_ups_are_near_the_scalar_ones() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n_cols in N_COLS {
        let mut random = Random(n_cols as u64);
        let n = N_TOKENS * n_cols;
        let (gate, mut up) = (random.activations(n), random.floats(n));
        let closed = gate.iter().position(|&g| g < 0.0);
        for gates in [Gates::Silu, Gates::Gelu, Gates::Relu] {
            if let (Gates::Relu, Some(closed)) = (gates, closed) {
                up[closed] = f32::INFINITY;
            }
            let act = |g: f32| match gates {
                Gates::Silu => g / (1.0 + (-g).exp()),
                Gates::Gelu => {
                    let g = f64::from(g);
                    let u = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
                    (0.5 * g * (1.0 + u.tanh())) as f32
                }
                Gates::Relu | Gates::ReluDense => g.max(0.0),
            };
            let product = |(&g, &u): (&f32, &f32)| if act(g) == 0.0 { 0.0 } else { act(g) * u };
            let want: Vec<f32> = gate.iter().zip(&up).map(product).collect();
            let (gate, up) = (device.upload(&gate).unwrap(), device.upload(&up).unwrap());
            for mode in MODES {
                let mut batch = DeviceBatch::new(&device, mode, N_TOKENS, n_cols).unwrap();
                gate_up_batch(&stream, gate.view(..), up.view(..), gates, &mut batch).unwrap();
                stream.synchronize().unwrap();
                check(&batch, &want, 1e-6, &format!("{n_cols} {mode} {gates:?}"));
            }
        }
    }
}
