"""Makes an evaluation on a cluster: actors make all that is missing of a few prompts at a time, which is kept here.

The journal is the one of a single machine. So the same command, with a cluster or without, goes on with what a lost
actor, a lost cluster or a signal leaves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from acd_local import files
from acd_local.cluster import Cluster, Pool
from acd_local.engine import Engine
from acd_local.evaluate import run_folder
from acd_local.evaluate.journal import Records
from acd_local.evaluate.judge import Judge
from acd_local.evaluate.run_folder import Key, Record
from acd_local.evaluate.runner import Evaluation, Plan
from acd_local.evaluate.sets import EvalSet
from acd_local.models import ModelFile
from acd_local.pairs import PromptPair
from acd_local.progress import Clock, Listener
from acd_local.runtime.cancel import CancelToken


@dataclass(frozen=True)
class Part:
    """A piece of work: some prompts of one set, and what is known of them already."""

    prompts: EvalSet
    answers: tuple[Record, ...]
    scores: frozenset[Key]


@dataclass(frozen=True)
class Made:
    """What an actor made of a part: new records, and prompts that do not fit, as `Evaluation.failures`."""

    answers: list[Record]
    scores: list[Record]
    failures: dict[tuple[str, str], str]


@dataclass(frozen=True)
class Setup:
    """What every actor is given once.

    Attributes:
        engine: arguments of `Engine` besides model and pair.
        vectors: the file beside the pair, which other machines lack.
        plan: without its sets.
    """

    model: ModelFile
    judge: ModelFile | None
    engine: Mapping[str, Any]
    vectors: bytes | None
    plan: Plan


class Campaign:
    """An evaluation whose records are made on a cluster; `run` and `failures` are as those of `Evaluation`.

    Args:
        connect: connects to the cluster, where anything is missing.
        engine: says what is missing; it is closed when actors begin, and so is `judge`.
        settings: what `engine` was made with besides model and pair.
    """

    def __init__(
        self,
        connect: Callable[[], Cluster],
        engine: Engine,
        settings: Mapping[str, Any],
        plan: Plan,
        journal: Records,
        *,
        judge: Judge | None = None,
        stop: CancelToken | None = None,
        listener: Listener,
    ) -> None:
        self._connect = connect
        self._closed_first = [engine] if judge is None else [engine, judge]
        self._journal = journal
        self._stop = stop or CancelToken()
        self._listener = listener
        self._parts = list(_parts(Evaluation(engine, plan, journal).unfinished(), journal, settings["conversations"]))
        self._total = sum(len(s.items) for s in plan.sets)
        self._setup = Setup(
            ModelFile.of(engine.info.path),
            None if judge is None else ModelFile.of(judge.info.path),
            {**settings, "threads": engine.threads},
            None if plan.pair.vectors_path is None else plan.pair.vectors_path.read_bytes(),
            replace(plan, sets=()),
        )
        self.failures: dict[tuple[str, str], str] = {}

    def run(self) -> None:
        """Have all made that is missing; raises Stopped where `stop` was set."""
        for closing in self._closed_first:
            closing.close()
        done = self._total - sum(len(part.prompts.items) for part in self._parts)
        clock = Clock("prompts", done, self._total, self._listener)
        if not self._parts:
            return
        make = partial(_Worker, self._setup)
        cpus, gpu = self._setup.engine["threads"], self._setup.engine["gpu_layers"] != 0
        with self._connect() as cluster, Pool(cluster, make, cpus=cpus, gpu=gpu, line=self._listener.line) as pool:
            for number, made in pool.work(self._parts, self._stop):
                for record in made.answers:
                    self._journal.add_answer(record)
                for record in made.scores:
                    self._journal.add_score(record)
                self.failures |= made.failures
                done += len(self._parts[number].prompts.items)
                clock.at(done)


def _parts(chosen: Iterable[EvalSet], journal: Records, size: int) -> Iterator[Part]:
    """Cut sets into parts of as many prompts as an actor answers at once."""
    answers: dict[tuple[str, str], list[Record]] = {}
    scores: dict[tuple[str, str], list[Key]] = {}
    for record in journal.answers():
        answers.setdefault((record["set"], record["item"]), []).append(record)
    for key in journal.scores():
        scores.setdefault(key[2:], []).append(key)
    for s in chosen:
        for at in range(0, len(s.items), size):
            items = s.items[at : at + size]
            known = [(s.name, item.id) for item in items]
            yield Part(
                replace(s, items=items),
                tuple(record for place in known for record in answers.get(place, ())),
                frozenset(key for place in known for key in scores.get(place, ())),
            )


class _Worker:
    """What an actor holds."""

    def __init__(self, setup: Setup) -> None:
        pair = _with_vectors(setup.plan.pair, setup.vectors)
        self._engine = Engine(setup.model.find(), pair=pair, **setup.engine)
        if any(method.soft for method in setup.plan.methods):
            self._engine.soft_pair(pair)  # from now on no positive stream takes the adversarial one
        judge = None if setup.judge is None else Judge(setup.judge.find(), threads=self._engine.threads)
        self._records = _Collected()
        self._evaluation = Evaluation(self._engine, replace(setup.plan, pair=pair), self._records, judge=judge)

    def __call__(self, part: Part) -> Made:
        self._records.begin(part)
        self._evaluation.failures = {}
        self._evaluation.make([part.prompts])
        made = self._records.made
        return Made(made[run_folder.ANSWERS], made[run_folder.SCORES], self._evaluation.failures)


class _Collected(Records):
    """The records of one part at a time.

    Attributes:
        made: what was added, by the name of the file where it belongs.
    """

    def begin(self, part: Part) -> None:
        self._known = part.answers
        self._seen = {
            run_folder.ANSWERS: set(map(run_folder.key_of, part.answers)),
            run_folder.SCORES: set(part.scores),
        }
        self.made: dict[str, list[Record]] = {name: [] for name in self._seen}

    def answers(self) -> list[Record]:
        return [*self._known, *self.made[run_folder.ANSWERS]]

    def _add(self, name: str, record: Record) -> None:
        super()._add(name, record)
        self.made[name].append(record)


def _with_vectors(pair: PromptPair, vectors: bytes | None) -> PromptPair:
    """Put a pair's vectors into a file of this machine."""
    if vectors is None:
        return replace(pair, path=None)
    folder = files.work_dir() / "cluster"
    path = folder / f"{hashlib.sha256(vectors).hexdigest()[:32]}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise files.write_error(folder, error) from None
    files.replace_file(path, vectors, mode=files.PRIVATE)
    return replace(pair, path=path.with_suffix(".toml"))
