"""Fixtures: the demo model and tiny random ones, written once per test session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
from manual import DEFAULT

from acd_local import models
from acd_local.engine import Engine
from acd_local.evaluate import page
from acd_local.runtime import states


@pytest.fixture(scope="session", autouse=True)
def _private_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verdict cache, history and user pairs of the person who runs the tests stay out of it."""
    root = tmp_path_factory.mktemp("home")
    names = {"ACD_CACHE_DIR": "cache", "XDG_DATA_HOME": "data", "XDG_CONFIG_HOME": "config"}
    old = {name: os.environ.get(name) for name in [*names, "ACD_MODEL", "ACD_PROMPTS_DIR"]}
    os.environ.update({name: str(root / folder) for name, folder in names.items()})
    os.environ.pop("ACD_MODEL", None)
    os.environ.pop("ACD_PROMPTS_DIR", None)
    yield
    for name, value in old.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def _no_states_of_other_tests() -> None:
    """What a prompt costs must not depend on the tests before."""
    shutil.rmtree(Path(os.environ["ACD_CACHE_DIR"]) / states.FOLDER, ignore_errors=True)


@pytest.fixture(scope="session")
def demo() -> Path:
    """SmolLM2-135M-Instruct Q4_1."""
    return models.resolve("demo")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny("chatml"), tiny("chatml", writer=tiny_gguf.write_gemma3, seed=2): path of a tiny model, cached."""
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Path] = {}

    def make(family: str = "chatml", *, writer: Callable[..., Path] = tiny_gguf.write_llama, **kw: object) -> Path:
        key = f"{family}-{writer.__name__}-" + "-".join(f"{k}={v}" for k, v in sorted(kw.items()))
        if key not in made:
            made[key] = tiny_gguf.write_family(root / f"{len(made)}.gguf", family, writer=writer, **kw)
        return made[key]

    return make


@pytest.fixture(scope="module")
def engine(tiny: Callable[..., Path]) -> Iterator[Engine]:
    """A tiny model under the manual pair, for tests that leave it as it was."""
    with Engine(tiny("chatml"), pair=DEFAULT, ctx_size=1024, threads=1) as engine:
        yield engine


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have no figures, as where matplotlib is missing: drawing takes most of the time of a page."""
    monkeypatch.setattr(page, "_drawing", lambda: None)


@pytest.fixture
def asked(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Requests for whole optimizations of a tiny model, see `optimize_runs.Asked`."""
    from optimize_runs import Asked

    return Asked(tiny("chatml"), tmp_path, monkeypatch)
