"""Reads the anchors and the model's own answers, and trains a gate's two probes on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from acd_local.errors import ModelError
from acd_local.fit import thresholds
from acd_local.fit.context import FitContext
from acd_local.fit.gate_training import Rows, Trained, train
from acd_local.fit.replies import Style, named
from acd_local.fit.states import Floats, layers_of
from acd_local.gating import LOOKED_AT
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning.anchors import KINDS, Instruction
from acd_local.tuning.cache import key_of

LOOK = 64  # answer tokens between two looks: at 32 they cost 8% of the time per token, here 3%
LOOKS = {"harmful": 120, "ordinary": 80, "lookalike": 80}  # instructions whose answers the second look learns from
FIRST_LOOK = 16  # tokens where the stretches begin to end that are learned from: before that, answers are much alike
WORTHWHILE = 0.1  # stretches of complying answers to harm that turn, for answers to be read at all


@dataclass(frozen=True, eq=False)
class GateResult:
    """The probe of requests.

    Attributes:
        layer: that it reads.
        chances: of harm, by instruction, from probes that did not see it.
    """

    trained: Trained
    layer: int
    chances: dict[str, float]


@dataclass(frozen=True, eq=False)
class LookResult:
    """The probe of answers, None where they are not read, and the chance from which on an answer turns."""

    trained: Trained | None = None
    threshold: float = 1.0


def train_gate(context: FitContext, base: str | None) -> tuple[GateResult, str]:
    """Train the probe of requests, read under `base`."""
    instructions, layers = context.instructions(), layers_of(context.job.info.n_layers)
    key = key_of({"base": base, "layers": layers, "ids": [i.id for i in instructions], "how": "mean of the tail"})
    start = context.model.start(base)
    states = context.states(
        f"states-{key[:16]}.f32",
        instructions,
        lambda i: (context.model.prompt(base, i.prompt), start),
        layers,
        "reading anchors",
    )
    context.listener.phase("training the gate")
    trained = train(_finite(states), Rows.of(instructions))
    layer = layers[trained.column]
    chances = {i.id: float(p) for i, p in zip(instructions, trained.probabilities, strict=True)}
    context.tables["layers"] = [{"layer": n, "area": area} for n, area in zip(layers, trained.by_layer, strict=True)]
    areas = " and ".join(f"{area:.3f} against {named(kind)}" for kind, area in trained.areas.items())
    said = f"{len(instructions)} anchors read, layer {layer}, area under the curve {areas}"
    return GateResult(trained, layer, chances), said


def train_second_look(context: FitContext, base: str | None, layer: int) -> tuple[LookResult, str]:
    """Train the probe of answers on the model's own answers to harmful and to harmless instructions."""
    groups = context.of(LOOKS, validates=False)
    measured = context.measure(Style(PromptSetup(base)), groups, "second look")
    rows = [
        (i, reply.tokens[:end])  # one behind the other, so that a reader goes on
        for kind in KINDS
        for i, reply in zip(groups[kind], measured.replies[kind], strict=True)
        for end in range(FIRST_LOOK, LOOK + 1, LOOKED_AT)
        if reply.label == "answer" and len(reply.tokens) >= end
    ]
    if min(len({i.id for i, _ in rows if i.kind == kind}) for kind in ("harmful", "harmless")) < 10:
        return LookResult(), "too few answers to learn from: answers are not read"
    what = {"base": base, "layers": (layer,), "tokens": LOOKED_AT}
    key = key_of(what | {"rows": [[i.id, list(t)] for i, t in rows]})

    def locate(row: tuple[Instruction, tuple[int, ...]]) -> tuple[list[int], int]:
        prompt = context.model.prompt(base, row[0].prompt)
        return [*prompt, *row[1]], len(prompt) + len(row[1]) - LOOKED_AT

    states = context.states(f"answers-{key[:16]}.f32", rows, locate, (layer,), "reading answers")
    kinds = Rows.of([i for i, _ in rows])
    trained = train(_finite(states), kinds)
    area = float(np.mean(list(trained.areas.values())))
    threshold = thresholds.answer_threshold(trained.probabilities[~kinds.harmful])
    caught = thresholds.share(trained.probabilities[kinds.harmful] >= threshold)
    context.figures["second_look"] = {"auc": round(area, 4), "caught": round(caught, 4), "stretches": len(rows)}
    told = f"area under the curve {area:.3f}, {caught:.0%} of stretches of answers to harm are told"
    if caught < WORTHWHILE:
        return LookResult(), f"{told}: answers are not read"
    return LookResult(trained, round(threshold, 4)), told


def _finite(states: Floats) -> Floats:
    if not np.isfinite(states).all():
        raise ModelError("the model's hidden states hold values that are not finite: it cannot be given a gate")
    return states
