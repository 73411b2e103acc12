//! Marks of neurons that fired, their counts, and rows that go to other places.

use pi_kernels::cuda::{MARK_TOKENS, NeuronList, Scatter, count_marks, mark_active, mark_words};

use crate::common::{Random, device};

/// Activations of which about one in three is not zero; some are not numbers.
fn activations(n: usize, random: &mut Random) -> Vec<f32> {
    let mut one = || match random.below(12) {
        0..8 => [0.0, -0.0][random.below(2)],
        8 => f32::NAN,
        _ => random.float(),
    };
    (0..n).map(|_| one()).collect()
}

#[test]
fn marks_are_counted_once_a_token_and_neuron() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(5);
    let sizes = [1, 31, 33, 8192, 8193, 20_000];
    let first_words: Vec<usize> = (0..sizes.len())
        .map(|n| sizes[..n].iter().map(|n| mark_words(*n)).sum())
        .collect();
    let n_words: usize = sizes.iter().map(|n| mark_words(*n)).sum();
    let mut marks = device
        .upload(&vec![u32::MAX; MARK_TOKENS * n_words])
        .unwrap();
    let mut counts = device.upload(&vec![3u32; 32 * n_words]).unwrap();
    let mut want = vec![3u32; 32 * n_words];
    let mut tokens = 0u64;
    // 70 takes the place of 6; 130 is computed twice, the first time with other activations
    for (position, counted) in [
        (5usize, true),
        (6, false),
        (70, true),
        (127, true),
        (130, false),
        (130, true),
    ] {
        let at = device.upload(&[position as u32]).unwrap();
        for (n, first) in sizes.iter().zip(&first_words) {
            let act = activations(*n, &mut random);
            let listed = random.below(2) == 0;
            let ids: Vec<u32> = match listed {
                true => (0..*n as u32).filter(|_| random.below(3) == 0).collect(),
                false => (0..*n as u32).collect(),
            };
            for (j, id) in ids.iter().enumerate() {
                want[32 * first + *id as usize] += u32::from(counted && act[j] != 0.0);
            }
            let count = device.upload(&[ids.len() as u32]).unwrap();
            let mut padded = ids.clone();
            // what is behind the count is not looked at
            padded.resize(*n, 0);
            let padded = device.upload(&padded).unwrap();
            let act = device.upload(&act).unwrap();
            let list = match listed {
                true => NeuronList::Ids {
                    ids: padded.view(..),
                    count: count.view(..),
                },
                false => NeuronList::All,
            };
            let (act, position) = (act.view(..), at.view(..));
            mark_active(&stream, act, list, position, marks.view_mut(..), *first).unwrap();
            stream.synchronize().unwrap();
        }
        tokens |= u64::from(counted) << (position % MARK_TOKENS);
    }
    count_marks(&stream, marks.view(..), tokens, counts.view_mut(..)).unwrap();
    stream.synchronize().unwrap();
    let got = counts.read().unwrap();
    for (n, first) in sizes.iter().zip(&first_words) {
        let of_layer = 32 * first..32 * first + n;
        assert_eq!(got[of_layer.clone()], want[of_layer], "{n} neurons");
    }
}

#[test]
fn pieces_arrive_at_their_places_and_nothing_else_changes() {
    let Some(device) = device() else { return };
    let stream = device.stream().unwrap();
    let mut random = Random(6);
    let n = 100_000;
    let mut want: Vec<u8> = (0..n).map(|_| random.next() as u8).collect();
    let mut memory = device.upload(&want).unwrap();
    // room for less than all pieces, and for less than the largest
    let mut scatter = Scatter::new(&device, 1000, 7).unwrap();
    let mut pieces: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut at = 0;
    for len in (0..60).map(|n| [4, 16, 336, 0, 5000, 1000][n % 6]) {
        at += 4 * random.below(50);
        pieces.push((at, (0..len).map(|_| random.next() as u8).collect()));
        at += len;
    }
    assert!(at <= n, "all fit");
    pieces.reverse();
    for (at, bytes) in &pieces {
        want[*at..at + bytes.len()].copy_from_slice(bytes);
    }
    let given = pieces.iter().map(|(at, bytes)| (*at, &bytes[..]));
    scatter
        .write(&stream, given, &mut memory.view_mut(..))
        .unwrap();
    assert!(memory.read().unwrap() == want);
}
