"""Drive worker and server for a long time with all that clients do, and check every answer, memory and handles.

Each side has two processes: one that makes three answers at once, and one that makes one at a time, with drafts and
--cache. It is made to believe that the further rows of a batch cost little, so that drafts are made all the time.

What is checked: exactly one end for every request, the end that it should have; deltas that are the text; traces and
counts that fit; no mark of another request in an answer; no word on stderr, no status 500, no end of a process before
its time. Memory may not grow over the last half of a run of ten minutes or more: a line is fitted through the medians
of 12 blocks of samples, and may rise by no more than 2 MB or three standard errors. Handles (and threads in such runs)
at rest, looked at between rounds, may not be more at the end than in the first half, but for the threads that asyncio
starts as it needs them.

Needs Linux (/proc). Every request follows from --seed and its number; --again N sends that one alone.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from rich.console import Console
from soaking import report
from soaking.load import Pairs
from soaking.server import ServerSoak
from soaking.soak import ROOT, Settings, Soak, run_all
from soaking.worker import WorkerSoak

FURTHER_ROW = 0.3  # of a row: what a further row of a batch is said to cost
DRAFTED_ROW = 0.05  # the same of the model that drafts


def pretend_cheap_batches(cache: Path) -> None:
    """Change what was measured, so that drafts of some tokens pay all the time."""
    for file in (cache / "batchcosts").glob("*.json"):
        costs = json.loads(file.read_text())
        if costs["two"]:
            costs["one"] = costs["two"] = [1 + FURTHER_ROW * (2**i - 1) for i in range(len(costs["one"]))]
        else:
            costs["seconds"] *= DRAFTED_ROW
        file.write_text(json.dumps(costs))


def measure_batches(soak: Soak) -> None:
    """Start the process' engine once, so that the costs are there."""
    code = "from acd_local.cli.run import main; main()"
    subprocess.run(
        [sys.executable, "-c", code, *Soak.options(soak), "--jsonl"],  # the same settings, for worker and server
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )


def soaks_of(settings: Settings, *, worker: bool, server: bool) -> list[Soak]:
    sides = [("worker", WorkerSoak)] * worker + [("server", ServerSoak)] * server
    kinds = (("together", 3), ("drafts", 1))
    return [make(settings, f"{side} {kind}", many) for side, make in sides for kind, many in kinds]


@click.command(help=__doc__, context_settings={"max_content_width": 120})
@click.argument("model")
@click.option("--minutes", type=click.FloatRange(0.01), default=60.0, show_default=True)
@click.option("--worker", is_flag=True, help="The worker alone.")
@click.option("--server", is_flag=True, help="The server alone.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of each process.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--draft", metavar="MODEL", help="Drafts for MODEL; default: MODEL itself.")
@click.option("--again", type=int, metavar="N", help="Send request N alone.")
def main(model: str, minutes: float, worker: bool, server: bool, draft: str | None, **given: int) -> None:
    settings = Settings(model, draft or model, pairs=Pairs.of(model), seconds=60 * minutes, **given)
    both = worker == server
    soaks = soaks_of(settings, worker=worker or both, server=server or both)
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"ACD_CACHE_DIR": f"{place}/cache", "XDG_CONFIG_HOME": f"{place}/config"}
        measure_batches(next(soak for soak in soaks if soak.together == 1))
        pretend_cheap_batches(Path(place, "cache"))
        began = time.monotonic()
        interrupted = asyncio.run(run_all(soaks))
        good = report.write(soaks, settings, Console(width=160), time.monotonic() - began)
    sys.exit(130 if interrupted else 0 if good else 1)


if __name__ == "__main__":
    main()
