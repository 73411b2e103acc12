#!/usr/bin/env python3
"""Checks a trace of pi-runtime with Google's own reader of the format:

    python3 tests/check_trace.py FILE [--json OUTPUT]

OUTPUT is what the same run printed with --json. Needs the package perfetto (pip install perfetto).
"""
import argparse
import json
import sys
from collections import defaultdict

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb

CLEARED, NEEDED = pb.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED, pb.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE


class Broken(Exception):
    """The trace breaks a rule."""


def hold(rule, *what):
    if not rule:
        raise Broken(" ".join(map(str, what)))


def intern(table, entries):
    for entry in entries:
        hold(entry.iid and entry.iid not in table, "name number", entry.iid, "twice or none")
        table[entry.iid] = entry.name


class Reader:
    def __init__(self):
        self.tracks, self.spans, self.flows = {}, [], defaultdict(lambda: [[], []])
        self.counters, self.open, self.last = defaultdict(list), defaultdict(list), {}
        self.categories, self.names, self.arguments = {}, {}, {}

    def packet(self, packet):
        hold(packet.sequence_flags in (CLEARED, NEEDED), "sequence flags", packet.sequence_flags)
        if packet.HasField("interned_data"):
            intern(self.categories, packet.interned_data.event_categories)
            intern(self.names, packet.interned_data.event_names)
            intern(self.arguments, packet.interned_data.debug_annotation_names)
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            hold(track.uuid not in self.tracks, "track", track.uuid, "is announced twice")
            hold(not track.parent_uuid or track.parent_uuid in self.tracks, "the parent of", track.name)
            self.tracks[track.uuid] = track
        if packet.HasField("track_event"):
            self.event(packet.timestamp, packet.track_event)

    def event(self, at, event):
        uuid, kind = event.track_uuid, event.type
        hold(uuid in self.tracks, "an event on an unknown track")
        hold(self.last.get(uuid, 0) <= at, "time goes back on", self.tracks[uuid].name)
        self.last[uuid] = at
        for flow in event.flow_ids:
            self.flows[flow][0].append(uuid)
        for flow in event.terminating_flow_ids:
            self.flows[flow][1].append(uuid)
        if kind == pb.TrackEvent.TYPE_COUNTER:
            hold(self.tracks[uuid].HasField("counter"), "a value on a track that counts nothing")
            self.counters[self.tracks[uuid].name].append(event.counter_value)
            return
        if kind == pb.TrackEvent.TYPE_SLICE_END:
            hold(self.open[uuid], "a span ends that has not begun on", self.tracks[uuid].name)
            self.spans.append(self.open[uuid].pop() + (at,))
            return
        hold(event.name_iid in self.names, "name", event.name_iid, "is not known")
        for category in event.category_iids:
            hold(category in self.categories, "category", category, "is not known")
        arguments = {}
        for annotation in event.debug_annotations:
            hold(annotation.name_iid in self.arguments, "argument", annotation.name_iid, "is not known")
            arguments[self.arguments[annotation.name_iid]] = getattr(annotation, annotation.WhichOneof("value"))
        if kind == pb.TrackEvent.TYPE_SLICE_BEGIN:
            self.open[uuid].append((uuid, self.names[event.name_iid], arguments, at))
        else:
            hold(kind == pb.TrackEvent.TYPE_INSTANT, "event type", kind)

    def finish(self):
        hold(not any(self.open.values()), "a span never ends")
        for flow, (starts, ends) in self.flows.items():
            hold(len(starts) == len(ends) == 1, "arrow", flow, "has", len(starts), "starts and", len(ends), "ends")
            hold(starts != ends, "arrow", flow, "stays on its track")


def compare(reader, timings):
    """The trace's figures with those that the run reported."""
    decode = [span for span in reader.spans if span[1] == "decode" and "n_tokens" in span[2]]
    hold(len(decode) == timings["predicted_n"], len(decode), "decoded tokens, reported", timings["predicted_n"])
    traced_ms = sum(end - start for *_, start, end in decode) / 1e6
    hold(abs(traced_ms / timings["predicted_ms"] - 1) < 0.02, traced_ms, "ms, reported", timings["predicted_ms"])
    active = sum(span[2]["active_neurons"] for span in decode)
    share = active / sum(span[2]["neurons"] for span in decode)
    hold(share == timings["active_share"], "active", share, "reported", timings["active_share"])
    hold(sum(reader.counters["active neurons"][-len(decode):]) == active, "the counter says something else")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--json")
    args = parser.parse_args()
    trace, reader = pb.Trace(), Reader()
    with open(args.file, "rb") as file:
        trace.ParseFromString(file.read())
    try:
        for packet in trace.packet:
            reader.packet(packet)
        reader.finish()
        if args.json:
            with open(args.json) as file:
                compare(reader, json.load(file)["timings"])
    except Broken as broken:
        sys.exit(f"{args.file}: {broken}")
    print(f"{args.file} holds: {len(trace.packet)} packets, {len(reader.tracks)} tracks, {len(reader.spans)} spans, "
          f"{len(reader.flows)} arrows")


if __name__ == "__main__":
    main()
