"""Measures parts of a fit on a cluster: answers, openings of answers, contrasts, and states of what is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from acd_local.cluster import Cluster, Pool
from acd_local.fit.model import CONVERSATIONS, FitModel
from acd_local.fit.replies import Style, greedy
from acd_local.fit.states import Part
from acd_local.models import ModelFile
from acd_local.progress import Listener
from acd_local.runtime import probe
from acd_local.runtime.cancel import CancelToken
from acd_local.runtime.lifetime import Closing
from acd_local.tuning.scoring import Grid, Prompt

Groups = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Answers:
    style: Style
    prompts: Sequence[str]

    def measure(self, model: FitModel) -> list[tuple[str, list[int]]]:
        return list(greedy(model.engine(), self.style, self.prompts, CancelToken()))


@dataclass(frozen=True)
class _Openings:
    prompt: Prompt
    groups: Groups

    def measure(self, model: FitModel) -> dict[str, float]:
        with closing(model.scorer(self.groups)) as scorer:
            return scorer.alone(self.prompt)


@dataclass(frozen=True)
class _Contrast:
    safe: Prompt
    adversarial: Prompt
    groups: Groups
    grid: Grid

    def measure(self, model: FitModel) -> list[dict[str, float]]:
        with closing(model.scorer(self.groups)) as scorer:
            return [asdict(row) for row in scorer.contrasted(self.safe, self.adversarial, self.grid)]


@dataclass(frozen=True)
class _States:
    part: Part
    layers: Sequence[int]

    def measure(self, model: FitModel) -> bytes:
        (found,) = model.means([self.part], self.layers)
        return found


class FitCluster(Closing):
    """Does on a cluster what `Respondent`, `OpeningScorer` and `FitModel.means` do here; it connects when first asked.

    Results are those of one process up to rounding: what a model computed before and beside shifts last digits.
    """

    def __init__(
        self, connect: Callable[[], Cluster], file: ModelFile, *, threads: int, stop: CancelToken, listener: Listener
    ) -> None:
        self._connect = connect
        self._make = partial(_Worker, file, threads)
        self._threads = threads
        self._stop = stop
        self._listener = listener
        self._opened = ExitStack()
        self._pool: Pool | None = None

    def answers(self, style: Style, prompts: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
        """Answer as `greedy` does."""
        size = CONVERSATIONS[0]
        pieces = [_Answers(style, tuple(prompts[at : at + size])) for at in range(0, len(prompts), size)]
        for _, found in self._work(pieces):
            yield from found

    def openings(self, prompts: Sequence[Prompt], groups: Groups) -> Iterator[tuple[int, dict[str, float]]]:
        """Yield the place of each prompt with `OpeningScorer.alone`."""
        return self._work([_Openings(prompt, groups) for prompt in prompts])

    def contrasts(
        self, pairs: Sequence[tuple[Prompt, Prompt]], groups: Groups, grid: Grid
    ) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """Yield the place of each pair with `OpeningScorer.contrasted`."""
        return self._work([_Contrast(*pair, groups, grid) for pair in pairs])

    def means(self, parts: Iterable[Part], layers: Sequence[int]) -> Iterator[bytes]:
        """Yield what `FitModel.means` yields, in the order of the parts."""
        ready: dict[int, bytes] = {}
        turn = 0
        for place, found in self._work([_States(part, layers) for part in parts]):
            ready[place] = found
            while turn in ready:
                yield ready.pop(turn)
                turn += 1

    def close(self) -> None:
        self._opened.close()

    def _work(self, pieces: Sequence[object]) -> Iterator[tuple[int, Any]]:
        if self._pool is None:
            cluster = self._opened.enter_context(self._connect())
            pool = Pool(cluster, self._make, cpus=self._threads, gpu=True, line=self._listener.line)
            self._pool = self._opened.enter_context(pool)
        return self._pool.work(pieces, self._stop)


class _Worker:
    """What an actor holds."""

    def __init__(self, file: ModelFile, threads: int) -> None:
        self._model = FitModel(probe.verify(file.find()), threads=threads, stop=CancelToken())
        self._model.engine()

    def __call__(self, piece: _Answers | _Openings | _Contrast | _States) -> object:
        return piece.measure(self._model)
