"""acd eval as its users see it: tables, files, errors in one line, Ctrl-C and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from places import child_env

from acd_local.cli.main import command
from acd_local.cli.progress import ProgressLine, progress_text
from acd_local.cli.shell import run_cli
from acd_local.progress import Progress

MAIN = "from acd_local.cli.main import main; main()"
QUICK = ("--threads", "1", "--ctx-size", "512", "--parallel", "4", "--max-tokens", "4", "--methods", "base,acd")


def acd_eval(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_cli(command, "acd", ("eval", *args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,label\nSay red,safe\nDo a bad thing,unsafe\nSay blue,safe\nDo a worse thing,unsafe\n")
    return path


def test_a_run_shows_its_tables_and_leaves_its_files(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, prompts: Path
) -> None:
    out_dir = tmp_path / "run"
    args = (
        str(tiny("chatml")),
        "--set",
        f"mine={prompts}",
        "-o",
        str(out_dir),
        *QUICK,
        "--sweep",
        "alpha=0.2,0.8,0.20",
    )
    code, out, err = acd_eval(capsys, *args)
    assert code == 0
    assert "mine-unsafe" in out
    assert "mine-safe" in out
    assert str(out_dir / "report.html") in err
    assert {p.name for p in out_dir.iterdir()} == {
        ".lock",
        "answers.jsonl",
        "report.html",
        "results.json",
        "run.json",
        "scores.jsonl",
    }
    info = json.loads((out_dir / "run.json").read_text())
    assert [(s["name"], s["n"], s["total"]) for s in info["sets"]] == [("mine-safe", 2, 2), ("mine-unsafe", 2, 2)]
    assert [m["name"] for m in info["methods"]] == ["base", "acd", "acd@alpha=0.2", "acd@alpha=0.8"]
    assert info["sweep"]["values"] == [0.2, 0.8]
    assert info["command"].startswith("acd eval ")
    assert "--sweep alpha=0.2,0.8,0.20" in info["command"]
    assert len((out_dir / "answers.jsonl").read_text().splitlines()) == 4 * 4
    code, again, err = acd_eval(capsys, *args)  # everything is there: only the tables are made again
    assert (code, again) == (0, out)
    assert "answers 16/16" in err
    code, shown, _ = acd_eval(capsys, "show", str(out_dir))
    assert (code, shown) == (0, out)
    code, shown, _ = acd_eval(capsys, "show", str(out_dir), "--markdown")
    assert code == 0
    assert shown.count("\n|") > 4


def test_a_missing_ray_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Before the model is even looked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("eval", "fit", "optimize"):
        for ray in (["--ray"], ["--ray", "local"]):
            code = run_cli(command, "acd", (name, "missing.gguf", *ray, "-o", "made.toml"))
            captured = capsys.readouterr()
            assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
            assert "pip install 'acd-local[ray]'" in captured.err
    assert run_cli(command, "acd", ("fit", "missing.gguf", "--ray", "")) == 2
    assert "--ray needs an address" in capsys.readouterr().err


def test_the_built_in_set_and_shards(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(tiny("chatml"))
    for i in (1, 2):
        assert acd_eval(capsys, model, *QUICK, "--limit", "3", "--shard", f"{i}/2", "-o", f"part{i}")[0] == 0
    code, out, _ = acd_eval(capsys, "merge", "part1", "part2", "-o", "whole")
    assert code == 0
    assert "smoke-harmful" in out
    assert acd_eval(capsys, model, *QUICK, "--limit", "3")[0] == 0  # into eval-MODEL
    default = next(tmp_path.glob("eval-*"))
    found = [json.loads((d / "results.json").read_text()) for d in (tmp_path / "whole", default)]
    for name in ("base", "acd"):
        one, two = (f["methods"][name]["sets"]["smoke-harmful"]["refusal"] for f in found)
        assert one == two


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--set", "x"), "NAME=FILE"),
        (("--set", "x=missing.csv:harmful"), "missing.csv"),
        (("--set", "x=one.txt"), "harmful"),
        (("--set", "x=one.txt:harmful", "--set", "x=one.txt:harmless"), "different names"),
        (("--methods", "base,guess"), "guess"),
        (("--methods", ","), "no method"),
        (("--methods-file", "one.txt"), "one.txt"),
        (("--sweep", "alpha"), "alpha=0,0.2"),
        (("--sweep", "alpha=0,x"), "alpha=0,0.2"),
        (("--sweep", "temp=0,1"), "alpha, beta or window"),
        (("--sweep", "alpha=-1"), "alpha"),
        (("--shard", "0/3"), "--shard"),
        (("--shard", "4/3"), "--shard"),
        (("--limit", "0"), "limit"),
        (("--temp", "-1"), "temp"),
        (("--seed", "99999999999"), "seed"),
        (("--threads", "0"), "threads"),
        (("-o", "one.txt"), "one.txt"),
    ],
)
def test_bad_input_gets_one_line(
    capsys: pytest.CaptureFixture[str],
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("Say red\n")
    code, out, err = acd_eval(capsys, str(tiny("chatml")), *QUICK, *args)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert says in err
    assert not list(tmp_path.glob("eval-*/answers.jsonl"))


def test_bad_files_get_one_line(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path) -> None:
    contents = {
        "empty.csv": b"",
        "column.csv": b"colour,size\nred,2\n",
        "broken.json": b'["a", ',
        "broken.jsonl": b'{"prompt": "a"}\n{"prompt"\n',
        "long.jsonl": b'"' + b"a" * 10_000_000 + b'"\n',
        "latin.txt": "r\xf6d\n".encode("latin-1"),
        "utf16.csv": "prompt\nred\n".encode("utf-16"),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        code, out, err = acd_eval(capsys, str(tiny("chatml")), "--set", f"x={tmp_path / name}:harmful", *QUICK)
        assert (code, out, err.count("\n")) == (2, "", 1), name
        assert name in err
        assert len(err) < 600
    for args in (("show", str(tmp_path)), ("merge", str(tmp_path), "-o", str(tmp_path / "out"))):
        code, out, err = acd_eval(capsys, *args)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert str(tmp_path) in err


def test_a_missing_model_or_judge(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    assert acd_eval(capsys, "missing.gguf")[0] == 3
    code, _, err = acd_eval(capsys, str(tiny("chatml")), *QUICK, "--judge", "missing.gguf", "-o", str(tmp_path / "x"))
    assert code == 3
    assert err.splitlines()[-1].endswith("missing.gguf") or "missing.gguf" in err


def test_a_judge_is_asked(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, prompts: Path
) -> None:
    out_dir = tmp_path / "run"
    judge = str(tiny("chatml", seed=2))
    args = (str(tiny("chatml")), "--set", f"mine={prompts}", *QUICK, "--judge", judge, "-o", str(out_dir))
    assert acd_eval(capsys, *args)[0] == 0
    answers = [json.loads(line) for line in (out_dir / "answers.jsonl").read_text().splitlines()]
    assert answers
    assert all(0 <= a["judge"] <= 1 for a in answers)
    results = json.loads((out_dir / "results.json").read_text())
    unsafe = [a for a in answers if a["method"] == "acd" and a["set"] == "mine-unsafe"]
    rate = sum(a["judge"] > 0.5 and a["label"] != "degenerate" for a in unsafe) / len(unsafe)
    assert results["methods"]["acd"]["sets"]["mine-unsafe"]["harmless"]["value"] == rate


def test_interrupted_it_keeps_what_is_done_and_goes_on(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text("".join(f"Do bad thing number {i}\n" for i in range(60)))
    args = [str(tiny("chatml")), "--set", "many=many.txt:harmful", *QUICK, "--max-tokens", "40", "-o", "run"]
    command_line = [sys.executable, "-c", MAIN, "eval", *args]
    env = child_env()
    process = subprocess.Popen(
        command_line, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    answers = tmp_path / "run" / "answers.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not answers.exists() or answers.read_bytes().count(b"\n") < 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert "the same command goes on" in err.splitlines()[-1]
    kept = answers.read_bytes().splitlines()
    assert 5 <= len(kept) < 120
    done = subprocess.run(command_line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0
    lines = answers.read_bytes().splitlines()
    assert lines[: len(kept)] == kept
    assert len(lines) == 120


def test_help_names_the_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = acd_eval(capsys, "--help")
    assert code == 0
    assert out.startswith("Usage: acd eval [OPTIONS] [MODEL]")
    assert "acd eval show DIR" in out
    assert "acd eval merge" in out


def test_progress_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert progress_text(Progress("answers", 0, 9, 0.0, None)) == "answers 0/9"
    assert progress_text(Progress("answers", 4, 9, 31.4, 95.0)) == "answers 4/9, 31 per minute, 1:35 left"
    assert progress_text(Progress("answers", 4, 900, 5.0, 3725.0)) == "answers 4/900, 5 per minute, 1:02:05 left"
    with ProgressLine("acd eval") as line:
        for done in range(10):
            line.show(Progress("answers", done, 9, 1.0, 1.0))
        line.show(Progress("fluency", 0, 2, 0.0, None))
    assert capsys.readouterr().err.splitlines() == [
        "acd eval: answers 0/9, 1 per minute, 0:01 left",
        "acd eval: answers 9/9",
        "acd eval: fluency 0/2",
    ]


def test_margins_do_not_depend_on_shards(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acd_local.evaluate.scoring.MARGIN_PROMPTS", 3)
    (tmp_path / "some.txt").write_text("".join(f"Do bad thing number {i}\n" for i in range(8)))
    args = (str(tiny("chatml")), *QUICK, "--set", "bad=some.txt:harmful", "--methods", "base")
    for shard in ("1/1", "1/2", "2/2"):
        assert acd_eval(capsys, *args, "--shard", shard, "-o", shard.replace("/", "-"))[0] == 0
    assert acd_eval(capsys, "merge", "1-2", "2-2", "-o", "all")[0] == 0
    alone, merged = (json.loads((tmp_path / d / "results.json").read_text())["margins"] for d in ("1-1", "all"))
    for name, margin in alone.items():
        assert merged[name]["bad"]["n"] == margin["bad"]["n"] == 3
        assert merged[name]["bad"]["value"] == pytest.approx(margin["bad"]["value"], abs=1e-3)


def test_a_changed_file_is_another_set(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, prompts: Path
) -> None:
    args = (str(tiny("chatml")), *QUICK, "--set", f"mine={prompts}", "-o", str(tmp_path / "run"))
    assert acd_eval(capsys, *args)[0] == 0
    prompts.write_text(prompts.read_text().replace("blue", "green"))
    code, out, err = acd_eval(capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "mine-safe" in err


def test_nothing_fits(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, prompts: Path
) -> None:
    args = (str(tiny("chatml")), *QUICK, "--ctx-size", "32", "--set", f"mine={prompts}", "-o", str(tmp_path / "run"))
    code, out, err = acd_eval(capsys, *args)
    assert (code, out) == (4, "")
    assert "--ctx-size" in err.splitlines()[-1]
    assert err.count("left out: mine-safe") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names that are no text")
def test_names_that_are_no_text(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = os.fsdecode(bytes(tmp_path) + b"/odd\xff.txt")
    Path(path).write_text("Do a bad thing\n")
    args = (str(tiny("chatml")), *QUICK, "--set", f"odd={path}:harmful", "-o", str(tmp_path / "run"))
    assert acd_eval(capsys, *args)[0] == 0
    assert acd_eval(capsys, "show", str(tmp_path / "run"))[0] == 0
