#!/usr/bin/env python3
"""Draws overview.svg, token.svg and policies.svg beside this file: python3 docs/pictures.py"""
import random
from pathlib import Path
from xml.sax.saxutils import escape

FONT = 'font-family="DejaVu Sans, Verdana, Helvetica, sans-serif"'
INK, PALE, PIPE, DEVICE, NODES = "#24292f", "#6e7781", "#8250df", "#bc4c00", ["#0969da", "#1a7f37"]
CLOSED, OPEN = "#d8dee4", "#cf222e"


class Picture:
    def __init__(self, width, height):
        self.size, self.parts = (width, height), []

    def add(self, part):
        self.parts.append(part)

    def box(self, x, y, width, height, colour, fill="#ffffff", dash=""):
        self.add(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{colour}" '
                 f'stroke-width="1.5"{dash and " stroke-dasharray=" + chr(34) + dash + chr(34)}/>')

    def text(self, x, y, text, size=13, colour=INK, anchor="middle", bold=False):
        weight = ' font-weight="bold"' if bold else ""
        self.add(f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"{weight}>'
                 f"{escape(text)}</text>")

    def arrow(self, x1, y1, x2, y2, colour=INK):
        name = "a" + colour[1:]
        head = (f'<marker id="{name}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
                f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{colour}"/></marker>')
        if head not in self.parts:
            self.parts.insert(0, head)
        self.add(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5" '
                 f'marker-end="url(#{name})"/>')

    def write(self, name, title):
        width, height = self.size
        body = "\n".join(self.parts)
        Path(__file__).with_name(name).write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" {FONT}>\n<title>{escape(title)}</title>\n'
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{body}\n</svg>\n')


def overview():
    p = Picture(920, 470)
    p.box(20, 195, 130, 96, PIPE)
    p.text(85, 220, "Pipeline", 15, PIPE, bold=True)
    for n, line in enumerate(["tokens in,", "logits out,", "layer by layer"]):
        p.text(85, 242 + 17 * n, line, 12)
    p.box(190, 20, 710, 430, PALE, "#f6f8fa")
    p.text(206, 42, "every layer: one DeviceLayer, and one ColdLayer on each NUMA node", 13, PALE, "start")
    p.box(360, 60, 370, 62, DEVICE)
    p.text(545, 85, "DeviceLayer", 15, DEVICE, bold=True)
    p.text(545, 106, "residual stream and norms; joins what the nodes send", 12)
    p.arrow(85, 195, 355, 92, PIPE)
    p.text(158, 142, "RunLayer", 12, PIPE, "end")
    p.arrow(355, 112, 138, 193, PIPE)
    p.text(232, 168, "LayerDone", 12, PIPE, "start")
    rng = random.Random(7)
    for node, x in enumerate([210, 560]):
        colour, middle = NODES[node], x + 160
        p.box(x, 200, 320, 235, colour)
        p.text(middle, 224, f"ColdLayer on node {node}", 15, colour, bold=True)
        p.text(middle, 243, "pinned threads, weights in the node's memory", 11.5)
        p.box(x + 15, 256, 290, 26, PALE)
        p.text(middle, 273.5, "its heads with their cache, its rows of projections", 11.5)
        for i in range(24 * 8):
            open_gate = rng.random() < 0.11
            p.add(f'<circle cx="{x + 22 + i % 24 * 12}" cy="{306 + i // 24 * 12}" r="4" '
                  f'fill="{OPEN if open_gate else CLOSED}"/>')
        p.text(middle - 8, 422, "its neurons: gates of all, the rest of those that fire", 11.5)
        p.add(f'<circle cx="{middle + 147}" cy="418" r="4" fill="{OPEN}"/>')
        start = 545 + 110 * (2 * node - 1)
        p.arrow(start - 16, 124, middle - 16, 197, DEVICE)
        p.arrow(middle + 16, 198, start + 16, 125, colour)
        p.text((start + middle) / 2 - 28, 165, "x", 14, DEVICE, "end", True)
        p.text((start + middle) / 2 + 28, 165, "sums", 12, colour, "start")
    p.write("overview.svg", "Pipeline, DeviceLayer and the ColdLayers of two NUMA nodes, each with its neurons")


def token():
    lanes = [("Pipeline", "on node 0", PIPE), ("DeviceLayer l", "on node 0", DEVICE),
             ("ColdLayer l", "on node 0", NODES[0]), ("ColdLayer l", "on node 1", NODES[1])]
    at = [120, 340, 580, 820]
    steps = []  # built from top to bottom
    note = lambda lane, *lines: steps.append(("note", lane, lines))
    send = lambda start, ends, text: steps.append(("send", start, ends, text))
    frame = lambda text: steps.append(("frame", text))
    note(0, "feeder.next(): the token", "x = its embedding")
    frame("for each layer l")
    send(0, [1], "RunLayer")
    note(1, "normed = norm(x)")
    send(1, [2, 3], "Share: attention")
    note((2, 3), "own heads: q, k, v; k and v to the cache;", "attend to it; result to own columns of heads")
    send((2, 3), [1], "ShareDone")
    note(1, "attn = heads as activations")
    send(1, [2, 3], "Share: output")
    note((2, 3), "own rows of attn_output · attn", "to own columns of projected")
    send((2, 3), [1], "ShareDone")
    note(1, "x += projected", "normed = norm(x)")
    send(1, [2, 3], "Compute: all ids")
    note((2, 3), "own neurons: gate, skip closed ones, up, down", "to own partials")
    send((2, 3), [1], "Partial")
    note(1, "x += partials,", "joined along the fixed tree")
    send(1, [0], "LayerDone")
    frame(None)
    send(0, [1], "RunHead (last layer)")
    note(1, "normed = norm(x)")
    send(1, [2, 3], "Share: head")
    note((2, 3), "own rows of the head · normed", "to own columns of logits")
    send((2, 3), [1], "ShareDone")
    send(1, [0], "HeadDone")
    note(0, "feeder.logits(): sample, print")

    body, y, frames, top = Picture(960, 0), 88, [], None
    for step in steps:
        if step[0] == "frame":
            if step[1] is None:
                frames[-1] += (y - 6,)
                y += 12
            else:
                frames.append((step[1], y - 4))
                y += 24
        elif step[0] == "note":
            lane, lines = step[1], step[2]
            height = 12 + 15 * len(lines)
            first, last = (lane if isinstance(lane, tuple) else (lane, lane))
            width = 190 if first == last else at[last] - at[first] + 190
            middle = (at[first] + at[last]) / 2
            body.box(middle - width / 2, y, width, height, lanes[first][2] if first == last else PALE, "#fffdf5")
            for n, line in enumerate(lines):
                body.text(middle, y + 18 + 15 * n, line, 11.5)
            y += height + 12
        else:
            start, ends, text = step[1:]
            y += 12
            if isinstance(start, tuple):
                for lane in reversed(start):
                    body.arrow(at[lane], y, at[ends[0]] + 4, y, lanes[lane][2])
                body.text((at[ends[0]] + at[start[0]]) / 2, y - 5, text, 12, lanes[start[0]][2])
            else:
                for lane in reversed(ends):
                    direction = 4 if lane < start else -4
                    body.arrow(at[start], y, at[lane] + direction, y, lanes[start][2])
                body.text((at[start] + at[ends[0]]) / 2, y - 5, text, 12, lanes[start][2])
            y += 12
    height = y + 34
    p = Picture(960, height)
    for text, first, last in frames:
        p.box(8, first, 944, last - first, PALE, "#f6f8fa", "5 4")
        p.text(944, first + 18, text, 12, PALE, "end", True)
    for (name, where, colour), x in zip(lanes, at):
        p.add(f'<line x1="{x}" y1="60" x2="{x}" y2="{height - 14}" stroke="{colour}" stroke-width="1" '
              'stroke-dasharray="2 3"/>')
        p.box(x - 85, 14, 170, 46, colour)
        p.text(x, 34, name, 14, colour, bold=True)
        p.text(x, 51, where, 11.5, PALE)
    markers = [part for part in body.parts if part.startswith("<marker")]
    p.parts = markers + p.parts + [part for part in body.parts if not part.startswith("<marker")]
    p.write("token.svg", "One token's journey: messages between Pipeline, DeviceLayer and the ColdLayers of two nodes")


def policies():
    """Whose neurons lie where: a small square is an eighth of the cold neurons, coloured by the team that computes it."""
    half = [0] * 4 + [1] * 4
    names = [
        ("shard", "each node has the neurons that it computes", [half[:4], half[4:]], []),
        ("replicate", "pale: copies, which nobody reads", [half[:4], half[4:]], [half[4:], half[:4]]),
        ("interleave", "pages take turns: half of what a team reads is across", [half[::2], half[1::2]], []),
        ("single:0", "node 1's team has attention and head alone", [[0] * 8, []], []),
    ]
    p = Picture(920, 372)
    for n, (name, line, memory, copies) in enumerate(names):
        x, y = 20 + n % 2 * 450, 20 + n // 2 * 178
        p.text(x, y + 12, name, 15, bold=True, anchor="start")
        p.text(x + 95, y + 12, line, 11.5, PALE, "start")
        for node, colour in enumerate(NODES):
            left = x + node * 222
            p.box(left, y + 24, 208, 126, colour, "#f6f8fa")
            p.text(left + 10, y + 43, f"NUMA node {node}", 12, colour, "start", True)
            p.box(left + 10, y + 52, 188, 26, colour)
            kept = "its cache, half the heads, rows" if name == "interleave" else "its heads, cache, rows"
            p.text(left + 104, y + 69, kept, 10.5)
            squares = [(team, 1) for team in memory[node]]
            squares += [(team, 0.3) for team in (copies[node] if copies else [])]
            for i, (team, opacity) in enumerate(squares):
                p.add(f'<rect x="{left + 12 + 23 * i}" y="{y + 88}" width="19" height="19" rx="3" '
                      f'fill="{NODES[team]}" fill-opacity="{opacity}"/>')
            count = len(squares)
            p.text(left + 104, y + 130, f"{count} of 8 parts in memory", 11.5, PALE)
    p.write("policies.svg", "Where cold neurons lie with each policy, and which team computes them")


overview()
token()
policies()
