"""Computes the paper's losses (arXiv 2406.16743, Opposite Prompt Optimization), over a batch of one set's pairs.

    L_p = -E_{D+} log P(y_t | z, x, y_<t)         what the prompt is to bring about
    L_n = -E_{D-} log(1 - P(y_t | z, x, y_<t))    what it is to keep away (unlikelihood)
    L_r = -E_{D_S} log P(y_t | z, x, y_<t)        harmless requests stay answered

For the safeguarding prompt D+ is D_HR and D- is D_HA, for the adversarial prompt the other way round. Expectations are
over the sets' pairs, and summed over the answer's tokens t: how a long answer opens counts as much as a short one's.

The expectation over y_t can be taken in full where the distribution that y_t was drawn from is known (`Targets`): over
all draws the losses have the same mean, and their gradients less noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Term = Literal["positive", "negative", "retain"]

# log P is kept this far below 0 where its complement is taken: at P = 1 the unlikelihood and its gradient are infinite.
MAX_LOG_P = -1e-4


@dataclass(frozen=True)
class Targets:
    """The distributions that an answer's n tokens were drawn from.

    Attributes:
        tokens: the k candidates, int64, shape (n, k).
        weights: their probabilities, shape (n, k); each row sums to 1.
    """

    tokens: torch.Tensor
    weights: torch.Tensor


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Compute log P of tokens, shape (n,) or (n, k) like theirs, from logits of shape (n, n_vocab)."""
    found = logits.gather(1, tokens.reshape(len(tokens), -1)) - logits.logsumexp(1, keepdim=True)
    return found.reshape(tokens.shape)


def term_loss(term: Term, log_probs: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Sum of one term over the answers' tokens; divide by the number of answers for the expectation.

    Args:
        log_probs: of the tokens, shape (n,), or of all candidates, shape (n, k).
        weights: of the candidates, shape (n, k).
    """
    loss = -torch.log(-torch.expm1(log_probs.clamp(max=MAX_LOG_P))) if term == "negative" else -log_probs
    return (loss if weights is None else weights * loss).sum()
