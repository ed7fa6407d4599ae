"""kill -9 and full disks in the middle of whatever is written: what was finished is there, and nothing else is read."""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import faults
import pytest
from fault_works import Caching, Chatting, Evaluating, Fitting, Optimizing, OptimizingSoft, Work

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="ends processes by SIGKILL")
KILLED = -9
WORKS = {
    "chat": Chatting,
    "eval": Evaluating,
    "fit": Fitting,
    "optimize": Optimizing,
    "optimize soft": OptimizingSoft,
    "caches": Caching,
}


class Whole(NamedTuple):
    """Work that nothing disturbed."""

    points: int
    result: Any
    make: Callable[[str], Work]

    def works(self, name: str) -> Iterator[Work]:
        """The same work again and again, each in a folder of its own."""
        for number in itertools.count():
            yield self.make(f"{name}-{number}")


@pytest.fixture(scope="module")
def wholes() -> dict[str, Whole]:
    return {}


@pytest.fixture
def whole(
    name: str, wholes: dict[str, Whole], tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    """Made once for all tests."""
    if name.startswith("optimize"):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    if name not in wholes:
        root, model = tmp_path_factory.mktemp("work"), tiny("chatml")
        work = WORKS[name](root / "whole", model)
        done = run(work)
        assert done.code == 0, done.err
        assert done.points > 10
        wholes[name] = Whole(done.points, work.result(), lambda folder: WORKS[name](root / folder, model))
    return wholes[name]


def run(work: Work, fault: str = "count:0") -> faults.Done:
    return faults.run(work.code, work.args, work.folder, fault, text=work.text, **work.env)


def check_kept(work: Work, before: dict[str, Any]) -> dict[str, Any]:
    """Make sure that all that was finished is still there, the same; returns what is now."""
    kept = work.kept()
    changed = [key for key, value in before.items() if key not in kept or kept[key] != value]
    assert not changed
    return kept


def counts(**quick: int) -> Any:
    """Faults of each work: some in every run of the tests, and ten with `-m slow`."""
    some = [(name.replace("_", " "), count) for name, count in quick.items()]
    often = ("chat", "eval", "fit", "optimize", "caches")
    return pytest.mark.parametrize(
        ("name", "count"), [*some, *(pytest.param(name, 10, marks=pytest.mark.slow) for name in often)]
    )


@counts(chat=2, eval=2, fit=2, optimize_soft=1, caches=2)
def test_killed_anywhere_it_ends_as_if_it_had_not_been(whole: Whole, count: int) -> None:
    rng, kills = random.Random(f"kill {count}"), 0
    for work in whole.works("killed"):
        kept, left = work.kept(), whole.points
        for _ in range(min(count, 2)):  # killed, gone on with, and killed again
            at = rng.randint(1, left)
            killed = run(work, f"kill:{at}").code == KILLED
            kept = check_kept(work, kept)
            left, kills = max(1, left - at), kills + killed
        done = run(work)
        assert done.code == 0, done.err
        check_kept(work, kept)
        assert work.result() == whole.result
        assert len(faults.drafts(work.folder)) <= 2
        if kills >= count:
            return


@counts(chat=2, eval=2, fit=1, caches=2)
def test_a_disk_that_fills_anywhere_costs_nothing_that_was_finished(whole: Whole, count: int) -> None:
    rng, filled = random.Random(f"full {count}"), 0
    for work in whole.works("full"):
        left = whole.points
        for _ in range(min(count, 2)):
            at = rng.randint(1, left)
            kept = work.kept()
            done = run(work, f"full:{at}")
            check_kept(work, kept)
            assert not faults.drafts(work.folder)
            check_said(work, done)
            left, filled = max(1, left - at), filled + 1
        assert run(work).code == 0
        assert work.result() == whole.result
        if filled >= count:
            return


def check_said(work: Work, done: faults.Done) -> None:
    """One line that names a file and says what to do, and exit code 6; without caches nothing is said at all."""
    lines = [line for line in done.err.splitlines() if "cannot" in line or "No space left" in line]
    if isinstance(work, Caching):
        assert (done.code, lines) == (0, [])
        return
    if isinstance(work, Chatting):  # which goes on
        assert done.code == 0
        assert set(lines) <= {f"acd-chat: cannot write {work.file}: No space left on device: make room there"}
        return
    if done.code == 0:  # only renamings were left
        assert not lines
        return
    assert done.code == 6, done.err
    assert lines == done.err.splitlines()[-1:]
    assert lines[0].startswith(f"acd: cannot write {work.folder}{os.sep}")
    assert "No space left on device: make room there" in lines[0]
