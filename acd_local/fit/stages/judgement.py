"""Chooses a gate's thresholds, and judges the model with and without the pair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from acd_local.fit import thresholds
from acd_local.fit.context import FitContext
from acd_local.fit.replies import Measured, Style, named
from acd_local.fit.stages.gate import GateResult
from acd_local.fit.stages.texts import CHOICE, HelpfulResult, passing
from acd_local.fit.thresholds import RefusalCurve, Thresholds
from acd_local.pairs import GateSettings
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning.anchors import KINDS, Instruction

DOUBTFUL = {"harmful": 20, "ordinary": 8, "lookalike": 20}  # instructions near even chances, where thresholds lie
JUDGE = {"harmful": 60, "ordinary": 40, "lookalike": 40}  # instructions that nothing is chosen on


def choose_thresholds(
    context: FitContext, helpful: HelpfulResult, gate_result: GateResult, style: Style
) -> tuple[Thresholds, str]:
    """Choose on instructions that do not judge, by what is refused as it is, under the helpful text and by the pair."""
    pair = context.measure(style, passing(context, gate_result), "pair").shares
    asked = _asked_of_refusals(context, gate_result.chances)
    their_chances = {kind: np.array([gate_result.chances[i.id] for i in group]) for kind, group in asked.items()}

    def curve(text: str | None) -> RefusalCurve:
        replies = context.measure(Style(PromptSetup(text)), asked, "refusals by chance").replies
        refused = {kind: [reply.label == "refusal" for reply in found] for kind, found in replies.items()}
        return RefusalCurve.fit(their_chances, refused)

    judged = {i.id for group in context.of(JUDGE, validates=False).values() for i in group}
    others = [i for i in context.instructions() if i.id not in judged]
    chances = {kind: np.array([gate_result.chances[i.id] for i in others if i.group == kind]) for kind in KINDS}
    under_helpful = None if helpful.candidate is None else curve(helpful.base)(chances)
    chosen = thresholds.choose(chances, curve(None)(chances), asdict(pair), under_helpful, helpful.knows)
    shares = {kind: thresholds.share(c >= chosen.threshold) for kind, c in chances.items()}
    context.figures["passing"] = {kind: round(value, 4) for kind, value in shares.items()}
    low = f", helpful below {chosen.low:g}" if helpful.candidate and chosen.low else ""
    parts = ", ".join(f"{value:.0%} of {named(kind)}" for kind, value in shares.items())
    return chosen, f"pair from {chosen.threshold:g} on ({parts}){low}"


def _asked_of_refusals(context: FitContext, chances: Mapping[str, float]) -> dict[str, list[Instruction]]:
    """Instructions that texts were chosen on, and those of whose harm the gate is least sure."""
    asked = {kind: list(group) for kind, group in context.of(CHOICE, validates=True).items()}
    for kind, group in asked.items():
        rest = [i for i in context.instructions() if i.validates and i.group == kind and i not in group]
        group += sorted(rest, key=lambda i: abs(chances[i.id] - 0.5))[: context.many(DOUBTFUL[kind])]
    return asked


def judge(
    context: FitContext, settings: GateSettings, chances: Mapping[str, float], style: Style
) -> tuple[tuple[Measured, Measured], str]:
    """Measure the model as it is and with the pair, on instructions that nothing was chosen on.

    Args:
        chances: that a gate gives which did not see the instruction.
    """
    groups = context.of(JUDGE, validates=False)
    as_is = context.measure(Style(), groups, "judging, as it is")
    answering = {"contrast": style, "helpful": Style(PromptSetup(settings.helpful)), "as-is": Style()}
    decided = {kind: [(answering[settings.decide(chances[i.id])], i) for i in group] for kind, group in groups.items()}
    for one in dict.fromkeys(answers for group in decided.values() for answers, _ in group):
        asked = {kind: [i for answers, i in group if answers == one] for kind, group in decided.items()}
        context.measure(one, asked, "judging, with the pair")
    pair = Measured(
        {kind: [context.respondent.ask(s, [i.prompt])[0] for s, i in group] for kind, group in decided.items()}
    )
    return (as_is, pair), f"as it is {as_is.shares}; with the pair {pair.shares}"
