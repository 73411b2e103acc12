#!/usr/bin/env python3
"""Draws pictures of traces for timeline.md:

    pi-runtime -p "The capital of France is" -n 24 --temp 0 --ignore-eos -t 2 --trace one.pftrace
    pi-runtime -p "The capital of France is" -n 24 --temp 0 --ignore-eos --topology configs/two-nodes.toml \\
        --trace two.pftrace
    python3 docs/timeline.py one.pftrace two.pftrace

writes timeline-token.svg and timeline-layer.svg (from the first) and timeline-nodes.svg (from the second) beside
this file. Needs the package perfetto (pip install perfetto).
"""
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median_low
from xml.sax.saxutils import escape

from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb

FONT = 'font-family="DejaVu Sans, Verdana, Helvetica, sans-serif"'
INK, PALE, GRID = "#24292f", "#6e7781", "#d8dee4"
COLOURS = {"step": "#8250df", "layer": "#0969da", "phase": "#bf8700", "attention": "#1a7f37", "output": "#57ab5a",
           "ffn": "#cf222e", "head": "#bc4c00", None: "#6e7781"}
ROW, LEFT, WIDTH = 22, 172, 1120


class Span:
    def __init__(self, track, name, category, arguments, start, depth):
        self.track, self.name, self.category, self.arguments = track, name, category, arguments
        self.start, self.end, self.depth = start, start, depth

    def colour(self):
        if self.category in ("step", "layer", "phase"):
            return COLOURS[self.category]
        return COLOURS.get(self.arguments.get("stage"), PALE)


class TraceFile:
    """Spans, counters and arrows of a trace file."""

    def __init__(self, path):
        trace = pb.Trace()
        trace.ParseFromString(Path(path).read_bytes())
        categories, names, keys, open_spans = {}, {}, {}, defaultdict(list)
        self.tracks, self.spans, self.counters = {}, [], defaultdict(list)
        starts, ends = {}, {}
        for packet in trace.packet:
            interned = packet.interned_data
            for table, entries in ((categories, interned.event_categories), (names, interned.event_names),
                                   (keys, interned.debug_annotation_names)):
                table.update((entry.iid, entry.name) for entry in entries)
            if packet.HasField("track_descriptor"):
                track = packet.track_descriptor
                self.tracks[track.uuid] = track.thread.thread_name or track.name or track.process.process_name
            if not packet.HasField("track_event"):
                continue
            event, at = packet.track_event, packet.timestamp
            track = self.tracks[event.track_uuid]
            starts.update((flow, (track, at)) for flow in event.flow_ids)
            ends.update((flow, (track, at)) for flow in event.terminating_flow_ids)
            stack = open_spans[track]
            if event.type == pb.TrackEvent.TYPE_SLICE_BEGIN:
                arguments = {keys[a.name_iid]: getattr(a, a.WhichOneof("value")) for a in event.debug_annotations}
                stack.append(Span(track, names[event.name_iid], categories[event.category_iids[0]], arguments, at,
                                  len(stack)))
            elif event.type == pb.TrackEvent.TYPE_SLICE_END:
                span = stack.pop()
                span.end = at
                self.spans.append(span)
            elif event.type == pb.TrackEvent.TYPE_COUNTER:
                self.counters[track].append((at, event.counter_value))
        self.arrows = [(starts[flow], ends[flow]) for flow in starts]

    def quickest_step(self):
        """The decoded token that was disturbed least, behind the first ones."""
        steps = [span for span in self.spans if span.name == "decode" and span.category == "step"][4:]
        return min(steps, key=lambda step: step.end - step.start)

    def within(self, start, end, tracks):
        return [span for span in self.spans if span.track in tracks and span.end > start and span.start < end]


class Picture:
    """A window of time; below one another tracks, each with a row for every depth."""

    def __init__(self, trace, start, end, tracks, counters=(), arrows=False):
        self.trace, self.start, self.end, self.parts = trace, start, end, []
        self.tops, y = {}, 34
        spans = trace.within(start, end, tracks)
        bottom = y
        for track in tracks:
            rows = 1 + max((span.depth for span in spans if span.track == track), default=0)
            self.tops[track] = y
            self.text(LEFT - 10, y + 15, track, anchor="end", size=12)
            y += rows * ROW + 12
            bottom = y - 8
        for counter in counters:
            self.counter(counter, y)
            y += 58
            bottom = y - 8
        self.height = y + 4
        ruler = self.ruler(bottom)
        for span in sorted(spans, key=lambda span: (span.depth, span.start)):
            self.span(span)
        self.parts = ruler + self.parts
        if arrows:
            for (track, at), (to, to_at) in trace.arrows:
                if track in self.tops and to in self.tops and start <= at and to_at <= end:
                    self.arrow(track, at, to, to_at)

    def x(self, at):
        return LEFT + (WIDTH - LEFT - 14) * (at - self.start) / (self.end - self.start)

    def text(self, x, y, text, size=11, colour=INK, anchor="start"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{colour}" text-anchor="{anchor}">'
                          f"{escape(text)}</text>")

    def ruler(self, bottom):
        length, parts = self.end - self.start, []
        unit = next(u * 10.0**n for n in range(3, 12) for u in (1, 2, 5) if length / (u * 10.0**n) <= 12)
        for n in range(int(length / unit) + 1):
            x = self.x(self.start + n * unit)
            value = f"{n * unit / 1e6:g} ms" if unit >= 1e5 else f"{n * unit / 1e3:g} µs"
            parts.append(f'<line x1="{x:.1f}" y1="24" x2="{x:.1f}" y2="{bottom}" stroke="{GRID}"/>')
            parts.append(f'<text x="{x:.1f}" y="18" font-size="11" fill="{PALE}" text-anchor="middle">{value}</text>')
        return parts

    def span(self, span):
        left, right = self.x(max(span.start, self.start)), self.x(min(span.end, self.end))
        y, width = self.tops[span.track] + span.depth * ROW, max(right - left, 0.7)
        self.parts.append(f'<rect x="{left:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 3}" fill="{span.colour()}" '
                          f'fill-opacity="0.82" stroke="#ffffff" stroke-width="0.4"/>')
        name = span.name
        for shorter in (name, name.split(" ", 2)[-1], name.removeprefix("layer ")):
            if len(shorter) * 6.6 + 6 < width:
                self.text((left + right) / 2, y + 14, shorter, 11, "#ffffff", "middle")
                break

    def counter(self, name, y):
        values = self.trace.counters[name]
        before = [value for at, value in values if at <= self.start]
        inside = [(at, value) for at, value in values if self.start <= at <= self.end]
        if before and (not inside or inside[0][0] > self.start):
            inside.insert(0, (self.start, before[-1]))
        most = max(value for _, value in inside) or 1
        self.text(LEFT - 10, y + 26, name, 12, anchor="end")
        self.text(LEFT - 10, y + 40, f"up to {most}", 10, PALE, "end")
        for (at, value), (until, _) in zip(inside, inside[1:] + [(self.end, 0)]):
            height = 44 * value / most
            self.parts.append(f'<rect x="{self.x(at):.2f}" y="{y + 48 - height:.1f}" fill="#0969da" fill-opacity="0.45" '
                              f'width="{max(self.x(until) - self.x(at), 0.4):.2f}" height="{height:.1f}"/>')

    def arrow(self, track, at, to, to_at):
        down = self.tops[to] > self.tops[track]
        y1 = self.tops[track] + (ROW - 3 if down else 0)
        y2 = self.tops[to] + (0 if down else ROW - 3)
        x1, x2 = self.x(at), self.x(to_at)
        self.parts.append(f'<path d="M{x1:.1f} {y1} C{x1:.1f} {(y1 + y2) / 2} {x2:.1f} {(y1 + y2) / 2} {x2:.1f} {y2}" '
                          f'fill="none" stroke="{INK}" stroke-width="1" marker-end="url(#head)"/>')

    def write(self, name, title):
        marker = ('<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="6" markerHeight="6" '
                  f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{INK}"/></marker>')
        body = "\n".join(self.parts)
        Path(__file__).with_name(name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" {FONT}>\n<title>{escape(title)}</title>\n{marker}\n'
            f'<rect width="{WIDTH}" height="{self.height}" fill="#ffffff"/>\n{body}\n</svg>\n')


def usual_layer(trace, step):
    """A layer of median length in the step, on node 0's thread."""
    layers = [span for span in trace.within(step.start, step.end, {step.track}) if span.name.startswith("layer ")]
    length = median_low(span.end - span.start for span in layers)
    return next(span for span in layers if span.end - span.start == length)


def main(one, two):
    trace = TraceFile(one)
    step = trace.quickest_step()
    actors = ["Pipeline", "DeviceLayer", "ColdLayer node 0"]
    Picture(trace, step.start, step.end, [step.track, *actors], ["active neurons by layer"]).write(
        "timeline-token.svg", "A whole decoded token: the executor's thread, and the actors that it runs")
    layer = usual_layer(trace, step)
    margin = (layer.end - layer.start) * 0.02
    Picture(trace, layer.start - margin, layer.end + margin, [step.track, *actors], arrows=True).write(
        "timeline-layer.svg", "One layer of a decoded token, with arrows from where messages are posted")
    trace = TraceFile(two)
    step = trace.quickest_step()
    layer = usual_layer(trace, step)
    margin = (layer.end - layer.start) * 0.02
    threads = sorted(track for track in trace.tracks.values() if track.startswith("pi-node"))
    Picture(trace, layer.start - margin, layer.end + margin, [*threads, *actors, "ColdLayer node 1"],
            arrows=True).write("timeline-nodes.svg", "One layer on two nodes: both threads, and the actors' messages")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
