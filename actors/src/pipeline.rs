//! `Pipeline`: the token loop. It asks the feeder for tokens, takes them through the layers in
//! pieces, and gives the logits back.
#![allow(unsafe_code)]

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use pi_kernels::MatrixRef;
use pi_kernels::elementwise::all_finite;
use pi_kernels::norm::can_be_normed;
use pi_kernels::quant::dequantize_block;

use crate::counters::{Cell, Counters, RunTotals};
use crate::error::{ActorError, ModelPart};
use crate::feeder::{Candidates, Feeder, HeadWanted, Next};
use crate::gpu::GpuError;
use crate::messages::{ActorId, HeadDone, LayerDone, Message, RunHead, RunLayer, Step};
use crate::model::Model;
use crate::posts::Posts;
use crate::slots::StepInfo;
use crate::team::{Team, panic_text};
use crate::trace::Phase;
use crate::weights::{Embedding, ModelWeights};

/// A feeder that has been served, and how.
pub(crate) struct Served {
    pub feeder: Box<dyn Feeder>,
    pub totals: RunTotals,
    pub outcome: Result<(), ActorError>,
}

/// A run under way: all that has to survive a restart of the pipeline.
pub(crate) struct RunState {
    pub feeder: Box<dyn Feeder>,
    pub reply: SyncSender<Served>,
    totals: RunTotals,
    /// Tokens of the feed under way.
    tokens: Vec<u32>,
    /// Position of the first of them.
    position: usize,
    /// Those of them whose logits are wanted.
    wanted: Range<usize>,
    /// Whether a sketch picks whose logits are computed.
    sparse: bool,
    /// Those of them that are computed.
    done: usize,
    /// Those of them whose logits the feeder has, or does not want.
    delivered: usize,
    /// Whether nothing has been fed yet.
    first_feed: bool,
    /// Failed attempts at the step under way.
    pub attempts: u32,
}

impl RunState {
    /// A run that has not started; feeds have at most `n_ctx` tokens.
    pub fn new(feeder: Box<dyn Feeder>, reply: SyncSender<Served>, n_ctx: usize) -> Self {
        Self {
            feeder,
            reply,
            totals: RunTotals::default(),
            tokens: Vec::with_capacity(n_ctx),
            position: 0,
            wanted: 0..0,
            sparse: false,
            done: 0,
            delivered: 0,
            first_feed: true,
            attempts: 0,
        }
    }

    /// Ends the run and gives the feeder back.
    pub fn end(self, outcome: Result<(), ActorError>) {
        let served = Served {
            feeder: self.feeder,
            totals: self.totals,
            outcome,
        };
        // whoever asked may have gone
        let _ = self.reply.send(served);
    }

    fn feed_is_done(&self) -> bool {
        self.done == self.tokens.len()
    }

    /// Whether the feed under way is of a prompt: several tokens, or the run's first.
    fn is_prefill(&self) -> bool {
        self.first_feed || self.tokens.len() > 1
    }

    fn add_work(&mut self, work: Counters, n_tokens: usize) {
        if self.is_prefill() {
            self.totals.prefill += work;
            self.totals.prefill_tokens += n_tokens;
        } else {
            self.totals.decode += work;
            self.totals.decode_tokens += n_tokens;
        }
    }
}

/// Whether a run goes on.
pub(crate) enum Progress {
    /// A message is under way.
    Running,
    /// The run has ended.
    Ended(Result<(), ActorError>),
}

/// The actor's state: nothing that another incarnation could not build again.
#[derive(Debug)]
pub(crate) struct Pipeline {
    model: Arc<Model>,
    cell: Arc<Cell>,
    /// Number of the step under way.
    step: Step,
    /// Tokens of the feed that are in the step.
    in_step: Range<usize>,
    /// What the step took so far.
    work: Counters,
}

impl Pipeline {
    /// The token loop of a model.
    pub fn new(model: Arc<Model>, cell: Arc<Cell>) -> Self {
        Self {
            model,
            cell,
            step: 0,
            in_step: 0..0,
            work: Counters::default(),
        }
    }

    /// Asks for the next feed and starts it. `cached` is how many positions the cache holds.
    pub fn next_feed(
        &mut self,
        run: &mut RunState,
        cached: &mut usize,
        step: Step,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) -> Progress {
        let feeder = &mut run.feeder;
        let (tokens, position, wanted) = (&mut run.tokens, &mut run.position, &mut run.wanted);
        let sparse = &mut run.sparse;
        let model = &*self.model;
        let n_ctx = self.model.shape().n_ctx;
        let n_vocab = self.model.shape().n_vocab;
        let feed_start = posts.recorder().map(|recorder| recorder.now());
        let more = called(|| match feeder.next() {
            Next::Done => Ok(false),
            Next::Feed(feed) => {
                check_feed(feed.tokens, feed.position, *cached, n_ctx, n_vocab)?;
                tokens.clear();
                tokens.extend_from_slice(feed.tokens);
                *position = feed.position;
                *wanted = feed.logits.range(feed.tokens.len());
                *sparse = take_head_request(model, feeder.head())?;
                Ok(true)
            }
        });
        if let (Some(recorder), Some(start)) = (posts.recorder(), feed_start) {
            recorder.phase(Phase::Feed, step, start);
        }
        match more.and_then(|more| more) {
            Err(error) => return Progress::Ended(Err(error)),
            Ok(false) => return Progress::Ended(Ok(())),
            Ok(true) => {}
        }
        *cached = run.position;
        (run.done, run.delivered) = (0, run.wanted.start);
        match self.start_step(run, step, team, posts) {
            Err(error) => Progress::Ended(Err(error)),
            Ok(()) => Progress::Running,
        }
    }

    /// Starts the next step of the feed, or repeats the one that failed.
    ///
    /// # Errors
    /// An embedding that is not finite.
    pub fn start_step(
        &mut self,
        run: &mut RunState,
        step: Step,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) -> Result<(), ActorError> {
        if run.attempts == 0
            && let Some(cold) = &self.model.cold_counts
        {
            // the token before may have ended its run
            cold.end_token();
        }
        let n_left = run.tokens.len() - run.done;
        let n_tokens = self.model.step_tokens(n_left, run.wanted.len() > 1);
        self.in_step = run.done..run.done + n_tokens;
        self.step = step;
        self.work = Counters::default();
        let info = StepInfo {
            position: run.position + run.done,
            n_tokens,
        };
        // SAFETY: no other actor works on a step now.
        unsafe { *self.model.slots.step.get_mut() = info };
        let embed_start = posts.recorder().map(|recorder| {
            recorder.begin_step(step, info.position, n_tokens, !run.is_prefill());
            recorder.now()
        });
        let finite = self.embed(&run.tokens[self.in_step.clone()], info, team);
        if let (Some(recorder), Some(start)) = (posts.recorder(), embed_start) {
            recorder.phase(Phase::Embed, step, start);
        }
        if !finite {
            return Err(self.not_finite(ModelPart::Embedding));
        }
        self.run_layer(0, posts);
        Ok(())
    }

    /// The error for a part whose output, in `x`, is not finite: it names the first such position.
    fn not_finite(&self, part: ModelPart) -> ActorError {
        let (model, n_embd) = (&*self.model, self.model.shape().n_embd);
        // SAFETY: the pipeline wrote it; no other actor works on a step now.
        let StepInfo { position, n_tokens } = unsafe { *model.slots.step.get() };
        let bad = |token: &usize| {
            // SAFETY: no other actor works on a step now.
            let x = unsafe { model.slots.x.read(token * n_embd..(token + 1) * n_embd) };
            !can_be_normed(model.cpu, x)
        };
        let token = (0..n_tokens).find(bad).unwrap_or(0);
        let position = position + token;
        ActorError::NotFinite { part, position }
    }

    fn gpu_error(&self, source: GpuError) -> ActorError {
        // SAFETY: no other actor works on a step now.
        let position = unsafe { self.model.slots.step.get() }.position;
        match source {
            GpuError::NotFinite { layer } => ActorError::NotFinite {
                part: ModelPart::Layer { layer },
                position,
            },
            source => ActorError::Gpu { position, source },
        }
    }

    fn run_layer(&self, layer: usize, posts: &mut Posts<'_>) {
        let message = Message::RunLayer(RunLayer {
            step: self.step,
            layer,
        });
        posts.post(ActorId::DeviceLayer { layer }, message);
    }

    /// Embeddings and rotations of the step's tokens, into `x` and `rope`; false when an embedding
    /// cannot be normed.
    fn embed(&mut self, tokens: &[u32], info: StepInfo, team: &mut Team) -> bool {
        let model = &*self.model;
        let (n_embd, rope_len) = (model.shape().n_embd, model.rope.row_len());
        let finite = AtomicBool::new(true);
        let embed = |token: usize| {
            // SAFETY: the rows are this thread's, and no other actor works on a step now.
            unsafe {
                let x = model.slots.x.write(token * n_embd..(token + 1) * n_embd);
                embedding_row(&model.weights, tokens[token] as usize, x);
                scale(x, model.shape().embedding_scale);
                if !can_be_normed(model.cpu, x) {
                    finite.store(false, Ordering::Relaxed);
                }
                let rope = model
                    .slots
                    .rope
                    .write(token * rope_len..(token + 1) * rope_len);
                model.rope.fill(info.position + token, rope);
            }
        };
        if tokens.len() == 1 {
            embed(0);
        } else {
            team.run(&|member| member.part(tokens.len(), 1).for_each(embed));
        }
        let row_bytes = embedding_row_bytes(&model.weights);
        let weight_bytes = (tokens.len() * row_bytes) as u64;
        self.count(Counters {
            weight_bytes,
            ..Counters::default()
        });
        finite.into_inner()
    }

    /// Counts work of the pipeline's own.
    fn count(&mut self, own: Counters) {
        self.cell.add(own);
        self.work += own;
    }

    /// Takes a finished layer; `Ok(true)` when the step is complete.
    ///
    /// # Errors
    /// The layer's output is not finite.
    pub fn layer_done(
        &mut self,
        message: LayerDone,
        run: &mut RunState,
        posts: &mut Posts<'_>,
    ) -> Result<bool, ActorError> {
        self.work += message.work;
        self.count(Counters {
            messages: 1,
            ..Counters::default()
        });
        if !message.finite {
            if let Some(source) = self.model.take_gpu_failure() {
                return Err(self.gpu_error(source));
            }
            let layer = message.layer;
            return Err(self.not_finite(ModelPart::Layer { layer }));
        }
        if message.layer + 1 < self.model.shape().n_layer {
            self.run_layer(message.layer + 1, posts);
            return Ok(false);
        }
        Ok(self.run_head(run, posts))
    }

    /// Starts the head for the next tokens whose logits are wanted; true when there are none.
    fn run_head(&mut self, run: &RunState, posts: &mut Posts<'_>) -> bool {
        let first = run.delivered.max(self.in_step.start);
        let end = run.wanted.end.min(self.in_step.end);
        if first >= end {
            return true;
        }
        let head = RunHead {
            step: self.step,
            first: first - self.in_step.start,
            n_tokens: self.n_head_tokens(run, end - first),
            sparse: run.sparse,
        };
        let layer = self.model.shape().n_layer - 1;
        posts.post(ActorId::DeviceLayer { layer }, Message::RunHead(head));
        false
    }

    /// How many of `n_left` tokens go through the head together.
    fn n_head_tokens(&self, run: &RunState, n_left: usize) -> usize {
        if run.sparse {
            return 1;
        }
        n_left.min(self.model.slots.sizes.n_head_tokens)
    }

    /// Gives logits to the feeder; `Ok(true)` when the step is complete.
    ///
    /// # Errors
    /// Logits that are not finite, or the feeder panicked.
    pub fn head_done(
        &mut self,
        message: HeadDone,
        run: &mut RunState,
        posts: &mut Posts<'_>,
    ) -> Result<bool, ActorError> {
        self.work += message.work;
        self.count(Counters {
            messages: 1,
            ..Counters::default()
        });
        if let Some(source) = self.model.take_gpu_failure() {
            return Err(self.gpu_error(source));
        }
        let first = run.delivered.max(self.in_step.start);
        let end = run.wanted.end.min(self.in_step.end);
        for n in 0..self.n_head_tokens(run, end - first) {
            let position = run.position + first + n;
            let computed = self.computed(run.sparse, n, position)?;
            run.delivered = first + n + 1;
            let sample_start = posts.recorder().map(|recorder| recorder.now());
            let taken = called(|| match computed.ids {
                Some(ids) => run.feeder.candidates(
                    position,
                    Candidates {
                        ids,
                        logits: computed.logits,
                    },
                ),
                None => run.feeder.logits(position, computed.logits),
            });
            if let (Some(recorder), Some(start)) = (posts.recorder(), sample_start) {
                recorder.phase(Phase::Sample, self.step, start);
            }
            taken?;
        }
        Ok(self.run_head(run, posts))
    }

    /// The logits of the head's token `n`, which is at `position`.
    ///
    /// # Errors
    /// They are not finite.
    fn computed(
        &self,
        sparse: bool,
        n: usize,
        position: usize,
    ) -> Result<Computed<'_>, ActorError> {
        let slots = &self.model.slots;
        let n_vocab = self.model.shape().n_vocab;
        let computed = if sparse {
            self.join_candidates()
        } else {
            // SAFETY: the nodes have written the logits, and nobody does again before the next head.
            let logits = unsafe { slots.logits.read(n * n_vocab..(n + 1) * n_vocab) };
            Computed { ids: None, logits }
        };
        let part = match computed.ids {
            // a score that is no number reaches no threshold
            Some([]) => ModelPart::HeadSketch,
            _ => ModelPart::Head,
        };
        if computed.logits.is_empty() || !all_finite(self.model.cpu, computed.logits) {
            return Err(ActorError::NotFinite { part, position });
        }
        Ok(computed)
    }

    /// Moves the nodes' candidates together, in the order of ids.
    fn join_candidates(&self) -> Computed<'_> {
        let (model, slots) = (&*self.model, &self.model.slots);
        let n_vocab = model.shape().n_vocab;
        // SAFETY: all nodes have written theirs, and nobody touches them before the next head.
        unsafe {
            let ids = slots.head.ids.write(0..n_vocab);
            let logits = slots.logits.write(0..n_vocab);
            let mut n_ids = 0;
            for (head, n) in model.weights.head.iter().zip(&slots.head.n_ids) {
                let from = head.rows.start..head.rows.start + n.get();
                ids.copy_within(from.clone(), n_ids);
                logits.copy_within(from, n_ids);
                n_ids += n.get();
            }
            Computed {
                ids: Some(&ids[..n_ids]),
                logits: &logits[..n_ids],
            }
        }
    }

    /// After a token that went alone, of which [`Pipeline::finish_step`] took note: where GPUs re-plan, it is counted, and neurons may
    /// change places. `next` is the number of the step that comes after it.
    ///
    /// # Errors
    /// The GPU's driver.
    pub fn replan(
        &self,
        run: &mut RunState,
        next: Step,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) -> Result<(), ActorError> {
        let model = &*self.model;
        let Some(cold) = model.cold_counts.as_ref() else {
            return Ok(());
        };
        if self.in_step.len() != 1 {
            return Ok(());
        }
        cold.end_token();
        let position = run.position + self.in_step.start;
        for gpu in &model.gpus {
            let start = posts.recorder().map(|recorder| recorder.now());
            let done = gpu.end_token(position, model, cold, team);
            let done = done.map_err(|source| ActorError::Gpu { position, source })?;
            let Some(done) = done else { continue };
            run.totals.replans += done;
            if let (Some(recorder), Some(start)) = (posts.recorder(), start) {
                recorder.phase(Phase::Replan, next, start);
            }
        }
        Ok(())
    }

    /// Notes a complete step; true when the feed is complete too.
    pub fn finish_step(&mut self, run: &mut RunState, cached: &mut usize) -> bool {
        run.done = self.in_step.end;
        run.attempts = 0;
        *cached = run.position + run.done;
        run.add_work(self.work, self.in_step.len());
        let complete = run.feed_is_done();
        run.first_feed &= !complete;
        complete
    }
}

/// What a head computed for one token.
struct Computed<'a> {
    /// The candidates; none where they are all tokens.
    ids: Option<&'a [u32]>,
    logits: &'a [f32],
}

/// Takes what the feeder asks of the head; true for the sparse one.
///
/// # Errors
/// There is no sketch, or no such token.
fn take_head_request(model: &Model, wanted: HeadWanted<'_>) -> Result<bool, ActorError> {
    let HeadWanted::Sparse { biases } = wanted else {
        return Ok(false);
    };
    if model.weights.head_sketch.is_none() {
        return Err(ActorError::NoHeadSketch);
    }
    let n_vocab = model.shape().n_vocab;
    if let Some(&(token, _)) = biases.iter().find(|(id, _)| *id as usize >= n_vocab) {
        return Err(ActorError::UnknownToken { token, n_vocab });
    }
    // SAFETY: no other actor works on a step now.
    let request = unsafe { model.slots.head.request.get_mut() };
    request.biases.clear();
    request.biases.extend_from_slice(biases);
    Ok(true)
}

/// Calls the feeder, whose panics are its own and not the pipeline's.
fn called<T>(feeder: impl FnOnce() -> T) -> Result<T, ActorError> {
    catch_unwind(AssertUnwindSafe(feeder)).map_err(|payload| ActorError::Feeder {
        reason: panic_text(payload.as_ref()),
    })
}

fn check_feed(
    tokens: &[u32],
    position: usize,
    cached: usize,
    n_ctx: usize,
    n_vocab: usize,
) -> Result<(), ActorError> {
    if tokens.is_empty() {
        return Err(ActorError::EmptyFeed);
    }
    if position > cached {
        return Err(ActorError::Gap { position, cached });
    }
    if position + tokens.len() > n_ctx {
        return Err(ActorError::ContextFull {
            n_ctx,
            position,
            n_tokens: tokens.len(),
        });
    }
    match tokens.iter().find(|&&token| token as usize >= n_vocab) {
        Some(&token) => Err(ActorError::UnknownToken { token, n_vocab }),
        None => Ok(()),
    }
}

fn embedding_row_bytes(weights: &ModelWeights) -> usize {
    match &weights.embedding {
        Embedding::Tied => weights.head[0].matrix.shape.row_bytes(),
        Embedding::Rows(rows) => rows.quant.row_bytes(rows.n_embd),
    }
}

/// Multiplies by a factor that is 1 for most models.
fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|value| *value *= factor);
    }
}

/// Values of a token's embedding, as they are stored.
fn embedding_row(weights: &ModelWeights, token: usize, out: &mut [f32]) {
    match &weights.embedding {
        Embedding::Tied => {
            let holds = |share: &&crate::weights::HeadShare| share.rows.contains(&token);
            let share = weights
                .head
                .iter()
                .find(holds)
                .expect("every row of the head is somewhere");
            let matrix: MatrixRef<'_> = share.matrix.view();
            matrix.dequantize_row(token - share.rows.start, out);
        }
        Embedding::Rows(rows) => {
            let row_bytes = rows.quant.row_bytes(rows.n_embd);
            let row = &rows.bytes[token * row_bytes..(token + 1) * row_bytes];
            let blocks = row.chunks_exact(rows.quant.block_bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(rows.quant.block_values())) {
                dequantize_block(rows.quant, block, out);
            }
        }
    }
}
