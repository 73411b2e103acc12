//! `DeviceLayer`: the device's part of one layer. Where the host is the device, the actor owns the norms and the
//! residual stream, and divides everything else over the nodes; where a GPU is, see [`crate::gpu`].
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pi_kernels::ROW_GROUP;
use pi_kernels::elementwise::add_assign;
use pi_kernels::ffn_sparse::join_subtrees;
use pi_kernels::head_sparse::kth_largest;
use pi_kernels::norm::{can_be_normed, rms_norm};

use crate::counters::{Cell, Counters};
use crate::gpu::CudaLayer;
use crate::messages::{
    ActorId, Compute, Correct, HeadDone, Hidden, LayerDone, Message, NeuronIds, Partial, RunHead,
    RunLayer, Share, ShareDone, SlotId, Stage, Step,
};
use crate::model::{Model, sums_of};
use crate::posts::Posts;
use crate::slots::StepInfo;
use crate::team::{Team, for_tokens};
use crate::weights::FfnShare;

/// The device's part of a layer, on whatever is the device.
#[derive(Debug)]
pub(crate) enum DeviceLayer {
    /// The host.
    Host(HostLayer),
    /// A GPU.
    Cuda(CudaLayer),
}

impl DeviceLayer {
    /// The device's part of a layer.
    pub fn new(layer: usize, model: Arc<Model>, cell: Arc<Cell>) -> Self {
        match model.gpu(layer) {
            None => Self::Host(HostLayer::new(layer, model, cell)),
            Some(_) => Self::Cuda(CudaLayer::new(layer, model, cell)),
        }
    }

    /// Nodes that the actor waits for, a bit each.
    pub fn pending(&self) -> u32 {
        match self {
            Self::Host(layer) => layer.pending(),
            Self::Cuda(layer) => layer.pending(),
        }
    }

    /// Lets the actor handle a message.
    pub fn handle(&mut self, message: Message, team: &mut Team, posts: &mut Posts<'_>) {
        match (self, message) {
            (Self::Host(layer), Message::RunLayer(message)) => {
                layer.run_layer(message, team, posts);
            }
            (Self::Host(layer), Message::RunHead(message)) => layer.run_head(message, team, posts),
            (Self::Host(layer), Message::ShareDone(message)) => {
                layer.share_done(message, team, posts);
            }
            (Self::Host(layer), Message::Partial(message)) => layer.partial(message, team, posts),
            (Self::Cuda(layer), Message::RunLayer(message)) => {
                layer.run_layer(message, team, posts);
            }
            (Self::Cuda(layer), Message::AwaitHidden(message)) => {
                layer.await_hidden(message, team, posts);
            }
            (Self::Cuda(layer), Message::RunHead(message)) => layer.run_head(message, team, posts),
            (Self::Cuda(layer), Message::Partial(message)) => layer.partial(message, team, posts),
            (_, other) => unreachable!("DeviceLayer got {other:?}"),
        }
    }
}

/// The state of the actor where the host is the device: nothing that another incarnation could not build again.
#[derive(Debug)]
pub(crate) struct HostLayer {
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

impl HostLayer {
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
        if let Some(tap) = &self.model.tap {
            // SAFETY: the step was written before its first layer, and nobody writes the normed state now.
            let (step, normed) =
                unsafe { (*self.model.slots.step.get(), self.model.slots.normed.get()) };
            tap.head_input(step.position + message.first, message.n_tokens, normed);
        }
        let stage = match message {
            RunHead { sparse: true, .. } => Stage::HeadSketch,
            RunHead { n_tokens, .. } => Stage::Head { n_tokens },
        };
        self.send_shares(message.step, stage, posts);
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
            Stage::HeadSketch => {
                self.set_threshold();
                self.send_shares(message.step, Stage::HeadRows, posts);
            }
            Stage::Head { .. } | Stage::HeadRows => {
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

    /// Finds the score that makes a token a candidate, and raises those that are candidates anyway above it.
    fn set_threshold(&self) {
        let model = &*self.model;
        let sketch = model.weights.head_sketch.as_ref();
        let n_groups = sketch.map_or(0, |sketch| sketch.n_groups);
        let n_vocab = model.shape().n_vocab;
        let slots = &model.slots.head;
        // SAFETY: all nodes have answered: scores and maxima are the device's until the next share.
        unsafe {
            let maxima = slots.maxima.write(0..n_vocab.div_ceil(ROW_GROUP));
            *slots.threshold.get_mut() = kth_largest(model.cpu, maxima, n_groups);
            let scores = slots.scores.write(0..n_vocab);
            for &(id, _) in &slots.request.get().biases {
                scores[id as usize] = f32::INFINITY;
                maxima[id as usize / ROW_GROUP] = f32::INFINITY;
            }
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
