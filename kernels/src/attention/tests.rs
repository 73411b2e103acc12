//! Tiers against the specification, decode against prefill, bit by bit; all against f64.

use super::*;
use crate::simd::f32x16_scalar::Array;
use crate::simd::tests::{assert_same, cpus, extremes, scalar as spec};
use crate::testing::Random;

/// A cache of random rows and queries for it.
struct Case {
    kv_type: KvType,
    head_dim: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    k: Vec<u8>,
    v: Vec<u8>,
    queries: Vec<f32>,
    n_tokens: usize,
    n_heads: usize,
    first_position: usize,
    window: Option<usize>,
}

impl Case {
    /// Rows up to the last token's position; behind them NaN, which nobody may read into a result.
    fn new(
        random: &mut Random,
        kv_type: KvType,
        (head_dim, n_heads): (usize, usize),
        (first_position, n_tokens): (usize, usize),
        window: Option<usize>,
    ) -> Self {
        let n = (first_position + n_tokens) * head_dim;
        let (keys, values) = (random.floats(n), random.floats(n));
        let stride = n_heads * head_dim + 5;
        let queries = random
            .floats(n_tokens * stride)
            .into_iter()
            .map(|q| 4.0 * q)
            .collect();
        let mut case = Self {
            kv_type,
            head_dim,
            keys,
            values,
            k: vec![],
            v: vec![],
            queries,
            n_tokens,
            n_heads,
            first_position,
            window,
        };
        case.fill_cache();
        case
    }

    fn fill_cache(&mut self) {
        let bytes = |rows: &[f32]| {
            let row_bytes = self.kv_type.row_bytes(self.head_dim);
            let mut bytes = vec![0xff; self.kv_type.row_bytes(rows.len()) + 3 * row_bytes];
            let len = self.kv_type.row_bytes(rows.len());
            append(spec(), self.kv_type, rows, &mut bytes[..len]);
            bytes
        };
        (self.k, self.v) = (bytes(&self.keys), bytes(&self.values));
    }

    fn kv(&self) -> KvHead<'_> {
        KvHead {
            kv_type: self.kv_type,
            head_dim: self.head_dim,
            k: &self.k,
            v: &self.v,
        }
    }

    fn queries(&self) -> Queries<'_> {
        Queries {
            values: &self.queries,
            stride: self.n_heads * self.head_dim + 5,
            n_tokens: self.n_tokens,
            n_heads: self.n_heads,
            first_position: self.first_position,
            window: self.window,
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// All tokens at once, `block` of them together.
    fn prefill(&self, cpu: Cpu, block: usize) -> Vec<f32> {
        let width = self.n_heads * self.head_dim;
        let mut states = vec![f32::NAN; block * self.n_heads * state_len(self.head_dim)];
        let mut out = vec![f32::NAN; self.n_tokens * (width + 3)];
        let mut strided = StridedOut::from_slice(&mut out, width + 3, self.n_tokens, 1..width + 1);
        attend(
            cpu,
            self.kv(),
            self.queries(),
            self.scale(),
            &mut states,
            &mut strided,
        );
        out.chunks(width + 3)
            .flat_map(|row| row[1..=width].to_vec())
            .collect()
    }

    /// Token by token, chunk by chunk, the chunks in descending order.
    fn decode(&self, cpu: Cpu) -> Vec<f32> {
        let width = self.n_heads * self.head_dim;
        let len = self.n_heads * state_len(self.head_dim);
        let mut out = vec![f32::NAN; self.n_tokens * width];
        for (token, out) in out.chunks_exact_mut(width).enumerate() {
            let query = self.queries().block(token, 1);
            let chunks = query.chunks();
            let mut states = vec![f32::NAN; chunks.len() * len];
            for (chunk, states) in chunks.zip(states.chunks_exact_mut(len)).rev() {
                reset_states(states, self.head_dim);
                attend_chunk(cpu, self.kv(), query, chunk, self.scale(), states);
            }
            join_chunks(cpu, self.head_dim, &mut states, out);
        }
        out
    }

    /// Softmax(q·k) v in f64.
    fn naive(&self) -> Vec<f64> {
        let mut out = vec![];
        let dim = self.head_dim;
        let row = |rows: &[f32], p: usize| -> Vec<f64> {
            let round = |x: f32| match self.kv_type {
                KvType::F16 => half::f16::from_f32(x).to_f64(),
                KvType::F32 => f64::from(x),
            };
            rows[p * dim..(p + 1) * dim]
                .iter()
                .map(|&x| round(x))
                .collect()
        };
        for token in 0..self.n_tokens {
            let end = self.first_position + token + 1;
            let start = self.window.map_or(0, |window| end.saturating_sub(window));
            for head in 0..self.n_heads {
                let at = token * (self.n_heads * dim + 5) + head * dim;
                let query = &self.queries[at..at + dim];
                let mut sum = 0.0;
                let mut acc = vec![0.0; dim];
                for p in start..end {
                    let key = row(&self.keys, p);
                    let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * k).sum();
                    let weight = (dot / (dim as f64).sqrt()).exp();
                    sum += weight;
                    for (acc, v) in acc.iter_mut().zip(row(&self.values, p)) {
                        *acc += weight * v;
                    }
                }
                out.extend(acc.iter().map(|acc| acc / sum));
            }
        }
        out
    }

    fn name(&self, cpu: Cpu) -> String {
        let Self {
            kv_type,
            head_dim,
            n_heads,
            n_tokens,
            first_position,
            window,
            ..
        } = self;
        format!(
            "{kv_type} {n_heads}×{head_dim}, {n_tokens} tokens from {first_position}, \
             window {window:?}, {}",
            cpu.tier()
        )
    }
}

/// Shapes of heads, places in the chunks and windows that meet every branch.
fn cases() -> Vec<Case> {
    let mut random = Random(9);
    let mut cases = vec![];
    let shapes = [
        (64, 3),
        (64, 1),
        (2, 2),
        (16, 7),
        (30, 3),
        (80, 4),
        (96, 2),
        (100, 5),
        (128, 8),
    ];
    let spans = [(0, 1), (0, 9), (200, 70), (255, 2), (300, 1), (530, 4)];
    for (i, shape) in shapes.into_iter().enumerate() {
        for (j, span) in spans.into_iter().enumerate() {
            let window = [None, Some(1), Some(20), Some(270)][(i + j) % 4];
            let kv_type = if (i + j / 2) % 2 == 0 {
                KvType::F16
            } else {
                KvType::F32
            };
            cases.push(Case::new(&mut random, kv_type, shape, span, window));
        }
    }
    cases
}

#[test]
fn specification_is_near_softmax_in_f64() {
    for case in cases() {
        let got = case.prefill(spec(), 4);
        for (i, (got, want)) in got.iter().zip(case.naive()).enumerate() {
            let distance = (f64::from(*got) - want).abs();
            assert!(
                distance < 3e-6,
                "{}: value {i} is {got} for {want}",
                case.name(spec())
            );
        }
    }
}

#[test]
fn decode_and_prefill_of_every_tier_give_the_same_bits() {
    for case in cases() {
        let want = case.decode(spec());
        assert_same(&case.prefill(spec(), 5), &want, &case.name(spec()));
        for cpu in cpus() {
            assert_same(
                &case.decode(cpu),
                &want,
                &format!("{}, decode", case.name(cpu)),
            );
            for block in [1, 2, 7, 32] {
                let what = format!("{}, {block} together", case.name(cpu));
                assert_same(&case.prefill(cpu, block), &want, &what);
            }
        }
    }
}

#[test]
fn states_of_a_chunk_have_the_same_bits_in_every_tier() {
    for case in cases() {
        let (queries, len) = (case.queries(), state_len(case.head_dim));
        for chunk in queries.chunks() {
            let states = |attend: &dyn Fn(&mut [f32])| {
                let mut states = vec![f32::NAN; case.n_tokens * case.n_heads * len];
                reset_states(&mut states, case.head_dim);
                attend(&mut states);
                let used = states.chunks(len).flat_map(|state| {
                    let at = len - LANES;
                    let values = if state[at + 1] == 0.0 {
                        0
                    } else {
                        case.head_dim
                    };
                    [&state[..values], &state[at..at + 2]].concat()
                });
                used.collect::<Vec<f32>>()
            };
            let of =
                |cpu| states(&|s| attend_chunk(cpu, case.kv(), queries, chunk, case.scale(), s));
            let want = of(spec());
            for cpu in cpus() {
                assert_same(
                    &of(cpu),
                    &want,
                    &format!("{}, chunk {chunk}", case.name(cpu)),
                );
            }
            let got = states(&|s| {
                // SAFETY: arrays need no instructions; everything is as `attend_chunk` checks it.
                unsafe { vector::attend_chunk::<Array>(case.kv(), queries, chunk, case.scale(), s) }
            });
            assert_same(&got, &want, "arrays");
        }
    }
}

#[test]
fn overflow_and_nan_surface_alike_in_every_tier() {
    let mut random = Random(10);
    for kv_type in [KvType::F16, KvType::F32] {
        for round in 0..20 {
            let mut case = Case::new(&mut random, kv_type, (48, 3), (260, 3), None);
            let bad = extremes(&mut random, 60);
            let n = case.keys.len();
            for (i, bad) in bad.into_iter().enumerate() {
                let at = random.next() as usize % n;
                if i % 2 == round % 2 {
                    case.keys[at] = bad
                } else {
                    case.values[at] = bad
                }
            }
            case.fill_cache();
            let want = case.decode(spec());
            for cpu in cpus() {
                assert_same(&case.decode(cpu), &want, &case.name(cpu));
                assert_same(&case.prefill(cpu, 2), &want, &case.name(cpu));
            }
        }
    }
}

#[test]
fn a_nan_in_a_visible_key_spreads_and_in_a_hidden_one_does_not() {
    let mut random = Random(11);
    let mut case = Case::new(&mut random, KvType::F32, (64, 3), (10, 4), None);
    case.keys[12 * 64 + 5] = f32::NAN;
    case.fill_cache();
    for cpu in cpus() {
        let out = case.prefill(cpu, 4);
        assert!(
            out[..2 * 3 * 64].iter().all(|x| x.is_finite()),
            "positions 10 and 11"
        );
        assert!(
            out[2 * 3 * 64..].iter().all(|x| x.is_nan()),
            "positions 12 and 13"
        );
    }
}

#[test]
fn cached_values_are_rounded_to_nearest_even_in_every_tier() {
    let mut random = Random(12);
    for n in (0..40).chain([1000]) {
        let mut src = random.activations(n);
        src.extend([
            1.0 + 1.0 / 2048.0,
            1.0 + 3.0 / 2048.0,
            65519.9,
            65520.0,
            -1e-8,
            6e-8,
        ]);
        for cpu in cpus() {
            let mut dst = vec![0xaa; 2 * src.len()];
            append(cpu, KvType::F16, &src, &mut dst);
            for (bytes, &x) in dst.as_chunks().0.iter().zip(&src) {
                assert_eq!(
                    *bytes,
                    half::f16::from_f32(x).to_le_bytes(),
                    "{x} in {}",
                    cpu.tier()
                );
            }
            let mut dst = vec![0xaa; 4 * src.len()];
            append(cpu, KvType::F32, &src, &mut dst);
            for (bytes, x) in dst.as_chunks().0.iter().zip(&src) {
                assert_eq!(*bytes, x.to_le_bytes());
            }
        }
    }
}

#[test]
fn windows_and_chunks_say_what_is_visible() {
    let values = [0.0; 64];
    let queries = Queries {
        values: &values,
        stride: 2,
        n_tokens: 10,
        n_heads: 1,
        first_position: 508,
        window: Some(5),
    };
    assert_eq!(queries.visible(0), 504..509);
    assert_eq!(queries.chunks(), 1..3);
    assert_eq!(queries.visible_in(1, 0), 248..253);
    assert_eq!(queries.visible_in(1, 9), 256..256);
    assert_eq!(queries.visible_in(2, 5), 0..2);
    assert_eq!(queries.block(8, 2).chunks(), 2..3);
    assert_eq!(
        Queries {
            window: None,
            ..queries
        }
        .chunks(),
        0..3
    );
}

#[test]
#[should_panic(expected = "14 positions are cached")]
fn a_cache_that_ends_too_early_is_refused() {
    let mut case = Case::new(&mut Random(13), KvType::F16, (64, 1), (10, 4), None);
    case.v.truncate(13 * 128);
    case.prefill(spec(), 4);
}
