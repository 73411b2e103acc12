//! Panics, delays and the loss of a GPU on request, so that tests can see that actors heal and waits end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::messages::ActorId;

/// Panics to inject. Empty but in tests.
#[derive(Debug, Clone, Default)]
pub struct Faults(Option<Arc<Vec<Planned>>>);

/// One panic to inject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Who panics.
    pub actor: ActorId,
    /// After how many messages that it has handled.
    pub after_messages: u64,
    /// Where.
    pub place: FaultPlace,
    /// Whether it happens once, or whenever the actor handles a message.
    pub once: bool,
}

/// Where an injected panic happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultPlace {
    /// In the actor's handler.
    Handler,
    /// In a thread of the team that works for the actor.
    Worker {
        /// Counted from 0.
        thread: usize,
    },
    /// No panic: the actor's handler takes this much longer.
    Delay(Duration),
    /// No panic: the GPU executes a trap. Nothing where there is none.
    Gpu,
}

#[derive(Debug)]
struct Planned {
    fault: Fault,
    happened: AtomicBool,
}

impl Faults {
    /// These panics.
    pub fn new(faults: impl IntoIterator<Item = Fault>) -> Self {
        let planned = faults.into_iter().map(|fault| Planned {
            fault,
            happened: AtomicBool::new(false),
        });
        Self(Some(Arc::new(planned.collect())))
    }

    /// Whether, and where, `actor` shall panic after so many messages.
    pub(crate) fn due(&self, actor: ActorId, messages: u64) -> Option<FaultPlace> {
        let planned = self.0.as_ref()?.iter().find(|planned| {
            let fault = &planned.fault;
            fault.actor == actor
                && messages >= fault.after_messages
                && !(fault.once && planned.happened.load(Ordering::Relaxed))
        })?;
        planned.happened.store(true, Ordering::Relaxed);
        Some(planned.fault.place)
    }

    /// Whether all of them have happened.
    pub fn all_happened(&self) -> bool {
        let happened = |planned: &Planned| planned.happened.load(Ordering::Relaxed);
        self.0
            .as_ref()
            .is_none_or(|planned| planned.iter().all(happened))
    }
}
