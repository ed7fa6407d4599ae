"""Proposes tokens that may come next, from the conversation itself or from a smaller model, as many as pay.

How many is a plain rule: the number that promises most tokens per time, by how often drafts came true lately and by
what batches cost here (`batch_costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from acd_local.runtime.batch_costs import BatchCosts
from acd_local.runtime.prefixes import common_prefix

MATCH = 3  # tokens that must have come before
FIRST, WEIGHT = 0.6, 2.0  # chance of a drafted token to be right at first, and as how many tokens that counts
MEMORY = 16.0  # tokens that are remembered
REST = 32  # tokens after which a source that was not asked is given another chance


class Acceptance:
    """Estimates how likely a drafted token is right if those before it are."""

    def __init__(self) -> None:
        self._right, self._seen = FIRST * WEIGHT, WEIGHT

    @property
    def rate(self) -> float:
        return self._right / self._seen

    def learn(self, right: int, seen: int) -> None:
        """Take in that of `seen` drafted tokens so many were right."""
        self._right, self._seen = self._right + right, self._seen + seen
        if self._seen > MEMORY:
            self._right, self._seen = self._right * MEMORY / self._seen, MEMORY


class Source(Protocol):
    """Proposes tokens.

    Attributes:
        cost: of a proposed token, in rows of the answering model.
    """

    cost: float

    @property
    def rate(self) -> float:
        """How likely a token is right if those before it are."""

    def add(self, tokens: Sequence[int]) -> None:
        """Take in how the conversation went on."""

    def available(self, most: int) -> int:
        """Count the tokens that could be proposed now, up to `most`."""

    def propose(self, count: int) -> Sequence[int]:
        """Propose up to `count` tokens of those that are available."""


class PromptLookup:
    """Proposes what followed the last few tokens when they came before.

    Summaries, edits and quotes repeat their source (Saxena 2023, prompt lookup decoding; llama.cpp's examples/lookup).
    It learns from every token that it could have proposed, whether it was asked or not.

    Args:
        history: the conversation so far; negative ids (embedding rows) are never proposed.
    """

    cost = 0.0

    def __init__(self, history: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the last place that followed MATCH tokens
        self._accepted = Acceptance()
        for token in history:
            self._append(token)

    @property
    def rate(self) -> float:
        return self._accepted.rate

    def add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.available(1):
                self._accepted.learn(int(self.propose(1)[0] == token), 1)
            self._append(token)

    def available(self, most: int) -> int:
        return len(self.propose(most))

    def propose(self, count: int) -> Sequence[int]:
        at = self._next.get(tuple(self._tokens[-MATCH:]))
        found = [] if at is None else self._tokens[at : at + count]
        return found[: next((i for i, token in enumerate(found) if token < 0), len(found))]

    def _append(self, token: int) -> None:
        if len(self._tokens) >= MATCH:
            self._next[tuple(self._tokens[-MATCH:])] = len(self._tokens)
        self._tokens.append(token)


class ModelDrafts:
    """Proposes what a smaller model says, greedily.

    Args:
        propose: continues tokens by up to so many.
        cost: of one token, in rows of the answering model.
        history: the conversation so far, without embedding rows.
    """

    def __init__(
        self, propose: Callable[[Sequence[int], int], Sequence[int]], cost: float, history: Sequence[int]
    ) -> None:
        self.cost = cost
        self._propose = propose
        self._tokens = [token for token in history if token >= 0]
        self._accepted = Acceptance()
        self._proposed: Sequence[int] = ()
        self._last = len(self._tokens)  # how long the conversation was when something was learned

    @property
    def rate(self) -> float:
        if len(self._tokens) - self._last >= REST:
            self._accepted = Acceptance()
        return self._accepted.rate

    def add(self, tokens: Sequence[int]) -> None:
        if self._proposed:
            right = common_prefix(self._proposed, tokens)
            self._accepted.learn(right, min(right + 1, len(self._proposed)))
            self._last = len(self._tokens)
        self._proposed = ()
        self._tokens.extend(tokens)

    def available(self, most: int) -> int:
        return most

    def propose(self, count: int) -> Sequence[int]:
        self._proposed = self._propose(self._tokens, count)
        return self._proposed


class Drafter:
    """Drafts from the source that promises most tokens per time, where any promises more than no draft.

    Args:
        sources: of equals the first is taken.
        most: tokens per draft at most.

    Attributes:
        drafted, accepted: tokens so far, and how many of them were right, as whoever checks them says.
    """

    def __init__(self, sources: Sequence[Source], costs: BatchCosts, most: int) -> None:
        self._sources = sources
        self._tables = {streams: costs.table(streams)[: most + 1] for streams in (1, 2)}
        self._delays = costs.delays
        self._drafting = False  # the last batch held a draft
        self.drafted = self.accepted = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Take in how the answer went on."""
        for source in self._sources:
            source.add(tokens)

    def draft(self, streams: int, most: int) -> Sequence[int]:
        """Propose up to `most` tokens that are to be checked in so many streams; often none."""
        costs = self._tables[streams]
        delay = 0.0 if self._drafting else self._delays[streams - 1]  # behind a draft it is to come in any case
        best, chosen, length = 1 / costs[0], None, 0
        for source in self._sources:
            rate = source.rate
            expected = chance = 1.0
            for k in range(1, 1 + source.available(min(most, len(costs) - 1))):
                chance *= rate
                expected += chance
                promise = expected / (costs[k] + delay + k * source.cost)
                if promise > best:
                    best, chosen, length = promise, source, k
        found = () if chosen is None else chosen.propose(length)
        self.drafted += len(found)
        self._drafting = bool(found)
        return found
