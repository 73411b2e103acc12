//! Teams of pinned threads, one per node of a plan, each led by an executor.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;

use pi_topology::{NodePlan, Plan, pin_thread};

use crate::error::ActorError;
use crate::executor::{Control, Executor, Letter, MAILBOX_CAPACITY};
use crate::mailbox::{Mailbox, Outbox, mailbox};
use crate::team::{Team, panic_text};
use crate::wait::{Patience, SPIN, SPIN_SHARED};

/// Longest wait at a barrier or for a team's threads.
pub(crate) const TEAM_LIMIT: Duration = Duration::from_secs(60);

/// One thread of a team, while it works on a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TeamThread {
    /// Node, counted from 0.
    pub node: usize,
    /// Thread of the node's team, counted from 0.
    pub thread: usize,
    /// Threads of the node's team.
    pub n_threads: usize,
}

type Job<'a> = dyn Fn(TeamThread) + Sync + 'a;

/// A job on its way to the executors. Its borrows are alive until [`Teams::run`] returns, which
/// waits for every executor that has got it.
pub(crate) struct JobRef(*const Job<'static>);

// SAFETY: the job is Sync, and alive (see the type).
unsafe impl Send for JobRef {}

impl JobRef {
    /// Runs the job on all threads of a team.
    ///
    /// # Errors
    /// The words of a panic.
    pub fn run(&self, node: usize, team: &mut Team) -> Result<(), String> {
        // SAFETY: alive (see the type).
        let job = unsafe { &*self.0 };
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            team.run_long(&|member| {
                let (thread, n_threads) = (member.thread, member.n_threads);
                job(TeamThread {
                    node,
                    thread,
                    n_threads,
                });
            });
        }));
        outcome.map_err(|payload| panic_text(payload.as_ref()))
    }
}

/// Teams of pinned threads, one per node.
pub struct Teams {
    plan: Plan,
    outboxes: Vec<Outbox<Letter>>,
    leaders: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for Teams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Teams")
            .field("plan", &self.plan)
            .finish_non_exhaustive()
    }
}

impl Teams {
    /// Starts and pins the threads of `plan`.
    ///
    /// # Errors
    /// A thread cannot be started or pinned.
    pub fn start(plan: &Plan) -> Result<Self, ActorError> {
        let (outboxes, mailboxes): (Vec<_>, Vec<_>) = (0..plan.nodes.len())
            .map(|_| mailbox(MAILBOX_CAPACITY, || Letter::Control(Control::Nothing)))
            .unzip();
        let mut teams = Self {
            plan: plan.clone(),
            outboxes,
            leaders: Vec::new(),
        };
        let spin = if shares_cpus(plan) { SPIN_SHARED } else { SPIN };
        let (tell, told) = sync_channel(plan.nodes.len());
        for (node, mailbox) in mailboxes.into_iter().enumerate() {
            let (node_plan, outboxes) = (plan.nodes[node].clone(), teams.outboxes.clone());
            let tell = tell.clone();
            let lead = move || {
                let patience = Patience {
                    spin,
                    limit: Some(TEAM_LIMIT),
                };
                match start_team(node, &node_plan, patience) {
                    Ok(team) => {
                        // the starter waits for it
                        let _ = tell.send(Ok(()));
                        drop(tell);
                        lead_team(node, team, mailbox, outboxes, patience);
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            };
            let builder = std::thread::Builder::new().name(format!("pi-node{node}"));
            let leader = builder
                .spawn(lead)
                .map_err(|source| ActorError::Thread { node, source })?;
            teams.leaders.push(leader);
        }
        for _ in 0..plan.nodes.len() {
            told.recv().map_err(|_| ActorError::Gone)??;
        }
        Ok(teams)
    }

    /// Threads of each node.
    pub fn n_threads(&self) -> Vec<usize> {
        self.plan.nodes.iter().map(|node| node.cpus.len()).collect()
    }

    /// What the teams were started from.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Ways to the executors.
    pub(crate) fn outboxes(&self) -> &[Outbox<Letter>] {
        &self.outboxes
    }

    /// Sends something to one executor.
    ///
    /// # Errors
    /// It is gone, or does not take anything any more.
    pub(crate) fn send(&self, node: usize, control: Control) -> Result<(), ActorError> {
        self.outboxes[node]
            .send(Letter::Control(control))
            .map_err(|_| ActorError::Gone)
    }

    /// Runs `job` once on every thread of every node and returns when all are done: loading and
    /// first touch of a node's memory.
    ///
    /// # Errors
    /// A panic in `job`.
    pub fn run(&self, job: &(dyn Fn(TeamThread) + Sync)) -> Result<(), ActorError> {
        let mut answers = Vec::with_capacity(self.outboxes.len());
        let mut outcome = Ok(());
        for node in 0..self.outboxes.len() {
            // SAFETY: only the lifetime changes; the answers below are waited for.
            let erased: *const Job<'static> =
                unsafe { std::mem::transmute::<&Job<'_>, &'static Job<'static>>(job) };
            let (done, answer) = sync_channel(1);
            match self.send(
                node,
                Control::Job {
                    job: JobRef(erased),
                    done,
                },
            ) {
                Ok(()) => answers.push((node, answer)),
                Err(error) => outcome = Err(error),
            }
        }
        for (node, answer) in answers {
            let failed = match answer.recv() {
                Ok(Ok(())) => continue,
                Ok(Err(reason)) => ActorError::Job { node, reason },
                Err(_) => ActorError::Gone,
            };
            outcome = outcome.and(Err(failed));
        }
        outcome
    }
}

impl Drop for Teams {
    fn drop(&mut self) {
        for node in 0..self.leaders.len() {
            // one that is gone needs no telling
            let _ = self.send(node, Control::Shutdown);
        }
        for leader in self.leaders.drain(..) {
            let _ = leader.join();
        }
    }
}

/// Whether two threads of the plan have one CPU.
fn shares_cpus(plan: &Plan) -> bool {
    let mut cpus: Vec<usize> = plan
        .nodes
        .iter()
        .flat_map(|node| node.cpus.clone())
        .collect();
    let n = cpus.len();
    cpus.sort_unstable();
    cpus.dedup();
    cpus.len() < n
}

pub(crate) fn start_team(
    node: usize,
    plan: &NodePlan,
    patience: Patience,
) -> Result<Team, ActorError> {
    pin_thread(plan.cpus[0])?;
    let cpus = plan.cpus.clone();
    let prepare = move |thread: usize| pin_thread(cpus[thread]).map_err(ActorError::from);
    let cannot_start = |source| ActorError::Thread { node, source };
    Team::start(
        &format!("pi-node{node}"),
        plan.cpus.len(),
        patience,
        prepare,
        cannot_start,
    )
}

fn lead_team(
    node: usize,
    team: Team,
    mailbox: Mailbox<Letter>,
    outboxes: Vec<Outbox<Letter>>,
    patience: Patience,
) {
    let idle = Patience {
        limit: None,
        ..patience
    };
    Executor::new(node, team, mailbox, outboxes, idle).run();
}
