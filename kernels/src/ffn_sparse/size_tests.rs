//! Rows of `Q4_0` of every length that kernels divide differently, against the scalar specification.

use super::*;
use crate::activations::{ActBatch, ActivationMode};
use crate::cpu::{Cpu, Tier};
use crate::gemm::gemv;
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
