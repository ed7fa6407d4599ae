"""Contrasts the two streams: which tokens may be said, and their scores. Pure numpy.

Source: logit_ACD = logit_S - alpha * logit_A (Zhao et al. 2024, arXiv 2406.16743), taken over the plausible tokens
p_S >= beta * max p_S (Li et al. 2023, Contrastive Decoding, equation 4).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from acd_local.errors import NumericalError
from acd_local.options import check_alpha_beta

MAX_DIVISOR_ALPHA = 0.9

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int32]


def contrast(
    safe: Logits, adversarial: Logits | None, *, alpha: float, beta: float, raw: bool = False
) -> tuple[TokenIds, Logits]:
    """Compute the candidates of the next token and their contrasted scores.

    scores = (logit_S - alpha * logit_A) / (1 - min(alpha, 0.9)) over the tokens with p_S >= beta * max p_S. Without the
    divisor the scores would be flatter by (1 - alpha) wherever the streams agree, and the temperature would not mean
    what it says; `raw` leaves it out (with beta 0 that is the paper's plain formula).

    Args:
        safe: logits of the safe stream, shape (n_vocab,); -inf marks tokens that must not be said.
        adversarial: logits of the adversarial stream, shape (n_vocab,); not read where alpha is 0.
        alpha: finite, >= 0.
        beta: in [0, 1].

    Returns:
        ids, shape (k,), ascending, and scores, shape (k,), float32. Tokens that are implausible, illegal (-inf in
        `safe`) or impossible for the adversary (-inf there) are absent, not -inf. k is 0 only if no token is legal.

    Raises:
        UsageError: alpha or beta is out of range.
        NumericalError: a logit is NaN or +inf, or no plausible token has a finite score.
    """
    check_alpha_beta(alpha, beta)
    check_finite(safe, adversarial if alpha > 0 else None)
    ids, scores = plausible(safe, beta)
    if alpha == 0 or len(ids) == 0:
        return ids, scores
    if adversarial is None:
        raise ValueError("alpha > 0 needs the adversarial stream's logits")
    return apply_contrast(ids, scores, adversarial, alpha=alpha, raw=raw)


def plausible(safe: Logits, beta: float) -> tuple[TokenIds, Logits]:
    """Find the tokens with p_S >= beta * max p_S, that is logit_S >= max + ln beta, and their logits; none at -inf.

    This is the contrast with alpha 0; `apply_contrast` takes it further. Neither looks for NaN: `check_finite` first.

    Returns:
        ids, shape (k,), ascending, and logits, shape (k,).
    """
    top = float(safe.max())
    if top == -math.inf:
        return np.empty(0, np.int32), np.empty(0, np.float32)
    mask = safe >= np.float32(top + math.log(beta)) if beta > 0 else safe > -np.inf
    ids = mask.nonzero()[0].astype(np.int32)
    return ids, safe[ids]


def apply_contrast(
    ids: TokenIds, safe_logits: Logits, adversarial: Logits, *, alpha: float, raw: bool = False
) -> tuple[TokenIds, Logits]:
    """Contrast plausible tokens, both of shape (k,), with the adversarial stream's logits, shape (n_vocab,).

    Raises:
        NumericalError: no token has a finite score.
    """
    divisor = 1.0 if raw else 1.0 - min(alpha, MAX_DIVISOR_ALPHA)
    with np.errstate(over="ignore", invalid="ignore"):
        scores: Logits = ((safe_logits - np.float64(alpha) * adversarial[ids]) / divisor).astype(np.float32)
    if not np.isfinite(scores).all():
        possible = adversarial[ids] > -np.inf
        ids, scores = ids[possible], scores[possible]
        if len(ids) == 0 or not np.isfinite(scores).all():
            raise NumericalError(f"the contrast with alpha {alpha:g} leaves no token with a finite score")
    return ids, scores


class Divergence:
    """KL(S || A) in nats between the two streams' next-token distributions; keeps its scratch memory between calls."""

    def __init__(self, n_vocab: int) -> None:
        self._safe = np.empty(n_vocab, np.float32)
        self._adversarial = np.empty(n_vocab, np.float32)
        self._gap = np.empty(n_vocab, np.float32)
        self._ones = np.ones(n_vocab, np.float32)

    def __call__(self, safe: Logits, adversarial: Logits) -> float:
        """Compute it from both streams' logits, each of shape (n_vocab,).

        A token at -inf in the safe stream adds nothing; one at -inf in the adversarial stream alone makes it infinite.
        """
        s, a, gap = self._safe, self._adversarial, self._gap
        np.subtract(safe, safe.max(), out=s)
        np.subtract(adversarial, adversarial.max(), out=a)
        with np.errstate(invalid="ignore"):  # inf - inf and 0 * inf: tokens that the safe stream excludes
            np.subtract(s, a, out=gap)
            np.exp(s, out=s)
            np.exp(a, out=a)
            total, other_total = float(np.dot(s, self._ones)), float(np.dot(a, self._ones))  # faster than sum()
            mean_gap = float(np.dot(s, gap)) / total
        if math.isnan(mean_gap):
            gap[s == 0] = 0.0
            mean_gap = float(np.dot(s, gap)) / total
        return max(0.0, mean_gap - math.log(total) + math.log(other_total))


def check_finite(safe: Logits, adversarial: Logits | None) -> None:
    """Look at everything a model produced, before any token is set aside.

    Raises:
        NumericalError: a logit is NaN or +inf.
    """
    check_stream(safe, "safe")
    if adversarial is not None:
        check_stream(adversarial, "adversarial")


def check_stream(logits: Logits, stream: str) -> float:
    """Return the largest logit of one stream; refuse NaN in it, which the error names."""
    top = float(logits.max())  # passes NaN on: one pass finds both
    if math.isnan(top) or top == math.inf:
        raise NumericalError(f"the {stream} stream produced {top} logits: the model file is damaged or badly quantized")
    return top


# --- Log probabilities ------------------------------------------------------------------------------------------------


def logprob(logits: Logits, token: int) -> float:
    """Log probability of one token under logits of shape (n_vocab,), nats."""
    top = float(logits.max())
    return float(logits[token]) - top - float(np.log(np.exp(logits - top).sum(dtype=np.float64)))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Log probabilities of all tokens, the last axis, in double precision; nats."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
