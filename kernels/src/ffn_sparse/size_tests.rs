//! Rows of `Q4_0` of every length that kernels divide differently, against the scalar specification.

use super::*;
use crate::activations::{ActBatch, ActivationMode};
use crate::cpu::{Cpu, Tier};
use crate::gemm::gemv;
use crate::matrix::StridedOut;
use crate::testing::{Random, bits, pack};

const N_NEURONS: usize = 40;
/// 1, 9, 17, 18, 24 and 33 blocks.
const WIDTHS: [usize; 6] = [32, 288, 544, 576, 768, 1056];

fn cpus() -> impl Iterator<Item = Cpu> {
    let all = Tier::available().into_iter();
    all.map(|tier| Cpu::new(tier, ActivationMode::Q8).unwrap())
}

/// One row a neuron.
fn neurons(n_embd: usize, bytes: &[u8]) -> NeuronRows<'_> {
    NeuronRows {
        quant: QuantType::Q4_0,
        n_embd,
        n_neurons: N_NEURONS,
        stride_bytes: QuantType::Q4_0.row_bytes(n_embd),
        offset_bytes: 0,
        bytes,
    }
}

fn groups_of_one(span: Range<usize>) -> Vec<GroupSpan> {
    let group = |group: usize| GroupSpan {
        group,
        span: if group == 0 { span.clone() } else { 0..0 },
    };
    (0..FFN_GROUPS).map(group).collect()
}

#[test]
fn rows_of_all_lengths_and_numbers_equal_the_matrix_product() {
    for n_embd in WIDTHS {
        let file = Random(3).rows(QuantType::Q4_0, N_NEURONS, n_embd);
        let (shape, matrix) = pack(QuantType::Q4_0, n_embd, Layout::Interleaved, &file);
        let (_, rows) = pack(QuantType::Q4_0, n_embd, Layout::Rows, &file);
        for cpu in cpus() {
            let mut x = ActBatch::new(cpu.mode(), n_embd, 1);
            x.set(cpu, 0, &Random(4).activations(n_embd));
            let mut all = vec![0.0; N_NEURONS];
            let m = MatrixRef::new(shape, &matrix);
            gemv(cpu, m, x.token(0), 0..N_NEURONS, &mut all);
            for n in [0, 1, 2, 3, 8, 9, 16, 17, 37] {
                let ids: Vec<u32> = (0..n as u32).map(|j| (j * 23 + 5) % 40).collect();
                let mut out = vec![f32::NAN; n];
                let mut beside = vec![];
                let ones = vec![1.0; n];
                let rows = neurons(n_embd, &rows);
                up_active(cpu, rows, x.token(0), &ids, &ones, &mut out, |j| {
                    beside.push(j);
                });
                let expected: Vec<f32> = ids.iter().map(|&id| all[id as usize]).collect();
                let case = format!("{} {n} rows of {n_embd}", cpu.tier());
                assert_eq!(bits(&out), bits(&expected), "{case}");
                assert_eq!(beside, (0..n).collect::<Vec<_>>(), "{case}");
            }
        }
    }
}

/// Down of the first `a.len()` neurons, all in one group, in each tier.
fn down_in_all_tiers(n_embd: usize, rows: &[u8], a: &[f32]) -> Vec<Vec<f32>> {
    let ids: Vec<u32> = (0..a.len() as u32).collect();
    down_of_ids(neurons(n_embd, rows), &ids, a)
}

/// Down of neurons `ids`, likewise.
fn down_of_ids(down: NeuronRows<'_>, ids: &[u32], a: &[f32]) -> Vec<Vec<f32>> {
    let n_embd = down.n_embd;
    let of_tier = |cpu: Cpu| {
        let mut out = vec![f32::NAN; n_embd];
        let groups = groups_of_one(0..ids.len());
        down_active(cpu, down, ids, a, &groups, 0..n_embd, &mut [&mut out]);
        out
    };
    cpus().map(of_tier).collect()
}

#[test]
fn down_of_full_runs_gives_equal_bits_in_strips_of_all_widths() {
    for n_embd in WIDTHS {
        let file = Random(5).rows(QuantType::Q4_0, N_NEURONS, n_embd);
        let (_, rows) = pack(QuantType::Q4_0, n_embd, Layout::Rows, &file);
        for n in [1, 2, 15, 16, 33, N_NEURONS] {
            let sums = down_in_all_tiers(n_embd, &rows, &Random(6).activations(n));
            for sum in &sums[1..] {
                assert_eq!(bits(sum), bits(&sums[0]), "{n} rows of {n_embd}");
            }
        }
    }
}

#[test]
fn down_is_right_where_its_integers_are_largest() {
    let n_embd = 544;
    // columns 0 … 15 of each block are 7, the others −8
    let block = |scale: f32| {
        let mut block = vec![0x0F; 18];
        block[..2].copy_from_slice(&half::f16::from_f32(scale).to_le_bytes());
        block
    };
    let row = block(0.5).repeat(n_embd / 32);
    let (_, rows) = pack(
        QuantType::Q4_0,
        n_embd,
        Layout::Rows,
        &row.repeat(N_NEURONS),
    );
    for sum in down_in_all_tiers(n_embd, &rows, &[1.0; 16]) {
        for (column, &y) in sum.iter().enumerate() {
            let expected = if column % 32 < 16 { 56.0 } else { -64.0 };
            assert!((y - expected).abs() < 1e-3, "column {column}: {y}");
        }
    }
}

#[test]
fn down_of_what_is_no_number_is_none_in_any_tier() {
    let n_embd = 288;
    let file = Random(7).rows(QuantType::Q4_0, N_NEURONS, n_embd);
    let (_, rows) = pack(QuantType::Q4_0, n_embd, Layout::Rows, &file);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut a = Random(8).activations(20);
        a[3] = bad;
        for sum in down_in_all_tiers(n_embd, &rows, &a) {
            assert!(sum.iter().all(|y| y.is_nan()), "{bad} is lost");
        }
    }
}

/// Ids of which 16 that are rounded together have one or two: lone ones before, between and behind pairs, in all numbers up to
/// `n_lone`.
fn sparse_ids(n_lone: u32) -> Vec<u32> {
    let (mut ids, mut run) = (vec![], 0);
    for n in 0..=n_lone {
        ids.extend((0..n).map(|k| 16 * (run + k) + (run + k) % 16));
        run += n;
        ids.extend([16 * run + 3, 16 * run + 9]);
        run += 1;
    }
    ids
}

#[test]
fn down_of_neurons_that_are_rounded_alone_gives_equal_bits() {
    let ids = sparse_ids(6);
    let n_neurons = *ids.last().unwrap() as usize + 1;
    for n_embd in WIDTHS {
        let file = Random(9).rows(QuantType::Q4_0, n_neurons, n_embd);
        let (_, rows) = pack(QuantType::Q4_0, n_embd, Layout::Rows, &file);
        let down = NeuronRows {
            n_neurons,
            ..neurons(n_embd, &rows)
        };
        let mut a = Random(10).activations(ids.len());
        // on both sides of where 127 / |a · d| is infinite; and nothing at all
        let small = [1e-37, -1e-37, 1e-36, -3e-35, 1e-34, 1e-45, 0.0, -0.0];
        for (a, small) in a.iter_mut().step_by(3).zip(small) {
            *a = small;
        }
        for n in 0..=ids.len() {
            let sums = down_of_ids(down, &ids[..n], &a[..n]);
            for sum in &sums[1..] {
                assert_eq!(bits(sum), bits(&sums[0]), "{n} rows of {n_embd}");
            }
        }
        let lone = ids
            .iter()
            .position(|&id| ids.iter().filter(|&&other| other / 16 == id / 16).count() == 1);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut a = a.clone();
            a[lone.unwrap()] = bad;
            for sum in down_of_ids(down, &ids, &a) {
                assert!(sum.iter().all(|y| y.is_nan()), "{bad} is lost");
            }
        }
    }
}

/// Down of all tokens of `act` at once, or of one after the other; rows of its neurons in groups that divide runs of 16.
fn down_of_tokens(cpu: Cpu, down: NeuronRows<'_>, act: &[f32], at_once: bool) -> Vec<f32> {
    let (n_neurons, n_embd) = (down.n_neurons, down.n_embd);
    let n_tokens = act.len() / n_neurons;
    let bound = |group: usize| n_neurons * group / FFN_GROUPS;
    let groups: Vec<GroupSpan> = (0..FFN_GROUPS)
        .map(|group| GroupSpan {
            group,
            span: bound(group)..bound(group + 1),
        })
        .collect();
    let mut y = vec![f32::NAN; n_tokens * n_embd];
    if at_once {
        let out = StridedOut::from_slice(&mut y, n_embd, n_tokens, 0..n_embd);
        let scratch = &mut DownScratch::default();
        down_tokens(
            cpu,
            down,
            act,
            n_neurons,
            &groups,
            0..n_embd,
            true,
            scratch,
            &mut [out],
        );
    } else {
        let ids: Vec<u32> = (0..n_neurons as u32).collect();
        for (a, y) in act.chunks_exact(n_neurons).zip(y.chunks_exact_mut(n_embd)) {
            down_active(cpu, down, &ids, a, &groups, 0..n_embd, &mut [y]);
        }
    }
    y
}

#[test]
fn down_of_many_tokens_gives_the_bits_of_one_for_few_and_many_open_neurons() {
    let n_neurons = 16 * 19 + 5;
    for n_embd in [32, 288, 1056] {
        let file = Random(12).rows(QuantType::Q4_0, n_neurons, n_embd);
        let (_, rows) = pack(QuantType::Q4_0, n_embd, Layout::Rows, &file);
        let down = NeuronRows {
            n_neurons,
            ..neurons(n_embd, &rows)
        };
        for (n_tokens, one_in) in [(70, 2), (70, 50), (17, 1), (9, 1), (33, 9)] {
            let mut act = Random(13).activations(n_tokens * n_neurons);
            let small = [1e-37, -1e-37, 1e-36, -3e-35, 1e-34, 1e-45, 0.0, -0.0];
            for (n, a) in act.iter_mut().enumerate() {
                if n * 7 % one_in != 0 {
                    *a = 0.0;
                } else if n % n_neurons < 48 {
                    // whole runs of what is rounded to nothing
                    *a = small[n % 8];
                }
            }
            let scalar = Cpu::new(Tier::Scalar, ActivationMode::Q8).unwrap();
            let expected = bits(&down_of_tokens(scalar, down, &act, false));
            for cpu in cpus() {
                let case = format!("{} {n_tokens} of {n_embd}, one in {one_in}", cpu.tier());
                let got = down_of_tokens(cpu, down, &act, true);
                assert_eq!(bits(&got), expected, "{case}");
            }
        }
    }
}

#[test]
fn down_of_many_tokens_is_no_number_where_and_only_where_one_is_none() {
    let n_embd = 288;
    let n_tokens = 20;
    let mut file = Random(14).rows(QuantType::Q4_0, N_NEURONS, n_embd);
    // neuron 7 has an infinite scale in its third block, neuron 30 one in its first that makes too much of a large activation
    let row_bytes = QuantType::Q4_0.row_bytes(n_embd);
    let mut set = |neuron: usize, block: usize, scale: f32| {
        let scale = half::f16::from_f32(scale).to_le_bytes();
        file[neuron * row_bytes + block * 18..][..2].copy_from_slice(&scale);
    };
    set(7, 2, f32::INFINITY);
    set(30, 0, 2.0);
    let (_, rows) = pack(QuantType::Q4_0, n_embd, Layout::Rows, &file);
    let down = neurons(n_embd, &rows);
    for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut act = Random(15).activations(n_tokens * N_NEURONS);
        for t in 0..n_tokens {
            act[t * N_NEURONS + 7] = if t == 3 { 1.0 } else { 0.0 };
        }
        act[18 * N_NEURONS + 30] = bad;
        for cpu in cpus() {
            let got = down_of_tokens(cpu, down, &act, true);
            for (at, y) in got.iter().enumerate() {
                let (t, c) = (at / n_embd, at % n_embd);
                let none = match t {
                    3 => (64..96).contains(&c),
                    18 => bad != f32::MAX || c < 32,
                    _ => false,
                };
                let tier = cpu.tier();
                assert_eq!(y.is_nan(), none, "{tier} {bad} token {t} column {c}: {y}");
            }
        }
    }
}
