//! What node 0's executor keeps for the pipeline: the run under way, the cache's length, and the
//! recovery from failures. It outlives the pipeline's incarnations.

use std::time::Duration;

use crate::error::ActorError;
use crate::executor::{Control, Failure, Letter};
use crate::mailbox::Outbox;
use crate::messages::{ActorId, Message, Step};
use crate::pipeline::{Pipeline, Progress, RunState};
use crate::posts::Posts;
use crate::team::Team;

/// Attempts at one step before the run ends.
const ATTEMPTS_MAX: u32 = 4;

/// See the module.
pub(crate) struct Host {
    n_nodes: usize,
    run: Option<Box<RunState>>,
    /// Whether the run's first feed has been asked for.
    started: bool,
    /// Positions in the cache.
    cached: usize,
    /// The step under way; messages of earlier ones are stale.
    step: Step,
    /// Actors that died and do not run again yet, whether or not a run waits for them.
    restarting: Vec<ActorId>,
    recovery: Option<Recovery>,
    /// Number of the last recovery.
    epoch: u64,
    /// Whether messages of an abandoned step may still be under way on other nodes.
    unquiet: bool,
}

/// What has to happen before a step can be repeated.
struct Recovery {
    /// Nodes that may still work on the failed step, a bit each.
    unquiet: u32,
}

impl Host {
    /// Without a run.
    pub fn new(n_nodes: usize) -> Self {
        Self {
            n_nodes,
            run: None,
            started: false,
            cached: 0,
            step: 0,
            restarting: Vec::new(),
            recovery: None,
            epoch: 0,
            unquiet: false,
        }
    }

    /// Whether somebody waits for an answer.
    pub fn is_running(&self) -> bool {
        self.run.is_some()
    }

    /// Whether a step is under way that has not been given up.
    pub fn is_under_way(&self) -> bool {
        self.run.is_some() && self.recovery.is_none()
    }

    /// Whether a message is of a step that was given up.
    pub fn is_stale(&self, step: Step) -> bool {
        self.run.is_none() || self.recovery.is_some() || step != self.step
    }

    /// Takes a new run; [`Host::go_on`] starts it.
    pub fn start(&mut self, run: RunState, outboxes: &[Outbox<Letter>]) {
        self.run = Some(Box::new(run));
        self.started = false;
        if self.unquiet || !self.restarting.is_empty() {
            self.recover(outboxes);
        }
    }

    /// Gives up the step because an actor failed, and prepares to repeat it.
    pub fn failed(&mut self, failure: Failure, outboxes: &[Outbox<Letter>]) {
        let actor = failure.actor;
        if failure.reason.is_some() {
            // a run that starts before it is back must wait for it, not find it missing
            self.restarting.push(actor);
        }
        let Some(run) = &mut self.run else {
            self.unquiet = true;
            return;
        };
        let Some(reason) = failure.reason else {
            return self.end(Err(ActorError::Stopped { actor }), true);
        };
        run.attempts += 1;
        if run.attempts >= ATTEMPTS_MAX {
            let attempts = run.attempts;
            return self.end(
                Err(ActorError::KeepsFailing {
                    actor,
                    attempts,
                    reason,
                }),
                true,
            );
        }
        self.recover(outboxes);
    }

    /// Gives up the step: no message of it counts any more.
    fn recover(&mut self, outboxes: &[Outbox<Letter>]) {
        if self.recovery.is_some() {
            return;
        }
        self.epoch += 1;
        let mut unquiet = 0;
        for node in 1..self.n_nodes {
            unquiet |= 1 << node;
            if outboxes[node]
                .send(Letter::Control(Control::Quiesce(self.epoch)))
                .is_err()
            {
                tracing::error!("node {node} cannot be asked to be quiet");
            }
        }
        self.recovery = Some(Recovery { unquiet });
    }

    /// Notes that an actor runs again.
    pub fn restarted(&mut self, actor: ActorId) {
        self.restarting.retain(|waiting| *waiting != actor);
    }

    /// Notes that a node has nothing left of the failed step.
    pub fn quiesced(&mut self, node: usize, epoch: u64) {
        if let Some(recovery) = &mut self.recovery
            && epoch == self.epoch
        {
            recovery.unquiet &= !(1 << node);
            tracing::debug!("node {node} is quiet");
        }
    }

    /// Starts, or repeats, what the run is at, unless something has to happen before.
    pub fn go_on(
        &mut self,
        pipeline: Option<&mut Pipeline>,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) {
        let waiting = self
            .recovery
            .as_ref()
            .is_some_and(|recovery| !self.restarting.is_empty() || recovery.unquiet != 0);
        if self.run.is_none() || waiting {
            return;
        }
        let recovered = self.recovery.take().is_some();
        self.unquiet &= !recovered;
        let Some(pipeline) = pipeline else {
            return self.end(
                Err(ActorError::Stopped {
                    actor: ActorId::Pipeline,
                }),
                false,
            );
        };
        if !self.started {
            self.started = true;
            self.next_feed(pipeline, team, posts);
        } else if recovered {
            self.start_step(pipeline, team, posts);
        }
    }

    /// Lets the pipeline handle a message.
    pub fn handle(
        &mut self,
        message: Message,
        pipeline: &mut Pipeline,
        team: &mut Team,
        posts: &mut Posts<'_>,
    ) {
        let Some(run) = &mut self.run else { return };
        let complete = match message {
            Message::LayerDone(message) => pipeline.layer_done(message, run, posts),
            Message::HeadDone(message) => pipeline.head_done(message, run, posts),
            other => unreachable!("Pipeline got {other:?}"),
        };
        match complete {
            Err(error) => self.end(Err(error), false),
            Ok(false) => {}
            Ok(true) => {
                if let Some(recorder) = posts.recorder() {
                    recorder.end_step();
                }
                let complete = pipeline.finish_step(run, &mut self.cached);
                if let Err(error) = pipeline.replan(run, self.step + 1, team, posts) {
                    self.end(Err(error), false);
                } else if complete {
                    self.next_feed(pipeline, team, posts);
                } else {
                    self.start_step(pipeline, team, posts);
                }
            }
        }
    }

    /// Starts the next step of the feed, or repeats the one that failed, under a new number.
    fn start_step(&mut self, pipeline: &mut Pipeline, team: &mut Team, posts: &mut Posts<'_>) {
        let Some(run) = &mut self.run else { return };
        self.step += 1;
        if let Err(error) = pipeline.start_step(run, self.step, team, posts) {
            self.end(Err(error), false);
        }
    }

    fn next_feed(&mut self, pipeline: &mut Pipeline, team: &mut Team, posts: &mut Posts<'_>) {
        let Some(run) = &mut self.run else { return };
        self.step += 1;
        if let Progress::Ended(outcome) =
            pipeline.next_feed(run, &mut self.cached, self.step, team, posts)
        {
            self.end(outcome, false);
        }
    }

    /// Ends the run because nobody answers.
    pub fn late(&mut self, mut late: Vec<String>, limit: Duration) {
        if let Some(recovery) = &self.recovery {
            let restarting = (self.restarting.iter()).map(|actor| format!("{actor}'s restart"));
            late.extend(restarting);
            let nodes = (0..u32::BITS).filter(|node| recovery.unquiet >> node & 1 == 1);
            late.extend(nodes.map(|node| format!("node {node}")));
        }
        let late = if late.is_empty() {
            "the pipeline".to_owned()
        } else {
            late.join(", ")
        };
        self.end(
            Err(ActorError::Late {
                late,
                seconds: limit.as_secs_f64(),
            }),
            true,
        );
    }

    fn end(&mut self, outcome: Result<(), ActorError>, unquiet: bool) {
        self.unquiet |= unquiet;
        self.recovery = None;
        self.step += 1;
        if let Some(run) = self.run.take() {
            run.end(outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, sync_channel};

    use pi_kernels::attention::KvType;
    use pi_kernels::{ActivationMode, Cpu};

    use super::*;
    use crate::messages::{Envelope, RunLayer};
    use crate::model::Model;
    use crate::pipeline::Served;
    use crate::test_model::{self, Collector, Form, PlainModel};
    use crate::wait::{Patience, SPIN};
    use crate::weights::{GateActivation, SparsityMode};

    const DEVICE: ActorId = ActorId::DeviceLayer { layer: 0 };

    /// A host without other nodes, and what it works with.
    struct Bench {
        host: Host,
        pipeline: Pipeline,
        team: Team,
        local: VecDeque<Envelope>,
    }

    impl Bench {
        fn new() -> Self {
            let plain = PlainModel::random(5, GateActivation::Relu);
            let form = Form::Neurons(SparsityMode::Exact);
            let weights = test_model::weights(&plain, 1, form);
            let cpu = Cpu::detect(ActivationMode::F32);
            let model = Arc::new(Model::new(weights, cpu, KvType::F32, 8));
            let patience = Patience {
                spin: SPIN,
                limit: None,
            };
            Self {
                host: Host::new(1),
                pipeline: Pipeline::new(model, Arc::default()),
                team: Team::start("test", 1, patience, |_| Ok::<(), ()>(()), |_| ()).unwrap(),
                local: VecDeque::new(),
            }
        }

        /// Starts a run that feeds one token, with the pipeline there or not.
        fn start(&mut self, has_pipeline: bool) -> Receiver<Served> {
            let (reply, served) = sync_channel(1);
            let run = RunState::new(Box::new(Collector::new(&[3], true)), reply, 8);
            self.host.start(run, &[]);
            self.go_on(has_pipeline);
            served
        }

        fn go_on(&mut self, has_pipeline: bool) {
            let mut posts = Posts::new(0, &mut self.local, &[], None);
            let pipeline = has_pipeline.then_some(&mut self.pipeline);
            self.host.go_on(pipeline, &mut self.team, &mut posts);
        }

        /// What the first layer was told since the last call.
        fn layers_started(&mut self) -> Vec<Step> {
            let steps = self.local.drain(..).map(|envelope| match envelope {
                Envelope {
                    to: DEVICE,
                    message: Message::RunLayer(RunLayer { step, layer: 0 }),
                } => step,
                other => panic!("{other:?}"),
            });
            steps.collect()
        }

        fn fail(&mut self, actor: ActorId, reason: Option<&str>) {
            let reason = reason.map(str::to_owned);
            self.host.failed(Failure { actor, reason }, &[]);
        }
    }

    #[test]
    fn a_failed_step_is_repeated_under_a_new_number() {
        let mut bench = Bench::new();
        assert!(bench.host.is_stale(0), "nobody waits");
        let _served = bench.start(true);
        let steps = bench.layers_started();
        let [first] = steps[..] else {
            panic!("{steps:?}")
        };
        assert!(!bench.host.is_stale(first));
        assert!(bench.host.is_stale(first - 1) && bench.host.is_stale(first + 1));

        bench.fail(DEVICE, Some("a panic"));
        assert!(bench.host.is_stale(first), "given up");
        bench.go_on(true);
        assert_eq!(bench.layers_started(), [], "the actor is not back yet");
        bench.host.restarted(DEVICE);
        bench.go_on(true);
        let second = first + 1;
        assert_eq!(bench.layers_started(), [second]);
        assert!(bench.host.is_stale(first), "late messages of the first try");
        assert!(!bench.host.is_stale(second));
    }

    #[test]
    fn a_run_waits_for_an_actor_that_is_being_restarted() {
        let mut bench = Bench::new();
        let served = bench.start(true);
        for attempt in 1..=ATTEMPTS_MAX {
            bench.fail(ActorId::Pipeline, Some("a panic"));
            if attempt < ATTEMPTS_MAX {
                bench.host.restarted(ActorId::Pipeline);
                bench.go_on(true);
            }
        }
        let outcome = served.try_recv().unwrap().outcome;
        assert!(matches!(outcome, Err(ActorError::KeepsFailing { .. })));
        bench.layers_started();

        let served = bench.start(false);
        assert!(served.try_recv().is_err(), "it waits");
        bench.host.restarted(ActorId::Pipeline);
        bench.go_on(true);
        assert_eq!(bench.layers_started().len(), 1);
    }

    #[test]
    fn a_run_ends_at_once_where_the_pipeline_is_stopped() {
        let served = Bench::new().start(false);
        let outcome = served.try_recv().unwrap().outcome;
        let stopped = ActorId::Pipeline;
        assert!(matches!(outcome, Err(ActorError::Stopped { actor }) if actor == stopped));
    }
}
