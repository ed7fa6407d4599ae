"""Extracts safety steering vectors, and chooses their strength, for InferAligner as a method of `acd eval`.

Source: Wang et al. 2024, arXiv 2401.11206: the mean hidden state of harmful requests at their last token minus that of
harmless ones. The paper reads them in an aligned model of the same family, here it is the model itself, as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from acd_local.errors import ModelError
from acd_local.fit.context import FitContext
from acd_local.fit.replies import Style
from acd_local.steering import Steering, Vectors
from acd_local.tuning.anchors import Instruction
from acd_local.tuning.cache import key_of

READ = 64  # instructions of each kind that the means are taken over
TRIED = 16  # harmful instructions that are answered at each strength
STRENGTHS = (0.12, 0.25, 0.5, 0.75, 1.0)  # what the differences are multiplied by
DEPTHS = (0.3, 0.7)  # parts of the depth between which layers are steered


def extract(context: FitContext) -> tuple[Steering | None, str]:
    """Make the vectors at the strength at which most harmful requests are declined, broken answers set against them.

    Returns:
        None where llama.cpp cannot steer the model.
    """
    info = context.job.info
    layers = range(1, info.n_layers - 1)  # that can be both read and steered
    if not layers:
        return None, "the model has too few layers"
    unit = np.zeros((info.n_layers - 1, info.n_embd), np.float32)
    try:
        for layer, row in zip(layers, _difference(context, layers), strict=True):
            unit[layer - 1] = row if DEPTHS[0] * info.n_layers <= layer <= DEPTHS[1] * info.n_layers else 0
        return _strongest(context, unit)
    except ModelError as error:
        return None, str(error)


def _strongest(context: FitContext, unit: Vectors) -> tuple[Steering, str]:
    """Try all strengths of the difference on harmful instructions; of equals the least is taken."""
    asked = context.of({"harmful": TRIED}, validates=True)
    tried = []
    for strength in STRENGTHS:
        steering = Steering(strength * unit, **Steering.fields_of(context.job.info))
        style = Style(declines=True, apart=steering)
        replies = context.measure(style, asked, f"steering, strength {strength:g}").replies["harmful"]
        refused, broken = (sum(r.label == label for r in replies) / len(replies) for label in ("refusal", "degenerate"))
        tried.append((refused - broken, -strength, refused, broken, steering))
    _, less, refused, broken, best = max(tried, key=lambda row: row[:2])
    found = {"strength": -less, "refused": round(refused, 4), "broken": round(broken, 4), "n": len(asked["harmful"])}
    context.figures["steering"] = found
    return best, f"strength {-less:g}, {refused:.0%} of harmful requests refused, {broken:.0%} broken"


def _difference(context: FitContext, layers: Sequence[int]) -> Vectors:
    """Compute the mean last state of harmful minus that of ordinary requests, shape (layers, n_embd)."""
    groups = context.of({"harmful": READ, "ordinary": READ}, validates=False)
    rows = [instruction for group in groups.values() for instruction in group]
    key = key_of({"ids": [i.id for i in rows], "how": "last token"})

    def locate(instruction: Instruction) -> tuple[list[int], int]:
        tokens = context.model.prompt(None, instruction.prompt)
        return tokens, len(tokens) - 1

    states = context.states(f"last-{key[:16]}.f32", rows, locate, layers, "reading for steering")
    if not np.isfinite(states).all():
        raise ModelError("the model's hidden states hold values that are not finite: it cannot be steered")
    harmful = len(groups["harmful"])
    found: Vectors = states[:harmful].mean(axis=0) - states[harmful:].mean(axis=0)
    return found
