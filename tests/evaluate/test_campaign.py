"""acd eval --ray: the records of one machine from several, whatever becomes of actors, machines and the cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray_clusters
from places import child_env
from processes import kill
from repeats import records, steady, write_sets

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for the actors in /proc"),
]
pytest.importorskip("ray")

MAIN = "from acd_local.cli.main import main; main()"
PATIENCE = 600.0  # seconds: Ray takes some to start, and this machine may be busy


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of this module's own, as one test moves it."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    path.write_bytes(tiny("chatml").read_bytes())
    return path


@pytest.fixture(scope="module")
def arguments(model: Path, tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    goods, bads = ([f"{say} {i}" for i in range(n)] for say, n in (("Say what is", 14), ("Do bad thing", 10)))
    sets = write_sets(tmp_path_factory.mktemp("sets"), goods, bads)
    numbers = ["--parallel", "1", "--threads", "1", "--ctx-size", "512", "--max-tokens", "8"]
    return [str(model), *sets, *numbers, "--methods", "null,acd", "--judge", str(tiny("chatml", seed=2))]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    folder = tmp_path_factory.mktemp("whole")
    done = subprocess.run(_command([*arguments, "-o", str(folder)]), env=child_env(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def two() -> Iterator[Any]:
    with ray_clusters.cluster(2) as made:
        yield made


@pytest.fixture
def one() -> Iterator[Any]:
    with ray_clusters.cluster(1) as made:
        yield made


def _command(args: Sequence[str]) -> list[str]:
    return [sys.executable, "-c", MAIN, "eval", *args]


class Driver:
    """acd eval in a process, and what it has written so far."""

    def __init__(self, args: Sequence[str], folder: Path, address: str) -> None:
        self.folder = folder
        self._errors = folder.with_suffix(".stderr")
        with self._errors.open("wb") as errors:
            command = _command([*args, "-o", str(folder), "--ray", address])
            self.process = subprocess.Popen(command, env=child_env(), stdout=subprocess.DEVNULL, stderr=errors)

    @property
    def said(self) -> str:
        return self._errors.read_text()

    @property
    def written(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.folder.glob("*.jsonl"))

    def until(self, what: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not what():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def ends(self, code: int) -> str:
        assert self.process.wait(PATIENCE) == code, self.said
        assert "Traceback" not in self.said
        return self.said


@contextmanager
def driver(args: Sequence[str], folder: Path, address: str) -> Iterator[Driver]:
    made = Driver(args, folder, address)
    try:
        yield made
    finally:
        kill(made.process)


@contextmanager
def held(process: int) -> Iterator[None]:
    """Keep a process from going on, so that it cannot do all the work before something else happens."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def assert_same(folder: Path, whole: Path) -> None:
    """All records, each once, bit for bit, and all figures."""
    for name in ("answers", "scores"):
        found, wanted = (sorted(json.dumps(r, sort_keys=True) for r in records(f, name)) for f in (folder, whole))
        assert found == wanted
    found, wanted = (steady(json.loads((f / "results.json").read_text())) for f in (folder, whole))
    assert found == wanted


def test_two_machines_give_the_records_of_one_process(
    two: Any, arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    with driver(arguments, folder, two.address) as run:
        run.until(lambda: len(ray_clusters.actors()) == 2 and run.written)
        run.ends(0)
    assert_same(folder, whole)
    before = [(folder / f"{name}.jsonl").read_bytes() for name in ("answers", "scores")]
    with driver(arguments, folder, "203.0.113.1:1") as run:  # nothing is missing: no cluster is asked
        run.ends(0)
    assert [(folder / f"{name}.jsonl").read_bytes() for name in ("answers", "scores")] == before


def test_an_actor_that_is_killed_loses_nothing(two: Any, arguments: list[str], whole: Path, tmp_path: Path) -> None:
    with driver(arguments, tmp_path / "run", two.address) as run:
        run.until(lambda: run.written > 12)
        os.kill(max(ray_clusters.actors()), signal.SIGKILL)
        assert "is gone: its work is done again" in run.ends(0)
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_command_that_is_stopped_leaves_no_actor_and_goes_on(
    two: Any, arguments: list[str], whole: Path, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    with driver(arguments, tmp_path / "run", two.address) as run:
        run.until(lambda: run.written > 12)
        run.process.send_signal(signum)
        said = run.ends(code)
    assert ("stopped; everything finished is kept" in said) == (code > 0)
    deadline = time.monotonic() + PATIENCE
    while ray_clusters.actors():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with driver(arguments, tmp_path / "run", two.address) as run:
        run.ends(0)
    assert_same(tmp_path / "run", whole)


def test_machines_that_are_too_small_are_named(two: Any, arguments: list[str], tmp_path: Path) -> None:
    with driver([*arguments, "--threads", "3"], tmp_path / "run", two.address) as run:
        *_, first, second, error = run.ends(2).splitlines()
    assert all("left out: " in line and "--threads 3" in line for line in (first, second))
    assert "--threads 3" in error


def test_a_machine_that_joins_late_works_and_one_without_the_file_is_left_out(
    one: Any, arguments: list[str], model: Path, whole: Path, tmp_path: Path
) -> None:
    folder, away = tmp_path / "run", model.with_suffix(".away")
    with driver(arguments, folder, one.address) as run:
        run.until(lambda: run.written > 5)
        (first,) = ray_clusters.actors()
        with held(first):
            model.rename(away)
            try:
                ray_clusters.join(one)
                run.until(lambda: "left out: " in run.said)
                line = next(line for line in run.said.splitlines() if "left out: " in line)
                assert f"no file here has the hash of {model.name}" in line
                assert f"copy it to {model}" in line
            finally:
                away.rename(model)
            known = run.written
            ray_clusters.join(one)
            run.until(lambda: run.written > known + 8)  # while the first one is held
        run.ends(0)
    assert_same(folder, whole)


def test_a_lost_cluster_is_gone_on_from_with_another(arguments: list[str], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with ray_clusters.cluster(2) as made, driver(arguments, folder, made.address) as run:
        run.until(lambda: run.written > 12)
        for process in ray_clusters.actors():
            os.kill(process, signal.SIGSTOP)  # until the cluster's end
        made.head_node.kill_gcs_server()
        assert "head does not answer" in run.ends(1).splitlines()[-1]
    some = run.written
    assert 12 < some < sum(len(records(whole, name)) for name in ("answers", "scores"))
    with ray_clusters.cluster(1) as made, driver(arguments, folder, made.address) as run:
        run.until(lambda: run.written > some)
        made.shutdown()
        assert run.process.wait(PATIENCE) != 0  # Ray ends a process whose own machine has left
    assert run.written < sum(len(records(whole, name)) for name in ("answers", "scores"))
    with driver(arguments, folder, "local") as run:
        run.ends(0)
    assert_same(folder, whole)
