use super::input::SketchInput;
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
    Tier::ALL
        .into_iter()
        .filter_map(|tier| Cpu::new(tier, ActivationMode::Q8).ok())
}

const SIZES: [(usize, usize); 7] = [
    (16, 32),
    (48, 288),
    (37, 576),
    (29, 608),
    (80, 1056),
    (41, 2048),
    (16, 1120),
];

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
fn groups_are_put_together_alike_by_every_tier() {
    for (n_rows, n_cols) in SIZES {
        let gates = Gates::random(8, n_rows, n_cols);
        let row_bytes = QuantType::Q4_0.row_bytes(n_cols);
        for first in (0..n_rows).step_by(ROW_GROUP) {
            let rows = first..(first + ROW_GROUP).min(n_rows);
            let expected: Vec<Vec<u8>> = (rows.clone())
                .map(|row| {
                    let mut out = vec![0; row_bytes];
                    gates.planes().file_row(row, &mut out);
                    out
                })
                .collect();
            for cpu in tiers() {
                let mut file = vec![0; ROW_GROUP * row_bytes];
                let mut image = vec![0xA5; ROW_GROUP * row_bytes];
                let planes = gates.planes();
                let m = planes.group(cpu, rows.clone(), &mut file, &mut image);
                for (r, expected) in expected.iter().enumerate() {
                    let mut row = Vec::new();
                    m.each_block(r, |_, bytes| row.extend_from_slice(bytes));
                    let what = cpu.tier();
                    assert_eq!(&row, expected, "{what:?}: row {} of {n_cols}", first + r);
                }
            }
        }
    }
}

/// The weights of `Q4_0` rows in file order, without their scales' lengths: q − 8, with the scale's sign.
fn codes(row: &[u8]) -> Vec<i32> {
    let block = |block: &[u8]| -> Vec<i32> {
        let negative = half::f16::from_le_bytes([block[0], block[1]]).is_sign_negative();
        let code = |k: usize| {
            let byte = block[2 + k % 16];
            let q = i32::from(if k < 16 { byte & 15 } else { byte >> 4 }) - 8;
            // a weight of 0 has the sign of its scale
            if negative { -2 * q - 1 } else { 2 * q + 1 }
        };
        (0..BLOCK).map(code).collect()
    };
    row.chunks_exact(18).flat_map(block).collect()
}

#[test]
fn sums_are_those_of_the_weights_first_bits_in_all_tiers() {
    for (n_rows, n_cols) in SIZES {
        let gates = Gates::random(11, n_rows, n_cols);
        let mut x = SketchInput::new(n_cols);
        x.set(&Random(3).activations(n_cols));
        let mut expected = [vec![], vec![]];
        for row in gates.rows.chunks_exact(QuantType::Q4_0.row_bytes(n_cols)) {
            let sum = |sketch: &dyn Fn(i32) -> i32| -> i32 {
                let products = codes(row).into_iter().zip(x.values());
                products.map(|(code, &x)| sketch(code) * i32::from(x)).sum()
            };
            expected[0].push(sum(&i32::signum));
            // codes are odd: ±1 … ±15, of which ±9 and more have the second bit
            expected[1].push(sum(&|code| {
                code.signum() * if code.abs() > 8 { 3 } else { 1 }
            }));
        }
        for cpu in tiers() {
            let mut sums = vec![i32::MIN; n_rows];
            // in two parts, as two threads would
            let half = n_rows / 2 / ROW_GROUP * ROW_GROUP;
            for rows in [half..n_rows, 0..half] {
                sign_sums(cpu, gates.planes(), &x, rows.clone(), &mut sums[rows]);
            }
            assert_eq!(sums, expected[0], "{} {n_rows} x {n_cols}", cpu.tier());
            let first = if n_rows > 32 { 16 } else { 0 };
            let ids: Vec<u32> = (first as u32..n_rows as u32).step_by(3).collect();
            let mut of_ids = vec![i32::MIN; ids.len()];
            sign_sums_of(cpu, gates.planes(), &x, &ids, &mut of_ids);
            let of_all: Vec<i32> = ids.iter().map(|&id| sums[id as usize]).collect();
            assert_eq!(of_ids, of_all, "{} {n_rows} x {n_cols}", cpu.tier());
            let mut two = vec![i32::MIN; ids.len()];
            two_bit_sums(
                cpu,
                gates.planes(),
                &x,
                first,
                &sums[first..],
                &ids,
                &mut two,
            );
            let expected: Vec<i32> = ids.iter().map(|&id| expected[1][id as usize]).collect();
            assert_eq!(two, expected, "{} {n_rows} x {n_cols}", cpu.tier());
        }
    }
}

#[test]
fn extreme_values_do_not_overflow() {
    let (n_rows, n_cols) = (16, 8192);
    // all bits, and a positive scale
    let block: Vec<u8> = [0x00, 0x3C].into_iter().chain([0xFF; 16]).collect();
    let rows = block.repeat(n_rows * n_cols / BLOCK);
    let shape = PlanesShape { n_rows, n_cols };
    let (mut top, mut rest) = (vec![0; shape.top_bytes()], vec![0; shape.rest_bytes()]);
    shape.pack(&rows, 0, &mut top, &mut rest);
    let planes = GatePlanes::new(shape, &top, &rest);
    let mut x = SketchInput::new(n_cols);
    for value in [2.0, -2.0] {
        x.set(&vec![value; n_cols]);
        let sum = n_cols as i32 * 127 * if value > 0.0 { 1 } else { -1 };
        for cpu in tiers() {
            let (mut sums, mut two) = ([0; 16], [0; 2]);
            sign_sums(cpu, planes, &x, 0..n_rows, &mut sums);
            assert_eq!(sums, [sum; 16], "{}", cpu.tier());
            sign_sums_of(cpu, planes, &x, &[3, 15], &mut two);
            assert_eq!(two, [sum; 2], "{}", cpu.tier());
            two_bit_sums(cpu, planes, &x, 0, &sums, &[3, 15], &mut two);
            assert_eq!(two, [3 * sum; 2], "{}", cpu.tier());
        }
    }
}

#[test]
fn rows_of_sketches_have_the_sums_as_products() {
    let (n_rows, n_cols) = (37, 576);
    let gates = Gates::random(5, n_rows, n_cols);
    let mut x = SketchInput::new(n_cols);
    let values = Random(4).activations(n_cols);
    x.set(&values);
    let integers: Vec<f32> = x.values().iter().map(|&q| f32::from(q)).collect();
    let ids: Vec<u32> = (0..n_rows as u32).collect();
    for cpu in tiers() {
        let f32s = Cpu::new(cpu.tier(), ActivationMode::F32).unwrap();
        let mut batch = ActBatch::new(ActivationMode::F32, n_cols, 1);
        batch.set(f32s, 0, &integers);
        let (mut sums, mut two) = (vec![0; n_rows], vec![0; n_rows]);
        sign_sums(cpu, gates.planes(), &x, 0..n_rows, &mut sums);
        two_bit_sums(cpu, gates.planes(), &x, 0, &sums, &ids, &mut two);
        for (bits, sums) in [(SketchBits::One, sums), (SketchBits::Two, two)] {
            let row_bytes = QuantType::Q4_0.row_bytes(n_cols);
            let mut rows = vec![0; n_rows * row_bytes];
            for (row, out) in rows.chunks_exact_mut(row_bytes).enumerate() {
                gates.planes().sketch_row(row, bits, out);
            }
            let (shape, packed) = pack(QuantType::Q4_0, n_cols, Layout::Interleaved, &rows);
            let (mut out, m) = (vec![0.0; n_rows], MatrixRef::new(shape, &packed));
            gemv(f32s, m, batch.token(0), 0..n_rows, &mut out);
            let sums: Vec<f32> = sums.iter().map(|&sum| sum as f32).collect();
            assert_eq!(out, sums, "{} {bits:?}", cpu.tier());
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
            let m = MatrixRef::new(shape, &packed);
            gemv(cpu, m, x, 0..n_rows, &mut expected);
            let ids: Vec<u32> = (0..n_rows as u32).step_by(3).collect();
            let mut out = vec![f32::NAN; ids.len()];
            plane_gates(cpu, gates.planes(), x, &ids, &mut out);
            let expected: Vec<f32> = ids.iter().map(|&id| expected[id as usize]).collect();
            let what = format!("{} {n_rows} x {n_cols}", cpu.tier());
            assert_eq!(bits(&out), bits(&expected), "{what}");
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

    let mut ids = vec![99];
    candidates_of_sums(&[4, -4, 2, 3], 0.5, &[-1.0, 2.5, -1.0, 0.0], 7, &mut ids);
    assert_eq!(ids, [7, 8, 10]);
    candidates_of_sums(&[-4], f32::NAN, &[0.0], 7, &mut ids);
    assert_eq!(ids, [7], "NaN stays");
    let mut ids = vec![0, 2, 3];
    keep_candidates(&mut ids, &[1, 2, 4], 0.5, &[-0.5, 9.0, 0.0, -1.0]);
    assert_eq!(ids, [2, 3]);

    let (mut ids, mut gates) = (vec![0, 1, 2, 3], vec![0.1, f32::NAN, 0.0, 0.5]);
    keep_open(&mut ids, &mut gates, Some(&[0.2, 9.0, -1.0, 0.4]));
    assert_eq!(ids, [1, 3]);
    let (mut ids, mut gates) = (vec![0, 1, 2], vec![0.1, -0.0, -1.0]);
    keep_open(&mut ids, &mut gates, None);
    assert_eq!((ids, gates), (vec![0], vec![0.1]));

    let mut ids = vec![99];
    let mut gates = [0.1, f32::NAN, 0.0, 0.5, -3.0];
    list_open(&mut gates, Some(&[0.2, 9.0, -1.0, 0.4, -5.0]), 7, &mut ids);
    assert_eq!(ids, [8, 10]);
    assert!(gates[1].is_nan() && gates[3] == 0.5);
    assert_eq!(bits(&[gates[0], gates[2], gates[4]]), [0; 3]);
    let mut gates = [0.1, -0.0, -1.0];
    list_open(&mut gates, None, 7, &mut ids);
    assert_eq!((&*ids, bits(&gates)), (&[7][..], bits(&[0.1, 0.0, 0.0])));
    let mut gates: Vec<f32> = (0..37).map(|n| n as f32 - 18.5).collect();
    list_open(&mut gates, Some(&[3.0; 37]), 100, &mut ids);
    assert!(ids.iter().copied().eq(122..137), "{ids:?}");
    assert!(gates[..22].iter().all(|gate| *gate == 0.0));
}
