//! Norms without a launch of their own: whoever writes the values makes activations, products with them take the scale.

use pi_kernels::cuda::{
    Add, DeviceAct, DeviceBuffer, DownScratch, Gates, NeuronList, PinnedBuffer, SUPPORTED, Stream,
    ThenNorm, down_active, gate_up, gemv, gemv_then_norm, rms_norm,
};
use pi_kernels::{ActBatch, ActivationMode, QuantType};

use crate::common::{Activations, Random, Rows, assert_near, bits, device, magnitude, scalar};

const EPS: f32 = 1e-5;

/// What products with `act` are of: its 8-bit values, times the scale of the norm of `x`.
fn effective(act: &DeviceAct, x: &[f32]) -> Vec<f32> {
    let squares: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum();
    let scale = 1.0 / (squares / x.len() as f64 + f64::from(EPS)).sqrt();
    let blocks = act.read_q8().unwrap();
    (blocks.q.iter().enumerate())
        .map(|(c, q)| (f64::from(*q) * f64::from(blocks.scales[c / 32]) * scale) as f32)
        .collect()
}

/// Activations of `x` times `weight`, and nothing else.
fn assert_made_of(act: &DeviceAct, x: &[f32], weight: &[f32], what: &str) {
    let values: Vec<f32> = x.iter().zip(weight).map(|(x, w)| x * w).collect();
    assert_eq!(bits(&act.values().read().unwrap()), bits(&values), "{what}");
    let mut host = ActBatch::new(ActivationMode::Q8, x.len(), 1);
    host.set(scalar(ActivationMode::Q8), 0, &values);
    assert_eq!(act.read_q8().unwrap().q, host.token(0).q, "{what}");
}

/// Adds the down rows of all neurons, times `a`, to `out`, and waits for it. The last of `of` is whether those whose factor is zero are
/// left unread.
fn add_downs(
    stream: &Stream,
    of: (&Rows, &DeviceBuffer<f32>, bool),
    then: Option<ThenNorm<'_>>,
    scratch: &mut DownScratch,
    out: &mut DeviceBuffer<f32>,
) {
    let (down, a, skip) = of;
    let (rows, list, add) = (down.view(), NeuronList::All, Add::Out);
    let (a, to) = (a.view(..), out.view_mut(..));
    down_active(stream, rows, list, a, skip, add, then, scratch, to).unwrap();
    stream.synchronize().unwrap();
}

#[test]
fn an_output_projection_makes_the_norm_behind_it() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let formats = SUPPORTED.into_iter().filter(|quant| quant.is_quantised());
    for (quant, n_rows, n_cols) in
        formats.flat_map(|quant| [(quant, 32, 256), (quant, 576, 1536), (quant, 8192, 4096)])
    {
        let what = format!("{quant} [{n_rows}, {n_cols}]");
        let m = Rows::random(&device, 7, quant, n_rows, n_cols);
        let mut random = Random(11);
        let x = Activations::new(&stream, ActivationMode::Q8, &random.activations(n_cols));
        let (base, weight) = (random.floats(n_rows), random.floats(n_rows));
        let on_device = device.upload(&weight).unwrap();
        let mut plain = device.upload(&base).unwrap();
        gemv(&stream, m.view(), &x.device, Add::Out, plain.view_mut(..)).unwrap();
        let mut out = device.upload(&base).unwrap();
        let act = || DeviceAct::new(&device, ActivationMode::Q8, n_rows).unwrap();
        let (mut act, mut without_weight) = (act(), act());
        let then = ThenNorm {
            weight: on_device.view(..),
            eps: EPS,
            to: &mut act,
            plain: Some(&mut without_weight),
            not_finite: None,
        };
        gemv_then_norm(&stream, m.view(), &x.device, then, out.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        let (plain, out) = (plain.read().unwrap(), out.read().unwrap());
        let of_x = x.effective(quant);
        for row in (0..n_rows).step_by(7) {
            let bound = 1e-6 * magnitude(&m.values(row), &of_x) + 1e-6;
            assert_near(out[row], plain[row], bound, &format!("{what} row {row}"));
        }
        assert_made_of(&act, &out, &weight, &what);
        assert_made_of(&without_weight, &out, &vec![1.0; n_rows], &what);
    }
}

#[test]
fn a_sum_of_downs_makes_the_norm_behind_it() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: usize = 333;
    for (quant, n_cols) in SUPPORTED
        .into_iter()
        .flat_map(|quant| [(quant, 256), (quant, 4096)])
    {
        let down = Rows::random(&device, 5, quant, N, n_cols);
        let mut scratch = DownScratch::new(&device, down.shape).unwrap();
        let mut random = Random(n_cols as u64);
        let a = device.upload(&random.activations(N)).unwrap();
        let (base, weight) = (random.floats(n_cols), random.floats(n_cols));
        let on_device = device.upload(&weight).unwrap();
        for skip in [true, false] {
            let mut run = |act: Option<&mut DeviceAct>| {
                let mut out = device.upload(&base).unwrap();
                let then = act.map(|to| ThenNorm {
                    weight: on_device.view(..),
                    eps: EPS,
                    to,
                    plain: None,
                    not_finite: None,
                });
                add_downs(&stream, (&down, &a, skip), then, &mut scratch, &mut out);
                out.read().unwrap()
            };
            let what = format!("{quant} [{N}, {n_cols}] skip {skip}");
            let mut act = DeviceAct::new(&device, ActivationMode::Q8, n_cols).unwrap();
            let out = run(Some(&mut act));
            assert_eq!(bits(&out), bits(&run(None)), "{what}: the same sums");
            assert_made_of(&act, &out, &weight, &what);
        }
    }
}

/// Products, gates and ups, and an output projection, of activations before the scale; and the scale is gone with what is written next.
#[test]
fn products_take_the_scale_of_the_norm_before_them() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for (quant, n_cols) in [
        (QuantType::Q4_0, 64),
        (QuantType::Q4_0, 4096),
        (QuantType::Q8_0, 8192),
        (QuantType::Q6_K, 5120),
    ] {
        let what = format!("{quant}, {n_cols} columns");
        let mut random = Random(3);
        let a = device.upload(&[0.5, -0.25, 0.125]).unwrap();
        let down = Rows::random(&device, 5, QuantType::F16, 3, n_cols);
        let mut scratch = DownScratch::new(&device, down.shape).unwrap();
        let weight = random.floats(n_cols);
        let on_device = device.upload(&weight).unwrap();
        let mut x = device.upload(&random.activations(n_cols)).unwrap();
        let mut act = DeviceAct::new(&device, ActivationMode::Q8, n_cols).unwrap();
        let then = ThenNorm {
            weight: on_device.view(..),
            eps: EPS,
            to: &mut act,
            plain: None,
            not_finite: None,
        };
        add_downs(&stream, (&down, &a, true), Some(then), &mut scratch, &mut x);
        let of_x = effective(&act, &x.read().unwrap());

        const N: usize = 700;
        let (gate, up) = (
            Rows::random(&device, 1, quant, N, n_cols),
            Rows::random(&device, 2, quant, N, n_cols),
        );
        let dot = |rows: &Rows, row: usize| -> f64 {
            let values = rows.values(row);
            values
                .iter()
                .zip(&of_x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum()
        };
        let mut out = device.upload(&[0.5f32; N]).unwrap();
        gemv(&stream, gate.view(), &act, Add::Out, out.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        for (row, got) in out.read().unwrap().into_iter().enumerate() {
            let bound = 2e-6 * magnitude(&gate.values(row), &of_x) + 1e-6;
            assert_near(
                got,
                (dot(&gate, row) + 0.5) as f32,
                bound,
                &format!("{what} row {row}"),
            );
        }
        let (gates, list) = (Gates::ReluDense, NeuronList::All);
        gate_up(
            &stream,
            gate.view(),
            up.view(),
            list,
            &act,
            gates,
            out.view_mut(..),
        )
        .unwrap();
        stream.synchronize().unwrap();
        for (row, got) in out.read().unwrap().into_iter().enumerate() {
            let (of_gate, of_up) = (dot(&gate, row), dot(&up, row));
            let [m_gate, m_up] = [&gate, &up].map(|rows| magnitude(&rows.values(row), &of_x));
            let bound = 3e-6 * m_gate * m_up + 1e-9;
            assert_near(
                got,
                (of_gate.max(0.0) * of_up) as f32,
                bound,
                &format!("{what} neuron {row}"),
            );
        }
        if n_cols.is_multiple_of(256) {
            const N_ROWS: usize = 64;
            let wo = Rows::random(&device, 3, quant, N_ROWS, n_cols);
            let ones = device.upload(&[1.0f32; N_ROWS]).unwrap();
            let mut next = DeviceAct::new(&device, ActivationMode::Q8, N_ROWS).unwrap();
            let then = ThenNorm {
                weight: ones.view(..),
                eps: EPS,
                to: &mut next,
                plain: None,
                not_finite: None,
            };
            let mut out = device.upload(&[0.5f32; N_ROWS]).unwrap();
            gemv_then_norm(&stream, wo.view(), &act, then, out.view_mut(..)).unwrap();
            stream.synchronize().unwrap();
            for (row, got) in out.read().unwrap().into_iter().enumerate() {
                let bound = 2e-6 * magnitude(&wo.values(row), &of_x) + 1e-6;
                assert_near(
                    got,
                    (dot(&wo, row) + 0.5) as f32,
                    bound,
                    &format!("{what} row {row}"),
                );
            }
        }

        // activations that are whole again
        rms_norm(&stream, x.view(..), on_device.view(..), EPS, &mut act).unwrap();
        let mut out = device.upload(&[0.0f32; N]).unwrap();
        gemv(&stream, gate.view(), &act, Add::None, out.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        let blocks = act.read_q8().unwrap();
        let of_x: Vec<f32> = (blocks.q.iter().enumerate())
            .map(|(c, q)| f32::from(*q) * blocks.scales[c / 32])
            .collect();
        for (row, got) in out.read().unwrap().into_iter().enumerate() {
            let values = gate.values(row);
            let want: f64 = values
                .iter()
                .zip(&of_x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum();
            let bound = 2e-6 * magnitude(&values, &of_x) + 1e-6;
            assert_near(got, want as f32, bound, &format!("{what} row {row}, whole"));
        }
    }
}

#[test]
fn what_is_not_finite_is_noted_where_it_is_written() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let word = PinnedBuffer::<u32>::new(&device, 1).unwrap();
    const N: usize = 512;
    let down = Rows::random(&device, 5, QuantType::Q4_0, 64, N);
    let mut scratch = DownScratch::new(&device, down.shape).unwrap();
    let ones = device.upload(&[1.0f32; N]).unwrap();
    for (value, noted) in [
        (1.0, 0),
        (1e18, 0),
        (1e19, 7),
        (f32::INFINITY, 7),
        (f32::NAN, 7),
    ] {
        for skip in [true, false] {
            let mut x = vec![1.0f32; N];
            x[N - 5] = value;
            let mut x = device.upload(&x).unwrap();
            let a = device.upload(&[0.0f32; 64]).unwrap();
            let mut act = DeviceAct::new(&device, ActivationMode::Q8, N).unwrap();
            word.store(0, 0);
            let then = ThenNorm {
                weight: ones.view(..),
                eps: EPS,
                to: &mut act,
                plain: None,
                not_finite: Some((word.view(0..1), 7)),
            };
            add_downs(&stream, (&down, &a, skip), Some(then), &mut scratch, &mut x);
            assert_eq!(word.load(0), noted, "{value}, skip {skip}");
        }
    }
}
