//! Candidates instead of all gates: the layer's own sketch, or what was predicted ahead.
//!
//! One token: the sketch scores the thread's neurons, those above zero (and those that the
//! `Predictor` named) are candidates, and the exact gates of these decide which are active. Many
//! tokens: the same for each, with matrix products for all scores and gates of a chunk; a gate counts
//! as closed where the neuron is no candidate.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::Ordering;

use pi_kernels::ffn_sparse::row_products;
use pi_kernels::ffn_sparse::sketch::planes::{
    TABLE_BYTES, fill_tables, needs_tables, plane_gates, sign_scores,
};
use pi_kernels::ffn_sparse::sketch::{candidates, keep_open};
use pi_kernels::gemm::gemv;
use pi_kernels::{ActRef, ActivationMode, ROW_GROUP};

use super::Job;
use crate::team::{Member, Team};
use crate::weights::{Matrix, PlanesStore, SketchKind, SketchShare};

/// What the thread's part begins with: for one token, up to the first barrier.
pub(super) fn prepare(job: &Job<'_>, sketch: &SketchShare, member: &Member<'_>) {
    if !job.candidates.own && !matches!(sketch.kind, SketchKind::Signs(_)) {
        return;
    }
    let (model, scratch) = (job.model, job.scratch);
    match &sketch.kind {
        SketchKind::LowRank { a, .. } => {
            let part = member.part(a.shape.n_rows, ROW_GROUP);
            // SAFETY: `normed` was written before the message was sent; the rows are this thread's.
            unsafe {
                let out = scratch.hidden.write(part.clone());
                gemv(
                    model.cpu,
                    a.view(),
                    model.slots.normed.get().token(0),
                    part,
                    out,
                );
            }
        }
        SketchKind::Signs(_) if !needs_tables(model.cpu) => return,
        SketchKind::Signs(planes) => {
            let blocks = member.part(planes.shape.n_blocks(), 1);
            // SAFETY: the activations are set; these tables are this thread's.
            unsafe {
                let bytes = blocks.start * TABLE_BYTES..blocks.end * TABLE_BYTES;
                let tables = scratch.tables.write(bytes);
                fill_tables(model.cpu, sketch_input(job, 0), blocks, tables);
            }
        }
    }
    member.barrier();
}

/// The activations of a token with 8-bit blocks, which sign planes are multiplied with.
///
/// # Safety
/// They are set, and nobody writes them meanwhile.
unsafe fn sketch_input<'a>(job: &Job<'a>, token: usize) -> ActRef<'a> {
    // SAFETY: this function's contract.
    unsafe {
        match job.model.cpu.mode() {
            ActivationMode::Q8 => job.model.slots.normed.get().token(token),
            ActivationMode::F32 => job.scratch.sketch_x.get().token(token),
        }
    }
}

/// Makes [`sketch_input`] of all tokens, where the activations themselves have no 8-bit blocks.
pub(super) fn set_input(job: &Job<'_>, sketch: &SketchShare) {
    let signs = matches!(sketch.kind, SketchKind::Signs(_));
    if !signs || job.model.cpu.mode() == ActivationMode::Q8 {
        return;
    }
    let cpu = job.model.cpu.with_mode(ActivationMode::Q8);
    let n_embd = job.model.shape().n_embd;
    // SAFETY: between jobs the scratch is nobody else's; `normed` was written before the message.
    let (to, x) = unsafe { (job.scratch.sketch_x.get_mut(), job.model.slots.normed.get()) };
    for token in 0..job.step.n_tokens {
        to.set(cpu, token, &x.token(token).values[..n_embd]);
    }
}

/// Lists the thread's active neurons of one token: candidates whose exact gate is open.
pub(super) fn open_gates(job: &Job<'_>, sketch: &SketchShare, member: &Member<'_>) {
    let (scratch, share) = (job.scratch, job.share);
    let part = member.part(share.neurons.len(), ROW_GROUP);
    // SAFETY: the list and the thread's scratch are its own until the barrier.
    let (list, mine) = unsafe {
        (
            scratch.lists[member.thread].get_mut(),
            scratch.threads[member.thread].get_mut(),
        )
    };
    score(job, sketch, part.clone(), member.thread, &mut list.ids);
    if job.candidates.predicted {
        // SAFETY: the predictor wrote the ids before it sent the message.
        let all = unsafe { job.model.slots.predicted[job.node][job.layer % 2].get() };
        let inside = |bound: usize| all.partition_point(|&id| (id as usize) < bound);
        let predicted = &all[inside(part.start)..inside(part.end)];
        merge(&mut list.ids, predicted, &mut mine.merged);
    }
    scratch
        .candidates
        .fetch_add(list.ids.len() as u64, Ordering::Relaxed);
    list.gates.clear();
    list.gates.resize(list.ids.len(), 0.0);
    exact_gates(job, sketch, part, member.thread, &list.ids, &mut list.gates);
    let floors = sketch.floor.as_deref();
    keep_open(&mut list.ids, &mut list.gates, floors);
}

/// Replaces `ids` by the sketch's candidates among neurons `part`; none where it is not asked.
fn score(
    job: &Job<'_>,
    sketch: &SketchShare,
    part: Range<usize>,
    thread: usize,
    ids: &mut Vec<u32>,
) {
    let (model, scratch) = (job.model, job.scratch);
    let cpu = model.cpu;
    ids.clear();
    // SAFETY: what all threads prepared is complete; scores and sums of these neurons are this
    // thread's.
    unsafe {
        let scores = scratch.gate.write(part.clone());
        match &sketch.kind {
            SketchKind::LowRank { a, b } => {
                if !job.candidates.own {
                    return;
                }
                let rank = a.shape.n_rows;
                let mine = scratch.threads[thread].get_mut();
                let hidden = mine.hidden.of(rank);
                hidden.set(cpu, 0, scratch.hidden.read(0..rank));
                gemv(cpu, b.view(), hidden.token(0), part.clone(), scores);
            }
            SketchKind::Signs(planes) => {
                let tables = scratch.tables.read(0..planes.shape.table_bytes());
                let x = sketch_input(job, 0);
                let sums = scratch.sums.write(sums_of(planes, &part));
                sign_scores(cpu, planes.view(), x, tables, part.clone(), scores, sums);
                if !job.candidates.own {
                    return;
                }
            }
        }
        candidates(scores, &sketch.bias[part.clone()], part.start as u32, ids);
    }
}

/// Where the sums of signs of neurons `part` lie.
fn sums_of(planes: &PlanesStore, part: &Range<usize>) -> Range<usize> {
    let stride = planes.shape.sums_stride();
    part.start * stride..part.end.next_multiple_of(ROW_GROUP) * stride
}

/// Adds `more` to `ids`; all are ascending.
fn merge(ids: &mut Vec<u32>, more: &[u32], merged: &mut Vec<u32>) {
    merged.clear();
    let (mut own, mut other) = (ids.iter().peekable(), more.iter().peekable());
    while let Some(next) = match (own.peek(), other.peek()) {
        (Some(&&a), Some(&&b)) => Some(a.min(b)),
        (a, b) => a.or(b).map(|&&id| id),
    } {
        merged.push(next);
        own.next_if(|&&id| id == next);
        other.next_if(|&&id| id == next);
    }
    ids.clear();
    ids.extend_from_slice(merged);
}

/// Gates of the candidates `ids`, all among neurons `part`.
fn exact_gates(
    job: &Job<'_>,
    sketch: &SketchShare,
    part: Range<usize>,
    thread: usize,
    ids: &[u32],
    out: &mut [f32],
) {
    let (model, scratch) = (job.model, job.scratch);
    // SAFETY: the activations are set; the sums are this thread's, and complete.
    unsafe {
        let x = model.slots.normed.get().token(0);
        match &sketch.kind {
            SketchKind::LowRank { .. } => {
                row_products(model.cpu, job.share.gate.neuron_rows(), x, ids, out);
            }
            SketchKind::Signs(planes) if model.cpu.mode() == ActivationMode::Q8 => {
                let sums = scratch.sums.read(sums_of(planes, &part));
                plane_gates(model.cpu, planes.view(), x, part.start, sums, ids, out);
            }
            SketchKind::Signs(planes) => {
                let row = &mut scratch.threads[thread].get_mut().row;
                for (&id, out) in ids.iter().zip(out) {
                    let rows = planes.view().unpacked(id as usize, row);
                    row_products(model.cpu, rows, x, &[0], std::slice::from_mut(out));
                }
            }
        }
    }
}

/// Pulls what was predicted towards the team's caches, each thread its part of the neurons.
pub(super) fn prefetch(job: &Job<'_>, team: &mut Team) {
    let share = job.share;
    let Some(records) = share.ffn.paired() else {
        return;
    };
    let up_rows = records.up_rows().expect("records have up rows");
    // SAFETY: the predictor wrote the ids before it sent the message.
    let all = unsafe { job.model.slots.predicted[job.node][job.layer % 2].get() };
    team.run(&|member| {
        let part = member.part(share.neurons.len(), ROW_GROUP);
        let inside = |bound: usize| all.partition_point(|&id| (id as usize) < bound);
        for &id in &all[inside(part.start)..inside(part.end)] {
            let id = id as usize;
            match share.sketch.as_ref().map(|sketch| &sketch.kind) {
                Some(SketchKind::LowRank { .. }) => {
                    let rows = share.gate.neuron_rows();
                    rows.prefetch(id, 0..rows.n_embd);
                }
                Some(SketchKind::Signs(planes)) => planes.view().prefetch(id),
                None => {}
            }
            up_rows.prefetch(id, 0..up_rows.n_embd);
        }
    });
}

/// Bytes of weights that all of the layer's scores read, and those of one candidate's gate.
pub(super) fn gate_bytes(gate: &Matrix, sketch: &SketchShare, own: bool) -> (usize, usize) {
    match &sketch.kind {
        SketchKind::LowRank { a, b } if own => {
            (a.bytes.len() + b.bytes.len(), gate.shape.row_bytes())
        }
        SketchKind::LowRank { .. } => (0, gate.shape.row_bytes()),
        SketchKind::Signs(planes) => (planes.top.len(), planes.shape.rest_row_bytes()),
    }
}

pub(super) use batch::{gates_of_chunk, hidden_writer, prepare_batch};

/// Many tokens.
mod batch {
    use pi_kernels::ffn_sparse::{UpScratch, row_products_tokens};
    use pi_kernels::gemm::gemm;
    use pi_kernels::quant::QuantType;
    use pi_kernels::{ActBatch, ActWriter, Cpu, Layout, MatrixRef, MatrixShape, StridedOut};

    use super::*;
    use crate::cold_layer::rows::multiply;
    use crate::scratch::ThreadScratch;

    /// The small product of a low-rank sketch, of all tokens.
    ///
    /// `writer` is [`hidden_writer`]'s.
    pub fn prepare_batch(
        job: &Job<'_>,
        sketch: &SketchShare,
        writer: Option<&ActWriter<'_>>,
        member: &Member<'_>,
    ) {
        let (SketchKind::LowRank { a, .. }, Some(writer)) = (&sketch.kind, writer) else {
            return;
        };
        let (model, scratch) = (job.model, job.scratch);
        let (rank, n_tokens) = (a.shape.n_rows, job.step.n_tokens);
        let part = member.part(rank, ROW_GROUP);
        // SAFETY: these rows, and then these tokens, are this thread's; the barrier is between.
        unsafe {
            let out = scratch.hidden.columns(0, rank, n_tokens, part.clone());
            multiply(model.cpu, a, model.slots.normed.get(), n_tokens, part, out);
        }
        member.barrier();
        for token in member.part(n_tokens, 1) {
            // SAFETY: as above.
            unsafe {
                let row = scratch.hidden.read(token * rank..(token + 1) * rank);
                writer.set_with(model.cpu, token, |out| out.copy_from_slice(row));
            }
        }
        member.barrier();
    }

    /// What sets the middle of a low-rank sketch.
    pub fn hidden_writer<'a>(job: &Job<'a>) -> Option<ActWriter<'a>> {
        match &job.share.sketch.as_ref()?.kind {
            // SAFETY: between jobs nobody else has it.
            SketchKind::LowRank { a, .. } => unsafe {
                Some(job.scratch.hidden_rows.writer(a.shape.n_rows))
            },
            SketchKind::Signs(_) => None,
        }
    }

    /// Gates of neurons `neurons` for all tokens into `gates` (`[n_tokens, neurons.len()]`); zero for
    /// those that are no candidates, or not above their floor. Returns how many were candidates.
    pub fn gates_of_chunk(
        job: &Job<'_>,
        sketch: &SketchShare,
        neurons: Range<usize>,
        mine: &mut ThreadScratch,
        gates: &mut StridedOut<'_>,
    ) -> u64 {
        let (model, n_tokens) = (job.model, job.step.n_tokens);
        let width = neurons.len();
        let ThreadScratch {
            up_chunk: scores,
            up,
            row,
            image,
            ..
        } = mine;
        let products = up.as_mut().expect("scratch for paired rows");
        let scores_out = StridedOut::from_slice(scores, width, n_tokens, 0..width);
        // SAFETY: the activations of all tokens are set.
        unsafe {
            let x = model.slots.normed.get();
            match &sketch.kind {
                SketchKind::LowRank { a, b } => {
                    let hidden = job.scratch.hidden_rows.get(a.shape.n_rows);
                    multiply(model.cpu, b, hidden, n_tokens, neurons.clone(), scores_out);
                    all_gates(job, &job.share.gate, neurons.clone(), products, gates);
                }
                SketchKind::Signs(planes) => {
                    let q8 = model.cpu.with_mode(ActivationMode::Q8);
                    let sketch_x = match model.cpu.mode() {
                        ActivationMode::Q8 => x,
                        ActivationMode::F32 => job.scratch.sketch_x.get(),
                    };
                    let mut both = Unpacking { planes, row, image };
                    let mut scores_out = scores_out;
                    both.multiply(
                        q8,
                        true,
                        sketch_x,
                        n_tokens,
                        neurons.clone(),
                        &mut scores_out,
                    );
                    both.multiply(model.cpu, false, x, n_tokens, neurons.clone(), gates);
                }
            }
        }
        let mut n_candidates = 0;
        for token in 0..n_tokens {
            let scores = &scores[token * width..][..width];
            for ((gate, score), neuron) in
                gates.row(token).iter_mut().zip(scores).zip(neurons.clone())
            {
                let out = score + sketch.bias[neuron] <= 0.0;
                let floor = sketch
                    .floor
                    .as_ref()
                    .map_or(0.0, |floors| floors[neuron].max(0.0));
                let closed = out || *gate <= floor;
                n_candidates += u64::from(!out);
                *gate = if closed { 0.0 } else { *gate };
            }
        }
        n_candidates
    }

    /// All gates of a chunk, from rows that lie one by one.
    fn all_gates(
        job: &Job<'_>,
        gate: &Matrix,
        neurons: Range<usize>,
        products: &mut UpScratch,
        gates: &mut StridedOut<'_>,
    ) {
        let (model, n_tokens) = (job.model, job.step.n_tokens);
        // SAFETY: the activations of all tokens are set.
        let x = unsafe { model.slots.normed.get() };
        let rows = gate.neuron_rows();
        row_products_tokens(model.cpu, rows, x, 0..n_tokens, neurons, gates, products);
    }

    /// Rows of planes put together, 16 at a time, for matrix products.
    struct Unpacking<'a> {
        planes: &'a PlanesStore,
        row: &'a mut [u8],
        image: &'a mut [u8],
    }

    impl Unpacking<'_> {
        /// Products of rows `neurons`: of the gates, or of their signs alone.
        fn multiply(
            &mut self,
            cpu: Cpu,
            signs: bool,
            x: &ActBatch,
            n_tokens: usize,
            neurons: Range<usize>,
            out: &mut StridedOut<'_>,
        ) {
            let planes = self.planes.view();
            let row_bytes = QuantType::Q4_0.row_bytes(planes.shape.n_cols);
            for first in neurons.clone().step_by(ROW_GROUP) {
                let rows = first..(first + ROW_GROUP).min(neurons.end);
                let file = &mut self.row[..rows.len() * row_bytes];
                for (row, file) in rows.clone().zip(file.chunks_exact_mut(row_bytes)) {
                    if signs {
                        planes.sign_row(row, file);
                    } else {
                        planes.file_row(row, file);
                    }
                }
                let shape = MatrixShape {
                    quant: QuantType::Q4_0,
                    n_rows: rows.len(),
                    n_cols: planes.shape.n_cols,
                    layout: Layout::Interleaved,
                };
                shape.pack(file, 0, self.image);
                let m = MatrixRef::new(shape, self.image);
                let columns = rows.start - neurons.start..rows.end - neurons.start;
                let part = out.columns_of(columns);
                gemm(cpu, m, x, 0..n_tokens, 0..rows.len(), part);
            }
        }
    }
}
