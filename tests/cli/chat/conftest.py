"""Fixtures: a pair, an engine and a chat in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chat_desk import PAIR, Desk
from manual import made_for

from acd_local import Engine


@pytest.fixture(scope="session")
def pair_file(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "short.toml"
    path.write_text(PAIR.format(name="short", safe="You are kind.") + made_for(tiny("chatml")))
    return path


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path], pair_file: Path) -> Iterator[Engine]:
    with Engine(tiny("chatml"), pair=str(pair_file), ctx_size=512, threads=1) as engine:
        yield engine


@pytest.fixture
def desk(engine: Engine, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(engine, capsys)
