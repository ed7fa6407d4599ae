"""Run ways of answering in turns, and summarize what each of them took.

Every second round goes backwards, so that a machine whose speed drifts slows all ways alike. Ratios are taken round by
round, and their medians are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from acd_local.errors import UsageError

K = TypeVar("K")
T = TypeVar("T")
Progress: TypeAlias = Callable[[str], object]


def check_counts(tokens: int, rounds: int) -> None:
    """Refuse measurements that would say nothing.

    Raises:
        UsageError: fewer than 2 tokens or 1 round.
    """
    if tokens < 2 or rounds < 1:
        raise UsageError(f"a benchmark needs at least 2 tokens and 1 round, not {tokens} and {rounds}")


def in_turns(
    ways: Mapping[K, Callable[[int], T]],
    rounds: int,
    progress: Progress = lambda line: None,
    *,
    warm_up: bool = False,
) -> dict[K, list[T]]:
    """Call every way once per round, forwards in odd rounds and backwards in even ones.

    Args:
        ways: are given the number of the round, from 1 on.
        warm_up: begin with a round 0 that does not count.

    Returns:
        What each way returned, by round.
    """
    found: dict[K, list[T]] = {name: [] for name in ways}
    for number in range(0 if warm_up else 1, rounds + 1):
        progress(f"round {number} of {rounds}" if number else "warming up")
        for name in ways if number % 2 else reversed(list(ways)):
            result = ways[name](number)
            if number:
                found[name].append(result)
    return found


@dataclass(frozen=True)
class Measured:
    """One answer.

    Attributes:
        steps: tokens after the first.
        seconds: from the first token to the last.
        outside: of these, spent outside llama_decode; None: not measured.
        first: seconds to the first token.
        batches: that were decoded for these steps; None: not measured.
        each: seconds of every step, where they were taken.
    """

    steps: int
    seconds: float
    outside: float | None = None
    first: float | None = None
    batches: int | None = None
    each: Sequence[float] = ()

    def seconds_of(self, steps: int) -> float:
        """Sum the seconds of the first so many steps, or of all if there are fewer; without `each` by the average."""
        return sum(self.each[:steps]) if self.each else self.seconds / self.steps * steps

    @property
    def per_batch(self) -> float | None:
        """Tokens that came out of one batch: more than 1 where drafts were accepted."""
        return self.steps / self.batches if self.batches else None


Way: TypeAlias = Callable[[int], Measured]  # given the number of the round


@dataclass(frozen=True)
class Case:
    """One way of answering over all rounds; lists are by round.

    Attributes:
        answers: its own.
        plain: those that it is compared with, of the same rounds.
        peak_mb: peak resident memory of a process that does only this, 10^6 bytes.
    """

    name: str
    answers: Sequence[Measured] = ()
    plain: Sequence[Measured] = ()
    peak_mb: float | None = None

    def _counted(self) -> list[tuple[Measured, Measured]]:
        """Pair answers with plain ones; an answer of one token is no measure."""
        pairs = zip(self.answers, self.plain, strict=True)
        return [(answer, plain) for answer, plain in pairs if answer.steps > 0 and plain.steps > 0]

    @property
    def tokens_per_second(self) -> list[float]:
        return [answer.steps / answer.seconds for answer, _ in self._counted()]

    @property
    def ratio(self) -> list[float]:
        """Time per token over that of as many tokens of the plain answer."""
        return [answer.seconds / plain.seconds_of(answer.steps) for answer, plain in self._counted()]

    @property
    def outside_ms(self) -> list[float]:
        """Time per token spent outside llama_decode, milliseconds."""
        return [a.outside / a.steps * 1e3 for a, _ in self._counted() if a.outside is not None]

    def each(self, name: str) -> list[float]:
        """List an attribute of all answers that have it."""
        return [value for answer in self.answers if (value := getattr(answer, name)) is not None]

    def summary(self) -> dict[str, float | str | None]:
        """Return the case's name and its medians, JSON types."""
        return {
            "case": self.name,
            "tokens_per_second": median(self.tokens_per_second),
            "ratio_to_plain": median(self.ratio),
            "tokens_per_batch": median(self.each("per_batch")),
            "outside_decode_ms": median(self.outside_ms),
            "first_token_s": median(self.each("first")),
            "peak_mb": None if self.peak_mb is None else round(self.peak_mb, 1),
        }


def cases_of(found: Mapping[tuple[str, str], Sequence[Measured]], plain: str) -> dict[str, dict[str, Case]]:
    """Make cases by group and name, each compared with the one of its group that is named `plain`."""
    cases: dict[str, dict[str, Case]] = {}
    for (group, name), answers in found.items():
        cases.setdefault(group, {})[name] = Case(name, answers, found[group, plain])
    return cases


def median(values: Sequence[float]) -> float | None:
    """Round for people; None of nothing."""
    return round(statistics.median(values), 4) if values else None
