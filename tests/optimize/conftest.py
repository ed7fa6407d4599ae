"""Fixtures: one whole optimization for the tests that look at it or go on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from optimize_runs import Asked, Finished, optimize


@pytest.fixture(scope="session")
def finished(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = Asked(tiny("chatml"), tmp_path_factory.mktemp("finished"), monkeypatch)
        request = asked("prompts/mine.toml")
        return Finished(asked.folder, request.out, optimize(request))
