"""Fixtures: short texts, a small engine, the command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from acd_local.bench import questions
from acd_local.cli.main import command
from acd_local.cli.shell import run_cli


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny vocabulary takes many tokens for a text."""
    monkeypatch.setitem(questions.TEXTS, "repeats", [text[:300] for text in questions.TEXTS["repeats"]])


@pytest.fixture
def acd(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """acd("bench", ...): exit code, stdout, stderr."""

    def run(*args: str) -> tuple[int, str, str]:
        code = run_cli(command, "acd", args)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """script(peers.main, ...): the same of a script in benchmarks/."""

    def run(main: Callable[[list[str]], int], *args: Any) -> tuple[int, str, str]:
        code = main([*map(str, args), "--tokens", "8", "--rounds", "1", "--threads", "1"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
