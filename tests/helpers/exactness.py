"""Whether every token of a finished text is the loop's own choice, by logits that are computed anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from acd_local.answers import Answer
from acd_local.engine import Engine
from acd_local.options import Options
from acd_local.runtime import grammar, llama
from acd_local.runtime.contrast import contrast
from acd_local.runtime.sampling import TokenSampler
from acd_local.runtime.template import Message

# How far logits are moved until the choice is the token that was said.
ANY = 60  # tries of any signs
PLACES = 16  # that the token is put at, among those near it
NEAR = 6.0  # logits below the safe stream's best one: tokens farther down are not put at other places
STEPS = (0.0, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.4, 0.5, 0.6)
SHAPES = (1, 5)  # rows of a batch


def text_logits(
    model: llama.Model, prompt: Sequence[int], said: Sequence[int], kv_type: str, rows: int | None = None
) -> np.ndarray:
    """Logits that predict each token of `said`; shape (len(said), n_vocab).

    Args:
        rows: of a batch behind the prompt; without, one pass over the whole text.
    """
    tokens, first, found = [*prompt, *said[:-1]], len(prompt) - 1, []
    with llama.Context(model, n_ctx=len(tokens) + 1, n_seq=1, outputs=len(said), kv_type=kv_type) as context:
        start = 0
        while start < len(tokens):
            end = start + context.n_batch
            if rows is not None:
                end = min(end, len(prompt)) if start < len(prompt) else start + rows
            part = tokens[start:end]
            positions = list(range(start, start + len(part)))
            wanted = [int(p >= first) for p in positions]
            context.decode(part, [0] * len(part), positions, wanted)
            if any(wanted):
                found.append(context.logits(sum(wanted)).copy())
            start += len(part)
    return np.concatenate(found)


def near_tie(engine: Engine, prompt: str, options: Options, answer: Answer, kv_type: str = "f16") -> float:
    """The widest of `near_ties`."""
    return max(near_ties(engine, prompt, options, answer, kv_type))


def near_ties(
    engine: Engine,
    prompt: str,
    options: Options,
    answer: Answer,
    kv_type: str = "f16",
    allowed: Sequence[float] | None = None,
) -> list[float]:
    """By how much logits of both streams have to be moved for each token to be the choice; 0: it is as they stand.

    The draw is made again with the seed and the position. Not for mirostat, whose state depends on what was drawn.

    Args:
        allowed: for each token a move that is tried beside STEPS.
    """
    said, prompts = _said(answer), _prompts(engine, prompt)
    safe, adversarial = (text_logits(engine.decoder.model, ids, said, kv_type) for ids in prompts)
    choices = _Choices(engine, options, answer, prompts[0])
    found = []
    for position, token in enumerate(said):
        steps = sorted({*STEPS, *([] if allowed is None else [allowed[position]])})
        found.append(choices.distance(safe[position], adversarial[position], position, token, steps))
        choices.accept(token)
    return found


def variation(engine: Engine, prompt: str, answer: Answer, kv_type: str = "f16") -> list[float]:
    """By how much the logits at each token vary with the shape of batches: one pass against SHAPES.

    Of either stream, among tokens near the best one: half of the widest change of one against another.
    """
    said = _said(answer)
    found = np.zeros(len(said))
    for ids in _prompts(engine, prompt):
        whole = text_logits(engine.decoder.model, ids, said, kv_type)
        far = whole < whole.max(1, keepdims=True) - NEAR
        for rows in SHAPES:
            moved = text_logits(engine.decoder.model, ids, said, kv_type, rows) - whole
            widest = np.where(far, -np.inf, moved).max(1) - np.where(far, np.inf, moved).min(1)
            found = np.maximum(found, widest / 2)
    return [float(value) for value in found]


def _said(answer: Answer) -> list[int]:
    return [record.token for record in answer.tokens]


def _prompts(engine: Engine, prompt: str) -> list[list[int]]:
    """Of the safe and of the adversarial stream."""
    texts = (engine.pair.safe, engine.pair.adversarial.reveal_for_negative_stream())
    return [list(engine.template.encode([Message("system", text), Message("user", prompt)])) for text in texts]


class _Choices:
    """The definition of the choice, led along a text that was said."""

    def __init__(self, engine: Engine, options: Options, answer: Answer, prompt: Sequence[int]) -> None:
        self._contrast, self._window = answer.contrast, options.window
        self._special = engine.special_tokens
        self._sampler = TokenSampler(engine.vocab, options, answer.seed, prompt, n_ctx=engine.n_ctx)
        self._grammar = grammar.from_options(options, engine.vocab, engine.info.path)

    def accept(self, token: int) -> None:
        self._sampler.accept(token)
        if self._grammar is not None and token not in self._special.eog:
            self._grammar.accept(token)

    def distance(
        self, safe: np.ndarray, adversarial: np.ndarray, position: int, token: int, steps: Sequence[float]
    ) -> float:
        for step in steps:
            ways = self._ways(safe, adversarial, token, step) if step else [(np.zeros_like(safe),) * 2]
            for one, other in ways:
                if self._draw(safe + step * one, adversarial + step * other, position) == token:
                    return step
        return float("inf")

    def _ways(
        self, safe: np.ndarray, adversarial: np.ndarray, token: int, step: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where both streams' logits are moved to, each from -1 to 1.

        First signs: the token against the others, those before it in either order against those behind it, and any.
        llama.cpp draws along the sorted list: where tokens are nearly tied, their places in it may be exchanged, which
        moves others as well. So last, as many of those near the token before it as one likes.
        """
        alpha = self._contrast.alpha
        scores, ids = safe - alpha * adversarial, np.arange(len(safe))
        for before in (scores > scores[token], ids < token):
            for near, far in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
                for own in (1, -1):
                    way = np.where(before, near, far).astype(np.float32)
                    way[token] = own
                    yield way, -way
        signs = np.random.default_rng(token)
        for _ in range(ANY):
            way = signs.choice(np.array([-1, 1], np.float32), len(safe))
            yield way, -way
        gap = scores - scores[token]
        close = np.flatnonzero((abs(gap) <= 2 * step * (1 + alpha)) & (safe >= safe.max() - NEAR) & (ids != token))
        close = close[np.argsort(-gap[close], kind="stable")]
        for many in np.unique(np.linspace(0, len(close), PLACES).astype(int)):
            for ahead, own in itertools.product((-1, 0, 1), (-1, 0, 1)):
                one = np.where(gap > 0, ahead, 0).astype(np.float32)
                other = -one
                one[close], other[close] = np.where(np.arange(len(close)) < many, 1, -1) * np.array([[1], [-1]])
                one[token], other[token] = 1, own
                yield one, other

    def _draw(self, safe: np.ndarray, adversarial: np.ndarray, position: int) -> int | None:
        c = self._contrast
        alpha = c.alpha if self._window is None or position < self._window else 0.0
        safe[self._special.banned] = -np.inf
        legal = safe if self._grammar is None else self._grammar.restrict(safe, c.beta)
        ids, scores = contrast(legal, adversarial, alpha=alpha, beta=c.beta, raw=c.raw)
        return self._sampler.draw(ids, scores, position, dry_run=True) if len(ids) else None
