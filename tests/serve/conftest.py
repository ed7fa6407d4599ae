"""Fixtures: servers that tests leave as they found them, and slow ones."""

from __future__ import annotations

import gates
import pytest
from http_server import Server
from manual import made_for
from worker_client import PAIR

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from collections.abc import Callable, Iterator
from pathlib import Path


@pytest.fixture(scope="session")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A tiny model and a pair without a gate."""
    pair = tmp_path_factory.mktemp("pairs") / "short.toml"
    pair.write_text(PAIR.format("short", "kind") + made_for(tiny("chatml")))
    return (str(tiny("chatml")), "-t", "1", "-c", "512", "--pair", str(pair))


@pytest.fixture(scope="session")
def slow_base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """It takes seconds for a prompt or an answer that fills its context."""
    model = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)
    pair = tmp_path_factory.mktemp("slow") / "short.toml"
    pair.write_text(PAIR.format("short", "kind") + made_for(model))
    return (str(model), "-t", "1", "-c", "4096", "--pair", str(pair))


@pytest.fixture(scope="session")
def gated_base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A pair whose gate tells one request from another."""
    model = tiny("chatml", n_layers=4)
    folder = tmp_path_factory.mktemp("gated")
    gates.write_pair(folder, model)
    return (str(model), "-t", "1", "-c", "512", "--pair", str(folder / "gated.toml"))


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """A server of the test's own."""
    servers = []

    def make(*args: str, **how: object) -> Server:
        servers.append(Server(*args, **how))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def server(base: tuple[str, ...]) -> Iterator[Server]:
    """One server for all tests that leave it as they found it: no fault of a client may end it, or be noted down."""
    made = Server(*base)
    yield made
    made.process.terminate()
    code, err = made.end()
    assert code == 143 and b"Traceback" not in err, err
    made.close()
