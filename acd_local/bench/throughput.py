"""Measure what continuous batching gains: the same prompts one by one and N at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from acd_local.batch import answer_all
from acd_local.bench.measuring import contrasted_pair
from acd_local.bench.questions import many_prompts
from acd_local.bench.rounds import Progress, in_turns
from acd_local.engine import Engine
from acd_local.options import Options


@dataclass(frozen=True)
class Throughput:
    """A finished comparison.

    Attributes:
        per_minute: prompts per minute of each round, by conversations at once.
        gains: per round, prompts per minute at `parallel` over those one by one.
        differing: prompts whose text differed between the two: near-ties that fell otherwise in another batch shape.
    """

    parallel: int
    prompts: int
    tokens: int
    threads: int
    per_minute: dict[int, list[float]]
    gains: list[float]
    differing: int

    @property
    def gain(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.gains)

    def summary(self) -> dict[str, Any]:
        """Return JSON types; prompts per minute are medians."""
        names = ("parallel", "prompts", "tokens", "threads", "gains", "gain", "differing")
        speeds = {n: statistics.median(values) for n, values in self.per_minute.items()}
        return {name: getattr(self, name) for name in names} | {"prompts_per_minute": speeds}


def run(
    model: str,
    parallel: int,
    *,
    tokens: int = 64,
    rounds: int = 3,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 1024,
    progress: Progress = lambda line: None,
) -> Throughput:
    """Answer 48 prompts, new ones in every round, greedily, with one conversation and with `parallel`."""
    options = Options(gate=False, temp=0.0, max_tokens=tokens)
    used = contrasted_pair(pair)
    settings: dict[str, Any] = {"ctx_size": ctx_size, "threads": threads, "pair": used, "cache": False}

    def answer(engine: Engine, n: int, number: int) -> tuple[float, list[str]]:
        prompts = many_prompts(number) if number else many_prompts(0)[:n]  # these decode the system prompts
        started = time.perf_counter()
        texts = texts_of(engine, prompts, options)
        return 60 * len(prompts) / (time.perf_counter() - started), texts

    with (
        Engine(model, **settings, system_apart=True) as alone,
        Engine(model, **settings, conversations=parallel) as together,
    ):
        ways = {n: partial(answer, engine, n) for n, engine in ((1, alone), (parallel, together))}
        found = in_turns(ways, rounds, progress, warm_up=True)
        threads = alone.threads
    per_minute = {n: [speed for speed, _ in results] for n, results in found.items()}
    last = [results[-1][1] for results in found.values()]
    return Throughput(
        parallel=parallel,
        prompts=len(last[0]),
        tokens=tokens,
        threads=threads,
        per_minute=per_minute,
        gains=[many / one for one, many in zip(per_minute[1], per_minute[parallel], strict=True)],
        differing=sum(a != b for a, b in zip(*last, strict=True)),
    )


def texts_of(engine: Engine, prompts: Sequence[str], options: Options) -> list[str]:
    """List the answers' texts, in the order of the prompts."""
    texts = [""] * len(prompts)
    for place, answer in answer_all(engine, range(len(prompts)), lambda n: engine.generate(prompts[n], options)):
        if isinstance(answer, Exception):
            raise answer
        texts[place] = answer.text
    return texts
