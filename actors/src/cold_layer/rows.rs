//! The node's rows of the output projection.
#![allow(unsafe_code)]

use std::ops::Range;

use pi_kernels::gemm::{gemm, gemv};
use pi_kernels::{ActBatch, Cpu, ROW_GROUP, StridedOut};

use super::{Job, weights_read};
use crate::counters::Counters;
use crate::team::Team;
use crate::weights::Matrix;

/// Products of rows `rows` of `matrix` with tokens `0..n_tokens` of `x`.
pub(super) fn multiply(
    cpu: Cpu,
    matrix: &Matrix,
    x: &ActBatch,
    n_tokens: usize,
    rows: Range<usize>,
    mut out: StridedOut<'_>,
) {
    if rows.is_empty() {
        return;
    }
    if n_tokens == 1 {
        gemv(cpu, matrix.view(), x.token(0), rows, out.row(0));
    } else {
        gemm(cpu, matrix.view(), x, 0..n_tokens, rows, out);
    }
}

/// The node's rows of `attn_output`, into `projected`.
pub(super) fn output(job: Job<'_>, team: &mut Team) -> Counters {
    let (share, slots) = (job.share, &job.model.slots);
    let n_embd = job.model.shape().n_embd;
    team.run(&|member| {
        let rows = member.part(share.output_rows.len(), ROW_GROUP);
        let first = share.output_rows.start;
        let columns = first + rows.start..first + rows.end;
        // SAFETY: the device wrote `attn` before it sent the share; these columns are this node's
        // and, of them, this thread's.
        unsafe {
            let out = slots
                .projected
                .columns(0, n_embd, job.step.n_tokens, columns);
            multiply(
                job.model.cpu,
                &share.wo,
                slots.attn.get(),
                job.step.n_tokens,
                rows,
                out,
            );
        }
    });
    weights_read(share.wo.bytes.len())
}
