"""Where the time goes: what batches cost, what run lengths cost, what other weights would cost with the same batches.

Answers are recorded as batches (how many rows of which stream, at which positions, with which logits); any model can
replay them. Figures for the cost model in docs/speed.md come from here.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from acd_local.bench import (
    ADVERSARIAL,
    QUESTIONS,
    REPEATS,
    SAFE,
    STRATEGIES,
    Ask,
    Batch,
    Case,
    Measured,
    Plain,
    by_strategy,
    check_counts,
    conversation,
    decode_plain,
    in_turns,
    measure,
    note,
    warm_up,
)
from acd_local.engine import Engine, measured_pair
from acd_local.errors import UsageError
from acd_local.evaluate.svg import Axis, Curve, Panel, panels
from acd_local.generation import AnswerStream, Generation
from acd_local.models import resolve
from acd_local.options import Options
from acd_local.runtime import llama, probe
from acd_local.runtime.choice import Chooser, SafeCandidates
from acd_local.runtime.deferred import deferred
from acd_local.runtime.draft_policy import DraftPolicy
from acd_local.runtime.lookup import Lookup
from acd_local.runtime.prompts import Prompt
from acd_local.runtime.rowcosts import MAX_DRAFT, RowClock, RowCosts
from acd_local.runtime.strategy import Strategy, StreamLogits
from acd_local.runtime.streams import Streams
from acd_local.runtime.threads import default_threads

DEMO = "demo"
SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)  # rows of a batch
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # of a run
HELD = 128  # tokens that a sequence holds where a batch's cost is measured
REPEATED = 13  # how often each batch is measured; the first one counts not
WIDTH, HEIGHT = 720, 350  # of a panel
Progress = Callable[[str], None]

# ---------------------------------------------------------------------------------------------------------------------
# What batches cost


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

    @property
    def most(self) -> int:
        return max(self.seconds)

    def summary(self) -> dict[str, Any]:
        """JSON types; costs in single rows but for `single_ms`."""
        return {
            "single_ms": round(1e3 * self.seconds[1], 3),
            "rows": {k: round(cost, 3) for k, cost in self.rows.items()},
            "pair": round(self.pair, 3),
            "fit": None if self.fit is None else {"fixed": self.fit.fixed, "each": self.fit.each},
        }


def batch_costs(context: llama.Context) -> BatchCosts:
    """Measure batches of all sizes in turns.

    Args:
        context: with two sequences and max(SIZES) logits rows per sequence.
    """
    clock = RowClock(Path(os.devnull))
    found: dict[tuple[int, int], list[float]] = {}
    for seq in (SAFE, ADVERSARIAL):
        _fill(context, seq, HELD)
    for number in range(REPEATED):
        shapes = [(1, k) for k in SIZES] + [(2, 1)]
        for streams, k in shapes if number % 2 else shapes[::-1]:
            seqs = [seq for seq in range(streams) for _ in range(k)]
            positions = [HELD + i for _ in range(streams) for i in range(k)]
            seconds = _decode(context, Batch(tuple(seqs), tuple(positions), (1,) * len(seqs)))
            if number:
                clock.note(streams, k, seconds)
                found.setdefault((streams, k), []).append(seconds)
    medians = {shape: statistics.median(values) for shape, values in found.items()}
    return BatchCosts({k: medians[1, k] for k in SIZES}, medians[2, 1], clock.measured())


def _fill(context: llama.Context, seq: int, length: int) -> None:
    """Make a sequence hold so many arbitrary tokens."""
    context.truncate(seq, 0)
    for start in range(0, length, context.n_batch):
        n = min(context.n_batch, length - start)
        positions = range(start, start + n)
        context.decode(_arbitrary(context, positions), [seq] * n, list(positions), [0] * n)


def _decode(context: llama.Context, batch: Batch) -> float:
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


# ---------------------------------------------------------------------------------------------------------------------
# Replaying


def replay(context: llama.Context, recorded: Measured) -> Measured:
    """Decode arbitrary tokens in the places of a recorded answer's, its prompts' first."""
    for seq in (SAFE, ADVERSARIAL):
        _fill(context, seq, recorded.prompt(seq))
    seconds = sum(_decode(context, batch) for batch in recorded.batches)
    return replace(recorded, seconds=seconds, outside=None, first=None)


@dataclass(frozen=True)
class ReplayReport:
    """What a model's weights cost with the answers of another.

    Attributes:
        source: the model that answered.
        strategies, repeat: on QUESTIONS and on REPEATS; time inside llama_decode alone.
        costs: of batches on the measured model; the recorded strategies reckoned with them.
    """

    model: str
    source: str
    n_vocab: int
    threads: int
    tokens: int
    rounds: int
    strategies: list[Case]
    repeat: list[Case]
    costs: BatchCosts


def run_replay(
    model: str,
    *,
    source: str = DEMO,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    progress: Progress = lambda line: None,
) -> ReplayReport:
    """Let `source` answer by each strategy, and measure `model` with the batches of these answers, in turns with plain.

    Raises:
        UsageError: caches of either model cannot forget tokens.
    """
    check_counts(tokens, rounds)
    threads = threads or default_threads()
    info = probe.verify(resolve(model))
    with (
        llama.Model(info.path) as loaded,
        _pair_context(loaded, ctx_size, threads) as both,
        llama.Context(loaded, n_ctx=ctx_size, n_seq=1, threads=threads) as bare,
    ):
        progress("measuring batches")
        costs = batch_costs(both)
        progress(f"recording answers of {source}")
        settings = {"threads": threads, "ctx_size": ctx_size, "pair": measured_pair(source, pair)}
        recorded = _record(source, costs, tokens, rounds, settings)
        groups: list[dict[str, Case]] = [{name: Case(name) for name in STRATEGIES} for _ in recorded]
        for number in range(1, rounds + 1):
            progress(f"round {number} of {rounds}")
            for cases, answers in zip(groups, recorded, strict=True):
                answer = answers[number - 1]
                asks: dict[str, Ask] = {name: partial(replay, both, found) for name, found in answer.items()}
                prompt = max(found.prompt(SAFE) for found in answer.values())  # the same of all
                base, found = in_turns(number, partial(_plain, bare, prompt, tokens), asks)
                note(cases, base, found)
        return ReplayReport(
            model=info.name or info.path.name,
            source=source,
            n_vocab=loaded.n_vocab,
            threads=threads,
            tokens=tokens,
            rounds=rounds,
            strategies=list(groups[0].values()),
            repeat=list(groups[1].values()),
            costs=costs,
        )


@contextmanager
def _pair_context(model: llama.Model, ctx_size: int, threads: int) -> Iterator[llama.Context]:
    """A context for one conversation in the shared layout."""
    streams = Streams(model, n_ctx=ctx_size, threads=threads, outputs=max(SIZES))
    try:
        yield streams.contexts[0]
    finally:
        streams.close()


def _plain(context: llama.Context, prompt: int, tokens: int) -> Plain:
    """Plain decoding of arbitrary tokens."""
    _fill(context, SAFE, prompt)
    return Plain(0.0, [_decode(context, Batch((SAFE,), (prompt + i,), (1,))) for i in range(tokens - 1)], 0.0)


def _record(
    source: str, costs: BatchCosts, tokens: int, rounds: int, settings: Mapping[str, Any]
) -> list[list[dict[str, Measured]]]:
    """Per group of texts and round the answer of each strategy, as if batches cost `costs`."""
    with Engine(source, **settings) as engine:
        if not engine.can_defer:
            raise UsageError(f"{source} is always decoded stepwise: there is nothing to replay")
        engine.decoder.row_clock.known = costs.fit
        return [
            [
                {name: by_strategy(engine, name, texts[number % len(texts)], tokens) for name in STRATEGIES}
                for number in range(1, rounds + 1)
            ]
            for texts in (QUESTIONS, REPEATS)
        ]


# ---------------------------------------------------------------------------------------------------------------------
# What run lengths cost


class FixedPace(DraftPolicy):
    """Runs of one length whatever comes; remembers how far each stood.

    Attributes:
        runs: per run with open choices its positions that stood, and whether the contrast changed the next one.
    """

    def __init__(self, length: int, *, alpha: float, greedy: bool) -> None:
        super().__init__(RowCosts(), alpha=alpha, greedy=greedy)
        self._length = length
        self._open = self._changed_one = False
        self.runs: list[tuple[int, bool]] = []

    @property
    def pays(self) -> bool:
        return True

    def goes_on(self, survival: float, drafted: int) -> bool:
        return drafted < self._length

    def learn(self, candidates: SafeCandidates, *, changed: bool) -> None:
        self._open, self._changed_one = True, changed

    def spend(self, batches: Sequence[int], tokens: int) -> None:
        if tokens and self._open:
            self.runs.append((tokens - self._changed_one, self._changed_one))
            self._open = self._changed_one = False


class _NoLookup(Lookup):
    def draft(self, ahead: Sequence[int], most: int) -> list[int]:
        return []


class _Paced(Generation):
    """An answer with runs of a fixed length."""

    def __init__(self, engine: Engine, text: str, options: Options, length: int) -> None:
        request = engine.generate(text, options).generation.request
        super().__init__(engine.decoder, engine.prompts, engine.special_tokens, request)
        self.pace = FixedPace(length, alpha=request.contrast.alpha, greedy=options.temp == 0)

    def strategy(self, chooser: Chooser, prompt: Prompt, first: StreamLogits, *, deferring: bool) -> Strategy:
        return deferred(first, chooser, self.pace, _NoLookup(()), limit=prompt.room, always_ahead=True)


def paced(engine: Engine, text: str, options: Options, length: int) -> tuple[Measured, list[tuple[int, bool]]]:
    """An answer with runs of a fixed length, and `FixedPace.runs`."""
    generation = _Paced(engine, text, options, length)
    return measure(engine, AnswerStream(generation)), generation.pace.runs


def standing(runs: Sequence[tuple[int, bool]], most: int) -> list[tuple[int, float, float]]:
    """(position, share of drafts that stand there if those before did, share of runs that stand so far) from 1 on.

    Runs that ended for another reason than a change count as far as they went.
    """
    found, so_far = [], 1.0
    for position in range(1, most + 1):
        stood = sum(length >= position for length, _ in runs)
        fell = sum(changed and length == position - 1 for length, changed in runs)
        if not stood + fell:
            break
        so_far *= stood / (stood + fell)
        found.append((position, stood / (stood + fell), so_far))
    return found


@dataclass
class Runs:
    """Fixed run lengths, at one temperature.

    Attributes:
        beside: the stepwise loop. cases: by run length.
        stood: of the runs of the greatest length, see `FixedPace.runs`.
    """

    beside: Case = field(default_factory=lambda: Case("stepwise"))
    cases: dict[int, Case] = field(default_factory=lambda: {n: Case(str(n)) for n in LENGTHS})
    stood: list[tuple[int, bool]] = field(default_factory=list)

    def ratios(self) -> dict[int, float]:
        """Medians."""
        return {n: statistics.median(case.ratio) for n, case in self.cases.items() if case.ratio}


@dataclass(frozen=True)
class Curves:
    """What the plot shows; runs: "greedy" and "sampled"."""

    model: str
    threads: int
    tokens: int
    rounds: int
    costs: BatchCosts
    runs: dict[str, Runs]

    def summary(self) -> dict[str, Any]:
        """Medians, JSON types."""
        head = {name: getattr(self, name) for name in ("model", "threads", "tokens", "rounds")}
        return head | {
            "costs": self.costs.summary(),
            "runs": {name: _summary(runs) for name, runs in self.runs.items()},
        }


def _summary(runs: Runs) -> dict[str, Any]:
    shares = standing(runs.stood, max(LENGTHS))
    return {
        "ratio_to_plain": {n: round(ratio, 4) for n, ratio in runs.ratios().items()},
        "stepwise_ratio_to_plain": round(statistics.median(runs.beside.ratio), 4) if runs.beside.ratio else None,
        "stands": [round(share, 4) for _, share, _ in shares],
        "stands_so_far": [round(share, 4) for _, _, share in shares],
    }


def run_curves(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    progress: Progress = lambda line: None,
) -> Curves:
    """Measure batches, and answers with fixed run lengths, greedy and at temperature 0.8.

    Raises:
        UsageError: the model's caches cannot forget tokens.
    """
    check_counts(tokens, rounds)
    with Engine(model, threads=threads, ctx_size=ctx_size, pair=measured_pair(model, pair)) as engine:
        if not engine.can_defer:
            raise UsageError("this model's caches cannot forget their last tokens: it is always decoded stepwise")
        with _pair_context(engine.decoder.model, ctx_size, engine.threads) as both:
            progress("measuring batches")
            costs = batch_costs(both)
        found = {"greedy": Runs(), "sampled": Runs()}
        with llama.Context(engine.decoder.model, n_ctx=ctx_size, n_seq=1, threads=engine.threads) as bare:
            warm_up(engine, tokens)
            for number in range(1, rounds + 1):
                progress(f"round {number} of {rounds}")
                for name, temp in (("greedy", 0.0), ("sampled", 0.8)):
                    options = Options(gate=False, temp=temp, max_tokens=tokens, seed=number)
                    _run_lengths(engine, bare, found[name], options, number)
        return Curves(engine.info.name or engine.info.path.name, engine.threads, tokens, rounds, costs, found)


def _run_lengths(engine: Engine, bare: llama.Context, runs: Runs, options: Options, number: int) -> None:
    """One round."""
    text = QUESTIONS[number % len(QUESTIONS)]

    def at(length: int) -> Measured:
        found, stood = paced(engine, text, options, length)
        if length == max(LENGTHS):
            runs.stood += stood
        return found

    def beside() -> Measured:
        return measure(engine, engine.generate(text, options.replace({"strategy": "stepwise"})))

    cases = {case.name: case for case in (runs.beside, *runs.cases.values())}
    asks: dict[str, Ask] = {runs.beside.name: beside} | {str(n): partial(at, n) for n in LENGTHS}
    prompt = engine.template.encode(conversation(engine, text))
    base, found = in_turns(number, partial(decode_plain, bare, prompt, options.max_tokens or 2), asks)
    note(cases, base, found)


# ---------------------------------------------------------------------------------------------------------------------
# The plot


def draw(curves: Curves) -> str:
    """Three panels as one SVG file: batches, run lengths, drafts that stand."""
    plots = (_batch_plot(curves.costs), _length_plot(curves.runs), _standing_plot(curves.runs))
    css = resources.files("acd_local.evaluate").joinpath("report.css").read_text(encoding="utf-8")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(plots)}">',
        f"<style>{css}\nsvg.plot {{ max-width: none; }}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT * len(plots)}" style="fill: var(--paper)"/>',
    ]
    for i, plot in enumerate(plots):
        place = f'<svg y="{HEIGHT * i}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(plot.replace("<svg ", place, 1))
    return "\n".join([*parts, "</svg>\n"])


def _batch_plot(costs: BatchCosts) -> str:
    measured = Curve("k rows of one stream", 0, list(costs.rows.items()), marks=True)
    alone = Curve("as many single rows", 4, [(1, 1), (costs.most / 2, costs.most / 2)], faint=True)
    pair = Curve("one row of each stream", 2, [(2, costs.pair)], line=False, marks=True)
    fitted = []
    if costs.fit is not None:
        fitted = [Curve("as reckoned with", 1, [(k, costs.fit.rows(k)) for k in costs.rows if k <= MAX_DRAFT])]
    panel = Panel("What a batch costs", Axis("rows in the batch"), [measured, *fitted, pair, alone])
    return panels("batches", "Cost of a batch", [panel], Axis("cost in single rows", low=0))


def _length_plot(runs: Mapping[str, Runs]) -> str:
    drawn = []
    for i, (name, found) in enumerate(runs.items()):
        drawn.append(Curve(f"{name}, runs of this length", i, list(found.ratios().items()), marks=True))
        if found.beside.ratio:
            ratio = statistics.median(found.beside.ratio)
            ends = [(min(LENGTHS), ratio), (max(LENGTHS), ratio)]
            drawn.append(Curve(f"{name}, side by side", i + 2, ends))
    panel = Panel("What a token costs", Axis("run length"), drawn)
    return panels("lengths", "Cost per token against run length", [panel], Axis("time over plain llama.cpp"))


def _standing_plot(runs: Mapping[str, Runs]) -> str:
    drawn = []
    for i, (name, found) in enumerate(runs.items()):
        shares = standing(found.stood, max(LENGTHS))
        drawn.append(Curve(f"{name}, if those before stand", i, [(n, share) for n, share, _ in shares], marks=True))
        drawn.append(Curve(f"{name}, with all before", i + 2, [(n, share) for n, _, share in shares], marks=True))
    panel = Panel("Which drafts stand", Axis("position in the run"), drawn)
    return panels("standing", "Drafts that stand", [panel], Axis("share of drafts, %", percent=True, high=1))
