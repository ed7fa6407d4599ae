"""Chooses a gate's thresholds, and judges the model with and without the pair."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from acd_local.fit import choose
from acd_local.fit.answers import Style
from acd_local.fit.found import Found, Measured, named, said
from acd_local.fit.lab import Lab
from acd_local.fit.texts import passing
from acd_local.tuning.anchors import KINDS, Instruction

JUDGE = {"harmful": 60, "ordinary": 40, "lookalike": 40}  # instructions that nothing is chosen on


def thresholds(lab: Lab, found: Found) -> str:
    pair = lab.measure(found.style, passing(lab, found), "pair").shares
    rates = {key: asdict(shares) for key, shares in (found.rates | {"pair": pair}).items()}
    judged = {i.id for group in lab.of(JUDGE, validates=False).values() for i in group}
    chances = {kind: np.array([], np.float32) for kind in KINDS}
    for kind in KINDS:
        those = [i for i in lab.instructions() if i.group == kind and i.id not in judged]
        chances[kind] = np.array([found.chances[i.id] for i in those])
    chosen = choose.thresholds(chances, rates["as_is"], rates["pair"], rates.get("helpful"))
    found.thresholds = chosen
    shares = {kind: float((c >= chosen.threshold).mean()) if len(c) else 0.0 for kind, c in chances.items()}
    found.figures["passing"] = {kind: round(value, 4) for kind, value in shares.items()}
    low = f", helpful below {chosen.low:g}" if found.helpful and chosen.low else ""
    parts = ", ".join(f"{value:.0%} of {named(kind)}" for kind, value in shares.items())
    return f"pair from {chosen.threshold:g} on ({parts}){low}"


def judge(lab: Lab, found: Found) -> str:
    """The model as it is and with the pair, on instructions that nothing was chosen on."""
    groups = lab.of(JUDGE, validates=False)
    as_is = lab.measure(Style(), groups, "judging, as it is")
    decided: dict[str, list[tuple[Style, Instruction]]] = {
        kind: [(_decided(found, i), i) for i in group] for kind, group in groups.items()
    }
    for style in dict.fromkeys(style for group in decided.values() for style, _ in group):
        asked = {kind: [i for s, i in group if s == style] for kind, group in decided.items()}
        lab.measure(style, asked, "judging, with the pair")
    replies = {
        kind: [lab.respondent.ask(style, [i.prompt])[0] for style, i in group] for kind, group in decided.items()
    }
    pair = Measured(replies)
    found.judged = as_is, pair
    return f"as it is {said(as_is.shares)}; with the pair {said(pair.shares)}"


def _decided(found: Found, instruction: Instruction) -> Style:
    """Who answers, by the chance that a gate gives which did not see the instruction."""
    decision = found.gate_settings.decide(found.chances[instruction.id])
    return {"contrast": found.style, "helpful": Style(found.base), "as-is": Style()}[decision]
