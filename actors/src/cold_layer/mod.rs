//! `ColdLayer`: one node's part of one layer. It owns the node's neurons, and where the host is the
//! device also the node's heads with their cache and its rows of the projections.

mod attention;
mod ffn;
mod head;
mod predicted;
mod rows;
mod threshold;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::counters::{Cell, Counters};
use crate::kv::KvStore;
use crate::messages::{
    Compute, Correct, Message, NeuronIds, Partial, Prefetch, Share, ShareDone, Stage, Step,
};
use crate::model::{Model, sums_of};
use crate::scratch::NodeScratch;
use crate::slots::StepInfo;
use crate::team::Team;
use crate::weights::LayerShare;

/// The actor's state: nothing that another incarnation could not build again.
#[derive(Debug)]
pub(crate) struct ColdLayer {
    layer: usize,
    node: usize,
    model: Arc<Model>,
    kv: Arc<KvStore>,
    cell: Arc<Cell>,
    /// Partial sums that the node sends.
    n_sums: usize,
    /// What the `Predictor` asked for ahead of the hidden state.
    early: Option<Compute>,
}

/// What a job of the team works on.
#[derive(Clone, Copy)]
struct Job<'a> {
    model: &'a Model,
    share: &'a LayerShare,
    kv: &'a KvStore,
    scratch: &'a NodeScratch,
    layer: usize,
    node: usize,
    n_sums: usize,
    step: StepInfo,
    /// Whose gates may be open.
    candidates: Candidates,
}

/// Neurons that may be active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidates {
    /// All, or those that the layer's sketch picks.
    own: bool,
    /// Those that the `Predictor` named.
    predicted: bool,
}

impl Candidates {
    /// Nothing was predicted ahead.
    const OWN: Self = Self {
        own: true,
        predicted: false,
    };
}

impl ColdLayer {
    /// The node's part of a layer.
    pub fn new(
        layer: usize,
        node: usize,
        model: Arc<Model>,
        kv: Arc<KvStore>,
        cell: Arc<Cell>,
    ) -> Self {
        let n_sums = sums_of(model.share(layer, node)).len();
        Self {
            layer,
            node,
            model,
            kv,
            cell,
            n_sums,
            early: None,
        }
    }

    /// Computes a share with the node's team.
    pub fn share(&mut self, message: Share, team: &mut Team, scratch: &NodeScratch) -> Message {
        let job = self.job(scratch);
        let work = match message.stage {
            Stage::Attention => attention::run(job, team),
            Stage::Output => rows::output(job, team),
            Stage::Head { n_tokens } => head::full(job, team, n_tokens),
            Stage::HeadSketch => head::sketch_scores(job, team),
            Stage::HeadRows => head::candidate_rows(job, team),
        };
        self.cell.add(work);
        let Share { step, layer, stage } = message;
        Message::ShareDone(ShareDone {
            step,
            layer,
            stage,
            node: self.node,
            work,
        })
    }

    /// Pulls the bundles of predicted neurons towards the team's caches.
    pub fn prefetch(&mut self, _: Prefetch, team: &mut Team, scratch: &NodeScratch) {
        predicted::prefetch(&self.job(scratch), team);
        self.cell.add(weights_read(0));
    }

    /// Computes the node's neurons with its team, or notes the prediction until the hidden state is
    /// there.
    pub fn compute(
        &mut self,
        message: Compute,
        team: &mut Team,
        scratch: &NodeScratch,
    ) -> Option<Message> {
        if message.ids == NeuronIds::Predicted {
            self.early = Some(message);
            self.cell.add(weights_read(0));
            return None;
        }
        let Compute { step, layer, .. } = message;
        let nothing = Counters::default();
        Some(self.neurons(step, layer, Candidates::OWN, nothing, team, scratch))
    }

    /// Computes the neurons that were predicted, and those that the layer's own sketch adds. Without the
    /// step's `Compute` the actor was restarted in between, and the step has been given up.
    pub fn correct(
        &mut self,
        message: Correct,
        team: &mut Team,
        scratch: &NodeScratch,
    ) -> Option<Message> {
        let Correct { step, layer, ids } = message;
        let early = self.early.take().filter(|early| early.step == step)?;
        let candidates = Candidates {
            own: ids == NeuronIds::All,
            predicted: true,
        };
        // what the prediction took is counted here, and the messages before this one
        let mut before = early.work;
        before.messages += 1 + u64::from(self.model.prefetches(layer));
        Some(self.neurons(step, layer, candidates, before, team, scratch))
    }

    fn neurons(
        &mut self,
        step: Step,
        layer: usize,
        candidates: Candidates,
        before: Counters,
        team: &mut Team,
        scratch: &NodeScratch,
    ) -> Message {
        let job = Job {
            candidates,
            ..self.job(scratch)
        };
        let work = ffn::run(job, team);
        self.cell.add(work);
        Message::Partial(Partial {
            step,
            layer,
            node: self.node,
            work: work + before,
        })
    }

    #[allow(unsafe_code)]
    fn job<'a>(&'a self, scratch: &'a NodeScratch) -> Job<'a> {
        // SAFETY: the pipeline wrote it before the message that led here (table in slots.rs).
        let step = unsafe { *self.model.slots.step.get() };
        scratch.next.store(0, Ordering::Relaxed);
        scratch.active.store(0, Ordering::Relaxed);
        scratch.candidates.store(0, Ordering::Relaxed);
        scratch.named.store(0, Ordering::Relaxed);
        scratch.rows_read.store(0, Ordering::Relaxed);
        Job {
            model: &self.model,
            share: self.model.share(self.layer, self.node),
            kv: &self.kv,
            scratch,
            layer: self.layer,
            node: self.node,
            n_sums: self.n_sums,
            step,
            candidates: Candidates::OWN,
        }
    }
}

impl Job<'_> {
    /// Takes the next of `count` pieces of work, if there is one left: any thread may take any.
    fn take(&self, count: usize) -> Option<usize> {
        let piece = self.scratch.next.fetch_add(1, Ordering::Relaxed);
        (piece < count).then_some(piece)
    }
}

/// Work of one message that read so many bytes of weights.
fn weights_read(weight_bytes: usize) -> Counters {
    Counters {
        messages: 1,
        weight_bytes: weight_bytes as u64,
        ..Counters::default()
    }
}
