//! Packets of one sequence: names once, then numbers.

use std::collections::HashMap;
use std::io::{self, Write};

use prost::Message;

use super::perfetto::{
    DebugAnnotation, EventType, InternedData, InternedName, SEQ_INCREMENTAL_STATE_CLEARED,
    SEQ_NEEDS_INCREMENTAL_STATE, TracePacket, TrackDescriptor, TrackEvent,
};

/// `Trace.packet`'s key on the wire: field 1, with a length.
const PACKET_KEY: u8 = 1 << 3 | 2;

/// Any number will do: there is one sequence.
const SEQUENCE: u32 = 1;

/// An argument's value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(u64),
    Text(&'static str),
    Flag(bool),
}

/// Arguments of an event.
pub(super) type Arguments = Vec<(&'static str, Value)>;

/// An event but its time.
#[derive(Debug, Clone, Default)]
pub(super) struct What {
    pub name: String,
    pub category: &'static str,
    pub arguments: Arguments,
    pub flow_start: Option<u64>,
    pub flow_end: Option<u64>,
}

/// Numbers of names.
#[derive(Debug, Default)]
struct Names(HashMap<String, u64>);

impl Names {
    /// The name's number, and the name again if it is new.
    fn number(&mut self, name: &str) -> (u64, Option<InternedName>) {
        if let Some(iid) = self.0.get(name) {
            return (*iid, None);
        }
        // 0 means none
        let iid = self.0.len() as u64 + 1;
        self.0.insert(name.to_owned(), iid);
        let interned = InternedName {
            iid: Some(iid),
            name: Some(name.to_owned()),
        };
        (iid, Some(interned))
    }
}

/// Writes packets.
pub(super) struct PacketWriter<W> {
    out: W,
    buffer: Vec<u8>,
    categories: Names,
    names: Names,
    argument_names: Names,
    /// Whether a packet has been written.
    begun: bool,
}

impl<W: Write> PacketWriter<W> {
    pub fn new(out: W) -> Self {
        Self {
            out,
            buffer: Vec::new(),
            categories: Names::default(),
            names: Names::default(),
            argument_names: Names::default(),
            begun: false,
        }
    }

    /// Gives the output back.
    pub fn into_inner(self) -> W {
        self.out
    }

    /// Writes a packet.
    pub fn packet(&mut self, mut packet: TracePacket) -> io::Result<()> {
        packet.trusted_packet_sequence_id = Some(SEQUENCE);
        packet.sequence_flags = Some(if self.begun {
            SEQ_NEEDS_INCREMENTAL_STATE
        } else {
            SEQ_INCREMENTAL_STATE_CLEARED
        });
        self.begun = true;
        self.buffer.clear();
        self.buffer.push(PACKET_KEY);
        packet
            .encode_length_delimited(&mut self.buffer)
            .map_err(io::Error::other)?;
        self.out.write_all(&self.buffer)
    }

    /// Announces a track.
    pub fn track(&mut self, track: TrackDescriptor) -> io::Result<()> {
        self.packet(TracePacket {
            track_descriptor: Some(track),
            ..TracePacket::default()
        })
    }

    /// Begins a span.
    pub fn begin(&mut self, track: u64, at_ns: u64, what: &What) -> io::Result<()> {
        self.event(track, at_ns, EventType::SliceBegin, what)
    }

    /// Ends the span that was begun last.
    pub fn end(&mut self, track: u64, at_ns: u64) -> io::Result<()> {
        self.raw(
            at_ns,
            TrackEvent {
                r#type: Some(EventType::SliceEnd.into()),
                track_uuid: Some(track),
                ..TrackEvent::default()
            },
            None,
        )
    }

    /// A moment.
    pub fn instant(&mut self, track: u64, at_ns: u64, what: &What) -> io::Result<()> {
        self.event(track, at_ns, EventType::Instant, what)
    }

    /// A counter's value from now on.
    pub fn counter(&mut self, track: u64, at_ns: u64, value: u64) -> io::Result<()> {
        self.raw(
            at_ns,
            TrackEvent {
                r#type: Some(EventType::Counter.into()),
                track_uuid: Some(track),
                counter_value: Some(i64::try_from(value).unwrap_or(i64::MAX)),
                ..TrackEvent::default()
            },
            None,
        )
    }

    fn event(
        &mut self,
        track: u64,
        at_ns: u64,
        event_type: EventType,
        what: &What,
    ) -> io::Result<()> {
        let mut new = InternedData::default();
        let (category, interned) = self.categories.number(what.category);
        new.event_categories.extend(interned);
        let (name, interned) = self.names.number(&what.name);
        new.event_names.extend(interned);
        let mut annotations = Vec::with_capacity(what.arguments.len());
        for (name, value) in &what.arguments {
            let (name, interned) = self.argument_names.number(name);
            new.debug_annotation_names.extend(interned);
            annotations.push(annotation(name, value));
        }
        let event = TrackEvent {
            category_iids: vec![category],
            debug_annotations: annotations,
            r#type: Some(event_type.into()),
            name_iid: Some(name),
            track_uuid: Some(track),
            flow_ids: what.flow_start.into_iter().collect(),
            terminating_flow_ids: what.flow_end.into_iter().collect(),
            ..TrackEvent::default()
        };
        let new = (new != InternedData::default()).then_some(new);
        self.raw(at_ns, event, new)
    }

    fn raw(&mut self, at_ns: u64, event: TrackEvent, new: Option<InternedData>) -> io::Result<()> {
        self.packet(TracePacket {
            timestamp: Some(at_ns),
            track_event: Some(event),
            interned_data: new,
            ..TracePacket::default()
        })
    }
}

fn annotation(name_iid: u64, value: &Value) -> DebugAnnotation {
    let mut annotation = DebugAnnotation {
        name_iid: Some(name_iid),
        ..DebugAnnotation::default()
    };
    match value {
        Value::Number(number) => annotation.uint_value = Some(*number),
        Value::Text(text) => annotation.string_value = Some((*text).to_owned()),
        Value::Flag(flag) => annotation.bool_value = Some(*flag),
    }
    annotation
}
