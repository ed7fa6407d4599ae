"""Refers to stored answers at every token, as Reference Trustable Decoding does: a datastore of hidden states.

Source: Shi et al., NeurIPS 2024, arXiv 2409.20181, with one head. The datastore holds last hidden states, which the
model's output layer reads, and the tokens that followed them.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from acd_local.runtime import llama
from acd_local.runtime.contrast import log_softmax
from acd_local.runtime.llama import Logits, LogitsView, Row, States, TokenIds

NEIGHBOURS = 32
SHARE = 0.5  # of the references in what is drawn from: the least at which a stored answer is said again
_SAMPLED = 512  # states whose distance to the nearest other one is looked at


@dataclass(frozen=True, eq=False)
class References:
    """A datastore.

    Attributes:
        states: float32, shape (n, n_embd), n >= 1.
        tokens: what followed each, shape (n,).
        unit: of squared distances.
    """

    states: States
    tokens: TokenIds
    unit: float

    @classmethod
    def of(cls, states: States, tokens: TokenIds) -> References:
        """Make a datastore, its unit measured on some of the states, spread evenly.

        NEIGHBOURS states at the median distance to a nearest one weigh a NEIGHBOURSth of one that is met again.
        """
        chosen = np.unique(np.linspace(0, len(states) - 1, _SAMPLED).astype(np.int64))
        distances = np.stack([_distances(states, states[i]) for i in chosen])
        distances[np.arange(len(chosen)), chosen] = np.inf
        nearest = distances.min(axis=1)
        known = nearest[np.isfinite(nearest) & (nearest > 0)]
        middle = float(np.median(known)) if len(known) else 1.0
        return cls(states, tokens, middle / (2 * math.log(NEIGHBOURS)))

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over all of it."""
        return hashlib.sha256(self.states.tobytes() + self.tokens.tobytes()).hexdigest()

    def mixed(self, logits: Logits, state: States) -> Logits:
        """Compute log((1 - SHARE) * p + SHARE * r), shape (n_vocab,): r weighs the tokens of the nearest states.

        Args:
            logits: shape (n_vocab,), whose softmax is p.
            state: shape (n_embd,).
        """
        distances = _distances(self.states, state)
        near = np.argpartition(distances, min(NEIGHBOURS, len(distances)) - 1)[:NEIGHBOURS]
        weights = np.exp((distances[near].min() - distances[near]) / self.unit)
        chances = (1 - SHARE) * np.exp(log_softmax(logits))
        np.add.at(chances, self.tokens[near], SHARE * weights / weights.sum())
        with np.errstate(divide="ignore"):
            found: Logits = np.log(chances).astype(np.float32)
        return found

    def open(self, model: llama.Model, **settings: Any) -> llama.Context:
        """Make a context whose logits are mixed with the references, see `runtime.apart.Kind`."""
        return _Referring(self, model, **settings)


class StateContext(llama.Context):
    """A context that gives the last hidden state of every row whose logits it gives."""

    def decode(self, tokens: Row, seqs: Row, positions: Row, outputs: Row, *, captured_alone: bool = False) -> None:
        """Run one batch, see `llama.Context.decode`.

        llama.cpp gives the states of all rows or of none: of a sequence's rows those that nobody asks for come first
        and go alone, among single rows of several nobody minds a few more.
        """
        n = len(tokens)
        first = n - int(np.sum(outputs)) if len(set(seqs)) == 1 else 0
        assert not any(outputs[:first])
        if first:
            self.give_hidden(False)
            super().decode(tokens[:first], seqs[:first], positions[:first], outputs[:first])
        if first < n:
            self.give_hidden(True)
            super().decode(tokens[first:], seqs[first:], positions[first:], [1] * (n - first))
        self._asked = np.flatnonzero(np.asarray(outputs)[first:])
        self._rows_of_last = n - first

    def logits(self, n_outputs: int) -> LogitsView:
        """Return the last decode's logits, see `llama.Context.logits`."""
        assert n_outputs == len(self._asked)
        return LogitsView(super().logits(self._rows_of_last)[self._asked])

    def states(self) -> States:
        """Return the states of the same rows, float32, shape (n_outputs, n_embd)."""
        return self.hidden(self._rows_of_last)[self._asked]


class _Referring(StateContext):
    def __init__(self, references: References, model: llama.Model, **settings: Any) -> None:
        self._references = references
        super().__init__(model, **settings)

    def logits(self, n_outputs: int) -> LogitsView:
        plain, states = super().logits(n_outputs), self.states()
        return LogitsView(np.stack([self._references.mixed(*row) for row in zip(plain, states, strict=True)]))


def _distances(states: States, state: States) -> NDArray[np.float32]:
    """Compute squared distances, shape (n,)."""
    found: NDArray[np.float32] = np.square(states - state).sum(axis=1)
    return found
