//! Top-k, top-p and min-p: keep the best candidates.

use super::candidates::Candidates;

/// The front that top-p sorts first: it seldom needs more.
const TOP_P_FRONT: usize = 256;

/// Keeps the `k` highest logits, in order; 0 keeps all.
pub(super) fn top_k(candidates: &mut Candidates, k: usize) {
    if k == 0 {
        return;
    }
    let k = k.min(candidates.items().len());
    candidates.sort_front(k);
    candidates.truncate(k, true);
}

/// Keeps the most probable candidates until their sum reaches `p`, the one that crosses included
/// (nucleus sampling); `p` ≥ 1 keeps all, and at least one stays.
///
/// Source: Holtzman et al. 2020, as llama.cpp's `top-p` has it (f32 sums in descending order).
pub(super) fn top_p(candidates: &mut Candidates, p: f32) {
    if p >= 1.0 {
        return;
    }
    candidates.softmax();
    candidates.sort_front(TOP_P_FRONT);
    let n = candidates.items().len();
    let mut sum = 0.0f32;
    let mut n_kept = n;
    for i in 0..n {
        if i == TOP_P_FRONT {
            candidates.sort();
        }
        sum += candidates.items()[i].p;
        if sum >= p {
            n_kept = i + 1;
            break;
        }
    }
    candidates.truncate(n_kept, true);
}

/// Keeps the candidates whose probability is at least `p` times the highest; `p` ≤ 0 keeps all.
pub(super) fn min_p(candidates: &mut Candidates, p: f32) {
    if p <= 0.0 {
        return;
    }
    let highest = candidates.highest_logit();
    let lowest = highest + p.ln();
    candidates.retain(|c| c.logit >= lowest || c.logit == highest);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(logits: &[f32]) -> Candidates {
        let mut candidates = Candidates::with_capacity(logits.len());
        candidates.fill(logits);
        candidates
    }

    /// Logits whose softmax is `probabilities`.
    fn of(probabilities: &[f32]) -> Candidates {
        candidates(&probabilities.iter().map(|p| p.ln()).collect::<Vec<_>>())
    }

    fn ids(candidates: &Candidates) -> Vec<u32> {
        candidates.items().iter().map(|c| c.id).collect()
    }

    #[test]
    fn top_k_keeps_the_highest_in_order() {
        let logits = [0.1, 0.4, 0.2, 0.3];
        for (k, kept) in [
            (1, vec![1]),
            (3, vec![1, 3, 2]),
            (9, vec![1, 3, 2, 0]),
            (0, vec![0, 1, 2, 3]),
        ] {
            let mut c = candidates(&logits);
            top_k(&mut c, k);
            assert_eq!(ids(&c), kept, "k {k}");
        }
    }

    #[test]
    fn top_k_prefers_the_lower_id_among_equals() {
        let mut c = candidates(&[1.0, 2.0, 2.0, 2.0]);
        top_k(&mut c, 2);
        assert_eq!(ids(&c), [1, 2]);
    }

    #[test]
    fn top_p_keeps_the_candidate_that_crosses() {
        // the cases of llama.cpp's own test-sampling on [0.1, 0.2, 0.3, 0.4]
        for (p, kept) in [
            (0.0, vec![3]),
            (0.7, vec![3, 2]),
            (0.8, vec![3, 2, 1]),
            (1.0, vec![0, 1, 2, 3]),
        ] {
            let mut c = of(&[0.1, 0.2, 0.3, 0.4]);
            top_p(&mut c, p);
            assert_eq!(ids(&c), kept, "p {p}");
        }
    }

    #[test]
    fn top_p_looks_past_its_sorted_front() {
        let n = 2048; // so that the shares and their sums are exact
        let mut c = candidates(&vec![0.0; n]);
        top_p(&mut c, 0.5);
        assert_eq!(c.items().len(), n / 2);
        assert_eq!(ids(&c), (0..n as u32 / 2).collect::<Vec<_>>());
        assert!(c.is_sorted());
    }

    #[test]
    fn min_p_keeps_what_reaches_its_share_of_the_highest() {
        // the cases of llama.cpp's own test-sampling
        for (p, kept) in [
            (0.0, vec![0, 1, 2, 3]),
            (0.24, vec![0, 1, 2, 3]),
            (0.26, vec![1, 2, 3]),
            (0.49, vec![1, 2, 3]),
            (0.51, vec![2, 3]),
            (0.74, vec![2, 3]),
            (0.76, vec![3]),
            (1.0, vec![3]),
        ] {
            let mut c = of(&[0.1, 0.2, 0.3, 0.4]);
            min_p(&mut c, p);
            assert_eq!(ids(&c), kept, "p {p}");
        }
    }

    #[test]
    fn min_p_in_sorted_order_gives_the_same_set() {
        let mut c = of(&[0.1, 0.2, 0.3, 0.4]);
        top_k(&mut c, 4);
        min_p(&mut c, 0.51);
        assert_eq!(ids(&c), [3, 2]);
    }

    #[test]
    fn one_candidate_survives_even_nothing_but_infinities() {
        let mut c = candidates(&[f32::NEG_INFINITY; 3]);
        min_p(&mut c, 1.0);
        top_p(&mut c, 0.0);
        assert_eq!(ids(&c), [0]);
        let mut c = candidates(&[0.0, f32::INFINITY, 0.0]);
        top_p(&mut c, 0.9);
        assert_eq!(ids(&c), [1]);
    }
}
