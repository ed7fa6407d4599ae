"""Measure MODEL's speed with the batches of another model's answers: what a shape of weights costs, whatever it says.

    python benchmarks/replay.py MODEL [--source demo] [--quantize KIND] [--pair NAME|FILE] [--tokens 64] [--json]

Answers of the source are recorded as batches: how many rows of which stream, at which positions, with which logits.
MODEL decodes arbitrary tokens in their places, in turns with as many tokens of plain decoding; time inside llama_decode
alone counts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import script
from batches import BatchCosts, batch_costs, decode, fill, pair_context

from acd_local.bench.cost import strategies_summary
from acd_local.bench.measuring import PLAIN, STRATEGIES, by_strategy
from acd_local.bench.questions import text_of
from acd_local.bench.rounds import (
    ADVERSARIAL,
    SAFE,
    BatchShape,
    Case,
    Measured,
    Progress,
    Way,
    cases_of,
    check_counts,
    in_turns,
)
from acd_local.cli.bench import strategy_lines
from acd_local.cli.shell import one_line
from acd_local.engine import Engine, pair_to_measure
from acd_local.errors import UsageError
from acd_local.models import resolve
from acd_local.runtime import llama, probe
from acd_local.runtime.threads import default_threads

GROUPS = {"strategies": "questions", "repeat": "repeats"}
TITLES = {"strategies": "ordinary questions", "repeat": "answers that repeat a text"}


@dataclass(frozen=True)
class ReplayReport:
    """What a model's weights cost with the answers of another.

    Attributes:
        source: the model that answered.
        groups: strategies by name, for each of GROUPS; time inside llama_decode alone.
        costs: of batches on the measured model; the recorded strategies reckoned with them.
    """

    model: str
    source: str
    n_vocab: int
    threads: int
    tokens: int
    rounds: int
    groups: dict[str, dict[str, Case]]
    costs: BatchCosts

    def summary(self) -> dict[str, Any]:
        """Medians, JSON types."""
        head = {n: getattr(self, n) for n in ("model", "source", "n_vocab", "threads", "tokens", "rounds")}
        return head | strategies_summary(self.groups) | {"costs": self.costs.summary()}

    def lines(self) -> Iterator[str]:
        yield (
            f"{one_line(self.model)}, with the batches of answers of {one_line(self.source)}: {self.threads} threads, "
            f"up to {self.tokens} tokens x {self.rounds} rounds, medians, llama_decode alone"
        )
        yield from self.costs.lines()
        yield from strategy_lines(self.summary(), TITLES)


def replay(context: llama.Context, recorded: Measured) -> Measured:
    """Decode arbitrary tokens in the places of a recorded answer's, its prompts' first."""
    for seq in (SAFE, ADVERSARIAL):
        fill(context, seq, recorded.prompt(seq))
    seconds = sum(decode(context, batch) for batch in recorded.batches)
    return replace(recorded, seconds=seconds, outside=None, first=None)


def measure(
    model: str,
    *,
    source: str = "demo",
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
        pair_context(loaded, ctx_size, threads) as both,
        llama.Context(loaded, n_ctx=ctx_size, n_seq=1, threads=threads) as bare,
    ):
        progress("measuring batches")
        costs = batch_costs(both)
        progress(f"recording answers of {source}")
        with Engine(source, threads=threads, ctx_size=ctx_size, pair=pair_to_measure(source, pair)) as engine:
            recorded = _record(engine, costs, tokens, rounds)
        groups = cases_of(in_turns(_ways(both, bare, recorded, tokens), rounds, progress), PLAIN)
        return ReplayReport(
            model=info.name or info.path.name,
            source=source,
            n_vocab=loaded.n_vocab,
            threads=threads,
            tokens=tokens,
            rounds=rounds,
            groups={group: {name: cases[name] for name in STRATEGIES} for group, cases in groups.items()},
            costs=costs,
        )


def _record(engine: Engine, costs: BatchCosts, tokens: int, rounds: int) -> dict[tuple[str, str], list[Measured]]:
    """By group and strategy an answer per round, as if batches cost `costs`."""
    if not engine.can_defer:
        raise UsageError(f"{engine.info.path.name} is always decoded stepwise: there is nothing to replay")
    engine.decoder.row_clock.known = costs.fit
    return {
        (group, name): [by_strategy(engine, name, text_of(kind, number), tokens) for number in range(1, rounds + 1)]
        for group, kind in GROUPS.items()
        for name in STRATEGIES
    }


def _ways(
    both: llama.Context, bare: llama.Context, recorded: dict[tuple[str, str], list[Measured]], tokens: int
) -> dict[tuple[str, str], Way]:
    """Ways by group and name: plain decoding first."""

    def plain(group: str, number: int) -> Measured:
        """As many arbitrary tokens behind a prompt as long as the safe stream's."""
        prompt = max(recorded[group, name][number - 1].prompt(SAFE) for name in STRATEGIES)  # the same of all
        fill(bare, SAFE, prompt)
        each = [decode(bare, BatchShape((SAFE,), (prompt + i,), (1,))) for i in range(tokens - 1)]
        return Measured(len(each), sum(each), each=each)

    def again(key: tuple[str, str], number: int) -> Measured:
        return replay(both, recorded[key][number - 1])

    ways: dict[tuple[str, str], Way] = {}
    for group in GROUPS:
        ways[group, PLAIN] = partial(plain, group)
        ways |= {(group, name): partial(again, (group, name)) for name in STRATEGIES}
    return ways


def main(argv: Sequence[str] | None = None) -> int:
    parser = script.arguments(__doc__)
    parser.add_argument("--source", default="demo")
    return script.run(measure, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
