use super::planes::*;
use super::*;
use crate::activations::{ActBatch, ActivationMode};
use crate::cpu::{Cpu, Tier};
use crate::gemm::gemv;
use crate::matrix::{Layout, MatrixRef, ROW_GROUP};
use crate::quant::{BLOCK, QuantType};
use crate::testing::{Random, bits, pack};

/// Planes of random rows, and the rows.
struct Gates {
    shape: PlanesShape,
    rows: Vec<u8>,
    top: Vec<u8>,
    rest: Vec<u8>,
}

impl Gates {
    fn random(seed: u64, n_rows: usize, n_cols: usize) -> Self {
        let shape = PlanesShape { n_rows, n_cols };
        let rows = Random(seed).rows(QuantType::Q4_0, n_rows, n_cols);
        let mut gates = Self {
            shape,
            rows,
            top: vec![0xA5; shape.top_bytes()],
            rest: vec![0xA5; shape.rest_bytes()],
        };
        shape.pack(&gates.rows, 0, &mut gates.top, &mut gates.rest);
        gates
    }

    fn planes(&self) -> GatePlanes<'_> {
        GatePlanes::new(self.shape, &self.top, &self.rest)
    }
}

fn tiers() -> impl Iterator<Item = Cpu> {
    let all = [Tier::Scalar, Tier::Avx2, Tier::Avx512, Tier::Avx512Vnni];
    all.into_iter()
        .filter_map(|tier| Cpu::new(tier, ActivationMode::Q8).ok())
}

const SIZES: [(usize, usize); 4] = [(16, 32), (48, 288), (37, 576), (80, 1056)];

#[test]
fn planes_hold_the_rows_and_take_no_more_memory() {
    for (n_rows, n_cols) in SIZES {
        let gates = Gates::random(7, n_rows, n_cols);
        let row_bytes = QuantType::Q4_0.row_bytes(n_cols);
        for (row, expected) in gates.rows.chunks_exact(row_bytes).enumerate() {
            let mut out = vec![0x5A; row_bytes];
            gates.planes().file_row(row, &mut out);
            assert_eq!(out, expected, "row {row} of {n_rows} x {n_cols}");
        }
        let padded = n_rows.next_multiple_of(ROW_GROUP);
        assert_eq!(gates.shape.top_bytes(), padded * n_cols / BLOCK * 4);
        assert_eq!(gates.shape.rest_bytes(), n_rows * n_cols / BLOCK * 14);
    }
}

#[test]
fn scores_are_those_of_the_weights_signs_in_all_tiers() {
    for (n_rows, n_cols) in SIZES {
        let gates = Gates::random(11, n_rows, n_cols);
        let mut x = ActBatch::new(ActivationMode::Q8, n_cols, 1);
        let mut first: Option<(Vec<u32>, Vec<i16>)> = None;
        for cpu in tiers() {
            x.set(cpu, 0, &Random(5).activations(n_cols));
            let mut tables = vec![0xA5; gates.shape.table_bytes()];
            fill_tables(cpu, x.token(0), 0..gates.shape.n_blocks(), &mut tables);
            let mut scores = vec![f32::NAN; n_rows];
            let mut sums = vec![0; gates.shape.n_sums(n_rows)];
            // in two parts, as two threads would
            let half = n_rows / 2 / ROW_GROUP * ROW_GROUP;
            for rows in [half..n_rows, 0..half] {
                sign_scores(
                    cpu,
                    gates.planes(),
                    x.token(0),
                    &tables,
                    rows.clone(),
                    &mut scores[rows.clone()],
                    &mut sums[rows.start * gates.shape.sums_stride()..],
                );
            }
            // those of padding rows, and behind the last block, are nobody's
            let (stride, n_blocks) = (gates.shape.sums_stride(), gates.shape.n_blocks());
            let sums = sums.chunks_exact(stride).take(n_rows);
            let sums: Vec<i16> = sums.flat_map(|row| row[..n_blocks].to_vec()).collect();
            let got = (bits(&scores), sums);
            let expected = first.get_or_insert(got.clone());
            assert_eq!(&got, expected, "{} {n_rows} x {n_cols}", cpu.tier());
        }
        // and are what they mean
        let Some((scores, _)) = first else {
            panic!("no tier")
        };
        for (row, score) in scores.iter().enumerate() {
            let mut file = vec![0; QuantType::Q4_0.row_bytes(n_cols)];
            gates.planes().file_row(row, &mut file);
            let mut expected = 0.0;
            for (b, block) in file.chunks_exact(18).enumerate() {
                let negative = half::f16::from_le_bytes([block[0], block[1]]).is_sign_negative();
                for k in 0..BLOCK {
                    let byte = block[2 + k % 16];
                    let q = if k < 16 { byte & 15 } else { byte >> 4 };
                    let sign = if (q >= 8) != negative { 1.0 } else { -1.0 };
                    let x = x.token(0);
                    expected += sign * f64::from(x.q[b * BLOCK + k]) * f64::from(x.scales[b]);
                }
            }
            let score = f64::from(f32::from_bits(*score));
            assert!((score - expected).abs() < 0.001, "{score} for {expected}");
        }
    }
}

#[test]
fn gates_of_candidates_have_the_bits_of_the_whole_product() {
    for (n_rows, n_cols) in SIZES {
        let gates = Gates::random(23, n_rows, n_cols);
        let (shape, packed) = pack(QuantType::Q4_0, n_cols, Layout::Interleaved, &gates.rows);
        for cpu in tiers() {
            let mut x = ActBatch::new(ActivationMode::Q8, n_cols, 1);
            x.set(cpu, 0, &Random(9).activations(n_cols));
            let x = x.token(0);
            let mut expected = vec![0.0; n_rows];
            gemv(
                cpu,
                MatrixRef::new(shape, &packed),
                x,
                0..n_rows,
                &mut expected,
            );
            let mut tables = vec![0; gates.shape.table_bytes()];
            fill_tables(cpu, x, 0..gates.shape.n_blocks(), &mut tables);
            let first = if n_rows > 32 { 16 } else { 0 };
            let mut scores = vec![0.0; n_rows - first];
            let mut sums = vec![0; gates.shape.n_sums(n_rows)];
            let rows = first..n_rows;
            sign_scores(
                cpu,
                gates.planes(),
                x,
                &tables,
                rows,
                &mut scores,
                &mut sums,
            );
            let ids: Vec<u32> = (first as u32..n_rows as u32).step_by(3).collect();
            let mut out = vec![f32::NAN; ids.len()];
            plane_gates(cpu, gates.planes(), x, first, &sums, &ids, &mut out);
            let expected: Vec<f32> = ids.iter().map(|&id| expected[id as usize]).collect();
            assert_eq!(
                bits(&out),
                bits(&expected),
                "{} {n_rows} x {n_cols}",
                cpu.tier()
            );
        }
    }
}

#[test]
fn candidates_and_open_gates_are_kept_in_order_with_nan() {
    let mut ids = vec![99];
    let scores = [1.0, -1.0, f32::NAN, 0.0, -2.0];
    let bias = [-2.0, 1.5, 0.0, 0.0, 2.5];
    candidates(&scores, &bias, 10, &mut ids);
    assert_eq!(ids, [11, 12, 14], "a sum of zero is no candidate");

    let (mut ids, mut gates) = (vec![0, 1, 2, 3], vec![0.1, f32::NAN, 0.0, 0.5]);
    keep_open(&mut ids, &mut gates, Some(&[0.2, 9.0, -1.0, 0.4]));
    assert_eq!(ids, [1, 3]);
    let (mut ids, mut gates) = (vec![0, 1, 2], vec![0.1, -0.0, -1.0]);
    keep_open(&mut ids, &mut gates, None);
    assert_eq!((ids, gates), (vec![0], vec![0.1]));
}
