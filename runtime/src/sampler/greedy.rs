//! Temperature 0: the token with the highest logit.

/// Returns the index of the highest of `logits` (f32, `[n_vocab]`); the lowest index wins ties.
///
/// NaN counts as lower than everything; with nothing but NaN the answer is 0.
pub fn argmax(logits: &[f32]) -> u32 {
    const LANES: usize = 16;
    // Two steps so that the first, over everything, compiles to SIMD: the highest value, then
    // the first index that has it.
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = logits.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            // `f32::max` prefers the number where one side is NaN; so does this comparison
            *lane = if value > *lane { value } else { *lane };
        }
    }
    let mut highest = f32::NEG_INFINITY;
    for &value in lanes.iter().chain(rest) {
        if value > highest {
            highest = value;
        }
    }
    logits
        .iter()
        .position(|&value| value == highest)
        .unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_highest_wherever_it_is() {
        for n in [1, 2, 15, 16, 17, 31, 33, 100] {
            for at in 0..n {
                let mut logits: Vec<f32> = (0..n).map(|i| -(i as f32) - 5.0).collect();
                logits[at] = 1.0;
                assert_eq!(argmax(&logits), at as u32, "n {n}");
            }
        }
    }

    #[test]
    fn the_lowest_id_wins_ties() {
        let mut logits = vec![0.5f32; 40];
        assert_eq!(argmax(&logits), 0);
        logits[0] = 0.0;
        assert_eq!(argmax(&logits), 1);
        logits[20] = 3.0;
        logits[37] = 3.0;
        assert_eq!(argmax(&logits), 20);
    }

    #[test]
    fn nan_never_wins_and_infinities_order() {
        assert_eq!(argmax(&[f32::NAN, -2.0, f32::NAN, -1.0]), 3);
        assert_eq!(argmax(&[f32::NAN, f32::NAN]), 0);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), 1);
        assert_eq!(argmax(&[0.0, f32::INFINITY, 1.0]), 1);
    }
}
