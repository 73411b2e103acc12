//! What is shown while something takes long: a model being loaded, a machine being measured.

use std::io::{IsTerminal, stderr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::session::LoadObserver;

/// Loads that take no longer show no bar: drawing it would be a good part of their time.
const QUIET: Duration = Duration::from_millis(500);

/// Whether stderr is a terminal that understands more than lines.
pub fn is_shown() -> bool {
    stderr().is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// A bar on stderr; hidden where that is no terminal.
#[derive(Debug)]
pub struct LoadBar {
    bar: ProgressBar,
    start: Instant,
    total_bytes: AtomicU64,
}

impl Default for LoadBar {
    fn default() -> Self {
        Self::new("loading")
    }
}

impl LoadBar {
    /// A bar that says what is done.
    pub fn new(verb: &str) -> Self {
        let target = if is_shown() {
            ProgressDrawTarget::stderr_with_hz(10)
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template(&format!(
            "{verb} {{bar:40}} {{bytes}} of {{total_bytes}}"
        ));
        Self {
            bar: match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            },
            start: Instant::now(),
            total_bytes: AtomicU64::new(0),
        }
    }
}

impl LoadObserver for LoadBar {
    fn begin(&self, total_bytes: u64) {
        // the bar itself would be drawn with its length
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    fn copied(&self, bytes: u64) {
        if self.start.elapsed() > QUIET {
            self.bar
                .set_length(self.total_bytes.load(Ordering::Relaxed));
            self.bar.set_position(bytes);
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

/// A line on stderr that says what is done; nothing where that is no terminal.
#[derive(Debug)]
pub struct Activity {
    bar: ProgressBar,
}

impl Activity {
    /// A line that begins with `verb`.
    pub fn new(verb: &str) -> Self {
        let target = match is_shown() {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = ProgressStyle::with_template(&format!("{verb} {{msg}}"));
        Self {
            bar: match style {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            },
        }
    }

    /// Says what is done now.
    pub fn say(&self, part: &str) {
        self.bar.set_message(part.to_owned());
    }

    /// Takes the line away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
