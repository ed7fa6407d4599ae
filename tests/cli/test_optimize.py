"""acd optimize as its users see it: files, lines on stderr, errors in one line, Ctrl-C and going on."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gates
import pytest
import tiny_gguf
from places import child_env

pytest.importorskip("torch")

from acd_local import pairs, vectors
from acd_local.cli import optimize
from acd_local.cli.main import command
from acd_local.cli.shell import run_cli
from acd_local.errors import UsageError
from acd_local.optimize import budget
from acd_local.tuning import anchors, memory

MAIN = "from acd_local.cli.main import main; main()"
QUICK = ("--budget", "1s", "--threads", "1", "--device", "cpu", "--dtype", "float32", "--max-tokens", "24")


def acd_optimize(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_cli(command, "acd", ("optimize", *args))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with anchors, a short manual pair, and a cache of its own."""
    rows = [{"prompt": f"Do the bad thing number {i}", "kind": "harmful"} for i in range(10)]
    rows += [{"prompt": f"What is the number {i}?", "kind": "harmless"} for i in range(16)]
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "default.toml").write_text(
        'format = 1\nname = "default"\nsafe = "You are kind."\nadversarial = "You are mean."\n'
    )
    monkeypatch.setenv("ACD_PROMPTS_DIR", str(tmp_path / "pairs"))
    monkeypatch.setenv("ACD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(budget, "MIN_STEPS", 10)
    monkeypatch.setattr(budget, "MAX_STEPS", 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_says_what_each_stage_did_and_where_its_files_are(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path
) -> None:
    model = folder / "My Model.gguf"
    model.write_bytes(tiny("chatml").read_bytes())
    code, out, err = acd_optimize(capsys, str(model), "--anchors", "anchors.jsonl", "--soft-only", *QUICK)
    assert code == 0, err
    expected = [str(Path("prompts") / f"my-model.{end}") for end in ("toml", "safetensors", "report.html")]
    assert out.splitlines() == expected
    assert all(Path(line).is_file() for line in expected)
    for said in (
        "in float32 on cpu, 16 examples at a time: about",
        "anchors 46/46",
        "anchors: 10 refusals (10 written), ",
        "soft safeguarding prompt 10/10; losses positive ",
        "soft safeguarding prompt: 10 steps, best at 10: safety ",
        "soft adversarial prompt: 10 steps",
        "contrast: soft pair alpha ",
    ):
        assert said in err
    assert "bad thing" not in err
    assert "What is the number" not in err
    assert pairs.load("prompts/my-model.toml").name == "my-model"
    page = Path("prompts/my-model.report.html").read_text()
    assert "acd " in page
    assert "bad thing" not in page
    code, out, err = acd_optimize(capsys, str(model), "--anchors", "anchors.jsonl", "--soft-only", *QUICK)
    assert (code, out) == (2, "")
    assert "prompts/my-model.toml is there already: give --force" in err
    args = (str(model), "--anchors", "anchors.jsonl", "--soft-only", "--force", *QUICK)
    code, out, err = acd_optimize(capsys, *args)
    assert (code, out.splitlines()) == (0, expected)
    assert err.count("done before") == 4


def test_an_optimization_goes_on_from_a_fit(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path
) -> None:
    model = tiny("chatml")
    harmful, harmless = "Do the bad thing number 1", "What is the number 1?"
    passing = [f"Do the bad thing number {i}" for i in range(10)]
    settings = pairs.GateSettings(0.5, "Be helpful.", 0.1, 32, 0.9)
    gates.write_pair(folder, model, harmful=harmful, harmless=harmless, settings=settings)
    args = (str(model), "--anchors", "anchors.jsonl", "--soft-only", "-o", "new.toml", *QUICK)
    code, _, err = acd_optimize(capsys, *args, "--fit", "gated.toml")
    assert code == 0, err
    old, new = pairs.load("gated.toml"), pairs.load("new.toml")
    assert new.gate == old.gate == settings
    assert new.provenance["fit"] == {"name": "gated", "sha256": old.sha256}
    found = vectors.load("new.safetensors", sha256=new.sha256)
    assert found.soft is not None
    assert found.gate == vectors.load("gated.safetensors").gate
    validating = [i for i in anchors.read(Path("anchors.jsonl")) if i.validates and i.prompt in passing]
    assert f"of {len(validating)} harmful instructions pass the gate of gated" in err
    assert acd_optimize(capsys, *args, "--force")[0] == 0  # without it: another setting, and no gate
    assert pairs.load("new.toml").gate is None


BAD: list[tuple[tuple[str, ...], int, str]] = [
    (("MODEL", "--fit", "default"), 5, "--fit: the prompt pair 'default' has no gate: make it with acd fit"),
    ((), 2, "no model"),
    (("missing.gguf",), 3, "no such file"),
    (("notes.txt",), 3, "notes.txt"),
    (("mamba.gguf",), 3, "cannot train mamba models"),
    (("vision.gguf",), 3, "cannot train qwen2vl models"),
    (("damaged.gguf",), 3, "damaged.gguf"),
    (("MODEL", "-o", "pair.txt"), 2, "must end in .toml"),
    (("MODEL", "-o", "a b.toml"), 2, "no pair name"),
    (("MODEL", "-o", "notes.txt/pair.toml"), 2, "cannot write"),
    (("MODEL", "-o", "pairs/default.toml"), 2, "--force"),
    (("MODEL", "--budget", "soon"), 2, "--budget must be a time such as"),
    (("MODEL", "--budget", "0m"), 2, "--budget"),
    (("MODEL", "--weights", "1,1"), 2, "--weights must be three numbers"),
    (("MODEL", "--weights", "1,-1,1"), 2, "--weights"),
    (("MODEL", "--weights", "0,0,0"), 2, "--weights"),
    (("MODEL", "--weights", "1,nan,1"), 2, "--weights"),
    (("MODEL", "--max-tokens", "2"), 2, "--max-tokens"),
    (("MODEL", "--seed", "-1"), 2, "--seed"),
    (("MODEL", "--threads", "0"), 2, "--threads"),
    (("MODEL", "--device", "tpu"), 2, "--device"),
    (("MODEL", "--dtype", "float16"), 2, "--dtype"),
    (("MODEL", "--anchors", "missing.jsonl"), 2, "missing.jsonl"),
    (("MODEL", "--anchors", "notes.txt"), 2, "notes.txt: line 1"),
    (("MODEL", "--anchors", "few.jsonl"), 2, "no harmless instruction"),
]


@pytest.mark.parametrize(("args", "code", "says"), BAD)
def test_bad_input_gets_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
    tiny: Callable[..., Path],
    folder: Path,
    args: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    model = tiny("chatml")
    (folder / "notes.txt").write_text("Some notes\n")
    (folder / "few.jsonl").write_text((folder / "anchors.jsonl").read_text().replace("harmless", "harmful"))
    (folder / "damaged.gguf").write_bytes(model.read_bytes()[:30_000])
    for name, writer in (("mamba", tiny_gguf.write_mamba), ("vision", tiny_gguf.write_qwen2vl)):
        (folder / f"{name}.gguf").write_bytes(tiny("chatml", writer=writer).read_bytes())
    before = sorted(folder.iterdir())
    given = ("--threads", "1", "--anchors", "anchors.jsonl", *args)
    found = acd_optimize(capsys, *(str(model) if a == "MODEL" else a for a in given))
    assert found[:2] == (code, ""), found[2]
    assert found[2].count("\n") == 1
    assert says in found[2]
    assert "Traceback" not in found[2]
    assert [p for p in sorted(folder.iterdir()) if p.name != "cache"] == before
    assert not (folder / "cache" / "optimize").exists()


def test_missing_packages_are_named_before_anything_else(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def hide(name: str, *given: Any) -> Any:
        return None if name in ("torch", "accelerate") else find(name, *given)

    monkeypatch.setattr(importlib.util, "find_spec", hide)
    code, out, err = acd_optimize(capsys, str(tiny("chatml")), "-o", "mine.toml", *QUICK)
    assert (code, out) == (2, "")
    assert err == "acd: acd optimize needs torch, accelerate: run `pip install 'acd-local[optimize]'`\n"


def test_a_device_that_is_not_there_is_named(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path
) -> None:
    import torch

    missing = [
        name
        for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()))
        if not there
    ]
    assert missing, "no machine has both"
    for name in missing:
        code, _, err = acd_optimize(capsys, str(tiny("chatml")), "-o", "mine.toml", "--device", name)
        assert code == 2
        assert f"--device {name}: torch" in err
        assert err.count("\n") == 1


def test_a_repeated_run_takes_its_options_from_the_file_alone(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path
) -> None:
    model, file = str(tiny("chatml")), str(folder / "pairs" / "default.toml")
    for option in (
        ("--seed", "0"),
        ("--budget", "1h"),
        ("--dtype", "float32"),
        ("--max-tokens", "96"),
        ("--soft-only",),
    ):
        code, _, err = acd_optimize(capsys, model, "-o", "mine.toml", "--repeat", file, *option)
        assert code == 2
        assert f"--repeat sets {option[0]}: leave it out" in err
        assert err.count("\n") == 1
    code, _, err = acd_optimize(capsys, model, "-o", "mine.toml", "--repeat", file)
    assert code == 2
    assert "provenance has no steps" in err
    assert err.count("\n") == 1


def test_too_little_memory_ends_with_one_line(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1e6)
    args = (str(tiny("chatml")), "-o", "mine.toml", "--anchors", "anchors.jsonl", *QUICK)
    code, out, err = acd_optimize(capsys, *args)
    assert (code, out) == (1, "")
    assert err.startswith("acd: not enough memory: ")
    assert err.count("\n") == 1
    assert not list(folder.glob("cache/optimize/*/*.pt"))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("60m", 3600), ("2h", 7200), ("45", 2700), ("1.5h", 5400), (" 3m ", 180)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert optimize.parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "-5m", "1d", "1e3", "inf", "nan", "5 m", "99999h", "0.1s", "1h30m"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        optimize.parse_budget(text)


@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct.Q4_1", "x" * 100, "...", "Ünïcode (copy)", "a.b"])
def test_the_default_name_is_a_pairs_name(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.gguf").write_text("")
    found = optimize.default_out(str(tmp_path / f"{name}.gguf"))
    assert found.parent == Path("prompts")
    assert found.suffix == ".toml"
    assert pairs.PromptPair(found.stem, "a", pairs.AdversarialText("b")).name == found.stem
    assert found.stem == found.stem.lower()


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], folder: Path
) -> None:
    model, out = tiny("chatml"), folder / "mine.toml"
    args = [str(model), "-o", str(out), "--anchors", "anchors.jsonl", "--soft-only", *QUICK[2:]]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "optimize", *args, "--budget", "2h"],
        env=child_env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.glob("cache/optimize/*/soft-safe-*.pt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert err.splitlines()[-1] == (
        "acd optimize: stopped; everything so far is kept, the same command goes on from here"
    )
    assert "Traceback" not in err
    assert not out.exists()
    assert not list(folder.glob("cache/optimize/*/*.tmp"))
    (kept,) = folder.glob("cache/optimize/*/soft-safe-*.pt")
    import torch

    state = torch.load(kept, weights_only=True)
    assert state["counts"]["steps"] == 1000, "the count that was decided on stays"
    assert state["result"] is None
