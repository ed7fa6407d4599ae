"""Reads the anchors and the model's own answers, and trains a gate's two probes on them."""

from __future__ import annotations

import numpy as np

from acd_local.errors import ModelError
from acd_local.fit import choose
from acd_local.fit.answers import Style
from acd_local.fit.found import LOOK, Found, named
from acd_local.fit.lab import Lab
from acd_local.fit.states import Floats, layers_of
from acd_local.fit.training import Rows, train
from acd_local.gating import LOOKED_AT
from acd_local.tuning.anchors import KINDS, Instruction
from acd_local.tuning.cache import key_of
from acd_local.tuning.progress import Clock

LOOKS = {"harmful": 120, "ordinary": 80, "lookalike": 80}  # instructions whose answers the second look learns from
FIRST_LOOK = 16  # tokens where the stretches begin to end that are learned from: before that, answers are much alike
WORTHWHILE = 0.1  # stretches of complying answers to harm that turn, for answers to be read at all


def gate(lab: Lab, found: Found) -> str:
    instructions, base = lab.instructions(), found.base
    layers = layers_of(lab.job.info.n_layers)
    key = key_of({"base": base, "layers": layers, "ids": [i.id for i in instructions], "how": "mean of the tail"})
    start = lab.bench.start(base)
    clock = Clock("reading anchors", 0, len(instructions), lab.listener)
    states = lab.bench.states(
        lab.job.folder / f"states-{key[:16]}.f32",
        instructions,
        lambda i: (lab.bench.prompt(base, i.prompt), start),
        layers,
        clock.at,
    )
    lab.listener.phase("training the gate")
    rows = Rows.of(instructions)
    trained = train(_finite(states), rows)
    found.gate = trained
    found.layers = (layers[trained.column],)
    found.chances = {i.id: float(p) for i, p in zip(instructions, trained.probabilities, strict=True)}
    found.tables["layers"] = [
        {"layer": layer, "area": area} for layer, area in zip(layers, trained.by_layer, strict=True)
    ]
    areas = " and ".join(f"{area:.3f} against {named(kind)}" for kind, area in trained.areas.items())
    return f"{len(instructions)} anchors read, layer {found.layers[0]}, area under the curve {areas}"


def second_look(lab: Lab, found: Found) -> str:
    """A probe of answers, from the model's own answers to harmful and to harmless instructions."""
    groups = lab.of(LOOKS, validates=False)
    measured = lab.measure(Style(found.base), groups, "second look")
    rows = [
        (i, reply.tokens[:end])  # one behind the other, so that a reader goes on
        for kind in KINDS
        for i, reply in zip(groups[kind], measured.replies[kind], strict=True)
        for end in range(FIRST_LOOK, LOOK + 1, LOOKED_AT)
        if reply.label == "answer" and len(reply.tokens) >= end
    ]
    if min(len({i.id for i, _ in rows if i.kind == kind}) for kind in ("harmful", "harmless")) < 10:
        return "too few answers to learn from: answers are not read"
    base = found.base
    what = {"base": base, "layers": found.layers, "tokens": LOOKED_AT}
    key = key_of(what | {"rows": [[i.id, list(t)] for i, t in rows]})

    def locate(row: tuple[Instruction, tuple[int, ...]]) -> tuple[list[int], int]:
        prompt = lab.bench.prompt(base, row[0].prompt)
        return [*prompt, *row[1]], len(prompt) + len(row[1]) - LOOKED_AT

    clock = Clock("reading answers", 0, len(rows), lab.listener)
    path = lab.job.folder / f"answers-{key[:16]}.f32"
    states = lab.bench.states(path, rows, locate, found.layers, clock.at)
    kinds = Rows.of([i for i, _ in rows])
    trained = train(_finite(states), kinds)
    area = float(np.mean(list(trained.areas.values())))
    threshold = choose.answer_threshold(trained.probabilities[~kinds.harmful])
    caught = float((trained.probabilities[kinds.harmful] >= threshold).mean())
    found.figures["second_look"] = {"auc": round(area, 4), "caught": round(caught, 4), "stretches": len(rows)}
    told = f"area under the curve {area:.3f}, {caught:.0%} of stretches of answers to harm are told"
    if caught < WORTHWHILE:
        return f"{told}: answers are not read"
    found.look, found.answer_threshold = trained, round(threshold, 4)
    return told


def _finite(states: Floats) -> Floats:
    if not np.isfinite(states).all():
        raise ModelError("the model's hidden states hold values that are not finite: it cannot be given a gate")
    return states
