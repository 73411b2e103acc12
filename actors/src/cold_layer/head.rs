//! The node's rows of the head: all of them, or those of candidates that a sketch picks.
//!
//! Sparse, one token. In the stage `HeadSketch` every thread projects to some of the sketch's numbers. Barrier. It scores
//! tokens of its own, and keeps the best score of each group of 16. `DeviceLayer` finds the threshold from all nodes'
//! groups. In `HeadRows` every thread lists those of its tokens that reach it. Barrier. The lists together are cut into
//! equal parts for the real rows: candidates are mostly common tokens, whose ids are low.
#![allow(unsafe_code)]

use std::ops::Range;

use pi_kernels::gemm::gemv;
use pi_kernels::head_sparse::{all_logits, candidate_logits, collect, group_maxima};
use pi_kernels::{Layout, ROW_GROUP};

use super::rows::multiply;
use super::{Job, weights_read};
use crate::counters::Counters;
use crate::team::{Member, Team};
use crate::trace::Scorer;
use crate::weights::{HeadShare, HeadSketchShare};

/// Rows of the sketch that are scored before their maxima are taken: their scores stay in the first cache.
const SCORED_ROWS: usize = 1024;

/// The node's rows of the head for rows `0..n_tokens` of the normed slot, into `logits`.
pub(super) fn full(job: Job<'_>, team: &mut Team, n_tokens: usize) -> Counters {
    let (head, slots) = (&job.model.weights.head[job.node], &job.model.slots);
    let n_vocab = job.model.shape().n_vocab;
    team.run(&|member| {
        let rows = member.part(head.rows.len(), ROW_GROUP);
        let columns = head.rows.start + rows.start..head.rows.start + rows.end;
        // SAFETY: the device wrote `normed` before it sent the share; these columns are this
        // node's and, of them, this thread's.
        unsafe {
            let out = slots.logits.columns(0, n_vocab, n_tokens, columns);
            let (cpu, x) = (job.model.cpu, slots.normed.get());
            match head.matrix.shape.layout {
                Layout::Interleaved => multiply(cpu, &head.matrix, x, n_tokens, rows, out),
                Layout::Rows => all_logits(cpu, head.matrix.view(), x, n_tokens, rows, out),
            }
        }
    });
    weights_read(head.matrix.bytes.len())
}

/// The node's share of the head's sketch.
fn sketch<'a>(job: &Job<'a>) -> &'a HeadSketchShare {
    let sketch = job.model.weights.head_sketch.as_ref();
    &sketch.expect("the pipeline checked it").shares[job.node]
}

/// Scores of the node's tokens, into `head.scores` and `head.maxima`.
pub(super) fn sketch_scores(job: Job<'_>, team: &mut Team) -> Counters {
    let (head, sketch) = (&job.model.weights.head[job.node], sketch(&job));
    let mut watch = job.scratch.scores.watch(0);
    team.run(&|member| {
        project(&job, sketch, &member);
        member.barrier();
        score(&job, head, sketch, &member);
    });
    watch.lap(Scorer::Head);
    let bytes = sketch.project.bytes.len() + sketch.scores.bytes.len();
    job.scratch.scores.read(Scorer::Head, bytes);
    weights_read(bytes)
}

/// The thread's part of the projection of the hidden state.
fn project(job: &Job<'_>, sketch: &HeadSketchShare, member: &Member<'_>) {
    let rows = member.part(sketch.project.shape.n_rows, ROW_GROUP);
    if rows.is_empty() {
        return;
    }
    // SAFETY: the device wrote `normed` before it sent the share; these values are this thread's.
    unsafe {
        let x = job.model.slots.normed.get().token(0);
        let out = job.scratch.head_sketch.write(rows.clone());
        gemv(job.model.cpu, sketch.project.view(), x, rows, out);
    }
}

/// Scores of the thread's tokens.
fn score(job: &Job<'_>, head: &HeadShare, sketch: &HeadSketchShare, member: &Member<'_>) {
    let (cpu, slots) = (job.model.cpu, &job.model.slots.head);
    let mine = member.part(head.rows.len(), ROW_GROUP);
    // SAFETY: each thread has its own scratch; the barrier ordered all of the projection before, and nobody writes it
    // now; the pipeline wrote the request before the step. Scores and maxima are this node's and, of them, this
    // thread's.
    unsafe {
        let scratch = job.scratch.threads[member.thread].get_mut();
        let x = scratch.head_sketch.as_mut().expect("there is a sketch");
        x.set(
            cpu,
            0,
            job.scratch.head_sketch.read(0..sketch.project.shape.n_rows),
        );
        let biases = &slots.request.get().biases;
        for first in mine.clone().step_by(SCORED_ROWS) {
            let rows = first..(first + SCORED_ROWS).min(mine.end);
            let tokens = head.rows.start + rows.start..head.rows.start + rows.end;
            let scores = slots.scores.write(tokens.clone());
            gemv(cpu, sketch.scores.view(), x.token(0), rows, scores);
            for &(id, bias) in biases {
                let id = id as usize;
                if tokens.contains(&id) {
                    scores[id - tokens.start] += bias;
                }
            }
            group_maxima(cpu, scores, slots.maxima.write(groups(&tokens)));
        }
    }
}

/// The groups of 16 that cover tokens which start one.
fn groups(tokens: &Range<usize>) -> Range<usize> {
    tokens.start / ROW_GROUP..tokens.end.div_ceil(ROW_GROUP)
}

/// Logits of the node's tokens that reach the threshold, into `head.ids` and `logits`.
pub(super) fn candidate_rows(job: Job<'_>, team: &mut Team) -> Counters {
    let head = &job.model.weights.head[job.node];
    team.run(&|member| {
        list_candidates(&job, head, &member);
        member.barrier();
        multiply_candidates(&job, head, &member);
    });
    // SAFETY: the job has ended; the number is this node's.
    let n_ids = unsafe {
        let lists = job.scratch.head_candidates.iter();
        let n_ids = lists.map(|list| list.get().len()).sum();
        *job.model.slots.head.n_ids[job.node].get_mut() = n_ids;
        n_ids
    };
    weights_read(n_ids * head.matrix.shape.row_bytes())
}

fn list_candidates(job: &Job<'_>, head: &HeadShare, member: &Member<'_>) {
    let slots = &job.model.slots.head;
    let mine = member.part(head.rows.len(), ROW_GROUP);
    let tokens = head.rows.start + mine.start..head.rows.start + mine.end;
    // SAFETY: the device wrote the threshold, and had all scores, before it sent the share; the list is this thread's.
    unsafe {
        let list = job.scratch.head_candidates[member.thread].get_mut();
        list.clear();
        let scores = slots.scores.read(tokens.clone());
        let maxima = slots.maxima.read(groups(&tokens));
        collect(scores, maxima, *slots.threshold.get(), mine.start, list);
    }
}

fn multiply_candidates(job: &Job<'_>, head: &HeadShare, member: &Member<'_>) {
    let slots = &job.model.slots;
    // SAFETY: the barrier ordered all lists before, and nobody writes one now.
    let lists = || {
        job.scratch
            .head_candidates
            .iter()
            // SAFETY: as above.
            .map(|list| unsafe { list.get() })
    };
    let mine = member.part(lists().map(Vec::len).sum(), 1);
    let mut listed = 0;
    for list in lists() {
        let part = mine.start.clamp(listed, listed + list.len()) - listed
            ..mine.end.clamp(listed, listed + list.len()) - listed;
        let first = head.rows.start + listed + part.start;
        listed += list.len();
        if part.is_empty() {
            continue;
        }
        let (ids, to) = (&list[part.clone()], first..first + part.len());
        // SAFETY: the device wrote `normed` before it sent the first share; these places are this node's and, of them,
        // this thread's.
        unsafe {
            let x = slots.normed.get().token(0);
            let logits = slots.logits.write(to.clone());
            candidate_logits(job.model.cpu, head.matrix.view(), x, ids, logits);
            for (id, to) in ids.iter().zip(slots.head.ids.write(to)) {
                *to = head.rows.start as u32 + id;
            }
        }
    }
}
