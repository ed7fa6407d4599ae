"""What continuous batching gains: the same prompts one by one and N at once, in turns, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from acd_local.answers import Answer
from acd_local.batch import BatchRunner
from acd_local.bench import QUESTIONS
from acd_local.engine import Engine, measured_pair
from acd_local.options import Options

# With the benchmark's questions: prompts of different lengths.
ORDERS = (
    "",
    "In one sentence: ",
    "Explain it to a child, with an example from daily life: ",
    "Write a poem about this: ",
    "Name three things to remember. ",
    "What do people usually get wrong here? ",
    "Answer as a cheerful radio host who has one minute before the news: ",
    "Step by step, please. ",
)


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


def run(
    model: str,
    parallel: int,
    *,
    tokens: int = 64,
    rounds: int = 3,
    pair: str | None = None,
    threads: int | None = None,
    ctx_size: int = 1024,
    plain: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Throughput:
    """Answer 48 prompts, new ones in every round, greedily, with one conversation and with `parallel`."""
    options = Options(gate=False, temp=0.0, max_tokens=tokens, plain=plain)
    speeds: dict[int, list[float]] = {1: [], parallel: []}
    contrasted = measured_pair(model, pair)
    with (
        Engine(model, ctx_size=ctx_size, threads=threads, pair=contrasted, system_apart=True) as alone,
        Engine(model, ctx_size=ctx_size, threads=threads, pair=contrasted, conversations=parallel) as together,
    ):
        texts: dict[int, list[str]] = {}
        for number in range(rounds + 1):  # the first decodes the system prompts
            progress(f"round {number} of {rounds}" if number else "warming up")
            prompts = prompts_of(number)
            for n, engine in ((1, alone), (parallel, together)):
                started = time.perf_counter()
                texts[n] = answer_all(engine, prompts if number else prompts[:n], options)
                if number:
                    speeds[n].append(60 * len(prompts) / (time.perf_counter() - started))
        used = alone.threads
    return Throughput(
        parallel=parallel,
        prompts=len(prompts),
        tokens=tokens,
        threads=used,
        per_minute=speeds,
        gains=[many / one for one, many in zip(speeds[1], speeds[parallel], strict=True)],
        differing=sum(a != b for a, b in zip(texts[1], texts[parallel], strict=True)),
    )


def prompts_of(number: int) -> list[str]:
    """A round's prompts; they differ from their first word on, so that no round finds another's in the caches."""
    return [f"{number}. {order}{question}" for order in ORDERS for question in QUESTIONS]


def answer_all(engine: Engine, prompts: Sequence[str], options: Options) -> list[str]:
    """The answers' texts, in the order of the prompts; as many at once as the engine has conversations."""
    waiting = iter(enumerate(prompts))
    texts = [""] * len(prompts)
    with BatchRunner(engine) as batch:
        while True:
            while batch.room and (task := next(waiting, None)) is not None:
                batch.add(task[0], engine.generate(task[1], options))
            if not len(batch):
                return texts
            for event in batch.step():
                if isinstance(event.what, Exception):
                    raise event.what
                if isinstance(event.what, Answer):
                    texts[int(str(event.key))] = event.what.text
