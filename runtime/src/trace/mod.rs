//! `--trace FILE`: what ran when, as a file for <https://ui.perfetto.dev>.
//!
//! A [`Recording`] opens the file before anything is computed, and writes it when all is done: what
//! the executors recorded meanwhile ([`pi_actors::trace`]), what the control plane logged
//! ([`ControlLog`]), and what the session was at. See `docs/timeline.md` for how to read it.

mod control_log;
mod flows;
mod packets;
pub mod perfetto;
mod timeline;
mod tracks;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pi_actors::{ActorError, Engine};
use rustix::time::{ClockId, clock_gettime};
use thiserror::Error;

use crate::unfinished_file::UnfinishedFile;
pub use control_log::ControlLog;
use packets::{PacketWriter, What};
use perfetto::{
    CLOCK_BOOTTIME, CLOCK_MONOTONIC, CLOCK_REALTIME, Clock, ClockSnapshot, TracePacket,
};
use timeline::Timeline;
use tracks::{NodeThread, Tracks};

/// Bytes gathered before they are written to the file.
const BUFFER_BYTES: usize = 1 << 20;

/// Why there is no trace.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The path is taken by something that must not be replaced.
    #[error("--trace {}: this is no file: name one, new or old", path.display())]
    NotReplaceable {
        /// The path.
        path: PathBuf,
    },
    /// The file cannot be created.
    #[error("--trace {}: cannot create a file in its folder: {source}", path.display())]
    Create {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("--trace {}: cannot write the file: {source}", path.display())]
    Write {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl TraceError {
    /// Whether the machine is at fault rather than what was asked of it.
    pub fn is_environment(&self) -> bool {
        matches!(self, TraceError::Write { .. })
    }
}

/// A trace under way. Dropped before [`Recording::finish`] it leaves nothing behind.
#[derive(Debug)]
pub struct Recording {
    path: PathBuf,
    control: ControlLog,
    clocks: Clocks,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// None: written.
    file: Option<(File, UnfinishedFile)>,
    engines: Vec<EngineSource>,
    spans: Vec<SessionSpan>,
}

#[derive(Debug)]
struct EngineSource {
    trace: Arc<pi_actors::trace::Trace>,
    threads: Vec<NodeThread>,
}

#[derive(Debug)]
struct SessionSpan {
    name: &'static str,
    start: Instant,
    end: Instant,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Events of the executors.
    pub events: usize,
    /// Those that there was no room for.
    pub lost: u64,
}

/// One moment by several clocks.
#[derive(Debug, Clone, Copy)]
struct Clocks {
    instant: Instant,
    /// Each with its number in a trace, in ns; the first is the trace's own.
    system: [(u32, u64); 3],
}

#[cfg(target_os = "linux")]
const BOOTTIME: ClockId = ClockId::Boottime;
#[cfg(not(target_os = "linux"))]
const BOOTTIME: ClockId = ClockId::Monotonic;

impl Clocks {
    fn now() -> Self {
        let ns = |clock| {
            let time = clock_gettime(clock);
            time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
        };
        Self {
            instant: Instant::now(),
            system: [
                (CLOCK_BOOTTIME, ns(BOOTTIME)),
                (CLOCK_MONOTONIC, ns(ClockId::Monotonic)),
                (CLOCK_REALTIME, ns(ClockId::Realtime)),
            ],
        }
    }

    /// The trace's time of a moment, in ns.
    fn ns(&self, at: Instant) -> u64 {
        let here = self.system[0].1;
        let ns = |time: std::time::Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        match at.checked_duration_since(self.instant) {
            Some(after) => here.saturating_add(ns(after)),
            None => here.saturating_sub(ns(self.instant.duration_since(at))),
        }
    }

    fn packet(&self) -> TracePacket {
        let clocks = self.system.map(|(clock_id, ns)| Clock {
            clock_id: Some(clock_id),
            timestamp: Some(ns),
        });
        TracePacket {
            timestamp: Some(self.system[0].1),
            clock_snapshot: Some(ClockSnapshot {
                clocks: clocks.to_vec(),
                primary_trace_clock: Some(CLOCK_BOOTTIME as i32),
            }),
            ..TracePacket::default()
        }
    }
}

impl Recording {
    /// Opens the file: under a name of its own beside `path` until it is finished.
    ///
    /// # Errors
    /// `path` is taken by something else than a file, or its folder cannot be written.
    pub fn create(path: &Path, control: ControlLog) -> Result<Self, TraceError> {
        let path = path.to_path_buf();
        if fs::metadata(&path).is_ok_and(|facts| !facts.is_file()) {
            return Err(TraceError::NotReplaceable { path });
        }
        let (temporary, file) = match UnfinishedFile::create_beside(&path) {
            Ok(created) => created,
            Err(source) => return Err(TraceError::Create { path, source }),
        };
        Ok(Self {
            path,
            control,
            clocks: Clocks::now(),
            state: Mutex::new(State {
                file: Some((file, temporary)),
                engines: Vec::new(),
                spans: Vec::new(),
            }),
        })
    }

    /// Where the trace will be.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds what `engine` records; an engine that does not is left out.
    ///
    /// # Errors
    /// The engine is gone.
    pub fn attach(&self, engine: &Engine) -> Result<(), ActorError> {
        let Some(trace) = engine.trace() else {
            return Ok(());
        };
        let source = EngineSource {
            trace: Arc::clone(trace),
            threads: node_threads(engine)?,
        };
        self.lock().engines.push(source);
        Ok(())
    }

    /// Adds something that the program was at.
    pub fn span(&self, name: &'static str, start: Instant, end: Instant) {
        self.lock().spans.push(SessionSpan { name, start, end });
    }

    /// Writes what there is and gives the file its name; none where that has happened before, or no
    /// engine was there to record anything, which leaves no file.
    ///
    /// # Errors
    /// The operating system refuses; nothing is left behind then.
    pub fn finish(&self) -> Result<Option<Written>, TraceError> {
        let mut state = self.lock();
        let Some((file, temporary)) = state.file.take() else {
            return Ok(None);
        };
        if state.engines.is_empty() {
            return Ok(None);
        }
        let write = || {
            let mut writer = PacketWriter::new(BufWriter::with_capacity(BUFFER_BYTES, file));
            let written = self.write(&state, &mut writer)?;
            let mut out = writer.into_inner();
            out.flush()?;
            out.get_ref().sync_all()?;
            temporary.rename_to(&self.path)?;
            Ok(written)
        };
        write().map(Some).map_err(|source| TraceError::Write {
            path: self.path.clone(),
            source,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write<W: Write>(&self, state: &State, writer: &mut PacketWriter<W>) -> io::Result<Written> {
        let tracks = Tracks::of_process();
        writer.packet(self.clocks.packet())?;
        tracks.describe(writer)?;
        self.write_session(state, tracks.session(), writer)?;
        self.write_control(tracks.control(), writer)?;
        let mut written = Written { events: 0, lost: 0 };
        for (n, engine) in state.engines.iter().enumerate() {
            let nodes = engine.trace.read();
            let origin_ns = self.clocks.ns(engine.trace.started());
            let timeline = Timeline::new(&nodes, n, tracks.engine(n), origin_ns);
            timeline.write(&engine.threads, writer)?;
            written.events += nodes.iter().map(|node| node.events.len()).sum::<usize>();
            written.lost += nodes.iter().map(|node| node.lost).sum::<u64>();
        }
        if written.lost > 0 {
            let what = What {
                name: format!("{} later events lost", written.lost),
                category: "session",
                ..What::default()
            };
            writer.instant(tracks.session(), self.clocks.ns(Instant::now()), &what)?;
        }
        Ok(written)
    }

    /// Spans in the order in which they began; those of one program nest.
    fn write_session<W: Write>(
        &self,
        state: &State,
        track: u64,
        writer: &mut PacketWriter<W>,
    ) -> io::Result<()> {
        let mut spans: Vec<&SessionSpan> = state.spans.iter().collect();
        spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
        let mut open: Vec<Instant> = Vec::new();
        for span in spans {
            while let Some(end) = open.pop_if(|end| *end <= span.start) {
                writer.end(track, self.clocks.ns(end))?;
            }
            let what = What {
                name: span.name.into(),
                category: "session",
                ..What::default()
            };
            writer.begin(track, self.clocks.ns(span.start), &what)?;
            open.push(open.last().map_or(span.end, |outer| span.end.min(*outer)));
        }
        while let Some(end) = open.pop() {
            writer.end(track, self.clocks.ns(end))?;
        }
        Ok(())
    }

    fn write_control<W: Write>(&self, track: u64, writer: &mut PacketWriter<W>) -> io::Result<()> {
        let (events, lost) = self.control.read();
        let last = events.last().map(|(at, _)| *at);
        let lost = last
            .filter(|_| lost > 0)
            .map(|at| (at, format!("{lost} later events lost")));
        for (at, text) in events.into_iter().chain(lost) {
            let what = What {
                name: text,
                category: "control",
                ..What::default()
            };
            writer.instant(track, self.clocks.ns(at), &what)?;
        }
        Ok(())
    }
}

/// The threads of an engine's executors, asked from each.
fn node_threads(engine: &Engine) -> Result<Vec<NodeThread>, ActorError> {
    let nodes = &engine.teams().plan().nodes;
    let threads: Mutex<Vec<Option<NodeThread>>> = Mutex::new(vec![None; nodes.len()]);
    engine.teams().run(&|member| {
        if member.thread != 0 {
            return;
        }
        let name = std::thread::current().name().unwrap_or("node").to_owned();
        let numa = nodes[member.node].numa;
        let place = numa.map_or(String::new(), |numa| format!(" (NUMA node {numa})"));
        let thread = NodeThread {
            name: name + &place,
            tid: thread_id().unwrap_or(i64::from(std::process::id()) + 1 + member.node as i64),
        };
        let mut threads = threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads[member.node] = Some(thread);
    })?;
    let threads = threads.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(threads.into_iter().flatten().collect())
}

/// The calling thread's number; none where the system does not say.
fn thread_id() -> Option<i64> {
    // "PID/task/TID"
    let link = fs::read_link("/proc/thread-self").ok()?;
    link.file_name()?.to_str()?.parse().ok()
}
