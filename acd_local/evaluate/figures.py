"""Describes the figures of the report pages: curves and bars with their intervals, in numbers.

Nothing is drawn here; `acd_local.evaluate.drawing` does that where matplotlib is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A value with its interval."""

    value: float
    low: float
    high: float


Value = float | Span


@dataclass(frozen=True)
class Axis:
    """label: with its unit; percent: values are shares, shown as %; low, high: ends that the axis may not pass."""

    label: str
    percent: bool = False
    low: float = -math.inf
    high: float = math.inf

    def show(self, value: Value | None) -> str:
        """Write the value in words, with its interval where it has one."""
        if value is None:
            return "not measured"
        if isinstance(value, Span):
            return f"{self.show(value.value)} ({self._number(value.low)} to {self._number(value.high)})"
        return self._number(value) + ("%" if self.percent else "")

    def _number(self, value: float) -> str:
        return (f"{100 * value + 0.0:.1f}" if self.percent else f"{value:.4g}").replace("-", "\u2212")


@dataclass(frozen=True)
class Curve:
    """Points in their order, joined by a line, marked, or both.

    Attributes:
        name: in the legend; an empty one stands in none.
        colour: index of its colour, dashes and shape.
        points: (x, y), each with an interval or without.
        labels: of marked points, one per point or none at all; empty ones are not shown.
        faint: what the others are to be seen against.
    """

    name: str
    colour: int
    points: Sequence[tuple[Value, Value]]
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


@dataclass(frozen=True)
class Plot:
    """Curves in one panel, or in several side by side.

    Attributes:
        key: a stable name.
        title: stands in the caption; more: what the caption says besides.
        shared: all panels have the same y axis; else each one has its own range of it.
        hint: words at the top right.
    """

    key: str
    title: str
    panels: Sequence[Panel]
    y: Axis
    more: str = ""
    shared: bool = True
    hint: str = ""


@dataclass(frozen=True)
class Series:
    """A group of bars or dots: one span per row, None where nothing was measured; its colour and shape."""

    name: str
    spans: Sequence[Span | None]
    colour: int


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars, or dots, with whiskers: one per row and series."""

    key: str
    title: str
    rows: Sequence[str]
    series: Sequence[Series]
    x: Axis
    more: str = ""
    dots: bool = False


Figure = Plot | BarChart
