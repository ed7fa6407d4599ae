"""Tells how far an evaluation, a fit or an optimization is, and stops it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from acd_local.runtime.cancel import CancelToken


class Stopped(Exception):
    """The run was asked to stop: whatever takes a `stop` raises this where it is set. What was finished is on disk."""


def check_stop(stop: CancelToken | None) -> None:
    if stop is not None and stop.is_set:
        raise Stopped


@dataclass(frozen=True)
class Progress:
    """A phase, and how far it is.

    Attributes:
        phase: its name.
        done, total: steps of this phase, counting what earlier runs did; total 0: nothing to count.
        per_minute: steps per minute since this phase went on; 0 before the first.
        seconds_left: of this phase, at this rate; None before the first.
        note: what else to show.
    """

    phase: str
    done: int
    total: int
    per_minute: float
    seconds_left: float | None
    note: str = ""


@dataclass(frozen=True)
class Listener:
    """Who is told: `progress` often, `line` when something is done or decided."""

    progress: Callable[[Progress], None] = lambda progress: None
    line: Callable[[str], None] = lambda line: None

    def phase(self, name: str) -> None:
        """Tell that something began whose steps are not counted."""
        self.progress(Progress(name, 0, 0, 0.0, None))


class Clock:
    """Counts the steps of a phase and reports rate and time left; says nothing of a phase without steps."""

    def __init__(self, phase: str, done: int, total: int, listener: Listener) -> None:
        self._phase, self._before, self._done, self._total = phase, done, done, total
        self._report = listener.progress
        self._started = time.monotonic()
        if total:
            self._report(Progress(phase, done, total, 0.0, None))

    def tick(self) -> None:
        self.at(self._done + 1)

    def at(self, done: int, note: str = "") -> None:
        self._done = done
        seconds = max(1e-9, time.monotonic() - self._started)
        rate = max(1e-9, done - self._before) / seconds
        left = (self._total - done) / rate if done > self._before else None
        self._report(Progress(self._phase, done, self._total, 60 * rate, left, note))


def seconds_of(work: Callable[[], object]) -> float:
    """Time a piece of work."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def duration(seconds: float) -> str:
    """Write a duration: 42 s, 12 min, 1 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
