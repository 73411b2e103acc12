//! The sparse feed-forward network.

use pi_kernels::cuda::{
    Add, DeviceRows, DownScratch, Gates, NeuronList, PinnedBuffer, RowsView, SUPPORTED, Stream,
    View, ViewMut, compact, count_active, down_active, gate_up,
};
use pi_kernels::ffn_sparse::{self, FFN_GROUPS, GroupSpan};
use pi_kernels::{ActivationMode, QuantType};

use crate::common::{
    Activations, List, MODES, Random, Rows, assert_near, bits, column_counts, device, magnitude,
    scalar,
};

/// No neuron, one, some, all; ascending.
fn lists(n: usize, random: &mut Random) -> Vec<Vec<u32>> {
    let n = n as u32;
    let some = (0..n).filter(|_| random.below(8) == 0).collect();
    vec![vec![], vec![n / 2], some, (0..n).collect()]
}

#[test]
fn gates_and_ups_are_near_the_scalar_ones() {
    let Some(device) = device() else { return };
    let counts = PinnedBuffer::<u32>::new(&device, 2).unwrap();
    let stream = device.stream().unwrap();
    for quant in SUPPORTED {
        for (n, n_cols, mode) in MODES.into_iter().flat_map(|m| [(70, 768, m), (5, 8192, m)]) {
            let gate = Rows::random(&device, 1, quant, n, n_cols);
            let up = Rows::random(&device, 2, quant, n, n_cols);
            let mut random = Random(3);
            let x = Activations::new(&stream, mode, &random.activations(n_cols));
            let (host, effective, cpu) = (x.host.token(0), x.effective(quant), scalar(mode));
            let kinds = [Gates::Relu, Gates::ReluDense, Gates::Silu, Gates::Gelu];
            for (ids, kind) in lists(n, &mut random)
                .into_iter()
                .flat_map(|ids| kinds.map(|kind| (ids.clone(), kind)))
            {
                let relu = matches!(kind, Gates::Relu | Gates::ReluDense);
                let (mut gates, mut want) = (vec![0.0; ids.len()], vec![0.0; ids.len()]);
                ffn_sparse::row_products(cpu, gate.by_row(), host, &ids, &mut gates);
                let before = gates.clone();
                match kind {
                    Gates::Silu => pi_kernels::elementwise::silu_in_place(cpu, &mut gates),
                    Gates::Gelu => pi_kernels::elementwise::gelu_in_place(cpu, &mut gates),
                    Gates::Relu | Gates::ReluDense => {}
                }
                ffn_sparse::up_active(cpu, up.by_row(), host, &ids, &gates, &mut want, |_| ());
                let (list, count) = (device.upload(&ids).unwrap(), [ids.len() as u32]);
                let count = device.upload(&count).unwrap();
                let list = match ids.len() == n {
                    true => NeuronList::All,
                    false => NeuronList::Ids {
                        ids: list.view(..),
                        count: count.view(..),
                    },
                };
                let mut out = device.upload(&vec![f32::NAN; ids.len()]).unwrap();
                let (gate_rows, up_rows) = (gate.view(), up.view());
                gate_up(
                    &stream,
                    gate_rows,
                    up_rows,
                    list,
                    &x.device,
                    kind,
                    out.view_mut(..),
                )
                .unwrap();
                count_active(&stream, out.view(..), list, counts.view(0..2)).unwrap();
                stream.synchronize().unwrap();
                let open = out.read().unwrap().iter().filter(|v| **v != 0.0).count();
                // SAFETY: nothing runs.
                let counted = unsafe { counts.read(0..2) };
                assert_eq!(counted, [ids.len() as u32, open as u32], "{kind:?}");
                for (j, got) in out.read().unwrap().into_iter().enumerate() {
                    let row = ids[j] as usize;
                    let of_gate = 1e-6 * magnitude(&gate.values(row), &effective);
                    let of_up = magnitude(&up.values(row), &effective);
                    // the factor's error is the gate's, times at most 1.1 for SiLU
                    let factor = f64::from(gates[j].abs());
                    let bound = 1.1 * of_gate * of_up + 2e-6 * factor * of_up + 1e-9;
                    let closed = relu && before[j] <= 0.0;
                    let want = if closed { 0.0 } else { want[j] };
                    let what = format!("{quant} {mode} relu {relu} neuron {row}");
                    assert_near(got, want, bound, &what);
                    let clear = f64::from(before[j].abs()) > of_gate;
                    if closed && clear {
                        assert_eq!(got.to_bits(), 0, "{what} is closed");
                    }
                }
            }
        }
    }
}

/// The down rows of a list, times `a`; the last of `of` is whether those whose factor is zero are left unread.
fn sum(
    stream: &Stream,
    of: (RowsView<'_>, NeuronList<'_>, View<'_, f32>, bool),
    add: Add<'_>,
    scratch: &mut DownScratch,
    out: ViewMut<'_, f32>,
) {
    let (rows, list, a, skip) = of;
    down_active(stream, rows, list, a, skip, add, None, scratch, out).unwrap();
}

/// 16 groups over a list of ids of `n` neurons.
fn groups(ids: &[u32], n: usize) -> Vec<GroupSpan> {
    let at = |id: usize| ids.partition_point(|&other| (other as usize) < id);
    let part = |group| GroupSpan {
        group,
        span: at(n * group / FFN_GROUPS)..at(n * (group + 1) / FFN_GROUPS),
    };
    (0..FFN_GROUPS).map(part).collect()
}

#[test]
fn sums_of_downs_are_near_the_scalar_ones() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let cpu = scalar(ActivationMode::F32);
    let n = 333;
    for (quant, n_cols) in SUPPORTED
        .into_iter()
        .flat_map(|quant| column_counts(quant).into_iter().map(move |n| (quant, n)))
    {
        let down = Rows::random(&device, 5, quant, n, n_cols);
        let mut scratch = DownScratch::new(&device, down.shape).unwrap();
        let mut random = Random(n_cols as u64);
        for ids in lists(n, &mut random) {
            // about a third are closed
            let one = |random: &mut Random| match random.below(3) {
                0 => 0.0,
                _ => random.float(),
            };
            let a: Vec<f32> = ids.iter().map(|_| one(&mut random)).collect();
            // the host's kernel takes whole blocks of columns
            let whole = n_cols.next_multiple_of(32);
            let mut want = vec![0.0f32; n_cols];
            if n_cols == whole {
                let rows = down.by_row();
                let spans = groups(&ids, n);
                ffn_sparse::down_active(cpu, rows, &ids, &a, &spans, 0..n_cols, &mut [&mut want]);
            }
            let mut sizes = vec![0.0f64; n_cols];
            let mut exact = vec![0.0f64; n_cols];
            for (&id, &a) in ids.iter().zip(&a) {
                for (c, &w) in down.values(id as usize).iter().enumerate() {
                    exact[c] += f64::from(a) * f64::from(w);
                    sizes[c] += (f64::from(a) * f64::from(w)).abs();
                }
            }
            let base = random.floats(n_cols);
            let (list, count) = (device.upload(&ids).unwrap(), [ids.len() as u32]);
            let (a, count) = (device.upload(&a).unwrap(), device.upload(&count).unwrap());
            let list = match ids.len() == n {
                true => NeuronList::All,
                false => NeuronList::Ids {
                    ids: list.view(..),
                    count: count.view(..),
                },
            };
            let mut out = device.upload(&vec![f32::NAN; n_cols]).unwrap();
            let mut run = |skip: bool, add: Add<'_>| {
                let (rows, a, out_view) = (down.view(), a.view(..), out.view_mut(..));
                sum(&stream, (rows, list, a, skip), add, &mut scratch, out_view);
                stream.synchronize().unwrap();
                out.read().unwrap()
            };
            let [skipped, all] = [true, false].map(|skip| run(skip, Add::None));
            for c in 0..n_cols * 2 {
                let got = if c < n_cols { &skipped } else { &all };
                let c = c % n_cols;
                let what = format!("{quant} [{n}, {n_cols}] {} ids, column {c}", ids.len());
                let want = if n_cols == whole {
                    want[c]
                } else {
                    exact[c] as f32
                };
                assert_near(got[c], want, 1e-6 * sizes[c] + 1e-12, &what);
            }
            let with_base = device.upload(&base).unwrap();
            let added = run(true, Add::Values(with_base.view(..)));
            let sums: Vec<f32> = base
                .iter()
                .zip(&skipped)
                .map(|(base, sum)| base + sum)
                .collect();
            assert_eq!(
                bits(&added),
                bits(&sums),
                "{quant} {n_cols}: the same sum, added"
            );
        }
    }
}

/// All neurons, and lists of which a block has many, or few.
#[test]
fn a_wide_layer_is_summed_alike_every_time() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: u32 = 5000;
    for (n_cols, every, skip) in [(1024, 1, true), (8192, 2, false), (8192, 5, false)] {
        let down = Rows::random(&device, 5, QuantType::Q4_0, N as usize, n_cols);
        let mut scratch = DownScratch::new(&device, down.shape).unwrap();
        let ids: Vec<u32> = (0..N).step_by(every).collect();
        let a: Vec<f32> = Random(6)
            .floats(ids.len())
            .iter()
            .map(|a| (a - 0.7).max(0.0))
            .collect();
        let mut exact = vec![0.0f64; n_cols];
        let mut sizes = vec![0.0f64; n_cols];
        for (&row, &a) in ids.iter().zip(&a).filter(|(_, a)| **a != 0.0) {
            for (c, &w) in down.values(row as usize).iter().enumerate() {
                exact[c] += f64::from(a) * f64::from(w);
                sizes[c] += (f64::from(a) * f64::from(w)).abs();
            }
        }
        let a = device.upload(&a).unwrap();
        let listed = List::new(&device, &ids, ids.len());
        let list = match every {
            1 => NeuronList::All,
            _ => listed.view(),
        };
        let mut first = None;
        for _ in 0..20 {
            let mut out = device.upload(&vec![f32::NAN; n_cols]).unwrap();
            let (rows, a, out_view) = (down.view(), a.view(..), out.view_mut(..));
            let add = Add::None;
            sum(&stream, (rows, list, a, skip), add, &mut scratch, out_view);
            stream.synchronize().unwrap();
            let out = out.read().unwrap();
            for c in 0..n_cols {
                let what = format!("every {every}th, column {c}");
                assert_near(out[c], exact[c] as f32, 1e-6 * sizes[c], &what);
            }
            assert_eq!(bits(first.get_or_insert(out.clone())), bits(&out));
        }
    }
}

/// Blocks wait for those that have started alone: here most start when others have ended.
#[test]
fn parts_that_find_no_room_are_joined_all_the_same() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: usize = 40_000;
    for (quant, n_cols) in [
        (QuantType::Q4_0, 2048),
        (QuantType::F16, 1024),
        (QuantType::Q6_K, 2048),
    ] {
        let down = Rows::random(&device, 5, quant, N, n_cols);
        let ids: Vec<u32> = (0..N as u32).step_by(3).collect();
        let a = Random(6).floats(ids.len());
        let mut want = vec![0.0f64; n_cols];
        let mut sizes = vec![0.0f64; n_cols];
        for (&row, &a) in ids.iter().zip(&a) {
            for (c, &w) in down.values(row as usize).iter().enumerate() {
                want[c] += f64::from(a) * f64::from(w);
                sizes[c] += (f64::from(a) * f64::from(w)).abs();
            }
        }
        let a = device.upload(&a).unwrap();
        let listed = List::new(&device, &ids, ids.len());
        for n_parts in [3, 800] {
            let mut scratch = DownScratch::with_parts(&device, down.shape, n_parts).unwrap();
            let mut first = None;
            for _ in 0..20 {
                let mut out = device.upload(&vec![f32::NAN; n_cols]).unwrap();
                let of = (down.view(), listed.view(), a.view(..), false);
                sum(&stream, of, Add::None, &mut scratch, out.view_mut(..));
                stream.synchronize().unwrap();
                let out = out.read().unwrap();
                for c in 0..n_cols {
                    let what = format!("{quant} in {n_parts} parts, column {c}");
                    assert_near(out[c], want[c] as f32, 1e-6 * sizes[c], &what);
                }
                assert_eq!(bits(first.get_or_insert(out.clone())), bits(&out));
            }
        }
    }
}

#[test]
fn what_is_not_finite_and_neurons_that_do_not_exist_surface() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let down = Rows::random(&device, 5, QuantType::Q4_0, 40, 512);
    let mut scratch = DownScratch::new(&device, down.shape).unwrap();
    for (ids, a) in [([3u32, 9], [1.0, f32::NAN]), ([3, 40], [1.0, 1.0])] {
        let (list, count) = (
            device.upload(&ids).unwrap(),
            device.upload(&[2u32]).unwrap(),
        );
        let list = NeuronList::Ids {
            ids: list.view(..),
            count: count.view(..),
        };
        let (a, mut out) = (
            device.upload(&a).unwrap(),
            device.alloc::<f32>(512).unwrap(),
        );
        let (rows, out_view) = (down.view(), out.view_mut(..));
        down_active(
            &stream,
            rows,
            list,
            a.view(..),
            true,
            Add::None,
            None,
            &mut scratch,
            out_view,
        )
        .unwrap();
        stream.synchronize().unwrap();
        assert!(out.read().unwrap().iter().all(|v| v.is_nan()), "{ids:?}");
    }
}

/// With SiLU nothing is closed, also where a gate is exactly zero.
#[test]
fn a_gate_of_zero_hides_no_nan() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: usize = 64;
    let shape = DeviceRows {
        quant: QuantType::F32,
        n_rows: 1,
        n_cols: N,
    };
    let bytes = |value: f32| [value; N].iter().flat_map(|v| v.to_le_bytes()).collect();
    let upload = |bytes: Vec<u8>| device.upload(&bytes).unwrap();
    let (gate, up) = (upload(bytes(0.0)), upload(bytes(f32::NAN)));
    let x = Activations::new(&stream, ActivationMode::F32, &[1.0; N]);
    for (gates, closed) in [
        (Gates::Silu, false),
        (Gates::Gelu, false),
        (Gates::Relu, true),
        (Gates::ReluDense, true),
    ] {
        let mut out = device.alloc::<f32>(1).unwrap();
        gate_up(
            &stream,
            RowsView::dense(shape, gate.view(..)),
            RowsView::dense(shape, up.view(..)),
            NeuronList::All,
            &x.device,
            gates,
            out.view_mut(..),
        )
        .unwrap();
        stream.synchronize().unwrap();
        let got = out.read().unwrap()[0];
        assert!(
            if closed { got == 0.0 } else { got.is_nan() },
            "{gates:?}: {got}"
        );
    }
}

#[test]
fn lists_of_active_neurons_are_the_host_s() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n in [1, 31, 1000, 1024, 1025, 11008, 28672] {
        let mut random = Random(n as u64);
        for share in [0, 1, 5, 10] {
            let mut values: Vec<f32> = (0..n)
                .map(|_| {
                    let open = random.below(10) < share;
                    random.float().abs() * if open { 1.0 } else { -1.0 }
                })
                .collect();
            if share == 5 {
                values[n / 2] = f32::NAN;
                values[n / 3] = 0.0;
                values[n - 1] = -0.0;
            }
            let thresholds: Vec<f32> = random.floats(n).iter().map(|t| t.abs()).collect();
            for with_thresholds in [false, true] {
                let (mut want_ids, mut want) = (vec![], vec![]);
                if with_thresholds {
                    ffn_sparse::large_active(&values, &thresholds, 7, &mut want_ids, &mut want);
                } else {
                    ffn_sparse::gate_active(&values, 7, &mut want_ids, &mut want);
                }
                let from = device.upload(&values).unwrap();
                let by = device.upload(&thresholds).unwrap();
                let mut ids = device.upload(&vec![u32::MAX; n]).unwrap();
                let mut kept = device.upload(&vec![-7.0f32; n]).unwrap();
                let mut count = device.upload(&[99u32]).unwrap();
                let thresholds = with_thresholds.then(|| by.view(..));
                let (ids_view, kept_view) = (ids.view_mut(..), Some(kept.view_mut(..)));
                let count_view = count.view_mut(..);
                compact(
                    &stream,
                    from.view(..),
                    thresholds,
                    7,
                    ids_view,
                    kept_view,
                    count_view,
                )
                .unwrap();
                stream.synchronize().unwrap();
                let (ids, kept) = (ids.read().unwrap(), kept.read().unwrap());
                let n_active = want_ids.len();
                let what = format!("{n} values, thresholds {with_thresholds}");
                assert_eq!(count.read().unwrap(), [n_active as u32], "{what}");
                assert_eq!(ids[..n_active], want_ids, "{what}");
                assert_eq!(bits(&kept[..n_active]), bits(&want), "{what}");
                assert!(ids[n_active..].iter().all(|&id| id == u32::MAX), "{what}");
                assert!(kept[n_active..].iter().all(|&v| v == -7.0), "{what}");
            }
        }
    }
}
