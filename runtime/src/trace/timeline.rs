//! An engine's events on their tracks.
//!
//! A node's thread shows steps (node 0 only), in them layers, in these the messages that the thread
//! handled. The same messages are on their actors' tracks, with an instant where each is posted and
//! an arrow from there to its handling. Layers are no events of their own: a layer is a row of
//! messages of one step and layer.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io::{self, Write};

use pi_actors::trace::{ActorKind, Event, GpuPart, Label, MessageKind, NodeEvents, Phase};

use super::flows::Flows;
use super::packets::{Arguments, PacketWriter, Value, What};
use super::tracks::{EngineTracks, NodeThread};

/// Neurons computed, and active ones among them.
type Neurons = (u64, u64);

/// Something to be shown on a track.
#[derive(Debug, Clone, Copy)]
struct Item<'a> {
    start_t: u64,
    end_t: u64,
    /// Outer before inner where both have the same times.
    depth: u8,
    shows: Shows<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Shows<'a> {
    /// A step, or a phase of it.
    Event(&'a Event),
    /// A row of messages on a thread.
    Group(Group),
    /// A message on a thread.
    OnThread(&'a Event),
    /// A message, handled or posted, on its actor's track; or what it had to do with a GPU.
    OnActor(&'a Event),
    /// Part of a token, on a GPU's track.
    OnGpu(&'a Event),
}

/// What a row of messages has in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Group {
    step: u32,
    /// None: the head.
    layer: Option<u16>,
}

impl Group {
    fn of(label: Label) -> Self {
        let is_head = label.kind.is_head();
        Self {
            step: label.step,
            layer: (!is_head).then_some(label.layer),
        }
    }
}

/// An engine's events, ready to be written.
pub(super) struct Timeline<'a> {
    engine: usize,
    tracks: EngineTracks,
    /// ns that are added to every time.
    origin_ns: u64,
    nodes: &'a [NodeEvents],
    flows: Flows,
    by_step: HashMap<u32, Neurons>,
    by_layer: HashMap<(u32, u16), Neurons>,
}

impl<'a> Timeline<'a> {
    /// Of the n-th engine, whose time 0 is `origin_ns`.
    pub fn new(
        nodes: &'a [NodeEvents],
        engine: usize,
        tracks: EngineTracks,
        origin_ns: u64,
    ) -> Self {
        let mut by_step: HashMap<u32, Neurons> = HashMap::new();
        let mut by_layer: HashMap<(u32, u16), Neurons> = HashMap::new();
        for event in nodes.iter().flat_map(|node| &node.events) {
            if let Event::Posted {
                label,
                neurons,
                active_neurons,
                ..
            } = *event
                && neurons > 0
            {
                let step = by_step.entry(label.step).or_default();
                let layer = by_layer.entry((label.step, label.layer)).or_default();
                for sum in [step, layer] {
                    sum.0 += u64::from(neurons);
                    sum.1 += u64::from(active_neurons);
                }
            }
        }
        Self {
            engine,
            tracks,
            origin_ns,
            nodes,
            flows: Flows::of(nodes, engine),
            by_step,
            by_layer,
        }
    }

    /// Writes all tracks.
    pub fn write<W: Write>(
        mut self,
        threads: &[NodeThread],
        writer: &mut PacketWriter<W>,
    ) -> io::Result<()> {
        let nodes = self.nodes;
        let gpus = nodes.iter().flat_map(|node| &node.events);
        let gpus = gpus.filter_map(|event| match event {
            Event::Gpu { gpu, .. } => Some(usize::from(*gpu) + 1),
            _ => None,
        });
        self.tracks
            .describe(threads, gpus.max().unwrap_or(0), writer)?;
        for (node, events) in nodes.iter().enumerate() {
            let items = thread_items(&events.events);
            if node == 0 {
                self.write_counters(&items, writer)?;
            }
            self.write_waiting(node, &events.events, writer)?;
            self.write_items(self.tracks.thread(node), items, writer)?;
        }
        let mut actors: HashMap<u64, Vec<Item<'_>>> = HashMap::new();
        for event in nodes.iter().flat_map(|node| &node.events) {
            if let Some((kind, node, item)) = actor_item(event) {
                let track = self.tracks.actors(kind, node);
                actors.entry(track).or_default().push(item);
            }
            if let Some((gpu, predictor, item)) = gpu_item(event) {
                let track = self.tracks.gpu(gpu, predictor);
                actors.entry(track).or_default().push(item);
            }
        }
        let mut actors: Vec<_> = actors.into_iter().collect();
        actors.sort_by_key(|(track, _)| *track);
        for (track, items) in actors {
            self.write_items(track, items, writer)?;
        }
        Ok(())
    }

    /// Writes spans that begin and end inside one another, and instants.
    fn write_items<W: Write>(
        &mut self,
        track: u64,
        mut items: Vec<Item<'_>>,
        writer: &mut PacketWriter<W>,
    ) -> io::Result<()> {
        items.sort_by_key(|item| (item.start_t, Reverse(item.end_t), item.depth));
        let mut open: Vec<u64> = Vec::new();
        for item in items {
            let is_instant = match item.shows {
                Shows::OnActor(Event::Posted { .. }) => true,
                Shows::OnActor(Event::Gpu { part, .. }) | Shows::OnGpu(Event::Gpu { part, .. }) => {
                    part.is_moment()
                }
                _ => false,
            };
            while let Some(&end) = open.last()
                && (end < item.start_t || end == item.start_t && !is_instant)
            {
                writer.end(track, self.origin_ns + end)?;
                open.pop();
            }
            let what = self.what(item.shows);
            let at_ns = self.origin_ns + item.start_t;
            if is_instant {
                writer.instant(track, at_ns, &what)?;
                continue;
            }
            writer.begin(track, at_ns, &what)?;
            // times of one thread never cross; should a clock run backwards, spans still nest
            let end_t = item.end_t.min(*open.last().unwrap_or(&u64::MAX));
            open.push(end_t);
        }
        while let Some(end) = open.pop() {
            writer.end(track, self.origin_ns + end)?;
        }
        Ok(())
    }

    fn write_counters<W: Write>(
        &self,
        items: &[Item<'_>],
        writer: &mut PacketWriter<W>,
    ) -> io::Result<()> {
        let of_layer = |item: &Item<'_>| match item.shows {
            Shows::Group(Group {
                step,
                layer: Some(layer),
            }) => self.by_layer.get(&(step, layer)),
            _ => None,
        };
        for item in items {
            if let Some((_, active)) = of_layer(item) {
                let at_ns = self.origin_ns + item.start_t;
                writer.counter(self.tracks.active_of_layer(), at_ns, *active)?;
            }
            let Shows::Event(Event::Step {
                step,
                position,
                n_tokens,
                failed: false,
                ..
            }) = item.shows
            else {
                continue;
            };
            let (_, active) = self.by_step.get(step).copied().unwrap_or_default();
            let start_ns = self.origin_ns + item.start_t;
            writer.counter(self.tracks.active_of_step(), start_ns, active)?;
            let cached = u64::from(*position) + u64::from(*n_tokens);
            let end_ns = self.origin_ns + item.end_t;
            writer.counter(self.tracks.cached(), end_ns, cached)?;
        }
        Ok(())
    }

    /// Messages that wait, wherever their number changes.
    fn write_waiting<W: Write>(
        &self,
        node: usize,
        events: &[Event],
        writer: &mut PacketWriter<W>,
    ) -> io::Result<()> {
        let mut last = None;
        for event in events {
            if let Event::Handled {
                start_t, waiting, ..
            } = *event
                && last != Some(waiting)
            {
                last = Some(waiting);
                let at_ns = self.origin_ns + start_t;
                writer.counter(self.tracks.waiting(node), at_ns, waiting.into())?;
            }
        }
        Ok(())
    }

    /// Name, category, arguments and arrow.
    fn what(&mut self, shows: Shows<'_>) -> What {
        match shows {
            Shows::Group(group) => self.group(group),
            Shows::OnThread(event)
            | Shows::OnActor(event)
            | Shows::OnGpu(event)
            | Shows::Event(event) => {
                let on_actor = matches!(shows, Shows::OnActor(_));
                match *event {
                    Event::Step { .. } => self.step(event),
                    Event::Gpu { .. } => self.gpu(event),
                    Event::Phase { phase, step, .. } => What {
                        name: phase.name().into(),
                        category: "phase",
                        arguments: vec![("step", Value::Number(step.into()))],
                        ..What::default()
                    },
                    Event::Handled {
                        label,
                        waiting,
                        failed,
                        ..
                    } => {
                        let mut what = message(label, "message", on_actor);
                        let waiting = Value::Number(waiting.into());
                        what.arguments.push(("waiting", waiting));
                        if failed {
                            what.arguments.push(("failed", Value::Flag(true)));
                        }
                        if on_actor && is_to_another(label) {
                            what.flow_end = self.flows.end(label);
                        }
                        what
                    }
                    Event::Posted {
                        label,
                        neurons,
                        active_neurons,
                        ..
                    } => {
                        let mut what = message(label, "post", on_actor);
                        what.name.insert_str(0, "post ");
                        if neurons > 0 {
                            let sums = (neurons.into(), active_neurons.into());
                            push_neurons(&mut what.arguments, sums);
                        }
                        if is_to_another(label) {
                            what.flow_start = self.flows.start(label);
                        }
                        what
                    }
                }
            }
        }
    }

    /// Part of a token on a GPU. Arrows go from where the hidden state is handed over to where the host sees it, and from the
    /// host's answer to where it is taken.
    fn gpu(&self, event: &Event) -> What {
        let Event::Gpu {
            part,
            layer,
            step,
            error_ns,
            ..
        } = *event
        else {
            return What::default();
        };
        let flow = |answer: bool| {
            let engine = (self.engine as u64 & 0xFF) << 52;
            let of_layer = u64::from(step) << 17 | u64::from(layer) << 1 | u64::from(answer);
            Some(1 << 62 | engine | of_layer)
        };
        let (flow_start, flow_end) = match part {
            GpuPart::Layers => (flow(false), None),
            GpuPart::Seen => (None, flow(false)),
            GpuPart::Told => (flow(true), None),
            GpuPart::Taken => (None, flow(true)),
            GpuPart::Hot | GpuPart::Wait | GpuPart::Predict | GpuPart::Rest => (None, None),
        };
        let mut arguments = vec![
            ("step", Value::Number(step.into())),
            ("layer", Value::Number(layer.into())),
        ];
        if !part.is_host() {
            arguments.push(("clock_error_ns", Value::Number(error_ns.into())));
        }
        What {
            name: format!("layer {layer} {}", part.name()),
            category: "gpu",
            arguments,
            flow_start,
            flow_end,
        }
    }

    fn step(&self, event: &Event) -> What {
        let Event::Step {
            step,
            position,
            n_tokens,
            decode,
            failed,
            ..
        } = *event
        else {
            return What::default();
        };
        let mut arguments = vec![
            ("step", Value::Number(step.into())),
            ("position", Value::Number(position.into())),
            ("n_tokens", Value::Number(n_tokens.into())),
        ];
        if let Some(sums) = self.by_step.get(&step) {
            push_neurons(&mut arguments, *sums);
        }
        if failed {
            arguments.push(("failed", Value::Flag(true)));
        }
        What {
            name: if decode { "decode" } else { "prefill" }.into(),
            category: "step",
            arguments,
            ..What::default()
        }
    }

    fn group(&self, group: Group) -> What {
        let mut arguments = vec![("step", Value::Number(group.step.into()))];
        let Some(layer) = group.layer else {
            return What {
                name: "head".into(),
                category: "layer",
                arguments,
                ..What::default()
            };
        };
        arguments.push(("layer", Value::Number(layer.into())));
        if let Some(sums) = self.by_layer.get(&(group.step, layer)) {
            push_neurons(&mut arguments, *sums);
        }
        What {
            name: format!("layer {layer}"),
            category: "layer",
            arguments,
            ..What::default()
        }
    }
}

fn push_neurons(arguments: &mut Arguments, (neurons, active): Neurons) {
    arguments.push(("neurons", Value::Number(neurons)));
    arguments.push(("active_neurons", Value::Number(active)));
}

/// Whether a message leaves its actor's track: what an actor tells itself needs no arrow.
fn is_to_another(label: Label) -> bool {
    label.kind.handler() != label.kind.poster()
}

/// A message; on its actor's track its layer is part of the name.
fn message(label: Label, category: &'static str, on_actor: bool) -> What {
    let Label {
        step,
        kind,
        layer,
        node,
    } = label;
    let mut name = String::new();
    let has_layer = !matches!(kind, MessageKind::RunHead | MessageKind::HeadDone);
    if on_actor && has_layer {
        name = format!("layer {layer} ");
    }
    name.push_str(kind.name());
    let is_share = matches!(kind.name(), "Share" | "ShareDone");
    let stage = kind.stage();
    if let Some(stage) = stage.filter(|_| is_share) {
        name.push(' ');
        name.push_str(stage);
    }
    let mut arguments = vec![("step", Value::Number(step.into()))];
    if has_layer {
        arguments.push(("layer", Value::Number(layer.into())));
    }
    if let Some(stage) = stage {
        arguments.push(("stage", Value::Text(stage)));
    }
    arguments.push(("node", Value::Number(node.into())));
    What {
        name,
        category,
        arguments,
        ..What::default()
    }
}

/// What a thread did: steps, rows of messages, messages, phases.
fn thread_items(events: &[Event]) -> Vec<Item<'_>> {
    let mut items = Vec::with_capacity(events.len());
    let mut row: Option<(Group, u64, u64)> = None;
    let group_item = |(group, start_t, end_t)| Item {
        start_t,
        end_t,
        depth: 1,
        shows: Shows::Group(group),
    };
    for event in events {
        match *event {
            Event::Handled {
                label,
                start_t,
                end_t,
                ..
            } => {
                let group = Group::of(label);
                match &mut row {
                    Some((same, _, end)) if *same == group => *end = end_t,
                    _ => items.extend(row.replace((group, start_t, end_t)).map(group_item)),
                }
                items.push(Item {
                    start_t,
                    end_t,
                    depth: 2,
                    shows: Shows::OnThread(event),
                });
            }
            Event::Step { start_t, end_t, .. } => items.push(Item {
                start_t,
                end_t,
                depth: 0,
                shows: Shows::Event(event),
            }),
            Event::Phase {
                phase,
                start_t,
                end_t,
                ..
            } => items.push(Item {
                start_t,
                end_t,
                depth: if phase == Phase::Start { 2 } else { 3 },
                shows: Shows::Event(event),
            }),
            Event::Posted { .. } | Event::Gpu { .. } => {}
        }
    }
    items.extend(row.map(group_item));
    items
}

/// The actor that an event belongs to, and what its track shows of it.
fn actor_item(event: &Event) -> Option<(ActorKind, usize, Item<'_>)> {
    let (kind, node, start_t, end_t) = match *event {
        Event::Handled {
            label,
            start_t,
            end_t,
            ..
        } => (label.kind.handler(), label.node, start_t, end_t),
        Event::Posted { label, at_t, .. } => (label.kind.poster(), label.node, at_t, at_t),
        Event::Phase {
            phase: Phase::Start,
            start_t,
            end_t,
            ..
        } => (ActorKind::Pipeline, 0, start_t, end_t),
        Event::Gpu {
            part,
            start_t,
            end_t,
            ..
        } if part.is_host() => (ActorKind::DeviceLayer, 0, start_t, end_t),
        _ => return None,
    };
    let shows = match event {
        Event::Phase { .. } => Shows::Event(event),
        _ => Shows::OnActor(event),
    };
    let item = Item {
        start_t,
        end_t,
        depth: 0,
        shows,
    };
    Some((kind, node.into(), item))
}

/// The GPU that did something, whether its predictor did, and what its track shows of it.
fn gpu_item(event: &Event) -> Option<(usize, bool, Item<'_>)> {
    let Event::Gpu {
        part,
        gpu,
        start_t,
        end_t,
        ..
    } = *event
    else {
        return None;
    };
    let item = Item {
        start_t,
        end_t,
        depth: 0,
        shows: Shows::OnGpu(event),
    };
    (!part.is_host()).then_some((gpu.into(), part == GpuPart::Predict, item))
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::super::perfetto::{EventType, Trace};
    use super::super::tracks::Tracks;
    use super::*;

    #[test]
    fn a_gpu_s_parts_are_on_its_tracks_with_arrows_to_the_host() {
        let gpu = |part, layer, start_t, end_t| Event::Gpu {
            part,
            gpu: 1,
            layer,
            step: 7,
            start_t,
            end_t,
            error_ns: 900,
        };
        let events = vec![
            gpu(GpuPart::Layers, 0, 100, 200),
            gpu(GpuPart::Hot, 0, 200, 250),
            gpu(GpuPart::Wait, 0, 250, 300),
            gpu(GpuPart::Seen, 0, 210, 210),
            gpu(GpuPart::Told, 0, 280, 280),
            gpu(GpuPart::Taken, 0, 300, 300),
            gpu(GpuPart::Predict, 1, 200, 240),
            gpu(GpuPart::Rest, 1, 300, 400),
        ];
        let nodes = [NodeEvents { events, lost: 0 }];
        let tracks = Tracks::of_process().engine(0);
        let mut bytes = Vec::new();
        let timeline = Timeline::new(&nodes, 0, tracks, 1000);
        timeline
            .write(&[], &mut PacketWriter::new(&mut bytes))
            .unwrap();
        let packets = Trace::decode(&bytes[..]).unwrap().packet;
        let names: Vec<String> = (packets.iter())
            .filter_map(|packet| packet.track_descriptor.as_ref()?.name.clone())
            .collect();
        for name in ["GPU 0", "GPU 1", "GPU 1 predictor"] {
            assert!(names.iter().any(|other| other == name), "{name}: {names:?}");
        }
        let of = |track: u64| -> Vec<(i32, u64)> {
            let events = packets.iter().filter_map(|packet| {
                let event = packet.track_event.as_ref()?;
                let is_here = event.track_uuid == Some(track);
                is_here.then_some((event.r#type?, packet.timestamp?))
            });
            events.collect()
        };
        let (begin, end) = (EventType::SliceBegin as i32, EventType::SliceEnd as i32);
        let parts = [(1100, 1200), (1200, 1250), (1250, 1300), (1300, 1400)];
        let spans = parts
            .iter()
            .flat_map(|(from, to)| [(begin, *from), (end, *to)]);
        let instant = EventType::Instant as i32;
        let (mut of_gpu, mut want) = (of(tracks.gpu(1, false)), spans.collect::<Vec<_>>());
        want.push((instant, 1300));
        of_gpu.sort_by_key(|event| (event.1, event.0));
        want.sort_by_key(|event| (event.1, event.0));
        assert_eq!(of_gpu, want);
        assert_eq!(of(tracks.gpu(1, true)), [(begin, 1200), (end, 1240)]);
        let host = tracks.actors(ActorKind::DeviceLayer, 0);
        assert_eq!(of(host), [(instant, 1210), (instant, 1280)]);
        let flows = packets
            .iter()
            .filter_map(|packet| packet.track_event.as_ref());
        let starts: Vec<u64> = flows
            .clone()
            .flat_map(|event| event.flow_ids.clone())
            .collect();
        let mut ends: Vec<u64> = flows
            .flat_map(|event| event.terminating_flow_ids.clone())
            .collect();
        ends.sort_by_key(|id| starts.iter().position(|start| start == id));
        assert_eq!((starts.len(), &starts), (2, &ends));
    }
}
