"""The paper's losses (arXiv 2406.16743, Opposite Prompt Optimization), over a batch of one set's pairs.

    L_p = -E_{D+} log P(y_t | z, x, y_<t)         what the prompt is to bring about
    L_n = -E_{D-} log(1 - P(y_t | z, x, y_<t))    what it is to keep away (unlikelihood)
    L_r = -E_{D_S} log P(y_t | z, x, y_<t)        harmless requests stay answered

For the safeguarding prompt D+ is D_HR and D- is D_HA, for the adversarial prompt the other way round. t runs over the
answer's tokens.
"""

from __future__ import annotations

from typing import Literal

import torch

Term = Literal["positive", "negative", "retain"]

# log P is kept this far below 0 where its complement is taken: at P = 1 the unlikelihood and its gradient are infinite.
MAX_LOG_P = -1e-4


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log P of the given tokens, shape (n,), from logits of shape (n, n_vocab)."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


def term_loss(term: Term, log_probs: torch.Tensor) -> torch.Tensor:
    """Sum of one term over the answers' tokens, from their log P of shape (n,); divide by n for the paper's mean."""
    if term == "negative":
        return -torch.log(-torch.expm1(log_probs.clamp(max=MAX_LOG_P))).sum()
    return -log_probs.sum()
