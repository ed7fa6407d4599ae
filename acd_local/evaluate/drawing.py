"""Draws figures as SVG that stands in a page, with matplotlib (the extra "report").

The colours are the style sheet's, one set for light and one for dark; every series has a shape of its own besides, and
every figure a title and a description for screen readers. Whatever is written into a figure is plain text.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from importlib import resources
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.style import context
from numpy.typing import NDArray

from acd_local.evaluate.figures import Axis, BarChart, Curve, Figure, Plot, Span, Value
from acd_local.runtime.text import plain, shorten

SHAPES = "oDs^vP"
DASHES: Sequence[Any] = ("-", (0, (3.5, 1.5)), (0, (1, 1.5)), "-", "-", "-")
COLOURS = ("#0072b2", "#00795a", "#c84a00", "#a0478a", "#6b6b6b", "#8a6d00")
PAPER, INK, SOFT, RULE, FAINT = "#fffffe", "#1b1b1b", "#5d5d5d", "#8a8a8a", "#e4e4e4"
NAMES = ("s0", "s1", "s2", "s3", "s4", "s5", "paper", "ink", "soft", "rule", "faint")
VARIABLES = dict(zip((*COLOURS, PAPER, INK, SOFT, RULE, FAINT), NAMES, strict=True))
WIDTH = 720  # of all figures, points
CHARACTER, LINE = 6.4, 13.0  # mean width of a character of a label, and a label's height
LEAST_SHARE = 0.2  # that a percent axis shows
AROUND = np.array([(away, math.cos(a), math.sin(a)) for away in (9, 16, 26, 38, 52, 68, 86, 106, 130)
                   for a in np.arange(16) * math.pi / 8])  # fmt: skip


def draw(figure: Figure) -> Markup:
    """Draw the figure as an svg element."""
    style = resources.files("acd_local.evaluate").joinpath("templates/figures.mplstyle")
    with ExitStack() as stack:
        path = stack.enter_context(resources.as_file(style))
        stack.enter_context(context(["default", path, {"svg.hashsalt": figure.key}]))  # ids that no other figure has
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # a character that matplotlib's own font lacks is the browser's to draw
        drawing = _Drawing()
        drawing.plot(figure) if isinstance(figure, Plot) else drawing.bars(figure)
        return drawing.svg(figure)


class _Drawing:
    """A figure under way: its canvas, the texts that its marks show under the pointer, and the whole in words."""

    def __init__(self) -> None:
        self._canvas = Canvas(figsize=(WIDTH / 72, 1), layout="constrained")
        self._hovers: dict[str, Sequence[str]] = {}
        self._told: list[str] = []

    def plot(self, plot: Plot) -> None:
        self._canvas.set_figheight(5 if len(plot.panels) > 1 else 6)
        axes = self._canvas.subplots(1, max(1, len(plot.panels)), sharey=plot.shared, squeeze=False)[0]
        for ax, panel in zip(axes, plot.panels, strict=False):
            ax.set(title=shorten(panel.title, 44), xlabel=_text(panel.x.label))
            self._told += [panel.title] if panel.title else []
            for curve in sorted(panel.curves, key=lambda c: not c.faint):
                self._curve(ax, curve, panel.x, plot.y)
        for ax, panel in zip(axes, plot.panels, strict=False):
            _limit(ax, "x", panel.x)
            _limit(ax, "y", plot.y)
        axes[0].set_ylabel(_text(plot.y.label))
        self._legend([c for panel in plot.panels for c in panel.curves])
        if plot.hint:
            self._canvas.text(0.99, 0.99, _text(plot.hint), color=SOFT, style="italic", ha="right", va="top")
        self._canvas.draw_without_rendering()  # places the panels, and so the points
        for ax, panel in zip(axes, plot.panels, strict=False):
            _label(ax, [c for c in panel.curves if any(c.labels)])

    def bars(self, chart: BarChart) -> None:
        pitch, count = (9 if chart.dots else 11), len(chart.series)
        each = pitch * count + (13 if chart.dots and count < 2 else 9)
        self._canvas.set_figheight((90 + each * len(chart.rows)) / 72)
        ax = self._canvas.subplots()
        for i, series in enumerate(chart.series):
            told = [f"{r}, {series.name}: {chart.x.show(s)}" for r, s in zip(chart.rows, series.spans, strict=True)]
            self._told += told
            found = [r for r, span in enumerate(series.spans) if span]
            at, spans = [r + (i - (count - 1) / 2) * pitch / each for r in found], list(filter(None, series.spans))
            if not chart.dots:
                colour = COLOURS[series.colour % 6]
                ax.barh(at, _values(spans), height=9 / each, color=colour, alpha=0.45, linewidth=0)
            _whiskers(ax, spans, at, series.colour)
            self._marks(ax, spans, at, series.colour, [told[r] for r in found], 7 if chart.dots else 5.5)
        ax.set_yticks(range(len(chart.rows)), labels=[shorten(row, 36) for row in chart.rows])
        ax.set_yticks([r + 0.5 for r in range(len(chart.rows) - 1)], minor=True)
        ax.tick_params(axis="y", which="both", length=0)
        ax.grid(False, axis="y")
        ax.grid(chart.dots, axis="y", which="minor")
        ax.set(xlabel=_text(chart.x.label), ylim=(len(chart.rows) - 0.5, -0.5))
        _limit(ax, "x", chart.x)
        if ax.get_xlim()[0] < 0 < ax.get_xlim()[1]:
            ax.axvline(0, color=INK, linewidth=1, linestyle=(0, (3, 3)))
        self._legend([Curve(s.name, s.colour, (), line=False, marks=True) for s in chart.series])

    def _curve(self, ax: Axes, curve: Curve, x: Axis, y: Axis) -> None:
        xs, ys = [a for a, _ in curve.points], [b for _, b in curve.points]
        colour = COLOURS[curve.colour % 6]
        _whiskers(ax, xs, ys, curve.colour)
        if curve.line:
            width, dashes, alpha = (1, "-", 0.35) if curve.faint else (2, DASHES[curve.colour % 6], 1)
            ax.plot(_values(xs), _values(ys), color=colour, linewidth=width, linestyle=dashes, alpha=alpha)
            if all(isinstance(v, Span) for v in ys):
                lows, highs = ([getattr(v, end) for v in ys] for end in ("low", "high"))
                ax.fill_between(_values(xs), lows, highs, color=colour, alpha=0.1, linewidth=0)
        named = [f"{curve.name} {label}".strip() for label in curve.labels or [""] * len(xs)]
        hovers = [f"{n}: {y.show(b)} at {x.show(a)}" for n, (a, b) in zip(named, curve.points, strict=True)]
        if not curve.faint:
            self._told += hovers if curve.marks else [*hovers[:1], *hovers[-1:]]  # of a mere line, its ends
        if curve.marks:
            self._marks(ax, xs, ys, curve.colour, hovers, 5 if curve.faint else 8, curve.faint)

    def _marks(
        self,
        ax: Axes,
        xs: Sequence[Value],
        ys: Sequence[Value],
        colour: int,
        hovers: Sequence[str],
        size: float,
        faint: bool = False,
    ) -> None:
        key = f"marks-{len(self._hovers)}"
        self._hovers[key] = hovers
        style: dict[str, Any] = {"marker": SHAPES[colour % 6], "color": COLOURS[colour % 6], "markeredgecolor": PAPER}
        style |= {"zorder": 1.5, "alpha": 0.6} if faint else {"zorder": 4, "clip_on": False}
        ax.plot(_values(xs), _values(ys), linestyle="", markersize=size, gid=key, **style)

    def _legend(self, curves: Iterable[Curve]) -> None:
        named = {shorten(c.name, 40): _key(c) for c in curves if c.name}
        if named:
            columns = max(1, int(WIDTH / (CHARACTER * max(map(len, named)) + 44)))
            # A label that begins with an underscore would be left out.
            legend = self._canvas.legend(
                list(named.values()), [" "] * len(named), loc="outside upper left", ncols=columns
            )
            for text, name in zip(legend.get_texts(), named, strict=True):
                text.set_text(name)

    def svg(self, figure: Figure) -> Markup:
        """Write the drawing as part of a page: colours by name, nothing loaded, no id but those that are used."""
        file = io.StringIO()
        self._canvas.savefig(file, format="svg")
        root = ElementTree.fromstring(file.getvalue())
        root[:] = [node for node in root if node.tag.endswith("}g")]  # neither metadata nor style sheet
        used = set(re.findall(r"#(\w+)", file.getvalue()))
        for node in root.iter():
            attributes = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
            node.tag = node.tag.rpartition("}")[2]
            uses = [child for child in node.iter() if child.tag.endswith("use")]
            key = attributes.get("id", "")
            for use, hover in zip(uses, self._hovers.get(key, ()), strict=False):
                ElementTree.SubElement(use, "title").text = _text(hover)
            if key not in used:
                attributes.pop("id", None)
            if key.startswith("label"):
                attributes["class"] = "point"
            style = re.sub(r"font-family:[^;]*;? ?", "", attributes.get("style", ""))
            if style:
                named = re.sub("#[0-9a-f]{6}", lambda match: f"var(--{VARIABLES.get(match[0], 'ink')})", style)
                attributes["style"] = named
            node.attrib = attributes
        key = "fig-" + re.sub(r"[^A-Za-z0-9]", "-", figure.key)
        names = {"role": "img", "aria-labelledby": f"{key}-t {key}-d"}
        root.attrib = {"class": "plot", "viewBox": root.attrib["viewBox"], **names}
        axis = figure.y if isinstance(figure, Plot) else figure.x
        for place, (tag, words) in enumerate(
            (("title", figure.title), ("desc", f"{axis.label}. {'; '.join(self._told)}"))
        ):
            root.insert(place, ElementTree.Element(tag, id=f"{key}-{tag[0]}"))
            root[place].text = _text(words, 4000)
        return Markup(ElementTree.tostring(root, encoding="unicode"))


def _text(value: object, most: int = 200) -> str:
    """Make one line in which nothing hides and which XML can hold."""
    return re.sub("[\ufffe\uffff]", "\ufffd", plain(value, most))


def _values(values: Iterable[Value]) -> list[float]:
    return [v.value if isinstance(v, Span) else v for v in values]


def _whiskers(ax: Axes, xs: Sequence[Value], ys: Sequence[Value], colour: int) -> None:
    errors: dict[str, Any] = {}
    for key, values in (("xerr", xs), ("yerr", ys)):
        if any(isinstance(v, Span) for v in values):
            spans = [v if isinstance(v, Span) else Span(v, v, v) for v in values]
            errors[key] = np.maximum(0, [[s.value - s.low for s in spans], [s.high - s.value for s in spans]])
    if errors:
        style: dict[str, Any] = {"ecolor": COLOURS[colour % 6], "alpha": 0.5, "elinewidth": 1.2, "capsize": 3}
        ax.errorbar(_values(xs), _values(ys), fmt="none", **errors, **style)


def _key(curve: Curve) -> Line2D:
    """Draw what a legend shows of a curve."""
    colour = curve.colour % 6
    style: dict[str, Any] = {"linestyle": DASHES[colour] if curve.line else "", "linewidth": 2}
    style |= {"marker": SHAPES[colour] if curve.marks else "", "markeredgecolor": PAPER, "markersize": 8}
    return Line2D([], [], color=COLOURS[colour], **style)


def _limit(ax: Axes, name: str, axis: Axis) -> None:
    """Keep an axis ("x" or "y") within its ends, and a percent axis from showing a sliver."""
    shown = getattr(ax, f"{name}axis")
    low, high = shown.get_view_interval()
    if axis.percent:
        shown.set_major_formatter(lambda value, _: f"{100 * value:.4g}".replace("-", "\u2212"))
        grow = max(0.0, LEAST_SHARE - (high - low)) / 2
        low, high = low - grow, high + grow
        low, high = 0.0 if 0 < low < 0.1 else low, 1.0 if 0.9 < high < 1 else high  # ends that are near are shown
    ax.set(**{f"{name}lim": (max(low, axis.low), min(high, axis.high))})


# --- Labels that do not overlap ---------------------------------------------------------------------------------------


def _label(ax: Axes, curves: Sequence[Curve]) -> None:
    """Write labels beside their points, each where it hides the least of the marks and of the labels before it."""
    named = [(point, label, c.colour) for c in curves for point, label in zip(c.points, c.labels, strict=True)]
    places = [ax.transData.transform(_values(point)) for point, _, _ in named]
    taken = [(np.array([*(place - 6), *(place + 6)]), 8.0) for place in places]  # boxes, and what hiding them costs
    for place, (point, label, colour) in sorted(zip(places, named, strict=True), key=lambda n: (-n[0][1], n[0][0])):
        if not label:
            continue
        text = shorten(label, 30)
        away, across, up = AROUND.T
        width = CHARACTER * len(text)
        left, bottom = place[0] + away * across - width / 2 * (1 - across), place[1] + away * up - LINE / 2
        boxes = np.stack([left, bottom, left + width, bottom + LINE], axis=1)
        hidden = _overlaps(boxes, np.array([box for box, _ in taken])) @ [cost for _, cost in taken]
        outside = width * LINE - _overlaps(boxes, np.array([ax.get_window_extent().extents]))[:, 0]
        best = int(np.argmin(hidden + 50 * outside + away + 9 * abs(abs(up) - 0.7)))  # rather off the whiskers
        taken.append((boxes[best], 20.0))
        style: dict[str, Any] = {"color": COLOURS[colour % 6], "gid": f"label-{len(taken)}"}
        if away[best] > 20:
            style["arrowprops"] = {"arrowstyle": "-", "color": RULE, "linewidth": 0.75, "shrinkB": 4}
        x, y = _values(point)
        written = ax.annotate(text, (x, y), boxes[best, :2] - place + (0, 2), textcoords="offset points", **style)
        written.set_in_layout(False)


def _overlaps(boxes: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Measure the area that each box shares with each other one."""
    ends = np.minimum(boxes[:, None, 2:], others[None, :, 2:]) - np.maximum(boxes[:, None, :2], others[None, :, :2])
    return np.asarray(np.prod(np.maximum(ends, 0), axis=2))
