"""Fixtures: workers, quick ones and slow ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from manual import made_for
from worker_client import PAIR, Client


@pytest.fixture(scope="session")
def base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    pair = tmp_path_factory.mktemp("pairs") / "short.toml"
    pair.write_text(PAIR.format("short", "kind") + made_for(tiny("chatml")))
    return (str(tiny("chatml")), "--jsonl", "-t", "1", "-c", "512", "--pair", str(pair))


@pytest.fixture
def start(base: tuple[str, ...]) -> Iterator[Callable[..., Client]]:
    """A worker of the test's own, ready event read."""
    clients = []

    def make(*args: str) -> Client:
        clients.append(Client(*base, *args))
        clients[-1].ready()
        return clients[-1]

    yield make
    for client in clients:
        client.kill()


@pytest.fixture(scope="module")
def worker(base: tuple[str, ...]) -> Iterator[Client]:
    """One worker for all tests that leave it as they found it: no defect of a line may end it."""
    client = Client(*base, "--temp", "0", "--max-tokens", "12")
    client.ready()
    yield client
    code, left, err = client.end()
    client.kill()
    assert (code, left, err) == (0, [], b"")


@pytest.fixture(scope="session")
def slow_base(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """It takes seconds for a prompt or an answer that fills its context."""
    model = tiny("chatml", n_embd=256, n_layers=4, n_ctx=4096)
    pair = tmp_path_factory.mktemp("slow") / "short.toml"
    pair.write_text(PAIR.format("short", "kind") + made_for(model))
    return (str(model), "--jsonl", "-t", "1", "-c", "4096", "--pair", str(pair))


@pytest.fixture(scope="module")
def slow(slow_base: tuple[str, ...]) -> Iterator[Client]:
    client = Client(*slow_base)
    client.ready()
    yield client
    client.kill()
