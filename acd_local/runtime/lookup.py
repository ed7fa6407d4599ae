"""Drafts what followed the last few tokens when they came before (prompt lookup).

Summaries, edits and quotes repeat their source (Saxena 2023, prompt lookup decoding; llama.cpp's examples/lookup).
"""

from __future__ import annotations

from collections.abc import Sequence

MATCH = 3  # tokens that must have come before
GREEDY, SAMPLED = 0.8, 0.5  # chance of a token to be right, at first
WEIGHT, MEMORY = 4.0, 8.0  # as how many tokens that counts, and how many tokens are remembered
QUOTED = 4  # right tokens in a row that make a quotation: it goes on behind a token that was replaced
REST = 32  # tokens without a draft after which what was learned is forgotten


class Lookup:
    """Drafts continuations from the tokens of a conversation.

    Args:
        history: the conversation so far; negative ids (embedding rows) are never drafted.
        chance: of a token to be right, at first.
    """

    def __init__(self, history: Sequence[int], chance: float = GREEDY) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the last place that followed MATCH tokens
        self._first = chance
        self._right, self._seen = chance * WEIGHT, WEIGHT
        self._last = len(history)  # how long the conversation was when something was learned
        self._learned = 0  # how long it is up to where drafts have told
        self._drafted = (0, 0)  # the last draft's position, and its source
        self._resumes: tuple[int, int] | None = None  # the same of a quotation behind a replaced token
        self._row = 0  # right tokens since the last wrong one
        for token in history:
            self._append(token)

    @property
    def chance(self) -> float:
        """How likely a token of a draft is right if those before it are."""
        if len(self._tokens) - self._last >= REST:
            self._right, self._seen = self._first * WEIGHT, WEIGHT
        return self._right / self._seen

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in how the conversation went on, and learn from what would have been drafted, until drafts tell more."""
        for token in tokens:
            at = self._next.get(tuple(self._tokens[-MATCH:]))
            if at is not None and len(self._tokens) >= self._learned and self.chance < GREEDY:
                self._count(int(self._tokens[at] == token), 1)
            self._append(token)

    def _append(self, token: int) -> None:
        if len(self._tokens) >= MATCH:
            self._next[tuple(self._tokens[-MATCH:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, ahead: Sequence[int], most: int) -> list[int]:
        """Draft up to `most` tokens that may follow the conversation and `ahead`; often none."""
        position = len(self._tokens) + len(ahead)
        at = self._next.get((*self._tokens[-MATCH:], *ahead)[-MATCH:])
        if self._resumes is not None and self._resumes[0] == position:
            at = self._resumes[1] if at is None else at
        if at is None:
            return []
        self._drafted = position, at
        found = self._tokens[at : at + max(0, most)]
        return found[: next((i for i, token in enumerate(found) if token < 0), len(found))]

    def learn(self, drafted: int, right: int) -> None:
        """Take in how many of the last draft's tokens came true."""
        wrong = right < drafted
        self._count(right, right + wrong)
        self._learned = self._drafted[0] + right + wrong
        self._row += right
        if wrong:
            position, at = (place + right + 1 for place in self._drafted)
            self._resumes = (position, at) if self._row >= QUOTED else None
            self._row = 0

    def _count(self, right: int, seen: int) -> None:
        self._right, self._seen = self._right + right, self._seen + seen
        if self._seen > MEMORY:
            self._right, self._seen = self._right * MEMORY / self._seen, MEMORY
        self._last = len(self._tokens)
