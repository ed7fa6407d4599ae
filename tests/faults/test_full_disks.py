"""What every command that writes a file does on a disk without a free byte."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import eval_runs
import faults
import pytest
from fault_works import Caching, Fitting
from manual import DEFAULT
from places import child_env

from acd_local import Engine, Options
from acd_local.cli.chat_prompt import History
from acd_local.runtime import probe

MAIN = "from acd_local.cli.main import main\nmain()\n"
RUN = "from acd_local.cli.run import main\nmain()\n"
SMALL = "from acd_local.bench import growth\ngrowth.LENGTHS, growth.CONVERSATIONS = (320,), (1,)\n"
SERVE = "from acd_local.cli.serve import main\nmain()\n"
CHAT = "from acd_local.cli.chat import main\nmain()\n"
PLAIN = ("-t", "1", "-c", "512", "-n", "4", "--temp", "0", "--pair", "as-is")


class Asked(NamedTuple):
    """A command that writes `file` on the disk.

    Attributes:
        says: how its last line begins, after the program's name.
        out: whether what it has to say on stdout is there all the same.
    """

    file: str
    code: str
    args: tuple[str, ...]
    says: str = "cannot write {file}: No space left on device: make room there"
    text: str = ""
    ends: int = 6
    out: bool = False
    env: tuple[tuple[str, str], ...] = ()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with faults.small_disk(tmp_path / "disk", "512k") as place:
        yield place


def commands(model: Path, disk: Path, elsewhere: Path) -> dict[str, Asked]:
    """Every command that writes what its user has asked for. pairs: see test_a_pair_is_written_later."""
    run, other = (str(eval_runs.write_run(elsewhere / name, methods=(name,), n=4)) for name in ("base", "acd"))
    shown = str(eval_runs.write_run(disk / "run", n=4))
    chat = f"What is red?\n/save {disk}/chat.json\nAnd blue?\n"
    bench = ("bench", str(model), "-t", "1", "--tokens", "4", "--rounds", "1")
    return {
        "trace": Asked("trace.jsonl", RUN, (str(model), "hi", *PLAIN, "--trace", f"{disk}/trace.jsonl"), out=True),
        "chat": Asked("chat.json", CHAT, (str(model), *PLAIN), text=chat, ends=0, out=True),
        "settings": Asked("config.toml", MAIN, ("config", "set", "threads", "2"), env=(("ACD_CONFIG_DIR", str(disk)),)),
        "show": Asked("run/results.json", MAIN, ("eval", "show", shown)),
        "merge": Asked("merged/answers.jsonl", MAIN, ("eval", "merge", run, other, "-o", f"{disk}/merged")),
        "plot": Asked("plot.svg", SMALL + MAIN, (*bench, "--ctx-size", "512", "--plot", f"{disk}/plot.svg"), out=True),
        "quantize": Asked(
            "copy",
            MAIN,
            (*bench, "--no-memory", "--quantize", "q8_0"),
            says="cannot write {disk}/acd-bench-",
            env=(("TMPDIR", str(disk)),),
        ),
    }


@pytest.mark.parametrize("name", ["trace", "chat", "settings", "show", "merge", "plot", "quantize"])
def test_a_file_that_does_not_fit_is_told_and_the_old_one_stays(
    tiny: Callable[..., Path], disk: Path, tmp_path: Path, name: str
) -> None:
    if name == "plot":
        pytest.importorskip("matplotlib")
    asked = commands(tiny("chatml"), disk, tmp_path)[name]
    file = disk / asked.file
    old = b"" if name == "settings" else b'{"format": 1, "system": null, "messages": []}\n'
    if file.parent.exists() and name != "merge":
        file.write_bytes(old)
    filler = faults.fill(disk, leave=8192 if name == "quantize" else 0)  # TMPDIR is only taken if it can be written
    there = sorted(disk.rglob("*"))
    full = faults.run(asked.code, asked.args, disk, text=asked.text, **dict(asked.env))
    assert full.code == asked.ends, full.err
    (said,) = (line for line in full.err.splitlines() if "cannot write" in line)
    assert said.partition(": ")[2].startswith(asked.says.format(file=file, disk=disk))
    assert full.err.count("No space") <= 1
    assert not file.exists() or file.read_bytes() == old
    left = {path for path in disk.rglob("*") if path.suffix != ".lock"} - {disk / "merged"}
    assert left == set(there), "nothing half-written"
    filler.unlink()
    done = faults.run(asked.code, asked.args, disk, text=asked.text, **dict(asked.env))
    assert done.code == 0, done.err
    assert name == "quantize" or file.stat().st_size > len(old)
    assert not asked.out or full.out.count("\n") == done.out.count("\n") > 0


def test_a_pair_is_written_later_from_what_was_measured(tiny: Callable[..., Path], disk: Path, tmp_path: Path) -> None:
    """The disk of the pair is full, that of the cache is not."""
    work = Fitting(tmp_path / "fit", tiny("chatml"))
    work.out = disk / "a.toml"
    filler = faults.fill(disk)
    full = faults.run(work.code, work.args, disk, **work.env)
    assert full.code == 6, full.err
    last = full.err.splitlines()[-1]
    assert last.startswith(f"acd: cannot write {disk}")
    assert last.endswith("make room there; what is finished is kept, and the same command goes on")
    assert sorted(disk.iterdir()) == [filler]
    kept = work.kept()
    filler.unlink()
    done = faults.run(work.code, work.args, disk, **work.env)
    assert done.code == 0, done.err
    assert work.kept() == kept, "nothing was measured again"
    assert work.pair()


def test_no_cache_ends_a_command(tiny: Callable[..., Path], disk: Path, tmp_path: Path) -> None:
    def answer(folder: Path, **env: str) -> faults.Done:
        work = Caching(folder, tiny("chatml"))
        return faults.run(work.code, work.args, folder, **work.env | env)

    wanted = answer(tmp_path / "cache")
    faults.fill(disk)
    full = answer(disk / "cache", XDG_DATA_HOME=str(disk), XDG_CONFIG_HOME=str(disk), TMPDIR=str(disk))
    assert full[:3] == wanted[:3]
    assert [path for path in (disk / "cache").rglob("*") if path.is_file()] == []


def test_a_server_and_a_chat_at_a_terminal_go_on_without_room(
    tiny: Callable[..., Path], disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The states that an engine writes between answers, and the history of what was typed."""
    probe.verify(tiny("chatml"))
    faults.fill(disk)
    monkeypatch.setenv("ACD_CACHE_DIR", str(disk / "cache"))
    history = History(disk / "data" / "history")
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=512, threads=1, cache=True) as engine:
        for number in range(2):
            assert (
                engine.generate(f"Which of these is red? {number} " * 10, Options(max_tokens=3)).run().completion_tokens
            )
            history.store_string("Which of these is red? " * 500)
    assert "".join(history.load_history_strings()) in "Which of these is red? " * 1000
    assert not faults.drafts(disk)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [("--jsonl",), ("hi", "--stats", "--no-stdin"), ("--port", "0")], ids=" ".join)
def test_streams_without_room(tiny: Callable[..., Path], more: tuple[str, ...]) -> None:
    """stdout ends the command; stderr costs nothing but what it would have said."""
    if "--port" in more:
        pytest.importorskip("starlette")
        pytest.importorskip("uvicorn")
    program, code = ("acd-serve", SERVE) if "--port" in more else ("acd-run", RUN)
    command = [sys.executable, "-c", code, str(tiny("chatml")), *PLAIN, *more]
    how = {"input": b'{"id": 1, "prompt": "hi"}\n', "env": child_env(), "timeout": 3600, "check": False}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, **how)
        assert done.returncode == 6
        assert done.stderr.decode().splitlines()[-1] == (
            f"{program}: cannot write the output: No space left on device: make room there"
        )
        if program == "acd-run":
            silent = subprocess.run(command, stdout=subprocess.PIPE, stderr=full, **how)
            assert silent.returncode == 0
            assert silent.stdout
