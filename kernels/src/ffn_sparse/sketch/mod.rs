//! Sketches of gates: which neurons may have an open one, for less than all gates cost.
//!
//! A sketch scores all neurons; those whose score and bias together are above zero are
//! *candidates*, and only their gates are computed. Two kinds are here: the first bits of the gate
//! rows ([`planes`]), and any low-rank product (two matrices, see [`crate::gemm`]).

#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod input;
pub mod planes;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

/// Replaces `ids` by the ids (`first_id` + index) of neurons whose score and bias are together above
/// zero, ascending. NaN counts as a candidate, so that it surfaces.
///
/// # Panics
/// When there is not one bias per score.
pub fn candidates(scores: &[f32], bias: &[f32], first_id: u32, ids: &mut Vec<u32>) {
    assert_eq!(scores.len(), bias.len(), "one bias per score");
    list_positive(scores.iter().copied(), bias, first_id, ids);
}

/// Replaces `ids` by those of scores that are above zero with their bias, or NaN.
#[inline]
fn list_positive(
    scores: impl ExactSizeIterator<Item = f32>,
    bias: &[f32],
    first_id: u32,
    ids: &mut Vec<u32>,
) {
    ids.clear();
    ids.resize(scores.len(), 0);
    let mut kept = 0;
    for ((id, score), bias) in (first_id..).zip(scores).zip(bias) {
        ids[kept] = id;
        let out = score + bias <= 0.0;
        kept += usize::from(!out);
    }
    ids.truncate(kept);
}

/// [`candidates`] by integer `sums`, of which each is multiplied by `scale`.
///
/// # Panics
/// When there is not one bias per sum.
pub fn candidates_of_sums(
    sums: &[i32],
    scale: f32,
    bias: &[f32],
    first_id: u32,
    ids: &mut Vec<u32>,
) {
    assert_eq!(sums.len(), bias.len(), "one bias per sum");
    let scores = sums.iter().map(|&sum| sum as f32 * scale);
    list_positive(scores, bias, first_id, ids);
}

/// Keeps of `ids` those whose sum times `scale` and neuron's bias, `bias[id]`, are together above zero; NaN stays.
///
/// # Panics
/// When there is not one sum per id, or an id without a bias.
pub fn keep_candidates(ids: &mut Vec<u32>, sums: &[i32], scale: f32, bias: &[f32]) {
    assert_eq!(ids.len(), sums.len(), "one sum per id");
    let mut kept = 0;
    for (n, &sum) in sums.iter().enumerate() {
        let id = ids[n];
        ids[kept] = id;
        let out = sum as f32 * scale + bias[id as usize] <= 0.0;
        kept += usize::from(!out);
    }
    ids.truncate(kept);
}

/// Keeps of `ids` and `gates` those whose gate is above zero and the neuron's floor, `floors[id]`; NaN
/// stays.
///
/// # Panics
/// When there is not one gate per id, or an id without a floor.
pub fn keep_open(ids: &mut Vec<u32>, gates: &mut Vec<f32>, floors: Option<&[f32]>) {
    assert_eq!(ids.len(), gates.len(), "one gate per id");
    let mut kept = 0;
    for n in 0..ids.len() {
        let (id, gate) = (ids[n], gates[n]);
        let floor = floors.map_or(0.0, |floors| floors[id as usize].max(0.0));
        (ids[kept], gates[kept]) = (id, gate);
        let closed = gate <= floor;
        kept += usize::from(!closed);
    }
    ids.truncate(kept);
    gates.truncate(kept);
}

/// Gates that are compared at a time.
const LANES: usize = 16;

/// Zeroes `gates` that are not above zero and the neuron's floor (`floors[n]`, if there are any), and replaces `ids` by those (`first_id` +
/// index) of the others, ascending; NaN stays.
///
/// # Panics
/// When there is not one floor per gate.
pub fn list_open(gates: &mut [f32], floors: Option<&[f32]>, first_id: u32, ids: &mut Vec<u32>) {
    if let Some(floors) = floors {
        assert_eq!(gates.len(), floors.len(), "one floor per gate");
    }
    ids.clear();
    for (n, gates) in gates.chunks_mut(LANES).enumerate() {
        let mut lowest = [0.0; LANES];
        if let Some(floors) = floors {
            let floors = &floors[n * LANES..][..gates.len()];
            for (lowest, floor) in lowest.iter_mut().zip(floors) {
                *lowest = floor.max(0.0);
            }
        }
        // a bit for each that is open, without a branch
        let mut open = 0u32;
        for (k, (gate, lowest)) in gates.iter_mut().zip(&lowest).enumerate() {
            let closed = *gate <= *lowest;
            *gate = if closed { 0.0 } else { *gate };
            open |= u32::from(!closed) << k;
        }
        let first = first_id + (n * LANES) as u32;
        while open != 0 {
            ids.push(first + open.trailing_zeros());
            open &= open - 1;
        }
    }
}
