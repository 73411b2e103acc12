//! Rotation and attention of several tokens.

use pi_kernels::attention::{self, KvHead, KvType, Queries};
use pi_kernels::cuda::{
    Device, DeviceCache, RopeAppend, Stream, attend_batch, rope_append, rope_append_batch,
};
use pi_kernels::rope::{RopePairs, RopeScaling, RopeSpec, RopeTable};
use pi_kernels::{ActivationMode, StridedOut};

use crate::common::{MODES, Random, assert_near, bits, device, scalar};

const KV_TYPES: [KvType; 2] = [KvType::F16, KvType::F32];

#[test]
fn several_tokens_are_rotated_and_stored_like_one_by_one() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let (n_head, n_head_kv, head_dim, n_tokens, n_ctx) = (6, 2, 64, 7, 20);
    let table = RopeTable::new(RopeSpec {
        pairs: RopePairs::Halves,
        n_dims: 48,
        freq_base: 10000.0,
        scaling: RopeScaling::None,
    });
    // the last one's tokens go past the cache
    for first in [0, 5, n_ctx - 3] {
        let mut random = Random(first as u64);
        let (q_len, kv_len) = (n_head * head_dim, n_head_kv * head_dim);
        let (q, k, v) = (
            random.floats(n_tokens * q_len),
            random.floats(n_tokens * kv_len),
            random.floats(n_tokens * kv_len),
        );
        let mut rotation = vec![0.0; n_tokens * table.row_len()];
        for (t, row) in rotation.chunks_mut(table.row_len()).enumerate() {
            table.fill(first + t, row);
        }
        let run = |n_tokens_each: usize| {
            let mut cache =
                DeviceCache::new(&device, KvType::F16, n_head_kv, n_ctx, head_dim).unwrap();
            let upload = |values: &[f32]| device.upload(values).unwrap();
            let mut on_device = upload(&q);
            let (k, v, rotation) = (upload(&k), upload(&v), upload(&rotation));
            for t in (0..n_tokens).step_by(n_tokens_each) {
                let of = |len: usize| t * len..(t + n_tokens_each) * len;
                let at = device.upload(&[(first + t) as u32]).unwrap();
                let tokens = RopeAppend {
                    q: on_device.view_mut(of(q_len)),
                    k: k.view(of(kv_len)),
                    v: v.view(of(kv_len)),
                    rotation: rotation.view(of(table.row_len())),
                    pairs: RopePairs::Halves,
                    position: at.view(..),
                };
                match n_tokens_each {
                    1 => rope_append(&stream, tokens, &mut cache).unwrap(),
                    n => rope_append_batch(&stream, tokens, n, &mut cache).unwrap(),
                }
                stream.synchronize().unwrap();
            }
            let (keys, values) = (cache.keys().read().unwrap(), cache.values().read().unwrap());
            (bits(&on_device.read().unwrap()), keys, values)
        };
        let (together, apart) = (run(n_tokens), run(1));
        assert!(together == apart, "from {first}");
        assert!(together.1.iter().any(|&byte| byte != 0), "keys are written");
    }
}

struct Case {
    n_head: usize,
    n_head_kv: usize,
    head_dim: usize,
    kv_type: KvType,
    window: Option<usize>,
}

/// A cache on both sides.
struct Cache {
    keys: Vec<u8>,
    values: Vec<u8>,
    device: DeviceCache,
}

impl Case {
    fn cache(&self, device: &Device, n_ctx: usize) -> Cache {
        let mut random = Random((self.n_head * self.head_dim) as u64);
        let n = self.n_head_kv * n_ctx * self.head_dim;
        let mut bytes = || {
            let mut bytes = vec![0; n * self.kv_type.value_bytes()];
            let cpu = scalar(ActivationMode::F32);
            attention::append(cpu, self.kv_type, &random.floats(n), &mut bytes);
            bytes
        };
        let (keys, values) = (bytes(), bytes());
        let (heads, dim) = (self.n_head_kv, self.head_dim);
        let mut there = DeviceCache::new(device, self.kv_type, heads, n_ctx, dim).unwrap();
        let (mut k, mut v) = there.halves_mut();
        k.write(&keys).unwrap();
        v.write(&values).unwrap();
        Cache {
            keys,
            values,
            device: there,
        }
    }

    /// What the scalar kernel gives.
    fn want(
        &self,
        cache: &Cache,
        q: &[f32],
        n_tokens: usize,
        first: usize,
        scale: f32,
    ) -> Vec<f32> {
        let width = self.n_head * self.head_dim;
        let shared_by = self.n_head / self.n_head_kv;
        let head_bytes = cache.keys.len() / self.n_head_kv;
        let mut want = vec![0.0; n_tokens * width];
        for kv in 0..self.n_head_kv {
            let of = kv * head_bytes..(kv + 1) * head_bytes;
            let head = KvHead {
                kv_type: self.kv_type,
                head_dim: self.head_dim,
                k: &cache.keys[of.clone()],
                v: &cache.values[of],
            };
            let first_value = kv * shared_by * self.head_dim;
            let queries = Queries {
                values: &q[first_value..],
                stride: width,
                n_tokens,
                n_heads: shared_by,
                first_position: first,
                window: self.window,
            };
            let mut states = vec![0.0; 32 * shared_by * attention::state_len(self.head_dim)];
            let columns = first_value..first_value + shared_by * self.head_dim;
            let mut out = StridedOut::from_slice(&mut want, width, n_tokens, columns);
            let cpu = scalar(ActivationMode::F32);
            attention::attend(cpu, head, queries, scale, &mut states, &mut out);
        }
        want
    }

    /// Compares `(first position, tokens)` with the scalar kernel.
    fn check(&self, device: &Device, stream: &Stream, batches: &[(usize, usize)]) {
        let n_ctx = batches.iter().map(|&(first, n)| first + n).max().unwrap();
        let cache = self.cache(device, n_ctx);
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        for &(first, n_tokens) in batches {
            let mut random = Random(first as u64);
            let q = random.floats(n_tokens * self.n_head * self.head_dim);
            let q: Vec<f32> = q.iter().map(|q| 4.0 * q).collect();
            let want = self.want(&cache, &q, n_tokens, first, scale);
            let q = device.upload(&q).unwrap();
            let at = device.upload(&[first as u32]).unwrap();
            for mode in MODES {
                // weights are right to about 1e-6 and 1e-3, and values at most 1
                let bound = match mode {
                    ActivationMode::F32 => 4e-6,
                    ActivationMode::Q8 => 1.5e-3,
                };
                let mut before = None;
                for _ in 0..2 {
                    let mut out = device.upload(&vec![f32::NAN; want.len()]).unwrap();
                    attend_batch(
                        stream,
                        mode,
                        q.view(..),
                        n_tokens,
                        &cache.device,
                        at.view(..),
                        self.window,
                        scale,
                        out.view_mut(..),
                    )
                    .unwrap();
                    stream.synchronize().unwrap();
                    let got = out.read().unwrap();
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        let what = format!(
                            "{}/{} heads of {} {} window {:?} {mode}: {n_tokens} at {first}, value {i}",
                            self.n_head, self.n_head_kv, self.head_dim, self.kv_type, self.window
                        );
                        assert_near(*got, *want, bound, &what);
                    }
                    assert_eq!(bits(before.get_or_insert(got.clone())), bits(&got));
                }
            }
        }
    }
}

#[test]
fn attention_of_several_tokens_is_near_the_scalar_one() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let shapes = [
        (1, 1, 8),
        (4, 4, 64),
        (6, 3, 64),
        (9, 3, 80),
        (8, 1, 128),
        (16, 2, 128),
        (12, 1, 96),
        (20, 2, 32),
        (2, 1, 256),
        (3, 1, 200),
        (4, 1, 512),
    ];
    for (n_head, n_head_kv, head_dim) in shapes {
        for kv_type in KV_TYPES {
            let case = Case {
                n_head,
                n_head_kv,
                head_dim,
                kv_type,
                window: None,
            };
            case.check(&device, &stream, &[(0, 1), (0, 70), (31, 3), (300, 33)]);
        }
    }
}

#[test]
fn windows_and_long_contexts_are_near_the_scalar_ones() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for (window, batches) in [
        (Some(1), vec![(0, 40), (400, 5)]),
        (Some(20), vec![(0, 100), (333, 70)]),
        (Some(100_000), vec![(500, 9)]),
        (None, vec![(3000, 20)]),
    ] {
        for kv_type in KV_TYPES {
            let case = Case {
                n_head: 8,
                n_head_kv: 2,
                head_dim: 64,
                kv_type,
                window,
            };
            case.check(&device, &stream, &batches);
        }
    }
}
