"""Run ways of answering in turns, and summarize what each of them took.

Every second round goes backwards, so that a machine whose speed drifts slows all ways alike. Ratios are taken round by
round, and their medians are reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

from acd_local.errors import UsageError

K = TypeVar("K")
T = TypeVar("T")
Progress: TypeAlias = Callable[[str], object]
SAFE, ADVERSARIAL = 0, 1  # sequences of a shared context with one conversation


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


class BatchShape(NamedTuple):
    """The rows of one llama_decode: sequences, positions, and whether logits were wanted, each of shape (rows,)."""

    seqs: tuple[int, ...]
    positions: tuple[int, ...]
    wanted: tuple[int, ...]

    def rows(self, seq: int) -> int:
        """Count the rows of a sequence."""
        return self.seqs.count(seq)

    def start(self, seq: int) -> int:
        """Find the first position of a sequence that has rows here."""
        return min(p for p, s in zip(self.positions, self.seqs, strict=True) if s == seq)


@dataclass(frozen=True)
class Measured:
    """One answer.

    Attributes:
        steps: tokens after the first.
        seconds: from the first token to the last.
        outside: of these, spent outside llama_decode; None: not measured.
        first: seconds to the first token.
        compared: share of the positions where the adversarial stream's logits were taken.
        batches: what was decoded after the prompt, where it was recorded.
        each: seconds of every step, where they were taken.
    """

    steps: int
    seconds: float
    outside: float | None = None
    first: float | None = None
    compared: float | None = None
    batches: Sequence[BatchShape] = ()
    each: Sequence[float] = ()

    def seconds_of(self, steps: int) -> float:
        """Sum the seconds of the first so many steps, or of all if there are fewer; without `each` by the average."""
        return sum(self.each[:steps]) if self.each else self.seconds / self.steps * steps

    def prompt(self, seq: int) -> int:
        """Count the tokens that a sequence held before the first of the batches."""
        return min((batch.start(seq) for batch in self.batches if seq in batch.seqs), default=0)

    @property
    def accepted(self) -> float | None:
        """Share of the safe stream's rows that became answer tokens: the others were drafts that fell."""
        rows = sum(batch.rows(SAFE) for batch in self.batches)
        return self.steps / rows if rows else None

    @property
    def rows(self) -> float | None:
        """Rows decoded per token, both streams."""
        rows = sum(len(batch.seqs) for batch in self.batches)
        return rows / self.steps if rows else None


Way: TypeAlias = Callable[[int], Measured]  # given the number of the round


@dataclass(frozen=True)
class Case:
    """One way of answering over all rounds; lists are by round.

    Attributes:
        answers: its own.
        plain: those that it is compared with, of the same rounds.
        cold_s: time to the first token of a fresh engine, seconds, load excluded.
        peak_mb: peak resident memory of a process that does only this, 10^6 bytes.
    """

    name: str
    answers: Sequence[Measured] = ()
    plain: Sequence[Measured] = ()
    cold_s: float | None = None
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

    def summary(self, figures: Sequence[str]) -> dict[str, float | str | None]:
        """Return the case's name and some of its figures, JSON types.

        Args:
            figures: medians of tokens_per_second, ratio_to_plain, outside_decode_ms, first_token_warm_s,
                compared_share, accepted_share and rows_per_token; first_token_cold_s and peak_mb.
        """
        found = {
            "tokens_per_second": median(self.tokens_per_second),
            "ratio_to_plain": median(self.ratio),
            "outside_decode_ms": median(self.outside_ms),
            "first_token_cold_s": None if self.cold_s is None else round(self.cold_s, 4),
            "first_token_warm_s": median(self.each("first")),
            "peak_mb": None if self.peak_mb is None else round(self.peak_mb, 1),
            "compared_share": median(self.each("compared")),
            "accepted_share": median(self.each("accepted")),
            "rows_per_token": median(self.each("rows")),
        }
        return {"case": self.name} | {name: found[name] for name in figures}


def cases_of(found: Mapping[tuple[str, str], Sequence[Measured]], plain: str) -> dict[str, dict[str, Case]]:
    """Make cases by group and name, each compared with the one of its group that is named `plain`."""
    cases: dict[str, dict[str, Case]] = {}
    for (group, name), answers in found.items():
        cases.setdefault(group, {})[name] = Case(name, answers, found[group, plain])
    return cases


def median(values: Sequence[float]) -> float | None:
    """Round for people; None of nothing."""
    return round(statistics.median(values), 4) if values else None


def auto_against_best(cases: Mapping[str, Case]) -> float | None:
    """Divide the time of `auto` by that of the better fixed strategy; 1 is what it should be, less is noise."""
    medians = {name: statistics.median(case.ratio) for name, case in cases.items() if case.ratio}
    if not {"auto", "stepwise", "deferred"} <= set(medians):
        return None
    return round(medians["auto"] / min(medians["stepwise"], medians["deferred"]), 4)
