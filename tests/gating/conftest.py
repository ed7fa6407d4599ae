"""Fixtures: a model with four layers, a pair with a gate for it, and their engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import gates
import pytest
from gated import four_layers

from acd_local import Engine
from acd_local.pairs import PromptPair
from acd_local.runtime import reading


@pytest.fixture(scope="session")
def model(tiny: Callable[..., Path]) -> Path:
    return four_layers(tiny)


@pytest.fixture(scope="session")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> PromptPair:
    return gates.write_pair(tmp_path_factory.mktemp("pair"), model)


@pytest.fixture(scope="module")
def engine(model: Path, pair: PromptPair) -> Iterator[Engine]:
    with Engine(model, pair=pair, ctx_size=1024, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def slow_model(tiny: Callable[..., Path]) -> Path:
    return tiny("chatml", n_embd=512, n_layers=6, n_ctx=4096)


@pytest.fixture
def short_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of 128 tokens."""
    for name in ("READ_TOKENS", "LEAST_TOKENS"):
        monkeypatch.setattr(reading, name, 128)
