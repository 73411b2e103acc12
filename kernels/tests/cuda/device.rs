//! Opening devices, and graphs.

use pi_kernels::cuda::{
    Add, Device, DeviceAct, DeviceBuffer, DeviceRows, DownScratch, Event, Gates, Graph, NeuronList,
    PinnedBuffer, Stream, compact, copy_to_device, copy_to_host, device_count, down_active,
    gate_up, rms_norm,
};
use pi_kernels::{ActivationMode, KernelError, QuantType};

use crate::common::{Random, Rows, bits, device};

#[test]
fn a_machine_without_a_driver_says_so() {
    match device_count() {
        Err(error) => {
            assert_eq!(error, KernelError::CudaNoDriver);
            assert!(error.to_string().starts_with("no CUDA driver"), "{error}");
            assert_eq!(Device::open(0).unwrap_err(), error);
        }
        Ok(count) => {
            let error = Device::open(count).unwrap_err();
            assert_eq!(
                error,
                KernelError::CudaNoDevice {
                    ordinal: count,
                    count
                }
            );
        }
    }
}

#[test]
fn more_memory_than_there_is_is_refused_with_numbers() {
    let Some(device) = device() else { return };
    let bytes = 2 * device.info().memory_bytes;
    match device.alloc::<u8>(bytes) {
        Err(KernelError::CudaOutOfMemory {
            bytes: asked,
            free_bytes,
        }) => {
            assert_eq!(asked, bytes);
            assert!(free_bytes < bytes);
        }
        other => panic!("{other:?}"),
    }
    // and the device is as good as before
    let buffer = device.upload(&[1u32, 2, 3]).unwrap();
    assert_eq!(buffer.read().unwrap(), [1, 2, 3]);
    assert_eq!(buffer.view(1..).read().unwrap(), [2, 3]);
}

#[test]
fn pinned_memory_is_copied_there_and_back() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: usize = 100_003;
    let pinned = || PinnedBuffer::<u32>::new(&device, N).unwrap();
    let (from, to) = (pinned(), pinned());
    let values: Vec<u32> = (0..N as u32)
        .map(|n| n.wrapping_mul(2_654_435_761))
        .collect();
    // SAFETY: nothing is launched yet.
    unsafe { from.write(0..N) }.copy_from_slice(&values);
    let mut buffer = device.alloc::<u32>(N).unwrap();
    copy_to_device(&stream, &from, buffer.view_mut(..)).unwrap();
    copy_to_host(&stream, buffer.view(..), &to).unwrap();
    stream.synchronize().unwrap();
    assert!(buffer.read().unwrap() == values);
    // SAFETY: all copies are done.
    assert!(unsafe { to.read(0..N) } == values);
}

/// norm → gate, skip, up → down, captured once; lists and inputs change in device memory.
#[test]
fn a_graph_reads_lists_when_it_runs_and_repeats_every_bit() {
    let Some(device) = device() else { return };
    const N_EMBD: usize = 512;
    const N_FF: usize = 1000;
    let stream = device.stream().unwrap();
    let make = |seed| Rows::random(&device, seed, QuantType::Q4_0, N_FF, N_EMBD);
    let (gate, up, down) = (make(1), make(2), make(3));
    let mut random = Random(7);
    let mut x = device.alloc::<f32>(N_EMBD).unwrap();
    let weight = device.upload(&random.floats(N_EMBD)).unwrap();
    let ids: Vec<u32> = (0..N_FF as u32).filter(|_| random.below(3) > 0).collect();
    let list = device.upload(&ids).unwrap();
    let mut count = device.alloc::<u32>(1).unwrap();
    let mut normed = DeviceAct::new(&device, ActivationMode::Q8, N_EMBD).unwrap();
    let mut a = device.alloc::<f32>(ids.len()).unwrap();
    let mut out = device.alloc::<f32>(N_EMBD).unwrap();
    let rows = DeviceRows {
        quant: QuantType::Q4_0,
        n_rows: N_FF,
        n_cols: N_EMBD,
    };
    let mut scratch = DownScratch::new(&device, rows).unwrap();
    let graph = Graph::capture(&stream, |stream| {
        let neurons = NeuronList::Ids {
            ids: list.view(..),
            count: count.view(..),
        };
        rms_norm(stream, x.view(..), weight.view(..), 1e-5, &mut normed)?;
        let (gate, up) = (gate.view(), up.view());
        let gates = Gates::Relu;
        gate_up(stream, gate, up, neurons, &normed, gates, a.view_mut(..))?;
        let add = Add::Values(x.view(..));
        let out = out.view_mut(..);
        down_active(
            stream,
            down.view(),
            neurons,
            a.view(..),
            true,
            add,
            None,
            &mut scratch,
            out,
        )
    })
    .unwrap();
    let mut run = |values: &[f32], n: u32| {
        x.write(0, values).unwrap();
        count.write(0, &[n]).unwrap();
        out.write(0, &[f32::NAN; N_EMBD]).unwrap();
        graph.launch(&stream).unwrap();
        stream.synchronize().unwrap();
        out.read().unwrap()
    };
    let values = random.activations(N_EMBD);
    assert_eq!(run(&values, 0), values, "no neuron: the residual stream");
    let all = run(&values, ids.len() as u32);
    let half = run(&values, ids.len() as u32 / 2);
    assert_ne!(all, half);
    assert!(all.iter().all(|v| v.is_finite()));
    // a count over the list's length is cut to it
    for n in [ids.len() as u32, u32::MAX, ids.len() as u32] {
        assert_eq!(
            bits(&run(&values, n)),
            bits(&all),
            "the same bits every time"
        );
    }
}

/// A list is made on another stream beside launches that do not need it, and used behind the join, where launches start early.
#[test]
fn a_list_that_is_made_beside_is_there_behind_the_join() {
    let Some(device) = device() else { return };
    const N_EMBD: usize = 4096;
    const N_FF: usize = 3000;
    let (stream, side) = (device.stream().unwrap(), device.stream().unwrap());
    let (begin, end) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
    let make = |seed| Rows::random(&device, seed, QuantType::Q4_0, N_FF, N_EMBD);
    let (gate, up, down) = (make(1), make(2), make(3));
    let mut random = Random(7);
    let x = device.upload(&random.floats(N_EMBD)).unwrap();
    let weight = device.upload(&random.floats(N_EMBD)).unwrap();
    struct Buffers {
        scores: DeviceBuffer<f32>,
        ids: DeviceBuffer<u32>,
        count: DeviceBuffer<u32>,
        normed: DeviceAct,
        a: DeviceBuffer<f32>,
        out: DeviceBuffer<f32>,
        scratch: DownScratch,
    }
    let mut buffers = Buffers {
        scores: device.alloc(N_FF).unwrap(),
        ids: device.alloc(N_FF).unwrap(),
        count: device.alloc(1).unwrap(),
        normed: DeviceAct::new(&device, ActivationMode::Q8, N_EMBD).unwrap(),
        a: device.alloc(N_FF).unwrap(),
        out: device.alloc(N_EMBD).unwrap(),
        scratch: DownScratch::new(&device, down.view().rows()).unwrap(),
    };
    let launches = |stream: &Stream, buffers: &mut Buffers, wait: &dyn Fn()| {
        let Buffers {
            scores,
            ids,
            count,
            normed,
            a,
            out,
            scratch,
        } = buffers;
        rms_norm(stream, x.view(..), weight.view(..), 1e-5, normed)?;
        begin.record(stream)?;
        side.wait_for(&begin)?;
        wait();
        compact(
            &side,
            scores.view(..),
            None,
            0,
            ids.view_mut(..),
            None,
            count.view_mut(..),
        )?;
        end.record(&side)?;
        wait();
        stream.wait_for(&end)?;
        rms_norm(stream, x.view(..), weight.view(..), 1e-5, normed)?;
        wait();
        let list = NeuronList::Ids {
            ids: ids.view(..),
            count: count.view(..),
        };
        let (gate, up) = (gate.view(), up.view());
        let gates = Gates::ReluDense;
        gate_up(stream, gate, up, list, normed, gates, a.view_mut(..))?;
        wait();
        down_active(
            stream,
            down.view(),
            list,
            a.view(..),
            false,
            Add::None,
            None,
            scratch,
            out.view_mut(..),
        )
    };
    let graph = Graph::capture(&stream, |stream| launches(stream, &mut buffers, &|| ())).unwrap();
    let inputs: Vec<_> = [1, 2, 9]
        .map(|share| {
            let mut score =
                || random.float().abs() * if random.below(10) < share { 1.0 } else { -1.0 };
            (0..N_FF).map(|_| score()).collect::<Vec<f32>>()
        })
        .into();
    // launch by launch, nothing beside anything
    let mut want = Vec::new();
    for scores_now in &inputs {
        buffers.scores.write(0, scores_now).unwrap();
        launches(&stream, &mut buffers, &|| device.synchronize().unwrap()).unwrap();
        device.synchronize().unwrap();
        want.push(bits(&buffers.out.read().unwrap()));
    }
    assert!(want[0] != want[1] && want[1] != want[2]);
    for turn in 0..100 {
        buffers.scores.write(0, &inputs[turn % 3]).unwrap();
        buffers.out.write(0, &[f32::NAN; N_EMBD]).unwrap();
        graph.launch(&stream).unwrap();
        stream.synchronize().unwrap();
        assert!(
            bits(&buffers.out.read().unwrap()) == want[turn % 3],
            "turn {turn}"
        );
    }
}
