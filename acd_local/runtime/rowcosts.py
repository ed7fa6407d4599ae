"""Measures what rows cost on this machine while answers are decoded, and keeps it for the next process.

An engine that knows no figures yet decodes the beginning of its answers stepwise and the rest deferred, so that both
are seen. Figures that were read from disk do not change any more: the same answer gets the same batches.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from acd_local import files
from acd_local.runtime import llama, machine

SINGLES, BATCHES, RUNS = 12, 6, 24  # measurements that are enough
USUAL = 64  # as how many tokens' runs the expectation counts beside those that were seen
SMALL_BATCHES = range(2, 4)  # rows of batches that are no part of the line
KEPT = 200  # of a kind
MAX_AGE = 30 * 86400  # seconds; older figures are measured anew
MAX_DRAFT, MIN_DRAFT = 16, 4  # drafted tokens at most: so many, or what takes PATIENCE, but not fewer than MIN_DRAFT
PATIENCE = 0.4  # seconds that a reader waits for the next words


@dataclass(frozen=True)
class RowCosts:
    """The costs of decoding, in units of one row of one stream alone.

    Attributes:
        pair: a row of each stream together.
        fixed, each: a batch of k > 1 rows of one stream costs fixed + k * each,
        few: but one of 2, 3 and so on rows as much as this says; the commonest ones, and the farthest from the line.
        seconds: of one row.
        ahead: how much longer running ahead takes than its batches are reckoned to, beside the same of tokens that are
            decided side by side: what goes on between decodes, and what medians and a line leave out.
        typical: how many rows running ahead took over what `draft_policy.expected` says: models differ in how drafts
            fall.
    """

    pair: float = 1.9
    fixed: float = 0.9
    each: float = 0.4
    seconds: float = 0.02
    ahead: float = 1.03
    typical: float = 1.0
    few: tuple[float, ...] = ()

    def rows(self, k: float) -> float:
        """Return the cost of k rows of one stream in one batch."""
        if k < 2:
            return k
        at = int(k) - 2
        if at >= len(self.few):
            return self.fixed + k * self.each
        below, above = self.few[at], self.rows(at + 3) if k > at + 2 else 0.0
        return below + (k - at - 2) * (above - below)

    def catching_up(self, k: float) -> float:
        """Return the cost of k rows that are all known already: in one batch, or one by one."""
        return min(k, self.rows(k))

    @property
    def longest_run(self) -> int:
        """Tokens that may be drafted before the first of them is shown."""
        return min(MAX_DRAFT, max(MIN_DRAFT, int(PATIENCE / max(self.seconds, 1e-6))))


Expected = Callable[[RowCosts], float]


class _Run(NamedTuple):
    batches: tuple[int, ...]
    tokens: int
    seconds: float
    expected: Expected


class RowClock:
    """Collects what batches took.

    Args:
        path: where figures are kept, by `files.keep`; see `file_for`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seconds: dict[tuple[int, int], list[float]] = defaultdict(list)  # by (streams, rows of each)
        self._steps: list[float] = []
        self._runs: list[_Run] = []
        self._lock = threading.Lock()  # answers of several threads note and settle
        self.known = _read(path)

    def note(self, streams: int, rows: int, seconds: float) -> None:
        """Take in the time of a batch of `rows` rows of each of `streams` streams."""
        with self._lock:
            if self.known is None and len(self._seconds[streams, rows]) < KEPT:
                self._seconds[streams, rows].append(seconds)

    def note_step(self, seconds: float) -> None:
        """Take in the seconds of a token that was decided side by side, with all that it takes."""
        with self._lock:
            if self.known is None and len(self._steps) < KEPT:
                self._steps.append(seconds)

    def note_run(self, batches: Sequence[int], tokens: int, seconds: float, expected: Expected) -> None:
        """Take in the seconds of a run with batches of so many rows of one stream, with all that it takes.

        Args:
            tokens: that came out.
            expected: rows per token, by what rows cost.
        """
        with self._lock:
            if self.known is None and len(self._runs) < KEPT:
                self._runs.append(_Run(tuple(batches), tokens, seconds, expected))

    def settle(self) -> None:
        """Keep the figures if there are enough of them."""
        if self.known is None and (found := self.measured()) is not None:
            self.known = found
            files.keep(self._path, json.dumps(asdict(found)))

    def measured(self) -> RowCosts | None:
        with self._lock:
            return self._measured()

    def _measured(self) -> RowCosts | None:
        single, pair = self._seconds[1, 1], self._seconds[2, 1]
        longer = range(SMALL_BATCHES.stop, MAX_DRAFT + 1)
        batches = [(k, t) for (n, k), found in self._seconds.items() if n == 1 and k in longer for t in found]
        if len(single) < SINGLES or len(pair) < SINGLES or len(batches) < BATCHES or 0 < len(self._runs) < RUNS:
            return None
        one = statistics.median(single)
        medians = {k: statistics.median(t for j, t in batches if j == k) / one for k, _ in batches}
        fixed, each = _line(medians)
        costs = RowCosts(round(statistics.median(pair) / one, 2), round(fixed, 2), round(each, 2), round(one, 4))
        found = [self._seconds.get((1, k), []) for k in SMALL_BATCHES]
        if all(found):
            costs = replace(costs, few=tuple(round(statistics.median(seconds) / one, 2) for seconds in found))
        return self._with_runs(costs) if self._runs and len(self._steps) >= SINGLES else costs

    def _with_runs(self, costs: RowCosts) -> RowCosts:
        rows = sum(sum(map(costs.rows, run.batches)) for run in self._runs)
        beside = statistics.fmean(self._steps) / costs.pair
        ahead = sum(run.seconds for run in self._runs) / rows / beside
        expected = sum(run.tokens * run.expected(costs) for run in self._runs)
        usual = USUAL * expected / max(1, sum(run.tokens for run in self._runs))
        return replace(costs, ahead=round(ahead, 2), typical=round((rows + usual) / (expected + usual), 2))


def _line(costs: dict[int, float]) -> tuple[float, float]:
    """Fit `fixed` and `each` of fixed + k * each, with a rise as of RowCosts where all batches are of one size."""
    k, c = np.array(list(costs)), np.array(list(costs.values()))
    spread = float(((k - k.mean()) ** 2).sum())
    each = float(((k - k.mean()) * (c - c.mean())).sum()) / spread if spread > 0 else RowCosts.each
    each = min(1.0, max(0.02, each))
    return max(0.0, float((c - each * k).mean())), each


def file_for(model: Path, **settings: object) -> Path:
    """Return where figures of a model under `settings` are kept below the cache folder, by machine and llama.cpp."""
    here = {"machine": machine.identity(), "extra_buffers": machine.extra_buffers(), "cpus": os.cpu_count()}
    settings = {**settings, **here, "offload": llama.supports_gpu_offload()}
    with suppress(OSError):
        seen = model.stat()
        settings = {**settings, "size": seen.st_size, "changed": seen.st_mtime_ns}
    key = hashlib.sha256(
        json.dumps([str(model.absolute()), settings], sort_keys=True, default=str).encode()
    ).hexdigest()
    return Path("rowcosts", f"{key[:32]}.json")


def _read(path: Path) -> RowCosts | None:
    try:
        kept = json.loads(files.kept(path, max_age=MAX_AGE) or "")
        numbers = {field.name: float(kept[field.name]) for field in fields(RowCosts) if field.name != "few"}
        found = RowCosts(**numbers, few=tuple(map(float, kept["few"])))
    except (ValueError, TypeError, LookupError):
        return None
    return found if all(0 <= value < 100 for value in (*numbers.values(), *found.few)) else None
