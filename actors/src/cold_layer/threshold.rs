//! Which neurons are active: by an open gate, or by thresholds where gates never close.
//!
//! With up beside down, act(gate) decides before either is read. With ups apart, act(gate) · up
//! decides and only down is skipped: every thread computes gate, up and activation of neurons that
//! it takes, and lists the large ones. Barrier. Each thread sums down over columns of its own.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::atomic::Ordering;

use pi_kernels::StridedOut;
use pi_kernels::elementwise::{gelu_in_place, silu_in_place};
use pi_kernels::ffn_sparse::{gate_active, large_active, zero_small};

use super::Job;
use super::ffn::{divide, down_batch, gate_up_chunks, gate_up_token, gather, sum_token};
use crate::scratch::{ActiveList, NEURON_CHUNK, ThreadScratch};
use crate::team::{Member, Team};
use crate::weights::{GateActivation, Matrix, NeuronStore};

/// Lists the neurons `part`, whose gates (before the activation, overwritten) let them contribute.
pub(super) fn list_gates(
    job: &Job<'_>,
    gates: &mut [f32],
    part: Range<usize>,
    list: &mut ActiveList,
) {
    let first = part.start as u32;
    let (ids, kept) = (&mut list.ids, &mut list.gates);
    match &job.share.thresholds {
        None => gate_active(gates, first, ids, kept),
        Some(thresholds) => {
            activate(job, gates);
            large_active(gates, &thresholds[part], first, ids, kept);
        }
    }
}

/// Applies the activation to gates of many tokens, and sets those to 0 that do not contribute (NaN
/// stays, so that it surfaces); returns how many do.
pub(super) fn close_gates(job: &Job<'_>, gates: &mut StridedOut<'_>, neurons: Range<usize>) -> u64 {
    let Some(thresholds) = &job.share.thresholds else {
        return close_relu_gates(gates);
    };
    let mut active = 0;
    for token in 0..gates.n_tokens() {
        let gates = gates.row(token);
        activate(job, gates);
        active += zero_small(gates, &thresholds[neurons.clone()]);
    }
    active
}

/// Applies the activation, of gates that never close.
fn activate(job: &Job<'_>, gates: &mut [f32]) {
    let cpu = job.model.cpu;
    match job.model.shape().gate_activation {
        GateActivation::Silu => silu_in_place(cpu, gates),
        GateActivation::Gelu => gelu_in_place(cpu, gates),
        GateActivation::Relu => unreachable!("thresholds are for gates that never close"),
    }
}

fn close_relu_gates(gates: &mut StridedOut<'_>) -> u64 {
    let mut active = 0;
    for token in 0..gates.n_tokens() {
        for gate in gates.row(token) {
            let closed = *gate <= 0.0;
            *gate = if closed { 0.0 } else { *gate };
            active += u64::from(!closed);
        }
    }
    active
}

/// All gates and ups, and down of the neurons whose product is large.
pub(super) fn run(
    job: &Job<'_>,
    up: &Matrix,
    rows: &NeuronStore,
    thresholds: &[f32],
    team: &mut Team,
) {
    team.run(&|member| {
        if job.step.n_tokens == 1 {
            token(job, up, rows, thresholds, &member);
        } else {
            tokens(job, up, thresholds, &member);
            member.barrier();
            down_batch(job, rows, true, &member);
        }
    });
}

fn token(job: &Job<'_>, up: &Matrix, rows: &NeuronStore, thresholds: &[f32], member: &Member<'_>) {
    let scratch = job.scratch;
    // SAFETY: until the barrier, the list is this thread's.
    let list = unsafe { scratch.lists[member.thread].get_mut() };
    list.clear();
    let n_pieces = gate_up_token(job, up, member, |piece, act, _| {
        let (start, part) = (list.ids.len(), piece.units);
        let (thresholds, first) = (&thresholds[part.clone()], part.start as u32);
        large_active(act, thresholds, first, &mut list.ids, &mut list.gates);
        let found = start..list.ids.len();
        scratch.found.note(piece.index, member.thread, found);
    });
    member.barrier();
    // SAFETY: each thread has its own.
    let ThreadScratch { all, spans, .. } = unsafe { scratch.threads[member.thread].get_mut() };
    gather(scratch, n_pieces, all);
    divide(job, &all.ids, spans);
    if member.thread == 0 {
        let n_active = all.ids.len() as u64;
        scratch.active.store(n_active, Ordering::Relaxed);
        scratch.rows_read.store(n_active, Ordering::Relaxed);
    }
    sum_token(job, rows, &all.ids, &all.gates, spans, member);
}

/// Marks of a chunk's neurons are the bits of one word.
const _: () = assert!(NEURON_CHUNK <= u64::BITS as usize);

fn tokens(job: &Job<'_>, up: &Matrix, thresholds: &[f32], member: &Member<'_>) {
    gate_up_chunks(job, up, member, |neurons, act, _| {
        let (mut active, mut read) = (0, 0u64);
        for token in 0..act.n_tokens() {
            let act = act.row(token);
            active += zero_small(act, &thresholds[neurons.clone()]);
            for (n, a) in act.iter().enumerate() {
                read |= u64::from(*a != 0.0) << n;
            }
        }
        let n_read = u64::from(read.count_ones());
        job.scratch.active.fetch_add(active, Ordering::Relaxed);
        job.scratch.rows_read.fetch_add(n_read, Ordering::Relaxed);
    });
}
