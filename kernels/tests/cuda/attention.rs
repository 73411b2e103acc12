//! Rotation, the cache, attention.

use pi_kernels::attention::{self, KvHead, KvType, Queries};
use pi_kernels::cuda::{AttendScratch, DeviceCache, RopeAppend, attend, rope_append};
use pi_kernels::rope::{RopePairs, RopeScaling, RopeSpec, RopeTable};
use pi_kernels::{ActivationMode, StridedOut};

use crate::common::{MODES, Random, assert_near, bits, device, scalar};

const KV_TYPES: [KvType; 2] = [KvType::F16, KvType::F32];

#[test]
fn rotated_heads_and_cached_rows_have_the_host_s_bits() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let cpu = scalar(ActivationMode::F32);
    let n_ctx = 50;
    for (n_head, n_head_kv, head_dim, n_dims) in [(4, 2, 64, 64), (9, 3, 80, 20), (2, 1, 8, 8)] {
        for (pairs, kv_type) in [RopePairs::Adjacent, RopePairs::Halves]
            .into_iter()
            .flat_map(|pairs| KV_TYPES.map(|kv_type| (pairs, kv_type)))
        {
            let table = RopeTable::new(RopeSpec {
                pairs,
                n_dims,
                freq_base: 10000.0,
                scaling: RopeScaling::None,
            });
            let mut random = Random(n_head as u64);
            let mut cache = DeviceCache::new(&device, kv_type, n_head_kv, n_ctx, head_dim).unwrap();
            for position in [0, 17, n_ctx - 1, n_ctx] {
                let (mut q, mut k, v) = (
                    random.floats(n_head * head_dim),
                    random.floats(n_head_kv * head_dim),
                    random.floats(n_head_kv * head_dim),
                );
                let mut row = vec![0.0; table.row_len()];
                table.fill(position, &mut row);
                let before = (cache.keys().read().unwrap(), cache.values().read().unwrap());
                let mut on_device = device.upload(&q).unwrap();
                let upload = |values: &[f32]| device.upload(values).unwrap();
                let (k_device, v_device, rotation) = (upload(&k), upload(&v), upload(&row));
                let at = device.upload(&[position as u32]).unwrap();
                let token = RopeAppend {
                    q: on_device.view_mut(..),
                    k: k_device.view(..),
                    v: v_device.view(..),
                    rotation: rotation.view(..),
                    pairs,
                    position: at.view(..),
                };
                rope_append(&stream, token, &mut cache).unwrap();
                stream.synchronize().unwrap();
                let (keys, values) = (cache.keys().read().unwrap(), cache.values().read().unwrap());
                if position == n_ctx {
                    assert!(
                        (keys, values) == before,
                        "nothing is written behind the cache"
                    );
                    continue;
                }
                table.apply(cpu, &row, &mut q, head_dim);
                table.apply(cpu, &row, &mut k, head_dim);
                let what = format!("{pairs:?} {kv_type} {head_dim} at {position}");
                assert_eq!(bits(&on_device.read().unwrap()), bits(&q), "{what}");
                let row_bytes = kv_type.row_bytes(head_dim);
                let (mut want_keys, mut want_values) = before;
                for head in 0..n_head_kv {
                    let of = head * head_dim..(head + 1) * head_dim;
                    let start = (head * n_ctx + position) * row_bytes;
                    let place = start..start + row_bytes;
                    attention::append(cpu, kv_type, &k[of.clone()], &mut want_keys[place.clone()]);
                    attention::append(cpu, kv_type, &v[of], &mut want_values[place]);
                }
                assert!(keys == want_keys && values == want_values, "{what}: cache");
            }
        }
    }
}

struct Case {
    n_head: usize,
    n_head_kv: usize,
    head_dim: usize,
    kv_type: KvType,
    window: Option<usize>,
    mode: ActivationMode,
}

fn check_attention(case: &Case, positions: &[usize]) {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let cpu = scalar(ActivationMode::F32);
    let &Case {
        n_head,
        n_head_kv,
        head_dim,
        kv_type,
        window,
        mode,
    } = case;
    let n_ctx = positions.iter().max().unwrap() + 1;
    let mut random = Random((n_head * head_dim) as u64);
    let n = n_head_kv * n_ctx * head_dim;
    let mut bytes = || {
        let mut bytes = vec![0; n * kv_type.value_bytes()];
        attention::append(cpu, kv_type, &random.floats(n), &mut bytes);
        bytes
    };
    let (keys, values) = (bytes(), bytes());
    let mut cache = DeviceCache::new(&device, kv_type, n_head_kv, n_ctx, head_dim).unwrap();
    {
        let (mut k, mut v) = cache.halves_mut();
        k.write(&keys).unwrap();
        v.write(&values).unwrap();
    }
    let mut scratch =
        AttendScratch::new(&device, n_head, n_head_kv, head_dim, n_ctx, kv_type, mode).unwrap();
    // values are at most 1; weights are right to about 1e-6, of queries that are rounded to 11 bits to about 1e-3
    let rounds = mode == ActivationMode::Q8 && kv_type == KvType::F16 && n_head / n_head_kv > 2;
    let bound = if rounds && [64, 128].contains(&head_dim) {
        2e-3
    } else {
        4e-6
    };
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shared_by = n_head / n_head_kv;
    // and one behind the cache, which is taken as its last
    for position in positions.iter().copied().chain([n_ctx]) {
        let q: Vec<f32> = random
            .floats(n_head * head_dim)
            .iter()
            .map(|q| 4.0 * q)
            .collect();
        let mut want = vec![0.0; n_head * head_dim];
        for kv in 0..n_head_kv {
            let head_bytes = n_ctx * kv_type.row_bytes(head_dim);
            let of = kv * head_bytes..(kv + 1) * head_bytes;
            let head = KvHead {
                kv_type,
                head_dim,
                k: &keys[of.clone()],
                v: &values[of],
            };
            let heads = kv * shared_by * head_dim..(kv + 1) * shared_by * head_dim;
            let queries = Queries {
                values: &q[heads.clone()],
                stride: heads.len(),
                n_tokens: 1,
                n_heads: shared_by,
                first_position: position.min(n_ctx - 1),
                window,
            };
            let mut states = vec![0.0; shared_by * attention::state_len(head_dim)];
            let width = heads.len();
            let mut out = StridedOut::from_slice(&mut want[heads], width, 1, 0..width);
            attention::attend(cpu, head, queries, scale, &mut states, &mut out);
        }
        let q = device.upload(&q).unwrap();
        let at = device.upload(&[position as u32]).unwrap();
        let mut first = None;
        for _ in 0..2 {
            let mut out = device.upload(&vec![f32::NAN; want.len()]).unwrap();
            let (scratch, out_view) = (&mut scratch, out.view_mut(..));
            attend(
                &stream,
                q.view(..),
                &cache,
                at.view(..),
                window,
                scale,
                scratch,
                out_view,
            )
            .unwrap();
            stream.synchronize().unwrap();
            let out = out.read().unwrap();
            for (i, (got, want)) in out.iter().zip(&want).enumerate() {
                let what = format!(
                    "{n_head}/{n_head_kv} heads of {head_dim} {kv_type} {mode} window {window:?} at {position}, value {i}"
                );
                assert_near(*got, *want, bound, &what);
            }
            assert_eq!(bits(first.get_or_insert(out.clone())), bits(&out));
        }
    }
}

#[test]
fn attention_is_near_the_scalar_one() {
    let shapes = [
        (1, 1, 8),
        (4, 4, 64),
        (3, 3, 128),
        (6, 3, 64),
        (9, 3, 80),
        (8, 1, 128),
        (64, 8, 128),
        (12, 1, 96),
        (20, 2, 32),
        (20, 2, 128),
        (9, 3, 64),
        (2, 1, 256),
        (8, 1, 512),
    ];
    for (n_head, n_head_kv, head_dim) in shapes {
        for (kv_type, mode) in KV_TYPES
            .into_iter()
            .flat_map(|kv_type| MODES.map(|mode| (kv_type, mode)))
        {
            let case = Case {
                n_head,
                n_head_kv,
                head_dim,
                kv_type,
                window: None,
                mode,
            };
            check_attention(&case, &[0, 1, 30, 255, 256, 700]);
        }
    }
}

#[test]
fn windows_and_long_contexts_are_near_the_scalar_ones() {
    // heads that share a key/value head with three others, and heads with one of their own
    for ((n_head_kv, window, positions), (shared_by, head_dim, kv_type, mode)) in [
        (2, Some(1), vec![0, 400]),
        (2, Some(100), vec![50, 99, 100, 1000]),
        (2, Some(100_000), vec![500]),
        (2, None, vec![6000]),
        (12, None, vec![6000]),
    ]
    .into_iter()
    .flat_map(|case| {
        [
            (1, 64, KvType::F16, ActivationMode::Q8),
            (1, 128, KvType::F16, ActivationMode::F32),
            (1, 128, KvType::F32, ActivationMode::Q8),
            (4, 64, KvType::F16, ActivationMode::F32),
            (4, 64, KvType::F16, ActivationMode::Q8),
        ]
        .map(|kernel| (case.clone(), kernel))
    }) {
        let case = Case {
            n_head: shared_by * n_head_kv,
            n_head_kv,
            head_dim,
            kv_type,
            window,
            mode,
        };
        check_attention(&case, &positions);
    }
}
