//! `--trace`: the recording of a command, from its flag to its file.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use clap::Args;
use pi_actors::trace::TraceBounds;

use super::interrupt::Interrupt;
use crate::error::RuntimeError;
use crate::session::{Answer, LoadedModel};
use crate::trace::{ControlLog, Recording, TraceError};

/// Flags of what can be traced.
#[derive(Debug, Clone, Args)]
pub struct TraceArgs {
    /// Write a timeline of all that ran to FILE, for ui.perfetto.dev
    #[arg(long, value_name = "FILE", help_heading = "Timeline and log")]
    pub trace: Option<PathBuf>,
    /// Most memory of the timeline until it is written, in MiB a node
    #[arg(long, value_name = "MIB", default_value_t = 64, help_heading = "Timeline and log", hide_short_help = true, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub trace_memory: u32,
}

impl TraceArgs {
    /// How much an engine shall record of so many steps; nothing without the flag.
    pub(super) fn bounds(&self, n_steps: usize) -> Option<TraceBounds> {
        let node_bytes_max = (self.trace_memory as usize) << 20;
        self.trace.as_ref().map(|_| TraceBounds {
            n_steps,
            node_bytes_max,
        })
    }
}

/// A recording, if one was asked for.
#[derive(Debug, Default)]
pub(super) struct Tracer(Option<Arc<Recording>>);

impl Tracer {
    /// Opens the file. Where Ctrl-C ends the program from here on, the trace is written first.
    ///
    /// # Errors
    /// As [`Recording::create`].
    pub fn open(
        args: &TraceArgs,
        control: &ControlLog,
        interrupt: &Interrupt,
    ) -> Result<Self, RuntimeError> {
        let Some(path) = &args.trace else {
            return Ok(Self(None));
        };
        let recording = Arc::new(Recording::create(path, control.clone())?);
        // weak: whatever drops the recording removes its unfinished file
        let at_exit: Weak<Recording> = Arc::downgrade(&recording);
        interrupt.at_exit(Box::new(move || {
            if let Err(error) = at_exit.upgrade().map_or(Ok(()), |it| finish(&it)) {
                eprintln!("error: {error}");
            }
        }));
        Ok(Self(Some(recording)))
    }

    /// A model has been loaded since `start`.
    ///
    /// # Errors
    /// Its engine is gone.
    pub fn loaded(&self, model: &LoadedModel, start: Instant) -> Result<(), RuntimeError> {
        if let Some(recording) = &self.0 {
            recording.attach(&model.engine)?;
            recording.span("load", start, Instant::now());
            tracing::debug!("the engine is traced");
        }
        Ok(())
    }

    /// Something has been done since `start`.
    pub fn span(&self, name: &'static str, start: Instant) {
        if let Some(recording) = &self.0 {
            recording.span(name, start, Instant::now());
        }
    }

    /// An answer has been given.
    pub fn answered(&self, answer: &Answer) {
        let finished = &answer.finished;
        let (Some(recording), Some(first)) = (&self.0, finished.first_logits) else {
            return;
        };
        let start = first.checked_sub(finished.prompt).unwrap_or(first);
        recording.span("prefill", start, first);
        if finished.decode > Duration::ZERO {
            recording.span("decode", first, first + finished.decode);
        }
    }

    /// Writes the trace of what ended well, in an ordinary way or by Ctrl-C; of anything else nothing
    /// is left.
    ///
    /// # Errors
    /// That of `outcome`, or as [`Recording::finish`].
    pub fn close<T>(&self, outcome: Result<T, RuntimeError>) -> Result<T, RuntimeError> {
        if let (Some(recording), Ok(_) | Err(RuntimeError::OutputClosed)) = (&self.0, &outcome) {
            finish(recording)?;
        }
        outcome
    }
}

/// Writes the file, and says so.
fn finish(recording: &Recording) -> Result<(), TraceError> {
    let Some(written) = recording.finish()? else {
        return Ok(());
    };
    let path = recording.path().display();
    eprintln!("trace: {path}, {} events", written.events);
    if written.lost > 0 {
        eprintln!(
            "trace: {} later events lost, as its memory was full: raise it with --trace-memory",
            written.lost
        );
    }
    Ok(())
}
