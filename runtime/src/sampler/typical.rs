//! Locally typical sampling.

use super::candidates::Candidates;

/// Keeps the candidates whose surprise is closest to the entropy, until their mass exceeds `p`;
/// `p` ≥ 1 keeps all, and at least one stays.
///
/// Afterwards the order is that of typicality, not of the logits. Candidates of probability 0
/// add nothing to the entropy (llama.cpp's sum becomes NaN there).
///
/// Source: Meister et al. 2022, as llama.cpp's `typical` has it.
pub(super) fn typical(candidates: &mut Candidates, p: f32) {
    if p >= 1.0 {
        return;
    }
    candidates.sort();
    candidates.softmax();
    let entropy: f32 = candidates
        .items()
        .iter()
        .filter(|c| c.p > 0.0)
        .map(|c| -c.p * c.p.ln())
        .sum();
    for c in candidates.items_mut() {
        c.key = (-c.p.ln() - entropy).abs();
    }
    candidates.sort_by_key_field();
    let mut sum = 0.0f32;
    let mut n_kept = candidates.items().len();
    for (i, c) in candidates.items().iter().enumerate() {
        sum += c.p;
        if sum > p {
            n_kept = i + 1;
            break;
        }
    }
    candidates.truncate(n_kept, false);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(probabilities: &[f32], p: f32) -> Vec<u32> {
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut candidates = Candidates::with_capacity(logits.len());
        candidates.fill(&logits);
        typical(&mut candidates, p);
        candidates.items().iter().map(|c| c.id).collect()
    }

    #[test]
    fn keeps_the_surprise_closest_to_the_entropy() {
        // Entropy of [0.97, 0.01 ×3]: 0.1677. Distances: |0.0305 − 0.1677| = 0.137 for the
        // first, |4.605 − 0.168| = 4.44 for the others (llama.cpp's own test-sampling).
        assert_eq!(kept(&[0.97, 0.01, 0.01, 0.01], 0.5), [0]);
        // Entropy of [0.4, 0.2, 0.2, 0.2]: 0.3665 + 3·0.3219 = 1.3322. Distances: 0.9163 is
        // 0.4159 away, 1.6094 is 0.2772 away: the most probable one is *not* the most typical.
        assert_eq!(kept(&[0.4, 0.2, 0.2, 0.2], 0.5), [1, 2, 3]);
    }

    #[test]
    fn mass_must_exceed_p() {
        // 0.2 + 0.2 ≤ 0.45 < 0.6
        assert_eq!(kept(&[0.4, 0.2, 0.2, 0.2], 0.45), [1, 2, 3]);
        assert_eq!(kept(&[0.4, 0.2, 0.2, 0.2], 0.35), [1, 2]);
        assert_eq!(kept(&[0.4, 0.2, 0.2, 0.2], 0.0), [1]);
        assert_eq!(kept(&[0.4, 0.2, 0.2, 0.2], 1.0), [0, 1, 2, 3]);
    }

    #[test]
    fn an_impossible_candidate_does_not_spoil_the_entropy() {
        assert_eq!(kept(&[0.97, 0.01, 0.01, 0.0, 0.01], 0.5), [0]);
    }
}
