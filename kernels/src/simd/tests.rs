//! Every tier's vectors against the array of lanes, and the array against plain expectations.
//!
//! The helpers are shared by the tests of all kernels over vectors.

use half::f16;

use super::f32x16_scalar::Array;
use super::{F32x16, LANES, by_tier};
use crate::activations::ActivationMode;
use crate::cpu::{Cpu, Tier};
use crate::testing::Random;

/// One `Cpu` for each tier of this machine, the scalar one first.
pub(crate) fn cpus() -> Vec<Cpu> {
    let cpu = |tier| Cpu::new(tier, ActivationMode::F32).unwrap();
    Tier::available().into_iter().map(cpu).collect()
}

/// The tier that is the specification.
pub(crate) fn scalar() -> Cpu {
    Cpu::new(Tier::Scalar, ActivationMode::F32).unwrap()
}

/// Asserts equal bits; any NaN equals any other.
#[track_caller]
pub(crate) fn assert_same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let same = got.to_bits() == want.to_bits() || (got.is_nan() && want.is_nan());
        assert!(same, "{what}: value {i} is {got:e}, should be {want:e}");
    }
}

/// Ordinary values with zeros of both signs, subnormals, huge ones, infinities and NaN between.
pub(crate) fn extremes(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n)
        .map(|_| match random.next() % 24 {
            0 => 0.0,
            1 => -0.0,
            2 => 1e-41 * random.float(),
            3 => f32::MAX * random.float(),
            4 => f32::INFINITY.copysign(random.float()),
            5 => f32::NAN,
            6 => 100.0 * random.float(),
            _ => random.float(),
        })
        .collect()
}

const N_RESULTS: usize = 15;

/// All operations on lanes, 16 results each.
///
/// # Safety
/// The machine has V's instructions; `a`, `b` and `c` hold 16 values, `out` those of all results.
#[inline(always)]
unsafe fn all_lane_operations<V: F32x16>(a: &[f32], b: &[f32], c: &[f32], out: &mut [f32]) {
    // SAFETY: the contract.
    unsafe {
        let [a, b, c] = [a, b, c].map(|x| V::load(x.as_ptr()));
        let mut to = out.as_mut_ptr();
        let n = b.mul(V::splat(60.0)).round();
        for v in [
            a.add(b),
            a.sub(b),
            a.mul(b),
            a.div(b),
            a.fma(b, c),
            a.max(b),
            a.min(b),
            a.round(),
            a.zero_unless_positive(b),
            a.swap_pairs(),
            V::splat(1.37).mul_pow2(n),
            V::splat(f32::NAN).mul_pow2(n),
        ] {
            v.store(to);
            to = to.add(LANES);
        }
        let mut folds = [a.fold(); 8];
        for (i, fold) in folds.iter_mut().enumerate() {
            *fold = a.mul(V::splat(i as f32)).add(b).fold();
        }
        V::store_sums(folds, to);
        a.store_first(to.add(LANES), 3);
        let scalars = to.add(2 * LANES);
        scalars.write(a.sum());
        scalars.add(1).write(V::splat(0.5).max(a).max_lane());
    }
}

fn all_lane_operations_in_order(a: &[f32], b: &[f32], c: &[f32], out: &mut [f32]) {
    // SAFETY: arrays need no instructions; the lengths fit.
    unsafe { all_lane_operations::<Array>(a, b, c, out) }
}

#[test]
fn operations_of_every_tier_equal_those_of_arrays() {
    let mut random = Random(1);
    for round in 0..2000 {
        let mut values = || {
            if round % 2 == 0 {
                random.floats(LANES)
            } else {
                extremes(&mut random, LANES)
            }
        };
        let (a, c) = (values(), values());
        let b = random.floats(LANES);
        let mut want = vec![7.0; N_RESULTS * LANES];
        all_lane_operations_in_order(&a, &b, &c, &mut want);
        for cpu in cpus() {
            let mut got = vec![7.0; N_RESULTS * LANES];
            let out = &mut got[..];
            let (a, b, c) = (&a[..], &b[..], &c[..]);
            by_tier!(
                cpu,
                all_lane_operations_in_order,
                all_lane_operations,
                (a: &[f32], b: &[f32], c: &[f32], out: &mut [f32])
            );
            assert_same(&got, &want, cpu.tier().name());
        }
    }
}

#[test]
fn lanes_are_joined_by_the_documented_tree() {
    let x: [f32; LANES] = std::array::from_fn(|j| [1e8, 3.0, -1e8, 0.7][j % 4] * (j + 1) as f32);
    let eight: [f32; 8] = std::array::from_fn(|j| x[j] + x[j + 8]);
    let four: [f32; 4] = std::array::from_fn(|j| eight[j] + eight[j + 4]);
    let want = (four[0] + four[2]) + (four[1] + four[3]);
    // SAFETY: arrays need no instructions; 16 values are there.
    let got = unsafe { Array::load(x.as_ptr()).sum() };
    assert_eq!(got.to_bits(), want.to_bits());
    assert_eq!(
        crate::elementwise::scalar::join_lanes(x, |a, b| a + b).to_bits(),
        want.to_bits()
    );
}

/// Converts f16 to f32 and back, 16 at a time, then the first `n` of 16.
///
/// # Safety
/// The machine has V's instructions; all hold as many values as `bits`, at least 16.
#[inline(always)]
unsafe fn through_f16<V: F32x16>(bits: &[u16], wide: &mut [f32], back: &mut [u16], n: usize) {
    for i in (0..bits.len()).step_by(LANES) {
        // SAFETY: the contract; lengths are multiples of 16.
        unsafe {
            let v = V::load_f16(bits.as_ptr().add(i));
            v.store(wide.as_mut_ptr().add(i));
            v.store_f16(back.as_mut_ptr().add(i));
        }
    }
    // SAFETY: at least 16 values are there.
    unsafe {
        V::load_f16_first(bits.as_ptr(), n).store(wide.as_mut_ptr());
        V::splat(1.0).store_f16_first(back.as_mut_ptr(), n);
        if n == 0 {
            V::load(wide.as_ptr()).store_first(wide.as_mut_ptr(), n);
        }
    }
}

fn through_f16_in_order(bits: &[u16], wide: &mut [f32], back: &mut [u16], n: usize) {
    for (i, &b) in bits.iter().enumerate() {
        wide[i] = f16::from_bits(b).to_f32();
        back[i] = f16::from_f32(wide[i]).to_bits();
    }
    wide[n..LANES].fill(0.0);
    back[..n].fill(f16::from_f32(1.0).to_bits());
}

#[test]
fn every_f16_converts_alike() {
    // a NaN's payload is not specified
    let bits: Vec<u16> = (0..=u16::MAX)
        .filter(|&b| !f16::from_bits(b).is_nan())
        .collect();
    let bits = &bits[..bits.len() - bits.len() % LANES];
    for n in [0, 1, 5, 15] {
        let (mut want, mut want_back) = (vec![7.0; bits.len()], vec![7; bits.len()]);
        through_f16_in_order(bits, &mut want, &mut want_back, n);
        for cpu in cpus() {
            let (mut got, mut got_back) = (vec![9.0; bits.len()], vec![9; bits.len()]);
            let (wide, back) = (&mut got[..], &mut got_back[..]);
            by_tier!(
                cpu,
                through_f16_in_order,
                through_f16,
                (bits: &[u16], wide: &mut [f32], back: &mut [u16], n: usize)
            );
            assert_same(&got, &want, cpu.tier().name());
            assert_eq!(got_back, want_back, "{}", cpu.tier());
        }
    }
}
