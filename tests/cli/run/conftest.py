"""Fixtures: acd-run in this process, quick and slow models for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from manual import made_for
from run_command import PAIR, Done, FakeStdin, subprocess_run

from acd_local.cli.run import command
from acd_local.cli.shell import run_cli
from acd_local.engine import Engine
from acd_local.options import Options


@pytest.fixture(scope="session")
def pair(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "short.toml"
    path.write_text(PAIR + made_for(tiny("chatml")))
    return path


@pytest.fixture(scope="session")
def base(tiny: Callable[..., Path], pair: Path) -> tuple[str, ...]:
    """MODEL and the flags that make it quick."""
    return (str(tiny("chatml")), "-t", "1", "-c", "512", "--pair", str(pair))


@pytest.fixture(scope="session")
def slow_model(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The same for a model that takes seconds over a long prompt."""
    path = tiny("chatml", n_embd=256, n_layers=4, n_ctx=16384)
    pair = tmp_path_factory.mktemp("slow") / "short.toml"
    pair.write_text(PAIR + made_for(path))
    subprocess_run((str(path), "hi", "-n", "1", "-t", "1", "-c", "512", "--pair", str(pair)))  # it is known to load
    return (str(path), "-t", "1", "-c", "16384", "--pair", str(pair))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """acd-run within this process."""

    def call(*args: str, stdin: bytes | None = None) -> Done:
        monkeypatch.setattr(sys, "stdin", FakeStdin(stdin))
        code = run_cli(command, "acd-run", args)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What reaches Engine.generate, which still does its work."""
    calls: list[dict[str, Any]] = []
    generate = Engine.generate

    def spy(self: Engine, messages: Any, options: Options, **more: Any) -> Any:
        calls.append({"engine": self, "messages": messages, "options": options, **more})
        return generate(self, messages, options, **more)

    monkeypatch.setattr(Engine, "generate", spy)
    return calls


@pytest.fixture(autouse=True)
def _no_debugging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ACD_DEBUG", raising=False)
    yield
