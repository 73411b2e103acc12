//! Activations, norm, products of rows, embedding.

use pi_kernels::cuda::{
    Add, DeviceAct, Gates, NeuronList, SUPPORTED, ViewMut, embed, gate_up, gemv, prepare, rms_norm,
    row_products,
};
use pi_kernels::{ActBatch, ActivationMode, KernelError, QuantType};

use crate::common::{
    Activations, List, MODES, Random, Rows, assert_near, bits, column_counts, device, magnitude,
    scalar,
};

#[test]
fn activations_have_the_bits_of_the_host_s() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n in [1, 31, 32, 33, 576, 4096, 8192] {
        for bad in [
            None,
            Some(f32::NAN),
            Some(f32::INFINITY),
            Some(f32::MIN_POSITIVE / 8.0),
        ] {
            let mut values = Random(n as u64).activations(n);
            if let Some(bad) = bad {
                values[n / 2] = bad;
            }
            for mode in MODES {
                let x = Activations::new(&stream, mode, &values);
                let host = x.host.token(0);
                assert_eq!(bits(&x.device.values().read().unwrap()), bits(&values));
                let copy = x.device.read_q8().unwrap();
                assert_eq!(copy.q, host.q, "{n} {bad:?}");
                assert_eq!(copy.block_sums, host.block_sums, "{n} {bad:?}");
                for (got, want) in copy.scales.iter().zip(host.scales) {
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same, "{n} {bad:?}: scale {got}, not {want}");
                }
            }
        }
    }
}

#[test]
fn norm_is_near_the_scalar_one_and_makes_activations_of_what_it_gives() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n in [1, 31, 576, 1000, 4096, 8192, 20000] {
        let mut random = Random(n as u64);
        let (x, weight) = (random.activations(n), random.floats(n));
        let mut want = vec![0.0; n];
        pi_kernels::norm::rms_norm(scalar(ActivationMode::F32), &x, &weight, 1e-5, &mut want);
        let (x, weight) = (device.upload(&x).unwrap(), device.upload(&weight).unwrap());
        for mode in MODES {
            let mut got = DeviceAct::new(&device, mode, n).unwrap();
            rms_norm(&stream, x.view(..), weight.view(..), 1e-5, &mut got).unwrap();
            stream.synchronize().unwrap();
            let values = got.values().read().unwrap();
            for (got, want) in values.iter().zip(&want) {
                assert_near(
                    *got,
                    *want,
                    2e-6 * f64::from(want.abs()),
                    &format!("{n} values"),
                );
            }
            let mut host = ActBatch::new(mode, n, 1);
            host.set(scalar(mode), 0, &values);
            assert_eq!(got.read_q8().unwrap().q, host.token(0).q, "{n} values");
        }
    }
}

/// Every format, shape and arithmetic.
fn cases() -> impl Iterator<Item = (QuantType, usize, usize, ActivationMode)> {
    SUPPORTED.into_iter().flat_map(|quant| {
        let n_cols = column_counts(quant).into_iter();
        n_cols.flat_map(move |n_cols| {
            let both = move |n_rows| MODES.map(move |mode| (quant, n_rows, n_cols, mode));
            [1, 37].into_iter().flat_map(both)
        })
    })
}

#[test]
fn products_are_near_the_scalar_ones() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for (quant, n_rows, n_cols, mode) in cases() {
        let what = format!("{quant} [{n_rows}, {n_cols}] {mode}");
        let m = Rows::random(&device, 7, quant, n_rows, n_cols);
        let mut random = Random(11);
        let x = Activations::new(&stream, mode, &random.activations(n_cols));
        let mut want = vec![0.0; n_rows];
        let host = x.host.token(0);
        pi_kernels::gemm::gemv(scalar(mode), m.matrix(), host, 0..n_rows, &mut want);
        let bias = random.floats(n_rows);
        let mut out = device.upload(&vec![f32::NAN; n_rows]).unwrap();
        gemv(&stream, m.view(), &x.device, Add::None, out.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        let plain = out.read().unwrap();
        let effective = x.effective(quant);
        for row in 0..n_rows {
            let bound = 1e-6 * magnitude(&m.values(row), &effective) + 1e-12;
            assert_near(plain[row], want[row], bound, &format!("{what} row {row}"));
        }
        let with_bias = device.upload(&bias).unwrap();
        let add = Add::Values(with_bias.view(..));
        gemv(&stream, m.view(), &x.device, add, out.view_mut(..)).unwrap();
        gemv(&stream, m.view(), &x.device, Add::Out, out.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        for (row, got) in out.read().unwrap().iter().enumerate() {
            let twice = bias[row] + plain[row] + plain[row];
            assert_eq!(got.to_bits(), twice.to_bits(), "{what} row {row}, added");
        }
    }
}

/// More rows than a GPU has room for at once, which are taken two at a time, against lists so short that each is alone.
#[test]
fn many_rows_have_the_bits_of_few() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for quant in SUPPORTED.into_iter().filter(|quant| quant.is_quantised()) {
        // a warp a row, and a block
        for (n, n_cols) in [(20_001, 512), (3001, 8192)] {
            let what = format!("{quant} [{n}, {n_cols}]");
            let m = Rows::random(&device, 21, quant, n, n_cols);
            let up = Rows::random(&device, 22, quant, n, n_cols);
            let x = Activations::new(&stream, MODES[1], &Random(23).activations(n_cols));
            let run = |n: usize, launch: &dyn Fn(ViewMut<'_, f32>) -> Result<(), KernelError>| {
                let mut out = device.upload(&vec![f32::NAN; n]).unwrap();
                launch(out.view_mut(..)).unwrap();
                stream.synchronize().unwrap();
                out.read().unwrap()
            };
            let products = |list, n| {
                run(n, &|out| {
                    row_products(&stream, m.view(), list, &x.device, Add::None, out)
                })
            };
            let neurons = |list, n| {
                run(n, &|out| {
                    let (gate, up) = (m.view(), up.view());
                    gate_up(&stream, gate, up, list, &x.device, Gates::Relu, out)
                })
            };
            let all = run(n, &|out| gemv(&stream, m.view(), &x.device, Add::None, out));
            let gated = neurons(NeuronList::All, n);
            // with two rows that do not exist
            let mut long: Vec<u32> = (0..n as u32).collect();
            long[1] = n as u32;
            long[n / 2] = u32::MAX;
            let list = List::new(&device, &long, n);
            let listed = products(list.view(), n);
            for j in 0..n {
                match long[j] as usize >= n {
                    true => assert!(listed[j].is_nan(), "{what}: there is no row {}", long[j]),
                    false => assert_eq!(listed[j].to_bits(), all[j].to_bits(), "{what} row {j}"),
                }
            }
            let few: Vec<u32> = (0..n as u32)
                .step_by(n / 100)
                .chain([n as u32 - 1])
                .collect();
            let list = List::new(&device, &few, few.len());
            let few_products = products(list.view(), few.len());
            let few_neurons = neurons(list.view(), few.len());
            for ((id, product), neuron) in few.into_iter().zip(few_products).zip(few_neurons) {
                let id = id as usize;
                assert_eq!(all[id].to_bits(), product.to_bits(), "{what} row {id}");
                assert_eq!(gated[id].to_bits(), neuron.to_bits(), "{what} neuron {id}");
            }
        }
    }
}

#[test]
fn rows_of_a_list_have_the_bits_of_the_matrix() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: usize = 300;
    for (quant, mode) in [(QuantType::Q4_0, MODES[1]), (QuantType::F16, MODES[0])] {
        let m = Rows::random(&device, 3, quant, N, 512);
        let x = Activations::new(&stream, mode, &Random(4).activations(512));
        let mut all = device.alloc::<f32>(N).unwrap();
        gemv(&stream, m.view(), &x.device, Add::None, all.view_mut(..)).unwrap();
        stream.synchronize().unwrap();
        let all = all.read().unwrap();
        let mut random = Random(5);
        let some: Vec<u32> = (0..N as u32).filter(|_| random.below(4) == 0).collect();
        for ids in [some, (0..N as u32).collect(), vec![17], vec![5, 300, 7]] {
            for n in [0, ids.len() / 2, ids.len()] {
                let list = List::new(&device, &ids, n);
                let mut out = device.upload(&vec![-7.0; ids.len()]).unwrap();
                row_products(
                    &stream,
                    m.view(),
                    list.view(),
                    &x.device,
                    Add::None,
                    out.view_mut(..),
                )
                .unwrap();
                stream.synchronize().unwrap();
                for (j, got) in out.read().unwrap().into_iter().enumerate() {
                    let want = match all.get(ids[j] as usize) {
                        _ if j >= n => -7.0,
                        Some(&want) => want,
                        None => f32::NAN,
                    };
                    let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                    assert!(same, "{quant}: place {j} of {n}: {got}, not {want}");
                }
            }
        }
    }
}

#[test]
fn an_activation_that_is_not_finite_surfaces() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for quant in SUPPORTED {
        let m = Rows::random(&device, 7, quant, 5, 768);
        for (mode, bad) in [
            (MODES[0], f32::NAN),
            (MODES[1], f32::NAN),
            (MODES[1], f32::INFINITY),
        ] {
            let mut values = Random(11).floats(768);
            values[400] = bad;
            let x = Activations::new(&stream, mode, &values);
            let mut out = device.alloc::<f32>(5).unwrap();
            gemv(&stream, m.view(), &x.device, Add::None, out.view_mut(..)).unwrap();
            stream.synchronize().unwrap();
            let out = out.read().unwrap();
            assert!(
                out.iter().all(|v| !v.is_finite()),
                "{quant} {mode} {bad}: {out:?}"
            );
        }
    }
}

#[test]
fn embedding_has_the_bits_of_the_row() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for quant in SUPPORTED {
        for n_cols in column_counts(quant) {
            let rows = Rows::random(&device, 13, quant, 6, n_cols);
            for token in [0u32, 5, 6, u32::MAX] {
                let id = device.upload(&[token]).unwrap();
                let mut out = device.upload(&vec![-7.0; n_cols]).unwrap();
                embed(&stream, rows.view(), id.view(..), out.view_mut(..)).unwrap();
                stream.synchronize().unwrap();
                let out = out.read().unwrap();
                if token >= 6 {
                    assert!(out.iter().all(|v| v.is_nan()), "{quant}: no such token");
                } else {
                    // zeros may differ in sign
                    assert_eq!(out, rows.values(token as usize), "{quant} {n_cols}");
                }
            }
        }
    }
}

#[test]
fn activations_can_be_made_again_in_place() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut x = Activations::new(&stream, MODES[1], &Random(1).floats(64));
    let values = Random(2).floats(64);
    let from = device.upload(&values).unwrap();
    prepare(&stream, from.view(..), &mut x.device).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(x.device.values().read().unwrap(), values);
}
