"""Measure what batches of arbitrary tokens cost: of every size, and of given shapes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from acd_local.bench.rounds import ADVERSARIAL, SAFE, BatchShape, in_turns
from acd_local.errors import UsageError
from acd_local.runtime import llama
from acd_local.runtime.rowcosts import RowClock, RowCosts
from acd_local.runtime.streams import Streams

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # rows of a batch
HELD = 128  # tokens that a sequence holds where a batch's cost is measured
REPEATED = 12  # how often each batch is measured


@dataclass(frozen=True)
class BatchCosts:
    """Median seconds of a batch of k rows of one stream, each with its logits, by k; and of one row of each stream."""

    seconds: Mapping[int, float]
    pair_seconds: float
    fit: RowCosts | None

    @property
    def rows(self) -> dict[int, float]:
        """The same in single rows."""
        return {k: seconds / self.seconds[1] for k, seconds in self.seconds.items()}

    @property
    def pair(self) -> float:
        return self.pair_seconds / self.seconds[1]

    def summary(self) -> dict[str, Any]:
        """JSON types; costs in single rows but for `single_ms`."""
        return {
            "single_ms": round(1e3 * self.seconds[1], 3),
            "rows": {k: round(cost, 3) for k, cost in self.rows.items()},
            "pair": round(self.pair, 3),
            "fit": None if self.fit is None else {"fixed": self.fit.fixed, "each": self.fit.each},
        }

    def lines(self) -> Iterator[str]:
        shown = ", ".join(f"{k}: {cost:.2f}" for k, cost in self.rows.items())
        yield f"a batch of k rows of one stream costs, in single rows of {1e3 * self.seconds[1]:.2f} ms: {shown}"
        yield f"one row of each stream: {self.pair:.2f}"


@contextmanager
def pair_context(model: llama.Model, ctx_size: int, threads: int) -> Iterator[llama.Context]:
    """A context for one conversation in the shared layout, max(SIZES) logits rows per sequence."""
    streams = Streams(model, n_ctx=ctx_size, threads=threads, outputs=max(SIZES))
    try:
        yield streams.contexts[0]
    finally:
        streams.close()


def batch_costs(context: llama.Context) -> BatchCosts:
    """Measure batches of all sizes in turns.

    Args:
        context: see `pair_context`.
    """
    for seq in (SAFE, ADVERSARIAL):
        fill(context, seq, HELD)

    def timed(streams: int, k: int, number: int) -> float:
        seqs = [seq for seq in range(streams) for _ in range(k)]
        positions = [HELD + i for _ in range(streams) for i in range(k)]
        return decode(context, BatchShape(tuple(seqs), tuple(positions), (1,) * len(seqs)))

    shapes = [*((1, k) for k in SIZES), (2, 1)]
    found = in_turns({shape: partial(timed, *shape) for shape in shapes}, REPEATED, warm_up=True)
    clock = RowClock(Path(os.devnull))
    for (streams, k), times in found.items():
        for seconds in times:
            clock.note(streams, k, seconds)
    medians = {shape: statistics.median(times) for shape, times in found.items()}
    return BatchCosts({k: medians[1, k] for k in SIZES}, medians[2, 1], clock.measured())


def fill(context: llama.Context, seq: int, length: int) -> None:
    """Make a sequence hold so many arbitrary tokens."""
    context.truncate(seq, 0)
    for start in range(0, length, context.n_batch):
        n = min(context.n_batch, length - start)
        positions = range(start, start + n)
        context.decode(_arbitrary(context, positions), [seq] * n, list(positions), [0] * n)


def decode(context: llama.Context, batch: BatchShape) -> float:
    """Decode arbitrary tokens in a batch's places; returns seconds, until its logits are there.

    Raises:
        UsageError: the model cannot forget tokens.
    """
    for seq in set(batch.seqs):
        if not context.truncate(seq, batch.start(seq)):
            raise UsageError("this model's caches cannot forget their last tokens: it is always decoded stepwise")
    tokens, outputs = _arbitrary(context, batch.positions), sum(batch.wanted)
    started = time.perf_counter()
    context.decode(tokens, batch.seqs, batch.positions, batch.wanted)
    if outputs:
        context.logits(outputs)
    return time.perf_counter() - started


def _arbitrary(context: llama.Context, positions: Sequence[int]) -> list[int]:
    """Token ids that follow from the positions; a mixture of experts is to meet many of them."""
    return [(7919 * p + 13) % context.model.n_vocab for p in positions]
