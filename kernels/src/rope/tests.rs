//! Tiers against the specification, bit by bit; angles against closed forms in f64.

use super::*;
use crate::simd::tests::{assert_same, cpus, scalar};
use crate::testing::Random;

fn spec(pairs: RopePairs, n_dims: usize, scaling: RopeScaling) -> RopeSpec {
    RopeSpec {
        pairs,
        n_dims,
        freq_base: 10000.0,
        scaling,
    }
}

/// The row of a position: `[n_dims]` cosines, `[n_dims]` signed sines.
fn row(table: &RopeTable, position: usize) -> Vec<f32> {
    let mut row = vec![7.0; table.row_len()];
    table.fill(position, &mut row);
    row
}

/// Asserts that pair i is rotated by `position · frequencies[i]`, lengthened by `magnitude`.
fn assert_angles(table: &RopeTable, position: usize, frequencies: &[f64], magnitude: f64) {
    let n_dims = table.spec().n_dims;
    let row = row(table, position);
    for (i, frequency) in frequencies.iter().enumerate() {
        let (sin, cos) = (position as f64 * frequency).sin_cos();
        let j = i + n_dims / 2;
        let got = [row[i], row[j], row[n_dims + i], row[n_dims + j]];
        let want = [cos, cos, -sin, sin].map(|x| x * magnitude);
        for (got, want) in got.into_iter().zip(want) {
            assert!(
                (f64::from(got) - want).abs() < 1e-5,
                "pair {i} at {position}: {got}, {want}"
            );
        }
    }
}

fn frequencies(base: f64, n_dims: usize) -> Vec<f64> {
    (0..n_dims / 2)
        .map(|i| base.powf(-2.0 * i as f64 / n_dims as f64))
        .collect()
}

#[test]
fn angles_are_position_times_frequency() {
    let table = RopeTable::new(spec(RopePairs::Halves, 64, RopeScaling::None));
    for position in [0, 1, 7, 60] {
        assert_angles(&table, position, &frequencies(10000.0, 64), 1.0);
    }
}

#[test]
fn linear_scaling_divides_positions() {
    let scaling = RopeScaling::Linear { factor: 4.0 };
    let table = RopeTable::new(spec(RopePairs::Halves, 64, scaling));
    let slower: Vec<f64> = frequencies(10000.0, 64).iter().map(|f| f / 4.0).collect();
    assert_angles(&table, 50, &slower, 1.0);
}

#[test]
fn llama_3_divisors_are_those_of_the_published_formula() {
    let scaling = Llama3Scaling {
        factor: 32.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context: 8192.0,
    };
    let divisors = scaling.divisors(64, 500_000.0);
    // Llama 3.2, computed from wavelengths by an independent program
    let want = [
        (0, 1.0),
        (14, 1.0),
        (15, 1.651329),
        (16, 3.292262),
        (17, 9.666729),
        (18, 32.0),
        (31, 32.0),
    ];
    for (pair, want) in want {
        assert!(
            (divisors[pair] - want).abs() < 1e-5,
            "{pair}: {} for {want}",
            divisors[pair]
        );
    }
    let slower: Vec<f64> = frequencies(10000.0, 64)
        .iter()
        .zip(&divisors)
        .map(|(f, d)| f / f64::from(*d))
        .collect();
    let table = RopeTable::new(spec(
        RopePairs::Halves,
        64,
        RopeScaling::Divisors { divisors },
    ));
    assert_angles(&table, 50, &slower, 1.0);
}

#[test]
fn yarn_blends_pairs_as_published() {
    let table = RopeTable::new(spec(
        RopePairs::Halves,
        128,
        RopeScaling::Yarn(YarnScaling::new(16.0, 4096)),
    ));
    // frequencies and magnitude computed in f64 by an independent program
    let want = [
        (0, 1.0),
        (20, 0.0562341325),
        (21, 0.04694086),
        (30, 0.00852684377),
        (45, 0.000151771605),
        (46, 8.33450895e-05),
        (63, 7.2173874e-06),
    ];
    let row = row(&table, 40);
    for (pair, frequency) in want {
        let (sin, cos) = (40.0_f64 * frequency).sin_cos();
        let got = (f64::from(row[pair]), f64::from(row[128 + 64 + pair]));
        let want = (cos * 1.2772588722, sin * 1.2772588722);
        assert!(
            (got.0 - want.0).abs() < 1e-5,
            "cos of {pair}: {} for {}",
            got.0,
            want.0
        );
        assert!(
            (got.1 - want.1).abs() < 1e-5,
            "sin of {pair}: {} for {}",
            got.1,
            want.1
        );
    }
}

#[test]
fn yarn_without_extrapolation_is_linear_scaling() {
    let yarn = YarnScaling {
        ext_factor: 0.0,
        attn_factor: 1.5,
        ..YarnScaling::new(4.0, 2048)
    };
    let table = RopeTable::new(spec(RopePairs::Halves, 64, RopeScaling::Yarn(yarn)));
    let slower: Vec<f64> = frequencies(10000.0, 64).iter().map(|f| f / 4.0).collect();
    assert_angles(&table, 50, &slower, 1.5);
}

#[test]
fn both_orders_rotate_the_same_pairs() {
    let n_dims = 40;
    let x = Random(7).floats(n_dims);
    let halves = RopeTable::new(spec(RopePairs::Halves, n_dims, RopeScaling::None));
    let adjacent = RopeTable::new(spec(RopePairs::Adjacent, n_dims, RopeScaling::None));
    let mut head = x.clone();
    halves.apply(scalar(), &row(&halves, 11), &mut head, n_dims);
    let mut other: Vec<f32> = (0..n_dims).map(|d| x[d / 2 + d % 2 * n_dims / 2]).collect();
    adjacent.apply(scalar(), &row(&adjacent, 11), &mut other, n_dims);
    for i in 0..n_dims / 2 {
        let j = i + n_dims / 2;
        assert_eq!(
            [head[i], head[j]],
            [other[2 * i], other[2 * i + 1]],
            "pair {i}"
        );
        let angle = 11.0 * 10000f64.powf(-2.0 * i as f64 / n_dims as f64);
        let (a, b) = (f64::from(x[i]), f64::from(x[j]));
        let want = [
            a * angle.cos() - b * angle.sin(),
            a * angle.sin() + b * angle.cos(),
        ];
        assert!(
            (f64::from(head[i]) - want[0]).abs() < 1e-5,
            "first of pair {i}"
        );
        assert!(
            (f64::from(head[j]) - want[1]).abs() < 1e-5,
            "second of pair {i}"
        );
    }
}

#[test]
fn tiers_equal_the_specification_and_leave_other_dimensions_alone() {
    let mut random = Random(8);
    for pairs in [RopePairs::Adjacent, RopePairs::Halves] {
        for n_dims in [2, 6, 16, 30, 32, 48, 64, 80, 128] {
            let table = RopeTable::new(spec(pairs, n_dims, RopeScaling::None));
            let row = row(&table, 1234);
            for head_dim in [n_dims, n_dims + 10] {
                let heads = random.floats(3 * head_dim);
                let mut want = heads.clone();
                table.apply(scalar(), &row, &mut want, head_dim);
                for (want, head) in want.chunks(head_dim).zip(heads.chunks(head_dim)) {
                    assert_eq!(
                        want[n_dims..],
                        head[n_dims..],
                        "dimensions that are not rotated"
                    );
                    assert_ne!(want[..n_dims], head[..n_dims]);
                }
                for cpu in cpus() {
                    let mut got = heads.clone();
                    table.apply(cpu, &row, &mut got, head_dim);
                    let what = format!("{pairs:?} {n_dims} of {head_dim}, {}", cpu.tier());
                    assert_same(&got, &want, &what);
                }
            }
        }
    }
}
