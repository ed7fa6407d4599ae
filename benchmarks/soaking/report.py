"""Tells what came of a run: tables of what was asked and of the figures, and a line for every fault."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from soaking.figures import grown, growth
from soaking.soak import Settings, Soak

JUDGED = 600  # seconds from which on memory and threads may not grow: shorter runs still warm up
SPARE = {"handles": 0, "threads": min(32, (os.cpu_count() or 1) + 4)}  # asyncio starts its threads as they are needed
MOST_FAULTS = 50  # lines


def judge_figures(soak: Soak, seconds: float) -> list[str]:
    """What is wrong with a process's figures."""
    problems = grown(soak.samples, "handles")
    if seconds < JUDGED:
        return problems
    problems += grown(soak.samples, "threads", SPARE["threads"])
    times = [sample.seconds for sample in soak.samples]
    for name in ("rss", "private"):
        found = growth(times, [getattr(sample, name) for sample in soak.samples])
        if found is None:
            problems.append(f"{name}: too few samples")
        elif found.verdict != "flat":
            problems.append(f"{name}: {found}")
    return problems


def write(soaks: Sequence[Soak], settings: Settings, console: Console, lasted: float) -> bool:
    """Write the report; returns whether all is as it should be."""
    console.print(f"{shlex.join(sys.argv)}\n{cpu()}, {time.strftime('%d %B %Y')}, {lasted / 60:.1f} minutes\n")
    for soak in soaks:
        for problem in judge_figures(soak, lasted):
            soak.found.fault(None, problem)
        console.print(_requests(soak))
        console.print(_figures(soak))
        console.print(", ".join(f"{name}: {count}" for name, count in sorted(soak.found.seen.items())) + "\n")
    for soak in soaks:
        for fault in soak.found.faults[:MOST_FAULTS]:
            side = "--" + soak.name.partition(" ")[0]
            which = f"request {fault.number} ({fault.kind})" if fault.number is not None else "the process"
            again = f"; again: --seed {settings.seed} {side} --again {fault.number}" if fault.number is not None else ""
            console.print(f"FAULT {soak.name}, {which}: {fault.text}{again}", markup=False, soft_wrap=True)
        if (more := len(soak.found.faults) - MOST_FAULTS) > 0:
            console.print(f"FAULT {soak.name}: {more} more")
    faults = sum(len(soak.found.faults) for soak in soaks)
    console.print(f"{sum(soak.sent for soak in soaks)} requests, {faults} faults")
    return not faults


def _requests(soak: Soak) -> Table:
    table = Table("kind", "requests", "ended as", title=f"{soak.name}: {soak.sent} requests", title_justify="left")
    kinds: dict[str, Counter[str]] = {}
    for (kind, end), count in soak.found.ends.items():
        kinds.setdefault(kind, Counter())[end] += count
    for kind, ends in sorted(kinds.items(), key=lambda item: -item[1].total()):
        table.add_row(kind, str(ends.total()), ", ".join(f"{end} {count}" for end, count in ends.most_common()))
    return table


def _figures(soak: Soak) -> Table:
    table = Table("", "first", "at half", "last", "most", "last half")
    if not (samples := soak.samples):
        return table
    times = [sample.seconds for sample in samples]
    middle = samples[len(samples) // 2]
    for name in ("rss", "private"):
        values = [getattr(sample, name) for sample in samples]
        shown = [f"{value:.1f}" for value in (values[0], getattr(middle, name), values[-1], max(values))]
        table.add_row(f"{name}, MB", *shown, str(growth(times, values) or "too few samples"))
    rests = [sample for sample in samples if sample.rest] or samples[-1:]
    for name, spare in SPARE.items():
        values = [getattr(sample, name) for sample in rests]
        most = max(getattr(sample, name) for sample in samples)
        row = [str(value) for value in (values[0], values[len(values) // 2], values[-1], most)]
        table.add_row(f"{name} at rest", *row, ", ".join(grown(rests, name, spare)) or "no growth")
    return table


def cpu() -> str:
    """This machine's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores of {names[0] if names else 'an unknown processor'}"
