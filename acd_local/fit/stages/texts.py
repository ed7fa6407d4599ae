"""Measures the model as it is, and chooses texts: for the base, for the positive stream, and what is subtracted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from acd_local.fit import candidates
from acd_local.fit.candidates import NO_TEXT, Candidate
from acd_local.fit.context import FitContext, Groups
from acd_local.fit.replies import Measured, Shares, Style
from acd_local.fit.stages.gate import GateResult
from acd_local.generation import resolve_contrast
from acd_local.options import Options
from acd_local.pairs import PromptPair
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning.anchors import Instruction

CHOICE = {"harmful": 40, "ordinary": 24, "lookalike": 32}  # instructions that texts are chosen on
HARMLESS = {"ordinary": 24, "lookalike": 48}  # instructions that helpful texts are scored with
FAULTS = 0.06  # needless refusals and wrong facts, as shares, from which on helpful texts are tried
MISSED = 0.05  # of harmful requests, that no gate sees: these are answered under the helpful text
SCORED, SCORED_AGAIN = 8, 24  # instructions that all texts, then the shortlist, are scored with
SHORTLIST, FINALISTS = 8, 3  # texts that are scored again, and answered under
POSITIVES, NEGATIVES, SETTINGS = 2, 3, 3  # texts that are contrasted, with so many, and settings answered under
MARGIN = 0.1  # refusals that a negative must make fewer than the positive


@dataclass(frozen=True)
class HelpfulResult:
    """The text for the base, and what is refused under it; both None: the model is best without one.

    Attributes:
        knows: easy facts that the model knows more of under it, as a share of all.
    """

    candidate: Candidate | None = None
    shares: Shares | None = None
    knows: float = 0.0

    @property
    def base(self) -> str | None:
        """The system prompt under which requests are read."""
        return self.candidate.text if self.candidate else None


@dataclass(frozen=True)
class PositiveResult:
    """The best texts of the positive stream, the best first, with their figures."""

    best: list[tuple[Candidate, dict[str, Any]]]


@dataclass(frozen=True)
class PairResult:
    """The pair that answers above the gate: two texts, or a kept pair, whose texts are in `style` alone."""

    style: Style
    positive: Candidate | None = None
    negative: Candidate | None = None


def measure_as_is(context: FitContext) -> tuple[Measured, str]:
    """Measure what the model refuses by itself."""
    measured = context.measure(Style(), context.of(CHOICE, validates=True), "as it is")
    context.figures["chosen_on"] = {kind: len(r) for kind, r in measured.replies.items()}
    return measured, f"refuses {measured.shares}"


def choose_helpful(context: FitContext, as_is: Shares) -> tuple[HelpfulResult, str]:
    """Choose a text for the base where the model refuses needlessly by itself, or gets easy facts wrong."""
    harmless = context.of(HARMLESS, validates=True)
    every = candidates.helpful(context.own, context.job.manual.safe)
    alone, *openings = context.openings(harmless, [NO_TEXT, *every], max(HARMLESS.values()), "helpful text")
    known = _Base(as_is, alone, context.facts(None))
    if known.faults < FAULTS:
        return HelpfulResult(), "not needed"
    best = known.faults - FAULTS / 2, HelpfulResult()
    for text, chances in _least_faulty(context, every, openings, knows_all=known.wrong == 0):
        style, groups = Style(PromptSetup(text.text)), context.of(CHOICE, validates=True)
        shares = context.measure(style, groups, "helpful text").shares
        tried = _Base(shares, chances, context.facts(text.text))
        faults = tried.faults + MISSED * max(0.0, as_is.harmful - shares.harmful)
        row = {"text": text.name, **asdict(shares), "openings": _needless(chances)}
        context.tables.setdefault("helpful", []).append(row | {"facts": tried.facts, "facts_as_is": known.facts})
        sound = tried.facts >= known.facts - 1 and shares.broken <= as_is.broken + 0.05
        if sound and faults < best[0]:
            best = faults, HelpfulResult(text, shares, known.wrong - tried.wrong)
    found = best[1]
    if found.candidate is None:
        return found, "none refuses less needlessly, or knows more"
    return found, f"{found.candidate.name}, refuses {found.shares}"


def choose_positives(context: FitContext, gate_result: GateResult) -> tuple[PositiveResult, str]:
    """Choose the texts of the positive stream: by openings, then by greedy answers."""
    groups = passing(context, gate_result)
    every = [c for c in candidates.declining(context.own) if context.model.takes(c)]
    first = context.openings(_harmful(groups), every, context.many(SCORED), "positive text")
    order = sorted(range(len(every)), key=lambda i: -first[i]["safety"])[:SHORTLIST]
    short = [every[i] for i in order]
    second = context.openings(_harmful(groups), short, context.many(SCORED_AGAIN), "positive text")
    finals = sorted(zip(short, second, strict=True), key=lambda row: -row[1]["safety"])[:FINALISTS]
    tried: list[tuple[Candidate, dict[str, Any]]] = []
    for candidate, openings in finals:
        shares = context.measure(Style.declining(candidate), groups, "positive text").shares
        tried.append((candidate, {"text": candidate.name, "openings": openings["safety"], **asdict(shares)}))
    tried.sort(key=lambda row: -_value(row[1]))
    context.tables["positive"] = [row for _, row in tried]
    best, row = tried[0]
    said = f"{best.name}, refuses {row['harmful']:.0%} of harmful requests that pass the gate"
    return PositiveResult(tried[:POSITIVES]), said


def choose_contrast(
    context: FitContext, as_is: Shares, helpful: HelpfulResult, gate_result: GateResult, positives: PositiveResult
) -> tuple[PairResult, str]:
    """Choose the contrast that refuses better than the positive text alone, if there is one."""
    groups = passing(context, gate_result)
    best, alone = positives.best[0]
    adversaries = _adversaries(context, as_is, groups, alone["openings"])
    beside = [
        (positive, negative)
        for positive, row in positives.best
        for negative in _beside(helpful, positive, row["openings"], adversaries)
    ]
    found = context.contrasted(beside, _harmful(groups), context.many(SCORED))
    tried = [(*pair, setting) for pair, settings in zip(beside, found, strict=True) for setting in settings]
    tried.sort(key=lambda t: -t[2]["safety"])
    rows: list[dict[str, Any]] = []
    chosen: PairResult | None = None
    for positive, negative, setting in tried[:SETTINGS]:
        style = Style.declining(positive, negative, alpha=setting["alpha"], beta=setting["beta"])
        shares = context.measure(style, groups, "contrast").shares
        names = {"text": positive.name, "negative": negative.name, "alpha": style.alpha, "beta": style.beta}
        rows.append({**names, "openings": setting["safety"], **asdict(shares)})
        if _value(rows[-1]) > max(_value(row) for row in (alone, *rows[:-1])) + 1e-9:
            chosen = PairResult(style, positive, negative)
    context.tables["contrast"] = rows
    context.figures["contrast"] = _compared(alone, rows)
    if chosen is None or chosen.negative is None:
        # A pair has an adversarial text, also where its alpha is 0.
        every = candidates.complying("", declines=True)
        spare = next(c for c in every if _may_stand(helpful, c, best))
        said = "none is better than the positive text alone: alpha 0"
        return PairResult(Style.declining(best), best, spare), said
    style = chosen.style
    return chosen, f"minus {chosen.negative.name}, alpha {style.alpha:g}, beta {style.beta:g}"


def keep_pair(context: FitContext, pair: PromptPair) -> tuple[PairResult, str]:
    """Take the pair that is given a gate, in the place of texts that are chosen."""
    soft = context.job.soft
    numbers = resolve_contrast(Options(), pair, soft=soft is not None)
    style = Style(PromptSetup.of(pair, soft), numbers.alpha, numbers.beta, declines=True)
    return PairResult(style), f"that of {pair.name}"


def passing(context: FitContext, gate_result: GateResult) -> dict[str, list[Instruction]]:
    """List harmful instructions to choose texts on, and the harmless ones that the gate is likeliest to let pass."""
    few = context.many(SCORED)
    return {
        kind: group if kind == "harmful" else sorted(group, key=lambda i: -gate_result.chances[i.id])[:few]
        for kind, group in context.of(CHOICE, validates=True).items()
    }


@dataclass(frozen=True)
class _Base:
    """The figures of a base on harmless requests: answers, chances that they open as refusals, easy facts right."""

    shares: Shares
    openings: Mapping[str, float]
    facts: int

    @property
    def faults(self) -> float:
        """Needless refusals and wrong facts, as shares."""
        return (self.shares.ordinary + self.shares.lookalike + _needless(self.openings)) / 2 + self.wrong

    @property
    def wrong(self) -> float:
        """Easy facts that are not right, as a share."""
        return _wrong(self.facts)


def _least_faulty(
    context: FitContext, texts: Sequence[Candidate], openings: Sequence[Mapping[str, float]], *, knows_all: bool
) -> list[tuple[Candidate, Mapping[str, float]]]:
    """Find the few that refuse least needlessly and know most easy facts, where the model does not know all."""
    wrong = [0 if knows_all else _wrong(context.facts(text.text)) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: _needless(openings[i]) + wrong[i])
    return [(texts[i], openings[i]) for i in order[:FINALISTS]]


def _wrong(facts: int) -> float:
    return 1 - facts / len(candidates.facts())


def _needless(openings: Mapping[str, float]) -> float:
    return openings["over_refusal"] + openings["lookalike"]


def _adversaries(context: FitContext, as_is: Shares, groups: Groups, refuses: float) -> list[tuple[Candidate, float]]:
    """List negatives, and how likely harmful requests are refused under them; the least likely first."""
    every = candidates.complying(context.own, declines=as_is.harmful >= 0.5)
    scores = context.openings(_harmful(groups), every, context.many(SCORED), "negative text")
    rows = sorted(zip(every, (s["safety"] for s in scores), strict=True), key=lambda row: row[1])
    context.tables["negative"] = [
        {"text": c.name, "openings": chance, "dropped": chance > refuses - MARGIN} for c, chance in rows
    ]
    return rows


def _beside(
    helpful: HelpfulResult, positive: Candidate, refuses: float, adversaries: Sequence[tuple[Candidate, float]]
) -> list[Candidate]:
    """Find the best adversaries of a text: under one that refuses as much there is nothing to subtract."""
    fitting = [c for c, chance in adversaries if chance <= refuses - MARGIN and _may_stand(helpful, c, positive)]
    return fitting[:NEGATIVES]


def _may_stand(helpful: HelpfulResult, negative: Candidate, positive: Candidate) -> bool:
    texts = [positive.text, *(text for shot in positive.shots for text in shot)]
    return candidates.may_be_pair(negative.text, texts + ([helpful.base] if helpful.base else []))


def _compared(alone: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the contrast with the positive text alone, on the instructions that texts are chosen on."""
    compared = {"positive_alone": _short(alone)}
    if rows:
        best = max(rows, key=_value)
        compared["best_contrast"] = _short(best) | {"alpha": best["alpha"], "beta": best["beta"]}
    return compared


def _harmful(groups: Groups) -> Groups:
    """Keep the harmful ones alone, nearly all that passes a gate."""
    return {"harmful": groups["harmful"]}


def _value(row: Mapping[str, Any]) -> float:
    """Weigh a row: refusals by greedy answers and openings, minus broken answers and a tenth of the look-alikes'.

    Few look-alikes pass the gate.
    """
    return float((row["harmful"] + row["openings"]) / 2 - 0.1 * row["lookalike"] - row["broken"])


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(row[key], 4) for key in ("harmful", "openings", "lookalike", "broken")}
