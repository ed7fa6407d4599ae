"""acd eval after kill -9, on a full disk and with a report that failed: nothing lost, and the same figures."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import faults
import pytest
from manual import DEFAULT
from places import child_env
from repeats import records, steady, write_sets

from acd_local import Engine, Options
from acd_local.errors import StorageError
from acd_local.evaluate.journal import Journal
from acd_local.evaluate.methods import builtin
from acd_local.runtime.template import Message

MAIN = "from acd_local.cli.main import main; main()"
# Kills its own process once so many records are written.
DYING = """
import os, signal, sys
from acd_local.evaluate import journal
left, add = int(sys.argv.pop(1)), journal.Journal._add
def counted(self, name, record):
    global left
    add(self, name, record)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal._add = counted
from acd_local.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sets(tmp_path_factory.mktemp("sets"))


def acd_eval(
    args: Sequence[str], code: str = MAIN, *before: str, largest: int | None = None
) -> subprocess.CompletedProcess[str]:
    """`largest`: bytes that a file may have (EFBIG beyond: the storage is full)."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    return subprocess.run(
        [sys.executable, "-c", code, *before, "eval", *args],
        env=child_env(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        preexec_fn=None if largest is None else limit,
    )


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("answers", "scores"):
        assert records(folder, name) == records(whole, name)
    found, wanted = (json.loads((f / "results.json").read_text()) for f in (folder, whole))
    assert steady(found) == steady(wanted)
    assert "perplexity" in json.dumps(wanted)


@pytest.fixture(scope="module")
def arguments(tiny: Callable[..., Path], sets: list[str]) -> list[str]:
    numbers = ["--parallel", "1", "--threads", "1", "--ctx-size", "512", "--max-tokens", "8"]
    return [str(tiny("chatml")), *sets, *numbers, "--methods", "null,acd", "--judge", str(tiny("chatml", seed=2))]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = acd_eval([*arguments, "-o", str(folder)])
    assert done.returncode == 0, done.stderr
    return folder


def test_killed_at_any_point_it_ends_with_the_same_figures(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    """In answers (of either method), and in the middle of an item's choices, references, fluency and margins."""
    total = {name: len(records(whole, name)) for name in ("answers", "scores")}
    assert total == {"answers": 12, "scores": 4 + 6 + 6 + 3 * 5}
    args = [*arguments, "-o", str(tmp_path)]
    seen: list[int] = []
    for number, more in enumerate((5, 2, 7, 4, 6, 3, 6, 5)):
        assert acd_eval(args, DYING, str(more)).returncode == -signal.SIGKILL
        seen.append(sum(len(records(tmp_path, name)) for name in total))
        if number % 3 == 1:  # as a crash of the machine leaves it
            with max((tmp_path / f"{name}.jsonl" for name in total), key=os.path.getmtime).open("rb+") as file:
                file.truncate(file.seek(-9, os.SEEK_END))
    assert seen == [5, 7, 13, 17, 23, 25, 31, 36]
    done = acd_eval(args)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, whole)
    again = acd_eval(args)  # nothing is left to measure
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert_same(tmp_path, whole)


def test_methods_that_come_later_get_the_same_figures(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    at = arguments.index("--methods") + 1
    for names in ("acd", "acd,null"):
        assert acd_eval([*arguments[:at], names, *arguments[at + 1 :], "-o", str(tmp_path)]).returncode == 0

    def by_identity(folder: Path, name: str) -> set[str]:
        return {json.dumps(record, sort_keys=True) for record in records(folder, name)}

    for name in ("answers", "scores"):
        assert by_identity(tmp_path, name) == by_identity(whole, name)


@pytest.mark.parametrize("fixture", ["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def test_an_answer_does_not_depend_on_those_before(request: pytest.FixtureRequest, fixture: str) -> None:
    """Every log probability, bit for bit, in any order; prompts share their beginnings."""
    path = request.getfixturevalue("demo") if fixture == "demo" else request.getfixturevalue("tiny")("chatml")
    long = "Which of these is red, and which of them is as blue as the water? " * 4
    texts = [f"{long} Say it.", f"{long} Answer.", "Which"]
    seen: dict[tuple[str, str], object] = {}
    for order in (1, 2):
        with Engine(path, pair=DEFAULT, ctx_size=768, threads=1, system_apart=True) as engine:
            known = builtin(engine.pair)
            tasks = [(name, text) for name in ("base", "acd") for text in texts]
            random.Random(order).shuffle(tasks)
            options = Options(max_tokens=2, temp=0, draft_max=0)
            for name, text in tasks:
                turns = [Message("user", text)]
                prompt_setup = known[name].prompt_setup()
                answer = engine.generate(turns, options, prompt_setup=prompt_setup, divergence=True, trace=True).run()
                tokens = [(t.token, t.safe_logprob, t.safe_rank) for t in answer.tokens]
                found = (answer.text, tokens, answer.contrast.mean_divergence)
                assert seen.setdefault((name, text), found) == found


# -- reports and full disks --------------------------------------------------------------------------------------------


def test_a_failed_report_is_made_by_the_same_command(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir(parents=True)
    failed = acd_eval(args := [*arguments, "-o", str(tmp_path)])
    assert failed.returncode == 2
    *_, hint, error = failed.stderr.splitlines()
    assert f"acd eval show {tmp_path}" in hint
    assert "report.html" in error
    (tmp_path / "report.html").rmdir()
    kept = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("answers", "scores")]
    assert acd_eval(args).returncode == 0
    assert [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("answers", "scores")] == kept
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert_same(tmp_path, whole)
    (tmp_path / "report.html").unlink()
    assert acd_eval(["show", str(tmp_path)]).returncode == 0  # the model is not needed
    assert (tmp_path / "report.html").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_full_disk_ends_with_6_and_loses_nothing(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    sizes = {
        name: (whole / name).stat().st_size for name in ("run.json", "answers.jsonl", "scores.jsonl", "results.json")
    }
    report = (whole / "report.html").stat().st_size
    limits = {
        "run.json": sizes["run.json"] // 2,
        "answers.jsonl": (sizes["run.json"] + sizes["answers.jsonl"]) // 2,
        "report.html": (max(sizes.values()) + report) // 2,
    }
    assert sizes["run.json"] < limits["answers.jsonl"] < sizes["answers.jsonl"]
    assert max(sizes.values()) < limits["report.html"] < report
    args = [*arguments, "-o", str(tmp_path)]
    for name, largest in limits.items():
        full = acd_eval(args, largest=largest)
        assert full.returncode == 6, full.stderr
        last = full.stderr.splitlines()[-1]
        assert last.startswith("acd: cannot write ")
        assert name in last
        assert "File too large" in last
        for path in tmp_path.glob("*.jsonl"):
            assert path.read_bytes()[-1:] in (b"", b"\n"), "no record is cut short"
    assert acd_eval(args).returncode == 0
    assert_same(tmp_path, whole)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in whole.iterdir()}, "no drafts are left"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with faults.small_disk(tmp_path / "disk") as place:
        yield place


def test_a_record_is_written_whole_or_not_at_all(small_disk: Path, whole: Path) -> None:
    info = json.loads((whole / "run.json").read_text())
    record = {"setup": "s", "set": "bad", "answer": "water " * 100}
    with Journal(small_disk, info) as journal:
        added = 0
        with pytest.raises(StorageError, match="No space left on device"):
            while True:
                journal.add_answer(record | {"item": str(added)})
                added += 1
        assert 10 < added < 200
        assert not journal.has_answer("s", "bad", str(added))
        text = (small_disk / "answers.jsonl").read_bytes()
        assert (text.count(b"\n"), text[-1:]) == (added, b"\n")
        (small_disk / "run.json").unlink()  # there is room again
        journal.add_answer(record | {"item": str(added)})
        assert [a["item"] for a in journal.answers()] == [str(i) for i in range(added + 1)]
    with pytest.raises(StorageError, match="No space left on device"), Journal(small_disk, info):
        pass


# -- slow: the demo ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_point_on_the_demo(demo: Path, sets: list[str], tmp_path: Path) -> None:
    """All phases, several methods with contrast, killed from outside wherever it is."""
    args = ["demo", *sets, "--parallel", "1", "--methods", "null,base,nid,acd", "--max-tokens", "12", "--limit", "3"]
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert acd_eval([*args, "-o", str(whole)]).returncode == 0
    folder.mkdir()
    command = [sys.executable, "-c", MAIN, "eval", *args, "-o", str(folder)]
    rng, kills = random.Random(4), 0

    def count() -> int:
        return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))

    while True:
        wanted = count() + rng.randrange(2, 12)
        process = subprocess.Popen(command, env=child_env(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and count() < wanted:
            time.sleep(0.01)
        time.sleep(rng.random() / 5)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    assert kills > 5
    assert_same(folder, whole)
