//! Choosing tokens.

use pi_kernels::ActivationMode;
use pi_kernels::cuda::{SampleScratch, TOP_K_MAX, argmax, top_k};

use crate::common::{Random, device, scalar};

/// Logits with equal values, NaN, infinities and both zeros.
fn logits(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    let mut one = || match random.below(50) {
        0 => f32::NAN,
        1 => f32::NEG_INFINITY,
        2 => 0.0,
        3 => -0.0,
        4..10 => 3.0,
        _ => 4.0 * random.float(),
    };
    (0..n).map(|_| one()).collect()
}

#[test]
fn the_largest_is_the_host_s() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n in [1, 2, 31, 1000, 1025, 32_000, 128_256] {
        let mut scratch = SampleScratch::new(&device, n).unwrap();
        let nothing = vec![f32::NAN; n];
        let zeros = vec![-0.0; n];
        for values in [logits(n, 1), logits(n, 2), nothing, zeros] {
            let on_device = device.upload(&values).unwrap();
            let mut id = device.upload(&[7u32]).unwrap();
            argmax(&stream, on_device.view(..), &mut scratch, id.view_mut(..)).unwrap();
            stream.synchronize().unwrap();
            let want = pi_kernels::elementwise::argmax(scalar(ActivationMode::F32), &values);
            let want = want.map_or(u32::MAX, |id| id as u32);
            assert_eq!(id.read().unwrap(), [want], "{n} logits");
        }
    }
}

#[test]
fn the_k_largest_are_in_order_and_equal_ones_by_index() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    for n in [1, 40, 1000, 1025, 32_000, 128_256] {
        let mut scratch = SampleScratch::new(&device, n).unwrap();
        let values = logits(n, n as u64);
        let mut order: Vec<usize> = (0..n).filter(|&i| !values[i].is_nan()).collect();
        order.sort_by(|&a, &b| {
            let larger = values[b].partial_cmp(&values[a]).expect("no NaN");
            larger.then(a.cmp(&b))
        });
        let on_device = device.upload(&values).unwrap();
        for k in [1, 2, 40, TOP_K_MAX] {
            let mut top = device.upload(&vec![f32::NAN; k]).unwrap();
            let mut ids = device.upload(&vec![7u32; k]).unwrap();
            let (top_view, ids_view) = (top.view_mut(..), ids.view_mut(..));
            top_k(
                &stream,
                on_device.view(..),
                &mut scratch,
                top_view,
                ids_view,
            )
            .unwrap();
            stream.synchronize().unwrap();
            let (top, ids) = (top.read().unwrap(), ids.read().unwrap());
            for j in 0..k {
                let want = order
                    .get(j)
                    .map_or((f32::NEG_INFINITY, u32::MAX), |&i| (values[i], i as u32));
                assert_eq!((top[j], ids[j]), want, "place {j} of {k}, {n} logits");
            }
        }
    }
}
