"""benchmarks/start.py: the programs that are compared do the same, and where no compiler is, another one does it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import start

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("compiler", [True, False])
def test_all_programs_say_the_same(
    script: Run, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, compiler: bool
) -> None:
    said: list[tuple[bool, str]] = []
    run = start.start

    def noting(command: Sequence[object]) -> subprocess.CompletedProcess[str]:
        done = run(command)
        said.append(("--pair" in command, done.stdout.strip()))
        return done

    monkeypatch.setattr(start, "start", noting)
    if not compiler:
        monkeypatch.setattr(start.shutil, "which", lambda name: None)
    code, out, err = script(start.main, tiny("chatml"), "--ctx-size", "512", "--json")
    assert code == 0, err
    assert len({text for _, text in said}) == 1, "greedy, under no pair: none was made for the model"
    assert said[0][1]
    found = json.loads(out)
    assert found["bare"] == "bare.c" if compiler else found["bare"].startswith("bare.py, for want of a C compiler")
    programs = ["bare, the same prompt", "acd-run", "acd-run --no-cache"]
    assert [(case["pair"], case["program"]) for case in found["cases"]] == [
        (pair, program) for pair in ("own pair", "as-is") for program in programs
    ]
    for case in found["cases"]:
        assert case["seconds"] > 0 and case["ratio_to_bare"] > 0
        assert {"load", "prompt"} <= set(case["parts"])
    assert {"imports", "contexts", "end", "all"} <= set(found["cases"][1]["parts"])


def test_people_get_a_table(script: Run, tiny: Callable[..., Path]) -> None:
    code, out, err = script(start.main, tiny("chatml"), "--ctx-size", "512")
    assert code == 0
    assert "round 1 of 1" in err
    lines = out.splitlines()
    assert [line.split(", ")[0] for line in lines[2:8]] == ["own pair"] * 3 + ["as-is"] * 3
    assert lines[8] == "milliseconds of one start each:"


def test_a_program_that_fails_is_an_error(script: Run, tiny: Callable[..., Path], monkeypatch: Any) -> None:
    monkeypatch.setattr(start, "ACD_RUN", "import sys; sys.exit('no luck')")
    code, out, err = script(start.main, tiny("chatml"), "--ctx-size", "512")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].endswith("no luck")
