//! What the control plane logs, kept for the timeline: actors that start, fail, start again.

use std::fmt::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Most events kept; later ones are counted.
const EVENTS_MAX: usize = 1 << 16;

/// Events of the control plane. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct ControlLog(Arc<Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    events: Vec<(Instant, String)>,
    lost: u64,
}

impl ControlLog {
    /// Listens to what the actors' crate logs.
    pub fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'a> LookupSpan<'a>,
    {
        let targets = Targets::new().with_target("pi_actors", LevelFilter::DEBUG);
        Listener(self.clone()).with_filter(targets)
    }

    /// The events so far, in order, and how many more there were.
    pub(super) fn read(&self) -> (Vec<(Instant, String)>, u64) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.events.sort_by_key(|(at, _)| *at);
        (kept.events.clone(), kept.lost)
    }

    fn add(&self, text: String) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.events.len() < EVENTS_MAX {
            kept.events.push((Instant::now(), text));
        } else {
            kept.lost += 1;
        }
    }
}

struct Listener(ControlLog);

impl<S: Subscriber> Layer<S> for Listener {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.add(text.0);
    }
}

/// An event's message and fields in words.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let space = if self.0.is_empty() { "" } else { " " };
        // a string takes everything
        let _ = match field.name() {
            "message" => write!(self.0, "{space}{value:?}"),
            name => write!(self.0, "{space}{name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tracing_subscriber::layer::SubscriberExt;

    #[test]
    fn only_the_control_plane_is_kept_in_words() {
        let log = ControlLog::default();
        let subscriber = tracing_subscriber::registry().with(log.layer());
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "pi_actors::control", n = 3, "an actor restarted");
            tracing::trace!(target: "pi_actors::control", "too fine");
            tracing::error!(target: "elsewhere", "not of the control plane");
        });
        let (events, lost) = log.read();
        let texts: Vec<&str> = events.iter().map(|(_, text)| text.as_str()).collect();
        assert_eq!((texts, lost), (vec!["an actor restarted n=3"], 0));
    }
}
