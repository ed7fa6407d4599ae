"""Gives the stages of a fit what they share: the job, its model and instructions, and what is measured with them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from acd_local.errors import ModelError
from acd_local.evaluate.sets import item_seed
from acd_local.fit import candidates
from acd_local.fit.candidates import Candidate
from acd_local.fit.job import Job
from acd_local.fit.model import FitModel, opening
from acd_local.fit.replies import Measured, Respondent, Style
from acd_local.fit.states import layers_of
from acd_local.progress import Clock, Listener
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning import anchors
from acd_local.tuning.anchors import KINDS, Instruction
from acd_local.tuning.cache import Measurements
from acd_local.tuning.scoring import MEASURES

MAX_ORDINARY = 2000  # ordinary anchors that are read
GRID = [(alpha, beta) for alpha in (0.1, 0.2, 0.3, 0.5) for beta in (0.05, 0.1, 0.3)]
# What the stages take in all, besides reading anchors, for the budget.
_ANSWERS, _OPENINGS = 800, 900
_TIMED = 6

Groups = Mapping[str, Sequence[Instruction]]


class FitContext:
    """One run of a job; to be closed.

    Attributes:
        notes: what was measured, and the time of every stage.
        share: of everything, what the budget allows; see `plan`.
        figures, tables: what stages leave for the pair's file and for the page.
    """

    def __init__(self, job: Job, stop: CancelToken, listener: Listener) -> None:
        self.job = job
        self.stop = stop
        self.listener = listener
        base = {"texts": candidates.digest(), "manual": job.manual.safe}
        self.notes = Measurements(job.folder / "notes.jsonl", {"model": job.digest, **base})
        self.model = FitModel(job.info, threads=job.threads, stop=stop)
        answers = Measurements(job.folder / "answers.jsonl", {"model": job.digest})
        self.respondent = Respondent(self.model.engine, answers, stop)
        self.share = 1.0
        self.figures: dict[str, Any] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def close(self) -> None:
        self.model.close()

    @cached_property
    def own(self) -> str:
        """The template's own system prompt; empty: there is none."""
        return self.model.template.default_system()

    # -- how much, and of what -----------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Decide once how much of everything the budget allows."""
        inputs = {"budget": self.job.request.budget, "anchors": anchors.digest(self.job.instructions)}
        self.share = self.notes.memo("plan", inputs, self._affordable)

    def many(self, count: int) -> int:
        """Return `count` where time allows, less where not."""
        return max(4, round(count * min(1.0, 2 * self.share)))

    def instructions(self) -> list[Instruction]:
        """List the anchors that are read, in an order that the seed decides; of the many ordinary ones a part."""
        ordered = sorted(self.job.instructions, key=lambda i: item_seed(self.job.request.seed, i.id))
        by_kind = {kind: [i for i in ordered if i.group == kind] for kind in KINDS}
        if not by_kind["harmful"] or not by_kind["ordinary"]:
            raise ModelError("anchors of both kinds are needed")
        by_kind["ordinary"] = by_kind["ordinary"][:MAX_ORDINARY]
        found = []
        for group in by_kind.values():
            found += group[: max(round(len(group) * self.share), min(len(group), 40))]
        return found

    def of(self, counts: Mapping[str, int], *, validates: bool) -> dict[str, list[Instruction]]:
        """List instructions of each kind that validate, or do not, among those that are read."""
        every = [i for i in self.instructions() if i.validates == validates]
        return {kind: [i for i in every if i.group == kind][: self.many(count)] for kind, count in counts.items()}

    # -- measuring -----------------------------------------------------------------------------------------------------

    def measure(self, style: Style, groups: Groups, phase: str) -> Measured:
        every = [i.prompt for group in groups.values() for i in group]
        clock = Clock(phase, 0, len(every), self.listener)
        replies = iter(self.respondent.ask(style, every, clock.at))
        return Measured({kind: [next(replies) for _ in group] for kind, group in groups.items()})

    def openings(self, groups: Groups, texts: Sequence[Candidate], most: int, phase: str) -> list[dict[str, float]]:
        """Estimate the chances that answers open as refusals under each text, by group of `scoring`."""
        scored = _scored(groups, most)
        clock = Clock(f"{phase}, openings", 0, len(texts), self.listener)
        inputs = [{"text": [text.text, text.shots], "groups": scored} for text in texts]
        if any(self.notes.get("openings", one) is None for one in inputs):
            with closing(self.model.scorer(scored)) as scorer:
                for n, (text, one) in enumerate(zip(texts, inputs, strict=True), 1):
                    before = opening(text.text or None, text.shots)
                    self.notes.memo("openings", one, lambda before=before: scorer.alone(before))  # type: ignore[misc]
                    clock.at(n)
        return [self.notes.get("openings", one) for one in inputs]

    def contrasted(self, positive: Candidate, negative: Candidate, groups: Groups, most: int) -> list[dict[str, float]]:
        """Measure what the contrast does: of each alpha of the grid the row with the best beta."""
        scored = _scored(groups, most)

        def make() -> list[dict[str, float]]:
            self.listener.phase(f"contrast with {negative.name}")
            with closing(self.model.scorer(scored)) as scorer:
                safe, adversarial = opening(positive.text, positive.shots), opening(negative.text)
                return [asdict(row) for row in scorer.contrasted(safe, adversarial, GRID)]

        inputs = {"texts": [positive.text, positive.shots, negative.text], "groups": scored, "grid": GRID}
        best: dict[float, dict[str, float]] = {}
        for row in self.notes.memo("contrasted", inputs, make):
            if row["alpha"] not in best or row["safety"] > best[row["alpha"]]["safety"]:
                best[row["alpha"]] = row
        return list(best.values())

    def facts(self, system: str | None) -> int:
        """Count the short factual questions that are answered right."""
        asked = candidates.facts()
        replies = self.respondent.ask(Style(PromptSetup(system)), [fact.question for fact in asked])
        return sum(f.is_right(self.respondent.text(r.tokens)) for f, r in zip(asked, replies, strict=True))

    # -- what it takes -------------------------------------------------------------------------------------------------

    def _affordable(self) -> float:
        self.listener.phase("trying how long it takes")
        prompts = [i.prompt for i in self.job.instructions[:_TIMED]]
        reading = self._seconds_of_reading(prompts)
        started = time.perf_counter()
        self.respondent.ask(Style(), prompts)
        answering = (time.perf_counter() - started) / len(prompts)
        whole = (len(self.instructions()) + 2 * _OPENINGS) * reading + _ANSWERS * answering
        return float(np.clip(0.85 * self.job.request.budget / whole, 0.02, 1.0))

    def _seconds_of_reading(self, prompts: Sequence[str]) -> float:
        start, tokens = self.model.start(None), [self.model.prompt(None, prompt) for prompt in prompts]
        with closing(self.model.reader(layers_of(self.job.info.n_layers))) as reader:
            reader.read(tokens[0], start)
            started = time.perf_counter()
            for ids in tokens[1:]:
                reader.read(ids, start)
            return (time.perf_counter() - started) / max(1, len(tokens) - 1)


def _scored(groups: Groups, most: int) -> dict[str, list[str]]:
    return {MEASURES[kind]: [i.prompt for i in group[:most]] for kind, group in groups.items()}
