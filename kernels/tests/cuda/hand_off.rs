//! What passes between host and device, and what was fused around it.

use std::time::Duration;

use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    Add, AroundNorm, AttendScratch, AttendToken, BeginToken, Device, DeviceAct, DeviceBuffer,
    DeviceCache, Event, Graph, HandOver, HandOverNormed, PinnedBuffer, RopeAppend, Stream,
    TakeOver, View, attend, attend_token, begin_token, gemv, hand_over, prepare, prepare_relu,
    rms_norm, rms_norm_with, rope_append, tagged, take_over,
};
use pi_kernels::rope::{RopePairs, RopeScaling, RopeSpec, RopeTable};
use pi_kernels::{ActivationMode, KernelError, QuantType};

use crate::common::{MODES, Random, Rows, bits, device};

/// All that a product can read of activations.
fn read(act: &DeviceAct) -> (Vec<u32>, pi_kernels::cuda::Q8Copy) {
    (bits(&act.values().read().unwrap()), act.read_q8().unwrap())
}

#[test]
fn a_token_s_attention_in_one_launch_has_the_bits_of_three() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let cases = [
        (4, 2, 64, 64, None),
        (9, 3, 96, 32, Some(40)),
        (16, 1, 128, 128, None),
        (10, 2, 64, 32, Some(170)),
        (4, 4, 64, 64, None),
        (3, 3, 128, 96, Some(280)),
    ];
    for (n_head, n_head_kv, head_dim, n_dims, window) in cases {
        for (pairs, kv_type, mode) in [RopePairs::Adjacent, RopePairs::Halves]
            .into_iter()
            .flat_map(|pairs| [(pairs, KvType::F16), (pairs, KvType::F32)])
            .flat_map(|(pairs, kv_type)| MODES.map(|mode| (pairs, kv_type, mode)))
        {
            let n_ctx = 300;
            let table = RopeTable::new(RopeSpec {
                pairs,
                n_dims,
                freq_base: 10000.0,
                scaling: RopeScaling::None,
            });
            let cache = || DeviceCache::new(&device, kv_type, n_head_kv, n_ctx, head_dim).unwrap();
            let (mut one, mut three) = (cache(), cache());
            let scratch = || {
                let (device, n) = (&device, n_head);
                AttendScratch::new(device, n, n_head_kv, head_dim, n_ctx, kv_type, mode).unwrap()
            };
            let (mut one_scratch, mut three_scratch) = (scratch(), scratch());
            let mut random = Random(7);
            let (n_q, n_kv) = (n_head * head_dim, n_head_kv * head_dim);
            let act = || DeviceAct::new(&device, mode, n_q).unwrap();
            let (mut got, mut want) = (act(), act());
            // every position attends over those before it; the last one has no place in the cache, where nothing is written, nor are its
            // queries rotated by a launch of their own
            for position in 0..=n_ctx {
                let mut row = vec![0.0; table.row_len()];
                table.fill(position, &mut row);
                let mut upload = |n: usize| device.upload(&random.floats(n)).unwrap();
                let (mut q, k, v) = (upload(n_q), upload(n_kv), upload(n_kv));
                let rotation = device.upload(&row).unwrap();
                let at = device.upload(&[position as u32]).unwrap();
                let token = AttendToken {
                    q: q.view(..),
                    k: k.view(..),
                    v: v.view(..),
                    rotation: rotation.view(..),
                    pairs,
                    position: at.view(..),
                };
                let to = &mut got;
                attend_token(&stream, token, &mut one, window, 0.1, &mut one_scratch, to).unwrap();
                stream.synchronize().unwrap();
                let token = RopeAppend {
                    q: q.view_mut(..),
                    k: k.view(..),
                    v: v.view(..),
                    rotation: rotation.view(..),
                    pairs,
                    position: at.view(..),
                };
                rope_append(&stream, token, &mut three).unwrap();
                let mut heads = device.alloc::<f32>(n_q).unwrap();
                attend(
                    &stream,
                    q.view(..),
                    &three,
                    at.view(..),
                    window,
                    0.1,
                    &mut three_scratch,
                    heads.view_mut(..),
                )
                .unwrap();
                prepare(&stream, heads.view(..), &mut want).unwrap();
                stream.synchronize().unwrap();
                let what = format!("{n_head}/{n_head_kv} heads of {head_dim} at {position}");
                assert!(position == n_ctx || read(&got) == read(&want), "{what}");
            }
            let all = |cache: &DeviceCache| {
                (cache.keys().read().unwrap(), cache.values().read().unwrap())
            };
            assert!(all(&one) == all(&three), "the same cache");
        }
    }
}

#[test]
fn what_is_no_number_surfaces_in_its_heads() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let rotation = device.upload(&[[1.0f32; 64], [0.0; 64]].concat()).unwrap();
    for (n_head, mode) in [
        (4, ActivationMode::Q8),
        (16, ActivationMode::Q8),
        (16, ActivationMode::F32),
    ] {
        // of the query, a key and a value of the second key/value head, each alone
        for what in 0..3 {
            let mut cache = DeviceCache::new(&device, KvType::F16, 4, 8, 64).unwrap();
            let mut scratch =
                AttendScratch::new(&device, n_head, 4, 64, 8, KvType::F16, mode).unwrap();
            let mut to = DeviceAct::new(&device, mode, n_head * 64).unwrap();
            let by = n_head / 4;
            for position in 0..3u32 {
                let mut random = Random(u64::from(position));
                let [mut q, mut k, mut v] = [n_head, 4, 4].map(|n| random.floats(n * 64));
                match (what, position) {
                    (0, 2) => q[by * 64 + 5] = f32::NAN,
                    (1, 1) => k[64 + 5] = f32::NAN,
                    (2, 1) => v[64 + 5] = f32::NAN,
                    _ => {}
                }
                let [q, k, v] = [q, k, v].map(|values| device.upload(&values).unwrap());
                let at = device.upload(&[position]).unwrap();
                let token = AttendToken {
                    q: q.view(..),
                    k: k.view(..),
                    v: v.view(..),
                    rotation: rotation.view(..),
                    pairs: RopePairs::Halves,
                    position: at.view(..),
                };
                attend_token(&stream, token, &mut cache, None, 0.1, &mut scratch, &mut to).unwrap();
                stream.synchronize().unwrap();
            }
            let heads = to.values().read().unwrap();
            for (head, values) in heads.chunks(64).enumerate() {
                let hit = match what {
                    0 => head == by,
                    _ => head / by == 1,
                };
                for (d, value) in values.iter().enumerate() {
                    let lost = hit && (what != 2 || d == 5);
                    assert_eq!(value.is_nan(), lost, "{what}: {head} of {n_head}, {d}");
                }
            }
        }
    }
}

/// Residual stream, product, normed, heads, cache and scratch of a token.
type Side = (
    DeviceBuffer<f32>,
    DeviceBuffer<f32>,
    DeviceAct,
    DeviceAct,
    DeviceCache,
    AttendScratch,
);

/// Products, attention and norms as a token has them: launches that start while those before them end read nothing too early.
#[test]
fn attention_between_products_has_the_bits_of_launches_one_by_one() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const POSITIONS: u32 = 40;
    let mode = ActivationMode::Q8;
    for (n_head, n_head_kv) in [(32, 32), (32, 16), (32, 4)] {
        let (dim, n_embd, n_kv) = (128, n_head * 128, n_head_kv * 128);
        let rows = |seed, n| Rows::random(&device, seed, QuantType::Q4_0, n, n_embd);
        let (qkv, wo) = (rows(1, n_embd + 2 * n_kv), rows(2, n_embd));
        let weight = device.upload(&vec![0.1f32; n_embd]).unwrap();
        let mut at = device.alloc::<u32>(1).unwrap();
        let rotation = device.upload(&Random(3).floats(2 * dim)).unwrap();
        let mut sides = [(); 2].map(|()| {
            (
                device.alloc::<f32>(n_embd).unwrap(),
                device.alloc::<f32>(n_embd + 2 * n_kv).unwrap(),
                DeviceAct::new(&device, mode, n_embd).unwrap(),
                DeviceAct::new(&device, mode, n_embd).unwrap(),
                DeviceCache::new(&device, KvType::F16, n_head_kv, 64, dim).unwrap(),
                AttendScratch::new(&device, n_head, n_head_kv, dim, 64, KvType::F16, mode).unwrap(),
            )
        });
        let [together, apart] = &mut sides;
        let token = |stream: &Stream,
                     side: &mut Side,
                     position: View<'_, u32>,
                     end: &dyn Fn()|
         -> Result<(), KernelError> {
            let (x, out, normed, heads, cache, scratch) = side;
            for _ in 0..2 {
                rms_norm(stream, x.view(..), weight.view(..), 1e-5, normed)?;
                end();
                gemv(stream, qkv.view(), normed, Add::None, out.view_mut(..))?;
                end();
                let out = out.view(..);
                let token = AttendToken {
                    q: out.part(0..n_embd),
                    k: out.part(n_embd..n_embd + n_kv),
                    v: out.part(n_embd + n_kv..n_embd + 2 * n_kv),
                    rotation: rotation.view(..),
                    pairs: RopePairs::Halves,
                    position,
                };
                attend_token(stream, token, cache, None, 0.1, scratch, heads)?;
                end();
                gemv(stream, wo.view(), heads, Add::Out, x.view_mut(..))?;
                end();
            }
            Ok(())
        };
        let graph = Graph::capture(&stream, |stream| {
            token(stream, together, at.view(..), &|| ())
        })
        .unwrap();
        for position in 0..POSITIONS {
            let values = Random(u64::from(position)).activations(n_embd);
            at.write(0, &[position]).unwrap();
            together.0.write(0, &values).unwrap();
            apart.0.write(0, &values).unwrap();
            graph.launch(&stream).unwrap();
            stream.synchronize().unwrap();
            token(&stream, apart, at.view(..), &|| {
                stream.synchronize().unwrap()
            })
            .unwrap();
            let [got, want] = [&together.0, &apart.0].map(|x| bits(&x.read().unwrap()));
            assert!(got == want, "{n_head}/{n_head_kv} at {position}");
        }
    }
}

#[test]
fn a_norm_gives_its_values_without_the_weight_and_to_the_host() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n in [32, 576, 1000, 8192] {
        for mode in MODES {
            let mut random = Random(n as u64);
            let x = device.upload(&random.activations(n)).unwrap();
            let weight = device.upload(&random.floats(n)).unwrap();
            let ones = device.upload(&vec![1.0f32; n]).unwrap();
            let act = || DeviceAct::new(&device, mode, n).unwrap();
            let (mut to, mut plain) = (act(), act());
            let (mut want, mut want_plain) = (act(), act());
            rms_norm(&stream, x.view(..), weight.view(..), 1e-5, &mut want).unwrap();
            rms_norm(&stream, x.view(..), ones.view(..), 1e-5, &mut want_plain).unwrap();
            // as it is where nothing is aligned
            let shifted = [&[7.0], &x.read().unwrap()[..]].concat();
            let shifted = device.upload(&shifted).unwrap();
            rms_norm(&stream, shifted.view(1..), weight.view(..), 1e-5, &mut to).unwrap();
            stream.synchronize().unwrap();
            assert!(read(&to) == read(&want), "{n}, not aligned");
            let q8 = mode == ActivationMode::Q8 && n % 32 == 0;
            let host = PinnedBuffer::<f32>::new(&device, n).unwrap();
            let flags = PinnedBuffer::<u32>::new(&device, 1).unwrap();
            let stamps = PinnedBuffer::<u64>::new(&device, 2).unwrap();
            let number = device.upload(&[41u32]).unwrap();
            let mut ticket = device.alloc::<u32>(1).unwrap();
            let around = AroundNorm {
                plain: Some(&mut plain),
                after: Some(HandOverNormed {
                    to: host.view(0..n),
                    q8,
                    flag: flags.view(0..1),
                    number: number.view(..),
                    stamp: stamps.view(0..1),
                    ticket: ticket.view_mut(..),
                }),
                begun: Some(stamps.view(1..2)),
                not_finite: None,
            };
            rms_norm_with(&stream, x.view(..), weight.view(..), 1e-5, &mut to, around).unwrap();
            while flags.load(0) != 41 {
                assert!(
                    !stream.is_done().unwrap() || flags.load(0) == 41,
                    "the flag is set"
                );
            }
            // SAFETY: the flag was seen.
            let values = unsafe { host.read(0..n).to_vec() };
            stream.synchronize().unwrap();
            assert!(
                read(&to) == read(&want) && read(&plain) == read(&want_plain),
                "{n}"
            );
            let (want_values, want_q8) = read(&want);
            if q8 {
                let bytes = values.iter().flat_map(|word| word.to_le_bytes());
                let bytes: Vec<u8> = bytes.take(n).collect();
                let want_bytes: Vec<u8> = want_q8.q.iter().map(|&q| q as u8).collect();
                assert_eq!(bytes, want_bytes, "8-bit values that the host sees");
                let scales = &values[n / 4..][..n / 32];
                assert_eq!(bits(scales), bits(&want_q8.scales), "and their scales");
            } else {
                assert_eq!(bits(&values), want_values, "what the host sees");
            }
            // SAFETY: the launch has ended.
            let [stamp, begun] = unsafe { [stamps.read(0..1)[0], stamps.read(1..2)[0]] };
            assert!(0 < begun && begun <= stamp, "{begun}, then {stamp}");
            assert_eq!(ticket.read().unwrap(), [0], "the ticket is left zero");
        }
    }
}

#[test]
fn the_first_norm_of_what_is_not_finite_is_noted() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let words = PinnedBuffer::<u32>::new(&device, 1).unwrap();
    for n in [32, 1000, 8192] {
        let weight = device.upload(&vec![1.0f32; n]).unwrap();
        let norm = |part: u32, bad: Option<(usize, f32)>| {
            let mut values = Random(n as u64).activations(n);
            if let Some((at, value)) = bad {
                values[at] = value;
            }
            let x = device.upload(&values).unwrap();
            let mut to = DeviceAct::new(&device, ActivationMode::Q8, n).unwrap();
            let around = AroundNorm {
                not_finite: Some((words.view(0..1), part)),
                ..AroundNorm::default()
            };
            rms_norm_with(&stream, x.view(..), weight.view(..), 1e-5, &mut to, around).unwrap();
            stream.synchronize().unwrap();
            words.load(0)
        };
        for value in [f32::NAN, f32::INFINITY, 1e30] {
            words.store(0, 0);
            assert_eq!(norm(3, None), 0, "all are finite");
            assert_eq!(norm(4, Some((n - 1, value))), 4, "{value} of {n}");
            assert_eq!(norm(5, Some((0, value))), 4, "the first one is kept");
        }
    }
}

#[test]
fn rectified_activations_are_those_of_rectified_values() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for mode in MODES {
        let mut values = Random(3).activations(1000);
        values[17] = f32::NAN;
        let rectified: Vec<f32> = values
            .iter()
            .map(|&x| if x < 0.0 { 0.0 } else { x })
            .collect();
        let act = || DeviceAct::new(&device, mode, values.len()).unwrap();
        let (mut got, mut want) = (act(), act());
        let upload = |values: &[f32]| device.upload(values).unwrap();
        let (x, y) = (upload(&values), upload(&rectified));
        prepare_relu(&stream, x.view(..), &mut got).unwrap();
        prepare(&stream, y.view(..), &mut want).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(read(&got).0, read(&want).0);
    }
}

/// Memory of a token that goes to the device, to the host, and back.
struct Exchange {
    x: PinnedBuffer<f32>,
    words: PinnedBuffer<u32>,
    flags: PinnedBuffer<u32>,
    out: PinnedBuffer<f32>,
    back: PinnedBuffer<u64>,
    stamps: PinnedBuffer<u64>,
}

impl Exchange {
    fn new(device: &Device, n: usize) -> Self {
        let floats = |n| PinnedBuffer::<f32>::new(device, n).unwrap();
        let words = |n| PinnedBuffer::<u32>::new(device, n).unwrap();
        Self {
            x: floats(n),
            words: words(2),
            flags: words(4),
            out: floats(n),
            back: PinnedBuffer::new(device, n).unwrap(),
            stamps: PinnedBuffer::new(device, 8).unwrap(),
        }
    }
}

/// begin → hand over → (host) → take over → hand over, in one graph with a branch; and a host that does not answer.
#[test]
fn a_graph_waits_for_the_host_but_not_for_ever() {
    let Some(device) = device() else { return };
    const N: usize = 5000;
    let (stream, side) = (device.stream().unwrap(), device.stream().unwrap());
    let exchange = Exchange::new(&device, N);
    let (mut x, mut words) = (
        device.alloc::<f32>(N).unwrap(),
        device.alloc::<u32>(2).unwrap(),
    );
    let mut rotation = device.alloc::<f32>(4).unwrap();
    let rotation_in = PinnedBuffer::<f32>::new(&device, 4).unwrap();
    let mut tickets = [
        device.alloc::<u32>(1).unwrap(),
        device.alloc::<u32>(1).unwrap(),
    ];
    let (ids, count) = (
        device.upload(&[5u32, 6, 7, 8]).unwrap(),
        device.upload(&[3u32]).unwrap(),
    );
    let (ids_out, late) = (
        PinnedBuffer::<u32>::new(&device, 5).unwrap(),
        device.alloc::<u32>(1).unwrap(),
    );
    let (begin, end) = (Event::new(&device).unwrap(), Event::new(&device).unwrap());
    let limit = Duration::from_millis(200);
    let graph = Graph::capture(&stream, |stream| {
        let token = BeginToken {
            x: (exchange.x.view(0..N), x.view_mut(..)),
            rotation: (rotation_in.view(0..4), rotation.view_mut(..)),
            words: (exchange.words.view(0..2), words.view_mut(..)),
            stamp: exchange.stamps.view(0..1),
        };
        begin_token(stream, token)?;
        begin.record(stream)?;
        side.wait_for(&begin)?;
        let some = HandOver {
            from: ids.view(..),
            count: Some((count.view(..), ids_out.view(4..5))),
            to: ids_out.view(0..4),
            flag: exchange.flags.view(0..1),
            number: words.view(1..2),
            stamp: exchange.stamps.view(1..2),
        };
        hand_over(&side, some, &mut tickets[0])?;
        end.record(&side)?;
        let all = HandOver {
            from: x.view(..).to_bits(),
            count: None,
            to: exchange.out.view(0..N).to_bits(),
            flag: exchange.flags.view(1..2),
            number: words.view(1..2),
            stamp: exchange.stamps.view(2..3),
        };
        hand_over(stream, all, &mut tickets[1])?;
        let back = TakeOver {
            from: exchange.back.view(0..N),
            flag: exchange.flags.view(2..3),
            number: words.view(1..2),
            plus: 7,
            late: (late.view(..), exchange.flags.view(3..4)),
            stamps: exchange.stamps.view(3..5),
            limit,
        };
        take_over(stream, back, x.view_mut(..))?;
        stream.wait_for(&end)
    })
    .unwrap();
    let mut random = Random(9);
    let wait = |flag: usize, number: u32| {
        while exchange.flags.load(flag) != number {
            assert!(
                !stream.is_done().unwrap() || exchange.flags.load(flag) == number,
                "flag {flag} of token {number}"
            );
        }
    };
    for number in 1..=50 {
        let (values, back) = (random.floats(N), random.floats(N));
        // SAFETY: no graph runs.
        unsafe {
            exchange.x.write(0..N).copy_from_slice(&values);
            exchange.words.write(0..2).copy_from_slice(&[3, number]);
        }
        graph.launch(&stream).unwrap();
        wait(0, number);
        wait(1, number);
        // SAFETY: both flags were seen.
        unsafe {
            assert_eq!(ids_out.read(0..3), [5, 6, 7]);
            assert_eq!(ids_out.read(4..5), [3], "as many as were counted");
            assert_eq!(bits(exchange.out.read(0..N)), bits(&values));
        }
        // in pieces, the last ones first, and the flag long after: each value is taken when it has its tag
        for (n, part) in back.chunks(999).enumerate().rev() {
            let words = part.iter().map(|&value| tagged(value, number + 7));
            exchange.back.store_words(999 * n, words);
        }
        if number % 2 == 0 {
            exchange.flags.store(2, number);
        }
        stream.synchronize().unwrap();
        exchange.flags.store(2, number);
        let want: Vec<f32> = values.iter().zip(&back).map(|(x, y)| x + y).collect();
        assert_eq!(bits(&x.read().unwrap()), bits(&want));
        // SAFETY: the graph has ended.
        let times = unsafe { exchange.stamps.read(0..5) };
        assert!(times[0] <= times[2] && times[2] <= times[3] && times[3] <= times[4]);
    }
    assert_eq!(exchange.flags.load(3), 0, "nobody was late");
    // SAFETY: no graph runs.
    unsafe { exchange.words.write(0..2).copy_from_slice(&[3, 98]) };
    exchange.flags.store(2, 98);
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(
        exchange.flags.load(3),
        0,
        "who is told that nothing more comes is not late"
    );
    // SAFETY: no graph runs.
    unsafe { exchange.words.write(0..2).copy_from_slice(&[3, 99]) };
    graph.launch(&stream).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(
        exchange.flags.load(3),
        1,
        "the host was late, and the graph has ended"
    );
}
