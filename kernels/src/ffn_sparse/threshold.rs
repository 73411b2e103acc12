//! Neurons by how much they contribute: those below a threshold are left out.
//!
//! For gates that never close (SiLU, GELU). A neuron's value is act(gate), or act(gate) · up; it is small
//! when its magnitude is not above the neuron's threshold. NaN is never small, so that it surfaces.

fn is_small(value: f32, threshold: f32) -> bool {
    value.abs() <= threshold
}

/// Appends the ids (`first_id` + index) and values of those of `values` (`[n]` f32) that are not
/// small by `thresholds` (`[n]` f32).
///
/// # Panics
/// When the lengths differ.
pub fn large_active(
    values: &[f32],
    thresholds: &[f32],
    first_id: u32,
    ids: &mut Vec<u32>,
    kept: &mut Vec<f32>,
) {
    assert_eq!(values.len(), thresholds.len(), "a threshold for each value");
    // without branches: about half of them would be foretold wrongly
    let (first, first_kept) = (ids.len(), kept.len());
    ids.resize(first + values.len(), 0);
    kept.resize(first_kept + values.len(), 0.0);
    let mut n = 0;
    for (id, (&value, &threshold)) in (first_id..).zip(values.iter().zip(thresholds)) {
        ids[first + n] = id;
        kept[first_kept + n] = value;
        n += usize::from(!is_small(value, threshold));
    }
    ids.truncate(first + n);
    kept.truncate(first_kept + n);
}

/// Sets those of `values` (`[n]` f32) to 0 that are small by `thresholds` (`[n]` f32); returns how
/// many are not.
///
/// # Panics
/// When the lengths differ.
pub fn zero_small(values: &mut [f32], thresholds: &[f32]) -> u64 {
    assert_eq!(values.len(), thresholds.len(), "a threshold for each value");
    let mut n = 0;
    for (value, &threshold) in values.iter_mut().zip(thresholds) {
        let small = is_small(*value, threshold);
        *value = if small { 0.0 } else { *value };
        n += u64::from(!small);
    }
    n
}
