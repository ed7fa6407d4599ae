"""How likely given texts are: log probabilities of continuations under several prompts, and under their contrast.

Every stream (one framing of the same request) has a KV sequence of its own; a continuation's rows are decoded in all
streams at once, so that methods that share a prompt share its cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import ContextError, NumericalError
from acd_local.runtime import llama
from acd_local.runtime.choice import ContrastSettings
from acd_local.runtime.contrast import MAX_DIVISOR_ALPHA, check_finite
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.streams import Cache, runs

# Continuation rows per stream and decode: bounds the memory for logits, streams x ROWS x n_vocab x 4 bytes.
ROWS = 16

Logits = NDArray[np.float32]
LogProbs = NDArray[np.float64]


class Scorer:
    """Teacher-forced logits of texts under up to `n_streams` prompts, in a context of its own.

    Args:
        n_streams: prompts per call at most.
        n_ctx: tokens that a prompt and its continuation may have.

    Raises:
        OutOfMemoryError.
    """

    def __init__(self, model: llama.Model, *, n_streams: int, n_ctx: int, threads: int) -> None:
        self._rows = max(1, min(ROWS, llama.BATCH_ROWS // n_streams))
        self._context = llama.Context(model, n_ctx=n_ctx, n_seq=n_streams, threads=threads, outputs=self._rows)
        self._caches = [Cache(self._context, seq, n_ctx) for seq in range(n_streams)]

    def logits(self, prompts: Sequence[Sequence[int]], continuation: Sequence[int]) -> Iterator[tuple[int, Logits]]:
        """The logits that predict each token of `continuation` after each prompt, in pieces.

        Yields:
            (start, logits), logits of shape (prompts, rows, n_vocab): row r predicts continuation[start + r]. They are
            llama.cpp's own memory: use them before the next piece is asked for.

        Raises:
            ContextError: prompt and continuation do not fit.
        """
        caches = self._caches[: len(prompts)]
        for cache, prompt in zip(caches, prompts, strict=True):
            if len(prompt) + len(continuation) > cache.n_ctx:
                raise ContextError(f"a prompt of {len(prompt)} tokens and its continuation exceed {cache.n_ctx} tokens")
            cache.rewind(min(common_prefix(cache.tokens, prompt), len(prompt) - 1))
        self._feed([(cache, prompt[len(cache.tokens) : -1]) for cache, prompt in zip(caches, prompts, strict=True)])
        for start in range(0, len(continuation), self._rows):
            end = min(start + self._rows, len(continuation))
            # The row that predicts token i is token i - 1's.
            work = [
                (cache, [*(prompt[-1:] if start == 0 else ()), *continuation[max(0, start - 1) : end - 1]])
                for cache, prompt in zip(caches, prompts, strict=True)
            ]
            yield start, self._decode(work).reshape(len(prompts), end - start, -1)

    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuation: Sequence[int],
        mixes: Sequence[tuple[int, int | None, ContrastSettings]],
    ) -> LogProbs:
        """Log probability of every token of `continuation`, nats, shape (mixes, tokens).

        Args:
            prompts: ids each, those of embedding rows included; they end in a token.
            mixes: (positive prompt, negative prompt, numbers), prompts by their index in `prompts`. The distribution is
                the contrast's without its plausibility mask, normalised over the vocabulary.
        """
        found = np.zeros((len(mixes), len(continuation)))
        for start, logits in self.logits(prompts, continuation):
            for row in range(logits.shape[1]):
                position = start + row
                for m, (positive, negative, settings) in enumerate(mixes):
                    other = logits[negative, row] if negative is not None and settings.contrasts(position) else None
                    scores = contrasted(logits[positive, row], other, settings)
                    found[m, position] = log_softmax(scores, continuation[position])
        return found

    def close(self) -> None:
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _feed(self, work: Sequence[tuple[Cache, Sequence[int]]]) -> None:
        """Decode rows whose logits nobody needs."""
        for cache, tokens in work:
            for run in runs(tokens):
                for at in range(0, len(run), self._context.n_batch):
                    self._rows_in([(cache, run[at : at + self._context.n_batch])], outputs=0)

    def _decode(self, work: Sequence[tuple[Cache, list[int]]]) -> Logits:
        self._rows_in(work, outputs=1)
        return self._context.logits(sum(len(tokens) for _, tokens in work))

    def _rows_in(self, work: Sequence[tuple[Cache, list[int]]], *, outputs: int) -> None:
        tokens = [token for _, part in work for token in part]
        seqs = [cache.seq for cache, part in work for _ in part]
        positions = [len(cache.tokens) + i for cache, part in work for i in range(len(part))]
        try:
            self._context.decode(tokens, seqs, positions, [outputs] * len(tokens))
        except BaseException:
            for cache in self._caches:
                cache.clear()
            raise
        for cache, part in work:
            cache.tokens.extend(part)


def contrasted(safe: Logits, adversarial: Logits | None, settings: ContrastSettings) -> Logits:
    """Unmasked scores over the whole vocabulary, shape (n_vocab,): see `runtime.contrast.contrast`.

    Tokens that either stream holds impossible are at -inf, as they are no candidates in decoding.

    Raises:
        NumericalError: a stream produced NaN, or alpha is too large for a finite score.
    """
    check_finite(safe, adversarial)
    if adversarial is None:
        return safe
    divisor = 1.0 if settings.raw else 1.0 - min(settings.alpha, MAX_DIVISOR_ALPHA)
    with np.errstate(over="ignore", invalid="ignore"):
        scores: Logits = ((safe - np.float64(settings.alpha) * adversarial) / divisor).astype(np.float32)
    if not np.isfinite(scores).all():
        scores[(safe == -np.inf) | (adversarial == -np.inf)] = -np.inf
        if np.isnan(scores).any() or not np.isfinite(scores.max()):
            raise NumericalError(f"the contrast with alpha {settings.alpha:g} leaves no token with a finite score")
    return scores


def log_softmax(scores: Logits, token: int) -> float:
    """Log probability of one token under scores of shape (n_vocab,), nats."""
    top = float(scores.max())
    return float(scores[token]) - top - float(np.log(np.exp(scores - top).sum(dtype=np.float64)))
