"""Hostile files by the hundred: each is opened, or refused in one line, and nothing worse happens."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

import doors
import fuzz
import pytest
import tiny_gguf

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at memory as Linux tells it, and forks")


def open_all(seed: int, count: int) -> fuzz.Report:
    report = fuzz.fuzz(fuzz.names(seed, count))
    print(*report.lines(), sep="\n")
    again = "\n".join(f"python tests/fuzz/fuzz.py --again {name}\n{said}\n" for name, said in report.finds)
    assert not report.finds, again
    assert sum(report.counts.values()) == count
    return report


def test_three_hundred_files() -> None:
    report = open_all(1, 300)
    for kind in fuzz.SHARES:
        both = report.counts[kind, "opened"], report.counts[kind, "refused"]
        assert sum(both) > 5, "every kind is tried"
    assert len(report.checks) > 30, "and refused in many ways"


@pytest.mark.slow
def test_ten_thousand_files() -> None:
    open_all(2, 10_000)


def test_a_name_says_all_of_a_file(tmp_path: Path) -> None:
    model = tiny_gguf.write_family(tmp_path / "good.gguf", "chatml")

    def content(name: str, folder: Path) -> dict[str, bytes]:
        folder.mkdir()
        fuzz.make(name, folder, model)
        files = [path for path in folder.rglob("*") if path.is_file() and "base" not in path.name]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    for kind in [*fuzz.SHARES][:-1]:  # what is kept of a model is kept under its file's time
        first, again, other = (content(f"{kind}:7:{n}", tmp_path / f"{kind}{i}") for i, n in enumerate((1, 1, 2)))
        assert first == again
        assert first != other


# --- What it would notice ---


def test_an_end_by_a_signal_is_told() -> None:
    assert doors.forked_apart(os.abort).signal == 6


def endless() -> int:
    while True:
        random.random()


def test_an_endless_action_is_ended() -> None:
    started = time.process_time()
    assert doors.forked(endless, seconds=1).signal == 27
    assert time.process_time() - started < 1, "the fork's time is its own"


def take_memory() -> int:
    assert len(bytearray(300 << 20))
    raise KeyError("x")


def test_memory_and_tracebacks_are_told() -> None:
    end = doors.forked_apart(take_memory)
    assert end.peak > 250 << 20
    assert "Traceback" in end.log


@pytest.mark.parametrize(
    "error, wrong",
    [
        (KeyError("x"), "KeyError"),
        (doors.InternalError("x"), "an internal error"),
        (doors.UsageError("two\nlines"), "no printable line"),
        (doors.UsageError("x" * 3000), "3000 characters"),
        (doors.UsageError("one line"), ""),
    ],
)
def test_an_error_is_ours_or_a_find(error: Exception, wrong: str) -> None:
    def fail() -> None:
        raise error

    outcome = doors.outcome_of(fail)
    assert outcome.kind == ("find" if wrong else "refused")
    assert wrong in outcome.said


def test_a_child_that_dies_is_told_with_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Opening `chat:7:1` ends the child that opens files; the files before and behind it are opened."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "def ended(name, args):\n"
        "    if name == 'open' and str(args[0]).endswith('chat.json'):\n"
        "        ended.seen = getattr(ended, 'seen', 0) + 1\n"
        "        if ended.seen == 3 and not os.path.exists(mark := os.path.dirname(__file__) + '/ended'):\n"
        "            os.close(os.open(mark, os.O_CREAT))\n"
        "            os.abort()\n"  # written, opened, and written again
        "sys.addaudithook(ended)\n"
    )
    environ = os.environ | {"PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(fuzz.os, "environ", environ)
    report = fuzz.fuzz([f"chat:7:{n}" for n in range(4)])
    assert [name for name, _ in report.finds] == ["chat:7:1"]
    assert "ended with -6" in report.finds[0][1]
    assert sum(report.counts.values()) == 4
