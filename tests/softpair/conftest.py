"""Fixtures: a tiny model, a folder of pairs with soft prompts for it, and an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from soft_pairs import pair_for, write_pair

from acd_local import Engine
from acd_local.runtime.gguf_header import GGUFInfo, read_header


@pytest.fixture(scope="session")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("chatml")


@pytest.fixture(scope="session")
def info(model: Path) -> GGUFInfo:
    return read_header(model)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, info: GGUFInfo) -> Path:
    """Pairs `one` (alpha 0.3 when soft) and `two` with soft prompts, `bare` without."""
    folder = tmp_path_factory.mktemp("soft")
    write_pair(folder, "one", pair_for(info), "alpha = 0.9\n[soft]\nalpha = 0.3\n")
    write_pair(folder, "two", pair_for(info, seed=5))
    write_pair(folder, "bare", None)
    return folder


@pytest.fixture(scope="module")
def engine(model: Path, folder: Path) -> Iterator[Engine]:
    with Engine(model, pair=str(folder / "one.toml"), ctx_size=512, threads=1, soft=True) as engine:
        yield engine
