//! Ctrl-C: the first ends the answer, the next the program.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::error::INTERRUPTED_EXIT_CODE;
use crate::unfinished_file;

/// What is left to do when Ctrl-C ends the program.
type AtExit = Box<dyn Fn() + Send + Sync>;

/// Whether an answer is under way, and whether it should end. Clones share their state.
#[derive(Clone, Default)]
pub struct Interrupt {
    answering: Arc<AtomicBool>,
    requested: Arc<AtomicBool>,
    at_exit: Arc<OnceLock<AtExit>>,
}

impl Interrupt {
    /// Starts to listen for Ctrl-C on a thread of its own. Where that fails, Ctrl-C ends the program as usual.
    pub fn listen() -> Self {
        let interrupt = Self::default();
        let shared = interrupt.clone();
        let listener = std::thread::Builder::new().name("ctrl-c".into());
        if let Err(error) = listener.spawn(move || shared.wait()) {
            tracing::warn!("Ctrl-C will end the program at once: cannot start its thread: {error}");
        }
        interrupt
    }

    fn wait(&self) {
        let runtime = match tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
        {
            Ok(runtime) => runtime,
            Err(error) => return tracing::warn!("Ctrl-C will end the program at once: {error}"),
        };
        runtime.block_on(async {
            while tokio::signal::ctrl_c().await.is_ok() {
                self.pressed();
            }
        });
    }

    fn pressed(&self) {
        let first = !self.requested.swap(true, Ordering::AcqRel);
        if !(first && self.answering.load(Ordering::Acquire)) {
            eprintln!();
            if let Some(at_exit) = self.at_exit.get() {
                at_exit();
            }
            let _none_left = unfinished_file::remove_all();
            std::process::exit(INTERRUPTED_EXIT_CODE.into());
        }
    }

    /// Has `at_exit` called before Ctrl-C ends the program; the first one that is given counts.
    pub fn at_exit(&self, at_exit: AtExit) {
        // a second one is not called
        let _ = self.at_exit.set(at_exit);
    }

    /// Marks an answer as under way until the guard is dropped; from here the next Ctrl-C ends only the answer.
    pub fn answer(&self) -> Answering<'_> {
        self.requested.store(false, Ordering::Release);
        self.answering.store(true, Ordering::Release);
        Answering(self)
    }

    /// Whether the answer under way should end.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }

    /// The flag behind [`Interrupt::requested`], for a thread that must not know of signals.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.requested)
    }
}

/// An answer under way.
pub struct Answering<'a>(&'a Interrupt);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.answering.store(false, Ordering::Release);
    }
}
