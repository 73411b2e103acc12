//! `Predictor`: scores the next layer's neurons from this layer's residual stream, one layer ahead of
//! the hidden state that will decide.
//!
//! It lives with the device, here node 0, whose team computes it: a small matrix, then one row for
//! every neuron of the layer. Ids go to the layer's slot; nodes hear of them by `Prefetch` and
//! `Compute`.
#![allow(unsafe_code)]

use std::sync::Arc;

use pi_kernels::ROW_GROUP;
use pi_kernels::elementwise::add_assign;
use pi_kernels::ffn_sparse::sketch;
use pi_kernels::gemm::gemv;
use pi_kernels::norm::rms_norm;

use crate::counters::{Cell, Counters};
use crate::messages::{ActorId, Compute, Hidden, Message, NeuronIds, Prefetch, SlotId};
use crate::model::Model;
use crate::posts::Posts;
use crate::scratch::{AheadScratch, NodeScratch};
use crate::team::{Member, Team};
use crate::trace::Scorer;
use crate::weights::AheadWeights;

/// The actor's state: nothing that another incarnation could not build again.
#[derive(Debug)]
pub(crate) struct Predictor {
    model: Arc<Model>,
    cell: Arc<Cell>,
}

impl Predictor {
    /// The predictor of all layers of a model.
    pub fn new(model: Arc<Model>, cell: Arc<Cell>) -> Self {
        Self { model, cell }
    }

    /// Predicts the neurons of the layer after `message.layer`, and tells all nodes.
    pub fn hidden(
        &mut self,
        message: Hidden,
        team: &mut Team,
        scratch: &NodeScratch,
        posts: &mut Posts<'_>,
    ) {
        let model = &*self.model;
        let layer = message.layer + 1;
        let ahead = model.weights.layers[layer].ahead.as_ref();
        let ahead = ahead.expect("`Hidden` is sent where the next layer is predicted");
        let mut watch = scratch.scores.watch(0);
        let sums = &scratch.scores;
        let scratch = scratch.ahead.as_ref().expect("node 0 has scratch for it");
        let (n_embd, eps) = (model.shape().n_embd, model.shape().rms_eps);
        // SAFETY: the residual stream is the device's, whose thread this is; between jobs the
        // scratch is nobody else's.
        unsafe {
            let x = model.slots.x.read(0..n_embd);
            let writer = scratch.residual.get_mut().writer();
            let set = |out: &mut [f32]| rms_norm(model.cpu, x, &scratch.ones, eps, out);
            writer.set_with(model.cpu, 0, set);
        }
        team.run(&|member| score(model, ahead, scratch, &member));
        self.note_ids(layer, scratch);
        watch.lap(Scorer::Ahead);
        let bytes = ahead.a.bytes.len() + ahead.b.bytes.len();
        sums.read(Scorer::Ahead, bytes);
        let work = Counters {
            messages: 1,
            weight_bytes: bytes as u64,
            ..Counters::default()
        };
        self.cell.add(work);
        self.tell(message, work, ahead.prefetch, posts);
    }

    /// Divides the lists of the team's threads over the nodes' slots.
    fn note_ids(&self, layer: usize, scratch: &AheadScratch) {
        let model = &*self.model;
        for (node, slots) in model.slots.predicted.iter().enumerate() {
            let neurons = &model.share(layer, node).neurons;
            // SAFETY: the node has answered what it read of the layer two before; this thread wrote
            // the lists, or led the job that did.
            let ids = unsafe { slots[layer % 2].get_mut() };
            ids.clear();
            for list in &scratch.lists {
                // SAFETY: as above.
                let list = unsafe { list.get() };
                let start = list.partition_point(|&id| (id as usize) < neurons.start);
                let end = list.partition_point(|&id| (id as usize) < neurons.end);
                let first = neurons.start as u32;
                ids.extend(list[start..end].iter().map(|id| id - first));
            }
        }
    }

    /// Other nodes first, so that they start while this one still has its own to do.
    fn tell(&self, message: Hidden, work: Counters, prefetch: bool, posts: &mut Posts<'_>) {
        let (step, layer) = (message.step, message.layer + 1);
        let ids = NeuronIds::Predicted;
        for node in (0..self.model.n_nodes()).rev() {
            let to = ActorId::ColdLayer { layer, node };
            if prefetch {
                posts.post(to, Message::Prefetch(Prefetch { step, layer, ids }));
            }
            let compute = Compute {
                step,
                layer,
                ids,
                x_slot: SlotId::Normed,
                // counted once
                work: if node == 0 { work } else { Counters::default() },
            };
            posts.post(to, Message::Compute(compute));
        }
    }
}

/// One thread's part: rows of a, then rows of b, and a list of those above zero.
fn score(model: &Model, ahead: &AheadWeights, scratch: &AheadScratch, member: &Member<'_>) {
    let rank = ahead.a.shape.n_rows;
    let part = member.part(rank, ROW_GROUP);
    // SAFETY: the residual stream is set; these rows are this thread's until the barrier.
    unsafe {
        let out = scratch.hidden.write(part.clone());
        let residual = scratch.residual.get().token(0);
        gemv(model.cpu, ahead.a.view(), residual, part.clone(), out);
        if let Some(bias) = &ahead.a_bias {
            add_assign(model.cpu, out, &bias[part]);
            out.iter_mut().for_each(|h| *h = h.max(0.0));
        }
    }
    member.barrier();
    let part = member.part(ahead.b.shape.n_rows, ROW_GROUP);
    // SAFETY: all of h is written; the activations, these scores and the list are this thread's.
    unsafe {
        let hidden = scratch.hidden.read(0..rank);
        let h = scratch.activations[member.thread].get_mut().of(rank);
        h.set(model.cpu, 0, hidden);
        let scores = scratch.scores.write(part.clone());
        gemv(model.cpu, ahead.b.view(), h.token(0), part.clone(), scores);
        let list = scratch.lists[member.thread].get_mut();
        let bias = &ahead.b_bias[part.clone()];
        sketch::candidates(scores, bias, part.start as u32, list);
    }
}
