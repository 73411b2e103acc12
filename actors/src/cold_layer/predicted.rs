//! Candidates instead of all gates: the layer's own sketch, or what was predicted ahead.
//!
//! One token: the sketch scores neurons that the thread takes (by their weights' signs, and those that these
//! name by the next bit too, or by a map of low rank), those above zero (and those that the
//! `Predictor` named) are candidates, and the exact gates of these decide which are active. Many
//! tokens: a matrix product for all gates of a chunk, as nearly all rows are candidates of one of
//! them; each token's open ones are scored, and count as closed where the neuron is no candidate.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::Ordering;

use pi_kernels::ffn_sparse::sketch::planes::{plane_gates, sign_sums, two_bit_sums};
use pi_kernels::ffn_sparse::sketch::{candidates, candidates_of_sums, keep_candidates, keep_open};
use pi_kernels::ffn_sparse::{NeuronRows, row_products};
use pi_kernels::gemm::gemv;
use pi_kernels::{ActivationMode, ROW_GROUP};

use super::Job;
use super::ffn::down_columns;
use crate::pieces::{Cut, Piece};
use crate::scratch::{ActiveList, ThreadScratch};
use crate::team::{Member, Team};
use crate::trace::{Scorer, Watch};
use crate::weights::{NeuronStore, PlanesStore, SketchKind, SketchShare};

/// What the thread's part begins with: for one token, up to the first barrier.
pub(super) fn prepare(job: &Job<'_>, sketch: &SketchShare, member: &Member<'_>) {
    let SketchKind::LowRank { a, .. } = &sketch.kind else {
        return;
    };
    if !job.candidates.own {
        return;
    }
    let (model, scratch) = (job.model, job.scratch);
    let mut watch = scratch.scores.watch(member.thread);
    let part = member.part(a.shape.n_rows, ROW_GROUP);
    // SAFETY: `normed` was written before the message was sent; the rows are this thread's.
    unsafe {
        let out = scratch.hidden.write(part.clone());
        let x = model.slots.normed.get().token(0);
        gemv(model.cpu, a.view(), x, part, out);
    }
    member.barrier();
    watch.lap(Scorer::LowRank);
}

/// Makes what a sketch of bits takes of one token; that of many is made by the team.
pub(super) fn set_input(job: &Job<'_>, sketch: &SketchShare) {
    let asked = job.candidates.own && job.step.n_tokens == 1;
    if !asked || !matches!(sketch.kind, SketchKind::Bits { .. }) {
        return;
    }
    let n_embd = job.model.shape().n_embd;
    let mut watch = job.scratch.scores.watch(0);
    // SAFETY: between jobs the scratch is nobody else's; `normed` was written before the message.
    unsafe {
        let x = job.model.slots.normed.get();
        let input = job.scratch.sketch_inputs[0].get_mut();
        input.set(&x.token(0).values[..n_embd]);
    }
    watch.lap(Scorer::Signs);
}

/// Lists the active neurons of one token in pieces that the thread takes: candidates whose exact gate is open. Returns
/// how many pieces there are, of all threads.
pub(super) fn open_gates(job: &Job<'_>, sketch: &SketchShare, member: &Member<'_>) -> usize {
    let (scratch, share) = (job.scratch, job.share);
    // SAFETY: the list and the thread's scratch are its own until the barrier.
    let (list, mine) = unsafe {
        (
            scratch.lists[member.thread].get_mut(),
            scratch.threads[member.thread].get_mut(),
        )
    };
    list.clear();
    let (mut n_named, mut n_candidates) = (0, 0);
    let row_bytes = sketch.row_bytes(share.gate.shape.row_bytes());
    let cut = Cut::new(share.neurons.len(), ROW_GROUP, row_bytes, member);
    let mut found = std::mem::take(&mut mine.piece);
    for Piece { index, units, .. } in cut.pieces(&scratch.gates, member) {
        let ids = &mut found.ids;
        let watch = scratch.scores.watch(member.thread);
        n_named += score(job, sketch, units.clone(), mine, ids, watch);
        if job.candidates.predicted {
            let all = predicted_ids(job);
            let inside = |bound: usize| all.partition_point(|&id| (id as usize) < bound);
            let predicted = &all[inside(units.start)..inside(units.end)];
            merge(ids, predicted, &mut mine.merged);
        }
        n_candidates += ids.len() as u64;
        found.gates.clear();
        found.gates.resize(ids.len(), 0.0);
        exact_gates(job, sketch, ids, mine, &mut found.gates);
        let floors = sketch.floor.as_deref();
        keep_open(ids, &mut found.gates, floors);
        let start = list.ids.len();
        list.ids.extend_from_slice(ids);
        list.gates.extend_from_slice(&found.gates);
        scratch
            .found
            .note(index, member.thread, start..list.ids.len());
    }
    mine.piece = found;
    scratch.named.fetch_add(n_named, Ordering::Relaxed);
    scratch
        .candidates
        .fetch_add(n_candidates, Ordering::Relaxed);
    cut.n_pieces * member.n_threads
}

/// Lists the thread's active neurons of one token of which all candidates were named: each thread has as many of these.
pub(super) fn named_gates(
    job: &Job<'_>,
    sketch: &SketchShare,
    list: &mut ActiveList,
    mine: &mut ThreadScratch,
    member: &Member<'_>,
) {
    let all = predicted_ids(job);
    list.ids.clear();
    list.ids.extend_from_slice(&all[member.part(all.len(), 1)]);
    let n_candidates = list.ids.len();
    job.scratch
        .candidates
        .fetch_add(n_candidates as u64, Ordering::Relaxed);
    list.gates.clear();
    list.gates.resize(n_candidates, 0.0);
    exact_gates(job, sketch, &list.ids, mine, &mut list.gates);
    keep_open(&mut list.ids, &mut list.gates, sketch.floor.as_deref());
}

/// What was predicted ahead, ascending, counted from the node's first neuron.
fn predicted_ids<'a>(job: &Job<'a>) -> &'a [u32] {
    // SAFETY: they were written before the message was sent.
    unsafe { job.model.slots.predicted[job.node][job.layer % 2].get() }
}

/// Replaces `ids` by the sketch's candidates among neurons `part`; returns how many signs named.
fn score(
    job: &Job<'_>,
    sketch: &SketchShare,
    part: Range<usize>,
    mine: &mut ThreadScratch,
    ids: &mut Vec<u32>,
    mut watch: Watch<'_>,
) -> u64 {
    let (cpu, scratch) = (job.model.cpu, job.scratch);
    ids.clear();
    if let SketchKind::Nothing = sketch.kind {
        ids.extend(part.start as u32..part.end as u32);
        return 0;
    }
    let mut named = 0;
    let (bias, first) = (&sketch.bias[part.clone()], part.start);
    // SAFETY: what all threads prepared is complete; scores and sums of these neurons are this
    // thread's.
    unsafe {
        match &sketch.kind {
            SketchKind::Nothing => {}
            SketchKind::LowRank { a, b } => {
                let scores = scratch.gate.write(part.clone());
                let rank = a.shape.n_rows;
                let hidden = mine.hidden.of(rank);
                hidden.set(cpu, 0, scratch.hidden.read(0..rank));
                gemv(cpu, b.view(), hidden.token(0), part, scores);
                candidates(scores, bias, first as u32, ids);
                watch.lap(Scorer::LowRank);
            }
            SketchKind::Bits {
                planes,
                two_bit_bias,
            } => {
                let (planes, x) = (planes.view(), scratch.sketch_inputs[0].get());
                let sums = scratch.sums.write(part.clone());
                sign_sums(cpu, planes, x, part, sums);
                candidates_of_sums(sums, x.scale(), bias, first as u32, ids);
                named = ids.len() as u64;
                watch.lap(Scorer::Signs);
                if let Some(bias) = two_bit_bias {
                    let two = &mut mine.two_bit_sums;
                    two.resize(ids.len(), 0);
                    two_bit_sums(cpu, planes, x, first, sums, ids, two);
                    keep_candidates(ids, two, x.scale(), bias);
                    watch.lap(Scorer::SecondBits);
                }
            }
        }
    }
    named
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

/// Gates of the candidates `ids`.
fn exact_gates(
    job: &Job<'_>,
    sketch: &SketchShare,
    ids: &[u32],
    mine: &mut ThreadScratch,
    out: &mut [f32],
) {
    let cpu = job.model.cpu;
    // SAFETY: the activations are set.
    let x = unsafe { job.model.slots.normed.get().token(0) };
    match &sketch.kind {
        SketchKind::LowRank { .. } | SketchKind::Nothing => {
            row_products(cpu, job.share.gate.neuron_rows(), x, ids, out);
        }
        SketchKind::Bits { planes, .. } if cpu.mode() == ActivationMode::Q8 => {
            plane_gates(cpu, planes.view(), x, ids, out);
        }
        SketchKind::Bits { planes, .. } => {
            for (&id, out) in ids.iter().zip(out) {
                let rows = planes.view().unpacked(id as usize, &mut mine.row);
                row_products(cpu, rows, x, &[0], std::slice::from_mut(out));
            }
        }
    }
}

/// Bytes that a thread pulls towards its caches at most: more would push out what it has pulled.
const PREFETCH_BYTES: usize = 1 << 20;

/// Pulls what was predicted towards the team's caches: gates and ups, each thread the first of its part of the neurons; and its
/// columns of all down rows, where there is room for them too.
pub(super) fn prefetch(job: &Job<'_>, team: &mut Team) {
    let share = job.share;
    let Some(records) = share.ffn.paired() else {
        return;
    };
    let up_rows = records.up_rows().expect("records have up rows");
    let all = predicted_ids(job);
    let n_max = PREFETCH_BYTES / gate_up_bytes(up_rows).max(1);
    team.run(&|member| {
        let mine = &all[member.part(all.len(), 1)];
        for &id in &mine[..mine.len().min(n_max)] {
            let id = id as usize;
            match share.sketch.as_ref().map(|sketch| &sketch.kind) {
                Some(SketchKind::LowRank { .. } | SketchKind::Nothing) => {
                    let rows = share.gate.neuron_rows();
                    rows.prefetch(id, 0..rows.n_embd);
                }
                Some(SketchKind::Bits { planes, .. }) => planes.view().prefetch(id),
                None => {}
            }
            up_rows.prefetch(id, 0..up_rows.n_embd);
        }
        if prefetches_down(job, records, &member) {
            let columns = down_columns(job, &member);
            for &id in all {
                records.down_rows().prefetch(id as usize, columns.clone());
            }
        }
    });
}

fn gate_up_bytes(up_rows: NeuronRows<'_>) -> usize {
    2 * up_rows.row_bytes()
}

/// Whether what was predicted ahead has the thread's columns of all its down rows pulled towards the caches.
pub(super) fn prefetches_down(job: &Job<'_>, records: &NeuronStore, member: &Member<'_>) -> bool {
    let Some(up_rows) = records.up_rows() else {
        return false;
    };
    let (n, down_rows) = (predicted_ids(job).len(), records.down_rows());
    let n_columns = down_columns(job, member).len();
    let down_bytes = down_rows.row_bytes() * n_columns / down_rows.n_embd.max(1);
    let bytes = member.part(n, 1).len() * gate_up_bytes(up_rows) + n * down_bytes;
    job.model.prefetches(job.layer) && bytes <= PREFETCH_BYTES
}

/// Notes what the sketch's scores of one token have read. Second bits of candidates are theirs, and not the gates'.
pub(super) fn note_score_bytes(job: &Job<'_>, sketch: &SketchShare) {
    if !job.candidates.own {
        return;
    }
    let scores = &job.scratch.scores;
    match &sketch.kind {
        SketchKind::Nothing => {}
        SketchKind::LowRank { a, b } => scores.read(Scorer::LowRank, a.bytes.len() + b.bytes.len()),
        SketchKind::Bits {
            planes,
            two_bit_bias,
        } => {
            scores.read(Scorer::Signs, planes.top.len());
            if two_bit_bias.is_some() {
                let named = job.scratch.named.load(Ordering::Relaxed) as usize;
                scores.read(Scorer::SecondBits, named * planes.shape.high_row_bytes());
            }
        }
    }
}

/// Bytes of weights that looking for open gates reads, of one token with so many candidates.
pub(super) fn gate_bytes(job: &Job<'_>, sketch: &SketchShare, candidates: usize) -> usize {
    let (gate, own) = (&job.share.gate, job.candidates.own);
    match &sketch.kind {
        SketchKind::Nothing => candidates * gate.shape.row_bytes(),
        SketchKind::LowRank { a, b } => {
            let scores = if own {
                a.bytes.len() + b.bytes.len()
            } else {
                0
            };
            scores + candidates * gate.shape.row_bytes()
        }
        SketchKind::Bits {
            planes,
            two_bit_bias,
        } => {
            let shape = planes.shape;
            // a candidate's signs are read again where its rest is: they have just been there
            let signs = if own {
                planes.top.len()
            } else {
                candidates * shape.sign_row_bytes()
            };
            let named = job.scratch.named.load(Ordering::Relaxed) as usize;
            let more = match two_bit_bias {
                Some(_) if own => named.saturating_sub(candidates) * shape.high_row_bytes(),
                _ => 0,
            };
            signs + more + candidates * shape.rest_row_bytes()
        }
    }
}

/// The same of many tokens, which need all rows.
pub(super) fn gate_bytes_of_tokens(job: &Job<'_>, sketch: &SketchShare) -> usize {
    match &sketch.kind {
        SketchKind::Nothing => job.share.gate.bytes.len(),
        SketchKind::LowRank { a, b } => {
            let scores = a.bytes.len() + b.bytes.len();
            scores + job.share.neurons.len() * job.share.gate.shape.row_bytes()
        }
        SketchKind::Bits { planes, .. } => planes.top.len() + planes.rest.len(),
    }
}

pub(super) use batch::{gates_of_chunk, hidden_writer, prepare_batch};

/// Many tokens.
mod batch {
    use pi_kernels::ffn_sparse::sketch::list_open;
    use pi_kernels::ffn_sparse::sketch::planes::sign_sums_of;
    use pi_kernels::ffn_sparse::{UpScratch, row_products_tokens};
    use pi_kernels::gemm::gemm;
    use pi_kernels::{ActBatch, ActWriter, Cpu, StridedOut};

    use super::*;
    use crate::cold_layer::rows::multiply;
    use crate::scratch::{NEURON_CHUNK, ThreadScratch};

    /// What the sketch takes of all tokens: the small product of low rank, or their integers.
    ///
    /// `writer` is [`hidden_writer`]'s.
    pub fn prepare_batch(
        job: &Job<'_>,
        sketch: &SketchShare,
        writer: Option<&ActWriter<'_>>,
        member: &Member<'_>,
    ) {
        let (model, scratch, n_tokens) = (job.model, job.scratch, job.step.n_tokens);
        if let SketchKind::Bits { .. } = sketch.kind {
            let n_embd = model.shape().n_embd;
            for token in member.part(n_tokens, 1) {
                // SAFETY: these tokens are this thread's up to the barrier; `normed` was written before the message.
                unsafe {
                    let x = &model.slots.normed.get().token(token).values[..n_embd];
                    scratch.sketch_inputs[token].get_mut().set(x);
                }
            }
            return member.barrier();
        }
        let (SketchKind::LowRank { a, .. }, Some(writer)) = (&sketch.kind, writer) else {
            return;
        };
        let rank = a.shape.n_rows;
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
            SketchKind::Bits { .. } | SketchKind::Nothing => None,
        }
    }

    /// Gates of neurons `neurons` for all tokens into `gates` (`[n_tokens, neurons.len()]`); zero for
    /// those that are no candidates, or not above their floor. Returns how many are open.
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
            merged: ids,
            ..
        } = mine;
        let products = up.as_mut().expect("scratch for paired rows");
        // SAFETY: the activations of all tokens are set.
        let x = unsafe { model.slots.normed.get() };
        match &sketch.kind {
            SketchKind::Nothing => all_gates(job, neurons.clone(), products, gates),
            SketchKind::LowRank { a, b } => {
                // SAFETY: the team has set them.
                let hidden = unsafe { job.scratch.hidden_rows.get(a.shape.n_rows) };
                let out = StridedOut::from_slice(scores, width, n_tokens, 0..width);
                multiply(model.cpu, b, hidden, n_tokens, neurons.clone(), out);
                all_gates(job, neurons.clone(), products, gates);
            }
            SketchKind::Bits { planes, .. } => {
                let mut unpacking = Unpacking { planes, row, image };
                unpacking.multiply(model.cpu, x, n_tokens, neurons.clone(), gates);
            }
        }
        let mut n_open = 0;
        for token in 0..n_tokens {
            let gates = gates.row(token);
            let floors = sketch.floor.as_ref();
            let floors = floors.map(|floors| &floors[neurons.clone()]);
            list_open(gates, floors, neurons.start as u32, ids);
            match &sketch.kind {
                SketchKind::Nothing => {}
                SketchKind::LowRank { .. } => {
                    let scores = &scores[token * width..][..width];
                    ids.retain(|&id| {
                        let score = scores[id as usize - neurons.start];
                        let is_out = score + sketch.bias[id as usize] <= 0.0;
                        !is_out
                    });
                    keep_gates(gates, neurons.start, ids);
                }
                SketchKind::Bits {
                    planes,
                    two_bit_bias,
                } => {
                    // SAFETY: the team has set them.
                    let x = unsafe { job.scratch.sketch_inputs[token].get() };
                    let (cpu, planes, first) = (model.cpu, planes.view(), neurons.start);
                    let (mut sums, mut of_ids) = ([0; NEURON_CHUNK], [0; NEURON_CHUNK]);
                    let of_open = &mut of_ids[..ids.len()];
                    sign_sums_of(cpu, planes, x, ids, of_open);
                    for (&id, &mut sum) in ids.iter().zip(&mut *of_open) {
                        sums[id as usize - first] = sum;
                    }
                    keep_candidates(ids, of_open, x.scale(), &sketch.bias);
                    if let Some(bias) = two_bit_bias {
                        let of_named = &mut of_ids[..ids.len()];
                        two_bit_sums(cpu, planes, x, first, &sums, ids, of_named);
                        keep_candidates(ids, of_named, x.scale(), bias);
                    }
                    keep_gates(gates, first, ids);
                }
            }
            n_open += ids.len() as u64;
        }
        n_open
    }

    /// Closes gates that are not of neurons `ids`, counted from `first` on.
    fn keep_gates(gates: &mut [f32], first: usize, ids: &[u32]) {
        let mut all = [0.0; NEURON_CHUNK];
        all[..gates.len()].copy_from_slice(gates);
        gates.fill(0.0);
        for &id in ids {
            let at = id as usize - first;
            gates[at] = all[at];
        }
    }

    /// All gates of a chunk, from rows that lie one by one.
    fn all_gates(
        job: &Job<'_>,
        neurons: Range<usize>,
        products: &mut UpScratch,
        gates: &mut StridedOut<'_>,
    ) {
        let (model, n_tokens) = (job.model, job.step.n_tokens);
        // SAFETY: the activations of all tokens are set.
        let x = unsafe { model.slots.normed.get() };
        let rows = job.share.gate.neuron_rows();
        row_products_tokens(model.cpu, rows, x, 0..n_tokens, neurons, gates, products);
    }

    /// Rows of planes put together, 16 at a time, for matrix products.
    struct Unpacking<'a> {
        planes: &'a PlanesStore,
        row: &'a mut [u8],
        image: &'a mut [u8],
    }

    impl Unpacking<'_> {
        /// Products of rows `neurons`.
        fn multiply(
            &mut self,
            cpu: Cpu,
            x: &ActBatch,
            n_tokens: usize,
            neurons: Range<usize>,
            out: &mut StridedOut<'_>,
        ) {
            let planes = self.planes.view();
            for first in neurons.clone().step_by(ROW_GROUP) {
                let rows = first..(first + ROW_GROUP).min(neurons.end);
                let m = planes.group(cpu, rows.clone(), self.row, self.image);
                let columns = rows.start - neurons.start..rows.end - neurons.start;
                let part = out.columns_of(columns);
                gemm(cpu, m, x, 0..n_tokens, 0..rows.len(), part);
            }
        }
    }
}
