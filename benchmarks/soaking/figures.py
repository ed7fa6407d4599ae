"""Takes the figures of a process and its children, and judges how they went on over a run."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

BLOCKS = 12  # of the last half of a series, whose medians are taken for independent
LEAST_MB = 2.0  # growth that is never held against a process: pages come and go
LOUDEST_MB = 16.0  # with more noise than this nothing can be said of growth


@dataclass(frozen=True)
class Sample:
    """One look at a process and its children.

    Attributes:
        seconds: since the run began.
        rss, private: memory in MB (10^6 bytes): all that is resident, and what no other process shares.
        handles, threads: counts.
        rest: nothing was being answered.
    """

    seconds: float
    rss: float
    private: float
    handles: int
    threads: int
    rest: bool = False


def look(pid: int, seconds: float, *, rest: bool = False) -> Sample | None:
    """Take a sample; None: the process has ended."""
    rss = private = 0.0
    handles = threads = 0
    for one in _tree(pid):
        try:
            status = dict(line.split(":", 1) for line in Path(f"/proc/{one}/status").read_text().splitlines())
            rolled = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]
            held = len(os.listdir(f"/proc/{one}/fd"))  # noqa: PTH208
        except OSError:
            if one == pid:
                return None
            continue  # a child that has just ended
        sizes = [(line.partition(":")[0], int(line.split()[1]) * 1024 / 1e6) for line in rolled]
        rss += sum(size for name, size in sizes if name == "Rss")
        private += sum(size for name, size in sizes if name.startswith("Private_"))
        threads += int(status["Threads"])
        handles += held
    return Sample(seconds, rss, private, handles, threads, rest)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


@dataclass(frozen=True)
class Growth:
    """How a series went on over its last half, in its own unit.

    Attributes:
        grown: the fitted slope times the time. noise: three standard errors of that.
    """

    grown: float
    noise: float

    @property
    def verdict(self) -> str:
        """`flat`, `grows`, or `unclear`, where growth that matters would not be seen."""
        if self.noise > LOUDEST_MB:
            return "unclear"
        return "flat" if self.grown <= max(LEAST_MB, self.noise) else "grows"

    def __str__(self) -> str:
        return f"{self.grown:+.2f} MB in the last half, noise {self.noise:.2f} MB (3 standard errors): {self.verdict}"


def growth(times: Sequence[float], values: Sequence[float]) -> Growth | None:
    """Fit a line to the last half of a series; None: there are too few values.

    Neighbouring samples of memory are alike, so the line goes through the medians of BLOCKS blocks, and the
    standard error is taken from these. A median lets a peak of a few seconds pass.
    """
    if not times:
        return None
    begin = (times[0] + times[-1]) / 2
    half = [(t, v) for t, v in zip(times, values, strict=True) if t >= begin]
    if len(half) < 2 * BLOCKS:
        return None
    edges = [round(i * len(half) / BLOCKS) for i in range(BLOCKS + 1)]
    blocks = [half[a:b] for a, b in pairwise(edges)]
    x = [statistics.fmean(t for t, _ in block) for block in blocks]
    y = [statistics.median(v for _, v in block) for block in blocks]
    slope, intercept = statistics.linear_regression(x, y)
    left = sum((v - intercept - slope * t) ** 2 for t, v in zip(x, y, strict=True)) / (BLOCKS - 2)
    middle = statistics.fmean(x)
    error = (left / sum((t - middle) ** 2 for t in x)) ** 0.5
    lasted = half[-1][0] - half[0][0]
    return Growth(slope * lasted, 3 * error * lasted)


def grown(samples: Sequence[Sample], name: str, spare: int = 0) -> list[str]:
    """What is wrong with the handles or threads that are held at rest: more at the end than ever in the first half.

    `spare` more are no fault: a pool may still start what it is allowed to hold.
    """
    rests = [sample for sample in samples if sample.rest]
    if len(rests) < 2:
        return []
    early, last = rests[: len(rests) // 2], rests[-1]
    most, now = max(getattr(one, name) for one in early), getattr(last, name)
    return [f"{name} at rest went from {most} to {now}"] if now > most + spare else []
