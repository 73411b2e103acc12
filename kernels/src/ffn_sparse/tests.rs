//! Every format, tier and split against the scalar specification, bit by bit.

use super::*;
use crate::activations::{ActBatch, ActivationMode};
use crate::cpu::{Cpu, Tier};
use crate::gemm::{gemm, gemv};
use crate::matrix::StridedOut;
use crate::testing::{Random, bits, pack};

const N_EMBD: usize = 512;
const N_NEURONS: usize = 64;

/// Records of (up row, down row), and the up rows as an interleaved matrix.
struct Ffn {
    quant: QuantType,
    records: Vec<u8>,
    matrix: (MatrixShape, Vec<u8>),
}

impl Ffn {
    fn new(quant: QuantType) -> Self {
        let file = Random(11).rows(quant, 2 * N_NEURONS, N_EMBD);
        let (_, records) = pack(quant, N_EMBD, Layout::Rows, &file);
        let ups: Vec<u8> = file
            .chunks_exact(quant.row_bytes(N_EMBD))
            .step_by(2)
            .flatten()
            .copied()
            .collect();
        Self {
            quant,
            records,
            matrix: pack(quant, N_EMBD, Layout::Interleaved, &ups),
        }
    }

    fn rows(&self, down: bool) -> NeuronRows<'_> {
        let row_bytes = self.quant.row_bytes(N_EMBD);
        NeuronRows {
            quant: self.quant,
            n_embd: N_EMBD,
            n_neurons: N_NEURONS,
            stride_bytes: 2 * row_bytes,
            offset_bytes: if down { row_bytes } else { 0 },
            bytes: &self.records,
        }
    }
}

fn cpus() -> Vec<Cpu> {
    let modes = [ActivationMode::F32, ActivationMode::Q8];
    let all = |tier| modes.map(|mode| Cpu::new(tier, mode).unwrap());
    Tier::available().into_iter().flat_map(all).collect()
}

fn batch(cpu: Cpu, n_tokens: usize) -> ActBatch {
    let mut random = Random(21);
    let mut x = ActBatch::new(cpu.mode(), N_EMBD, n_tokens);
    for t in 0..n_tokens {
        x.set(cpu, t, &random.activations(N_EMBD));
    }
    x
}

/// Activations of which about a third are open, `[n_tokens, N_NEURONS]`.
fn gates(n_tokens: usize) -> Vec<f32> {
    let mut random = Random(31);
    random
        .floats(n_tokens * N_NEURONS)
        .iter()
        .map(|g| (g - 0.3).max(0.0))
        .collect()
}

/// Unequal groups, some of them empty, over neurons 0 … N_NEURONS.
fn groups() -> Vec<GroupSpan> {
    let ends = [
        3, 3, 10, 14, 15, 20, 24, 33, 40, 41, 44, 50, 55, 60, 61, N_NEURONS,
    ];
    let mut start = 0;
    let spans = ends.into_iter().enumerate().map(|(group, end)| {
        let span = start..end;
        start = end;
        GroupSpan { group, span }
    });
    spans.collect()
}

/// The spans of `groups` as ranges of an ascending list of ids.
fn in_list(groups: &[GroupSpan], ids: &[u32]) -> Vec<GroupSpan> {
    let at = |id: usize| ids.partition_point(|&other| (other as usize) < id);
    let part = |g: &GroupSpan| GroupSpan {
        group: g.group,
        span: at(g.span.start)..at(g.span.end),
    };
    groups.iter().map(part).collect()
}

#[test]
fn up_of_single_rows_equals_the_matrix_product() {
    for quant in QuantType::ALL {
        let ffn = Ffn::new(quant);
        for cpu in cpus() {
            let x = batch(cpu, 1);
            let mut dense = vec![f32::NAN; N_NEURONS];
            let m = MatrixRef::new(ffn.matrix.0, &ffn.matrix.1);
            gemv(cpu, m, x.token(0), 0..N_NEURONS, &mut dense);
            let ids = [1, 2, 40, 63];
            let mut out = [f32::NAN; 4];
            up_active(
                cpu,
                ffn.rows(false),
                x.token(0),
                &ids,
                &[1.0; 4],
                &mut out,
                |_| (),
            );
            let expected = ids.map(|id| dense[id as usize]);
            assert_eq!(bits(&out), bits(&expected), "{quant} {cpu:?}");
        }
    }
}

#[test]
fn up_of_many_tokens_equals_up_of_one_and_skips_rows() {
    const N_TOKENS: usize = 5;
    for quant in QuantType::ALL {
        let ffn = Ffn::new(quant);
        for cpu in cpus() {
            let x = batch(cpu, N_TOKENS);
            let mut act = gates(N_TOKENS);
            for t in 0..N_TOKENS {
                act[t * N_NEURONS + 20..t * N_NEURONS + 25].fill(0.0);
            }
            let gate = act.clone();
            let mut scratch = UpScratch::new(N_TOKENS, N_NEURONS, quant.row_bytes(N_EMBD));
            let neurons = 8..N_NEURONS;
            let mut out = StridedOut::from_slice(&mut act, N_NEURONS, N_TOKENS, neurons.clone());
            let up = ffn.rows(false);
            let read = up_tokens(cpu, up, &x, 0..N_TOKENS, neurons, &mut out, &mut scratch);
            assert!(
                read <= N_NEURONS - 8 - 5,
                "closed neurons are not read: {read}"
            );
            for t in 0..N_TOKENS {
                for n in 8..N_NEURONS {
                    let g = gate[t * N_NEURONS + n];
                    let mut expected = [0.0];
                    if g != 0.0 {
                        up_active(
                            cpu,
                            up,
                            x.token(t),
                            &[n as u32],
                            &[g],
                            &mut expected,
                            |_| (),
                        );
                    }
                    let got = act[t * N_NEURONS + n];
                    assert_eq!(
                        got.to_bits(),
                        expected[0].to_bits(),
                        "{quant} {cpu:?} {t} {n}"
                    );
                }
            }
        }
    }
}

/// `down` of all groups for one token, columns in two parts of different size.
fn down(cpu: Cpu, ffn: &Ffn, act: &[f32], keep_closed: bool) -> Vec<f32> {
    let ids: Vec<u32> = (0..N_NEURONS as u32)
        .filter(|&id| keep_closed || act[id as usize] != 0.0)
        .collect();
    let a: Vec<f32> = ids.iter().map(|&id| act[id as usize]).collect();
    let spans = in_list(&groups(), &ids);
    let mut y = vec![f32::NAN; N_EMBD];
    for cols in [0..N_EMBD - 96, N_EMBD - 96..N_EMBD] {
        let part = &mut y[cols.clone()];
        down_active(cpu, ffn.rows(true), &ids, &a, &spans, cols, &mut [part]);
    }
    y
}

#[test]
fn down_gives_equal_bits_in_all_tiers_with_and_without_closed_neurons() {
    for quant in QuantType::ALL {
        let ffn = Ffn::new(quant);
        let act = gates(1);
        for cpu in cpus() {
            let scalar = Cpu::new(Tier::Scalar, cpu.mode()).unwrap();
            let expected = bits(&down(scalar, &ffn, &act, false));
            assert_eq!(
                bits(&down(cpu, &ffn, &act, false)),
                expected,
                "{quant} {cpu:?}"
            );
            assert_eq!(
                bits(&down(cpu, &ffn, &act, true)),
                expected,
                "dense {quant} {cpu:?}"
            );
        }
    }
}

#[test]
fn down_of_many_tokens_equals_down_of_one() {
    const N_TOKENS: usize = 70;
    for quant in QuantType::ALL {
        let ffn = Ffn::new(quant);
        let act = gates(N_TOKENS);
        for cpu in cpus() {
            for skip in [true, false] {
                let mut y = vec![f32::NAN; N_TOKENS * N_EMBD];
                for cols in [0..N_EMBD - 96, N_EMBD - 96..N_EMBD] {
                    let out = StridedOut::from_slice(&mut y, N_EMBD, N_TOKENS, cols.clone());
                    down_tokens(
                        cpu,
                        ffn.rows(true),
                        &act,
                        N_NEURONS,
                        &groups(),
                        cols,
                        skip,
                        &mut DownScratch::default(),
                        &mut [out],
                    );
                }
                for t in [0, 1, 63, 64, 69] {
                    let one = down(cpu, &ffn, &act[t * N_NEURONS..][..N_NEURONS], false);
                    let got = &y[t * N_EMBD..][..N_EMBD];
                    assert_eq!(
                        bits(got),
                        bits(&one),
                        "{quant} {cpu:?} token {t} skip {skip}"
                    );
                }
            }
        }
    }
}

#[test]
fn down_is_near_a_sum_in_double_precision() {
    for (quant, mode) in QuantType::ALL
        .into_iter()
        .flat_map(|quant| [(quant, ActivationMode::F32), (quant, ActivationMode::Q8)])
    {
        let ffn = Ffn::new(quant);
        let act = gates(1);
        let cpu = Cpu::detect(mode);
        let y = down(cpu, &ffn, &act, false);
        let mut row = vec![0.0; N_EMBD];
        let (mut exact, mut magnitude) = (vec![0.0f64; N_EMBD], vec![0.0f64; N_EMBD]);
        for (n, &a) in act.iter().enumerate() {
            ffn.rows(true).matrix(n).dequantize_row(0, &mut row);
            for (c, &w) in row.iter().enumerate() {
                exact[c] += f64::from(a) * f64::from(w);
                magnitude[c] += (f64::from(a) * f64::from(w)).abs();
            }
        }
        // of 16 neurons' contributions the largest is rounded by at most 1/254, and so are the others
        let rounded = cpu.mode() == ActivationMode::Q8 && quant == QuantType::Q4_0;
        let bound = if rounded { 16.0 / 254.0 } else { 1e-6 };
        for c in 0..N_EMBD {
            let error = (f64::from(y[c]) - exact[c]).abs();
            assert!(
                error <= bound * magnitude[c],
                "{quant} column {c}: {} {}",
                y[c],
                exact[c]
            );
        }
    }
}

#[test]
fn shares_of_groups_join_to_the_same_bits() {
    let ffn = Ffn::new(QuantType::Q4_0);
    let cpu = Cpu::detect(ActivationMode::Q8);
    let act = gates(1);
    let whole = down(cpu, &ffn, &act, false);
    for nodes in [2, 3, 4] {
        let ids: Vec<u32> = (0..N_NEURONS as u32).collect();
        let (mut trees, mut sums) = (Vec::new(), Vec::new());
        for node in 0..nodes {
            let share = node * FFN_GROUPS / nodes..(node + 1) * FFN_GROUPS / nodes;
            let own = subtrees(share.clone());
            let mut rows = vec![vec![f32::NAN; N_EMBD]; own.len()];
            let mut out: Vec<&mut [f32]> = rows.iter_mut().map(Vec::as_mut_slice).collect();
            down_active(
                cpu,
                ffn.rows(true),
                &ids,
                &act,
                &groups()[share],
                0..N_EMBD,
                &mut out,
            );
            trees.extend(own);
            sums.extend(rows);
        }
        let mut joined = vec![f32::NAN; N_EMBD];
        join_subtrees(&trees, |n| &sums[n], &mut joined);
        assert_eq!(bits(&joined), bits(&whole), "{nodes} nodes");
    }
}

#[test]
fn no_active_neuron_gives_zeros_and_gates_keep_nan() {
    let ffn = Ffn::new(QuantType::Q4_0);
    for cpu in cpus() {
        assert_eq!(down(cpu, &ffn, &[0.0; N_NEURONS], false), [0.0; N_EMBD]);
    }
    let (mut ids, mut values) = (Vec::new(), Vec::new());
    let gate = [0.5, -1.0, 0.0, f32::NAN, -0.0, f32::INFINITY];
    gate_active(&gate, 7, &mut ids, &mut values);
    assert_eq!(ids, [7, 10, 12]);
    assert!(values[1].is_nan());
}

#[test]
fn a_batch_through_the_matrix_equals_the_rows() {
    let ffn = Ffn::new(QuantType::Q8_0);
    let cpu = Cpu::detect(ActivationMode::Q8);
    let x = batch(cpu, 3);
    let m = MatrixRef::new(ffn.matrix.0, &ffn.matrix.1);
    let mut dense = vec![0.0; 3 * N_NEURONS];
    let out = StridedOut::from_slice(&mut dense, N_NEURONS, 3, 0..N_NEURONS);
    gemm(cpu, m, &x, 0..3, 0..N_NEURONS, out);
    let mut one = [0.0];
    up_active(
        cpu,
        ffn.rows(false),
        x.token(2),
        &[17],
        &[1.0],
        &mut one,
        |_| (),
    );
    assert_eq!(dense[2 * N_NEURONS + 17].to_bits(), one[0].to_bits());
}

#[test]
fn neurons_at_their_threshold_are_left_out_and_nan_never_is() {
    let values = [0.5, -0.5, 0.4, f32::NAN, -0.0, f32::INFINITY, 0.1, -3.0];
    let thresholds = [0.5, 0.4, 0.5, f32::MAX, 0.0, f32::MAX, 0.0, 3.5];
    let (mut ids, mut kept) = (vec![3], vec![9.0]);
    large_active(&values, &thresholds, 7, &mut ids, &mut kept);
    assert_eq!(ids, [3, 8, 10, 12, 13]);
    assert_eq!(kept[..2], [9.0, -0.5]);
    assert!(kept[2].is_nan() && kept[3].is_infinite() && kept[4] == 0.1);
    let mut many = values;
    assert_eq!(zero_small(&mut many, &thresholds), 4);
    let zeros = [true, false, true, false, true, false, false, true];
    for (n, zero) in zeros.into_iter().enumerate() {
        let unchanged = many[n].to_bits() == values[n].to_bits();
        assert!(
            if zero {
                many[n].to_bits() == 0
            } else {
                unchanged
            },
            "{n}"
        );
    }
}

#[test]
fn thresholds_of_one_and_of_many_tokens_give_the_same_bits() {
    let ffn = Ffn::new(QuantType::Q4_0);
    let thresholds = Random(41).floats(N_NEURONS);
    let thresholds: Vec<f32> = thresholds.iter().map(|t| t.abs() * 0.5).collect();
    for cpu in cpus() {
        let x = batch(cpu, 3);
        let mut gate = Random(43).floats(3 * N_NEURONS);
        crate::elementwise::silu_in_place(cpu, &mut gate);
        let up = ffn.rows(false);
        let mut act = gate.clone();
        act.chunks_exact_mut(N_NEURONS).for_each(|token| {
            zero_small(token, &thresholds);
        });
        let mut out = StridedOut::from_slice(&mut act, N_NEURONS, 3, 0..N_NEURONS);
        let mut scratch = UpScratch::new(3, N_NEURONS, up.row_bytes());
        up_tokens(cpu, up, &x, 0..3, 0..N_NEURONS, &mut out, &mut scratch);
        for t in 0..3 {
            let (mut ids, mut gates) = (vec![], vec![]);
            let gate = &gate[t * N_NEURONS..][..N_NEURONS];
            large_active(gate, &thresholds, 0, &mut ids, &mut gates);
            assert!((1..N_NEURONS).contains(&ids.len()), "{} kept", ids.len());
            let mut one = vec![f32::NAN; ids.len()];
            up_active(cpu, up, x.token(t), &ids, &gates, &mut one, |_| ());
            let mut want = vec![0.0; N_NEURONS];
            ids.iter()
                .zip(&one)
                .for_each(|(&id, &a)| want[id as usize] = a);
            let got = &act[t * N_NEURONS..][..N_NEURONS];
            assert_eq!(bits(got), bits(&want), "{cpu:?} token {t}");
        }
    }
}
