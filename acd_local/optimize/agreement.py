"""Whether torch computes what llama.cpp does on the user's own file: transformers may leave something of it out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from acd_local.errors import ModelError
from acd_local.evaluate.likelihood import Scorer
from acd_local.optimize.weights import FrozenModel
from acd_local.runtime import llama

# Nats. The demo model is at 0.003 in float32 and at 0.005 in bfloat16, and at 0.6 with all rotary frequencies halved.
MOST = 0.1


def divergence(model: FrozenModel, file: llama.Model, tokens: Sequence[int], *, threads: int) -> float:
    """Mean over the positions of `tokens` of KL(llama.cpp || torch) between next-token distributions, nats.

    Raises:
        OutOfMemoryError.
    """
    with Scorer(file, n_streams=1, n_ctx=len(tokens) + 1, threads=threads) as scorer:
        pieces = [logits[0].copy() for _, logits in scorer.logits([tokens[:1]], tokens[1:])]
    with torch.no_grad():
        mine = model.logits(model.prefix(model.embed(tokens[:-1]).float()).hidden).log_softmax(1).cpu()
    wanted = torch.from_numpy(np.concatenate(pieces)).log_softmax(1)
    return float((wanted.exp() * (wanted - mine)).sum(1).mean())


def check(found: float, name: str) -> None:
    """Raises ModelError where a divergence is more than arithmetic explains, or is no number."""
    if not found <= MOST:
        raise ModelError(
            f"{name}: acd optimize cannot train this model: transformers reads its file otherwise than llama.cpp does "
            f"(their distributions differ by {found:.2g} nats a token)"
        )
