"""Gives the stages of a fit what they share: the job, its model and instructions, and what is measured with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import numpy as np

from acd_local.cluster import Cluster
from acd_local.errors import ModelError
from acd_local.evaluate.sets import item_seed
from acd_local.fit import candidates
from acd_local.fit.candidates import Candidate
from acd_local.fit.job import Job
from acd_local.fit.model import FitModel, opening
from acd_local.fit.remote import FitCluster
from acd_local.fit.replies import Measured, Respondent, Style
from acd_local.fit.states import Floats, Located, Part, Row, layers_of, read_all
from acd_local.models import ModelFile
from acd_local.progress import Clock, Listener
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.prompts import PromptSetup
from acd_local.tuning import anchors
from acd_local.tuning.anchors import KINDS, Instruction
from acd_local.tuning.cache import Measurements
from acd_local.tuning.scoring import MEASURES, Prompt

MAX_ORDINARY = 2000  # ordinary anchors that are read
GRID = [(alpha, beta) for alpha in (0.1, 0.2, 0.3, 0.5) for beta in (0.05, 0.1, 0.3)]
# What the stages take in all, besides reading anchors, for the budget.
_ANSWERS, _OPENINGS = 800, 900
_TIMED = 6

Groups = Mapping[str, Sequence[Instruction]]
Scored = dict[str, list[str]]  # prompts by what their refusals mean


class FitContext:
    """One run of a job; to be closed.

    Attributes:
        notes: what was measured, and the time of every stage.
        share: of everything, what the budget allows; see `plan`.
        figures, tables: what stages leave for the pair's file and for the page.
    """

    def __init__(
        self, job: Job, stop: CancelToken, listener: Listener, connect: Callable[[], Cluster] | None = None
    ) -> None:
        self.job = job
        self.stop = stop
        self.listener = listener
        base = {"texts": candidates.digest(), "manual": job.manual.safe}
        self.notes = Measurements(job.folder / "notes.jsonl", {"model": job.digest, **base})
        self.model = FitModel(job.info, threads=job.threads, stop=stop)
        answers = Measurements(job.folder / "answers.jsonl", {"model": job.digest})
        self._here = self.respondent = Respondent(self.model.engine, answers, stop)
        self._cluster: FitCluster | None = None
        if connect is not None:
            file = ModelFile.of(job.info.path)
            self._cluster = FitCluster(connect, file, threads=job.threads, stop=stop, listener=listener)
            self.respondent = replace(self._here, elsewhere=self._cluster.answers)
        self.share = 1.0
        self.figures: dict[str, Any] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.close()
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
        missing = [i for i, one in enumerate(inputs) if self.notes.get("openings", one) is None]
        prompts = [opening(texts[i].text or None, texts[i].shots) for i in missing]
        for done, (place, found) in enumerate(self._alone(prompts, scored), 1 + len(texts) - len(missing)):
            self.notes.keep("openings", inputs[missing[place]], found)
            clock.at(done)
        return [self.notes.get("openings", one) for one in inputs]

    def _alone(self, prompts: Sequence[Prompt], groups: Scored) -> Iterator[tuple[int, dict[str, float]]]:
        """Score prompts here or on the cluster, and yield the place of each with its scores."""
        if self._cluster is not None:
            yield from self._cluster.openings(prompts, groups)
        elif prompts:
            with closing(self.model.scorer(groups)) as scorer:
                for place, prompt in enumerate(prompts):
                    yield place, scorer.alone(prompt)

    def contrasted(
        self, pairs: Sequence[tuple[Candidate, Candidate]], groups: Groups, most: int
    ) -> list[list[dict[str, float]]]:
        """Measure what contrasts (positive, negative) do: for each pair, of each alpha the row with the best beta."""
        scored = _scored(groups, most)
        inputs = [{"texts": [p.text, p.shots, n.text], "groups": scored, "grid": GRID} for p, n in pairs]
        missing = [i for i, one in enumerate(inputs) if self.notes.get("contrasted", one) is None]
        clock = Clock("contrasts, openings", len(pairs) - len(missing), len(pairs), self.listener)
        prompts = [(opening(p.text, p.shots), opening(n.text)) for p, n in (pairs[i] for i in missing)]
        for place, rows in self._beside(prompts, scored):
            self.notes.keep("contrasted", inputs[missing[place]], rows)
            clock.tick()
        return [_best_by_alpha(self.notes.get("contrasted", one)) for one in inputs]

    def _beside(
        self, prompts: Sequence[tuple[Prompt, Prompt]], groups: Scored
    ) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """Score contrasts over the grid, as `_alone` does prompts."""
        if self._cluster is not None:
            yield from self._cluster.contrasts(prompts, groups, GRID)
            return
        for place, (safe, adversarial) in enumerate(prompts):
            with closing(self.model.scorer(groups)) as scorer:
                yield place, [asdict(row) for row in scorer.contrasted(safe, adversarial, GRID)]

    def facts(self, system: str | None) -> int:
        """Count the short factual questions that are answered right."""
        asked = candidates.facts()
        replies = self.respondent.ask(Style(PromptSetup(system)), [fact.question for fact in asked])
        return sum(f.is_right(self.respondent.text(r.tokens)) for f, r in zip(asked, replies, strict=True))

    def states(
        self, name: str, rows: Sequence[Row], locate: Callable[[Row], Located], layers: Sequence[int], phase: str
    ) -> Floats:
        """Read the mean states of many rows here or on the cluster, into a file of this name; see `read_all`."""

        def means(parts: Iterable[Part]) -> Iterator[bytes]:
            return (self._cluster or self.model).means(parts, layers)

        clock = Clock(phase, 0, len(rows), self.listener)
        shape = len(layers), self.job.info.n_embd
        return read_all(self.job.folder / name, rows, locate, means, shape, on_progress=clock.at)

    # -- what it takes -------------------------------------------------------------------------------------------------

    def _affordable(self) -> float:
        self.listener.phase("trying how long it takes")
        prompts = [i.prompt for i in self.job.instructions[:_TIMED]]
        reading = self._seconds_of_reading(prompts)
        started = time.perf_counter()
        self._here.ask(Style(), prompts)
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


def _best_by_alpha(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    best: dict[float, dict[str, float]] = {}
    for row in rows:
        if row["alpha"] not in best or row["safety"] > best[row["alpha"]]["safety"]:
            best[row["alpha"]] = row
    return list(best.values())


def _scored(groups: Groups, most: int) -> Scored:
    return {MEASURES[kind]: [i.prompt for i in group[:most]] for kind, group in groups.items()}
