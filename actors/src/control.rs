//! The control plane on kameo: every actor has a counterpart that starts it, counts it, restarts it
//! when it died, and stops it. Nothing here is on a token's way.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use kameo::Actor;
use kameo::actor::{ActorRef, Spawn, WeakActorRef};
use kameo::error::{ActorStopReason, PanicError};
use kameo::message::{Context, Message};
use kameo::supervision::RestartPolicy;

use crate::counters::{ActorCounters, Cell};
use crate::executor::{Control, Incarnation, Letter};
use crate::mailbox::Outbox;
use crate::messages::ActorId;

/// Restarts within [`RESTART_WINDOW`] after which an actor stays dead. A step is given up long
/// before; this stops an actor that dies between steps for ever.
const RESTARTS_MAX: u32 = 1000;
/// See [`RESTARTS_MAX`].
const RESTART_WINDOW: Duration = Duration::from_secs(10);

/// Makes an actor's state anew.
pub(crate) type Build = Arc<dyn Fn() -> Incarnation + Send + Sync>;

/// What an actor's counterpart is made from, and made from again.
#[derive(Clone)]
pub(crate) struct Blueprint {
    pub actor: ActorId,
    pub cell: Arc<Cell>,
    pub build: Build,
    pub outboxes: Arc<[Outbox<Letter>]>,
}

impl Blueprint {
    fn send(&self, node: usize, control: Control) {
        if self.outboxes[node].send(Letter::Control(control)).is_err() {
            tracing::error!(
                "{}: the executor of node {node} takes no messages",
                self.actor
            );
        }
    }
}

/// An actor's counterpart.
pub(crate) struct Counterpart(Blueprint);

impl Actor for Counterpart {
    type Args = Blueprint;
    type Error = Infallible;

    /// Puts a new incarnation of the actor into its executor; the first one as well as later ones.
    async fn on_start(blueprint: Blueprint, _: ActorRef<Self>) -> Result<Self, Infallible> {
        let restarts = blueprint.cell.count_start();
        let incarnation = Box::new((blueprint.build)());
        let actor = blueprint.actor;
        blueprint.send(actor.executor(), Control::Install(actor, incarnation));
        if restarts > 0 {
            tracing::info!("{actor} restarted");
            blueprint.send(0, Control::Restarted(actor));
        } else {
            tracing::debug!("{actor} started");
        }
        Ok(Self(blueprint))
    }

    /// A normal stop takes the actor out of its executor.
    async fn on_stop(
        &mut self,
        _: WeakActorRef<Self>,
        reason: ActorStopReason,
    ) -> Result<(), Infallible> {
        if matches!(reason, ActorStopReason::Normal) {
            self.0
                .send(self.0.actor.executor(), Control::Remove(self.0.actor));
            tracing::debug!("{} stopped", self.0.actor);
        }
        Ok(())
    }
}

/// Asks for an actor's counters.
pub(crate) struct ReadCounters;

impl Message<ReadCounters> for Counterpart {
    type Reply = ActorCounters;

    async fn handle(&mut self, _: ReadCounters, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        self.0.cell.read(self.0.actor)
    }
}

/// The actor died in its executor: its counterpart dies with it, and both are restarted.
pub(crate) struct Died(pub String);

impl Message<Died> for Counterpart {
    type Reply = Result<(), String>;

    async fn handle(&mut self, died: Died, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        Err(died.0)
    }
}

/// Owns the counterparts: restarts those that died, one by one.
pub(crate) struct Supervisor;

impl Actor for Supervisor {
    type Args = ();
    type Error = Infallible;

    async fn on_start(_: (), _: ActorRef<Self>) -> Result<Self, Infallible> {
        Ok(Self)
    }

    async fn on_link_died(
        &mut self,
        _: WeakActorRef<Self>,
        id: kameo::actor::ActorId,
        reason: ActorStopReason,
    ) -> Result<ControlFlow<ActorStopReason>, Infallible> {
        if !matches!(reason, ActorStopReason::Normal) {
            tracing::error!("an actor ({id}) is not restarted any more: {reason}");
        }
        Ok(ControlFlow::Continue(()))
    }

    async fn on_panic(
        &mut self,
        _: WeakActorRef<Self>,
        error: PanicError,
    ) -> Result<ControlFlow<ActorStopReason>, Infallible> {
        tracing::warn!("Supervisor goes on after: {error}");
        Ok(ControlFlow::Continue(()))
    }
}

/// Asks all actors for their counters, and adds them up.
pub(crate) struct Stats(pub Vec<(ActorId, ActorRef<Counterpart>)>);

impl Actor for Stats {
    type Args = Self;
    type Error = Infallible;

    async fn on_start(stats: Self, _: ActorRef<Self>) -> Result<Self, Infallible> {
        Ok(stats)
    }

    async fn on_panic(
        &mut self,
        _: WeakActorRef<Self>,
        error: PanicError,
    ) -> Result<ControlFlow<ActorStopReason>, Infallible> {
        tracing::warn!("Stats goes on after: {error}");
        Ok(ControlFlow::Continue(()))
    }
}

/// Asks for the counters of all actors; those that are stopped are left out.
pub(crate) struct ReadAll;

impl Message<ReadAll> for Stats {
    type Reply = Vec<ActorCounters>;

    async fn handle(&mut self, _: ReadAll, _: &mut Context<Self, Self::Reply>) -> Self::Reply {
        let mut all = Vec::with_capacity(self.0.len());
        for (actor, counterpart) in &self.0 {
            match counterpart.ask(ReadCounters).await {
                Ok(counters) => all.push(counters),
                Err(error) => tracing::debug!("{actor} has no counters: {error}"),
            }
        }
        all
    }
}

/// Makes its receiver panic, for tests.
pub(crate) struct Panic;

impl Message<Panic> for Stats {
    type Reply = ();

    async fn handle(&mut self, _: Panic, _: &mut Context<Self, Self::Reply>) {
        panic!("injected panic");
    }
}

impl Message<Panic> for Supervisor {
    type Reply = ();

    async fn handle(&mut self, _: Panic, _: &mut Context<Self, Self::Reply>) {
        panic!("injected panic");
    }
}

/// Starts a counterpart under the supervisor.
pub(crate) async fn start(
    supervisor: &ActorRef<Supervisor>,
    blueprint: Blueprint,
) -> ActorRef<Counterpart> {
    Counterpart::supervise(supervisor, blueprint)
        .restart_policy(RestartPolicy::Transient)
        .restart_limit(RESTARTS_MAX, RESTART_WINDOW)
        .spawn()
        .await
}
