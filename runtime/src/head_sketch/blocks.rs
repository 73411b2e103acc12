//! Rows of a sketch in 4 bits, and work that is divided over threads with the same result for any number of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::f16;
use pi_kernels::quant::BLOCK;

/// Bytes of a block of Q4_0.
pub(super) const BLOCK_BYTES: usize = 18;

/// Scales that are tried, as shares of the one with which the value of largest magnitude becomes −8.
const SCALES: [f32; 5] = [1.0, 0.93, 0.86, 0.79, 0.72];

/// Rounds a row to Q4_0, with the scale of each block that leaves the least squared error; overwrites `out`.
///
/// # Panics
/// When the row is not whole blocks or `out` has another length.
pub(super) fn quantize(row: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), row.len() / BLOCK * BLOCK_BYTES, "whole blocks");
    for (block, out) in row
        .chunks_exact(BLOCK)
        .zip(out.chunks_exact_mut(BLOCK_BYTES))
    {
        quantize_block(block, out);
    }
}

fn quantize_block(x: &[f32], out: &mut [u8]) {
    let extreme = x.iter().fold(0.0f32, |most, &value| {
        if value.abs() > most.abs() {
            value
        } else {
            most
        }
    });
    let code = |value: f32, scale: f32| (value / scale).round().clamp(-8.0, 7.0);
    let (mut best, mut least) = (0.0f32, f32::INFINITY);
    for share in SCALES {
        let scale = extreme / -8.0 * share;
        if scale == 0.0 {
            continue;
        }
        // the codes of this scale, and then the best scale for them
        let (mut qx, mut qq) = (0.0f32, 0.0f32);
        for &value in x {
            let q = code(value, scale);
            qx += q * value;
            qq += q * q;
        }
        let fitted = f16::from_f32(qx / qq.max(f32::MIN_POSITIVE)).to_f32();
        if fitted == 0.0 || !fitted.is_finite() {
            continue;
        }
        let error: f32 = x
            .iter()
            .map(|&value| (value - fitted * code(value, fitted)).powi(2))
            .sum();
        if error < least {
            (best, least) = (fitted, error);
        }
    }
    out[..2].copy_from_slice(&f16::from_f32(best).to_le_bytes());
    let nibble = |value: f32| match best {
        0.0 => 8,
        scale => (code(value, scale) + 8.0) as u8,
    };
    for (j, byte) in out[2..].iter_mut().enumerate() {
        *byte = nibble(x[j]) | nibble(x[j + BLOCK / 2]) << 4;
    }
}

/// Turns each 32 values by an orthogonal Hadamard matrix, so that none of them sticks out and 4 bits hold them better.
pub(super) fn spread(row: &mut [f32]) {
    for block in row.chunks_exact_mut(BLOCK) {
        let mut half = 1;
        while half < BLOCK {
            for pair in block.chunks_exact_mut(2 * half) {
                let (a, b) = pair.split_at_mut(half);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        for value in block {
            *value /= (BLOCK as f32).sqrt();
        }
    }
}

/// `work(0)`, …, `work(n - 1)`, on `n_threads` threads.
pub(super) fn each<T: Send>(
    n: usize,
    n_threads: usize,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(n));
    std::thread::scope(|scope| {
        for _ in 0..n_threads.clamp(1, n.max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= n {
                        break;
                    }
                    let result = work(index);
                    done.lock().expect("no push panics").push((index, result));
                }
            });
        }
    });
    let mut done = done.into_inner().expect("no push panics");
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use pi_kernels::QuantType;

    use super::*;
    use crate::model::quantize::{dequantize_row, quantize_row};
    use crate::sampler::Mt19937;

    fn row(n: usize) -> Vec<f32> {
        let mut random = Mt19937::new(4);
        (0..n).map(|_| random.next_f64() as f32 - 0.5).collect()
    }

    fn error(row: &[f32], bytes: &[u8]) -> f32 {
        let mut values = vec![0.0; row.len()];
        dequantize_row(QuantType::Q4_0, bytes, &mut values);
        let squares = row.iter().zip(&values).map(|(a, b)| (a - b).powi(2));
        squares.sum()
    }

    #[test]
    fn blocks_are_rounded_better_than_by_their_extreme() {
        let row = row(32 * 40);
        let mut ours = vec![0xAA; 40 * BLOCK_BYTES];
        let mut plain = ours.clone();
        quantize(&row, &mut ours);
        quantize_row(QuantType::Q4_0, &row, &mut plain);
        let (ours, plain) = (error(&row, &ours), error(&row, &plain));
        assert!(ours < 0.95 * plain, "{ours} {plain}");
        let mut zeros = vec![0xAA; BLOCK_BYTES];
        quantize(&[0.0; 32], &mut zeros);
        assert_eq!(error(&[0.0; 32], &zeros), 0.0);
    }

    #[test]
    fn spreading_twice_changes_nothing() {
        let row = row(64);
        let mut turned = row.clone();
        spread(&mut turned);
        let length = |row: &[f32]| row.iter().map(|v| v * v).sum::<f32>();
        assert!((length(&row) - length(&turned)).abs() < 1e-4);
        assert!(row.iter().zip(&turned).any(|(a, b)| (a - b).abs() > 0.1));
        spread(&mut turned);
        assert!(row.iter().zip(&turned).all(|(a, b)| (a - b).abs() < 1e-6));
    }

    #[test]
    fn results_come_in_order() {
        let squares: Vec<usize> = (0..50).map(|i| i * i).collect();
        assert_eq!(each(50, 3, |i| i * i), squares);
        assert!(each(0, 3, |i| i).is_empty());
    }
}
