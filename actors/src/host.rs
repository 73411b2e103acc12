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
    n_ctx: usize,
    run: Option<Box<RunState>>,
    /// Whether the run's first feed has been asked for.
    started: bool,
    /// Positions in the cache.
    cached: usize,
    /// The step under way; messages of earlier ones are stale.
    step: Step,
    recovery: Option<Recovery>,
    /// Number of the last recovery.
    epoch: u64,
    /// Whether messages of an abandoned step may still be under way on other nodes.
    unquiet: bool,
}

/// What has to happen before a step can be repeated.
struct Recovery {
    /// Actors that are being restarted.
    restarting: Vec<ActorId>,
    /// Nodes that may still work on the failed step, a bit each.
    unquiet: u32,
}

impl Host {
    /// Without a run.
    pub fn new(n_nodes: usize, n_ctx: usize) -> Self {
        Self {
            n_nodes,
            n_ctx,
            run: None,
            started: false,
            cached: 0,
            step: 0,
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
        self.cached = self.cached.min(self.n_ctx);
        if self.unquiet {
            self.recover(None, outboxes);
        }
    }

    /// Gives up the step because an actor failed, and prepares to repeat it.
    pub fn failed(&mut self, failure: Failure, outboxes: &[Outbox<Letter>]) {
        let Some(run) = &mut self.run else {
            self.unquiet = true;
            return;
        };
        let actor = failure.actor;
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
        self.recover(Some(actor), outboxes);
    }

    fn recover(&mut self, actor: Option<ActorId>, outboxes: &[Outbox<Letter>]) {
        if let Some(recovery) = &mut self.recovery {
            recovery.restarting.extend(actor);
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
        self.recovery = Some(Recovery {
            restarting: actor.into_iter().collect(),
            unquiet,
        });
    }

    /// Notes that an actor runs again.
    pub fn restarted(&mut self, actor: ActorId) {
        if let Some(recovery) = &mut self.recovery {
            recovery.restarting.retain(|waiting| *waiting != actor);
        }
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
            .is_some_and(|recovery| !recovery.restarting.is_empty() || recovery.unquiet != 0);
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
            self.step += 1;
            if let Some(run) = &mut self.run {
                pipeline.start_step(run, self.step, team, posts);
            }
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
            Message::LayerDone(message) => Ok(pipeline.layer_done(message, run, posts)),
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
                if pipeline.finish_step(run, &mut self.cached) {
                    self.next_feed(pipeline, team, posts);
                } else {
                    self.step += 1;
                    pipeline.start_step(run, self.step, team, posts);
                }
            }
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
            let restarting = recovery
                .restarting
                .iter()
                .map(|actor| format!("{actor}'s restart"));
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
