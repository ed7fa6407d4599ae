"""Searches for the text whose effect comes closest to a soft prompt's (distillation).

First a greedy search over readable parts (sentences and short demonstrations), then gradient-guided token search from
the winner on: swaps of a few tokens at once, insertions and deletions, the best of some tried on the same minibatch
(after GCG, Zou et al. 2023). A text counts only if text -> tokens -> text -> tokens leaves it as it is.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from acd_local.errors import ModelError
from acd_local.optimize.prompt_tokens import Layout
from acd_local.optimize.text_objective import TextObjective
from acd_local.progress import Stopped
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import ChatTemplate, Message

Origin = Literal["manual", "parts", "swap", "insert", "delete", "merge"]
Tokens = tuple[int, ...]

_PLAIN = frozenset(map(chr, range(32, 127))) | {"\n"}


@dataclass(frozen=True)
class Candidate:
    """A text that was tried.

    Attributes:
        objective, parts: on the minibatch of its step, in torch; lower is better.
        scores: by llama.cpp on the file as it runs: safety, over_refusal, lookalike.
        seconds: since its step began, without its scores.
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
class SearchSettings:
    """The length and width of a search.

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


Scorer = Callable[[Sequence[str]], Iterable[Mapping[str, float]]]


@dataclass
class SearchState:
    """Where a search stands, and all that it tried; JSON-able.

    Attributes:
        accepted: places in `tried` of the texts that the search went on from.
    """

    step: int = 0
    tried: list[Candidate] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    @property
    def history(self) -> list[Candidate]:
        """The accepted texts; the last one is where the search is."""
        return [self.tried[i] for i in self.accepted]

    def dump(self) -> dict[str, Any]:
        tried = [asdict(c) | {"tokens": list(c.tokens)} for c in self.tried]
        return {"step": self.step, "tried": tried, "accepted": list(self.accepted)}

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> SearchState:
        tried = [Candidate(**{**row, "tokens": tuple(row["tokens"])}) for row in data["tried"]]
        return cls(data["step"], tried, list(data["accepted"]))


def parts(place: Literal["safe", "adversarial"]) -> list[str]:
    """List the readable parts of a prompt."""
    table = json.loads((Path(__file__).with_name("data") / "parts.json").read_text("utf-8"))[place]
    return [*table["sentences"], *table["demonstrations"]]


def best(tried: Sequence[Candidate], score: Callable[[Mapping[str, float]], float], most: int) -> list[Candidate]:
    """List the best texts by llama.cpp's scores, with the manual one and the best readable one among them.

    No text is there twice: one that the search came back to counts where it was first.
    """
    first: dict[str, Candidate] = {}
    for c in tried:
        first.setdefault(c.text, c)
    ranked = sorted(first.values(), key=lambda c: -score(c.scores))
    readable = [next((c for c in ranked if c.origin == origin), None) for origin in ("manual", "parts")]
    chosen = [c for c in readable if c is not None]
    return chosen + [c for c in ranked if c not in chosen][: most - len(chosen)]


class TextSpace:
    """Texts that a search may find: tokens that stay as they are when their text is tokenized where it will stand.

    Args:
        layout: as `prompt_tokens.lay_out` gives it.

    Attributes:
        allowed: which tokens a text may be changed to, shape (n_vocab,): printable ASCII, no control tokens.
    """

    def __init__(self, template: ChatTemplate, vocab: llama.Vocab, layout: Layout, n_vocab: int) -> None:
        self._template = template
        self._vocab = vocab
        self._layout = layout
        ids = template.encode([Message("user", "a")], rows=(-1,))
        self._tail = ids[ids.index(-1) + 1 :]
        # SentencePiece puts a space before a text that begins a run: it is none of the text's own.
        self._adds_space = b"".join(map(vocab.piece, vocab.tokenize("x", parse_special=False))) == b" x"
        self.allowed = torch.zeros(n_vocab, dtype=torch.bool)
        for token in range(min(n_vocab, vocab.n_tokens)):
            special = vocab.attr(token) & (llama.ATTR_CONTROL | llama.ATTR_UNKNOWN | llama.ATTR_UNUSED)
            text = vocab.piece(token).decode("utf-8", "replace")
            self.allowed[token] = bool(text) and not special and _PLAIN.issuperset(text)

    def text(self, tokens: Sequence[int]) -> str:
        text = b"".join(map(self._vocab.piece, tokens)).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._adds_space else text

    def tokens(self, text: str) -> Tokens | None:
        """Encode the text in its place; None where the template or a pair file would change it."""
        ids = self._encoded(text)
        tokens = tuple(ids[len(self._layout.before) : len(ids) - len(self._tail)])
        return tokens if self.text(tokens) == text and self.is_stable(tokens) else None

    def is_stable(self, tokens: Sequence[int]) -> bool:
        """Tell whether a prompt file with this text gives these tokens, and no others, at run time."""
        text = self.text(tokens)
        if not text or text != text.strip() or "\ufffd" in text:
            return False
        return self._encoded(text) == [*self._layout.before, *tokens, *self._tail]

    def _encoded(self, text: str) -> list[int]:
        return self._template.encode([Message("system", text), Message("user", "a")])


@dataclass(eq=False)
class TextSearch:
    """One text's search; goes on from `state`.

    Args:
        start: the manual prompt, the first candidate.
        pieces: readable parts.
        scorer: llama.cpp's scores of texts; it is given those that a step tried.
        save: is given the state after every step.
        on_step: is told (steps done, newest accepted candidate).
    """

    objective: TextObjective
    space: TextSpace
    scorer: Scorer
    settings: SearchSettings
    state: SearchState
    _: KW_ONLY
    seed: int
    save: Callable[[SearchState], None]
    on_step: Callable[[int, Candidate], None]
    stop: CancelToken

    def run(self, start: str, pieces: Sequence[str]) -> None:
        """Search to the end; what was found is in `state`, which is saved also where it is stopped."""
        total = self.settings.rounds + self.settings.steps
        while self.state.step < total:
            started = time.perf_counter()
            if self.state.step < self.settings.rounds:
                self._add_part(start, pieces, started)
            else:
                self._search(started)
            self._score()
            self.state.step += 1
            self.save(self.state)
            self.on_step(self.state.step, self.state.history[-1])
            if self.stop.is_set:
                raise Stopped

    # -- readable parts ------------------------------------------------------------------------------------------------

    def _add_part(self, start: str, pieces: Sequence[str], started: float) -> None:
        """Try every part behind the text so far; in the first round the manual text, and every part alone."""
        current = self.state.history[-1].text if self.state.accepted else ""
        texts = [f"{current}\n{p}" for p in pieces if p not in current] if current else [start, *pieces]
        found = []
        for text in texts:
            tokens = self.space.tokens(text)
            if tokens and len(tokens) <= self.settings.max_tokens:
                found.append(self._try(tokens, "manual" if text == start else "parts", started))
        if not current and not found:
            raise ModelError("no prompt keeps its tokens in this model's chat template: run with --soft-only")
        if not current and self.state.tried[0].origin == "manual":
            self.state.accepted.append(0)
        before = self._value(self.state.accepted[-1]) if self.state.accepted else math.inf  # of the same minibatch
        self._accept_best(found, before)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _search(self, started: float) -> None:
        number = self.state.step - self.settings.rounds
        rng = np.random.default_rng([self.seed, 7, number])
        self.objective.turn_to(1 + number // self.settings.hold)
        current = self.state.history[-1].tokens
        base = self.objective(current)["objective"]
        places = self._ranked(current)
        found = []
        for _ in range(self.settings.tries):
            tokens, origin = self._changed(current, places, rng)
            if self.space.is_stable(tokens):
                found.append(self._try(tokens, origin, started))
        better = sorted((i for i in found if self._value(i) < base), key=self._value)
        swaps = [self.state.tried[i].tokens for i in better[:4] if self.state.tried[i].origin == "swap"]
        merged = _merge(current, swaps)
        if merged is not None and self.space.is_stable(merged):
            found.append(self._try(merged, "merge", started))
        self._accept_best(found, base)

    def _ranked(self, tokens: Tokens) -> torch.Tensor:
        """Choose per place the `top_k` allowed tokens that promise most, shape (len(tokens), top_k)."""
        change = self.objective.gradient(tokens)
        change[:, ~self.space.allowed.to(change.device)] = float("inf")
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

    def _try(self, tokens: Tokens, origin: Origin, started: float) -> int:
        """Try a text; return its place in `state.tried`."""
        text = self.space.text(tokens)
        parts = self.objective(tokens)
        objective, seconds = parts.pop("objective"), round(time.perf_counter() - started, 3)
        self.state.tried.append(Candidate(self.state.step, origin, text, tokens, objective, parts, {}, seconds))
        return len(self.state.tried) - 1

    def _score(self) -> None:
        """Add the scores of this step's texts."""
        tried = self.state.tried
        new = [place for place, c in enumerate(tried) if c.step == self.state.step]
        for place, scores in zip(new, self.scorer([tried[i].text for i in new]), strict=True):
            tried[place] = replace(tried[place], scores=dict(scores))

    def _value(self, place: int) -> float:
        return self.state.tried[place].objective

    def _accept_best(self, found: Sequence[int], before: float) -> None:
        """Go on from the best of some texts, if it is better than what there was."""
        place = min(found, key=self._value, default=None)
        if place is not None and self._value(place) < before:
            self.state.accepted.append(place)


def _merge(current: Tokens, others: Sequence[Tokens]) -> Tokens | None:
    """Merge the changes of several texts of one length; an earlier text wins a place. None where there is but one."""
    if len(others) < 2:
        return None
    merged = list(current)
    for other in reversed(others):
        for i, (a, b) in enumerate(zip(current, other, strict=True)):
            if a != b:
                merged[i] = b
    return tuple(merged)
