"""Scores the texts of a search by llama.cpp: here, one after the other, or on a cluster, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from acd_local import pairs
from acd_local.cluster import Pool
from acd_local.models import ModelFile
from acd_local.runtime import llama
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.template import ChatTemplate
from acd_local.tuning.openings import Openings
from acd_local.tuning.scoring import GROUPS, OpeningScorer

# Texts, and how many instructions of a kind each is scored on, to the scores of each by group, as they are asked for.
Scores = Callable[[Sequence[str], int], Iterable[dict[str, float]]]


def score(scorer: OpeningScorer, safe_text: str | None, text: str, most: int) -> dict[str, float]:
    """Score a safeguarding text alone; one that is to stand beside `safe_text`, by what its contrast does."""
    if safe_text is None:
        return scorer.alone(text, most)
    (row,) = scorer.contrasted(safe_text, text, [(pairs.DEFAULT_ALPHA, pairs.DEFAULT_BETA)], most)
    return {name: getattr(row, name) for name in GROUPS}


def on_cluster(pool: Pool, stop: CancelToken) -> Scores:
    """Return `Scores` of a pool whose actors hold what a `ScorerSetup` makes; the same up to rounding."""

    def scores(texts: Sequence[str], most: int) -> list[dict[str, float]]:
        found = dict(pool.work([(text, most) for text in texts], stop))
        return [found[place] for place in range(len(texts))]

    return scores


@dataclass(frozen=True)
class ScorerSetup:
    """What every actor is given once; called there, it makes what scores (text, most)."""

    model: ModelFile
    openings: Openings
    groups: Mapping[str, Sequence[str]]
    safe_text: str | None
    n_ctx: int
    threads: int
    gpu_layers: int | None

    def __call__(self) -> Callable[[tuple[str, int]], dict[str, float]]:
        model = llama.Model(self.model.find(), gpu_layers=self.gpu_layers)
        scorer = OpeningScorer(
            model, ChatTemplate(model), self.openings, self.groups, n_ctx=self.n_ctx, threads=self.threads
        )
        return lambda piece: score(scorer, self.safe_text, *piece)
