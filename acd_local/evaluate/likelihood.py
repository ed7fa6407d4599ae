"""How likely given texts are: log probabilities of continuations under several prompts, and under their contrast.

Every stream (one prompt setup of the same request) has a KV sequence of its own and is decoded by itself, in batches
that its own tokens alone decide: llama.cpp's logits differ slightly with the shape of a batch, and a score must be the
same bit for bit whatever was scored before it and beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import ContextError
from acd_local.runtime import llama
from acd_local.runtime.choice import ContrastSettings
from acd_local.runtime.contrast import check_finite, contrast, logprob
from acd_local.runtime.lifetime import Closing
from acd_local.runtime.prefixes import common_prefix
from acd_local.runtime.streams import Cache, runs

# Continuation rows per decode: bounds the memory for logits, streams x ROWS x n_vocab x 4 bytes.
ROWS = 32

Logits = NDArray[np.float32]
LogProbs = NDArray[np.float64]


class Scorer(Closing):
    """Teacher-forced logits of texts under up to `n_streams` prompts, in a context of its own.

    Args:
        n_streams: prompts per call at most.
        n_ctx: tokens that a prompt and its continuation may have.

    Raises:
        OutOfMemoryError.
    """

    def __init__(self, model: llama.Model, *, n_streams: int, n_ctx: int, threads: int) -> None:
        self._context = llama.Context(
            model, n_ctx=n_ctx, n_seq=n_streams, threads=threads, outputs=ROWS, together=False
        )
        self._caches = [Cache(self._context, seq, n_ctx) for seq in range(n_streams)]
        self._cuts = dict.fromkeys(self._caches, (0, 0))  # where the prompt that a cache begins with was cut in batches

    def logits(
        self, prompts: Sequence[Sequence[int]], continuation: Sequence[int], prefixes: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Logits]]:
        """Compute the logits that predict each token of `continuation` after each prompt, in pieces.

        Args:
            prefixes: how many tokens at each prompt's beginning are decoded apart, as other prompts share them. With
                these given, the logits depend on the prompt, its prefix and the continuation alone, bit for bit: what a
                cache holds already is kept where it was cut alike. None: goes on from the call before, whatever of it
                the prompts share.

        Yields:
            (start, logits), logits of shape (prompts, rows, n_vocab): row r predicts continuation[start + r].

        Raises:
            ContextError: prompt and continuation do not fit.
        """
        caches = self._caches[: len(prompts)]
        for cache, prompt in zip(caches, prompts, strict=True):
            if len(prompt) + len(continuation) > cache.n_ctx:
                raise ContextError(f"a prompt of {len(prompt)} tokens and its continuation exceed {cache.n_ctx} tokens")
        for i, (cache, prompt) in enumerate(zip(caches, prompts, strict=True)):
            self._hold(cache, prompt, None if prefixes is None else prefixes[i])
        for start in range(0, len(continuation), ROWS):
            end = min(start + ROWS, len(continuation))
            # The row that predicts token i is token i - 1's.
            known = continuation[max(0, start - 1) : end - 1]
            found = np.empty((len(prompts), end - start, self._context.model.n_vocab), np.float32)
            for logits, cache, prompt in zip(found, caches, prompts, strict=True):
                logits[:] = self._decode(cache, [*(prompt[-1:] if start == 0 else ()), *known])
            yield start, found

    def logprobs(
        self,
        prompts: Sequence[Sequence[int]],
        continuation: Sequence[int],
        mixes: Sequence[tuple[int, int | None, ContrastSettings]],
        prefixes: Sequence[int] | None = None,
    ) -> LogProbs:
        """Log probability of every token of `continuation`, nats, shape (mixes, tokens).

        Args:
            prompts: ids each, those of embedding rows included; they end in a token.
            mixes: (positive prompt, negative prompt, numbers), prompts by their index in `prompts`. The distribution is
                the contrast's without its plausibility mask, normalised over the vocabulary.
            prefixes: as in `logits`.
        """
        found = np.zeros((len(mixes), len(continuation)))
        for start, logits in self.logits(prompts, continuation, prefixes):
            for row in range(logits.shape[1]):
                position = start + row
                for m, (positive, negative, settings) in enumerate(mixes):
                    other = logits[negative, row] if negative is not None and settings.contrasts(position) else None
                    scores = contrasted(logits[positive, row], other, settings)
                    found[m, position] = logprob(scores, continuation[position])
        return found

    def close(self) -> None:
        self._context.close()

    def _hold(self, cache: Cache, prompt: Sequence[int], prefix: int | None) -> None:
        """Bring a cache to all of a prompt but its last token; with a prefix in two steps, the prefix and the rest."""
        end = len(prompt) - 1
        common, cuts = common_prefix(cache.tokens, prompt), self._cuts[cache]
        if prefix is None:
            kept = cache.rewind(min(common, end))
            self._cuts[cache] = cuts if cuts[1] <= kept else (0, 0)
        else:
            prefix = min(prefix, end)
            same = cuts[0] == prefix <= common
            kept = cache.rewind(0 if not same else end if cuts[1] == end <= common else prefix)
            self._cuts[cache] = prefix, end
        for step in (prefix or end, end):
            if kept < step:
                self._feed(cache, prompt[kept:step])
                kept = step

    def _feed(self, cache: Cache, tokens: Sequence[int]) -> None:
        """Decode rows whose logits nobody needs."""
        for run in runs(tokens):
            for at in range(0, len(run), self._context.n_batch):
                self._rows_in(cache, run[at : at + self._context.n_batch], outputs=0)

    def _decode(self, cache: Cache, tokens: Sequence[int]) -> llama.LogitsView:
        self._rows_in(cache, tokens, outputs=1)
        return self._context.logits(len(tokens))

    def _rows_in(self, cache: Cache, tokens: Sequence[int], *, outputs: int) -> None:
        n, at = len(tokens), len(cache.tokens)
        try:
            self._context.decode(tokens, [cache.seq] * n, range(at, at + n), [outputs] * n)
        except BaseException:
            cache.clear()
            raise
        cache.tokens.extend(tokens)


def contrasted(safe: Logits, adversarial: Logits | None, settings: ContrastSettings) -> Logits:
    """Compute unmasked scores over the whole vocabulary, shape (n_vocab,): see `runtime.contrast.contrast`.

    Tokens that either stream holds impossible are at -inf, as they are no candidates in decoding.

    Raises:
        NumericalError: a stream produced NaN, or alpha is too large for a finite score.
    """
    if adversarial is None:
        check_finite(safe, None)
        return safe
    ids, scores = contrast(safe, adversarial, alpha=settings.alpha, beta=0.0, raw=settings.raw)
    found = np.full(len(safe), -np.inf, np.float32)
    found[ids] = scores
    return found
