"""Samples from contrasted candidates with llama.cpp's own samplers.

The order of stages and their defaults are llama.cpp's (common/sampling.cpp): penalties, DRY, top-k, typical, top-p,
min-p, XTC, temperature, draw. The random draw at position i depends on (seed, i) and the candidates alone, so that no
draft changes a text: samplers with a random state (XTC, the draw) are made anew per position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from acd_local.options import Options
from acd_local.runtime import llama
from acd_local.runtime.llama import Logits, TokenIds


def position_seed(seed: int, position: int) -> int:
    """Derive a 32-bit seed for one position, by splitmix64; never LLAMA_DEFAULT_SEED, which means "random"."""
    mask = 2**64 - 1
    z = ((seed << 32) + position * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 32) % (2**32 - 1)


class TokenSampler:
    """Draws one token per position from a candidate list.

    Args:
        n_ctx: no text is longer than this many tokens; bounds the penalties' windows.
        history: tokens before the answer, for the penalties and DRY, as llama.cpp feeds its samplers the prompt;
            embedding rows (negative ids) are no tokens and are left out.

    Attributes:
        takes_best: whether a draw is the candidate of the highest score, whatever the others are.
        most: how many candidates, those of the highest scores, a draw looks at; None: all of them.
    """

    def __init__(
        self, vocab: llama.Vocab, options: Options, seed: int, history: Sequence[int] = (), *, n_ctx: int = 2**16
    ) -> None:
        self._options = options
        self._seed = seed
        self._candidates = llama.Candidates(vocab.n_tokens)
        self._penalties: list[llama.Sampler] = []
        self._mirostat: llama.Sampler | None = None
        o = options
        repeat_window, dry_window = min(o.repeat_last_n, n_ctx), min(o.dry_penalty_last_n, n_ctx)  # llama.cpp allocates
        if o.repeat_last_n and (o.repeat_penalty != 1 or o.frequency_penalty or o.presence_penalty):
            self._penalties.append(
                llama.penalties(
                    vocab.n_tokens, repeat_window, o.repeat_penalty, o.frequency_penalty, o.presence_penalty
                )
            )
        if o.dry_multiplier and o.dry_penalty_last_n:
            self._penalties.append(
                llama.dry(
                    vocab,
                    o.dry_multiplier,
                    o.dry_base,
                    o.dry_allowed_length,
                    dry_window,
                    o.dry_sequence_breakers,
                )
            )
        if o.mirostat:
            self._penalties.clear()  # llama.cpp's mirostat chains hold temperature and mirostat only
        if o.mirostat and o.temp > 0:
            self._mirostat = (
                llama.mirostat_v1(vocab.n_tokens, position_seed(seed, 0), o.mirostat_ent, o.mirostat_lr)
                if o.mirostat == 1
                else llama.mirostat_v2(position_seed(seed, 0), o.mirostat_ent, o.mirostat_lr)
            )
        truncation = [] if o.mirostat else _truncation(options)
        self._xtc = o.xtc_probability > 0 and not o.mirostat
        self.takes_best = o.temp == 0 and not (self._penalties or truncation or self._xtc)
        self.most = o.top_k if truncation and o.top_k and not self._penalties else None
        last = llama.temperature(o.temp) if o.temp > 0 else llama.greedy()
        self._last = [last] if self._xtc else []
        self._fixed = llama.chain(truncation if self._xtc else [*truncation, last])
        if self._penalties:
            for token in history:
                if token >= 0:
                    self.accept(token)

    def draw(self, ids: TokenIds, scores: Logits, position: int, *, dry_run: bool = False) -> int:
        """Draw one token out of `ids`, both arrays of shape (k,), k >= 1, for answer position `position` (from 0).

        With `dry_run` no sampler's state moves: for asking what another score vector would have drawn.
        """
        if len(ids) == 1 and self._mirostat is None:
            return int(ids[0])
        if self.takes_best:
            return int(ids[scores.argmax()])
        candidates = self._candidates
        candidates.fill(ids, scores)
        for sampler in self._penalties:
            candidates.apply(sampler)
        candidates.apply(self._fixed)
        for sampler in self._per_position(position, dry_run):
            candidates.apply(sampler)
        return candidates.selected()

    def accept(self, token: int) -> None:
        """Tell the samplers that remember (penalties, DRY) that `token` was said."""
        for sampler in self._penalties:
            sampler.accept(token)

    def _per_position(self, position: int, dry_run: bool) -> list[llama.Sampler]:
        o, seed = self._options, position_seed(self._seed, position)
        stages = list(self._last)
        if self._xtc:
            stages.insert(0, llama.xtc(o.xtc_probability, o.xtc_threshold, seed))
        if self._mirostat is not None:
            stages.append(self._mirostat.clone() if dry_run else self._mirostat)
        elif o.temp > 0:
            stages.append(llama.dist(seed))
        return stages


def _truncation(o: Options) -> list[llama.Sampler]:
    stages = []
    if o.temp == 0 and o.typical == 1 and o.xtc_probability == 0:
        return []  # the others never take the best token away
    if o.top_k > 0:
        stages.append(llama.top_k(o.top_k))
    if o.typical < 1:
        stages.append(llama.typical(o.typical))
    if o.top_p < 1:
        stages.append(llama.top_p(o.top_p))
    if o.min_p > 0:
        stages.append(llama.min_p(o.min_p))
    return stages


class Guard(Protocol):
    """Keeps only the tokens that an answer's grammar or schema allows next."""

    def restrict(self, logits: Logits, beta: float) -> Logits:
        """Return a copy, shape (n_vocab,), with -inf at every token that is illegal here.

        Tokens that cannot reach the plausible set, whatever is legal, may be set to -inf unasked.
        """

    def accept(self, token: int) -> None:
        """Go on behind a legal token that does not end the answer."""


class GrammarGuard:
    """Keeps only the tokens that a GBNF grammar allows next, before any contrast is taken."""

    # Logits this far under the best are looked at before the whole vocabulary is: that costs some 6 ms at 49k tokens.
    NEAR = 16.0

    def __init__(self, vocab: llama.Vocab, gbnf: str) -> None:
        self._sampler = llama.grammar(vocab, gbnf)
        self._candidates = llama.Candidates(vocab.n_tokens)

    def restrict(self, logits: Logits, beta: float) -> Logits:
        """Return a copy, shape (n_vocab,), with -inf at every token that is illegal here.

        Tokens that cannot reach the plausible set, whatever is legal, may be set to -inf unasked: the set over legal
        tokens is exact.
        """
        top = float(logits.max())
        if beta > 0 and math.isfinite(top):
            floor = np.float32(top - self.NEAR)
            near = np.flatnonzero(logits >= floor).astype(np.int32)
            restricted = self._keep_legal(logits, near)
            if float(restricted.max()) + math.log(beta) >= floor:
                return restricted
        return self._keep_legal(logits, np.flatnonzero(logits > -np.inf).astype(np.int32))

    def accept(self, token: int) -> None:
        self._sampler.accept(token)

    def _keep_legal(self, logits: Logits, ids: TokenIds) -> Logits:
        self._candidates.fill(ids, logits[ids])
        self._candidates.apply(self._sampler)
        restricted = np.full_like(logits, -np.inf)
        restricted[ids] = self._candidates.scores()
        return restricted
