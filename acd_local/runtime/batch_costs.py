"""Measures what batches cost on this machine, once per model and settings, and keeps that on disk.

Drafts are as long as they pay by this table. Nothing is measured while answers are made: the same request is decoded in
the same batches every time, and so gets the same text.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from acd_local import files
from acd_local.runtime import llama, machine

SIZES = (1, 2, 4, 8, 16)  # rows of each stream
ROUNDS = 4  # the fastest counts: whatever else the machine does only makes a batch slower
FOLLOWERS = 3  # on a GPU: single steps until a batch of several rows before them no longer slows them down
PATIENCE = (
    3.0  # seconds: then no larger batch is tried, and no further round begun; drafts are shorter on slow machines
)

SHAPES = tuple((streams, rows) for rows in SIZES for streams in (1, 2))
Decode = Callable[[int, int], object]  # (streams, rows of each) in one batch


@dataclass(frozen=True)
class BatchCosts:
    """The time that batches take, in units of one row of one stream.

    Attributes:
        seconds: of that row.
        one, two: of batches with SIZES rows of one stream, and with as many of each of two streams; without the last
            ones where measuring took too long.
        delays: of the single steps behind a batch of several rows, of one stream and of two.
    """

    seconds: float
    one: tuple[float, ...]
    two: tuple[float, ...]
    delays: tuple[float, float] = (0.0, 0.0)

    def table(self, streams: int) -> tuple[float, ...]:
        """List the costs of batches with 1, 2, 3 and so on rows of each of one or two streams."""
        costs = self.two if streams == 2 else self.one
        sizes = SIZES[: len(costs)]
        return tuple(float(c) for c in np.interp(range(1, sizes[-1] + 1), sizes, costs))


# Where nothing can be kept. Of Qwen2.5-Coder-0.5B-Instruct, Q4_K_M, on two cores.
TYPICAL = BatchCosts(0.02, (1.0, 1.6, 2.4, 4.2, 7.0), (1.6, 2.6, 4.4, 7.2, 13.0))


def measure(decode: Decode, shapes: Sequence[tuple[int, int]] = SHAPES, followers: int = 0) -> BatchCosts:
    """Time batches in turns.

    Args:
        decode: decodes one batch, and leaves the caches as they were.
        shapes: (streams, rows of each) of what is timed, the smaller ones first.
        followers: single steps behind each batch whose delay is timed. CUDA keeps the graph of a step that is repeated,
            and takes some steps to have it again.
    """
    decode(1, 1)
    found: dict[tuple[int, int], list[float]] = {}
    behind: dict[int, list[float]] = {1: [], 2: []}
    began = time.perf_counter()
    for number in range(ROUNDS):
        for streams, rows in shapes:
            if number == 0 and found and time.perf_counter() - began > PATIENCE:
                break
            if rows == 1:
                _timed(decode, streams, 1, followers)  # as among its kind
            found.setdefault((streams, rows), []).append(_timed(decode, streams, rows))
            if rows > 1 and followers:
                behind[streams].append(_timed(decode, streams, 1, followers))
        shapes = list(found)
        if time.perf_counter() - began > PATIENCE:
            break
    fastest = {shape: min(times) for shape, times in found.items()}
    one = fastest[1, 1]
    grown = [_growing([t / one for shape, t in fastest.items() if shape[0] == streams]) for streams in (1, 2)]
    late = [min(times) - followers * fastest[streams, 1] if times else 0.0 for streams, times in behind.items()]
    delays = [round(max(0.0, seconds) / one, 2) for seconds in late]
    return BatchCosts(round(one, 6), grown[0], grown[1], (delays[0], delays[1]))


def _growing(costs: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(float(c), 2) for c in np.maximum.accumulate(costs))


def _timed(decode: Decode, streams: int, rows: int, times: int = 1) -> float:
    started = time.perf_counter()
    for _ in range(times):
        decode(streams, rows)
    return time.perf_counter() - started


def followers() -> int:
    """Return how many steps `measure` has to look at behind each batch with this build of llama.cpp."""
    return FOLLOWERS if llama.supports_gpu_offload() else 0


def keep(name: Path, costs: BatchCosts) -> BatchCosts:
    """Keep the costs for later processes, and return those to be used: `TYPICAL` where the cache cannot be written."""
    if files.keep(name, json.dumps(asdict(costs))):
        return costs
    files.keep(name, json.dumps(asdict(TYPICAL)))  # in this process alone
    return TYPICAL


def kept(name: Path) -> BatchCosts | None:
    """Read what `keep` wrote; None: nothing, or nothing that makes sense."""
    try:
        read = json.loads(files.kept(name) or "")
        one, two = tuple(map(float, read["one"])), tuple(map(float, read["two"]))
        behind_one, behind_two = map(float, read["delays"])
        costs = BatchCosts(float(read["seconds"]), one, two, (behind_one, behind_two))
        good = all(0 < value < 1000 for value in (costs.seconds, *one, *two)) and 0 < len(one) <= len(SIZES) >= len(two)
        good = good and all(0 <= value < 1000 for value in costs.delays)
    except (ValueError, TypeError, LookupError):
        return None
    return costs if good else None


def file_for(model: Path, **settings: object) -> Path:
    """Return where a model's costs under `settings` are kept below the cache folder, by machine and llama.cpp."""
    here = {"machine": machine.identity(), "extra_buffers": machine.extra_buffers(), "cpus": os.cpu_count()}
    settings = {**settings, **here, "offload": llama.supports_gpu_offload()}
    with suppress(OSError):
        seen = model.stat()
        settings = {**settings, "size": seen.st_size, "changed": seen.st_mtime_ns}
    key = hashlib.sha256(
        json.dumps([str(model.absolute()), settings], sort_keys=True, default=str).encode()
    ).hexdigest()
    return Path("batchcosts", f"{key[:32]}.json")
