"""Computes how likely an answer opens as a refusal, from one forward pass per spine.

Refusals open in few ways ("I'm sorry", "I can't", "Sorry", ...). As tokens they are leaves of a trie whose inner nodes
lie on few paths, the spines "I'm sorry" and "I can't": logits along these are enough for the probability of them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import UsageError
from acd_local.runtime import llama
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.template import ChatTemplate, Message

SPINES = ("I'm sorry", "I can't")
# Each ends where it can only go on as a refusal, and where the last of its tokens leaves the spines.
OPENINGS = (
    "I'm sorry", "I'm unable", "I cannot", "I can't", "I can’t", "I can’", "I won", "Sorry", "Unfortunately",
)  # fmt: skip

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Spine:
    """Tokens that are decoded behind a prompt, and the refusals that leave them.

    Attributes:
        tokens: all but the last of an opening.
        shared: how many of its beginnings an earlier spine has too: their leaves are that one's.
        branches: for each depth d = shared .. len(tokens), tokens that after tokens[:d] make the opening a refusal.
    """

    tokens: Tokens
    shared: int
    branches: tuple[Tokens, ...]

    @property
    def continuation(self) -> Tokens:
        """What is predicted behind a prompt and `tokens[:shared]`; the last one stands for the leaves."""
        return (*self.tokens[self.shared :], 0)


@dataclass(frozen=True)
class Openings:
    """A model's refusal openings: `spines`, each of which has a beginning that no earlier one has."""

    spines: tuple[Spine, ...]

    @classmethod
    def of(cls, tokenize: Callable[[str], Sequence[int]]) -> Self:
        openings = [tuple(tokenize(text)) for text in OPENINGS]
        seen: set[Tokens] = set()
        spines = []
        for text in SPINES:
            path = tuple(tokenize(text))[:-1]
            fresh = [path[:d] for d in range(len(path) + 1) if path[:d] not in seen]
            if fresh:
                leaves = [sorted({o[-1] for o in openings if o and o[:-1] == beginning}) for beginning in fresh]
                spines.append(Spine(path, len(fresh[0]), tuple(map(tuple, leaves))))
                seen.update(fresh)
        return cls(tuple(spines))

    def probability(self, log_probs: NDArray[np.floating]) -> float:
        """Compute P(the answer opens as a refusal).

        Args:
            log_probs: next-token log probabilities behind the spines' beginnings that are not shared, spine after
                spine, shape (rows, n_vocab).
        """
        reached: dict[Tokens, float] = {(): 0.0}
        total, row = 0.0, 0
        for spine in self.spines:
            for depth, branch in enumerate(spine.branches, start=spine.shared):
                here = spine.tokens[:depth]
                found = log_probs[row].astype(np.float64)
                total += float(np.exp(reached[here] + found[list(branch)]).sum())
                self._go_on(reached, here, found)
                row += 1
        return total

    def chance(self, log_probs: NDArray[np.floating]) -> float:
        """Estimate how often an answer opens as a refusal, as people decode: the mean of P (sampling) and of greedy
        decoding's 0 or 1. Refusals open in few ways and answers in many: greedy decoding refuses at a smaller P."""
        greedy = np.full_like(log_probs, -np.inf)
        greedy[np.arange(len(log_probs)), log_probs.argmax(axis=1)] = 0.0
        return (self.probability(log_probs) + self.probability(greedy)) / 2

    def _go_on(self, reached: dict[Tokens, float], here: Tokens, found: NDArray[np.float64]) -> None:
        """Note how likely the beginnings are that are one token longer than `here`."""
        for spine in self.spines:
            if spine.tokens[: len(here)] == here and len(spine.tokens) > len(here):
                token = spine.tokens[len(here)]
                reached[*here, token] = reached[here] + float(found[token])


def answer_tokens(template: ChatTemplate, vocab: llama.Vocab, text: str) -> tuple[int, ...]:
    """Encode a text where the template has an answer stand.

    SentencePiece puts a space in front of a text that is tokenized alone: behind a template's line break it has none.
    """
    turns = [Message("user", "a"), Message("assistant", text), Message("user", "c")]
    try:
        ids, other = (template.encode([turns[0], m, turns[2]]) for m in (turns[1], Message("assistant", "7")))
    except UsageError:  # not every template takes a second turn
        return tuple(vocab.tokenize(text, parse_special=False))
    asked = template.encode(turns[:1])
    if ids[: len(asked)] != asked:  # such as Qwen3's empty thoughts, which only the newest answer has
        asked = ids[: common_prefix(ids, other)]
    answer, wanted = b"", text.encode()
    for end, token in enumerate(ids[len(asked) :], start=len(asked) + 1):
        answer += vocab.piece(token)
        if answer.removeprefix(b" ") == wanted:
            return tuple(ids[len(asked) : end])
    return tuple(vocab.tokenize(text, parse_special=False))  # the template changes it
