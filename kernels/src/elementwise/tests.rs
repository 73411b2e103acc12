//! Tiers against the specification, bit by bit; the specification against f64.

use super::*;
use crate::simd::LANES;
use crate::simd::f32x16_scalar::Array;
use crate::simd::tests::{assert_same, cpus, extremes, scalar};
use crate::testing::Random;

/// Runs `kernel` on extreme and ordinary inputs of all lengths to 70, on dirty outputs, and
/// compares the tiers with the specification.
fn compare(what: &str, kernel: impl Fn(Cpu, &[f32], &[f32], &mut [f32])) {
    let mut random = Random(2);
    for n in (0..70).chain([1000]) {
        for extreme in [false, true] {
            let mut values = |n| {
                if extreme {
                    extremes(&mut random, n)
                } else {
                    random.activations(n)
                }
            };
            let (a, b, dirt) = (values(n), values(n), values(n));
            let mut want = dirt.clone();
            kernel(scalar(), &a, &b, &mut want);
            for cpu in cpus() {
                let mut got = dirt.clone();
                kernel(cpu, &a, &b, &mut got);
                assert_same(&got, &want, &format!("{what}, {} × {n}", cpu.tier()));
            }
        }
    }
}

#[test]
fn tiers_equal_the_specification() {
    compare("add_assign", |cpu, a, _, out| add_assign(cpu, out, a));
    compare("mul", mul);
    compare("silu_mul", silu_mul);
    compare("silu", |cpu, a, _, out| {
        out.copy_from_slice(a);
        silu_in_place(cpu, out);
    });
    compare("gelu_mul", gelu_mul);
    compare("gelu", |cpu, a, _, out| {
        out.copy_from_slice(a);
        gelu_in_place(cpu, out);
    });
    compare("relu_mul", relu_mul);
    compare("exp", |cpu, a, _, out| {
        out.copy_from_slice(a);
        exp_in_place(cpu, out);
    });
    compare("softmax", |cpu, a, _, out| {
        out.copy_from_slice(a);
        softmax_in_place(cpu, out);
    });
    compare("max, sum, exp_sum", |cpu, a, _, out| {
        let results = [
            max(cpu, a),
            sum(cpu, a),
            exp_sum_in_place(cpu, &mut a.to_vec(), 0.5),
        ];
        out.fill(0.0);
        for (out, result) in out.iter_mut().zip(results) {
            *out = result;
        }
    });
    compare("argmax, all_finite", |cpu, a, _, out| {
        out.fill(argmax(cpu, a).map_or(-1.0, |i| i as f32));
        if let Some(out) = out.first_mut() {
            *out = f32::from(all_finite(cpu, a));
        }
    });
}

#[test]
fn vector_algorithms_equal_the_specification_without_any_instruction_set() {
    let mut random = Random(3);
    let x = extremes(&mut random, 1000);
    let mut want = x.clone();
    scalar::exp_in_place(&mut want);
    let mut got = x.clone();
    // SAFETY: arrays need no instructions.
    unsafe { vector::exp_in_place::<Array>(&mut got) };
    assert_same(&got, &want, "exp");
    // SAFETY: as above; the lengths are equal.
    unsafe { vector::silu_mul::<Array>(&x, &x, &mut got) };
    scalar::silu_mul(&x, &x, &mut want);
    assert_same(&got, &want, "silu_mul");
    // SAFETY: as above.
    unsafe { vector::gelu_mul::<Array>(&x, &x, &mut got) };
    scalar::gelu_mul(&x, &x, &mut want);
    assert_same(&got, &want, "gelu_mul");
}

#[test]
fn exp_is_within_2_ulp_everywhere() {
    let mut worst = 0;
    let sweep = |start: f32, end: f32| (start.to_bits()..end.to_bits()).step_by(1009);
    for bits in sweep(0.0, 88.73).chain(sweep(-0.0, -104.5)) {
        let x = f32::from_bits(bits);
        let want = f64::from(x).exp() as f32;
        let distance = scalar::exp(x).to_bits().abs_diff(want.to_bits());
        assert!(
            distance <= 2,
            "exp({x:e}) is {:e}, should be {want:e}",
            scalar::exp(x)
        );
        worst = worst.max(distance);
    }
    println!("worst distance of exp: {worst} ulp");
}

#[test]
fn exp_of_special_values() {
    assert_eq!(scalar::exp(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(scalar::exp(-1e30).to_bits(), 0);
    assert_eq!(scalar::exp(-0.0), 1.0);
    assert_eq!(scalar::exp(0.0), 1.0);
    assert_eq!(scalar::exp(89.0), f32::INFINITY);
    assert_eq!(scalar::exp(f32::INFINITY), f32::INFINITY);
    assert!(scalar::exp(f32::NAN).is_nan());
}

#[test]
fn gates_follow_their_definitions() {
    let gate = [1.5f32, -2.0, 0.0, -0.0, 30.0, -100.0, f32::NAN, -1.0, 2.0];
    let up = [
        2.0f32,
        3.0,
        5.0,
        f32::INFINITY,
        -1.0,
        4.0,
        1.0,
        f32::NAN,
        f32::NAN,
    ];
    let relu = [3.0, 0.0, 0.0, 0.0, -30.0, 0.0, f32::NAN, 0.0, f32::NAN];
    for cpu in cpus() {
        let mut out = [7.0f32; 9];
        relu_mul(cpu, &gate, &up, &mut out);
        assert_same(&out, &relu, "relu_mul");
        silu_mul(cpu, &gate, &[2.0; 9], &mut out);
        for (i, &gate) in gate.iter().enumerate() {
            let power = match (-f64::from(gate)).exp() {
                too_large if too_large > f64::from(f32::MAX) => f64::INFINITY,
                power => power,
            };
            let want = f64::from(gate) / (1.0 + power) * 2.0;
            let near = (f64::from(out[i]) - want).abs() <= 1e-6 * want.abs();
            assert!(
                near || (want.is_nan() && out[i].is_nan()),
                "silu({gate}) · 2 is {}",
                out[i]
            );
        }
    }
}

/// By PyTorch 2.15 in f64: `gelu(x, approximate="tanh")`.
const GELU: [(f32, f64); 9] = [
    (-6.0, -8.439_648_979_674_53e-11),
    (-3.0, -0.003_637_392_081_772_994_3),
    (-1.0, -0.158_808_009_391_723_24),
    (-0.5, -0.154_285_990_174_856_06),
    (0.125, 0.068_717_198_624_223_39),
    (0.5, 0.345_714_009_825_143_94),
    (1.0, 0.841_191_990_608_276_8),
    (2.5, 2.484_915_733_910_001),
    (9.0, 9.0),
];

#[test]
fn gelu_is_its_tanh_form() {
    let tanh_form = |x: f32| {
        let x = f64::from(x);
        let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
        0.5 * x * (1.0 + u.tanh())
    };
    for (x, want) in GELU {
        let error = (tanh_form(x) - want).abs();
        assert!(error < 1e-12, "{x}: {error}");
    }
    let near = |x: f32, got: f32| {
        let want = tanh_form(x);
        let error = (f64::from(got) - want).abs();
        assert!(
            error <= 3e-7 * want.abs() + 1e-8,
            "gelu({x}) is {got}, not {want}"
        );
    };
    let listed = GELU.map(|(x, _)| x);
    let swept = (-12_000i16..12_000).map(|n| f32::from(n) / 1000.0);
    let x: Vec<f32> = listed.into_iter().chain(swept).collect();
    for cpu in cpus() {
        let (mut alone, mut doubled) = (x.clone(), vec![7.0; x.len()]);
        gelu_in_place(cpu, &mut alone);
        gelu_mul(cpu, &x, &vec![2.0; x.len()], &mut doubled);
        for ((&x, &got), &twice) in x.iter().zip(&alone).zip(&doubled) {
            near(x, got);
            assert_eq!(twice.to_bits(), (got * 2.0).to_bits(), "{x}");
        }
    }
}

#[test]
fn gelu_of_special_values() {
    for cpu in cpus() {
        let mut x = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, 0.0];
        gelu_in_place(cpu, &mut x);
        assert_same(
            &x,
            &[f32::INFINITY, f32::NAN, f32::NAN, 1e30, -0.0, 0.0],
            "gelu",
        );
    }
}

/// Largest relative error of a softmax of `n` values, in the order of its sums.
fn softmax_error(n: usize) -> f64 {
    const ROUNDING: f64 = 1.0 / (1 << 24) as f64;
    // 2 ulp from the nearest f32, half an ulp from the value, with 2 roundings to the ulp
    let exp = 5.0;
    // a lane's first addend is exact, and a tree of 4 levels joins the lanes
    let additions = (n.div_ceil(LANES) - 1 + 4) as f64;
    let division = 1.0;
    // a thousandth for products of these errors
    (exp + (exp + additions) + division) * ROUNDING * 1.001
}

#[test]
fn softmax_is_a_distribution() {
    let mut random = Random(4);
    for cpu in cpus() {
        for n in [1, 3, 16, 100, 49152] {
            let x: Vec<f32> = random.floats(n).into_iter().map(|x| 20.0 * x).collect();
            let largest = x.iter().copied().fold(f32::MIN, f32::max);
            let total: f64 = x.iter().map(|x| f64::from(x - largest).exp()).sum();
            let mut got = x.clone();
            softmax_in_place(cpu, &mut got);
            let error = softmax_error(n);
            for (got, x) in got.iter().zip(&x) {
                let want = f64::from(x - largest).exp() / total;
                assert!(
                    (f64::from(*got) - want).abs() <= error * want,
                    "{got} for {want}"
                );
            }
        }
        let mut bad = [1.0, f32::NAN, 2.0];
        softmax_in_place(cpu, &mut bad);
        assert!(bad.iter().all(|x| x.is_nan()), "NaN spreads: {bad:?}");
    }
}

#[test]
fn argmax_takes_the_lowest_index_and_never_nan() {
    for cpu in cpus() {
        let mut x = vec![-1.0; 40];
        [x[5], x[21], x[22]] = [3.0, 3.0, 2.9];
        assert_eq!(argmax(cpu, &x), Some(5));
        x[0] = f32::NAN;
        x[39] = f32::NAN;
        assert_eq!(argmax(cpu, &x), Some(5));
        assert_eq!(argmax(cpu, &[-0.0, 0.0]), Some(0));
        assert_eq!(argmax(cpu, &[f32::NAN, f32::NEG_INFINITY]), Some(1));
        assert_eq!(argmax(cpu, &[f32::NAN; 20]), None);
        assert_eq!(argmax(cpu, &[]), None);
    }
}

#[test]
fn all_finite_sees_a_bad_value_at_any_place() {
    for cpu in cpus() {
        for n in 1..50 {
            let mut x = vec![f32::MAX; n];
            assert!(all_finite(cpu, &x));
            for i in 0..n {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    x[i] = bad;
                    assert!(!all_finite(cpu, &x), "{bad} at {i} of {n}");
                }
                x[i] = -f32::MIN_POSITIVE;
            }
        }
    }
}
