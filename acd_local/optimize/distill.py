"""Distillation: the text whose effect comes closest to a soft prompt's.

First a greedy search over readable parts (sentences and short demonstrations), then gradient-guided token search from
the winner on: swaps of a few tokens at once, insertions and deletions, the best of some tried on the same minibatch
(after GCG, Zou et al. 2023). A text counts only if text -> tokens -> text -> tokens leaves it as it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from acd_local.errors import ModelError
from acd_local.optimize.objective import TextObjective
from acd_local.optimize.stages import Stopped
from acd_local.optimize.textspace import TextSpace
from acd_local.runtime.cancel import CancelToken

Origin = Literal["manual", "parts", "swap", "insert", "delete", "merge"]
Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A text that was accepted on the way.

    Attributes:
        objective, parts: on the minibatch it was accepted on; lower is better.
        scores: by llama.cpp on the file as it runs: safety, over_refusal, lookalike.
    """

    step: int
    origin: Origin
    text: str
    tokens: Tokens
    objective: float
    parts: Mapping[str, float]
    scores: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class DistillSettings:
    """How long and how widely is searched.

    Attributes:
        max_tokens: of the text.
        rounds: of the search over parts; each adds one.
        steps: of the token search.
        tries: texts tried per step.
        top_k: tokens considered per place.
        hold: steps on one minibatch.
    """

    max_tokens: int = 96
    rounds: int = 5
    steps: int = 120
    tries: int = 12
    top_k: int = 48
    hold: int = 4


FINALISTS = 4

Scorer = Callable[[str], Mapping[str, float]]


@dataclass(frozen=True)
class Tried:
    """Any text that was tried, and its objective on the minibatch of its step."""

    step: int
    origin: Origin
    tokens: Tokens
    objective: float


@dataclass
class DistillState:
    """Where a search stands, and all that it tried; JSON-able."""

    step: int = 0
    tokens: Tokens = ()
    history: list[Candidate] = field(default_factory=list)
    tried: list[Tried] = field(default_factory=list)

    def dump(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": list(self.tokens),
            "history": [asdict(c) | {"tokens": list(c.tokens)} for c in self.history],
            "tried": [asdict(t) | {"tokens": list(t.tokens)} for t in self.tried],
        }

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> DistillState:
        history = [Candidate(**{**row, "tokens": tuple(row["tokens"])}) for row in data["history"]]
        tried = [Tried(**{**row, "tokens": tuple(row["tokens"])}) for row in data["tried"]]
        return cls(data["step"], tuple(data["tokens"]), history, tried)


def parts(place: Literal["safe", "adversarial"]) -> list[str]:
    """The readable parts of a prompt."""
    table = json.loads((Path(__file__).with_name("data") / "parts.json").read_text("utf-8"))[place]
    return [*table["sentences"], *table["demonstrations"]]


def finalists(history: Sequence[Candidate], score: Callable[[Mapping[str, float]], float]) -> list[Candidate]:
    """The best accepted texts by llama.cpp's scores, with the manual one and the best readable one among them.

    No text is there twice: one that the search came back to counts where it was first.
    """
    first: dict[str, Candidate] = {}
    for c in history:
        first.setdefault(c.text, c)
    ranked = sorted(first.values(), key=lambda c: -score(c.scores))
    readable = [next((c for c in ranked if c.origin == origin), None) for origin in ("manual", "parts")]
    chosen = [c for c in readable if c is not None]
    return chosen + [c for c in ranked if c not in chosen][: FINALISTS - len(chosen)]


class Distillation:
    """One text's search; goes on from `state`.

    Args:
        start: the manual prompt, the first candidate.
        pieces: readable parts.
        scorer: llama.cpp's scores of a text.
        save: is given the state after every step.
        on_step: is told (steps done, steps in all, newest accepted candidate).
    """

    def __init__(
        self,
        objective: TextObjective,
        space: TextSpace,
        scorer: Scorer,
        settings: DistillSettings,
        state: DistillState,
        *,
        seed: int,
        save: Callable[[DistillState], None],
        on_step: Callable[[int, int, Candidate], None],
        stop: CancelToken,
    ) -> None:
        self._objective = objective
        self._space = space
        self._scorer = scorer
        self.settings = settings
        self.state = state
        self._seed = seed
        self._save = save
        self._on_step = on_step
        self._stop = stop

    def run(self, start: str, pieces: Sequence[str]) -> None:
        """Search to the end; what was found is in `state`.

        Raises:
            Stopped: `stop` was set; the state was saved.
        """
        total = self.settings.rounds + self.settings.steps
        while self.state.step < total:
            started = time.perf_counter()
            if self.state.step < self.settings.rounds:
                self._add_part(start, pieces, started)
            else:
                self._search(started)
            self.state.step += 1
            self._save(self.state)
            self._on_step(self.state.step, total, self.state.history[-1])
            if self._stop.is_set:
                raise Stopped

    # -- readable parts ------------------------------------------------------------------------------------------------

    def _add_part(self, start: str, pieces: Sequence[str], started: float) -> None:
        """Try every part behind the text so far, and in the first round alone."""
        current = self._space.text(self.state.tokens) if self.state.tokens else ""
        tried = [start, *pieces] if not current else [f"{current}\n{p}" for p in pieces if p not in current]
        fitting = [t for t in map(self._space.tokens, tried) if t and len(t) <= self.settings.max_tokens]
        if not self.state.history:
            if not fitting:
                raise ModelError("no prompt keeps its tokens in this model's chat template: run with --soft-only")
            manual = self._space.tokens(start)
            if manual in fitting:
                self._accept(manual, "manual", self._objective(manual), started)
        if not fitting:
            return
        results = [(self._try(tokens, "parts"), tokens) for tokens in fitting]
        parts, tokens = min(results, key=lambda r: r[0]["objective"])
        if not self.state.tokens or not current or parts["objective"] < self._objective(self.state.tokens)["objective"]:
            self._accept(tokens, "parts", parts, started)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _search(self, started: float) -> None:
        number = self.state.step - self.settings.rounds
        rng = np.random.default_rng([self._seed, 7, number])
        self._objective.turn_to(1 + number // self.settings.hold)
        current = self.state.tokens
        base = self._objective(current)
        places = self._ranked(current)
        found: list[tuple[dict[str, float], Tokens, Origin]] = []
        for _ in range(self.settings.tries):
            tokens, origin = self._changed(current, places, rng)
            if self._space.is_stable(tokens):
                found.append((self._try(tokens, origin), tokens, origin))
        better = sorted((f for f in found if f[0]["objective"] < base["objective"]), key=lambda f: f[0]["objective"])
        if not better:
            return
        best = better[0]
        merged = _merge(current, [t for _, t, origin in better[:4] if origin == "swap"])
        if merged is not None and self._space.is_stable(merged):
            value = self._try(merged, "merge")
            if value["objective"] < best[0]["objective"]:
                best = value, merged, "merge"
        self._accept(best[1], best[2], best[0], started)

    def _ranked(self, tokens: Tokens) -> torch.Tensor:
        """Per place the `top_k` allowed tokens that promise most, shape (len(tokens), top_k)."""
        change = self._objective.gradient(tokens)
        change[:, ~self._space.allowed.to(change.device)] = float("inf")
        return change.topk(self.settings.top_k, dim=1, largest=False).indices.cpu()

    def _changed(self, tokens: Tokens, places: torch.Tensor, rng: np.random.Generator) -> tuple[Tokens, Origin]:
        kind = rng.random()
        changed = list(tokens)
        at = int(rng.integers(len(tokens)))
        new = int(places[at, int(rng.integers(places.shape[1]))])
        if kind < 0.15 and len(tokens) < self.settings.max_tokens:
            return (*tokens[:at], new, *tokens[at:]), "insert"
        if kind < 0.22 and len(tokens) > 8:
            return (*tokens[:at], *tokens[at + 1 :]), "delete"
        for _ in range(1 + int(rng.integers(3))):
            changed[at] = new
            at = int(rng.integers(len(tokens)))
            new = int(places[at, int(rng.integers(places.shape[1]))])
        return tuple(changed), "swap"

    def _try(self, tokens: Tokens, origin: Origin) -> dict[str, float]:
        parts = self._objective(tokens)
        self.state.tried.append(Tried(self.state.step, origin, tokens, parts["objective"]))
        return parts

    def _accept(self, tokens: Tokens, origin: Origin, parts: dict[str, float], started: float) -> None:
        text = self._space.text(tokens)
        scores = dict(self._scorer(text))
        objective = parts.pop("objective")
        seconds = time.perf_counter() - started
        self.state.tokens = tokens
        self.state.history.append(
            Candidate(self.state.step, origin, text, tokens, objective, parts, scores, round(seconds, 3))
        )


def _merge(current: Tokens, others: Sequence[Tokens]) -> Tokens | None:
    """The changes of several texts of one length in one; an earlier text wins a place. None where there is but one."""
    if len(others) < 2:
        return None
    merged = list(current)
    for other in reversed(others):
        for i, (a, b) in enumerate(zip(current, other, strict=True)):
            if a != b:
                merged[i] = b
    return tuple(merged)
