//! A trace as a file says it: every rule of its form is checked while it is read.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use pi_runtime::trace::perfetto::{
    DebugAnnotation, EventType, InternedName, SEQ_INCREMENTAL_STATE_CLEARED, Trace, TrackEvent,
};
use prost::Message;

/// A span, whole.
#[derive(Debug, Clone)]
pub struct Span {
    pub track: u64,
    pub name: String,
    pub category: String,
    pub start_ns: u64,
    pub end_ns: u64,
    /// Spans around it.
    pub depth: usize,
    pub numbers: HashMap<String, u64>,
    pub flags: HashSet<String>,
}

impl Span {
    pub fn ns(&self) -> u64 {
        self.end_ns - self.start_ns
    }
}

/// A moment.
#[derive(Debug, Clone)]
pub struct Instant {
    pub track: u64,
    pub name: String,
    pub at_ns: u64,
    /// Spans around it.
    pub depth: usize,
}

/// A track.
#[derive(Debug, Clone)]
pub struct Track {
    pub name: String,
    /// For a thread.
    pub tid: Option<i64>,
    pub is_counter: bool,
}

/// Track, and time in ns.
pub type Place = (u64, u64);

/// What is in a trace.
#[derive(Debug, Default)]
pub struct TraceFile {
    pub tracks: HashMap<u64, Track>,
    pub spans: Vec<Span>,
    pub instants: Vec<Instant>,
    /// By track, with times.
    pub counters: HashMap<u64, Vec<(u64, i64)>>,
    /// Start and end of each arrow.
    pub flows: HashMap<u64, (Place, Place)>,
}

#[derive(Default)]
struct Reader {
    categories: HashMap<u64, String>,
    names: HashMap<u64, String>,
    argument_names: HashMap<u64, String>,
    open: HashMap<u64, Vec<Span>>,
    last_ns: HashMap<u64, u64>,
    starts: HashMap<u64, Place>,
    ends: HashMap<u64, Place>,
    file: TraceFile,
}

impl TraceFile {
    /// Reads and checks `path`: names are known, spans nest and close, every arrow has one start and
    /// one end.
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap();
        let trace = Trace::decode(&bytes[..]).unwrap();
        let mut reader = Reader::default();
        let first = trace.packet.first().expect("a trace has packets");
        assert_eq!(first.sequence_flags, Some(SEQ_INCREMENTAL_STATE_CLEARED));
        for packet in trace.packet {
            if let Some(new) = packet.interned_data {
                add_names(&mut reader.categories, new.event_categories);
                add_names(&mut reader.names, new.event_names);
                add_names(&mut reader.argument_names, new.debug_annotation_names);
            }
            if let Some(track) = packet.track_descriptor {
                let thread = track.thread.as_ref();
                let process = track.process.and_then(|process| process.process_name);
                let name = thread
                    .and_then(|t| t.thread_name.clone())
                    .or(track.name)
                    .or(process);
                let known = Track {
                    name: name.expect("tracks have names"),
                    tid: thread.and_then(|thread| thread.tid),
                    is_counter: track.counter.is_some(),
                };
                assert!(
                    reader
                        .file
                        .tracks
                        .insert(track.uuid.unwrap(), known)
                        .is_none(),
                    "a track is announced once"
                );
            }
            if let Some(event) = packet.track_event {
                reader.event(packet.timestamp.expect("events have times"), event);
            }
        }
        reader.finish()
    }

    /// The track of this name.
    pub fn track(&self, name: &str) -> u64 {
        let mut tracks = self.tracks.iter().filter(|(_, track)| track.name == name);
        let (uuid, _) = tracks.next().unwrap_or_else(|| panic!("no track {name}"));
        assert!(tracks.next().is_none(), "two tracks {name}");
        *uuid
    }

    /// Spans of a name on a track.
    pub fn spans_of<'a>(&'a self, track: u64, name: &'a str) -> impl Iterator<Item = &'a Span> {
        self.spans
            .iter()
            .filter(move |span| span.track == track && span.name == name)
    }

    /// The tracks of executors' threads.
    pub fn threads(&self) -> Vec<u64> {
        let threads = self.tracks.iter().filter(|(_, track)| track.tid.is_some());
        let mut threads: Vec<u64> = threads.map(|(uuid, _)| *uuid).collect();
        threads.sort_unstable();
        threads
    }
}

fn add_names(names: &mut HashMap<u64, String>, new: Vec<InternedName>) {
    for name in new {
        let iid = name.iid.expect("a name has a number");
        assert!(iid != 0 && names.insert(iid, name.name.unwrap()).is_none());
    }
}

impl Reader {
    fn event(&mut self, at_ns: u64, event: TrackEvent) {
        let track = event.track_uuid.expect("events have tracks");
        let known = self.file.tracks.get(&track).expect("tracks come first");
        let event_type = event.r#type();
        assert_eq!(known.is_counter, event_type == EventType::Counter);
        let last = self.last_ns.entry(track).or_default();
        assert!(*last <= at_ns, "{}: time goes on", known.name);
        *last = at_ns;
        for id in &event.flow_ids {
            let start = self.starts.insert(*id, (track, at_ns));
            assert!(start.is_none(), "two starts of arrow {id}");
        }
        for id in &event.terminating_flow_ids {
            let end = self.ends.insert(*id, (track, at_ns));
            assert!(end.is_none(), "two ends of arrow {id}");
        }
        let depth = self.open.entry(track).or_default().len();
        match event_type {
            EventType::SliceBegin => {
                let (name, category) = self.names(&event);
                let (numbers, flags) = self.arguments(event.debug_annotations);
                self.open.entry(track).or_default().push(Span {
                    track,
                    name,
                    category,
                    start_ns: at_ns,
                    end_ns: 0,
                    depth,
                    numbers,
                    flags,
                });
            }
            EventType::SliceEnd => {
                let open = self.open.entry(track).or_default().pop();
                let mut span = open.expect("what ends has begun");
                span.end_ns = at_ns;
                self.file.spans.push(span);
            }
            EventType::Instant => {
                let (name, _) = self.names(&event);
                self.file.instants.push(Instant {
                    track,
                    name,
                    at_ns,
                    depth,
                });
            }
            EventType::Counter => {
                let value = event.counter_value.expect("a counter has a value");
                let values = self.file.counters.entry(track).or_default();
                values.push((at_ns, value));
            }
            EventType::Unspecified => panic!("an event has a type"),
        }
    }

    fn names(&self, event: &TrackEvent) -> (String, String) {
        let name = &self.names[&event.name_iid.expect("events have names")];
        let [category] = event.category_iids[..] else {
            panic!("events have one category");
        };
        (name.clone(), self.categories[&category].clone())
    }

    fn arguments(
        &self,
        annotations: Vec<DebugAnnotation>,
    ) -> (HashMap<String, u64>, HashSet<String>) {
        let (mut numbers, mut flags) = (HashMap::new(), HashSet::new());
        for annotation in annotations {
            let name = self.argument_names[&annotation.name_iid.unwrap()].clone();
            if let Some(number) = annotation.uint_value {
                numbers.insert(name, number);
            } else if annotation.bool_value == Some(true) {
                flags.insert(name);
            }
        }
        (numbers, flags)
    }

    fn finish(mut self) -> TraceFile {
        assert!(self.open.values().all(Vec::is_empty), "every span ends");
        assert_eq!(self.starts.len(), self.ends.len());
        for (id, start) in self.starts {
            let end = self.ends[&id];
            assert_ne!(start.0, end.0, "arrow {id} stays on its track");
            self.file.flows.insert(id, (start, end));
        }
        self.file
    }
}
