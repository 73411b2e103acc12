//! `DeviceLayer` on a GPU: turns the flags of a token's graph into messages, and the nodes' answers into flags.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use pi_kernels::norm::rms_norm;
use pi_kernels::quant::BLOCK;
use pi_kernels::{ActBatch, ActWriter};

use super::error::GpuError;
use super::gpu_model::{GpuModel, HiddenState};
use super::sum_into;
use crate::counters::{Cell, Counters};
use crate::messages::{
    ActorId, AwaitHidden, Compute, Correct, HeadDone, LayerDone, Message, NeuronIds, Partial,
    Prefetch, RunHead, RunLayer, SlotId, Step,
};
use crate::model::{Model, sums_of};
use crate::posts::Posts;
use crate::slots::StepInfo;
use crate::team::{Member, Team, for_tokens};

/// Columns that are joined at a time.
const JOINED: usize = 1024;

/// The actor's state: nothing that another incarnation could not build again.
#[derive(Debug)]
pub(crate) struct CudaLayer {
    layer: usize,
    model: Arc<Model>,
    cell: Arc<Cell>,
    /// Nodes that have not answered yet, a bit each.
    pending: u32,
    /// What the step took so far.
    work: Counters,
    /// Sums of all nodes, ascending: the node, and its number of the sum.
    sums: Vec<(usize, usize)>,
}

impl CudaLayer {
    /// The device's part of a layer of a model that is on a GPU.
    pub fn new(layer: usize, model: Arc<Model>, cell: Arc<Cell>) -> Self {
        let sums = (0..model.n_nodes()).flat_map(|node| {
            let n_sums = sums_of(model.share(layer, node)).len();
            (0..n_sums).map(move |sum| (node, sum))
        });
        Self {
            layer,
            sums: sums.collect(),
            model,
            cell,
            pending: 0,
            work: Counters::default(),
        }
    }

    /// Nodes that the actor waits for, a bit each.
    pub fn pending(&self) -> u32 {
        self.pending
    }

    fn gpu(&self) -> &GpuModel {
        let gpu = self.model.gpu(self.layer);
        gpu.expect("the layer is on a GPU")
    }

    /// Starts the token before the GPU's first layer; lets the nodes' neurons be computed as soon as the hidden state is there.
    pub fn run_layer(&mut self, message: RunLayer, team: &mut Team, posts: &mut Posts<'_>) {
        self.work = Counters::default();
        self.count_message();
        if let Err(error) = self.try_layer(message.step, team, posts) {
            self.failed(message.step, error, posts);
        }
    }

    fn try_layer(
        &mut self,
        step: Step,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) -> Result<(), GpuError> {
        let layer = self.layer;
        if layer == self.gpu().layers().start {
            self.begin()?;
        }
        if self.model.is_batch(self.step().n_tokens) {
            self.batch_layer(team)?;
            return self.finish(step, team, posts);
        }
        if !self.gpu().has_cold(layer) {
            return self.finish(step, team, posts);
        }
        if self.gpu().ahead_alone(layer).is_none() {
            self.take_hidden(team)?;
            self.ask_nodes(posts, &[self.compute(step, NeuronIds::All)]);
            return Ok(());
        }
        self.take_ids()?;
        let ids = NeuronIds::Predicted;
        let compute = self.compute(step, ids);
        if self.gpu().prefetches(layer) {
            let prefetch = Message::Prefetch(Prefetch { step, layer, ids });
            self.ask_nodes(posts, &[prefetch, compute]);
        } else {
            self.ask_nodes(posts, &[compute]);
        }
        // the nodes of other threads start; this thread's has its turn before it waits again
        let to = ActorId::DeviceLayer { layer };
        posts.post(to, Message::AwaitHidden(AwaitHidden { step, layer }));
        Ok(())
    }

    /// Launches the layer for several tokens; who looks at hidden states sees those that enter its FFN.
    fn batch_layer(&self, team: &mut Team) -> Result<(), GpuError> {
        let (model, layer) = (&*self.model, self.layer);
        let (gpu, shape) = (self.gpu(), model.shape());
        gpu.batch_attention(layer, shape)?;
        if let Some(tap) = &model.tap {
            let StepInfo { position, n_tokens } = self.step();
            gpu.wait_batch()?;
            let residual = gpu.batch_residual(0..n_tokens * shape.n_embd)?;
            let normed = self.normed(&residual, &model.weights.layers[layer].ffn_norm, team);
            tap.ffn_input(layer, position, &residual, normed);
        }
        gpu.batch_neurons(layer, shape)
    }

    /// Rows of the residual stream as the host norms them.
    fn normed(&self, rows: &[f32], weight: &[f32], team: &mut Team) -> &ActBatch {
        let model = &*self.model;
        let (n_embd, eps) = (model.shape().n_embd, model.shape().rms_eps);
        // SAFETY: the nodes compute nothing of a step of several tokens, so that nobody else uses the slot.
        let writer = unsafe { model.slots.normed.get_mut() }.writer();
        for_tokens(team, rows.len() / n_embd, |token| {
            let row = &rows[token * n_embd..(token + 1) * n_embd];
            // SAFETY: the row is this thread's.
            unsafe {
                writer.set_with(model.cpu, token, |out| {
                    rms_norm(model.cpu, row, weight, eps, out)
                });
            }
        });
        // SAFETY: as above, and all threads are done.
        unsafe { model.slots.normed.get() }
    }

    /// Waits for the hidden state, and lets the nodes compute what was predicted.
    pub fn await_hidden(&mut self, message: AwaitHidden, team: &mut Team, posts: &mut Posts<'_>) {
        self.count_message();
        let taken = match self.model.takes_in_place(self.layer) {
            Some(gpu) => gpu.wait_hidden(self.layer).map(|_| ()),
            None => self.take_hidden(team),
        };
        if let Err(error) = taken {
            return self.failed(message.step, error, posts);
        }
        let ids = match self.gpu().ahead_alone(self.layer) {
            Some(true) => NeuronIds::None,
            _ => NeuronIds::All,
        };
        let (step, layer) = (message.step, self.layer);
        self.ask_nodes(posts, &[Message::Correct(Correct { step, layer, ids })]);
    }

    fn compute(&self, step: Step, ids: NeuronIds) -> Message {
        Message::Compute(Compute {
            step,
            layer: self.layer,
            ids,
            x_slot: SlotId::Normed,
            work: Counters::default(),
        })
    }

    /// Other nodes first, so that they start while this one still works on its own messages.
    fn ask_nodes(&mut self, posts: &mut Posts<'_>, messages: &[Message]) {
        let n_nodes = self.model.n_nodes();
        self.pending = (1 << n_nodes) - 1;
        for node in (0..n_nodes).rev() {
            let to = ActorId::ColdLayer {
                layer: self.layer,
                node,
            };
            for message in messages {
                posts.post(to, *message);
            }
        }
    }

    fn step(&self) -> StepInfo {
        // SAFETY: the pipeline wrote it before the message of the first layer.
        unsafe { *self.model.slots.step.get() }
    }

    /// Launches the token, or takes the prompt's.
    fn begin(&self) -> Result<(), GpuError> {
        let model = &*self.model;
        let (n_embd, rope_len) = (model.shape().n_embd, model.rope.row_len());
        let StepInfo { position, n_tokens } = self.step();
        // SAFETY: the pipeline wrote them before the message.
        let (x, rotation) = unsafe {
            let x = model.slots.x.read(0..n_tokens * n_embd);
            (x, model.slots.rope.read(0..n_tokens * rope_len))
        };
        match model.is_batch(n_tokens) {
            false => self.gpu().begin(x, rotation, position),
            true => self.gpu().begin_batch(x, rotation, position),
        }
    }

    /// Divides the layer's predicted ids over the nodes' slots.
    fn take_ids(&self) -> Result<(), GpuError> {
        let (model, layer) = (&*self.model, self.layer);
        let gpu = self.gpu();
        let ids = gpu.wait_ids(layer)?;
        let n_hot = gpu.n_hot(layer);
        for (node, slots) in model.slots.predicted.iter().enumerate() {
            let neurons = &model.share(layer, node).neurons;
            if neurons.is_empty() {
                continue;
            }
            let inside = |bound: usize| ids.partition_point(|&id| (id as usize + n_hot) < bound);
            let mine = &ids[inside(neurons.start)..inside(neurons.end)];
            // SAFETY: the node has answered what it read of the layer two before.
            let to = unsafe { slots[layer % 2].get_mut() };
            to.clear();
            let shift = neurons.start - n_hot;
            to.extend(mine.iter().map(|id| id - shift as u32));
        }
        Ok(())
    }

    /// Makes the nodes' activations of the hidden state: all threads, as the first look at what the GPU wrote is slow.
    fn take_hidden(&self, team: &mut Team) -> Result<(), GpuError> {
        let model = &*self.model;
        let hidden = self.gpu().wait_hidden(self.layer)?;
        // SAFETY: all nodes have answered what they read it for.
        let writer = unsafe { model.slots.normed.get_mut() }.writer();
        team.run(&|member| take_hidden_part(model, hidden, &writer, &member));
        Ok(())
    }

    /// Takes a node's partial sums.
    pub fn partial(&mut self, message: Partial, team: &mut Team, posts: &mut Posts<'_>) {
        self.count_message();
        self.work += message.work;
        self.pending &= !(1 << message.node);
        if self.pending != 0 {
            return;
        }
        let finished = (self.answer()).and_then(|()| self.finish(message.step, team, posts));
        if let Err(error) = finished {
            self.failed(message.step, error, posts);
        }
    }

    /// Adds all nodes' sums, in their order, and gives them to the GPU.
    fn answer(&self) -> Result<(), GpuError> {
        let model = &*self.model;
        let n_embd = model.shape().n_embd;
        if model.answers_in_place(self.layer).is_none() {
            let mut joined = [0.0; JOINED];
            for first in (0..n_embd).step_by(JOINED) {
                let n = JOINED.min(n_embd - first);
                let sums = self.sums.iter().map(|&(node, sum)| {
                    let at = model.partial_offset(sum) + first;
                    // SAFETY: the nodes have written their sums.
                    unsafe { model.slots.partials[node].read(at..at + n) }
                });
                sum_into(model.cpu, &mut joined[..n], sums);
                self.gpu().give(self.layer, first, &joined[..n]);
            }
        }
        self.gpu().answer(self.layer)
    }

    /// Ends the layer; after a GPU's last one it has ended the token, and the next GPU's first one finds it where the host
    /// would put it.
    fn finish(
        &mut self,
        step: Step,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) -> Result<(), GpuError> {
        let (model, gpu) = (&*self.model, self.gpu());
        if self.layer + 1 == gpu.layers().end {
            let StepInfo { position, n_tokens } = self.step();
            let goes_on = self.layer + 1 < model.shape().n_layer;
            let n_x = n_tokens * model.shape().n_embd;
            if model.is_batch(n_tokens) {
                gpu.wait_batch()?;
                if goes_on {
                    let x = gpu.batch_residual(0..n_x)?;
                    // SAFETY: nobody else touches the residual stream between two layers.
                    unsafe { model.slots.x.write(0..n_x) }.copy_from_slice(&x);
                }
            } else {
                gpu.wait_token()?;
                if let Some(recorder) = posts.recorder() {
                    let is_this = |other: &GpuModel| other.layers().contains(&self.layer);
                    let number = model.gpus.iter().position(is_this).unwrap_or(0);
                    gpu.trace(recorder, number, step);
                }
                if goes_on {
                    // SAFETY: the token has ended.
                    let x = unsafe { gpu.residual() };
                    fetch(model, n_x, team, &|part| {
                        // SAFETY: the part is this thread's, and as above.
                        unsafe { model.slots.x.write(part.clone()) }.copy_from_slice(&x[part]);
                    });
                }
            }
            // the actor of the GPU's last layer counts for all of them
            let positions = position..position + n_tokens;
            let work = gpu.work(model.shape(), model.kv_type, positions);
            self.count(work);
        }
        self.done(step, true, posts);
        Ok(())
    }

    fn done(&self, step: Step, finite: bool, posts: &mut Posts<'_>) {
        let done = LayerDone {
            step,
            layer: self.layer,
            finite,
            work: self.work,
        };
        posts.post(ActorId::Pipeline, Message::LayerDone(done));
    }

    /// Computes the logits of the token: the last layer's device has the residual stream.
    pub fn run_head(&mut self, message: RunHead, team: &mut Team, posts: &mut Posts<'_>) {
        self.work = Counters::default();
        self.count_message();
        let n_tokens = message.tokens().len();
        match self.take_logits(message.tokens(), team) {
            Ok(()) => {
                let of_one = self.gpu().head_work();
                (0..n_tokens).for_each(|_| self.count(of_one));
            }
            Err(error) => self.model.note_gpu_failure(error),
        }
        let done = HeadDone {
            step: message.step,
            work: self.work,
        };
        posts.post(ActorId::Pipeline, Message::HeadDone(done));
    }

    fn take_logits(&self, tokens: Range<usize>, team: &mut Team) -> Result<(), GpuError> {
        let model = &*self.model;
        let StepInfo { position, n_tokens } = self.step();
        let is_batch = model.is_batch(n_tokens);
        if let Some(tap) = &model.tap {
            let n_embd = model.shape().n_embd;
            let rows = tokens.start * n_embd..tokens.end * n_embd;
            let rows = self.gpu().batch_residual(rows)?;
            let normed = self.normed(&rows, &model.weights.output_norm, team);
            tap.head_input(position + tokens.start, tokens.len(), normed);
        }
        for (row, token) in tokens.enumerate() {
            let logits = self.gpu().logits(is_batch.then_some(token))?;
            let at = row * logits.len();
            fetch(model, logits.len(), team, &|part| {
                let to = at + part.start..at + part.end;
                // SAFETY: the part is this thread's, and nobody reads the slot before the message that follows.
                unsafe { model.slots.logits.write(to) }.copy_from_slice(&logits[part]);
            });
        }
        Ok(())
    }

    /// Notes why the token has no result, and ends the layer: the pipeline looks before it goes on.
    fn failed(&mut self, step: Step, error: GpuError, posts: &mut Posts<'_>) {
        self.pending = 0;
        self.model.note_gpu_failure(error);
        self.done(step, false, posts);
    }

    fn count_message(&mut self) {
        self.count(Counters {
            messages: 1,
            ..Counters::default()
        });
    }

    fn count(&mut self, own: Counters) {
        self.cell.add(own);
        self.work += own;
    }
}

/// Makes the thread's part of the nodes' activations of the hidden state.
pub(crate) fn take_hidden_part(
    model: &Model,
    hidden: HiddenState<'_>,
    writer: &ActWriter<'_>,
    member: &Member<'_>,
) {
    let part = member.part(model.shape().n_embd, BLOCK);
    // SAFETY: the columns are this thread's.
    unsafe {
        match hidden {
            HiddenState::F32(values) => {
                let fill = |out: &mut [f32]| out.copy_from_slice(&values[part.clone()]);
                writer.set_columns(model.cpu, 0, part.clone(), fill);
            }
            HiddenState::Q8 { q, scales } => {
                let blocks = part.start / BLOCK..part.end / BLOCK;
                writer.set_rounded(0, part.clone(), &q[part], &scales[blocks]);
            }
        }
    }
}

/// Copies `n` values that the GPU wrote, part by part: by all threads, as the first look at each is slow; by this one where the
/// others have nothing else to do, and sleep.
fn fetch(model: &Model, n: usize, team: &mut Team, copy: &(dyn Fn(Range<usize>) + Sync)) {
    let awake = (0..model.shape().n_layer).any(|layer| {
        let gpu = model.gpu(layer);
        gpu.is_some_and(|gpu| gpu.has_cold(layer))
    });
    if awake {
        team.run(&|member| copy(member.part(n, BLOCK)));
    } else {
        copy(0..n);
    }
}
