//! A predictor's work beside the token's own launches: what it gives, and that these give what they give alone.

use pi_kernels::attention::KvType;
use pi_kernels::cuda::{
    Add, AttendScratch, AttendToken, BesideGates, DeviceAct, DeviceCache, Gates, ListMasks,
    PredictHidden, PredictMasks, ThenNorm, attend_token, attend_token_with, can_predict, gate_up,
    gate_up_with, gemv, gemv_then_norm, gemv_then_norm_with, mask_words, takes_pairs,
};
use pi_kernels::rope::RopePairs;
use pi_kernels::{ActBatch, ActivationMode, QuantType};

use crate::common::{
    Activations, List, Random, Rows, assert_near, bits, device, magnitude, scalar,
};

const Q8: ActivationMode = ActivationMode::Q8;

/// What nothing may be written to.
const UNTOUCHED: u32 = u32::MAX;

#[test]
fn hidden_values_are_made_beside_gates_and_ups() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N: usize = 700;
    let formats = [
        QuantType::Q4_0,
        QuantType::Q8_0,
        QuantType::Q4_K,
        QuantType::Q6_K,
    ];
    let columns = |quant| [512, 4096, 8192].map(|n_cols| (quant, n_cols));
    for (quant, n_cols) in formats.into_iter().flat_map(columns) {
        let gate = Rows::random(&device, 1, quant, N, n_cols);
        let up = Rows::random(&device, 2, quant, N, n_cols);
        let mut random = Random(n_cols as u64);
        let x = Activations::new(&stream, Q8, &random.activations(n_cols));
        let of_hidden = Activations::new(&stream, Q8, &random.activations(n_cols));
        for (n_listed, n_hidden, late) in [(0, 384, true), (97, 1, false), (N, 1000, true)] {
            let what = format!("{quant} [{N}, {n_cols}], {n_listed} listed, {n_hidden} hidden");
            let rows = Rows::random(&device, 3, QuantType::Q4_0, n_hidden, n_cols);
            let bias = device.upload(&random.floats(n_hidden)).unwrap();
            let add = match late {
                true => Add::Values(bias.view(..)),
                false => Add::None,
            };
            let ids: Vec<u32> = (0..n_listed as u32).collect();
            // there is room for all, of which the count takes some
            let list = List::new(&device, &[ids, vec![0; N - n_listed]].concat(), n_listed);
            let gates = Gates::ReluDense;
            assert!(takes_pairs(gate.shape, gates, Q8));
            let nothing = || device.upload(&vec![f32::NAN; N]).unwrap();
            let (mut alone, mut beside) = (nothing(), nothing());
            let of = &x.device;
            let (gate, up, list) = (gate.view(), up.view(), list.view());
            gate_up(&stream, gate, up, list, of, gates, alone.view_mut(..)).unwrap();
            let mut want = device.upload(&vec![f32::NAN; n_hidden]).unwrap();
            gemv(
                &stream,
                rows.view(),
                &of_hidden.device,
                add,
                want.view_mut(..),
            )
            .unwrap();
            let mut hidden = device.upload(&vec![f32::NAN; n_hidden]).unwrap();
            let with = BesideGates {
                hidden: Some(PredictHidden {
                    rows: rows.view(),
                    x: &of_hidden.device,
                    add,
                    out: hidden.view_mut(..),
                }),
                late,
            };
            let to = beside.view_mut(..);
            gate_up_with(&stream, gate, up, list, of, gates, with, to).unwrap();
            stream.synchronize().unwrap();
            let [alone, beside] = [alone, beside].map(|values| bits(&values.read().unwrap()));
            assert_eq!(alone, beside, "{what}");
            let [want, hidden] = [want, hidden].map(|values| values.read().unwrap());
            let of_x = of_hidden.effective(QuantType::Q4_0);
            for row in 0..n_hidden {
                let bound = 1e-6 * magnitude(&rows.values(row), &of_x) + 1e-6;
                assert_near(hidden[row], want[row], bound, &format!("{what}, row {row}"));
            }
            if n_cols < 8192 {
                assert_eq!(bits(&hidden), bits(&want), "{what}: rows by a warp each");
            }
        }
    }
}

/// A predictor's second product, whose scores are far from zero, so that the order of a sum decides nothing; and which are above.
struct Scores {
    rows: Rows,
    hidden: Vec<f32>,
    bias: Vec<f32>,
    above: Vec<bool>,
}

impl Scores {
    /// `share` of `n` are above zero; NaN makes all.
    fn new(device: &pi_kernels::cuda::Device, n: usize, n_hidden: usize, share: f64) -> Self {
        let rows = Rows::random(device, n as u64, QuantType::Q4_0, n, n_hidden);
        let mut random = Random(n_hidden as u64);
        let mut hidden = random.activations(n_hidden);
        if share.is_nan() {
            hidden[n_hidden / 2] = f32::NAN;
        }
        let rectified: Vec<f32> = (hidden.iter())
            .map(|h| if *h < 0.0 { 0.0 } else { *h })
            .collect();
        let mut x = ActBatch::new(Q8, n_hidden, 1);
        x.set(scalar(Q8), 0, &rectified);
        let x: Vec<f32> = (x.token(0).q.iter().enumerate())
            .map(|(c, q)| f32::from(*q) * x.token(0).scales[c / 32])
            .collect();
        let wants = |_| f64::from(random.float()) < 2.0 * share - 1.0;
        let above: Vec<bool> = (0..n).map(wants).collect();
        let bias = (above.iter().enumerate())
            .map(|(row, above)| {
                let w = rows.values(row);
                let terms = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                let product: f64 = terms.sum();
                let far = 1e-4 * magnitude(&w, &x) + 1e-3;
                (if *above { far } else { -far } - product) as f32
            })
            .collect();
        Self {
            rows,
            hidden,
            bias,
            above: above.iter().map(|above| *above || share.is_nan()).collect(),
        }
    }

    fn masks(&self) -> Vec<u32> {
        let mut masks = vec![0; mask_words(self.above.len())];
        for (i, _) in self.above.iter().enumerate().filter(|(_, above)| **above) {
            masks[i / 32] |= 1 << (i % 32);
        }
        masks
    }
}

#[test]
fn scores_are_made_beside_attention() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const N_CTX: usize = 400;
    // heads of their own, and shared ones on tensor cores
    let heads = [
        (4, 4, 64, KvType::F16),
        (32, 32, 128, KvType::F16),
        (3, 3, 128, KvType::F32),
        (4, 4, 64, KvType::F32),
        (16, 2, 64, KvType::F16),
        (64, 8, 128, KvType::F16),
    ];
    let shares = [0.1, 0.0, 0.9, f64::NAN];
    let sizes = [(1, 32), (63, 96), (11008, 384), (28672, 768), (5000, 1024)];
    let cases = sizes
        .iter()
        .flat_map(|size| shares.map(|share| (*size, share)));
    for (n_head, n_head_kv, head_dim, kv_type) in heads {
        let (n_q, n_kv) = (n_head * head_dim, n_head_kv * head_dim);
        let cache = || DeviceCache::new(&device, kv_type, n_head_kv, N_CTX, head_dim).unwrap();
        let scratch = || {
            AttendScratch::new(&device, n_head, n_head_kv, head_dim, N_CTX, kv_type, Q8).unwrap()
        };
        let act = || DeviceAct::new(&device, Q8, n_q).unwrap();
        let (mut caches, mut scratches) = ([cache(), cache()], [scratch(), scratch()]);
        let mut heads = [act(), act()];
        assert!(scratches[0].can_predict(1));
        let rotation = [vec![1.0f32; head_dim], vec![0.0; head_dim]].concat();
        let rotation = device.upload(&rotation).unwrap();
        for (position, ((n, n_hidden), share)) in cases.clone().enumerate() {
            // short contexts, and some that are divided
            let position = position * 19;
            let what = format!("{n_head} heads at {position}, [{n}, {n_hidden}], {share}");
            let scores = Scores::new(&device, n, n_hidden, share);
            let mut random = Random(position as u64);
            let [q, k, v] = [n_q, n_kv, n_kv].map(|n| device.upload(&random.floats(n)).unwrap());
            let at = device.upload(&[position as u32]).unwrap();
            let token = || AttendToken {
                q: q.view(..),
                k: k.view(..),
                v: v.view(..),
                rotation: rotation.view(..),
                pairs: RopePairs::Halves,
                position: at.view(..),
            };
            let (hidden, bias) = (
                device.upload(&scores.hidden).unwrap(),
                device.upload(&scores.bias).unwrap(),
            );
            // what was there is overwritten
            let mut masks = device.upload(&scores.masks()).unwrap();
            let wrong: Vec<u32> = scores.masks().iter().map(|mask| !mask).collect();
            if n % 32 == 0 {
                masks = device.upload(&wrong).unwrap();
            }
            let predict = PredictMasks {
                rows: scores.rows.view(),
                bias: bias.view(..),
                hidden: hidden.view(..),
                relu: true,
                masks: masks.view_mut(..),
            };
            let [one, two] = &mut caches;
            let [one_scratch, two_scratch] = &mut scratches;
            let [alone, beside] = &mut heads;
            attend_token(&stream, token(), one, None, 0.1, one_scratch, alone).unwrap();
            let predict = Some(predict);
            attend_token_with(
                &stream,
                token(),
                two,
                None,
                0.1,
                two_scratch,
                predict,
                beside,
            )
            .unwrap();
            stream.synchronize().unwrap();
            let read = |act: &DeviceAct| (bits(&act.values().read().unwrap()), act.read_q8());
            let (alone, beside) = (read(alone), read(beside));
            assert_eq!(alone.0, beside.0, "{what}");
            assert_eq!(alone.1.unwrap(), beside.1.unwrap(), "{what}");
            assert_eq!(masks.read().unwrap(), scores.masks(), "{what}");
        }
    }
}

#[test]
fn lists_are_made_beside_an_output_projection() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    const ROWS: usize = 4096;
    const COLUMNS: usize = 256;
    let m = Rows::random(&device, 7, QuantType::Q4_0, ROWS, COLUMNS);
    let mut random = Random(11);
    let x = Activations::new(&stream, Q8, &random.activations(COLUMNS));
    let base = random.floats(ROWS);
    let weight = device.upload(&random.floats(ROWS)).unwrap();
    let mut first = None;
    for (n, below) in [1, 31, 1000, 11008, 16384, 16385, 40000]
        .into_iter()
        .flat_map(|n| [0, 1, 5, 10].map(|below| (n, below)))
    {
        let named: Vec<u32> = (0..n).filter(|_| random.below(10) < below).collect();
        let mut masks = vec![0u32; mask_words(n as usize)];
        for id in &named {
            masks[*id as usize / 32] |= 1 << (id % 32);
        }
        let masks = device.upload(&masks).unwrap();
        let mut ids = device.upload(&vec![UNTOUCHED; n as usize]).unwrap();
        let mut count = device.upload(&[UNTOUCHED]).unwrap();
        let mut out = device.upload(&base).unwrap();
        let mut act = DeviceAct::new(&device, Q8, ROWS).unwrap();
        let then = ThenNorm {
            weight: weight.view(..),
            eps: 1e-5,
            to: &mut act,
            plain: None,
            not_finite: None,
        };
        let list = ListMasks {
            masks: masks.view(..),
            ids: ids.view_mut(..),
            count: count.view_mut(..),
        };
        let (rows, of, to) = (m.view(), &x.device, out.view_mut(..));
        match below {
            // nothing beside, for the bits
            0 if n == 1 => gemv_then_norm(&stream, rows, of, then, to).unwrap(),
            _ => gemv_then_norm_with(&stream, rows, of, then, Some(list), to).unwrap(),
        }
        stream.synchronize().unwrap();
        let out = (bits(&out.read().unwrap()), act.read_q8().unwrap());
        let what = format!("{} of {n}", named.len());
        assert_eq!(&out, first.get_or_insert_with(|| out.clone()), "{what}");
        if below == 0 && n == 1 {
            continue;
        }
        let (ids, count) = (ids.read().unwrap(), count.read().unwrap()[0] as usize);
        assert_eq!(count, named.len(), "{what}");
        assert_eq!(ids[..count], named, "{what}");
        assert!(ids[count..].iter().all(|id| *id == UNTOUCHED), "{what}");
    }
}

/// Predictors that no launch takes have their own.
#[test]
fn other_predictors_are_left_alone() {
    let Some(device) = device() else { return };
    let rows = |quant, n_rows, n_cols| Rows::random(&device, 1, quant, n_rows, n_cols).shape;
    let (a, b) = (
        rows(QuantType::Q4_0, 64, 256),
        rows(QuantType::Q4_0, 100, 64),
    );
    assert!(can_predict(a, b, Q8));
    assert!(!can_predict(a, b, ActivationMode::F32));
    assert!(!can_predict(a, rows(QuantType::Q8_0, 100, 64), Q8));
    assert!(!can_predict(rows(QuantType::Q8_0, 64, 256), b, Q8));
    assert!(!can_predict(a, rows(QuantType::Q4_0, 100, 1056), Q8));
    // heads of a size that few models have
    for (head_dim, can) in [(64, true), (96, false)] {
        let scratch = AttendScratch::new(&device, 8, 2, head_dim, 64, KvType::F16, Q8).unwrap();
        assert_eq!(scratch.can_predict(100), can, "heads of {head_dim}");
        // more than there is room for at once
        assert!(!scratch.can_predict(1 << 20), "heads of {head_dim}");
    }
}
