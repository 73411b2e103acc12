//! The node's neurons: gate → skip → up → down, into the node's partial sums.
//!
//! One token, `exact`: every thread computes gates of neurons and lists those that are open.
//! Barrier. The lists together are cut into equal parts for up; beside it, each thread asks for its
//! columns of all downs. Barrier. Each thread sums down over columns of its own. Gate and up may be
//! divided in any way, since each value is one thread's: who has done its part takes pieces of others' ([`crate::pieces`]).
//! The sum over neurons has its fixed order.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::Ordering;

use pi_kernels::elementwise::{add_assign, gelu_mul, relu_mul, silu_mul};
use pi_kernels::ffn_sparse::{
    GroupSpan, SUBTREES_MAX, ask_for_down, down_active, down_tokens, up_active, up_tokens,
};
use pi_kernels::gemm::gemv;
use pi_kernels::quant::BLOCK;
use pi_kernels::{ActWriter, Cpu, ROW_GROUP, StridedOut};

use super::rows::multiply;
use super::{Job, predicted, threshold, weights_read};
use crate::counters::Counters;
use crate::gpu::take_hidden_part;
use crate::model::group_neurons;
use crate::pieces::{Cut, Piece};
use crate::scratch::{ActiveList, NEURON_CHUNK, NodeScratch, ThreadScratch};
use crate::team::{Member, Team};
use crate::weights::{FfnShare, GateActivation, Matrix, NeuronStore, SketchShare, UpRows};

/// Runs the stage with the node's team.
pub(super) fn run(job: Job<'_>, team: &mut Team) -> Counters {
    let share = job.share;
    if share.neurons.is_empty() {
        return weights_read(0);
    }
    let n_tokens = job.step.n_tokens;
    job.scratch.gates.reset();
    job.scratch.ups.reset();
    if let Some(sketch) = &share.sketch {
        predicted::set_input(&job, sketch);
    }
    match (&share.ffn, n_tokens) {
        (
            FfnShare::Neurons {
                up: UpRows::Paired,
                rows,
            },
            1,
        ) => {
            let alone = !job.candidates.own && share.sketch.is_some();
            match share.sketch.as_ref().filter(|_| alone) {
                Some(sketch) => run_named(&job, rows, sketch, team),
                None => team.run(&|member| sparse_token(&job, rows, member)),
            }
        }
        (
            FfnShare::Neurons {
                up: UpRows::Paired,
                rows,
            },
            _,
        ) => {
            let writer = predicted::hidden_writer(&job);
            team.run(&|member| sparse_tokens(&job, rows, writer.as_ref(), member));
        }
        (
            FfnShare::Neurons {
                up: UpRows::Interleaved(up),
                rows,
            },
            _,
        ) => match &share.thresholds {
            Some(thresholds) => threshold::run(&job, up, rows, thresholds, team),
            None => {
                team.run(&|member| {
                    dense_gate_up(&job, up, &member);
                    member.barrier();
                    down_all(&job, rows, &member);
                });
            }
        },
        (FfnShare::Dense { up, down }, _) => {
            // SAFETY: between jobs nobody else has it.
            let writer = unsafe { job.scratch.act_rows.get_mut() }.writer();
            team.run(&|member| {
                dense_gate_up(&job, up, &member);
                member.barrier();
                plain_down(&job, down, &writer, &member);
            });
        }
    }
    count(&job)
}

fn count(job: &Job<'_>) -> Counters {
    let share = job.share;
    let neurons = share.neurons.len();
    let rows_read = match (&share.ffn, &share.thresholds) {
        (
            FfnShare::Neurons {
                up: UpRows::Interleaved(_),
                ..
            },
            None,
        ) => neurons,
        _ => job.scratch.rows_read.load(Ordering::Relaxed) as usize,
    };
    let thresholds = share.thresholds.as_ref().map_or(0, Vec::len) * size_of::<f32>();
    let bytes = match &share.ffn {
        FfnShare::Neurons {
            up: UpRows::Paired,
            rows,
        } => rows_read * rows.record_bytes(),
        FfnShare::Neurons {
            up: UpRows::Interleaved(up),
            rows,
        } => up.bytes.len() + rows_read * rows.record_bytes(),
        FfnShare::Dense { up, down } => up.bytes.len() + down.bytes.len(),
    };
    let n_tokens = job.step.n_tokens;
    let mut work = weights_read(thresholds + bytes);
    work.neurons = (neurons * n_tokens) as u64;
    let gate_bytes = match &share.sketch {
        None => {
            work.candidates = work.neurons;
            share.gate.bytes.len()
        }
        Some(sketch) => {
            if n_tokens > 1 {
                work.candidates = work.neurons;
                predicted::gate_bytes_of_tokens(job, sketch)
            } else {
                work.candidates = job.scratch.candidates.load(Ordering::Relaxed);
                predicted::note_score_bytes(job, sketch);
                predicted::gate_bytes(job, sketch, work.candidates as usize)
            }
        }
    };
    work.weight_bytes += gate_bytes as u64;
    work.active_neurons = job.scratch.active.load(Ordering::Relaxed);
    work
}

/// One token, active neurons only.
fn sparse_token(job: &Job<'_>, rows: &NeuronStore, member: Member<'_>) {
    let (model, scratch, share) = (job.model, job.scratch, job.share);
    let cpu = model.cpu;
    let up_rows = rows.up_rows().expect("records have up rows");
    let n_pieces = match &share.sketch {
        None => open_gates(job, &member),
        Some(sketch) => {
            predicted::prepare(job, sketch, &member);
            predicted::open_gates(job, sketch, &member)
        }
    };
    // SAFETY: `normed` was written before the message was sent.
    let x = unsafe { model.slots.normed.get().token(0) };
    member.barrier();
    // SAFETY: each thread has its own.
    let ThreadScratch { all, spans, .. } = unsafe { scratch.threads[member.thread].get_mut() };
    gather(scratch, n_pieces, all);
    let n_active = all.ids.len();
    let cut = Cut::new(n_active, 1, rows.up_row_bytes(), &member);
    let columns = down_columns(job, &member);
    let n_own = member.part(n_active, 1).len();
    let mut beside = ask_for_down(rows.down_rows(), columns, &all.ids, n_own);
    let mut n_done = 0;
    for Piece { units, .. } in cut.pieces(&scratch.ups, &member) {
        let (ids, gates) = (&all.ids[units.clone()], &all.gates[units.clone()]);
        // SAFETY: who took the piece is the only one who writes these activations.
        let out = unsafe { scratch.act.write(units) };
        up_active(cpu, up_rows, x, ids, gates, out, |j| beside(n_done + j));
        n_done += ids.len();
    }
    if member.thread == 0 {
        scratch.active.store(n_active as u64, Ordering::Relaxed);
        scratch.rows_read.store(n_active as u64, Ordering::Relaxed);
        count_fired(job, &all.ids);
    }
    member.barrier();
    divide(job, &all.ids, spans);
    // SAFETY: all activations are written.
    let act = unsafe { scratch.act.read(0..n_active) };
    sum_token(job, rows, &all.ids, act, spans, &member);
}

/// The team's part of [`named_token`]; and of the hidden state, where no job before this one has taken it.
fn run_named(job: &Job<'_>, rows: &NeuronStore, sketch: &SketchShare, team: &mut Team) {
    let Some(gpu) = job.model.takes_in_place(job.layer) else {
        return team.run(&|member| named_token(job, rows, sketch, member));
    };
    // SAFETY: the device saw it before it sent the message; columns are given behind the barrier.
    let hidden = unsafe { gpu.hidden(job.layer) };
    // SAFETY: all other nodes, of which there are none, have answered what they read it for.
    let writer = unsafe { job.model.slots.normed.get_mut() }.writer();
    team.run(&|member| {
        take_hidden_part(job.model, hidden, &writer, &member);
        member.barrier();
        named_token(job, rows, sketch, member);
    });
}

/// One token, of which a predictor named all candidates: each thread has as many, and takes them from gate to up.
fn named_token(job: &Job<'_>, rows: &NeuronStore, sketch: &SketchShare, member: Member<'_>) {
    let (model, scratch) = (job.model, job.scratch);
    let up_rows = rows.up_rows().expect("records have up rows");
    // SAFETY: `normed` is complete; the list and the thread's scratch are its own until the
    // barrier.
    let (x, list, mine) = unsafe {
        (
            model.slots.normed.get().token(0),
            scratch.lists[member.thread].get_mut(),
            scratch.threads[member.thread].get_mut(),
        )
    };
    predicted::named_gates(job, sketch, list, mine, &member);
    let ThreadScratch { all, spans, .. } = mine;
    all.gates.clear();
    all.gates.resize(list.ids.len(), 0.0);
    let (down_rows, ids) = (rows.down_rows(), &list.ids);
    let there = predicted::prefetches_down(job, rows, &member);
    let beside = |j: usize| {
        if !there {
            down_rows.prefetch(ids[j] as usize, 0..down_rows.n_embd);
        }
    };
    let (gates, out) = (&list.gates, &mut all.gates);
    up_active(model.cpu, up_rows, x, ids, gates, out, beside);
    std::mem::swap(&mut list.gates, &mut all.gates);
    let n_active = list.ids.len() as u64;
    scratch.active.fetch_add(n_active, Ordering::Relaxed);
    scratch.rows_read.fetch_add(n_active, Ordering::Relaxed);
    scratch
        .found
        .note(member.thread, member.thread, 0..list.ids.len());
    member.barrier();
    gather(scratch, member.n_threads, all);
    if member.thread == 0 {
        count_fired(job, &all.ids);
    }
    divide(job, &all.ids, spans);
    sum_token(job, rows, &all.ids, &all.gates, spans, &member);
}

/// Counts the node's neurons that fired, where re-planning wants to know.
fn count_fired(job: &Job<'_>, ids: &[u32]) {
    if let Some(counts) = &job.model.cold_counts {
        counts.note(job.layer, job.node, job.share.neurons.start, ids);
    }
}

/// What was found in all pieces of the neurons, in order of these, in `all`.
pub(super) fn gather(scratch: &NodeScratch, n_pieces: usize, all: &mut ActiveList) {
    all.clear();
    for (thread, part) in scratch.found.in_order(n_pieces) {
        // SAFETY: all lists are complete, and change only after this message is answered.
        let list = unsafe { scratch.lists[thread].get() };
        all.ids.extend_from_slice(&list.ids[part.clone()]);
        all.gates.extend_from_slice(&list.gates[part]);
    }
}

/// Where the node's groups lie in the ascending list `ids`, into `spans`.
pub(super) fn divide(job: &Job<'_>, ids: &[u32], spans: &mut Vec<GroupSpan>) {
    spans.clear();
    let mut from = 0;
    for (group, neurons) in group_neurons(&job.model.weights.neuron_groups, job.share) {
        let to = from + ids[from..].partition_point(|&id| (id as usize) < neurons.end);
        spans.push(GroupSpan {
            group,
            span: from..to,
        });
        from = to;
    }
}

/// Lists the active neurons of one token in pieces that the thread takes: all gates are computed. Returns how many
/// pieces there are, of all threads.
fn open_gates(job: &Job<'_>, member: &Member<'_>) -> usize {
    let (model, scratch, share) = (job.model, job.scratch, job.share);
    let gate = &share.gate;
    let cut = Cut::new(
        share.neurons.len(),
        ROW_GROUP,
        gate.shape.row_bytes(),
        member,
    );
    // SAFETY: `normed` was written before the message was sent; until the barrier the list is this thread's, and the
    // neurons of a piece are who took it's.
    unsafe {
        let x = model.slots.normed.get().token(0);
        let list = scratch.lists[member.thread].get_mut();
        list.clear();
        for Piece { index, units, .. } in cut.pieces(&scratch.gates, member) {
            let gates = scratch.gate.write(units.clone());
            gemv(model.cpu, gate.view(), x, units.clone(), gates);
            let start = list.ids.len();
            threshold::list_gates(job, gates, units, list);
            scratch
                .found
                .note(index, member.thread, start..list.ids.len());
        }
    }
    cut.n_pieces * member.n_threads
}

/// Which columns of the sums over neurons are the thread's.
pub(super) fn down_columns(job: &Job<'_>, member: &Member<'_>) -> Range<usize> {
    member.part(job.model.shape().n_embd, BLOCK)
}

/// The thread's columns of the partial sums of one token.
pub(super) fn sum_token(
    job: &Job<'_>,
    rows: &NeuronStore,
    ids: &[u32],
    act: &[f32],
    spans: &[GroupSpan],
    member: &Member<'_>,
) {
    let model = job.model;
    let columns = down_columns(job, member);
    if columns.is_empty() {
        return;
    }
    let n_sums = job.n_sums;
    let mut sums: [&mut [f32]; SUBTREES_MAX] = Default::default();
    for (n, sum) in sums[..n_sums].iter_mut().enumerate() {
        let at = model.partial_offset(n);
        // SAFETY: the columns are this thread's until the node's `Partial` is sent.
        *sum =
            unsafe { model.slots.partials[job.node].write(at + columns.start..at + columns.end) };
    }
    down_active(
        model.cpu,
        rows.down_rows(),
        ids,
        act,
        spans,
        columns.clone(),
        &mut sums[..n_sums],
    );
    if let Some(gpu) = model.answers_in_place(job.layer) {
        let [first, others @ ..] = &mut sums[..n_sums] else {
            return;
        };
        for other in others {
            add_assign(model.cpu, first, other);
        }
        gpu.give(job.layer, columns.start, first);
    }
}

/// Many tokens, the union of their active neurons only. A chunk of neurons is whoever's is free.
fn sparse_tokens(
    job: &Job<'_>,
    rows: &NeuronStore,
    writer: Option<&ActWriter<'_>>,
    member: Member<'_>,
) {
    let (model, scratch, share) = (job.model, job.scratch, job.share);
    let n_neurons = share.neurons.len();
    let n_tokens = job.step.n_tokens;
    let up_rows = rows.up_rows().expect("records have up rows");
    if let Some(sketch) = &share.sketch {
        predicted::prepare_batch(job, sketch, writer, &member);
    }
    // SAFETY: each thread has its own.
    let mine = unsafe { scratch.threads[member.thread].get_mut() };
    // SAFETY: written before the message was sent.
    let x = unsafe { model.slots.normed.get() };
    while let Some(chunk) = job.take(n_neurons.div_ceil(NEURON_CHUNK)) {
        let neurons = chunk * NEURON_CHUNK..((chunk + 1) * NEURON_CHUNK).min(n_neurons);
        // SAFETY: the chunk's neurons are this thread's.
        let mut act = unsafe { scratch.act.columns(0, n_neurons, n_tokens, neurons.clone()) };
        let active = if let Some(sketch) = &share.sketch {
            predicted::gates_of_chunk(job, sketch, neurons.clone(), mine, &mut act)
        } else {
            let out = act.columns_of(0..neurons.len());
            multiply(model.cpu, &share.gate, x, n_tokens, neurons.clone(), out);
            threshold::close_gates(job, &mut act, neurons.clone())
        };
        let up_scratch = mine.up.as_mut().expect("scratch for paired rows");
        let read = up_tokens(
            model.cpu,
            up_rows,
            x,
            0..n_tokens,
            neurons,
            &mut act,
            up_scratch,
        );
        scratch.active.fetch_add(active, Ordering::Relaxed);
        scratch.rows_read.fetch_add(read as u64, Ordering::Relaxed);
    }
    member.barrier();
    down_batch(job, rows, true, &member);
}

/// Partial sums of many tokens over columns of the thread's own.
pub(super) fn down_batch(job: &Job<'_>, rows: &NeuronStore, skip_zeros: bool, member: &Member<'_>) {
    let (model, scratch) = (job.model, job.scratch);
    let (n_embd, n_tokens) = (model.shape().n_embd, job.step.n_tokens);
    let n_neurons = job.share.neurons.len();
    let columns = member.part(n_embd, BLOCK);
    if columns.is_empty() {
        return;
    }
    // SAFETY: each thread has its own.
    let mine = unsafe { scratch.threads[member.thread].get_mut() };
    mine.spans.clear();
    let groups = group_neurons(&model.weights.neuron_groups, job.share);
    mine.spans
        .extend(groups.map(|(group, span)| GroupSpan { group, span }));
    let n_sums = job.n_sums;
    let slot = &model.slots.partials[job.node];
    let mut sums: [StridedOut<'_>; SUBTREES_MAX] = std::array::from_fn(|n| {
        let used = n < n_sums;
        let at = if used { model.partial_offset(n) } else { 0 };
        let columns = if used { columns.clone() } else { 0..0 };
        // SAFETY: the columns are this thread's until the node's `Partial` is sent; the unused
        // outputs are empty.
        unsafe { slot.columns(at, n_embd, n_tokens, columns) }
    });
    // SAFETY: all activations are written.
    let act = unsafe { scratch.act.read(0..n_tokens * n_neurons) };
    down_tokens(
        model.cpu,
        rows.down_rows(),
        act,
        n_neurons,
        &mine.spans,
        columns,
        skip_zeros,
        &mut mine.down,
        &mut sums[..n_sums],
    );
}

/// Gate and up of all neurons, and their product, into `act`.
fn dense_gate_up(job: &Job<'_>, up: &Matrix, member: &Member<'_>) {
    if job.step.n_tokens == 1 {
        gate_up_token(job, up, member, |_, _, active| {
            job.scratch.active.fetch_add(active, Ordering::Relaxed);
        });
        return;
    }
    gate_up_chunks(job, up, member, |_, _, active| {
        job.scratch.active.fetch_add(active, Ordering::Relaxed);
    });
}

/// Gate, up and product of neurons for one token, in pieces that the thread takes: `visit` sees which piece it is, the
/// products, and how many contribute. Returns how many pieces there are, of all threads.
pub(super) fn gate_up_token(
    job: &Job<'_>,
    up: &Matrix,
    member: &Member<'_>,
    mut visit: impl FnMut(Piece, &[f32], u64),
) -> usize {
    let (model, scratch, share) = (job.model, job.scratch, job.share);
    let row_bytes = share.gate.shape.row_bytes() + up.shape.row_bytes();
    let cut = Cut::new(share.neurons.len(), ROW_GROUP, row_bytes, member);
    for piece in cut.pieces(&scratch.gates, member) {
        let part = piece.units.clone();
        // SAFETY: the normed state was written before the message was sent; who took the piece is the only one who
        // writes its neurons' values.
        let (x, gate, up_out, act) = unsafe {
            (
                model.slots.normed.get().token(0),
                scratch.gate.write(part.clone()),
                scratch.up.write(part.clone()),
                scratch.act.write(part.clone()),
            )
        };
        gemv(model.cpu, share.gate.view(), x, part.clone(), gate);
        gemv(model.cpu, up.view(), x, part, up_out);
        let active = activate(job, gate, up_out, act);
        visit(piece, act, active);
    }
    cut.n_pieces * member.n_threads
}

/// The same for many tokens, a chunk of neurons after the other: `visit` sees which neurons they
/// are, their products, and how many contribute.
pub(super) fn gate_up_chunks(
    job: &Job<'_>,
    up: &Matrix,
    member: &Member<'_>,
    visit: impl Fn(Range<usize>, &mut StridedOut<'_>, u64),
) {
    let (model, scratch, share) = (job.model, job.scratch, job.share);
    let n_neurons = share.neurons.len();
    let n_tokens = job.step.n_tokens;
    // SAFETY: written before the message was sent.
    let x = unsafe { model.slots.normed.get() };
    // SAFETY: each thread has its own.
    let mine = unsafe { scratch.threads[member.thread].get_mut() };
    while let Some(chunk) = job.take(n_neurons.div_ceil(NEURON_CHUNK)) {
        let neurons = chunk * NEURON_CHUNK..((chunk + 1) * NEURON_CHUNK).min(n_neurons);
        let width = neurons.len();
        for (matrix, out) in [
            (&share.gate, &mut mine.gate_chunk),
            (up, &mut mine.up_chunk),
        ] {
            let out = StridedOut::from_slice(out, width, n_tokens, 0..width);
            multiply(model.cpu, matrix, x, n_tokens, neurons.clone(), out);
        }
        let mut active = 0;
        // SAFETY: the chunk's neurons are this thread's.
        let mut act = unsafe { scratch.act.columns(0, n_neurons, n_tokens, neurons.clone()) };
        for token in 0..n_tokens {
            let row = token * width..(token + 1) * width;
            let (gate, up) = (&mine.gate_chunk[row.clone()], &mine.up_chunk[row]);
            active += activate(job, gate, up, act.row(token));
        }
        visit(neurons, &mut act, active);
    }
}

/// Writes act(gate) · up to `out`; returns how many neurons contribute.
fn activate(job: &Job<'_>, gate: &[f32], up: &[f32], out: &mut [f32]) -> u64 {
    let cpu: Cpu = job.model.cpu;
    match job.model.shape().gate_activation {
        GateActivation::Relu => {
            relu_mul(cpu, gate, up, out);
            let closed = |gate: &f32| *gate <= 0.0;
            gate.iter().map(|gate| u64::from(!closed(gate))).sum()
        }
        GateActivation::Silu => {
            silu_mul(cpu, gate, up, out);
            gate.len() as u64
        }
        GateActivation::Gelu => {
            gelu_mul(cpu, gate, up, out);
            gate.len() as u64
        }
    }
}

/// Down of all neurons, stored neuron by neuron.
fn down_all(job: &Job<'_>, rows: &NeuronStore, member: &Member<'_>) {
    let (model, scratch) = (job.model, job.scratch);
    if job.step.n_tokens > 1 {
        return down_batch(job, rows, false, member);
    }
    // SAFETY: each thread has its own.
    let mine = unsafe { scratch.threads[member.thread].get_mut() };
    let n_neurons = job.share.neurons.len();
    if mine.all.ids.len() != n_neurons {
        mine.all.ids.clear();
        mine.all.ids.extend(0..n_neurons as u32);
    }
    mine.spans.clear();
    let groups = group_neurons(&model.weights.neuron_groups, job.share);
    mine.spans
        .extend(groups.map(|(group, span)| GroupSpan { group, span }));
    // SAFETY: all activations are written.
    let act = unsafe { scratch.act.read(0..n_neurons) };
    sum_token(job, rows, &mine.all.ids, act, &mine.spans, member);
}

/// Down as the file has it, read whole: rows of the output, the node's columns.
fn plain_down(job: &Job<'_>, down: &Matrix, writer: &ActWriter<'_>, member: &Member<'_>) {
    let (model, scratch) = (job.model, job.scratch);
    let (n_embd, n_tokens) = (model.shape().n_embd, job.step.n_tokens);
    let n_neurons = job.share.neurons.len();
    for token in member.part(n_tokens, 1) {
        // SAFETY: all activations are written; the token is this thread's.
        unsafe {
            let act = scratch.act.read(token * n_neurons..(token + 1) * n_neurons);
            writer.set_with(model.cpu, token, |row| row.copy_from_slice(act));
        }
    }
    member.barrier();
    let rows: Range<usize> = member.part(n_embd, ROW_GROUP);
    // SAFETY: all rows of activations are set; the columns are this thread's.
    unsafe {
        let slot = &model.slots.partials[job.node];
        let out = slot.columns(0, n_embd, n_tokens, rows.clone());
        multiply(model.cpu, down, scratch.act_rows.get(), n_tokens, rows, out);
    }
}
