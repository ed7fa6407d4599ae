"""Chooses alpha and beta of the soft pair and of the texts, and measures what came before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from acd_local import pairs
from acd_local.optimize import budget, trial
from acd_local.optimize.checkpoint import Checkpoint
from acd_local.optimize.context import ORDER, Role, StageContext, in_words
from acd_local.optimize.trial import Trial
from acd_local.pairs import AdversarialText, PromptPair
from acd_local.progress import Clock, check_stop
from acd_local.runtime.prompts import PromptSetup
from acd_local.softpair import SoftPair, SoftPrompt
from acd_local.tuning.scoring import GROUPS, ContrastScore

Prompts: TypeAlias = tuple[str | SoftPrompt, str | SoftPrompt]  # safeguarding, adversarial

GRID = [(a, b) for a in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8) for b in (0.05, 0.1, 0.2, 0.3, 0.5)]  # alpha, beta
CANDIDATES = 4  # contrasts that are tried in greedy answers
TIE = 0.01


@dataclass(frozen=True)
class ContrastResult:
    """The chosen contrasts.

    Attributes:
        soft, text: {"alpha", "beta"} of either pair; text None: there are no texts.
        rows: all that were tried, as `ContrastScore`, with "pair" and "chosen".
        before_after: per pair and with or without its contrast, `RefusalRates`, with "pair" and "contrast".
    """

    soft: dict[str, float]
    rows: list[dict[str, Any]]
    before_after: list[dict[str, Any]]
    text: dict[str, float] | None = None


def run(context: StageContext, soft: SoftPair, texts: Mapping[Role, str]) -> ContrastResult:
    """Try grids by the openings of answers, then the best few in greedy answers."""
    adversarial = soft.adversarial.reveal_for_negative_stream()
    checkpoint = context.checkpoint(
        "setting",
        soft=[soft.safe.digest, adversarial.digest],
        texts=dict(texts),
        grid=GRID,
        trial=[trial.TOKENS, trial.COUNTS],
        order=ORDER,
        worth="safety minus mean over-refusal, by openings and greedy answers",
        openings=asdict(context.job.tokens.openings),
        **context.gated,
    )
    result = ContrastResult(**context.result(checkpoint, lambda c: _Choice(context, c, soft, texts).make()))
    chosen = [(name, found) for name, found in (("text", result.text), ("soft", result.soft)) if found]
    words = [f"{name} pair alpha {found['alpha']:g}, beta {found['beta']:g}" for name, found in chosen]
    context.close(checkpoint, ", ".join(words))
    return result


class _Choice:
    """Goes on from what the checkpoint holds: {"grids": rows by pair, "tried": trials by pair, "chosen": {"alpha",
    "beta"} by pair, "rows": all that was tried, "before_after": figures}; pairs are "soft" and, with texts, "text"."""

    def __init__(
        self, context: StageContext, checkpoint: Checkpoint, soft: SoftPair, texts: Mapping[Role, str]
    ) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._soft = soft
        self._texts = texts
        self._prompts: dict[str, Prompts] = {"soft": (soft.safe, soft.adversarial.reveal_for_negative_stream())}
        if texts:
            self._prompts["text"] = texts["safe"], texts["adversarial"]
        empty: dict[str, Any] = {"grids": {}, "tried": {}, "chosen": {}, "rows": [], "before_after": []}
        self._state = checkpoint.state or empty
        manual = context.job.manual
        self._usual = manual.alpha or pairs.DEFAULT_ALPHA, manual.beta or pairs.DEFAULT_BETA
        total = 2 * len(self._prompts) + 2
        self._clock = Clock(budget.STAGES["setting"].title, len(self._state["before_after"]), total, context.listener)

    def make(self) -> dict[str, Any]:
        state = self._state
        self._grids()
        for name in self._prompts:
            if name not in state["chosen"]:
                rows = [ContrastScore(**row) for row in state["grids"][name]]
                tried = self._tried(name, shortlist(rows, self._usual))
                chosen = choose(tried, self._usual)
                state["chosen"][name] = {"alpha": chosen.alpha, "beta": chosen.beta}
                newest = {(row.alpha, row.beta): row for row in (*rows, *tried)}
                state["rows"] += [asdict(r) | {"pair": name, "chosen": r is chosen} for r in newest.values()]
                self._note(name, asdict(chosen), contrast=True)
                self._keep()
        return {**state["chosen"], "rows": state["rows"], "before_after": state["before_after"]}

    def _grids(self) -> None:
        """Score the manual pair, then each pair's safeguarding prompt alone, and its grid."""
        manual, state = (self._context.manual["safe"], self._context.manual["adversarial"]), self._state
        with self._context.scorer() as (scorer, _):
            if not state["before_after"]:
                self._note("manual", scorer.alone(manual[0]), contrast=False)
                self._note("manual", asdict(scorer.contrasted(*manual, [self._usual])[0]), contrast=True)
                self._keep()
            for name, (safe, opposite) in self._prompts.items():
                if name not in state["grids"]:
                    self._note(name, scorer.alone(safe), contrast=False)
                    state["grids"][name] = [asdict(row) for row in scorer.contrasted(safe, opposite, GRID)]
                    self._keep()

    def _tried(self, name: str, rows: Sequence[ContrastScore]) -> list[ContrastScore]:
        """Try contrasts of a pair in greedy answers."""
        context, known = self._context, self._state["tried"].setdefault(name, [])
        clock = Clock("trying the best settings", len(known), len(rows), context.listener)
        texts = self._texts or context.manual
        safe, adversarial = texts["safe"], AdversarialText(texts["adversarial"])
        with context.trial_engine(context.job.manual) as engine:
            for row in rows[len(known) :]:
                pair = PromptPair("trial", safe, adversarial, alpha=row.alpha, beta=row.beta)
                prompt_setup = PromptSetup.of(pair, self._soft) if name == "soft" else None
                found = trial.run(
                    engine, pair, context.groups, plain=False, stop=context.stop, prompt_setup=prompt_setup
                )
                known.append(asdict(found))
                clock.at(len(known))
                self._keep()
        trials = (Trial(**shares) for shares in known)
        return [replace(row, greedy=t.objective, degenerate=t.degenerate) for row, t in zip(rows, trials, strict=True)]

    def _note(self, pair: str, figures: Mapping[str, float], *, contrast: bool) -> None:
        measured = {name: figures[name] for name in GROUPS}
        self._state["before_after"].append({"pair": pair, "contrast": contrast, **measured})
        self._clock.at(len(self._state["before_after"]), in_words(measured))

    def _keep(self) -> None:
        self._checkpoint.save(self._state)
        check_stop(self._context.stop)


def shortlist(rows: Sequence[ContrastScore], usual: tuple[float, float]) -> list[ContrastScore]:
    """Choose what is tried in answers: of each alpha the best beta, the best few of these, and the usual contrast."""
    best: dict[float, ContrastScore] = {}
    for row in sorted(rows, key=lambda r: (r.value, r.beta)):
        best[row.alpha] = row
    found = sorted(best.values(), key=lambda r: -r.value)[:CANDIDATES]
    return found + [r for r in rows if (r.alpha, r.beta) == usual and r not in found]


def choose(rows: Sequence[ContrastScore], usual: tuple[float, float]) -> ContrastScore:
    """Choose the best contrast; of those within TIE of it the usual one, else that of least alpha, then largest beta.

    Little contrast costs little fluency, which this table does not show.
    """
    best = max(row.value for row in rows)
    ties = [r for r in rows if r.value >= best - TIE]
    return min(ties, key=lambda r: ((r.alpha, r.beta) != usual, r.alpha, -r.beta))
