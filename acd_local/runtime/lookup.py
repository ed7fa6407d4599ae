"""Prompt-lookup drafts: what followed the last few tokens when they came before.

Summaries, edits and quotes repeat their source (Saxena 2023, prompt lookup decoding; llama.cpp's examples/lookup).
"""

from __future__ import annotations

from collections.abc import Sequence

MATCH = 3  # tokens that must have come before
START, MOST = 4, 15  # tokens per draft
REST = 32  # tokens without drafts after drafts that failed


class Lookup:
    """Drafts continuations from the tokens of a conversation; longer ones while they come true.

    Args:
        history: the conversation so far; negative ids (embedding rows) are never drafted.
    """

    def __init__(self, history: Sequence[int]) -> None:
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # the last place that followed MATCH tokens
        self._reach = START
        self._rest_until = 0
        self.extend(history)

    def extend(self, tokens: Sequence[int]) -> None:
        """The conversation went on."""
        for token in tokens:
            if len(self._tokens) >= MATCH:
                self._next[tuple(self._tokens[-MATCH:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, ahead: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow the conversation and `ahead`; often none."""
        if len(self._tokens) < self._rest_until:
            return []
        end = (*self._tokens[-MATCH:], *ahead)[-MATCH:]
        at = self._next.get(end)
        if at is None:
            return []
        found = self._tokens[at : at + min(self._reach, most)]
        return found[: next((i for i, token in enumerate(found) if token < 0), len(found))]

    def learn(self, drafted: int, right: int) -> None:
        """How many of a draft's tokens came true."""
        if right == drafted:
            self._reach = min(MOST, 2 * self._reach)
        elif 2 * right < drafted:
            self._reach //= 2
            if self._reach < 2:
                self._reach, self._rest_until = START, len(self._tokens) + REST
