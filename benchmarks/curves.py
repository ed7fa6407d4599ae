"""Measure what batches and run lengths cost, and which drafts stand: the figures of the cost model in docs/speed.md.

    python benchmarks/curves.py MODEL [--plot FILE.svg] [--pair NAME|FILE] [--tokens 64] [--rounds 5] [--json]

Answers are made with runs of one length whatever comes, greedy and at temperature 0.8, in turns with the stepwise loop
and with plain decoding. The plot shows batches, run lengths, and the share of drafts that stand.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import script
from batches import BatchCosts, batch_costs, pair_context

from acd_local import files
from acd_local.bench.measuring import PLAIN, bare_context, decode_plain, measure, plain_prompt, warm_up
from acd_local.bench.questions import text_of
from acd_local.bench.rounds import Case, Measured, Progress, Way, cases_of, check_counts, in_turns, median
from acd_local.cli.shell import one_line
from acd_local.engine import Engine, pair_to_measure
from acd_local.errors import UsageError
from acd_local.evaluate.drawing import draw as as_svg
from acd_local.evaluate.figures import Axis, Curve, Panel, Plot
from acd_local.generation import AnswerStream, Generation
from acd_local.options import Options
from acd_local.runtime.choice import Chooser, SafeCandidates
from acd_local.runtime.deferred import deferred
from acd_local.runtime.draft_policy import DraftPolicy
from acd_local.runtime.lookup import Lookup
from acd_local.runtime.prompts import Prompt
from acd_local.runtime.rowcosts import MAX_DRAFT, RowCosts
from acd_local.runtime.strategy import Strategy, StreamLogits

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # of a run
TEMPERATURES = {"greedy": 0.0, "sampled": 0.8}
STEPWISE = "stepwise"
WIDTH, HEIGHT = 720, 432  # of a panel
Runs = list[tuple[int, bool]]  # see FixedPace.runs

# ---------------------------------------------------------------------------------------------------------------------
# Runs of a fixed length


class FixedPace(DraftPolicy):
    """Runs of one length whatever comes; remembers how far each stood.

    Attributes:
        runs: per run with open choices its positions that stood, and whether the contrast changed the next one.
    """

    def __init__(self, length: int, *, alpha: float, greedy: bool) -> None:
        super().__init__(RowCosts(), alpha=alpha, greedy=greedy)
        self._length = length
        self._open = self._changed_one = False
        self.runs: Runs = []

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


class Paced(Generation):
    """An answer with runs of a fixed length."""

    def __init__(self, engine: Engine, text: str, options: Options, length: int) -> None:
        request = engine.generate(text, options).generation.request
        super().__init__(engine.decoder, engine.prompts, engine.special_tokens, request)
        self.pace = FixedPace(length, alpha=request.contrast.alpha, greedy=options.temp == 0)

    def make_strategy(self, chooser: Chooser, prompt: Prompt, first: StreamLogits, *, deferring: bool) -> Strategy:
        return deferred(first, chooser, self.pace, _NoLookup(()), limit=prompt.room, always_ahead=True)


def paced(engine: Engine, text: str, options: Options, length: int) -> tuple[Measured, Runs]:
    """An answer with runs of a fixed length, and `FixedPace.runs`."""
    generation = Paced(engine, text, options, length)
    return measure(engine, AnswerStream(generation)), generation.pace.runs


def standing(runs: Runs, most: int) -> list[tuple[int, float, float]]:
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


# ---------------------------------------------------------------------------------------------------------------------
# The measurement


@dataclass(frozen=True)
class Curves:
    """What the plot shows.

    Attributes:
        cases: by temperature, "greedy" and "sampled"; then STEPWISE, and run lengths as texts.
        runs: of the answers with the greatest length, by temperature.
    """

    model: str
    threads: int
    tokens: int
    rounds: int
    costs: BatchCosts
    cases: Mapping[str, Mapping[str, Case]]
    runs: Mapping[str, Runs]

    def ratios(self, temperature: str) -> dict[int, float]:
        """Time over plain llama.cpp by run length, medians."""
        found = self.cases[temperature]
        return {n: statistics.median(ratio) for n in LENGTHS if (ratio := found[str(n)].ratio)}

    def stepwise(self, temperature: str) -> float | None:
        return median(self.cases[temperature][STEPWISE].ratio)

    def standing(self, temperature: str) -> list[tuple[int, float, float]]:
        return standing(self.runs[temperature], max(LENGTHS))

    def summary(self) -> dict[str, Any]:
        """Medians, JSON types."""
        head = {name: getattr(self, name) for name in ("model", "threads", "tokens", "rounds")}
        return head | {"costs": self.costs.summary(), "runs": {name: self._runs_summary(name) for name in self.runs}}

    def _runs_summary(self, name: str) -> dict[str, Any]:
        shares = self.standing(name)
        return {
            "ratio_to_plain": {n: round(ratio, 4) for n, ratio in self.ratios(name).items()},
            "stepwise_ratio_to_plain": self.stepwise(name),
            "stands": [round(share, 4) for _, share, _ in shares],
            "stands_so_far": [round(share, 4) for _, _, share in shares],
        }

    def lines(self) -> Iterator[str]:
        name, work = one_line(self.model), f"up to {self.tokens} tokens x {self.rounds} rounds"
        yield f"{name}: {self.threads} threads, {work}, medians"
        yield from self.costs.lines()
        for name in self.runs:
            shown = ", ".join(f"{n}: {ratio:.2f}" for n, ratio in self.ratios(name).items())
            beside = "-" if (ratio := self.stepwise(name)) is None else f"{ratio:.2f}"
            yield f"{name}, time over plain by run length: {shown}; side by side: {beside}"
            yield f"{name}, drafts that stand by position: {', '.join(f'{s:.0%}' for _, s, _ in self.standing(name))}"


def run(
    model: str,
    *,
    tokens: int = 64,
    rounds: int = 5,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 2048,
    progress: Progress = lambda line: None,
) -> Curves:
    """Measure batches, and answers with fixed run lengths.

    Raises:
        UsageError: the model's caches cannot forget tokens.
    """
    check_counts(tokens, rounds)
    with Engine(model, threads=threads, ctx_size=ctx_size, pair=pair_to_measure(model, pair)) as engine:
        if not engine.can_defer:
            raise UsageError("this model's caches cannot forget their last tokens: it is always decoded stepwise")
        with pair_context(engine.decoder.model, ctx_size, engine.threads) as both:
            progress("measuring batches")
            costs = batch_costs(both)
        runs: dict[str, Runs] = {name: [] for name in TEMPERATURES}
        with bare_context(engine) as bare:
            warm_up(engine, tokens)

            def plain(number: int) -> Measured:
                return decode_plain(bare, plain_prompt(engine, text_of("questions", number)), tokens)

            def at(temperature: str, length: int | None, number: int) -> Measured:
                text, temp = text_of("questions", number), TEMPERATURES[temperature]
                options = Options(gate=False, temp=temp, max_tokens=tokens, seed=number)
                if length is None:
                    return measure(engine, engine.generate(text, options.replace({"strategy": STEPWISE})))
                found, stood = paced(engine, text, options, length)
                if length == max(LENGTHS):
                    runs[temperature] += stood
                return found

            ways: dict[tuple[str, str], Way] = {}
            for temperature in TEMPERATURES:
                ways[temperature, PLAIN] = plain
                ways[temperature, STEPWISE] = partial(at, temperature, None)
                ways |= {(temperature, str(n)): partial(at, temperature, n) for n in LENGTHS}
            cases = cases_of(in_turns(ways, rounds, progress), PLAIN)
        return Curves(engine.info.name or engine.info.path.name, engine.threads, tokens, rounds, costs, cases, runs)


# ---------------------------------------------------------------------------------------------------------------------
# The plot


def draw(curves: Curves) -> str:
    """Three panels as one SVG file: batches, run lengths, drafts that stand."""
    plots = (_batch_plot(curves.costs), _length_plot(curves), _standing_plot(curves))
    css = resources.files("acd_local.evaluate").joinpath("templates/report.css").read_text(encoding="utf-8")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(plots)}">',
        f"<style>{css}\nsvg.plot {{ max-width: none; }}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT * len(plots)}" style="fill: var(--paper)"/>',
    ]
    for i, plot in enumerate(plots):
        place = f'<svg y="{HEIGHT * i}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(str(plot).replace("<svg ", place, 1))
    return "\n".join([*parts, "</svg>\n"])


def _batch_plot(costs: BatchCosts) -> str:
    measured = Curve("k rows of one stream", 0, list(costs.rows.items()), marks=True)
    alone = Curve("as many single rows", 4, [(1, 1), (max(costs.rows) / 2, max(costs.rows) / 2)], faint=True)
    pair = Curve("one row of each stream", 2, [(2, costs.pair)], line=False, marks=True)
    fitted = []
    if costs.fit is not None:
        fitted = [Curve("as reckoned with", 1, [(k, costs.fit.rows(k)) for k in costs.rows if k <= MAX_DRAFT])]
    panel = Panel("What a batch costs", Axis("rows in the batch"), [measured, *fitted, pair, alone])
    return as_svg(Plot("batches", "Cost of a batch", [panel], Axis("cost in single rows", low=0)))


def _length_plot(curves: Curves) -> str:
    drawn = []
    for i, name in enumerate(curves.runs):
        drawn.append(Curve(f"{name}, runs of this length", i, list(curves.ratios(name).items()), marks=True))
        if (ratio := curves.stepwise(name)) is not None:
            drawn.append(Curve(f"{name}, side by side", i + 2, [(min(LENGTHS), ratio), (max(LENGTHS), ratio)]))
    panel = Panel("What a token costs", Axis("run length"), drawn)
    return as_svg(Plot("lengths", "Cost per token against run length", [panel], Axis("time over plain llama.cpp")))


def _standing_plot(curves: Curves) -> str:
    drawn = []
    for i, name in enumerate(curves.runs):
        shares = curves.standing(name)
        drawn.append(Curve(f"{name}, if those before stand", i, [(n, share) for n, share, _ in shares], marks=True))
        drawn.append(Curve(f"{name}, with all before", i + 2, [(n, share) for n, _, share in shares], marks=True))
    panel = Panel("Which drafts stand", Axis("position in the run"), drawn)
    return as_svg(Plot("standing", "Drafts that stand", [panel], Axis("share of drafts, %", percent=True, high=1)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = script.arguments(__doc__)
    parser.add_argument("--plot", type=Path, metavar="FILE.svg")

    def measured(model: str, *, plot: Path | None, **given: Any) -> Curves:
        if plot is not None:
            files.check_place(plot)  # before minutes are spent on measuring
        return run(model, **given)

    def finish(curves: Curves, given: Namespace) -> None:
        if given.plot is not None:
            files.replace_file(given.plot, draw(curves))

    return script.run(measured, parser, argv, finish=finish)


if __name__ == "__main__":
    sys.exit(main())
