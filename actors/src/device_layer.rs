//! `DeviceLayer`: the device's part of one layer. Here the device is the host: the actor owns the
//! norms and the residual stream, and divides everything else over the nodes.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pi_kernels::elementwise::add_assign;
use pi_kernels::ffn_sparse::join_subtrees;
use pi_kernels::norm::{can_be_normed, rms_norm};

use crate::counters::{Cell, Counters};
use crate::messages::{
    ActorId, Compute, Correct, HeadDone, Hidden, LayerDone, Message, NeuronIds, Partial, RunHead,
    RunLayer, Share, ShareDone, SlotId, Stage, Step,
};
use crate::model::{Model, sums_of};
use crate::posts::Posts;
use crate::slots::StepInfo;
use crate::team::Team;
use crate::weights::FfnShare;

/// The actor's state: nothing that another incarnation could not build again.
#[derive(Debug)]
pub(crate) struct DeviceLayer {
    layer: usize,
    model: Arc<Model>,
    cell: Arc<Cell>,
    /// Nodes that have not answered yet, a bit each.
    pending: u32,
    /// What the step took so far.
    work: Counters,
    /// Subtrees of all nodes, ascending, with the node and its number of the sum.
    subtrees: Vec<Range<usize>>,
    sums: Vec<(usize, usize)>,
}

impl DeviceLayer {
    /// The device's part of a layer.
    pub fn new(layer: usize, model: Arc<Model>, cell: Arc<Cell>) -> Self {
        let mut subtrees = Vec::new();
        let mut sums = Vec::new();
        for node in 0..model.n_nodes() {
            for (n, groups) in sums_of(model.share(layer, node)).into_iter().enumerate() {
                subtrees.push(groups);
                sums.push((node, n));
            }
        }
        Self {
            layer,
            model,
            cell,
            pending: 0,
            work: Counters::default(),
            subtrees,
            sums,
        }
    }

    /// Nodes that the actor waits for, a bit each.
    pub fn pending(&self) -> u32 {
        self.pending
    }

    /// Starts the layer.
    pub fn run_layer(&mut self, message: RunLayer, team: &mut Team, posts: &mut Posts<'_>) {
        self.work = Counters::default();
        self.count_message(true);
        let step = self.step();
        self.norm(
            &self.model.weights.layers[self.layer].attn_norm,
            0..step.n_tokens,
            team,
        );
        self.send_shares(message.step, Stage::Attention, posts);
    }

    /// Computes logits: the last layer's device has the residual stream.
    pub fn run_head(&mut self, message: RunHead, team: &mut Team, posts: &mut Posts<'_>) {
        self.work = Counters::default();
        self.count_message(true);
        self.norm(&self.model.weights.output_norm, message.tokens(), team);
        self.send_shares(
            message.step,
            Stage::Head {
                n_tokens: message.n_tokens,
            },
            posts,
        );
    }

    /// Takes a node's share.
    pub fn share_done(&mut self, message: ShareDone, team: &mut Team, posts: &mut Posts<'_>) {
        self.count_message(self.pending.count_ones() == 1 && message.stage == Stage::Output);
        if !self.answered(message.node, message.work) {
            return;
        }
        match message.stage {
            Stage::Attention => {
                self.take_heads(team);
                self.send_shares(message.step, Stage::Output, posts);
            }
            Stage::Output => {
                self.add_projected(team);
                self.send_hidden(message.step, posts);
                self.send_compute(message.step, posts);
            }
            Stage::Head { .. } => {
                let done = HeadDone {
                    step: message.step,
                    work: self.work,
                };
                posts.post(ActorId::Pipeline, Message::HeadDone(done));
            }
        }
    }

    /// Takes a node's partial sums.
    pub fn partial(&mut self, message: Partial, team: &mut Team, posts: &mut Posts<'_>) {
        self.count_message(false);
        if !self.answered(message.node, message.work) {
            return;
        }
        let finite = self.add_partials(team);
        let done = LayerDone {
            step: message.step,
            layer: self.layer,
            finite,
            work: self.work,
        };
        posts.post(ActorId::Pipeline, Message::LayerDone(done));
    }

    /// Counts a message, and the weights of a norm if it leads to one.
    fn count_message(&mut self, norm: bool) {
        let norm_bytes = self.model.shape().n_embd * size_of::<f32>();
        let weight_bytes = if norm { norm_bytes as u64 } else { 0 };
        let own = Counters {
            messages: 1,
            weight_bytes,
            ..Counters::default()
        };
        self.cell.add(own);
        self.work += own;
    }

    /// Notes a node's answer; true when it was the last one.
    fn answered(&mut self, node: usize, work: Counters) -> bool {
        self.work += work;
        self.pending &= !(1 << node);
        self.pending == 0
    }

    fn step(&self) -> StepInfo {
        // SAFETY: the pipeline wrote it before `RunLayer` of the first layer.
        unsafe { *self.model.slots.step.get() }
    }

    fn send_shares(&mut self, step: Step, stage: Stage, posts: &mut Posts<'_>) {
        let layer = self.layer;
        self.send_to_nodes(Message::Share(Share { step, layer, stage }), posts);
    }

    /// Lets the next layer's neurons be predicted, where they are.
    fn send_hidden(&mut self, step: Step, posts: &mut Posts<'_>) {
        let layer = self.layer;
        if self.model.ahead(layer + 1, self.step().n_tokens).is_some() {
            posts.post(ActorId::Predictor, Message::Hidden(Hidden { step, layer }));
        }
    }

    /// Starts the neurons: all, or those that the `Predictor`'s `Compute` named and the nodes' own
    /// sketches add.
    fn send_compute(&mut self, step: Step, posts: &mut Posts<'_>) {
        let layer = self.layer;
        let message = match self.model.ahead(layer, self.step().n_tokens) {
            Some(ahead) => {
                let ids = if ahead.alone {
                    NeuronIds::None
                } else {
                    NeuronIds::All
                };
                Message::Correct(Correct { step, layer, ids })
            }
            None => Message::Compute(Compute {
                step,
                layer,
                ids: NeuronIds::All,
                x_slot: SlotId::Normed,
                work: Counters::default(),
            }),
        };
        self.send_to_nodes(message, posts);
    }

    /// Other nodes first, so that they start while this one still works on its own message.
    fn send_to_nodes(&mut self, message: Message, posts: &mut Posts<'_>) {
        let n_nodes = self.model.n_nodes();
        self.pending = (1 << n_nodes) - 1;
        for node in (0..n_nodes).rev() {
            posts.post(
                ActorId::ColdLayer {
                    layer: self.layer,
                    node,
                },
                message,
            );
        }
    }

    /// Normed residual stream of the tokens `tokens`, into rows from 0 on of the normed slot.
    fn norm(&self, weight: &[f32], tokens: Range<usize>, team: &mut Team) {
        let model = &*self.model;
        let (n_embd, eps) = (model.shape().n_embd, model.shape().rms_eps);
        // SAFETY: all nodes have answered what they read it for.
        let writer = unsafe { model.slots.normed.get_mut() }.writer();
        for_tokens(team, tokens.len(), |row| {
            let token = tokens.start + row;
            // SAFETY: the row is this thread's; `x` is the device's.
            unsafe {
                let x = model.slots.x.read(token * n_embd..(token + 1) * n_embd);
                writer.set_with(model.cpu, row, |out| {
                    rms_norm(model.cpu, x, weight, eps, out)
                });
            }
        });
    }

    /// Results of attention as activations.
    fn take_heads(&self, team: &mut Team) {
        let model = &*self.model;
        let n_attn = model.shape().n_attn();
        // SAFETY: all nodes have answered what they read it for.
        let writer = unsafe { model.slots.attn.get_mut() }.writer();
        for_tokens(team, self.step().n_tokens, |token| {
            // SAFETY: the row is this thread's; the nodes have written theirs of `heads`.
            unsafe {
                let heads = model.slots.heads.read(token * n_attn..(token + 1) * n_attn);
                writer.set_with(model.cpu, token, |out| out.copy_from_slice(heads));
            }
        });
    }

    /// Adds the projection to the residual stream, and norms it for the FFN.
    fn add_projected(&self, team: &mut Team) {
        let model = &*self.model;
        let (n_embd, eps) = (model.shape().n_embd, model.shape().rms_eps);
        let weight = &model.weights.layers[self.layer].ffn_norm;
        // SAFETY: all nodes have answered what they read it for.
        let writer = unsafe { model.slots.normed.get_mut() }.writer();
        for_tokens(team, self.step().n_tokens, |token| {
            let row = token * n_embd..(token + 1) * n_embd;
            // SAFETY: the row is this thread's; the nodes have written theirs of `projected`.
            unsafe {
                let x = model.slots.x.write(row.clone());
                add_assign(model.cpu, x, model.slots.projected.read(row));
                writer.set_with(model.cpu, token, |out| {
                    rms_norm(model.cpu, x, weight, eps, out)
                });
            }
        });
        if let Some(tap) = &model.tap {
            let StepInfo { position, n_tokens } = self.step();
            // SAFETY: the residual stream is the device's, and nobody writes the normed state now.
            let (x, normed) = unsafe {
                (
                    model.slots.x.read(0..n_tokens * n_embd),
                    model.slots.normed.get(),
                )
            };
            tap.ffn_input(self.layer, position, x, normed);
        }
    }

    /// Joins the nodes' partial sums along the fixed tree and adds them to the residual stream;
    /// false when the next norm could not be computed from it.
    fn add_partials(&self, team: &mut Team) -> bool {
        let model = &*self.model;
        let n_embd = model.shape().n_embd;
        let tree = model.weights.layers[self.layer]
            .shares
            .iter()
            .all(|share| matches!(share.ffn, FfnShare::Neurons { .. }));
        let finite = AtomicBool::new(true);
        for_tokens(team, self.step().n_tokens, |token| {
            let row = token * n_embd..(token + 1) * n_embd;
            // SAFETY: the row is this thread's; the nodes have written their sums. The projection
            // has been added and is free to hold the joined sum.
            unsafe {
                let sum = |n: usize| {
                    let (node, sum) = self.sums[n];
                    let at = model.partial_offset(sum);
                    model.slots.partials[node].read(at + row.start..at + row.end)
                };
                let x = model.slots.x.write(row.clone());
                if tree {
                    let joined = model.slots.projected.write(row.clone());
                    join_subtrees(&self.subtrees, sum, joined);
                    add_assign(model.cpu, x, joined);
                } else {
                    for n in 0..self.sums.len() {
                        add_assign(model.cpu, x, sum(n));
                    }
                }
                if !can_be_normed(model.cpu, x) {
                    finite.store(false, Ordering::Relaxed);
                }
            }
        });
        finite.into_inner()
    }
}

/// Runs `work` for tokens `0..n_tokens`: one on this thread, many on all of the team.
fn for_tokens(team: &mut Team, n_tokens: usize, work: impl Fn(usize) + Sync) {
    if n_tokens == 1 {
        return work(0);
    }
    team.run(&|member| member.part(n_tokens, 1).for_each(&work));
}
