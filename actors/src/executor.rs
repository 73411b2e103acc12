//! Executors: the thread that leads a node's team, and runs the node's actors one message at a time.
//!
//! Node 0's executor also runs the pipeline and the device's layers (the host is the device). A
//! message between actors of one executor goes through a queue of its own and never leaves the
//! thread.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use crate::cold_layer::ColdLayer;
use crate::counters::Cell;
use crate::device_layer::DeviceLayer;
use crate::faults::{FaultPlace, Faults};
use crate::host::Host;
use crate::mailbox::{Mailbox, Outbox};
use crate::messages::{ActorId, Envelope, Message};
use crate::model::Model;
use crate::pipeline::{Pipeline, RunState};
use crate::posts::Posts;
use crate::predictor::Predictor;
use crate::scratch::NodeScratch;
use crate::team::{Team, panic_text};
use crate::teams::JobRef;
use crate::trace::{Recorder, Scores, Trace};
use crate::wait::Patience;

/// Messages that a mailbox holds. A step has at most one message to or from each node under way;
/// the rest is for the control plane.
pub(crate) const MAILBOX_CAPACITY: usize = 256;

/// What an executor receives.
pub(crate) enum Letter {
    /// Between actors.
    Message(Envelope),
    /// From the control plane, or about it.
    Control(Control),
}

/// What the control plane, or another executor, tells an executor.
pub(crate) enum Control {
    /// Nothing.
    Nothing,
    /// Run a job on the team.
    Job {
        job: JobRef,
        done: SyncSender<Result<(), String>>,
    },
    /// Make room for a model's actors.
    Attach {
        attachment: Box<Attachment>,
        done: SyncSender<()>,
    },
    /// An actor, new or restarted.
    Install(ActorId, Box<Incarnation>),
    /// An actor that has been stopped.
    Remove(ActorId),
    /// To node 0: an actor runs again after a restart.
    Restarted(ActorId),
    /// To node 0: an actor of another executor failed.
    Failed(Failure),
    /// From node 0: say when all messages so far are handled.
    Quiesce(u64),
    /// To node 0: they are.
    Quiesced { node: usize, epoch: u64 },
    /// To node 0: serve a feeder.
    Start(Box<RunState>),
    /// End the thread.
    Shutdown,
}

/// An actor that could not handle a message.
#[derive(Debug)]
pub(crate) struct Failure {
    pub actor: ActorId,
    /// The panic's words; none when there is no such actor (any more).
    pub reason: Option<String>,
}

/// An actor's state on its way to its executor.
pub(crate) enum Incarnation {
    Pipeline(Pipeline),
    Predictor(Predictor),
    DeviceLayer(DeviceLayer),
    ColdLayer(ColdLayer),
}

/// Tells an actor's control plane that the actor died.
pub(crate) type DeathNotice = Arc<dyn Fn(ActorId, String) + Send + Sync>;

/// What an executor needs to know of a model.
pub(crate) struct Attachment {
    pub model: Arc<Model>,
    pub faults: Faults,
    pub cells: Arc<Cells>,
    pub death_notice: DeathNotice,
    pub wait_limit: Duration,
    pub trace: Option<Arc<Trace>>,
}

/// The counters of all actors.
#[derive(Debug)]
pub(crate) struct Cells {
    pub pipeline: Arc<Cell>,
    /// Where something is predicted ahead.
    pub predictor: Option<Arc<Cell>>,
    pub devices: Vec<Arc<Cell>>,
    /// By node, then layer.
    pub cold: Vec<Vec<Arc<Cell>>>,
}

impl Cells {
    /// For a model of so many layers and nodes, with a predictor or not.
    pub fn new(n_layer: usize, n_nodes: usize, predictor: bool) -> Self {
        let cells = || {
            (0..n_layer)
                .map(|_| Arc::default())
                .collect::<Vec<Arc<Cell>>>()
        };
        Self {
            pipeline: Arc::default(),
            predictor: predictor.then(Arc::default),
            devices: cells(),
            cold: (0..n_nodes).map(|_| cells()).collect(),
        }
    }

    /// One actor's; none where there is no such actor.
    pub fn get(&self, actor: ActorId) -> Option<&Arc<Cell>> {
        match actor {
            ActorId::Pipeline => Some(&self.pipeline),
            ActorId::Predictor => self.predictor.as_ref(),
            ActorId::DeviceLayer { layer } => self.devices.get(layer),
            ActorId::ColdLayer { layer, node } => self.cold.get(node)?.get(layer),
        }
    }

    /// Every actor.
    pub fn actors(&self) -> Vec<ActorId> {
        let layers = 0..self.devices.len();
        let devices = layers.clone().map(|layer| ActorId::DeviceLayer { layer });
        let nodes = 0..self.cold.len();
        let cold = nodes.flat_map(|node| {
            layers
                .clone()
                .map(move |layer| ActorId::ColdLayer { layer, node })
        });
        let predictor = self.predictor.iter().map(|_| ActorId::Predictor);
        std::iter::once(ActorId::Pipeline)
            .chain(predictor)
            .chain(devices)
            .chain(cold)
            .collect()
    }
}

/// The thread that leads a node's team.
pub(crate) struct Executor {
    node: usize,
    team: Team,
    mailbox: Mailbox<Letter>,
    outboxes: Vec<Outbox<Letter>>,
    local: VecDeque<Envelope>,
    patience: Patience,
    bench: Option<Bench>,
    recorder: Option<Recorder>,
}

/// The actors of one executor, and what they work with.
struct Bench {
    attachment: Attachment,
    scratch: NodeScratch,
    cold: Vec<Option<ColdLayer>>,
    devices: Vec<Option<DeviceLayer>>,
    pipeline: Option<Pipeline>,
    predictor: Option<Predictor>,
    host: Host,
    /// Actors that died and are not back: what else their step sends them is dropped.
    restarting: Vec<ActorId>,
}

impl Executor {
    /// For `node`, led by the calling thread.
    pub fn new(
        node: usize,
        team: Team,
        mailbox: Mailbox<Letter>,
        outboxes: Vec<Outbox<Letter>>,
        patience: Patience,
    ) -> Self {
        let local = VecDeque::with_capacity(MAILBOX_CAPACITY);
        Self {
            node,
            team,
            mailbox,
            outboxes,
            local,
            patience,
            bench: None,
            recorder: None,
        }
    }

    /// Handles messages until it is told to end.
    pub fn run(mut self) {
        loop {
            self.record_failed_step();
            if let Some(envelope) = self.local.pop_front() {
                self.handle(envelope);
                continue;
            }
            let running = self.bench.as_ref().filter(|bench| bench.host.is_running());
            let limit = running.map(|bench| bench.attachment.wait_limit);
            match self.mailbox.receive(Patience {
                limit,
                ..self.patience
            }) {
                Some(Letter::Message(envelope)) => self.handle(envelope),
                Some(Letter::Control(Control::Shutdown)) => return,
                Some(Letter::Control(control)) => self.control(control),
                None => self.late(),
            }
        }
    }

    /// Lets the addressee handle a message.
    fn handle(&mut self, envelope: Envelope) {
        let Self {
            node,
            team,
            outboxes,
            local,
            bench,
            mailbox,
            recorder,
            ..
        } = self;
        let Some(bench) = bench else { return };
        if *node == 0 && bench.host.is_stale(envelope.message.step()) {
            return;
        }
        if let Some(recorder) = recorder {
            recorder.begin_message(&envelope, local.len() + mailbox.waiting());
        }
        let mut posts = Posts::new(*node, local, outboxes, recorder.as_mut());
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            bench.dispatch(envelope, team, &mut posts)
        }));
        if let Some(recorder) = recorder {
            recorder.end(!matches!(outcome, Ok(true)));
        }
        match outcome {
            Ok(true) => {}
            Ok(false) if bench.restarting.contains(&envelope.to) => {}
            Ok(false) => self.failed(Failure {
                actor: envelope.to,
                reason: None,
            }),
            Err(payload) => {
                let reason = Some(panic_text(payload.as_ref()));
                self.failed(Failure {
                    actor: envelope.to,
                    reason,
                });
            }
        }
    }

    /// Records it if the step under way has been given up.
    fn record_failed_step(&mut self) {
        if let (Some(recorder), Some(bench)) = (&mut self.recorder, &self.bench)
            && !bench.host.is_under_way()
        {
            recorder.fail_step();
        }
    }

    /// Removes an actor that failed and says so: first to node 0, so that it hears of the failure
    /// before it hears of the restart.
    fn failed(&mut self, failure: Failure) {
        let Some(bench) = &mut self.bench else { return };
        bench.remove(failure.actor);
        if failure.reason.is_some() {
            bench.restarting.push(failure.actor);
        }
        let notice = failure.reason.clone().map(|reason| (failure.actor, reason));
        if self.node == 0 {
            self.host_failed(failure);
        } else if self.outboxes[0]
            .send(Letter::Control(Control::Failed(failure)))
            .is_err()
        {
            tracing::error!("node 0 cannot be told of a failure");
        }
        if let (Some((actor, reason)), Some(bench)) = (notice, &self.bench) {
            tracing::warn!("{actor} failed: {reason}");
            (bench.attachment.death_notice)(actor, reason);
        }
    }

    fn host_failed(&mut self, failure: Failure) {
        let Some(bench) = &mut self.bench else { return };
        self.local.clear();
        bench.host.failed(failure, &self.outboxes);
    }

    fn late(&mut self) {
        let Some(bench) = &mut self.bench else { return };
        let pending = bench.devices.iter().flatten().enumerate();
        let late = pending
            .filter(|(_, device)| device.pending() != 0)
            .flat_map(|(layer, device)| {
                let nodes = (0..u32::BITS).filter(|node| device.pending() >> node & 1 == 1);
                nodes.map(move |node| {
                    ActorId::ColdLayer {
                        layer,
                        node: node as usize,
                    }
                    .to_string()
                })
            });
        let late = late.collect();
        self.local.clear();
        bench.host.late(late, bench.attachment.wait_limit);
    }

    fn control(&mut self, control: Control) {
        match control {
            Control::Nothing | Control::Shutdown => {}
            Control::Job { job, done } => {
                // the asker waits for it
                let _ = done.send(job.run(self.node, &mut self.team));
            }
            Control::Attach { attachment, done } => {
                let trace = attachment.trace.as_ref();
                self.recorder = trace.map(|trace| trace.recorder(self.node));
                self.bench = Some(Bench::new(*attachment, self.node, self.team.n_threads()));
                let _ = done.send(());
            }
            Control::Install(actor, incarnation) => {
                if let Some(bench) = &mut self.bench {
                    bench.install(actor, *incarnation);
                }
            }
            Control::Remove(actor) => {
                if let Some(bench) = &mut self.bench {
                    bench.remove(actor);
                }
            }
            Control::Quiesce(epoch) => {
                let answer = Control::Quiesced {
                    node: self.node,
                    epoch,
                };
                if self.outboxes[0].send(Letter::Control(answer)).is_err() {
                    tracing::error!("node 0 cannot be told that node {} is quiet", self.node);
                }
            }
            Control::Failed(failure) => self.host_failed(failure),
            Control::Restarted(actor) => self.host(|host| host.restarted(actor)),
            Control::Quiesced { node, epoch } => self.host(|host| host.quiesced(node, epoch)),
            Control::Start(run) => {
                let outboxes = self.outboxes.clone();
                self.host(|host| host.start(*run, &outboxes));
            }
        }
    }

    /// Changes the host's state, and goes on with the run if nothing stands in its way.
    fn host(&mut self, change: impl FnOnce(&mut Host)) {
        let Self {
            node,
            team,
            outboxes,
            local,
            bench,
            recorder,
            ..
        } = self;
        let Some(bench) = bench else { return };
        change(&mut bench.host);
        if let Some(recorder) = recorder {
            recorder.begin_start();
        }
        let mut posts = Posts::new(*node, local, outboxes, recorder.as_mut());
        let Bench { host, pipeline, .. } = bench;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            host.go_on(pipeline.as_mut(), team, &mut posts)
        }));
        if let Some(recorder) = recorder {
            recorder.end(outcome.is_err());
        }
        if let Err(payload) = outcome {
            let reason = Some(panic_text(payload.as_ref()));
            self.failed(Failure {
                actor: ActorId::Pipeline,
                reason,
            });
        }
    }
}

impl Bench {
    fn new(attachment: Attachment, node: usize, n_threads: usize) -> Self {
        let n_layer = attachment.model.shape().n_layer;
        let mut scratch = NodeScratch::new(&attachment.model, node, n_threads);
        scratch.scores = Scores::new(attachment.trace.as_ref().map(|trace| trace.scores(node)));
        let n_devices = if node == 0 { n_layer } else { 0 };
        let host = Host::new(attachment.model.n_nodes());
        Self {
            attachment,
            scratch,
            cold: (0..n_layer).map(|_| None).collect(),
            devices: (0..n_devices).map(|_| None).collect(),
            pipeline: None,
            predictor: None,
            host,
            restarting: Vec::new(),
        }
    }

    fn install(&mut self, actor: ActorId, incarnation: Incarnation) {
        self.restarting.retain(|waiting| *waiting != actor);
        match (actor, incarnation) {
            (ActorId::Pipeline, Incarnation::Pipeline(pipeline)) => self.pipeline = Some(pipeline),
            (ActorId::Predictor, Incarnation::Predictor(predictor)) => {
                self.predictor = Some(predictor);
            }
            (ActorId::DeviceLayer { layer }, Incarnation::DeviceLayer(device)) => {
                self.devices[layer] = Some(device);
            }
            (ActorId::ColdLayer { layer, .. }, Incarnation::ColdLayer(cold)) => {
                self.cold[layer] = Some(cold);
            }
            (actor, _) => unreachable!("{actor} is installed as itself"),
        }
    }

    fn remove(&mut self, actor: ActorId) {
        match actor {
            ActorId::Pipeline => self.pipeline = None,
            ActorId::Predictor => self.predictor = None,
            ActorId::DeviceLayer { layer } => self.devices[layer] = None,
            ActorId::ColdLayer { layer, .. } => self.cold[layer] = None,
        }
    }

    /// Calls the addressee's handler; false when there is no such actor.
    fn dispatch(&mut self, envelope: Envelope, team: &mut Team, posts: &mut Posts<'_>) -> bool {
        let Envelope { to, message } = envelope;
        self.inject_fault(to, team);
        let Self {
            scratch,
            cold,
            devices,
            pipeline,
            predictor,
            host,
            ..
        } = self;
        match to {
            ActorId::Pipeline => {
                let Some(pipeline) = pipeline else {
                    return false;
                };
                host.handle(message, pipeline, team, posts);
            }
            ActorId::Predictor => {
                let Some(predictor) = predictor else {
                    return false;
                };
                match message {
                    Message::Hidden(message) => predictor.hidden(message, team, scratch, posts),
                    other => unreachable!("{to} got {other:?}"),
                }
            }
            ActorId::DeviceLayer { layer } => {
                let Some(device) = &mut devices[layer] else {
                    return false;
                };
                device.handle(message, team, posts);
            }
            ActorId::ColdLayer { layer, .. } => {
                let Some(cold) = &mut cold[layer] else {
                    return false;
                };
                let reply = match message {
                    Message::Share(message) => Some(cold.share(message, team, scratch)),
                    Message::Compute(message) => cold.compute(message, team, scratch),
                    Message::Correct(message) => cold.correct(message, team, scratch),
                    Message::Prefetch(message) => {
                        cold.prefetch(message, team, scratch);
                        None
                    }
                    other => unreachable!("{to} got {other:?}"),
                };
                if let Some(reply) = reply {
                    posts.post(ActorId::DeviceLayer { layer }, reply);
                }
            }
        }
        true
    }

    fn inject_fault(&self, actor: ActorId, team: &Team) {
        let Some(cell) = self.attachment.cells.get(actor) else {
            return;
        };
        match self.attachment.faults.due(actor, cell.messages()) {
            None => {}
            Some(FaultPlace::Handler) => panic!("injected panic"),
            Some(FaultPlace::Worker { thread }) => team.inject_panic(thread),
            Some(FaultPlace::Delay(delay)) => std::thread::sleep(delay),
            Some(FaultPlace::Gpu) => {
                if let Some(gpu) = self.attachment.model.gpus.first() {
                    gpu.trap();
                }
            }
        }
    }
}
