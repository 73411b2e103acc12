//! The timeline's lines: numbers, names and order.

use std::io::{self, Write};

use pi_actors::trace::ActorKind;

use super::packets::PacketWriter;
use super::perfetto::{
    CounterDescriptor, ORDERING_EXPLICIT, ProcessDescriptor, ThreadDescriptor, TrackDescriptor,
};

/// The thread of an executor, as the system and people call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NodeThread {
    pub name: String,
    pub tid: i64,
}

/// The tracks of a process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tracks {
    pid: u32,
}

/// The tracks of one of its engines.
#[derive(Debug, Clone, Copy)]
pub(super) struct EngineTracks {
    pid: u32,
    engine: usize,
}

impl Tracks {
    /// Of this process.
    pub fn of_process() -> Self {
        let pid = std::process::id();
        Self { pid }
    }

    fn process(self) -> u64 {
        u64::from(self.pid) << 32
    }

    /// What the program was at.
    pub fn session(self) -> u64 {
        self.process() | 1
    }

    /// What the control plane did.
    pub fn control(self) -> u64 {
        self.process() | 2
    }

    /// The tracks of the n-th engine.
    pub fn engine(self, engine: usize) -> EngineTracks {
        EngineTracks {
            pid: self.pid,
            engine,
        }
    }

    /// Announces the process and its own two tracks.
    pub fn describe<W: Write>(self, writer: &mut PacketWriter<W>) -> io::Result<()> {
        writer.track(TrackDescriptor {
            uuid: Some(self.process()),
            process: Some(ProcessDescriptor {
                pid: i32::try_from(self.pid).ok(),
                process_name: Some("pi-runtime".into()),
            }),
            child_ordering: Some(ORDERING_EXPLICIT),
            ..TrackDescriptor::default()
        })?;
        writer.track(child(self.process(), self.session(), "session".into(), 0))?;
        writer.track(child(self.process(), self.control(), "control".into(), 1))
    }
}

impl EngineTracks {
    fn number(self, n: usize) -> u64 {
        u64::from(self.pid) << 32 | (self.engine as u64 + 1) << 16 | n as u64
    }

    /// The thread of a node's executor.
    pub fn thread(self, node: usize) -> u64 {
        self.number(node)
    }

    /// A kind of actor; each node's cold layers are apart.
    pub fn actors(self, kind: ActorKind, node: usize) -> u64 {
        self.number(match kind {
            ActorKind::Pipeline => 0x100,
            ActorKind::DeviceLayer => 0x101,
            ActorKind::Predictor => 0x102,
            ActorKind::ColdLayer => 0x200 + node,
        })
    }

    /// Counter: active neurons of each step.
    pub fn active_of_step(self) -> u64 {
        self.number(0x300)
    }

    /// Counter: active neurons of each layer.
    pub fn active_of_layer(self) -> u64 {
        self.number(0x301)
    }

    /// Counter: positions in the key-value cache.
    pub fn cached(self) -> u64 {
        self.number(0x302)
    }

    /// Counter: messages that wait for a node's executor.
    pub fn waiting(self, node: usize) -> u64 {
        self.number(0x400 + node)
    }

    /// What a GPU did, and its predictors beside.
    pub fn gpu(self, gpu: usize, predictor: bool) -> u64 {
        self.number(0x500 + 2 * gpu + usize::from(predictor))
    }

    /// Announces all of them.
    pub fn describe<W: Write>(
        self,
        threads: &[NodeThread],
        n_gpus: usize,
        writer: &mut PacketWriter<W>,
    ) -> io::Result<()> {
        let process = u64::from(self.pid) << 32;
        let which = match self.engine {
            0 => String::new(),
            n => format!(" of engine {}", n + 1),
        };
        let actors = [
            (ActorKind::Pipeline, 0, "Pipeline".to_owned()),
            (ActorKind::DeviceLayer, 0, "DeviceLayer".to_owned()),
            (ActorKind::Predictor, 0, "Predictor".to_owned()),
        ];
        let cold = (0..threads.len())
            .map(|node| (ActorKind::ColdLayer, node, format!("ColdLayer node {node}")));
        let mut rank = 2 + 100 * self.engine as i32;
        for (kind, node, name) in actors.into_iter().chain(cold) {
            let track = self.actors(kind, node);
            writer.track(child(process, track, name + &which, rank))?;
            rank += 1;
        }
        for gpu in 0..n_gpus {
            for (predictor, name) in [(false, ""), (true, " predictor")] {
                let track = self.gpu(gpu, predictor);
                let name = format!("GPU {gpu}{name}{which}");
                writer.track(child(process, track, name, rank))?;
                rank += 1;
            }
        }
        let counters = [
            (self.active_of_step(), "active neurons", "neurons"),
            (self.active_of_layer(), "active neurons by layer", "neurons"),
            (self.cached(), "cached tokens", "tokens"),
        ];
        let counters = counters.map(|(track, name, unit)| (track, name.to_owned(), unit));
        let waiting = (0..threads.len()).map(|node| {
            let name = format!("queue depth node {node}");
            (self.waiting(node), name, "messages")
        });
        for (track, name, unit) in counters.into_iter().chain(waiting) {
            writer.track(TrackDescriptor {
                counter: Some(CounterDescriptor {
                    unit_name: Some(unit.into()),
                }),
                ..child(process, track, name + &which, rank)
            })?;
            rank += 1;
        }
        for (node, thread) in threads.iter().enumerate() {
            writer.track(TrackDescriptor {
                uuid: Some(self.thread(node)),
                parent_uuid: Some(process),
                thread: Some(ThreadDescriptor {
                    pid: i32::try_from(self.pid).ok(),
                    tid: Some(thread.tid),
                    thread_name: Some(thread.name.clone()),
                }),
                ..TrackDescriptor::default()
            })?;
        }
        Ok(())
    }
}

fn child(process: u64, uuid: u64, name: String, rank: i32) -> TrackDescriptor {
    TrackDescriptor {
        uuid: Some(uuid),
        name: Some(name),
        parent_uuid: Some(process),
        sibling_order_rank: Some(rank),
        ..TrackDescriptor::default()
    }
}
