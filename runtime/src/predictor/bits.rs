//! In-layer sketch: the first bits of the gate's own weights, each taken as ±1, or by two bits as ±1, ±3.

use pi_kernels::Cpu;
use pi_kernels::QuantType;
use pi_kernels::ffn_sparse::sketch::input::SketchInput;
use pi_kernels::ffn_sparse::sketch::planes::{GatePlanes, PlanesShape, sign_sums, two_bit_sums};

use super::quantised::QuantisedMatrix;
use crate::linear_algebra::Workers;

/// Tokens that one thread scores at a time.
const TOKENS: usize = 64;

/// Row-major `[n, n_ff]` scores.
#[derive(Debug, Clone, PartialEq)]
pub struct BitScores {
    /// By signs.
    pub one: Vec<f32>,
    /// By signs and the next bit; empty where only signs were asked for.
    pub two: Vec<f32>,
}

/// Scores every row of `x` `[n, n_embd]` by the first bits of `gate` `[n_ff, n_embd]`, with the runtime's kernels.
///
/// # Panics
/// When `gate` isn't `Q4_0`.
pub fn scores(
    cpu: Cpu,
    workers: Workers,
    gate: &QuantisedMatrix,
    x: &[f32],
    with_two: bool,
) -> BitScores {
    assert_eq!(gate.quant, QuantType::Q4_0, "bits are of Q4_0 gates");
    let (n_ff, n_embd) = (gate.n_rows, gate.n_cols);
    let shape = PlanesShape {
        n_rows: n_ff,
        n_cols: n_embd,
    };
    let (mut top, mut rest) = (vec![0; shape.top_bytes()], vec![0; shape.rest_bytes()]);
    shape.pack(&gate.bytes, 0, &mut top, &mut rest);
    let planes = GatePlanes::new(shape, &top, &rest);
    let all: Vec<u32> = (0..n_ff as u32).collect();
    let n = x.len() / n_embd;
    let mut scores = BitScores {
        one: vec![0.0; n * n_ff],
        two: vec![0.0; if with_two { n * n_ff } else { 0 }],
    };
    // as many pieces of both, of which the second may be empty
    let mut two = scores.two.chunks_mut(TOKENS * n_ff);
    let blocks = (scores.one.chunks_mut(TOKENS * n_ff)).zip(x.chunks(TOKENS * n_embd));
    let blocks = blocks.map(|(one, x)| (one, two.next().unwrap_or_default(), x));
    workers.each(blocks, |(one, two, x)| {
        let mut input = SketchInput::new(n_embd);
        let (mut sums, mut two_sums) = (vec![0; n_ff], vec![0; n_ff]);
        let mut two = two.chunks_exact_mut(n_ff);
        for (one, x) in one.chunks_exact_mut(n_ff).zip(x.chunks_exact(n_embd)) {
            input.set(x);
            let write = |sums: &[i32], out: &mut [f32]| {
                for (out, &sum) in out.iter_mut().zip(sums) {
                    *out = sum as f32 * input.scale();
                }
            };
            sign_sums(cpu, planes, &input, 0..n_ff, &mut sums);
            write(&sums, one);
            if let Some(two) = two.next() {
                two_bit_sums(cpu, planes, &input, 0, &sums, &all, &mut two_sums);
                write(&two_sums, two);
            }
        }
    });
    scores
}
