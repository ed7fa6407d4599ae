"""acd models, acd pairs, acd bench."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from acd_local.cli.main import command
from acd_local.cli.shell import run_cli

BAD_PAIR = 'format = 1\nname = "bad"\nsafe = "Be kind."\nadversarial = "Be rude."\nalpha = -1\n'


def acd(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = run_cli(command, "acd", args)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_models_lists_caches_with_size_architecture_and_pair(
    capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "llama"))
    (tmp_path / "llama").mkdir()
    shutil.copy(tiny("chatml"), tmp_path / "llama" / "good.gguf")
    (tmp_path / "llama" / "broken.gguf").write_bytes(b"GGUF\x03\0\0\0")
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = acd(capsys, "models")
    assert code == 0
    assert "good.gguf" in out
    assert "llama" in out
    assert "no pair made for it" in out and "pair: smollm2-135m-instruct" in out
    assert "unusable" in out
    assert sorted(tmp_path.rglob("*")) == before
    code, out, _ = acd(capsys, "models", "--json")
    rows = {Path(row["path"]).name: row for row in json.loads(out)}
    assert rows["good.gguf"]["size"] == (tmp_path / "llama" / "good.gguf").stat().st_size
    assert rows["good.gguf"]["pair"] is None
    assert rows["broken.gguf"]["error"]


def test_pairs_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = acd(capsys, "pairs", "list")
    assert code == 0
    assert out.startswith("default ")
    assert "alpha 0.5" in out
    assert "beta 0.1" in out
    code, out, _ = acd(capsys, "pairs", "show", "default")
    assert code == 0
    for text in ("safe prompt", "adversarial prompt", "provenance", "manual", "nothing is ever sampled from it"):
        assert text in out


def test_pairs_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text(BAD_PAIR)
    code, out, err = acd(capsys, "pairs", "check", str(bad))
    assert (code, out) == (5, "")
    assert err.count("\n") == 1
    assert "bad.toml" in err
    assert "alpha" in err
    bad.write_text(BAD_PAIR.replace("-1", "0.4"))
    code, out, err = acd(capsys, "pairs", "check", str(bad))
    assert (code, out) == (0, f"{bad}: valid\n")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("pairs", "show", "no-such"), 5),
        (("pairs", "check", "/no/such.toml"), 5),
        (("bench", "/no/such.gguf"), 3),
        (("bench",), 2),
        (("bench", "demo", "--rounds", "0"), 2),
        (("nonsense",), 2),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int) -> None:
    got, out, err = acd(capsys, *args)
    assert (got, out) == (code, "")
    assert err.startswith("acd: ")
    assert err.count("\n") == 1


def test_bench_measures_every_case(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path]) -> None:
    path = str(tiny("chatml"))
    code, out, err = acd(capsys, "bench", path, "--json", "--rounds", "1", "--tokens", "6", "-t", "1", "--no-memory")
    assert code == 0
    report = json.loads(out)
    cases = {case["case"]: case for case in report["groups"]["questions"]}
    assert list(cases)[:3] == ["plain llama.cpp", "acd --plain", "contrast"]
    for case in cases.values():
        assert case["tokens_per_second"] > 0
        assert case["ratio_to_plain"] > 0
        assert case["outside_decode_ms"] > 0
        assert case["first_token_s"] > 0
        assert case["peak_mb"] is None
    assert cases["plain llama.cpp"]["ratio_to_plain"] == 1.0
    assert "round 1 of 1" in err


@pytest.mark.slow
def test_bench_table_with_memory(capsys: pytest.CaptureFixture[str], tiny: Callable[..., Path]) -> None:
    code, out, _ = acd(capsys, "bench", str(tiny("chatml")), "--rounds", "1", "--tokens", "6", "-t", "1")
    assert code == 0
    (peaks,) = (line for line in out.splitlines() if line.startswith("peak memory: "))
    assert peaks.count(" MB") == 4
    assert "q8_0" not in out, "heads of 16 cannot be kept so"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("models",), ("pairs", "list"), ("pairs", "show", "default"), ("--help",)])
def test_a_full_disk_behind_stdout_is_exit_code_6(arguments: tuple[str, ...]) -> None:
    main = "from acd_local.cli.main import main; main()"
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, "-c", main, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (
        6,
        "acd: cannot write the output: No space left on device: make room there\n",
    )
