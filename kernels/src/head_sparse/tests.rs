use super::*;
use crate::activations::ActivationMode;
use crate::cpu::Tier;
use crate::gemm::gemv;
use crate::quant::QuantType;
use crate::testing::{Random, bits, pack};

/// Scores with ties, zeros of both signs and infinities, and NaN where asked for.
fn scores(random: &mut Random, n: usize, with_nan: bool) -> Vec<f32> {
    (0..n)
        .map(|_| match random.next() % 32 {
            0 => 0.0,
            1 => -0.0,
            2 => 0.5,
            3 if with_nan => f32::NAN,
            4 => f32::NEG_INFINITY,
            5 => -1e-42,
            _ => 8.0 * random.float(),
        })
        .collect()
}

fn cpus() -> impl Iterator<Item = Cpu> {
    let cpu = |tier| Cpu::new(tier, ActivationMode::Q8).unwrap();
    Tier::available().into_iter().map(cpu)
}

#[test]
fn the_candidates_are_those_that_a_sort_finds() {
    let mut random = Random(3);
    for n in [1, 15, 16, 17, 160, 1000, 4999] {
        for with_nan in [false, true] {
            let scores = scores(&mut random, n, with_nan);
            let mut best: Vec<f32> = scores
                .chunks(16)
                .map(|group| group.iter().copied().fold(f32::NEG_INFINITY, f32::max))
                .collect();
            for cpu in cpus() {
                let mut maxima = vec![f32::NAN; n.div_ceil(16)];
                group_maxima(cpu, &scores, &mut maxima);
                assert_eq!(maxima, best, "{n} scores, {}", cpu.tier());
            }
            best.sort_by(|a, b| b.total_cmp(a));
            for k in [1, 2, 7, best.len().div_ceil(2), best.len()] {
                let want = best.get(k - 1).copied().unwrap_or(f32::NEG_INFINITY);
                for cpu in cpus() {
                    let mut maxima = vec![f32::NAN; n.div_ceil(16)];
                    group_maxima(cpu, &scores, &mut maxima);
                    let threshold = kth_largest(cpu, &maxima, k);
                    assert_eq!(threshold, want, "{k} of {n}, {}", cpu.tier());
                    let mut ids = vec![7];
                    collect(&scores, &maxima, threshold, 1000, &mut ids);
                    let reached = |id: &u32| scores[*id as usize] >= want;
                    let expected: Vec<u32> =
                        (0..n as u32).filter(reached).map(|id| id + 1000).collect();
                    assert_eq!(ids[1..], expected, "{k} of {n}, {}", cpu.tier());
                    assert!(expected.len() >= k.min(expected.len()));
                }
            }
        }
    }
}

#[test]
fn the_kth_largest_of_fewer_is_reached_by_all() {
    for cpu in cpus() {
        assert_eq!(kth_largest(cpu, &[], 1), f32::NEG_INFINITY);
        assert_eq!(kth_largest(cpu, &[3.0, 1.0], 3), f32::NEG_INFINITY);
        assert_eq!(kth_largest(cpu, &[3.0, f32::INFINITY], 1), f32::INFINITY);
        assert_eq!(kth_largest(cpu, &[-3.0, -2.0, -2.0], 2), -2.0);
    }
}

#[test]
fn rows_one_by_one_have_the_bits_of_interleaved_ones() {
    for quant in QuantType::ALL {
        for mode in [ActivationMode::F32, ActivationMode::Q8] {
            let (n_rows, n_cols) = (61, 256);
            let rows = Random(5).rows(quant, n_rows, n_cols);
            let (shape, bytes) = pack(quant, n_cols, Layout::Interleaved, &rows);
            let interleaved = MatrixRef::new(shape, &bytes);
            let (shape, bytes) = pack(quant, n_cols, Layout::Rows, &rows);
            let m = MatrixRef::new(shape, &bytes);
            for tier in Tier::available() {
                let cpu = Cpu::new(tier, mode).unwrap();
                let mut x = ActBatch::new(mode, n_cols, 3);
                for token in 0..3 {
                    let values = Random(token as u64).activations(n_cols);
                    x.set(cpu, token, &values);
                }
                let mut all = vec![f32::NAN; 3 * n_rows];
                let out = StridedOut::from_slice(&mut all, n_rows, 3, 0..n_rows);
                all_logits(cpu, m, &x, 3, 0..n_rows, out);
                for token in 0..3 {
                    let mut want = vec![f32::NAN; n_rows];
                    gemv(cpu, interleaved, x.token(token), 0..n_rows, &mut want);
                    let got = &all[token * n_rows..(token + 1) * n_rows];
                    assert_eq!(bits(got), bits(&want), "{quant} {mode} {tier}");
                    let ids: Vec<u32> = (0..n_rows as u32).rev().step_by(3).collect();
                    let mut some = vec![f32::NAN; ids.len()];
                    candidate_logits(cpu, m, x.token(token), &ids, &mut some);
                    let want: Vec<f32> = ids.iter().map(|id| want[*id as usize]).collect();
                    assert_eq!(bits(&some), bits(&want), "{quant} {mode} {tier}");
                }
            }
        }
    }
}
