//! Queries, keys, values and attention of the node's heads, into the node's columns of `heads`.
//!
//! 1. Every thread computes rows of the three projections. Barrier.
//! 2. One token: pieces of work are a key/value head and a chunk of positions; the thread that has
//!    a head's last chunk also appends the token's key and value, which no other chunk reads.
//!    Many tokens: threads append the keys and values of tokens of their own. Barrier. Pieces are a
//!    head and a block of tokens, taken by whoever is free.
//! 3. One token with several chunks: barrier, then each head's chunks are joined in order.
#![allow(unsafe_code)]

use std::ops::Range;

use pi_kernels::attention::{
    CHUNK_POSITIONS, Queries, append, attend, attend_chunk, join_chunks, reset_states, state_len,
};
use pi_kernels::elementwise::add_assign;
use pi_kernels::{ROW_GROUP, StridedOut};

use super::rows::multiply;
use super::{Job, weights_read};
use crate::counters::Counters;
use crate::scratch::{QUERY_BLOCK, ThreadScratch};
use crate::slots::SharedF32;
use crate::team::{Member, Team};
use crate::weights::Matrix;

/// Runs the stage with the node's team.
pub(super) fn run(job: Job<'_>, team: &mut Team) -> Counters {
    let share = job.share;
    if !share.kv_heads.is_empty() {
        if job.step.n_tokens == 1 {
            team.run(&|member| one_token(&job, member));
        } else {
            team.run(&|member| many_tokens(&job, member));
        }
    }
    let end = job.step.position + job.step.n_tokens;
    let row_bytes = job.model.kv_type.row_bytes(job.model.shape().head_dim);
    let mut work = weights_read(
        [&share.wq, &share.wk, &share.wv]
            .map(|m| m.bytes.len())
            .iter()
            .sum(),
    );
    let seen = end - job.model.shape().first_seen(job.step.position);
    work.kv_bytes = (2 * seen * share.kv_heads.len() * row_bytes) as u64;
    work
}

/// Sizes of the node's heads.
struct Heads {
    head_dim: usize,
    /// Query heads per key/value head.
    per_kv: usize,
    /// Key/value heads of the node.
    n_kv: usize,
    /// Values of the node's query heads of a token.
    q_len: usize,
    /// Values of its key heads.
    kv_len: usize,
}

impl Heads {
    fn of(job: &Job<'_>) -> Self {
        let shape = job.model.shape();
        let (head_dim, per_kv) = (shape.head_dim, shape.heads_per_kv());
        let n_kv = job.share.kv_heads.len();
        Self {
            head_dim,
            per_kv,
            n_kv,
            q_len: n_kv * per_kv * head_dim,
            kv_len: n_kv * head_dim,
        }
    }

    /// Columns of a node's key/value head in `q`, and, shifted by the node's first, in `heads`.
    fn query_columns(&self, head: usize) -> Range<usize> {
        let len = self.per_kv * self.head_dim;
        head * len..(head + 1) * len
    }

    fn kv_columns(&self, head: usize) -> Range<usize> {
        head * self.head_dim..(head + 1) * self.head_dim
    }
}

/// The thread's rows of queries, keys and values: equal numbers of row groups of all three.
fn project(job: &Job<'_>, member: &Member<'_>, heads: &Heads) {
    let (share, scratch) = (job.share, job.scratch);
    let parts: [(&Matrix, &Option<Vec<f32>>, &SharedF32, usize); 3] = [
        (&share.wq, &share.bq, &scratch.q, heads.q_len),
        (&share.wk, &share.bk, &scratch.k, heads.kv_len),
        (&share.wv, &share.bv, &scratch.v, heads.kv_len),
    ];
    let groups = |len: usize| len.div_ceil(ROW_GROUP);
    let mine = member.part(parts.iter().map(|part| groups(part.3)).sum(), 1);
    let mut first = 0;
    for (matrix, bias, out, len) in parts {
        let end = first + groups(len);
        let part = mine.start.clamp(first, end) - first..mine.end.clamp(first, end) - first;
        let rows = part.start * ROW_GROUP..(part.end * ROW_GROUP).min(len);
        first = end;
        if rows.is_empty() {
            continue;
        }
        let n_tokens = job.step.n_tokens;
        // SAFETY: `normed` was written before the share was sent; the rows are this thread's.
        unsafe {
            let x = job.model.slots.normed.get();
            let to = || out.columns(0, len, n_tokens, rows.clone());
            multiply(job.model.cpu, matrix, x, n_tokens, rows.clone(), to());
            if let Some(bias) = bias {
                let mut to = to();
                for token in 0..n_tokens {
                    add_assign(job.model.cpu, to.row(token), &bias[rows.clone()]);
                }
            }
        }
    }
}

/// Appends the key (rotated) and value of `token` for a head of the node.
///
/// # Safety
/// `k` and `v` of the token are written, and only this thread touches the head's position.
unsafe fn append_token(job: &Job<'_>, heads: &Heads, head: usize, token: usize) {
    let (model, scratch) = (job.model, job.scratch);
    let columns = heads.kv_columns(head);
    let at = token * heads.kv_len;
    let rope_len = model.rope.row_len();
    // SAFETY: this function's contract; the rotations were written with the step.
    unsafe {
        let rope = model
            .slots
            .rope
            .read(token * rope_len..(token + 1) * rope_len);
        let key = scratch.k.write(at + columns.start..at + columns.end);
        let value = scratch.v.read(at + columns.start..at + columns.end);
        model.rope.apply(model.cpu, rope, key, heads.head_dim);
        let [k, v] = job.kv.row(
            job.layer,
            job.share.kv_heads.start + head,
            job.step.position + token,
        );
        append(model.cpu, model.kv_type, key, k);
        append(model.cpu, model.kv_type, value, v);
    }
}

fn one_token(job: &Job<'_>, member: Member<'_>) {
    let heads = Heads::of(job);
    project(job, &member, &heads);
    member.barrier();
    let (model, scratch) = (job.model, job.scratch);
    let end = job.step.position + 1;
    let first_chunk = job.model.shape().first_seen(job.step.position) / CHUNK_POSITIONS;
    let n_chunks = end.div_ceil(CHUNK_POSITIONS) - first_chunk;
    let states_len = heads.per_kv * state_len(heads.head_dim);
    // SAFETY: each thread has its own.
    let ThreadScratch {
        queries: rotated, ..
    } = unsafe { scratch.threads[member.thread].get_mut() };
    let mut rotated_head = None;
    for piece in member.part(heads.n_kv * n_chunks, 1) {
        let (head, chunk) = (piece / n_chunks, first_chunk + piece % n_chunks);
        // SAFETY: the barrier ordered the projections before; this thread alone has the piece, and
        // the piece of the last chunk alone has the head's new position and its key.
        unsafe {
            if rotated_head != Some(head) {
                rotated.copy_from_slice(scratch.q.read(heads.query_columns(head)));
                let rope = model.slots.rope.read(0..model.rope.row_len());
                model.rope.apply(model.cpu, rope, rotated, heads.head_dim);
                rotated_head = Some(head);
            }
            let last = chunk + 1 == first_chunk + n_chunks;
            if last {
                append_token(job, &heads, head, 0);
            }
            let seen = if last {
                end
            } else {
                (chunk + 1) * CHUNK_POSITIONS
            };
            let kv = job
                .kv
                .head(job.layer, job.share.kv_heads.start + head, seen);
            let states = scratch
                .states
                .write(piece * states_len..(piece + 1) * states_len);
            reset_states(states, heads.head_dim);
            let queries = Queries {
                values: rotated,
                stride: rotated.len(),
                n_tokens: 1,
                n_heads: heads.per_kv,
                first_position: job.step.position,
                window: model.shape().window,
            };
            attend_chunk(
                model.cpu,
                kv,
                queries,
                chunk,
                model.shape().attn_scale,
                states,
            );
        }
    }
    // with one chunk a thread's pieces are the heads that it joins
    if n_chunks > 1 {
        member.barrier();
    }
    for head in member.part(heads.n_kv, 1) {
        let chunks = head * n_chunks * states_len..(head + 1) * n_chunks * states_len;
        let columns = heads.query_columns(head);
        let first = job.share.kv_heads.start * heads.per_kv * heads.head_dim;
        // SAFETY: all chunks of the head are done: by this thread, or before the barrier; the
        // columns are the head's.
        unsafe {
            let out = model
                .slots
                .heads
                .write(first + columns.start..first + columns.end);
            join_chunks(model.cpu, heads.head_dim, scratch.states.write(chunks), out);
        }
    }
}

fn many_tokens(job: &Job<'_>, member: Member<'_>) {
    let heads = Heads::of(job);
    project(job, &member, &heads);
    member.barrier();
    let (model, scratch) = (job.model, job.scratch);
    let (n_tokens, rope_len) = (job.step.n_tokens, model.rope.row_len());
    for token in member.part(n_tokens, 1) {
        // SAFETY: the barrier ordered the projections before; the token is this thread's.
        unsafe {
            let rope = model
                .slots
                .rope
                .read(token * rope_len..(token + 1) * rope_len);
            let q = scratch
                .q
                .write(token * heads.q_len..(token + 1) * heads.q_len);
            model.rope.apply(model.cpu, rope, q, heads.head_dim);
            for head in 0..heads.n_kv {
                append_token(job, &heads, head, token);
            }
        }
    }
    member.barrier();
    // SAFETY: each thread has its own.
    let states = unsafe { &mut scratch.threads[member.thread].get_mut().states };
    let n_blocks = n_tokens.div_ceil(QUERY_BLOCK);
    while let Some(piece) = job.take(heads.n_kv * n_blocks) {
        // the last tokens see most: they go first
        let (head, block) = (piece % heads.n_kv, n_blocks - 1 - piece / heads.n_kv);
        let tokens = block * QUERY_BLOCK..((block + 1) * QUERY_BLOCK).min(n_tokens);
        block_attention(job, &heads, head, tokens, states);
    }
}

fn block_attention(
    job: &Job<'_>,
    heads: &Heads,
    head: usize,
    tokens: Range<usize>,
    states: &mut [f32],
) {
    let (model, columns) = (job.model, heads.query_columns(head));
    let n_attn = model.shape().n_attn();
    let first = job.share.kv_heads.start * heads.per_kv * heads.head_dim;
    let end = job.step.position + tokens.end;
    // SAFETY: the barrier ordered queries, keys and values before; the columns of these tokens are
    // this piece's.
    unsafe {
        let kv = job.kv.head(job.layer, job.share.kv_heads.start + head, end);
        let from = tokens.start * heads.q_len + columns.start;
        let queries = Queries {
            values: job
                .scratch
                .q
                .read(from..(tokens.end - 1) * heads.q_len + columns.end),
            stride: heads.q_len,
            n_tokens: tokens.len(),
            n_heads: heads.per_kv,
            first_position: job.step.position + tokens.start,
            window: model.shape().window,
        };
        let columns = first + columns.start..first + columns.end;
        let mut out: StridedOut<'_> =
            model
                .slots
                .heads
                .columns(tokens.start * n_attn, n_attn, tokens.len(), columns);
        attend(
            model.cpu,
            kv,
            queries,
            model.shape().attn_scale,
            states,
            &mut out,
        );
    }
}
