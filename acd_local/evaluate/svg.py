"""Figures as inline SVG: scatter plots, lines, bars and dots, all with intervals; and curves, side by side in panels.

Nothing but text comes out: colours are classes (s0 ... s5, in the report's style sheet, one set for light and one for
dark), every series has a shape of its own besides, and every figure a title and a description for screen readers.
Whatever is written into a figure is escaped here.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from acd_local.evaluate.tables import shorten, visible

__all__ = [
    "Axis",
    "Curve",
    "Panel",
    "Point",
    "Series",
    "Span",
    "bars",
    "dots",
    "lines",
    "nice_ticks",
    "panels",
    "place_labels",
    "scatter",
]

SHAPES = ("circle", "diamond", "square", "triangle", "down", "cross")
CHARACTER = 6.2  # mean width of a character of a label, pixels
RADIUS = 4.5


@dataclass(frozen=True)
class Span:
    """A value with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Axis:
    """label: with its unit; percent: values are shares, shown as %; low, high: ends that the axis may not pass."""

    label: str
    percent: bool = False
    low: float = -math.inf
    high: float = math.inf

    def show(self, value: float, step: float) -> str:
        if self.percent:
            value, step = 100 * value, 100 * step
        digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 0
        text = f"{value + 0.0:.{digits}f}"
        return ("0" if float(text) == 0 else text).replace("-", "\u2212")


@dataclass(frozen=True)
class Point:
    """A labelled point of a scatter plot; series: index of its colour and shape."""

    label: str
    x: Span
    y: Span
    series: int = 0


@dataclass(frozen=True)
class Series:
    """A line or a group of bars or dots: one span per place, None where nothing was measured; its colour and shape."""

    name: str
    spans: Sequence[Span | None]
    colour: int


@dataclass(frozen=True)
class Curve:
    """Points of its own, in their order, joined by a line, marked, or both.

    Attributes:
        name: in the legend; an empty one stands in none.
        points: (x, y).
        labels: of marked points, one per point or none at all; empty ones are not shown.
        faint: what the others are to be seen against.
    """

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    line: bool = True
    marks: bool = False
    labels: Sequence[str] = ()
    faint: bool = False


@dataclass(frozen=True)
class Panel:
    """One of the plots that stand side by side; its x axis, and its curves."""

    title: str
    x: Axis
    curves: Sequence[Curve]


# --- Scales -----------------------------------------------------------------------------------------------------------


def nice_ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round ticks that cover low ... high, in steps of 1, 2 or 5 times a power of ten."""
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = 0.0, 1.0
    if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
        low, high = low - 0.5 * max(0.1, abs(low)), high + 0.5 * max(0.1, abs(high))
    raw = (high - low) / max(1, most - 2)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Domain:
    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    def to(self, start: float, end: float) -> Callable[[float], float]:
        """From values to pixels."""
        return lambda value: start + (value - self.low) / (self.high - self.low) * (end - start)


def _domain(axis: Axis, spans: Sequence[Span | None], most: int = 8) -> _Domain:
    """What an axis shows of: all spans with a little room, within the axis' ends, never a sliver of a percent axis."""
    ends = [x for span in spans if span for x in (span.low, span.high)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = 0.04 * (high - low)
    low, high = low - room * (low != 0), high + room
    least = 0.2 if axis.percent else 1e-6 * max(1.0, abs(low), abs(high))
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    low, high = max(low, axis.low), min(high, axis.high)
    if axis.percent:  # ends that are near are shown
        low, high = 0.0 if 0 < low < 0.1 else low, 1.0 if 0.9 < high < 1 else high
    ticks = nice_ticks(low, high, most)
    slack = 1e-6 * (high - low)
    return _Domain(low, high, tuple(t for t in ticks if low - slack <= t <= high + slack), ticks[1] - ticks[0])


# --- Pieces -----------------------------------------------------------------------------------------------------------


def _text(value: object, most: int = 200) -> str:
    return html.escape(visible(" ".join(str(value).split()), most))


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _label(x: float, y: float, value: object, css: str = "", anchor: str = "start", most: int = 200) -> str:
    return f'<text class="{css}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{_text(value, most)}</text>'


def _mark(x: float, y: float, series: int, title: str = "", r: float = RADIUS) -> str:
    d, a = 1.3 * r, round(2 * r / 3, 1)
    path = {
        "circle": f"M{_n(x - r)} {_n(y)}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0",
        "diamond": f"M{_n(x)} {_n(y - d)}l{_n(d)} {_n(d)}l{_n(-d)} {_n(d)}l{_n(-d)} {_n(-d)}z",
        "square": f"M{_n(x - 0.9 * r)} {_n(y - 0.9 * r)}h{1.8 * r:.1f}v{1.8 * r:.1f}h{-1.8 * r:.1f}z",
        "triangle": f"M{_n(x)} {_n(y - 1.2 * r)}l{1.15 * r:.1f} {2 * r:.1f}h{-2.3 * r:.1f}z",
        "down": f"M{_n(x)} {_n(y + 1.2 * r)}l{1.15 * r:.1f} {-2 * r:.1f}h{-2.3 * r:.1f}z",
        "cross": f"M{_n(x - r)} {_n(y - r / 3)}h{a}v{-a}h{a}v{a}h{a}v{a}h{-a}v{a}h{-a}v{-a}h{-a}z",
    }[SHAPES[series % len(SHAPES)]]
    hover = f"<title>{_text(title)}</title>" if title else ""
    return f'<path class="mark s{series % len(SHAPES)}" d="{path}">{hover}</path>'


def _whisker(x1: float, y1: float, x2: float, y2: float, series: int, cap: float = 3) -> str:
    css = f"whisker s{series % len(SHAPES)}"
    if abs(x1 - x2) > abs(y1 - y2):
        ends = _line(x1, y1 - cap, x1, y1 + cap, css) + _line(x2, y2 - cap, x2, y2 + cap, css)
    else:
        ends = _line(x1 - cap, y1, x1 + cap, y1, css) + _line(x2 - cap, y2, x2 + cap, y2, css)
    return _line(x1, y1, x2, y2, css) + ends


def _figure(key: str, width: float, height: float, title: str, description: str, parts: Sequence[str]) -> str:
    name = "fig-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in key)
    return (
        f'<svg class="plot" viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-labelledby="{name}-t {name}-d">'
        f'<title id="{name}-t">{_text(title)}</title>'
        f'<desc id="{name}-d">{_text(description, 4000)}</desc>{"".join(parts)}</svg>'
    )


def _legend(names: Sequence[tuple[int, str]], x: float, y: float, right: float) -> tuple[list[str], float]:
    """Marks and names in rows from (x, y); returns the parts and the y below."""
    parts, at = [], x
    for series, name in names:
        shown = shorten(name, 40)
        width = 16 + CHARACTER * len(shown) + 16
        if at > x and at + width > right:
            at, y = x, y + 18
        parts += [_mark(at + 5, y - 4, series), _label(at + 14, y, shown, "legend")]
        at += width
    return parts, y + 14


def _describe(axis: Axis, span: Span | None) -> str:
    if span is None:
        return "not measured"
    unit = "%" if axis.percent else ""
    value, low, high = (axis.show(x, 0.001 if axis.percent else 0.01) for x in (span.value, span.low, span.high))
    return f"{value}{unit} ({low} to {high})"


def _axes(x: Axis, y: Axis, across: _Domain, up: _Domain, box: tuple[float, float, float, float]) -> list[str]:
    middle = (box[1] + box[3]) / 2
    turned = f'transform="translate(14 {_n(middle)}) rotate(-90)" text-anchor="middle"'
    name = f'<text class="name" {turned}>{_text(y.label)}</text>'
    return [*_x_axis(x, across, box), *_y_axis(y, up, box), name]


def _y_axis(y: Axis, up: _Domain, box: tuple[float, float, float, float]) -> list[str]:
    left, top, right, bottom = box
    to_y = up.to(bottom, top)
    parts = []
    for tick in up.ticks:
        parts.append(_line(left, to_y(tick), right, to_y(tick), "grid"))
        parts.append(_label(left - 8, to_y(tick) + 4, y.show(tick, up.step), "tick", "end"))
    return [*parts, _line(left, top, left, bottom, "axis")]


def _x_axis(x: Axis, across: _Domain, box: tuple[float, float, float, float]) -> list[str]:
    left, top, right, bottom = box
    to_x = across.to(left, right)
    parts = []
    for tick in across.ticks:
        parts.append(_line(to_x(tick), top, to_x(tick), bottom, "grid"))
        parts.append(_line(to_x(tick), bottom, to_x(tick), bottom + 4, "axis"))
        parts.append(_label(to_x(tick), bottom + 18, x.show(tick, across.step), "tick", "middle"))
    parts.append(_line(left, bottom, right, bottom, "axis"))
    parts.append(_label((left + right) / 2, bottom + 38, x.label, "name", "middle"))
    return parts


# --- Labels that do not overlap ---------------------------------------------------------------------------------------

Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def place_labels(
    points: Sequence[tuple[float, float]], widths: Sequence[float], frame: Box, lines: Sequence[Box] = ()
) -> list[Box]:
    """A box per label, near its point, inside the frame, away from other labels and points, and rather off the lines.

    Each label takes the cheapest of the places around its point, given the others'; a few rounds of that.
    """
    marks = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    options = [_candidates(x, y, width) for (x, y), width in zip(points, widths, strict=True)]
    chosen: list[Box | None] = [None] * len(points)
    for _ in range(4):
        for i in sorted(range(len(points)), key=lambda i: (points[i][1], points[i][0])):
            others = [box for j, box in enumerate(chosen) if j != i and box]

            def cost(option: tuple[Box, float], others: list[Box] = others) -> float:
                box, distance = option
                spread = (box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 1)
                outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
                hit = sum(_overlap(spread, other) for other in others)
                crossed = sum(_overlap(spread, line) for line in lines)
                return (
                    50 * outside + 20 * hit + 8 * sum(_overlap(spread, mark) for mark in marks) + crossed / 6 + distance
                )

            chosen[i] = min(options[i], key=cost)[0]
    return [box for box in chosen if box]


def _candidates(x: float, y: float, width: float, height: float = 12) -> list[tuple[Box, float]]:
    found = []
    for away in (9, 16, 26, 38, 52, 68, 86, 106, 130):
        for step in range(16):
            angle = math.pi * step / 8
            cx, cy = x + away * math.cos(angle), y + away * math.sin(angle)
            left = cx - width / 2 * (1 - math.cos(angle))
            box = (left, cy - height / 2, left + width, cy + height / 2)
            found.append((box, away + 2 * abs(math.sin(angle))))
    return found


# --- Figures ----------------------------------------------------------------------------------------------------------


def scatter(
    key: str, title: str, points: Sequence[Point], x: Axis, y: Axis, legend: Sequence[str], corner: str = ""
) -> str:
    """Points with whiskers both ways and a label each; legend: names of the series; corner: where better is."""
    width, height = 720.0, 500.0
    used = sorted({point.series for point in points})
    marks, top = _legend([(s, legend[s]) for s in used], 60, 16, width)
    box = (60.0, top + 4, width - 14, height - 48)
    across, up = _domain(x, [p.x for p in points]), _domain(y, [p.y for p in points])
    to_x, to_y = across.to(box[0], box[2]), up.to(box[3], box[1])
    parts = [*marks, *_axes(x, y, across, up, box)]
    if corner:
        parts.append(_label(width - 14, 16, f"better: {corner}", "hint", "end"))
    for p in points:
        parts.append(_whisker(to_x(p.x.low), to_y(p.y.value), to_x(p.x.high), to_y(p.y.value), p.series))
        parts.append(_whisker(to_x(p.x.value), to_y(p.y.low), to_x(p.x.value), to_y(p.y.high), p.series))
    places = [(to_x(p.x.value), to_y(p.y.value)) for p in points]
    whiskers = [(to_x(p.x.low), py - 1.5, to_x(p.x.high), py + 1.5) for p, (_, py) in zip(points, places, strict=True)]
    whiskers += [(px - 1.5, to_y(p.y.high), px + 1.5, to_y(p.y.low)) for p, (px, _) in zip(points, places, strict=True)]
    names = [shorten(p.label, 30) for p in points]
    labels = place_labels(places, [CHARACTER * len(name) for name in names], box, whiskers)
    for p, (px, py), name, label in zip(points, places, names, labels, strict=True):
        hover = f"{p.label}: {y.label} {_describe(y, p.y)}, {x.label} {_describe(x, p.x)}"
        near_x, near_y = min(max(px, label[0]), label[2]), min(max(py, label[1]), label[3])
        if math.hypot(near_x - px, near_y - py) > 14:
            parts.append(_line(px, py, near_x, near_y, "leader"))
        parts.append(_mark(px, py, p.series, hover))
        parts.append(_label(label[0], label[3] - 2.5, name, f"point s{p.series}"))
    said = "; ".join(f"{p.label}: {_describe(y, p.y)} at {_describe(x, p.x)}" for p in points)
    return _figure(key, width, height, title, f"{y.label} against {x.label}. {said}", parts)


def lines(key: str, title: str, values: Sequence[float], series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A line per series over numeric values, with bands and whiskers, each named at its right end."""
    right = 24 + CHARACTER * max((len(shorten(s.name, 24)) for s in series), default=0)
    width, height = 720.0, 400.0
    box = (60.0, 14.0, width - right, height - 48)
    across = _domain(x, [Span(v, v, v) for v in values])
    up = _domain(y, [span for s in series for span in s.spans])
    room = 0.02 * (across.high - across.low)
    across = replace(across, low=across.low - room, high=across.high + room)  # marks off the edges
    to_x, to_y = across.to(box[0], box[2]), up.to(box[3], box[1])
    parts = _axes(x, y, across, up, box)
    ends: list[tuple[float, int, str]] = []
    for s in series:
        i = s.colour
        known = [(to_x(v), span, v) for v, span in zip(values, s.spans, strict=True) if span]
        if not known:
            continue
        around = [(px, to_y(span.high)) for px, span, _ in known] + [
            (px, to_y(span.low)) for px, span, _ in known[::-1]
        ]
        parts.append(f'<polygon class="band s{i % 6}" points="{" ".join(f"{_n(a)},{_n(b)}" for a, b in around)}"/>')
        path = " ".join(f"{_n(px)},{_n(to_y(span.value))}" for px, span, _ in known)
        parts.append(f'<polyline class="line s{i % 6}" points="{path}"/>')
        for px, span, v in known:
            hover = f"{s.name} at {v:g}: {_describe(y, span)}"
            parts += [_whisker(px, to_y(span.low), px, to_y(span.high), i), _mark(px, to_y(span.value), i, hover)]
        ends.append((to_y(known[-1][1].value), i, s.name))
    at = -math.inf
    for want, i, name in sorted(ends):
        at = max(want, at + 15)
        parts.append(_label(box[2] + 12, at + 4, shorten(name, 24), f"point s{i % 6}"))
    said = "; ".join(
        f"{s.name}: " + ", ".join(f"{v:g}: {_describe(y, span)}" for v, span in zip(values, s.spans, strict=True))
        for s in series
    )
    return _figure(key, width, height, title, f"{y.label} against {x.label}. {said}", parts)


def panels(
    key: str, title: str, plots: Sequence[Panel], y: Axis, *, shared: bool = True, legend: bool = True, hint: str = ""
) -> str:
    """Curves with x values of their own, in one plot or several side by side.

    Args:
        shared: all plots have the same y axis; else each one has its own range of it.
        hint: words at the top right.
    """
    width, height, left, gap = 720.0, 350.0, 60.0, 58.0
    marks, top = _curve_legend(plots, left, width - CHARACTER * len(hint) - 20) if legend else ([], 14.0)
    parts = [*marks, *([_label(width - 14, 16, hint, "hint", "end")] if hint else [])]
    each = (width - 14 - left - gap * (len(plots) - 1)) / max(1, len(plots))
    heights = [[Span(b, b, b) for c in p.curves for _, b in c.points] for p in plots]
    every = [span for part in heights for span in part]
    told = []
    for i, plot in enumerate(plots):
        start = left + i * (each + gap)
        box = (start, top + 12, start + each, height - 48)
        across = _domain(plot.x, [Span(a, a, a) for c in plot.curves for a, _ in c.points], 8 if len(plots) == 1 else 6)
        room = 0.02 * (across.high - across.low)
        across = replace(across, low=across.low - room, high=across.high + room)  # marks off the edges
        up = _domain(y, every if shared else heights[i])
        parts += _axes(plot.x, y, across, up, box) if i == 0 else [*_x_axis(plot.x, across, box), *_y_axis(y, up, box)]
        parts.append(_label((box[0] + box[2]) / 2, top + 2, shorten(plot.title, 44), "name", "middle"))
        parts += _curves(plot, y, across, up, box)
        told.append(f"{plot.title}: " + "; ".join(_told(c, plot.x, y) for c in plot.curves if c.name and c.points))
    return _figure(key, width, height, title, f"{y.label}. {'. '.join(told)}", parts)


def _curve_legend(plots: Sequence[Panel], x: float, right: float) -> tuple[list[str], float]:
    """The lines and marks of the named curves, each once, in rows from the top."""
    named = {c.name: c for plot in plots for c in plot.curves if c.name}
    parts, at, y = [], x, 16.0
    for name, curve in named.items():
        shown = shorten(name, 40)
        wide = 26 + CHARACTER * len(shown) + 18
        if at > x and at + wide > right:
            at, y = x, y + 18
        css = f"s{curve.colour % 6}"
        parts += [_line(at, y - 4, at + 22, y - 4, f"line {css}")] if curve.line else []
        parts += [_mark(at + 11, y - 4, curve.colour, r=3.6)] if curve.marks else []
        parts.append(_label(at + 28, y, shown, "legend"))
        at += wide
    return parts, y + 20


def _curves(plot: Panel, y: Axis, across: _Domain, up: _Domain, box: Box) -> list[str]:
    to_x, to_y = across.to(box[0], box[2]), up.to(box[3], box[1])
    parts: list[str] = []
    named: list[tuple[float, float, str, int]] = []
    taken: list[Box] = []
    for curve in sorted(plot.curves, key=lambda c: not c.faint):
        places = [(to_x(a), to_y(b)) for a, b in curve.points]
        drawn = []
        if curve.line and places:
            path = " ".join(f"{_n(px)},{_n(py)}" for px, py in places)
            drawn.append(f'<polyline class="line s{curve.colour % 6}" points="{path}"/>')
        labels = curve.labels or [""] * len(places)
        for (px, py), (a, b), label in zip(places, curve.points, labels, strict=True):
            if curve.marks:
                hover = f"{curve.name} {label}: {_value(y, b)}, {plot.x.label} {_value(plot.x, a)}" if label else ""
                drawn.append(_mark(px, py, curve.colour, hover, 2.6 if curve.faint else 3.6))
            if label:
                named.append((px, py, label, curve.colour))
        if curve.labels:
            taken += [box for a, b in itertools.pairwise(places) for box in _along(a, b)]
        parts += ['<g class="faint">', *drawn, "</g>"] if curve.faint else drawn
    shown = [shorten(label, 30) for _, _, label, _ in named]
    labels_at = place_labels([(a, b) for a, b, _, _ in named], [CHARACTER * len(t) for t in shown], box, taken)
    for (px, py, _, colour), text, at in zip(named, shown, labels_at, strict=True):
        near_x, near_y = min(max(px, at[0]), at[2]), min(max(py, at[1]), at[3])
        if math.hypot(near_x - px, near_y - py) > 14:
            parts.append(_line(px, py, near_x, near_y, "leader"))
        parts.append(_label(at[0], at[3] - 2.5, text, f"point s{colour % 6}"))
    return parts


def _along(a: tuple[float, float], b: tuple[float, float]) -> list[Box]:
    """Small boxes along a line, for labels to keep off."""
    n = 1 + int(math.dist(a, b) / 8)
    spots = [(a[0] + (b[0] - a[0]) * i / n, a[1] + (b[1] - a[1]) * i / n) for i in range(n + 1)]
    return [(px - 2, py - 2, px + 2, py + 2) for px, py in spots]


def _value(axis: Axis, value: float) -> str:
    return f"{100 * value:.1f}%" if axis.percent else f"{value:.4g}"


def _told(curve: Curve, x: Axis, y: Axis) -> str:
    """A curve in words: its named points, or where it starts and ends."""
    if any(curve.labels):
        pairs = zip(curve.labels, curve.points, strict=True)
        return f"{curve.name}: " + ", ".join(f"{t}: {_value(y, b)} at {_value(x, a)}" for t, (a, b) in pairs if t)
    (a, b), (c, d) = curve.points[0], curve.points[-1]
    return f"{curve.name}: {_value(y, b)} at {_value(x, a)}, {_value(y, d)} at {_value(x, c)}"


def bars(key: str, title: str, rows: Sequence[str], series: Sequence[Series], x: Axis) -> str:
    """Horizontal bars with whiskers, grouped by row, one bar per series."""
    return _grouped(key, title, rows, series, x, filled=True)


def dots(key: str, title: str, rows: Sequence[str], series: Sequence[Series], x: Axis) -> str:
    """Dots with whiskers on one line per row, one mark per series, and a line at 0 where the axis passes it."""
    return _grouped(key, title, rows, series, x, filled=False)


def _grouped(key: str, title: str, rows: Sequence[str], series: Sequence[Series], x: Axis, *, filled: bool) -> str:
    names = [shorten(row, 36) for row in rows]
    width, left = 720.0, 16 + min(250.0, CHARACTER * max(map(len, names), default=1))
    legend, top = _legend([(s.colour, s.name) for s in series], left, 16, width)
    pitch = 11.0 if filled else 9.0
    each = pitch * len(series) + (9 if filled or len(series) > 1 else 13)
    box = (left, top + 2, width - 16, top + 2 + each * len(rows))
    spans = [span for s in series for span in s.spans]
    across = _domain(x, [*spans, Span(0, 0, 0)] if filled else spans, 11)
    to_x = across.to(box[0], box[2])
    parts = [*legend, *_x_axis(x, across, box), _line(left, box[1], left, box[3], "axis")]
    if across.low < 0 < across.high:
        parts.append(_line(to_x(0), box[1], to_x(0), box[3], "zero"))
    for r, name in enumerate(names):
        start = box[1] + r * each
        if r and not filled:
            parts.append(_line(left, start, box[2], start, "grid"))
        parts.append(_label(left - 8, start + each / 2 + 4, name, "tick", "end"))
        for i, s in enumerate(series):
            span, middle = s.spans[r], start + (each - pitch * len(series)) / 2 + pitch * (i + 0.5)
            if span is None:
                continue
            hover = f"{rows[r]}, {s.name}: {_describe(x, span)}"
            if filled:
                ends = sorted((to_x(max(0.0, across.low)), to_x(span.value)))
                parts.append(
                    f'<rect class="bar s{s.colour % 6}" x="{_n(ends[0])}" y="{_n(middle - 4.5)}" height="9" '
                    f'width="{_n(ends[1] - ends[0])}"><title>{_text(hover)}</title></rect>'
                )
            parts.append(_whisker(to_x(span.low), middle, to_x(span.high), middle, s.colour, cap=2.5))
            parts.append(_mark(to_x(span.value), middle, s.colour, hover, 3.2 if filled else 4.0))
    said = "; ".join(
        f"{row}: " + ", ".join(f"{s.name} {_describe(x, s.spans[r])}" for s in series) for r, row in enumerate(rows)
    )
    return _figure(key, width, box[3] + 50, title, f"{x.label}. {said}", parts)
