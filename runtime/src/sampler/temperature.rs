//! Temperature, and the draw at the end of the chain.

use super::candidates::{Candidates, weight};
use super::rng::Mt19937;

/// Divides the logits by `temp`; 0 or less leaves only the highest (the first among equals).
pub(super) fn temperature(candidates: &mut Candidates, temp: f32) {
    if temp > 0.0 {
        for c in candidates.items_mut() {
            c.logit /= temp;
        }
        return;
    }
    let mut best = 0;
    for (i, c) in candidates.items().iter().enumerate() {
        if c.logit > candidates.items()[best].logit {
            best = i;
        }
    }
    candidates.items_mut().swap(0, best);
    candidates.truncate(1, true);
}

/// Draws one candidate with its softmax probability and returns its token id.
///
/// As llama.cpp's `dist`: one number u in [0, 1) per draw, f32 weights summed in f64 in the
/// candidates' order; the first whose running sum reaches u × total.
///
/// # Panics
/// Without candidates.
pub(super) fn draw(candidates: &mut Candidates, rng: &mut Mt19937) -> u32 {
    let u = rng.next_f64();
    let highest = candidates.highest_logit();
    let mut total = 0.0f64;
    for c in candidates.items_mut() {
        c.p = weight(c.logit, highest);
        total += f64::from(c.p);
    }
    let target = total * u;
    let mut sum = 0.0f64;
    for c in candidates.items() {
        sum += f64::from(c.p);
        if sum >= target && c.p > 0.0 {
            return c.id;
        }
    }
    candidates
        .items()
        .iter()
        .rfind(|c| c.p > 0.0)
        .unwrap_or(&candidates.items()[0])
        .id
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidates(logits: &[f32]) -> Candidates {
        let mut candidates = Candidates::with_capacity(logits.len());
        candidates.fill(logits);
        candidates
    }

    #[test]
    fn divides_the_logits() {
        let mut c = candidates(&[1.0, -2.0, 3.0]);
        temperature(&mut c, 0.5);
        assert_eq!(
            c.items().iter().map(|c| c.logit).collect::<Vec<_>>(),
            [2.0, -4.0, 6.0]
        );
        c.softmax();
        // e^-4 / (e^-4 + e^-10 + 1)
        assert!((c.items()[0].p - 0.017985).abs() < 1e-5, "{:?}", c.items());
    }

    #[test]
    fn zero_leaves_the_highest() {
        let mut c = candidates(&[1.0, 3.0, 2.0, 3.0]);
        temperature(&mut c, 0.0);
        assert_eq!(c.items().len(), 1);
        assert_eq!(draw(&mut c, &mut Mt19937::new(1)), 1);
    }

    #[test]
    fn draws_what_llama_cpp_draws() {
        // MT19937, seed 42, two words per number: u = 0.796543, 0.183435, 0.779691, 0.596850,
        // 0.445833. Shares 0.1, 0.2, 0.3, 0.4: running sums 0.1, 0.3, 0.6, 1.
        let mut rng = Mt19937::new(42);
        let mut c = candidates(&[0.1f32.ln(), 0.2f32.ln(), 0.3f32.ln(), 0.4f32.ln()]);
        let drawn: Vec<u32> = (0..5).map(|_| draw(&mut c, &mut rng)).collect();
        assert_eq!(drawn, [3, 1, 3, 2, 2]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let mut rng = Mt19937::new(7);
        let mut c = candidates(&[0.1f32.ln(), 0.2f32.ln(), 0.3f32.ln(), 0.4f32.ln()]);
        let mut counts = [0usize; 4];
        for _ in 0..20_000 {
            counts[draw(&mut c, &mut rng) as usize] += 1;
        }
        for (count, p) in counts.iter().zip([0.1, 0.2, 0.3, 0.4]) {
            // four standard deviations
            let deviation = (20_000.0f64 * p * (1.0 - p)).sqrt();
            assert!(
                (*count as f64 - 20_000.0 * p).abs() < 4.0 * deviation,
                "{counts:?}"
            );
        }
    }

    #[test]
    fn an_impossible_candidate_is_never_drawn() {
        let mut rng = Mt19937::new(3);
        let mut c = candidates(&[f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY]);
        for _ in 0..100 {
            assert_eq!(draw(&mut c, &mut rng), 1);
        }
    }
}
