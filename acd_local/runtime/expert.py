"""Leads a stream by an expert's, as SafeDecoding does at an answer's first tokens. Pure numpy.

Source: P = p_base + alpha * (p_expert - p_base) over the tokens that both find likely (Xu et al., ACL 2024,
arXiv 2402.08983, sections 3 and 4.2). The expert is sampled from: it must never be an adversarial prompt's stream.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from acd_local.runtime.contrast import Logits, TokenIds, log_softmax

COMMON = 5  # tokens at least that both find likely: the paper's c


def led(ids: TokenIds, base: Logits, expert: Logits, *, alpha: float) -> tuple[TokenIds, Logits]:
    """Compute the candidates of the next token and their scores, natural logarithms of what P is, up to a constant.

    The candidates are the common part of both streams' k likeliest tokens, k the least with which it has COMMON, or
    all there are. Those at which P is not above 0 are left out; where it is above 0 nowhere, the highest alone is left.

    Args:
        ids: legal tokens, shape (n,), ascending.
        base: logits of these, shape (n,), finite.
        expert: logits of the whole vocabulary, shape (n_vocab,).
        alpha: finite, >= 0.

    Returns:
        ids, shape (k,), ascending, and scores, shape (k,), float32; k is 0 only if n is.
    """
    if len(ids) == 0:
        return ids, base
    others = expert[ids]
    worst = np.maximum(_ranks(base), _ranks(others))
    kept = worst <= np.partition(worst, min(COMMON, len(ids)) - 1)[min(COMMON, len(ids)) - 1]
    chances = np.exp(log_softmax(base))[kept]
    chances += alpha * (np.exp(log_softmax(others))[kept] - chances)
    found = ids[kept]
    possible = chances > 0
    if not possible.any():
        best = int(chances.argmax())
        return found[best : best + 1], np.zeros(1, np.float32)
    return found[possible], np.log(chances[possible]).astype(np.float32)


def _ranks(logits: Logits) -> NDArray[np.int64]:
    """Count the tokens that come before each, the lower id first where logits are equal; shape as given."""
    found = np.empty(len(logits), np.int64)
    found[np.argsort(-logits, kind="stable")] = np.arange(len(logits))
    return found
